"Sampling on servers, over real HTTP: our own sampler behind the completions protocol; with `-m vllm` the real vLLM"
import json, os, signal, subprocess, sys, threading, time
from contextlib import ExitStack
from copy import deepcopy

import pytest, torch
from served import served
from starlette.responses import JSONResponse

from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.cli import main
from wikidpo.files import UserError, read_jsonl
from wikidpo.miniwiki import DATA, prompts
from wikidpo.pairs import MineConfig
from wikidpo.models.remote import Servers, policy_app, prompt_logprobs, sample_units
from wikidpo.sampling import TEMPS, UNIT, PolicyConfig, open_policy, sample_k
from wikidpo.teacher import make_client, serving

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
MODEL, TOK = open_policy(POLICY)
END, Q = end_id(TOK), prompts("mine")
KEY = "sk-canary-9876543210"


class Log:
    "A policy's server that keeps what it was asked and what it said; `change(request body, answer)` may answer otherwise, or return None for a 500"
    def __init__(self, change=lambda ask, answer: answer, model=MODEL):
        self.app, self.change, self.asked, self.said, self.keys = policy_app(model), change, [], [], set()

    async def __call__(self, scope, receive, send):
        if not scope.get("path", "").endswith("/completions"): return await self.app(scope, receive, send)
        message = await receive()
        body, out = message["body"], []
        while message.get("more_body"): message = await receive(); body += message["body"]
        async def again(): return dict(type="http.request", body=body, more_body=False)
        async def keep(m): out.append(m)
        self.asked.append(json.loads(body)); self.keys.add(dict(scope["headers"]).get(b"authorization"))
        await self.app(scope, again, keep)
        self.said.append(json.loads(out[1]["body"]))
        answer = self.change(self.asked[-1], self.said[-1])
        status = 500 if answer is None else answer.pop("status", out[0]["status"])
        await JSONResponse(answer or dict(error=dict(message="engine is dead")), status, headers={"retry-after-ms": "1"})(scope, again, send)

    def probes(self): return [a for a in self.asked if a["top_k"] == 1]
    def samples(self): return [a for a in self.asked if a["top_k"] != 1]

@pytest.fixture
def up():
    "up(app, ...) -> their base URLs; the servers stop after the test"
    with ExitStack() as stack: yield lambda *apps: [stack.enter_context(serving(a)) for a in apps]

def servers(urls, key_env="NO_SUCH_KEY"): return Servers(urls, key_env, MODEL, TOK, Q)
def sample(urls, n=6, units=(0,), **kw): return [g for unit in sample_units(servers(urls), TOK, Q[:n], units, **{"seed": 0, "max_new": 12, "concurrency": 4} | kw) for g in unit]


def agrees(urls):
    "Greedy responses are those of sample_k; first tokens come as often as top_k and temperature say"
    assert sample(urls, n=12, temps=(0.,), max_new=40) == sample_k(MODEL, TOK, Q[:12], temps=(0.,), max_new=40)
    top, idx = MODEL(torch.tensor([encode_prompt(TOK, Q[0])]))[0][0, -1].topk(5)
    p, n = (top / 1.3).softmax(-1), 300
    drawn = [r.ids[0] for r in sample(urls, n=1, temps=(1.3,) * n, max_new=1, top_k=5)[0] if r.ids]
    for token, q in zip(idx.tolist(), p.tolist()):
        if token != END: assert abs(drawn.count(token) - n * q) <= 4 * (n * q * (1 - q))**.5 + 1, (token, q, drawn.count(token))
    assert set(drawn) <= set(idx.tolist())

def test_responses_are_those_of_the_policy(up): agrees(up(policy_app(MODEL)))

def test_what_is_sent(up, monkeypatch):
    log = Log()
    monkeypatch.setenv("POLICY_KEY", KEY)
    list(sample_units(servers(up(log), "POLICY_KEY"), TOK, Q[:6], [0], seed=3, max_new=5, top_k=7))
    assert sorted(a["prompt"] for a in log.samples()) == sorted(encode_prompt(TOK, q) for q in Q[:6] for _ in TEMPS)      # token ids: nothing is encoded again
    assert sorted({a["temperature"] for a in log.samples()}) == sorted(TEMPS) and len({a["seed"] for a in log.samples()}) == 24
    assert all((a["max_tokens"], a["top_k"], a["stop_token_ids"], a["ignore_eos"], a["return_token_ids"], a["top_p"], a["repetition_penalty"]) == (5, 7, [END], True, True, 1, 1) for a in log.samples())
    assert log.keys == {f"Bearer {KEY}".encode()}

