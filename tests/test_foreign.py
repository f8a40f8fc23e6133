"Pairs and answers that others wrote: what is read, what is left out and said, and that a run can be trained on them"
import json
import sys

import pytest

from engines import TOK
from wikidpo.cli import main
from wikidpo.core.chat import Chat, render_prompt
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.models.chat_template import render_chat
from wikidpo.models.hf import freeze_chat
from wikidpo.run.foreign import (answer_of, is_ours, Misread, open_pairs, pair_of, pairs_for, read_answers, read_pairs,
                                 told)
from wikidpo.show.inspector import PairInspector
from wikidpo.world.facts import DATA

SHIPPED = read_jsonl(DATA/"pairs.jsonl")[:40]


def user(text): return {"role": "user", "content": text}


def assistant(text): return {"role": "assistant", "content": text}


def ultra(pair):
    "A row in the manner of UltraFeedback"
    sides = {side: [user(pair["prompt"]), assistant(pair[side])] for side in ("chosen", "rejected")}
    return {"prompt": pair["prompt"], "prompt_id": "ab12", "messages": sides["chosen"], **sides,
            "score_chosen": 8.5, "score_rejected": 3.0}


def hh(pair, before=""):
    "A row in the manner of hh-rlhf"
    return {side: f"{before}\n\nHuman: {pair['prompt']}\n\nAssistant: {pair[side]}" for side in ("chosen", "rejected")}


def trl(pair):
    "A row of TRL's conversational form"
    return {"prompt": [user(pair["prompt"])], "chosen": [assistant(pair["chosen"])],
            "rejected": [assistant(pair["rejected"])]}


def shared(pair):
    "A row in the manner of ShareGPT's preference files"
    return {"conversations": [{"from": "human", "value": pair["prompt"]}],
            "chosen": {"from": "gpt", "value": pair["chosen"]}, "rejected": {"from": "gpt", "value": pair["rejected"]}}


FORMS = {"ultrafeedback": ultra, "hh-rlhf": hh, "trl": trl, "sharegpt": shared}


def texts(pair): return {name: pair[name] for name in ("prompt", "chosen", "rejected")}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_rows(tmp_path, form):
    path = write(tmp_path/"theirs.jsonl", *map(FORMS[form], SHIPPED))
    taken = read_pairs(path)
    assert [texts(pair) for pair in taken.rows] == [texts(pair) for pair in SHIPPED]
    assert not is_ours(path) and not taken.left_out and "left out" not in told(taken, "pairs")


def test_scores_stay_on_our_scale_only():
    row = ultra(SHIPPED[0])
    assert (pair_of(row)["score_chosen"], pair_of(row)["score_rejected"]) == (8.5, 3)
    for odd in (0, 11, None, True, "8", float("nan")): assert "score_chosen" not in pair_of(row | {"score_chosen": odd})
    assert pair_of(hh(SHIPPED[0]) | {"chosen-rating": 5, "rejected-rating": 1})["score_rejected"] == 1


def test_earlier_turns_stay_with_the_prompt():
    before = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Well.\n\nAssistant: Good."
    pair = pair_of(hh(SHIPPED[0], before))
    assert pair == texts(SHIPPED[0]) | {"turns": [["Hi", "Hello.\n\nHow are you?"], ["Well.", "Good."]]}


