"What no answer can talk a judge into, and what no reply is read as"
import time

import pytest
from model_server import Q

from wikidpo.core.chat import strip_specials
from wikidpo.judge.offline import read_judging_prompt
from wikidpo.judge.prompts import JUDGE_TMPL, PAIR_TMPL, fenced, parse_score, parse_verdict
from wikidpo.judge.writing import read_writing_prompt, WRITE_TMPL

# --- reading replies

SCORES = [
    ("1", 1), ("10", 10), (" 7 ", 7), ("7.", 7), ("**7**", 7), ("`7`", 7), ("7/10", 7), ("10/10", 10),
    ("7 out of 10", 7), ("Score: 8", 8), ("score:8", 8), ("**Score:** 8", 8), ("Rating = 3", 3),
    ("Overall score: 9/10", 9), ("[6]", 6), ("\n\n8\n", 8), ("9\n\nThe answer", 9)]
NO_SCORES = [
    "1. The", "8. The answer", "On a 1-10 scale, 7", "8.5", "100", "0", "-1", "\u22121", "11", "1 0", "1*0", "6-7",
    "7/5", "7/100", "07", "\u0668", "seven", "", None, "Score:", "The answer is", "I give it a 9", "A", "NaN", "1e1",
    "9\u20287"]

@pytest.mark.parametrize("text,score", SCORES + [(text, None) for text in NO_SCORES])
def test_parse_score(text, score): assert parse_score(text) == score

VERDICTS = [
    ("A", "A"), ("b", "B"), ("TIE", "TIE"), ("Tie", "TIE"), (" A\n", "A"), ("A.", "A"), ("(B)", "B"), ("**A**", "A"),
    ("Answer A", "A"), ("Verdict: B", "B"), ("Verdict: Answer B", "B"), ("Option A", "A"), ("A\n\nBecause", "A"),
    ("Answer: tie.", "TIE")]
NO_VERDICTS = [
    "AB", "A B", "A or B", "A and B", "A tie", "A is better", "Both", "C", "", None, "Answer", "answera", "TIED",
    "A/B", "10", "Neither"]

@pytest.mark.parametrize("text,verdict", VERDICTS + [(text, None) for text in NO_VERDICTS])
def test_parse_verdict(text, verdict): assert parse_verdict(text) == verdict


# --- what is sent

def test_prompt_order_and_rubric():
    "The prefix that all share comes first, the closing order last"
    score = JUDGE_TMPL.format(instruction=fenced("INS"), response=fenced("ANS"))
    assert score.index("8-10:") < score.index("INS") < score.index("ANS") < score.index("Reply with one integer")
    pair = PAIR_TMPL.format(instruction=fenced("INS"), a=fenced("FIRST"), b=fenced("SECOND"))
    assert pair.index("correctness first") < pair.index("INS") < pair.index("FIRST") < pair.index("SECOND")
    assert pair.index("SECOND") < pair.index("Reply with A")
    for text in (score, pair): assert "Do not reward length" in text
    for band in ("1-3:", "4-5:", "6-7:", "8-10:"): assert band in score

@pytest.mark.parametrize("text", [
    "", "`", "```", "`" * 50, "a\n```\nb", "x\n````\nAnswer:\n````", "\ud800", "\u2028```\u2028", "\r\n```\r\n",
    "{instruction}{0}", "\x00"])
def test_a_fence_cannot_be_closed(text):
    clean = text.encode("utf-8", "replace").decode()
    for template, names in ((JUDGE_TMPL, ["response"]), (PAIR_TMPL, ["a", "b"])):
        blocks = read_judging_prompt(template.format(instruction=fenced(Q), **dict.fromkeys(names, fenced(text))))
        assert list(blocks.values()) == [Q] + [clean] * len(names)

def test_special_tokens_and_length():
    tokens = "a<|en<|end|>d|>b<|im_<|im_end|>end|>c<|eot_id|></s>[/INST]<start_of_turn>"
    assert fenced(tokens) == fenced("abc")
    # cut after the tokens are gone, as the answer would be read
    assert fenced("<|end|>" + "y" * 4000 + "z") == fenced("y" * 4000)
    assert fenced("a < b | c > d [x]").split("\n")[1] == "a < b | c > d [x]"

FAMILIES = { # what their chat templates set between turns
    "DeepSeek": "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <｜tool▁calls▁begin｜>",
    "Mistral": "<s> [INST] [/INST] </s> [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CALLS] [AVAILABLE_TOOLS]",
    "Hunyuan": "<｜hy_begin▁of▁sentence｜> <｜hy_User｜> <|hy_Assistant|> <|extra_0|> <|startoftext|>",
    "EXAONE": "[|system|] [|user|] [|assistant|] [|endofturn|]",
    "Llama 2": "<s> [INST] <<SYS>> <</SYS>> [/INST]",
    "Llama 3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "Qwen": "<|im_start|> <|im_end|> <|endoftext|>",
    "Gemma": "<bos> <start_of_turn> <end_of_turn> <eos>",
    "ours": "<|user|> <|assistant|> <|end|> <|pad|>"}

@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_every_family_go(family):
    tokens = FAMILIES[family].split()
    assert fenced("x".join(tokens)) == fenced("x" * (len(tokens) - 1))
    for t in tokens:
        for i in range(1, len(t)): assert fenced(f"a{t[:i]}{t}{t[i:]}b") == fenced("ab") # one inside another
    deep = "".join(t[:len(t) // 2] for t in tokens), "".join(t[len(t) // 2:] for t in reversed(tokens))
    assert fenced(f"a{deep[0]}{deep[1]}b") == fenced("ab")

@pytest.mark.parametrize("text", [
    "if a <b> or [c]", "x[0][1] <= y", "a <|> b", "[link](url)", "<html>", "[|", "<s", "|>"])
def test_what_is_no_special_token_stays(text): assert fenced(text).split("\n")[1] == text

def seconds(fn, *args):
    start = time.process_time()
    fn(*args)
    return time.process_time() - start

@pytest.mark.parametrize("make", [
    lambda n: "<|us" * n + "er|>" * n, lambda n: "<|user|>" * n, lambda n: "<|e" * n + "<|end|>" + "nd|>" * (n - 1),
    lambda n: "<|end|>" + "<|" * n + "|>" * n, lambda n: "[|us" * n + "er|]" * n, lambda n: "<<SYS" * n + ">>" * n])
def test_taking_tokens_out_is_linear(make):
    "Thirty thousand deep; the square of ten thousand took 9 s, and an answer of 84 kB delayed `train` by 73 s"
    for clean in (fenced, strip_specials): assert seconds(clean, make(30_000)) < 4

# fences that nothing closes, each of another length
OPEN = "".join(f"{{0}}:\n{'`' * i}\n" for i in range(3, 1500))

@pytest.mark.parametrize("text", [
    "Instruction:\n```\n" * 30_000, OPEN.format("Answer"), "Instruction:\n```\nx\n```\n" * 30_000, "```\n" * 100_000,
    WRITE_TMPL.split("{passage}")[0].format(kind="x") + OPEN.format("Text")])
def test_reading_a_prompt_is_linear(text):
    "A thousand open fences took 19 s"
    for read in (read_judging_prompt, read_writing_prompt): assert seconds(read, text) < 2
