"The judge's road to a real vLLM (make test-vllm): starting, probing, constraining, expected scores, time-outs, cancelling, stopping"
import json, math, os, random, re, signal, subprocess, sys, time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2, pytest, torch

import wikidpo.teacher
from served import CONTEXT, FLAGS
from wikidpo import miniwiki
from wikidpo.chat import encode_prompt, load_tokenizer
from wikidpo.files import UserError, read_jsonl
from wikidpo.model import GPT, load_checkpoint
from wikidpo.teacher import *

pytestmark = pytest.mark.vllm
DATA, PLAIN, KEPT = miniwiki.DATA, Probe(), Probe(constrained=True)
QUESTIONS = miniwiki.prompts("eval")[:40]

@pytest.fixture(scope="module")
def client(vllm):
    with make_client(vllm.url) as c: yield c

def metric(vllm, name, **labels):
    "The sum of a counter or gauge of vLLM's /metrics"
    with httpx2.Client(trust_env=False) as c: lines = c.get(vllm.url.removesuffix("/v1") + "/metrics").text.split("\n")
    rows = [l for l in lines if re.match(rf"vllm:{name}\{{", l) and all(f'{k}="{v}"' in l for k, v in labels.items())]
    assert rows, name
    return sum(float(l.rsplit(" ", 1)[1]) for l in rows)

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
    "A judging call that keeps vLLM busy for more than a second: the only choice is hundreds of tokens long"
    return wikidpo.teacher._judge(client, vllm.cfg.serve_model, "Hello", str, 1000, "", ["quartz " * 300], KEPT)

def group(pid): # processes of a process group that still run
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
    ask = dict(model=vllm.cfg.serve_model, messages=[dict(role="user", content=QUESTIONS[0])], max_tokens=8, temperature=0.)
    old, new = (client.chat.completions.create(**ask, extra_body=b).choices[0].message.content for b in (dict(guided_choice=["quartz"]), dict(structured_outputs=dict(choice=["quartz"]))))
    assert old != "quartz" and new == "quartz"

def test_constrained_scores_and_verdicts_are_all_read(vllm, client):
    "MiniWiki knows nothing about judging: left alone it writes a sentence, constrained it gives a score and a verdict every time"
    model, rng = vllm.cfg.serve_model, random.Random(0)
    answers = {x: [miniwiki.answer(miniwiki.find_fact(x), k, rng) for k in miniwiki.QUALITIES] for x in QUESTIONS}
    scores, verdicts = [], []
    with JudgePool(lambda it: ask_score(client, model, *it, KEPT), lambda _, r: scores.append(r)) as pool: pool.submit((x, a) for x, ys in answers.items() for a in ys)
    with JudgePool(lambda it: ask_verdict(client, model, *it, KEPT), lambda _, r: verdicts.append(r)) as pool: pool.submit((x, *ys[:2]) for x, ys in answers.items())
    assert len(scores) == 160 and {(r.outcome, r.tries) for r in scores} == {("ok", 1)} and {r.value for r in scores} <= set(range(1, 11))
    assert len(verdicts) == 40 and {(r.outcome, r.tries) for r in verdicts} == {("ok", 1)} and {r.value for r in verdicts} <= {"A", "B", "TIE"}
    free = [ask_score(client, model, x, ys[0]) for x, ys in list(answers.items())[:5]]
    assert {r.value for r in free} == {None}

def test_a_label_of_several_tokens_comes_whole(vllm, client):
    tok = load_tokenizer(DATA/"tokenizer.json")
    for label in ("10", "TIE"):
        assert len(tok.encode(label).ids) > 1                                  # or this test would show nothing
        reply = client.chat.completions.create(model=vllm.cfg.serve_model, messages=[dict(role="user", content="x")], max_tokens=len(tok.encode(label).ids),
                                               extra_body=dict(structured_outputs=dict(choice=[label])))
        assert reply.choices[0].message.content == label

def test_prefix_caching_finds_the_rubric_again(vllm, client):
    "The four answers of a prompt share the rubric and the instruction: most of their tokens are not computed again"
    asked, hit = metric(vllm, "prefix_cache_queries_total"), metric(vllm, "prefix_cache_hits_total")
    for answer in ("Lima.", "It is Lima.", "Rome, I think.", "Nobody can tell."): ask_score(client, vllm.cfg.serve_model, "What is the capital of Peru?", answer, KEPT)
    asked, hit = metric(vllm, "prefix_cache_queries_total") - asked, metric(vllm, "prefix_cache_hits_total") - hit
    assert hit > .4 * asked > 0