WRONG = [
    (ultra(SHIPPED[0]) | {"rejected": ultra(SHIPPED[0])["chosen"]}, "the same text"),
    (ultra(SHIPPED[0]) | {"rejected": ultra(SHIPPED[1])["rejected"]}, "do not answer the same prompt"),
    (hh(SHIPPED[0]) | {"chosen": hh(SHIPPED[0])["chosen"] + "\n\nHuman: Thanks"}, "end in one answer"),
    (hh(SHIPPED[0], "\n\nHuman: Hi"), "do not take turns"),
    (hh(SHIPPED[0]) | {"chosen": f"\n\nHuman: {SHIPPED[0]['prompt']}\n\nAssistant:"}, "an answer is empty"),
    (trl(SHIPPED[0]) | {"system": 3}, "the system message is no text"),
    (trl(SHIPPED[0]) | {"prompt": [user("x"), {"role": "system", "content": "x"}, user("y")]}, "in the middle"),
    (trl(SHIPPED[0]) | {"prompt": [{"role": "system", "content": "x"}]}, "there is no prompt"),
    (ultra(SHIPPED[0]) | {"chosen": [{"role": "system", "content": "x"}, *ultra(SHIPPED[0])["chosen"]]},
     "do not answer the same prompt"),
    (trl(SHIPPED[0]) | {"chosen": []}, "end in one answer"),
    (trl(SHIPPED[0]) | {"chosen": None}, "the field 'chosen' is missing"),
    (trl(SHIPPED[0]) | {"chosen": 3}, "expected a text, or messages"),
    (trl(SHIPPED[0]) | {"chosen": [{"role": ["user"], "content": "x"}]}, "neither user nor assistant"),
    (trl(SHIPPED[0]) | {"chosen": [{"role": "assistant", "content": None}]}, "no text"),
    (trl(SHIPPED[0]) | {"chosen": [{"role": "assistant", "content": 3}]}, "no text"),
    (trl(SHIPPED[0]) | {"chosen": [{"role": "assistant", "content": {"a": 1}}]}, "no text"),
    (trl(SHIPPED[0]) | {"prompt": 3}, "expected a text, or messages"),
    (trl(SHIPPED[0]) | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "no text"),
    (trl(SHIPPED[0]) | {"prompt": [user(" ")]}, "a message is empty"),
    ({"chosen": "Lima.", "rejected": "Rome."}, "there is no prompt"),
]


@pytest.mark.parametrize("row, why", WRONG, ids=[f"{i} {why}" for i, (_, why) in enumerate(WRONG)])
def test_what_cannot_be_read_says_why(row, why):
    with pytest.raises(Misread, match=why): pair_of(row)


def test_rows_that_are_left_out_are_counted_with_the_place_of_the_first(tmp_path):
    good, same = ultra(SHIPPED[0]), WRONG[0][0]
    taken = read_pairs(write(tmp_path/"t.jsonl", good, same, WRONG[1][0], same, good))
    assert len(taken.rows) == 2 and sorted(taken.left_out.values()) == [1, 2]
    said = told(taken, "pairs")
    first = f"2 left out, from {tmp_path}/t.jsonl:2 on: chosen and rejected are the same"
    assert "2 pairs in" in said and first in said
    assert f"1 left out, from {tmp_path}/t.jsonl:3 on" in said


def test_a_file_without_one_usable_row_is_refused_with_the_first_reason(tmp_path):
    with pytest.raises(UserError, match=r"t.jsonl:1: chosen and rejected are the same text; none of 3 rows"):
        read_pairs(write(tmp_path/"t.jsonl", *[WRONG[0][0]] * 3))
    with pytest.raises(UserError, match="holds no rows"): read_pairs(write(tmp_path/"t.jsonl"))
    with pytest.raises(UserError, match="no such file"): read_pairs(tmp_path/"none.jsonl")
    with pytest.raises(UserError, match="no such file"): read_pairs(tmp_path/"none.parquet")


def test_lists_and_parquet_are_read_too(tmp_path, monkeypatch):
    (tmp_path/"t.json").write_text(json.dumps([ultra(SHIPPED[0]), WRONG[0][0]]))
    taken = read_pairs(tmp_path/"t.json")
    assert len(taken.rows) == 1 and "t.json, row 2" in told(taken, "pairs")
    (tmp_path/"t.json").write_text('[{"prompt"')
    with pytest.raises(UserError, match="t.json: broken JSON"): read_pairs(tmp_path/"t.json")
    (tmp_path/"t.json").write_text("[3]")
    with pytest.raises(UserError, match="t.json, row 1: expected an object"): read_pairs(tmp_path/"t.json")
    (tmp_path/"t.parquet").write_text("PAR1 no Parquet")
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="cannot be read as Parquet"): read_pairs(tmp_path/"t.parquet")
    from pyarrow import parquet
    parquet.write_table(pa.Table.from_pylist([ultra(pair) for pair in SHIPPED] + [WRONG[0][0]]), tmp_path/"t.parquet")
    taken = read_pairs(tmp_path/"t.parquet")
    assert [texts(pair) for pair in taken.rows] == [texts(pair) for pair in SHIPPED]
    assert f"1 left out, from {tmp_path}/t.parquet, row {len(SHIPPED) + 1} on" in told(taken, "pairs")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"): read_pairs(tmp_path/"t.parquet")