def test_finished_exactly_when_the_end_was_drawn(up):
    log = Log()
    groups = sample(up(log), n=10, max_new=14)
    drawn = {a["seed"]: s["choices"][0]["token_ids"] for a, s in zip(log.asked, log.said) if a["top_k"] != 1}
    rs = {i * 4 + k: r for i, g in enumerate(groups) for k, r in enumerate(g)}
    assert drawn.keys() == rs.keys() and {r.finished for r in rs.values()} == {True, False}
    for seed, r in rs.items():
        assert END not in r.ids and drawn[seed] == r.ids + [END] * r.finished and r.text == TOK.decode(r.ids)

def test_the_same_seed_asks_for_the_same(up):
    urls = up(policy_app(MODEL), policy_app(MODEL))
    assert sample(urls) == sample(urls[:1]) != sample(urls, seed=1)

def test_the_idle_server_gets_more(up):
    slow, quick = Log(lambda ask, answer: time.sleep(.2) or answer), Log()
    sample(up(slow, quick), n=20, max_new=1)
    assert len(slow.samples()) + len(quick.samples()) == 80 and len(slow.samples()) < len(quick.samples()) / 2

def test_a_dead_server_is_dropped_with_a_line(up, capsys):
    dies = Log(lambda ask, answer: answer if len(dies.asked) < 12 else None)
    urls = up(dies, policy_app(MODEL))
    groups = sample(urls)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and urls[0] in err and "HTTP 500: engine is dead" in err and "going on without it" in err
    assert groups == sample(urls[1:])

def test_all_dead_is_one_error(up, capsys):
    dies = [Log(lambda ask, answer, i=i: answer if len(dies[i].asked) < 9 else None) for i in (0, 1)]
    with pytest.raises(UserError, match="engine is dead.*no other is left") as e: sample(up(*dies))
    assert "\n" not in str(e.value) and capsys.readouterr().err.count("\n") == 1

@pytest.mark.parametrize("status, says", [(400, "HTTP 400: maximum context length"), (401, "the key in NO_SUCH_KEY"), (404, "HTTP 404")])
def test_a_refusal_is_not_retried(up, status, says):
    log = Log(lambda ask, answer: answer if ask["top_k"] == 1 else dict(status=status, error=dict(message="maximum context length is 8")))
    with pytest.raises(UserError, match=says): sample(up(log, policy_app(MODEL)), concurrency=1)
    assert len(log.samples()) == 1

def test_what_is_no_server_of_the_policy_is_refused(up):
    other = deepcopy(MODEL)
    with torch.no_grad(): other.norm.weight.mul_(1.2)
    def fails(says, app=None, url=None):
        with pytest.raises(UserError, match=says) as e: servers([url or up(app)[0]])
        assert "\n" not in str(e.value)
    fails("serves another model", policy_app(other))
    fails("ignores top_k", Log(lambda ask, answer: answer["choices"][0].update(token_ids=[ask["seed"]]) or answer))
    fails("does not answer as vLLM does", Log(lambda ask, answer: answer["choices"][0].update(logprobs=None) or answer))
    fails("does not answer as vLLM does", Log(lambda ask, answer: answer["choices"][0].pop("token_ids") and answer))
    fails("HTTP 404", url=up(policy_app(MODEL))[0].removesuffix("/v1"))


# --- through the command

WORDS = ["--engine", "vllm", "--n-prompts", str(UNIT + 30), "--max-new", "4", "--temps", "0.7", "1.3", "--gap", "1", "--best", "1"]

def test_sigint_then_the_same_command_samples_no_unit_twice(up, tmp_path, monkeypatch):
    log = Log()
    url, = up(log)
    monkeypatch.setenv("WIKIDPO_POLICY_KEY", KEY)
    words = [sys.executable, "-c", "from wikidpo.cli import main; main()", "mine", *WORDS, "--policy-url", url, "--policy-concurrency", "4", "--out", str(tmp_path/"run")]
    p = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    done = tmp_path/"run"/"responses.jsonl"
    while not (done.exists() and done.stat().st_size): time.sleep(.01); assert p.poll() is None, p.stderr.read()
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err
    assert len(read_jsonl(done)) == 2 * UNIT                                  # the first unit, whole
    subprocess.run(words, check=True, stderr=subprocess.PIPE)
    seeds = [a["seed"] for a in log.samples()]
    assert sorted(s for s in seeds if s < 2 * UNIT) == list(range(2 * UNIT)) and set(seeds) == set(range(2 * UNIT + 60))
    assert len(read_jsonl(tmp_path/"run"/"samples.jsonl")) == 2 * UNIT + 60 and read_jsonl(tmp_path/"run"/"pairs.jsonl")
    assert not [f for f in (tmp_path/"run").iterdir() if KEY.encode() in f.read_bytes() or url.encode() in f.read_bytes()]
    before = {f.name: f.read_bytes() for f in (tmp_path/"run").iterdir()}
    other = up(policy_app(MODEL))                                               # another port is no other run
    main(["mine", *WORDS, "--policy-url", *other, "--out", str(tmp_path/"run")])
    assert {f.name: f.read_bytes() for f in (tmp_path/"run").iterdir()} == before