# --- expected scores

def own_model():
    m = load_checkpoint(DATA/"model.safetensors")
    wide = GPT(replace(m.cfg, block_size=CONTEXT))
    wide.load_state_dict(m.state_dict())
    return wide.eval()

def test_expected_score_is_that_of_our_own_forward_pass(vllm, client, monkeypatch):
    "Score and label mass from vLLM's probabilities, '10' being two tokens, against the policy's own logits in float32"
    model, tok = own_model(), load_tokenizer(DATA/"tokenizer.json")
    monkeypatch.setattr(wikidpo.teacher, "MIN_MASS", 1e-9)                     # MiniWiki gives labels next to nothing; what it gives can be compared
    monkeypatch.setattr(wikidpo.teacher, "SHOW", dict(logprobs=True, top_logprobs=tok.get_vocab_size()))
    texts = [tok.decode([i], skip_special_tokens=False).strip() for i in range(tok.get_vocab_size())]
    def probabilities(ids):
        with torch.no_grad(): return torch.softmax(model(torch.tensor([ids]))[0][0, -1].double(), -1).tolist()
    for x, answer in ((QUESTIONS[0], "Lima."), (QUESTIONS[1], "Nobody knows."), (QUESTIONS[2], "10 10 10")):
        ids = encode_prompt(tok, JUDGE_TMPL.format(instruction=fenced(x), response=fenced(answer)))
        p = probabilities(ids)
        label = {s: sum(v for v, t in zip(p, texts) if t == s) for s in LABELS}
        after = probabilities(ids + [tok.token_to_id("1")])
        zero, end = after[tok.token_to_id("0")], after[tok.token_to_id("<|end|>")]
        label["1"], label["10"] = label["1"] * end / (zero + end), label["1"] * zero / (zero + end)
        mass = sum(label.values())
        r = ask_score(client, vllm.cfg.serve_model, x, answer, Probe(True, True))
        assert abs(r.value - sum(int(s) * v for s, v in label.items()) / mass) < .01
        assert abs(r.mass / mass - 1) < .01

def test_little_label_mass_is_no_score(vllm, client):
    r = ask_score(client, vllm.cfg.serve_model, QUESTIONS[0], "Lima.", Probe(True, True))
    assert r.value is None and r.mass < .01 and r.outcome == "unparsable"


# --- time-outs and cancelling

def test_too_long_a_prompt_is_refused_and_not_retried(vllm, client):
    asked = metric(vllm, "prefix_cache_queries_total")
    r = ask_score(client, vllm.cfg.serve_model, QUESTIONS[0], "word " * 700)
    assert r.outcome == "refused" and "maximum context length" in r.error and metric(vllm, "prefix_cache_queries_total") == asked

@contextmanager
def frozen(vllm):
    "Its engine stands still, its HTTP server does not: what times out meanwhile does so on a busy machine too, where a waiting process may sleep through its time"
    engine = [p for p in group(vllm.process.pid) if p != vllm.process.pid]
    for p in engine: os.kill(p, signal.SIGSTOP)
    try: yield
    finally:
        for p in engine: os.kill(p, signal.SIGCONT)

def test_a_time_out_is_tried_again_then_said(vllm, client):
    "Neither attempt is finished in vLLM either: what nobody waits for is dropped"
    before = finished(vllm)
    with frozen(vllm), make_client(vllm.url, timeout=.5, retries=1) as impatient, pytest.raises(TeacherLost, match="did not answer in time"): slow(impatient, vllm)
    assert slow(client, vllm).value.startswith("quartz " * 100)               # it would have come, given time
    assert until(lambda: running(vllm) == 0) and finished(vllm) == before + 1

def test_a_pool_of_time_outs_stops(vllm):
    tried = []
    def fn(i): tried.append(i); return slow(impatient, vllm)
    with frozen(vllm), make_client(vllm.url, timeout=.5, retries=0) as impatient, pytest.raises(TeacherLost, match="did not answer in time"):
        with JudgePool(fn, lambda *_: None, concurrency=4, max_lost=5) as pool: pool.submit(range(100))
    assert 5 <= len(tried) <= 8                                               # the fifth, and what was in flight beside it
    assert until(lambda: running(vllm) == 0)