def test_a_file_of_ours_stays_strict_and_keeps_its_columns(tmp_path):
    path = write(tmp_path/"pairs.jsonl", *SHIPPED)
    data, taken = open_pairs(path, TOK, 256)
    assert taken is None and data.pairs == SHIPPED
    write(path, *SHIPPED, SHIPPED[0] | {"rejected": SHIPPED[0]["chosen"]})
    with pytest.raises(UserError, match="pairs.jsonl:41: chosen and rejected are the same"): open_pairs(path, TOK, 256)


def test_what_a_model_has_no_place_for_is_left_out(tmp_path):
    talk = hh(SHIPPED[0], "\n\nHuman: Hi\n\nAssistant: Hello.")
    long = SHIPPED[0] | {"prompt": "word " * 300}
    path = write(tmp_path/"t.jsonl", ultra(SHIPPED[0]), talk, ultra(long), ultra(long))
    data, taken = open_pairs(path, TOK, 256)
    assert [texts(pair) for pair in data.pairs] == [texts(SHIPPED[0])]
    assert sorted(taken.left_out.values()) == [1, 2] and "holds one instruction" in told(taken, "pairs")
    with pytest.raises(UserError, match="t.jsonl:1: it has earlier turns"):
        pairs_for(write(tmp_path/"t.jsonl", talk), TOK, 256)


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_a_template_that_places_every_turn_carries_a_conversation(tmp_path, monkeypatch):
    "The tokens of a prompt with turns are those that the template itself makes of the whole conversation"
    chat = freeze_chat(CHATML, {}, ("<|im_start|>", "<|im_end|>"))
    assert chat.turn == "<|im_end|>\n<|im_start|>user\n"
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" \
            f"<|im_start|>user\n{SHIPPED[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(SHIPPED[0]["prompt"], chat, [["Hi", "Hello."]]) == whole
    monkeypatch.setattr(TOK, "chat", Chat(turn="<|end|>\n<|user|>\n"))
    row = hh(SHIPPED[0], "\n\nHuman: Hi<|end|>\n\nAssistant: Hello.")
    data, taken = open_pairs(write(tmp_path/"t.jsonl", row), TOK, 256)
    told_so = "<|user|>\nHi\n<|end|>\n<|assistant|>\nHello.<|end|>\n" + render_prompt(SHIPPED[0]["prompt"])
    assert not taken.left_out and TOK.decode(data.rows[0][0], skip_special_tokens=False) == told_so
    path = write(tmp_path/"ours.jsonl", data.pairs[0])                # such a row of ours comes to the same
    assert PairDataset(path, TOK, 256).rows == data.rows


def system(text): return {"role": "system", "content": text}


@pytest.mark.parametrize("row", [
    trl(SHIPPED[0]) | {"prompt": [system("Be brief."), user(SHIPPED[0]["prompt"])]},
    trl(SHIPPED[0]) | {"prompt": [system(" "), system(" Be brief.\n"), user(SHIPPED[0]["prompt"])]},
    {side: [system("Be brief."), *ultra(SHIPPED[0])[side]] for side in ("chosen", "rejected")},
    ultra(SHIPPED[0]) | {"prompt": [system("Be brief."), user(SHIPPED[0]["prompt"])]},
    ultra(SHIPPED[0]) | {"system": "Be brief."}, hh(SHIPPED[0]) | {"system_prompt": "Be brief."},
    texts(SHIPPED[0]) | {"system": "Be brief."}], ids=range(7))
def test_a_system_message_is_read_wherever_it_stands(row):
    assert texts(pair_of(row)) == texts(SHIPPED[0]) and pair_of(row)["system"] == "Be brief."


def test_a_column_that_is_not_ours_makes_a_file_one_of_elsewhere(tmp_path):
    path = write(tmp_path/"t.jsonl", texts(SHIPPED[0]) | {"system_prompt": "Be brief."})
    assert not is_ours(path) and open_pairs(path, TOK, 256)[0].pairs[0]["system"] == "Be brief."


def test_a_system_prompt_that_is_empty_in_the_first_row_is_read_in_the_others(tmp_path):
    path = tmp_path/"t.jsonl"
    rows = [texts(pair) | {"system_prompt": said} for pair, said in zip(SHIPPED, ["", "Be brief."])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [pair.get("system", "") for pair in open_pairs(path, TOK, 256)[0].pairs] == ["", "Be brief."]


def test_system_messages_of_two_places_are_joined_and_one_is_not_doubled():
    row = trl(SHIPPED[0]) | {"prompt": [system("Be brief."), user("y")]}
    assert pair_of(row | {"system": "Be kind."})["system"] == "Be kind.\n\nBe brief."
    assert pair_of(row | {"system": "Be brief."})["system"] == "Be brief."
    for nothing in (None, "", []): assert "system" not in pair_of(trl(SHIPPED[0]) | {"system": nothing})


def test_an_answer_is_judged_with_its_system_message():
    asked = "System: Be brief.\n\nUser: Why?"
    assert answer_of({"messages": [system("Be brief."), user("Why?"), assistant("So.")]}) == (asked, "So.")
    assert answer_of({"system": "Be brief.", "prompt": "Why?", "response": "So."}) == (asked, "So.")


def test_a_system_message_has_the_place_that_the_template_gives_it(tmp_path, monkeypatch):
    "As the template itself shows it before three turns; in front of the first instruction where it has no place"
    chat = freeze_chat(CHATML, {}, ("<|im_start|>", "<|im_end|>"))
    assert chat.system == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")
    talk = [system("Be brief."), user("Hi"), assistant("Hello."), user("Why?")]
    whole = render_chat(CHATML, talk, True, {})
    assert render_prompt("Why?", chat, [["Hi", "Hello."]], "Be brief.") == whole
    row = trl(SHIPPED[0]) | {"prompt": [system("Be <|end|>brief."), user(SHIPPED[0]["prompt"])]}
    path = write(tmp_path/"t.jsonl", row, trl(SHIPPED[1]))

    def shown(data): return TOK.decode(data.rows[0][0], skip_special_tokens=False)

    data, taken = open_pairs(path, TOK, 256)
    assert shown(data) == render_prompt(f"Be brief.\n\n{SHIPPED[0]['prompt']}") and not taken.left_out
    assert "; the system message of 1 stands in front of the first instruction" in told(taken, "pairs")
    monkeypatch.setattr(TOK, "chat", Chat(system=("<|user|>\n((", "))\n<|user|>\n")))
    data, taken = open_pairs(path, TOK, 256)
    assert shown(data) == "<|user|>\n((Be brief.))\n" + render_prompt(SHIPPED[0]["prompt"])
    assert "system message" not in told(taken, "pairs")
    assert PairDataset(write(tmp_path/"ours.jsonl", *data.pairs), TOK, 256).rows == data.rows


LLAMA2 = (
    "{% set told = '' %}{% if messages[0].role == 'system' %}"
    "{% set told = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ (told if loop.first else '') + m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}")
NO_PLACE = {
    "refused": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    "left out": CHATML.replace("%}<|im_start|>", "%}{% if m['role'] != 'system' %}<|im_start|>", 1).replace(
        "{% endfor", "{% endif %}{% endfor"),
    "as a user": CHATML.replace("m['role'] }}", "'user' if m['role'] == 'system' else m['role'] }}"),
    "at the last instruction": "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}!{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


def test_a_system_message_within_the_first_instruction_has_a_place_too():
    chat = freeze_chat(LLAMA2, {}, ("</s>",))
    talk = [system("Be brief."), user("Hi"), assistant("Hello."), user("Why?")]
    assert render_prompt("Why?", chat, [["Hi", "Hello."]], "Be brief.") == render_chat(LLAMA2, talk, True, {})


@pytest.mark.parametrize("name", NO_PLACE)
def test_a_template_without_a_place_for_a_system_message_has_none(name):
    chat = freeze_chat(NO_PLACE[name], {"eos_token": "<|im_end|>"}, ("<|im_start|>", "<|im_end|>"))
    assert chat.system is None
    assert render_prompt("Hi", chat, system="Be brief.") == render_prompt("Be brief.\n\nHi", chat)


def test_a_template_that_says_more_of_past_answers_carries_none():
    spaced = CHATML.replace("{{ m['content'] }}", "{{ ' ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}")
    last = CHATML.replace("<|im_end|>", "{% if loop.index < 3 %}<|im_end|>{% endif %}")
    no_talk = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
    for template in (spaced, last, no_talk):
        chat = freeze_chat(template, {"eos_token": "<|im_end|>"}, ("<|im_start|>", "<|im_end|>"))
        assert chat.turn is None


@pytest.mark.parametrize("turns", ["Hi", ["Hi"], [["Hi"]], [["Hi", 3]], {"Hi": "Ho"}])
def test_turns_that_are_none_are_refused(tmp_path, turns):
    with pytest.raises(UserError, match=r"pairs.jsonl:1: the field 'turns'"):
        PairDataset(write(tmp_path/"pairs.jsonl", SHIPPED[0] | {"turns": turns}), TOK, 256)


def test_a_run_is_trained_on_them_and_says_what_was_left_out(tmp_path, capsys):
    talk = hh(SHIPPED[0], "\n\nHuman: a\n\nAssistant: b")
    path = write(tmp_path/"theirs.jsonl", *map(ultra, SHIPPED), WRONG[0][0], talk)
    ours = write(tmp_path/"ours.jsonl", *[texts(pair) for pair in SHIPPED])
    for name, pairs in (("theirs", path), ("ours", ours)):
        main(["train", "--pairs", str(pairs), "--out", str(tmp_path/name), "--wandb", "disabled", "--watch", "0"])
    said = capsys.readouterr().out
    assert "train: 40 pairs in" in said and f"1 left out, from {path}:42 on: it has earlier turns" in said
    theirs, ours = (json.loads((tmp_path/name/"summary.json").read_text())["train"] for name in ("theirs", "ours"))
    assert sum(theirs.pop("left_out").values()) == 2
    assert {k: v for k, v in theirs.items() if k != "seconds"} == {k: v for k, v in ours.items() if k != "seconds"}
    assert (tmp_path/"theirs"/"dpo.pt").read_bytes() == (tmp_path/"ours"/"dpo.pt").read_bytes()


def test_the_inspector_reads_them_and_exports_rows_of_ours(tmp_path, capsys):
    talk = hh(SHIPPED[5], "\n\nHuman: Hi\n\nAssistant: Ho")
    path = write(tmp_path/"theirs.jsonl", *map(ultra, SHIPPED[:5]), WRONG[0][0], talk)
    inspector = PairInspector(path, tmp_path/"out.jsonl")
    assert "6 pairs in" in capsys.readouterr().out and inspector.view["total"] == 7 and inspector.view["kept"] == 6
    inspector.position = 5
    assert inspector.pair["prompt"] == f"User: Hi\n\nAssistant: Ho\n\nUser: {SHIPPED[5]['prompt']}"
    inspector.export()
    assert read_jsonl(tmp_path/"out.jsonl") == [pair_of(ultra(pair)) for pair in SHIPPED[:5]] + [
        texts(SHIPPED[5]) | {"turns": [["Hi", "Ho"]]}]
    assert len(PairInspector(tmp_path/"out.jsonl").pairs) == 6


ANSWERS = [
    {"prompt": "Why?", "response": "So."}, {"prompt": "Why?", "completion": "So."},
    {"question": "Why?", "answer": "So."}, {"instruction": "Why?", "output": "So."},
    {"prompt": "Why?", "text": "So.", "k": 0},
    {"messages": [user("Why?"), assistant("So.")]}, {"prompt": [user("Why?")], "completion": [assistant("So.")]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"prompt": "\n\nHuman: Why?\n\nAssistant:", "response": "So."},
    {"prompt": "Why?", "response": [user("Why?"), assistant("So.")]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]}],
     "response": "So."},
]


@pytest.mark.parametrize("row", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_under_every_name(row): assert answer_of(row) == ("Why?", "So.")


def test_an_answer_may_be_empty_and_a_prompt_may_not(tmp_path):
    assert answer_of({"prompt": "Why?", "response": ""}) == ("Why?", "")
    assert answer_of({"instruction": "Add", "input": "1 2", "output": "3"}) == ("Add\n\n1 2", "3")
    taken = read_answers(write(tmp_path/"a.jsonl", {"prompt": "Why?", "reply": "So."}, ANSWERS[0], {"response": "So."}))
    assert taken.rows == [("Why?", "So.")] and taken.left_out.total() == 2
    assert "a.jsonl:1 on: there is no answer (none of response," in told(taken, "answers")