@pytest.mark.parametrize("words, says", [
    (["--engine", "vllm"], "mine.policy_url is not"), (["--policy-url", "http://127.0.0.1:9/v1"], "mine.engine is local"),
    (["--engine", "vllm", "--policy-url", "localhost:8001"], "'localhost:8001' is no base URL"),
    (["--engine", "vllm", "--policy-url", "http://127.0.0.1:9/v1"], "no server of the policy at http://127.0.0.1:9/v1"),
    (["--engine", "tpu"], "tpu"),
])
def test_bad_flags(tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as e: main(["mine", "--n-prompts", "4", "--out", str(tmp_path/"run"), *words])
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/"run").exists()


# --- the real vLLM, on a CPU

def far(url, n=32):
    "What a server's prompt log-probabilities differ from ours, a list for each prompt; in nats"
    with make_client(url) as client:
        ask = lambda ids: client.completions.create(model=client.models.list().data[0].id, prompt=ids, max_tokens=1, echo=True, logprobs=1).choices[0].logprobs.token_logprobs[1:len(ids)]
        return [[a - b for a, b in zip(prompt_logprobs(MODEL, ids), ask(ids), strict=True)] for ids in (encode_prompt(TOK, q) for q in Q[:n])]

@pytest.mark.vllm
def test_vllm_samples_the_policy(vllm):
    assert max(abs(d) for ds in far(vllm.url) for d in ds) < 1e-3                 # float32: every token
    agrees([vllm.url])
    assert sample([vllm.url], max_new=14, concurrency=8) == sample([vllm.url], max_new=14, concurrency=8)
    groups = sample([vllm.url], n=40, max_new=14, concurrency=8)
    assert {r.finished for g in groups for r in g} == {True, False} and not any(END in r.ids for g in groups for r in g)
    assert all(len(r.ids) == 14 for g in groups for r in g if not r.finished) and all(r.text == TOK.decode(r.ids) for g in groups for r in g)

@pytest.mark.vllm
def test_vllm_beside_another_server_mines(vllm, up, tmp_path):
    log = Log()
    main(["mine", "--engine", "vllm", "--policy-url", vllm.url, *up(log), "--n-prompts", "40", "--max-new", "40", "--out", str(tmp_path/"run")])
    samples, pairs = (read_jsonl(tmp_path/"run"/f"{n}.jsonl") for n in ("samples", "pairs"))
    assert [(s["prompt_id"], s["k"], s["temperature"]) for s in samples] == [(i, k, t) for i in range(40) for k, t in enumerate(TEMPS)]
    assert 0 < len(log.samples()) < 160 and len(pairs) > 10 and sum(s["finished"] for s in samples) > 140

@pytest.mark.vllm
def test_vllm_in_bfloat16(tmp_path):
    "A prompt's log-probability a token lies within 1e-2 of ours; a single token's differs by as much as our own bfloat16 does"
    with served(tmp_path/"miniwiki", dtype="bfloat16") as v:
        theirs = far(v.url)
        assert len(sample([v.url])) == 6                                          # and it passes for our policy
    half = deepcopy(MODEL).bfloat16()
    ours = [[a - b for a, b in zip(prompt_logprobs(MODEL, ids), prompt_logprobs(half, ids))] for ids in (encode_prompt(TOK, q) for q in Q[:32])]
    mean = lambda ds: sum(ds) / len(ds)
    assert abs(mean([d for ds in theirs for d in ds])) < 1e-2 / 4
    assert sum(abs(mean(ds)) < 1e-2 for ds in theirs) >= 29
    assert mean([abs(d) for ds in theirs for d in ds]) < 1.5 * mean([abs(d) for ds in ours for d in ds])