def test_cancelled_calls_end_in_the_server(vllm):
    "Ctrl-C in this process: after the grace the connections are closed, and vLLM drops 32 requests that had seconds to go"
    before = finished(vllm)
    with ExitStack() as still, pytest.raises(KeyboardInterrupt), make_client(vllm.url, retries=0) as client, JudgePool(lambda i: slow(client, vllm), lambda *_: None, grace=.2) as pool:
        pool.submit(range(100))
        assert until(lambda: running(vllm) > 8, 120) and not pool.failed        # two busy cores take half a minute to begin with 32 of them
        still.enter_context(frozen(vllm))                                       # until the connections are closed
        raise KeyboardInterrupt
    assert until(lambda: running(vllm) == 0) and finished(vllm) - before < 32

def command(*words, **env):
    return subprocess.Popen([sys.executable, "-c", "from wikidpo.cli import main; main()", *map(str, words)], env=os.environ | {"TQDM_DISABLE": "1"} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def test_ctrl_c_in_mine_ends_its_requests_and_the_rest_follows(vllm, tmp_path):
    "`wikidpo mine`, stopped and started again: no request outlives it, nothing is asked twice, and every answer has a score"
    mine = ["mine", "--teacher.url", vllm.url, "--teacher.model", vllm.cfg.serve_model, "--teacher.concurrency", 4, "--n-prompts", 48, "--max-new", 24, "--out", tmp_path/"run"]
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
    assert again.returncode == 2 and "48 ties" in err, err                     # to MiniWiki all answers are worth the same
    rows = read_jsonl(samples)
    assert len(rows) == 192 and {r["score"] for r in rows} <= set(range(1, 11))
    score = {(r["prompt_id"], r["k"]): r["score"] for r in rows}
    assert len(score) == 192 and all(score[r["prompt_id"], r["k"]] == r["score"] for r in map(json.loads, kept.splitlines()))

def test_judge_says_that_its_verdicts_were_constrained(vllm, tmp_path):
    judge = command("judge", "--teacher.url", vllm.url, "--teacher.model", vllm.cfg.serve_model, "--n", 16, "--max-new", 24, "--a", DATA/"model.safetensors", "--out", tmp_path/"run")
    out, err = judge.communicate(timeout=120)
    assert judge.returncode == 0, err
    assert "replies were constrained" in out
    s = json.loads((tmp_path/"run"/"summary.json").read_text())["judge"]
    assert s["constrained"] and (s["n"], s["unparsed"]) == (16, 0)


# --- starting and stopping

KEY = "sk-vllm-canary-0123456789"

def serve_words(vllm, **settings):
    s = dict(serve_model=vllm.cfg.serve_model, port=0, dtype="float32", max_model_len=CONTEXT, gpu_memory_utilization=.1) | settings
    return ["teacher", *(w for k, v in s.items() for w in ("--" + k.replace("_", "-"), v)), f"--flags={FLAGS}"]

def test_the_verb_serves_with_a_key_until_told_to_end(vllm):
    server = command(*serve_words(vllm), WIKIDPO_TEACHER_KEY=KEY)
    try:
        lines = [server.stdout.readline(), server.stdout.readline()]
        url = re.search(r"vLLM listens at (\S+) under the name", lines[0])[1]
        assert "can be constrained" in lines[1]
        children = [int(p) for p in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
        assert len(children) == 1 and len(group(children[0])) >= 2              # the API server and its engine
        with make_client(url, KEY) as good, make_client(url, "wrong") as bad:
            assert check_teacher(good, vllm.cfg.serve_model).constrained
            with pytest.raises(UserError, match="refuses the key"): check_teacher(bad, vllm.cfg.serve_model)
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=30)
    finally: server.kill()
    assert server.returncode == 0 and KEY not in "".join(lines) + out + err
    assert group(children[0]) == []
    port = int(url.split(":")[2].split("/")[0])
    with wikidpo.teacher._bind("127.0.0.1", port): pass                         # free again

def test_ctrl_c_while_it_starts_leaves_nothing(vllm):
    server = command(*serve_words(vllm))
    find = lambda: Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    try:
        assert until(lambda: find() and len(group(int(find()[0]))) >= 2, 60)    # the engine has been forked
        child = int(find()[0])
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    finally: server.kill()
    assert server.returncode == 0 and "listens" not in out and group(child) == []

@pytest.mark.parametrize("settings, env, says", [
    (dict(serve_model="nobody/no-such-model"), dict(HF_HUB_OFFLINE="1"), "the model 'nobody/no-such-model' cannot be had"),
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
    assert server.returncode == 2 and err.strip() == f"error: port {vllm.cfg.port} on 127.0.0.1 is taken: stop what listens there, or choose another with --port"
