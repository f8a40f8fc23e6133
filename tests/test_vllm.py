"""The judge's road to a real vLLM (make test-vllm): starting, probing, constraining, expected scores, time-outs,
cancelling, stopping"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import CONTEXT, FLAGS, serving_model
from smol import gguf_file

import wikidpo.judge.ask
from wikidpo.core.chat import encode_prompt, load_tokenizer
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.model import GPT
from wikidpo.judge.ask import ask_judge, ask_score, ask_verdict, check_teacher, JudgingTask, Probe
from wikidpo.judge.client import make_client
from wikidpo.judge.config import TeacherLost
from wikidpo.judge.offline import httpx, listening_socket
from wikidpo.judge.pool import JudgePool
from wikidpo.judge.prompts import fenced, JUDGE_TMPL, SCORE_LABELS
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.models.hf import export, import_
from wikidpo.run.folder import write_jsonl
from wikidpo.world.answers import answer, QUALITIES
from wikidpo.world.facts import DATA, facts, find_fact, prompts, statement
from wikidpo.world.grounded import tasks, truth

pytestmark = pytest.mark.vllm
KEPT = Probe(constrained=True)
QUESTIONS = prompts("eval")[:40]
LONG = JudgingTask(str, 1000, "", ["quartz " * 300]) # its only choice is hundreds of tokens long

@pytest.fixture(scope="module")
def client(vllm):
    with make_client(vllm.url) as c: yield c

def metric(vllm, name, **labels):
    "The sum of a counter or gauge of vLLM's /metrics"
    with httpx.Client(trust_env=False) as c: page = c.get(vllm.url.removesuffix("/v1") + "/metrics").text
    rows = [line for line in page.split("\n") if re.match(rf"vllm:{name}\{{", line)]
    for label, value in labels.items(): rows = [line for line in rows if f'{label}="{value}"' in line]
    assert rows, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in rows)

def running(vllm): return metric(vllm, "num_requests_(running|waiting)")
def finished(vllm): return metric(vllm, "request_success_total")

def until(f, seconds=20):
    "Whether f() comes true in time"
    end = time.monotonic() + seconds
    while not f():
        if time.monotonic() > end: return False
        time.sleep(.05)
    return True

def slow(client, vllm):
    "A judging call that keeps vLLM busy for more than a second"
    return ask_judge(client, vllm.cfg.serve_model, "Hello", LONG, KEPT)

def group(pid):
    "The processes of a process group that still run"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try: state, _, pgid = (p/"stat").read_text().rsplit(")", 1)[1].split()[:3]
        except OSError: continue
        if int(pgid) == pid and state != "Z": found.append(int(p.name))
    return found


# --- scores and verdicts

def test_probe(vllm, client):
    assert check_teacher(client, vllm.cfg.serve_model, expected=True) == Probe(constrained=True, expected=True)

def test_the_removed_option_is_ignored_with_status_200(vllm, client):
    "Why a probe looks at the reply: guided_choice is gone from vLLM, and no error says so"
    messages = [dict(role="user", content=QUESTIONS[0])]
    ask = dict(model=vllm.cfg.serve_model, messages=messages, max_tokens=8, temperature=0.)
    def says(**option): return client.chat.completions.create(**ask, extra_body=option).choices[0].message.content
    assert says(guided_choice=["quartz"]) != "quartz"
    assert says(structured_outputs=dict(choice=["quartz"])) == "quartz"

def test_constrained_scores_and_verdicts_are_all_read(vllm, client):
    "MiniWiki knows nothing of judging: left alone it writes a sentence, constrained it gives a score or a verdict"
    model, rng = vllm.cfg.serve_model, random.Random(0)
    def answers(x): return [answer(find_fact(x), kind, rng) for kind in QUALITIES]
    texts = {x: answers(x) for x in QUESTIONS}
    items, scores, verdicts = [], [], []
    for x, ys in texts.items(): items += [(x, y) for y in ys]
    with JudgePool(lambda item: ask_score(client, model, *item, KEPT), lambda _, r: scores.append(r)) as pool:
        pool.submit(items)
    with JudgePool(lambda item: ask_verdict(client, model, *item, KEPT), lambda _, r: verdicts.append(r)) as pool:
        pool.submit((x, *ys[:2]) for x, ys in texts.items())
    assert len(scores) == 160 and {(r.outcome, r.tries) for r in scores} == {("ok", 1)}
    assert {r.value for r in scores} <= set(range(1, 11))
    assert len(verdicts) == 40 and {(r.outcome, r.tries) for r in verdicts} == {("ok", 1)}
    assert {r.value for r in verdicts} <= {"A", "B", "TIE"}
    free = [ask_score(client, model, x, ys[0]) for x, ys in list(texts.items())[:5]]
    assert {r.value for r in free} == {None}

def test_a_label_of_several_tokens_comes_whole(vllm, client):
    tok = load_tokenizer(DATA/"tokenizer.json")
    ask = dict(model=vllm.cfg.serve_model, messages=[dict(role="user", content="x")])
    for label in ("10", "TIE"):
        length = len(tok.encode(label).ids)
        assert length > 1 # or this test would show nothing
        option = dict(structured_outputs=dict(choice=[label]))
        reply = client.chat.completions.create(**ask, max_tokens=length, extra_body=option)
        assert reply.choices[0].message.content == label

def test_prefix_caching_finds_the_rubric_again(vllm, client):
    "The four answers of a prompt share the rubric and the instruction: most of their tokens are not computed again"
    def counts(): return metric(vllm, "prefix_cache_queries_total"), metric(vllm, "prefix_cache_hits_total")
    before = counts()
    for text in ("Lima.", "It is Lima.", "Rome, I think.", "Nobody can tell."):
        ask_score(client, vllm.cfg.serve_model, "What is the capital of Peru?", text, KEPT)
    asked, hit = (now - then for now, then in zip(counts(), before))
    assert hit > .4 * asked > 0


# --- expected scores

def own_model():
    m = load_checkpoint(DATA/"model.safetensors")
    wide = GPT(replace(m.cfg, block_size=CONTEXT))
    wide.load_state_dict(m.state_dict())
    return wide.eval()

def test_expected_score_is_that_of_our_own_forward_pass(vllm, client, monkeypatch):
    "Score and label mass from vLLM's probabilities, '10' being a token or two, against the policy's own float32 logits"
    model, tok = own_model(), load_tokenizer(DATA/"tokenizer.json")
    vocabulary = range(tok.get_vocab_size())
    # MiniWiki gives labels next to nothing; what it gives can be compared
    monkeypatch.setattr(wikidpo.judge.ask, "MIN_MASS", 1e-9)
    monkeypatch.setattr(wikidpo.judge.ask, "ASK_LOGPROBS", dict(logprobs=True, top_logprobs=len(vocabulary)))
    texts = [tok.decode([i], skip_special_tokens=False).strip() for i in vocabulary]
    def probabilities(ids):
        with torch.no_grad(): return torch.softmax(model(torch.tensor([ids]))[0][0, -1].double(), -1).tolist()
    for x, text in ((QUESTIONS[0], "Lima."), (QUESTIONS[1], "Nobody knows."), (QUESTIONS[2], "10 10 10")):
        ids = encode_prompt(tok, JUDGE_TMPL.format(instruction=fenced(x), response=fenced(text)))
        p = dict.fromkeys(SCORE_LABELS, 0)
        for v, t in zip(probabilities(ids), texts):
            if t in p: p[t] += v
        after = probabilities(ids + [tok.token_to_id("1")])
        zero, end = after[tok.token_to_id("0")], after[tok.token_to_id("<|end|>")]
        # "10" is a token after a space, and two tokens without one
        p["1"], p["10"] = p["1"] * end / (zero + end), p["10"] + p["1"] * zero / (zero + end)
        mass = sum(p.values())
        r = ask_score(client, vllm.cfg.serve_model, x, text, Probe(True, True))
        assert abs(r.value - sum(int(s) * v for s, v in p.items()) / mass) < .01
        assert abs(r.mass / mass - 1) < .01

def test_little_label_mass_is_no_score(vllm, client):
    r = ask_score(client, vllm.cfg.serve_model, QUESTIONS[0], "Lima.", Probe(True, True))
    assert r.value is None and r.mass < .01 and r.outcome == "unparsable"


# --- time-outs and cancelling

def test_too_long_a_prompt_is_refused_and_not_retried(vllm, client):
    asked = metric(vllm, "prefix_cache_queries_total")
    r = ask_score(client, vllm.cfg.serve_model, QUESTIONS[0], "word " * 700)
    assert r.outcome == "refused" and "maximum context length" in r.error
    assert metric(vllm, "prefix_cache_queries_total") == asked

@contextmanager
def frozen(vllm):
    """Its engine stands still, its HTTP server does not: what times out meanwhile does so on a busy machine too, where
    a waiting process may sleep through its time"""
    engine = [p for p in group(vllm.process.pid) if p != vllm.process.pid]
    for p in engine: os.kill(p, signal.SIGSTOP)
    try: yield
    finally:
        for p in engine: os.kill(p, signal.SIGCONT)

def test_a_time_out_is_tried_again_then_said(vllm, client):
    "Neither attempt is finished in vLLM either: what nobody waits for is dropped"
    before = finished(vllm)
    with frozen(vllm), make_client(vllm.url, timeout=.5, retries=1) as impatient:
        with pytest.raises(TeacherLost, match="did not answer in time"): slow(impatient, vllm)
    assert slow(client, vllm).value.startswith("quartz " * 100) # it would have come, given time
    assert until(lambda: running(vllm) == 0) and finished(vllm) == before + 1

def test_a_pool_of_time_outs_stops(vllm):
    tried = []
    def fn(i):
        tried.append(i)
        return slow(impatient, vllm)
    with frozen(vllm), make_client(vllm.url, timeout=.5, retries=0) as impatient:
        with pytest.raises(TeacherLost, match="did not answer in time"):
            with JudgePool(fn, lambda *_: None, concurrency=4, max_lost=5) as pool: pool.submit(range(100))
    assert 5 <= len(tried) <= 8 # the fifth, and what was in flight beside it
    assert until(lambda: running(vllm) == 0)

def test_cancelled_calls_end_in_the_server(vllm, client):
    "Ctrl-C: after the grace the connections are closed, and vLLM drops 32 requests that had seconds to go"
    def fn(i): return slow(hasty, vllm)
    with ExitStack() as still, pytest.raises(KeyboardInterrupt), make_client(vllm.url, retries=0) as hasty:
        with JudgePool(fn, lambda *_: None, grace=.2) as pool:
            pool.submit(range(1000)) # more than can end while we look
            assert until(lambda: running(vllm) or pool.failed, 120) and not pool.failed, pool.failed
            still.enter_context(frozen(vllm)) # until the connections are closed
            time.sleep(1) # what the engine had finished is counted now: on a quick machine the first 32 are
            before = finished(vllm)
            raise KeyboardInterrupt
    slow(client, vllm) # queued behind whatever is left
    assert until(lambda: running(vllm) == 0) and finished(vllm) - before < 1 + 32

def default_sigint(): signal.signal(signal.SIGINT, signal.SIG_DFL)

def command(*words, **env):
    "The command line in a process of its own"
    program = [sys.executable, "-c", "from wikidpo.cli import main; main()", *map(str, words)]
    return subprocess.Popen(program, env=os.environ | {"TQDM_DISABLE": "1"} | env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=default_sigint)

def test_ctrl_c_in_mine_ends_its_requests_and_the_rest_follows(vllm, tmp_path):
    "`wikidpo mine`, stopped and started: no request outlives it, nothing is asked twice, every answer has a score"
    teacher = ["--teacher.url", vllm.url, "--teacher.model", vllm.cfg.serve_model, "--teacher.concurrency", 4]
    mine = ["mine", *teacher, "--n-prompts", 48, "--max-new", 24, "--out", tmp_path/"run"]
    first = command(*mine)
    samples = tmp_path/"run"/"samples.jsonl"
    assert until(lambda: samples.exists() and samples.read_bytes().count(b"\n") > 8, 60)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=30)
    assert first.returncode == 130 and "the same command goes on from here" in err
    assert until(lambda: running(vllm) == 0, 2)
    kept = samples.read_bytes()
    assert 8 < kept.count(b"\n") < 192
    again = command(*mine)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    rows = read_jsonl(samples)
    assert len(rows) == 192 and {r["score"] for r in rows} <= set(range(1, 11))
    # MiniWiki is no judge, but not to every answer it gives the same score: there is something to pair
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in read_jsonl(tmp_path/"run"/"pairs.jsonl"))
    assert f"{len(read_jsonl(tmp_path/'run'/'pairs.jsonl'))} pairs" in out
    score = {(r["prompt_id"], r["k"]): r["score"] for r in rows}
    assert len(score) == 192
    assert all(score[r["prompt_id"], r["k"]] == r["score"] for r in map(json.loads, kept.splitlines()))

def test_judge_says_that_its_verdicts_were_constrained(vllm, tmp_path):
    teacher = ["--teacher.url", vllm.url, "--teacher.model", vllm.cfg.serve_model]
    sizes = ["--n", 16, "--max-new", 24]
    judge = command("judge", *teacher, *sizes, "--a", DATA/"model.safetensors", "--out", tmp_path/"run")
    out, err = judge.communicate(timeout=120)
    assert judge.returncode == 0, err
    assert "replies were constrained" in out
    summary = json.loads((tmp_path/"run"/"summary.json").read_text())["judge"]
    assert summary["constrained"] and (summary["n"], summary["unparsed"]) == (16, 0)


# --- a real model

@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    "(SmolLM2's folder, a `Vllm` that serves it)"
    tmp = tmp_path_factory.mktemp("smollm2")
    import_(gguf_file(), tmp/"smollm2")
    export(tmp/"smollm2"/"model.safetensors", tmp/"smollm2"/"tokenizer.json", tmp/"hf")
    # on a CPU, a seeded request whose prompt is read in parts ends vLLM ("CPU Generator does not use offset")
    flags = FLAGS + " --no-enable-chunked-prefill --max-num-seqs 16"
    with serving_model(tmp/"hf", flags=flags) as server: yield tmp/"smollm2", server

@pytest.mark.smollm2
def test_smollm2_as_policy_and_as_a_weak_judge(smollm2, tmp_path):
    "It is sampled from through `--engine vllm`; asked to judge, what is no score is counted and not scored"
    folder, server = smollm2
    some = [t for t in tasks("mine") if t.kind == "question"][:8]
    write_jsonl(tmp_path/"prompts.jsonl", [{"prompt": t.prompt} for t in some])
    own = ["--checkpoint", folder/"model.safetensors", "--tokenizer", folder/"tokenizer.json"]
    sizes = ["--prompts", tmp_path/"prompts.jsonl", "--n-prompts", 8, "--max-new", 32, "--best", 4, "--gap", 1]
    mine = command("mine", "--profile", "smollm2", *own, *sizes, "--engine", "vllm", "--policy-url", server.url,
                   "--out", tmp_path/"run")
    out, err = mine.communicate(timeout=300)
    assert mine.returncode == 0, err
    rows = read_jsonl(tmp_path/"run"/"samples.jsonl")
    assert len(rows) == 32 and sum(truth(r["prompt"], r["text"]).score >= 4 for r in rows) > 4
    with make_client(server.url) as client:
        asked = [ask_score(client, server.cfg.serve_model, r["prompt"], r["text"]) for r in rows]
        kept = [ask_score(client, server.cfg.serve_model, r["prompt"], r["text"], KEPT) for r in rows]
    assert {j.outcome for j in asked} <= {"ok", "unparsable"} and any(j.outcome == "unparsable" for j in asked)
    assert all((j.value is None) == (j.outcome == "unparsable") for j in asked)
    assert all(j.outcome == "ok" and 1 <= j.value <= 10 for j in kept)

@pytest.mark.smollm2
def test_smollm2_as_a_teacher_writes_prompts_about_texts(smollm2, tmp_path):
    "A real model's replies: some are instructions and become prompts, each that is none is counted and dropped"
    folder, server = smollm2
    (tmp_path/"texts").mkdir()
    some = facts()[::len(facts()) // 60]
    for i in range(0, 60, 5):
        said = " ".join(map(statement, some[i:i + 5]))
        (tmp_path/"texts"/f"{i}.txt").write_text(said)
    teacher = ["--teacher.url", server.url, "--teacher.model", server.cfg.serve_model]
    write = command("prompts", tmp_path/"texts", *teacher, "--tokenizer", folder/"tokenizer.json", "--n-eval", 4,
                    "--out", tmp_path/"prompts")
    out, err = write.communicate(timeout=300)
    assert write.returncode == 0, err
    found = json.loads((tmp_path/"prompts"/"counts.json").read_text())
    rows = [read_jsonl(tmp_path/"prompts"/f"prompts_{part}.jsonl") for part in ("mine", "eval")]
    assert found["passages"]["kept"] == 12 and found["read"] == 36
    assert sum(map(len, rows)) + sum(found["dropped"].values()) == 36 and len(rows[1]) == 4 < len(rows[0])


# --- starting and stopping

KEY = "sk-vllm-canary-0123456789"

def serve_words(vllm, **settings):
    "The verb `teacher` and its flags"
    ours = dict(serve_model=vllm.cfg.serve_model, port=0, dtype="float32", max_model_len=CONTEXT,
                gpu_memory_utilization=.1)
    words = ["teacher"]
    for name, value in (ours | settings).items(): words += ["--" + name.replace("_", "-"), value]
    return [*words, f"--flags={FLAGS}"]

def vllm_of(pid):
    "The child that leads vLLM's processes, None before it has any; the other child watches over them"
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return next((p for p in found if len(group(p)) >= 2), None)

def test_the_verb_serves_with_a_key_until_told_to_end(vllm):
    server = command(*serve_words(vllm), WIKIDPO_TEACHER_KEY=KEY)
    try:
        lines = [server.stdout.readline(), server.stdout.readline()]
        url = re.search(r"vLLM listens at (\S+) under the name", lines[0])[1]
        assert "can be constrained" in lines[1]
        child = vllm_of(server.pid)
        assert child # the API server, with its engine
        with make_client(url, KEY) as good, make_client(url, "wrong") as bad:
            assert check_teacher(good, vllm.cfg.serve_model).constrained
            with pytest.raises(UserError, match="refuses the key"): check_teacher(bad, vllm.cfg.serve_model)
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=30)
    finally: server.kill()
    assert server.returncode == 0 and KEY not in "".join(lines) + out + err
    assert group(child) == []
    port = int(url.split(":")[2].split("/")[0])
    with listening_socket("127.0.0.1", port): pass # free again

def test_ctrl_c_while_it_starts_leaves_nothing(vllm):
    server = command(*serve_words(vllm))
    try:
        assert until(lambda: vllm_of(server.pid), 60) # the engine is there
        child = vllm_of(server.pid)
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    finally: server.kill()
    assert server.returncode == 0 and "listens" not in out and group(child) == []

@pytest.mark.parametrize("settings, env, says", [
    (dict(serve_model="nobody/no-such-model"), dict(HF_HUB_OFFLINE="1"),
     "the model 'nobody/no-such-model' cannot be had"),
    (dict(serve_model="/no/such/folder"), {}, "the model '/no/such/folder' cannot be had"),
    (dict(gpu_memory_utilization=1.), {}, "memory is short"),
    (dict(max_model_len=100_000), {}, "max_model_len"),
], ids=["no model", "no folder", "memory", "other"])
def test_what_it_says_when_it_cannot_start(vllm, settings, env, says):
    words = [w for w in serve_words(vllm, **settings) if "--flags" not in str(w)] + ["--flags=--enforce-eager"]
    server = command(*words, **env)
    out, err = server.communicate(timeout=120)
    err = err.strip()
    assert server.returncode == 2 and err.startswith("error: ") and "\n" not in err and says in err, err

def test_port_taken(vllm):
    server = command(*serve_words(vllm, port=vllm.cfg.port))
    out, err = server.communicate(timeout=60)
    taken = f"port {vllm.cfg.port} on 127.0.0.1 is taken: stop what listens there, or choose another with --port"
    assert server.returncode == 2 and err.strip() == f"error: {taken}"
