"Sampling on servers, over real HTTP: our own sampler behind the completions protocol; with `-m vllm` the real vLLM"
import json, signal, subprocess, sys, time
from contextlib import ExitStack
from copy import deepcopy

import pytest, torch
from faulty_server import faulty, QUICK
from served import served
from starlette.responses import JSONResponse

from wikidpo.cli import main
from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.core.config import TEMPS, UNIT
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.sample import sample_k
from wikidpo.judge.client import make_client
from wikidpo.judge.offline import serving
from wikidpo.models.policy import open_policy
from wikidpo.models.remote import policy_app, prompt_logprobs, sample_units, Servers
from wikidpo.run.config import PolicyConfig
from wikidpo.world.facts import DATA, prompts

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
MODEL, TOK = open_policy(POLICY)
END, Q = end_id(TOK), prompts("mine")
KEY = "sk-canary-9876543210"


class Log:
    """A policy's server that keeps what it was asked and what it answered; `change(request body, answer)` may answer
    otherwise, or return None for a 500"""
    def __init__(self, change=lambda ask, answer: answer, model=MODEL):
        self.app, self.change = policy_app(model), change
        self.asked, self.answers, self.keys = [], [], set()

    async def __call__(self, scope, receive, send):
        if not scope.get("path", "").endswith("/completions"): return await self.app(scope, receive, send)
        message = await receive()
        body, out = message["body"], []
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        async def again(): return dict(type="http.request", body=body, more_body=False)
        async def keep(m): out.append(m)
        self.asked.append(json.loads(body))
        self.keys.add(dict(scope["headers"]).get(b"authorization"))
        await self.app(scope, again, keep)
        self.answers.append(json.loads(out[1]["body"]))
        answer = self.change(self.asked[-1], self.answers[-1])
        status = 500 if answer is None else answer.pop("status", out[0]["status"])
        answer = answer or dict(error=dict(message="engine is dead"))
        await JSONResponse(answer, status, headers={"retry-after-ms": "1"})(scope, again, send)

    def probes(self): return [a for a in self.asked if a["top_k"] == 1]
    def samples(self): return [a for a in self.asked if a["top_k"] != 1]

@pytest.fixture
def up():
    "up(app, ...) -> their base URLs; the servers stop after the test"
    with ExitStack() as stack: yield lambda *apps: [stack.enter_context(serving(a)) for a in apps]

def servers(urls, key_env="NO_SUCH_KEY"): return Servers(urls, key_env, MODEL, TOK, Q)

def sample(urls, n=6, units=(0,), **kw):
    "Responses[prompt][k] of the first n prompts"
    kw = {"seed": 0, "max_new": 12, "concurrency": 4} | kw
    return sum(sample_units(servers(urls), TOK, Q[:n], units, **kw), [])


def agrees(urls):
    """Greedy responses are those of sample_k; first tokens come as often as top_k and temperature say.

    What stands together in a batch differs, and rounding may decide one close race."""
    here = sample_k(MODEL, TOK, Q[:12], temps=(0.,), max_new=40)
    assert sum(a == b for a, b in zip(sample(urls, n=12, temps=(0.,), max_new=40), here, strict=True)) >= 11
    top, idx = MODEL(torch.tensor([encode_prompt(TOK, Q[0])]))[0][0, -1].topk(5)
    p, n = (top / 1.3).softmax(-1), 300
    drawn = [r.ids[0] for r in sample(urls, n=1, temps=(1.3,) * n, max_new=1, top_k=5)[0] if r.ids]
    for token, q in zip(idx.tolist(), p.tolist()):
        if token == END: continue
        count = drawn.count(token)
        assert abs(count - n * q) <= 4 * (n * q * (1 - q))**.5 + 1, (token, q, count)
    assert set(drawn) <= set(idx.tolist())

def test_responses_are_those_of_the_policy(up): agrees(up(policy_app(MODEL)))

def test_what_is_sent(up, monkeypatch):
    log = Log()
    monkeypatch.setenv("POLICY_KEY", KEY)
    list(sample_units(servers(up(log), "POLICY_KEY"), TOK, Q[:6], [0], seed=3, max_new=5, top_k=7))
    ids = [encode_prompt(TOK, q) for q in Q[:6]] * len(TEMPS)                   # token ids: nothing is encoded again
    assert sorted(a["prompt"] for a in log.samples()) == sorted(ids)
    assert sorted({a["temperature"] for a in log.samples()}) == sorted(TEMPS)
    assert len({a["seed"] for a in log.samples()}) == 24
    always = dict(max_tokens=5, top_k=7, stop_token_ids=[END], ignore_eos=True, return_token_ids=True, top_p=1,
                  repetition_penalty=1)
    for a in log.samples(): assert {k: a[k] for k in always} == always
    assert log.keys == {f"Bearer {KEY}".encode()}

def test_finished_exactly_when_the_end_was_drawn(up):
    log = Log()
    groups = sample(up(log), n=10, max_new=14)
    exchanges = zip(log.asked, log.answers)
    drawn = {a["seed"]: s["choices"][0]["token_ids"] for a, s in exchanges if a["top_k"] != 1}
    responses = dict(enumerate(sum(groups, [])))                                # four a prompt
    assert drawn.keys() == responses.keys() and {r.finished for r in responses.values()} == {True, False}
    for seed, r in responses.items():
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
    assert err.count("\n") == 1 and urls[0] in err
    assert "HTTP 500: engine is dead" in err and "going on without it" in err
    assert groups == sample(urls[1:])

def test_all_dead_is_one_error(up, capsys):
    dies = [Log(lambda ask, answer, i=i: answer if len(dies[i].asked) < 9 else None) for i in (0, 1)]
    with pytest.raises(UserError, match="engine is dead.*no other is left") as e: sample(up(*dies))
    assert "\n" not in str(e.value) and capsys.readouterr().err.count("\n") == 1

@pytest.mark.parametrize("status, says", [
    (400, "HTTP 400: maximum context length"), (401, "the key in NO_SUCH_KEY"), (422, "HTTP 422")])
def test_a_refusal_is_not_retried(up, status, says):
    refusal = dict(status=status, error=dict(message="maximum context length is 8"))
    log = Log(lambda ask, answer: answer if ask["top_k"] == 1 else dict(refusal))
    with pytest.raises(UserError, match=says): sample(up(log, policy_app(MODEL)), concurrency=1)
    assert len(log.samples()) == 1

QUIET_KINDS = [k for k in QUICK if k not in ("429 retry-after", "cut body", "cut head", "dropped", "reset", "noise")]

def test_a_faulty_server_changes_no_response(up):
    "Faults that are no response at all, and responses of the wrong form: asked again, with the same seed"
    right = sample(up(policy_app(MODEL)), n=3, max_new=6)
    with faulty(policy_app(MODEL), QUIET_KINDS, .3, 1) as server:
        assert sample([server.url], n=3, max_new=6) == right
        assert len(server.faults) > 4

@pytest.mark.parametrize("ids", [[], [7] * 6, [7, 10**6], [-1, END], [END, 7, 7, 7, 7], [7, 7]])
def test_tokens_that_are_no_response_are_asked_for_again(up, ids):
    wrong = Log(lambda ask, answer: answer if ask["top_k"] == 1 or len(wrong.asked) % 2 else changed(answer))
    def changed(answer):
        answer["choices"][0]["token_ids"] = ids
        return answer
    right = sample(up(policy_app(MODEL)), n=1, max_new=5)
    assert sample(up(wrong), n=1, max_new=5, concurrency=1) == right

def test_a_server_with_nothing_but_faults_ends_in_a_line(up):
    log = Log(lambda ask, answer: answer if ask["top_k"] == 1 else dict(choices=[dict(text="hello")]))
    with pytest.raises(UserError, match="token_ids.*the same command goes on from here") as e: sample(up(log), n=2)
    assert "\n" not in str(e.value) and len(log.samples()) >= 20

@pytest.mark.slow
@pytest.mark.parametrize("share", [.1, .3, .5])
def test_all_kinds_of_fault_at_a_server_that_samples(up, share):
    right = sample(up(policy_app(MODEL)), n=10, max_new=6)
    with faulty(policy_app(MODEL), QUICK, share, 2) as server:
        assert sample([server.url], n=10, max_new=6, concurrency=16) == right
        assert len(server.faults) > 20 * share
        print(f"{len(server.faults)} faults")

def test_what_is_no_server_of_the_policy_is_refused(up):
    other = deepcopy(MODEL)
    with torch.no_grad(): other.norm.weight.mul_(1.2)
    def fails(says, app=None, url=None):
        with pytest.raises(UserError, match=says) as e: servers([url or up(app)[0]])
        assert "\n" not in str(e.value)
    fails("serves another model", policy_app(other))
    def changed(change): return Log(lambda ask, answer: change(ask, answer["choices"][0]) or answer)
    fails("ignores top_k", changed(lambda ask, choice: choice.update(token_ids=[ask["seed"]])))
    fails("does not answer as vLLM does", changed(lambda ask, choice: choice.update(logprobs=None)))
    fails("does not answer as vLLM does", changed(lambda ask, choice: choice.__delitem__("token_ids")))
    fails("HTTP 404", url=up(policy_app(MODEL))[0].removesuffix("/v1"))


# --- through the command

WORDS = ["--engine", "vllm", "--n-prompts", str(UNIT + 30), "--max-new", "4", "--temps", "0.7", "1.3", "--gap", "1",
         "--best", "1"]

def contents(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}

def interrupted(words, ready):
    "What a command wrote to stderr, interrupted when ready() says so"
    p = subprocess.Popen(words, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not ready():
        time.sleep(.01)
        assert p.poll() is None, p.stderr.read()
    time.sleep(.05) # a write that is interrupted at its very end is taken back
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130
    return err

def test_sigint_then_the_same_command_samples_no_unit_twice(up, tmp_path, monkeypatch):
    log, run = Log(), tmp_path/"run"
    url, = up(log)
    monkeypatch.setenv("WIKIDPO_POLICY_KEY", KEY)
    words = [sys.executable, "-c", "from wikidpo.cli import main; main()", "mine", *WORDS, "--policy-url", url,
             "--policy-concurrency", "4", "--out", str(run)]
    file = run/"responses.jsonl"
    def first_unit_is_written(): return file.exists() and file.read_bytes().count(b"\n") == 2 * UNIT
    err = interrupted(words, first_unit_is_written)
    assert "the same command goes on from here" in err and "Traceback" not in err
    assert len(read_jsonl(run/"responses.jsonl")) == 2 * UNIT                    # the first unit, whole
    subprocess.run(words, check=True, stderr=subprocess.PIPE)
    seeds = [a["seed"] for a in log.samples()]
    assert sorted(s for s in seeds if s < 2 * UNIT) == list(range(2 * UNIT)) and set(seeds) == set(range(2 * UNIT + 60))
    assert len(read_jsonl(run/"samples.jsonl")) == 2 * UNIT + 60 and read_jsonl(run/"pairs.jsonl")
    before = contents(run)
    for data in before.values(): assert KEY.encode() not in data and url.encode() not in data
    other = up(policy_app(MODEL))                                               # another port is no other run
    main(["mine", *WORDS, "--policy-url", *other, "--out", str(run)])
    assert contents(run) == before

def test_a_server_that_fails_again_and_again_ends_the_run_and_the_same_command_goes_on(up, tmp_path, capsys):
    "It dies in the second unit: twenty failures in a row, one line, the first unit kept and not sampled again"
    ill = Log(lambda ask, answer: answer if ill.well or ask["top_k"] == 1 or ask["seed"] < 2 * UNIT + 3 else None)
    ill.well, out, n = False, tmp_path/"run", UNIT + 9
    words = ["mine", *WORDS[:2], "--n-prompts", str(n), *WORDS[4:], "--out", str(out), "--policy-concurrency", "8"]
    with pytest.raises(SystemExit) as e: main([*words, "--policy-url", *up(ill)])
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert e.value.code == 2 and len(said) == 1 and said[0].startswith("error: no server of the policy at http://127.")
    assert "HTTP 500: engine is dead" in said[0] and "the same command goes on from here" in said[0]
    lost = sum(a["seed"] >= 2 * UNIT + 3 for a in ill.samples())
    assert 20 <= lost <= 3 * (20 + 8) # three attempts each; eight were in flight
    assert len(read_jsonl(out/"responses.jsonl")) == 2 * UNIT
    assert {f.name for f in out.iterdir()} == {"config.yaml", "responses.jsonl", "samples.jsonl"}
    before = len(ill.asked)
    ill.well = True
    main([*words, "--policy-url", *up(ill)])
    assert min(a["seed"] for a in ill.asked[before:] if a["top_k"] != 1) >= 2 * UNIT
    exchanges = zip(ill.asked, ill.answers)
    drawn = {a["seed"]: answer["choices"][0]["token_ids"] for a, answer in exchanges if a["top_k"] != 1}
    rows = read_jsonl(out/"responses.jsonl")
    assert [row["ids"] + [END] * row["finished"] for row in rows] == [drawn[seed] for seed in range(2 * n)]
    assert len(read_jsonl(out/"samples.jsonl")) == 2 * n and read_jsonl(out/"pairs.jsonl")

@pytest.mark.parametrize("words, says", [
    (["--engine", "vllm"], "mine.policy_url is not"),
    (["--policy-url", "http://127.0.0.1:9/v1"], "mine.engine is local"),
    (["--engine", "vllm", "--policy-url", "localhost:8001"], "'localhost:8001' is no base URL"),
    (["--engine", "vllm", "--policy-url", "http://127.0.0.1:9/v1"], "no server of the policy at http://127.0.0.1:9/v1"),
    (["--engine", "tpu"], "tpu"),
])
def test_bad_flags(tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as e: main(["mine", "--n-prompts", "4", "--out", str(tmp_path/"run"), *words])
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/"run").exists()


# --- the real vLLM, on a CPU

def differences(theirs):
    "How far log-probabilities of the first 32 prompts lie from ours, a list for each prompt; in nats"
    out = []
    for q in Q[:32]:
        ids = encode_prompt(TOK, q)
        out.append([a - b for a, b in zip(prompt_logprobs(MODEL, ids), theirs(ids), strict=True)])
    return out

def far(url):
    "`differences` of a server"
    with make_client(url) as client:
        name = client.models.list().data[0].id
        def theirs(ids):
            answer = client.completions.create(model=name, prompt=ids, max_tokens=1, echo=True, logprobs=1)
            return answer.choices[0].logprobs.token_logprobs[1:len(ids)]
        return differences(theirs)

def size(x): return max(map(abs, x))
def mean(x): return sum(x) / len(x)

@pytest.mark.vllm
def test_vllm_samples_the_policy(vllm):
    assert max(map(size, far(vllm.url))) < 1e-3                                   # float32: every token
    agrees([vllm.url])
    assert sample([vllm.url], max_new=14, concurrency=8) == sample([vllm.url], max_new=14, concurrency=8)
    responses = sum(sample([vllm.url], n=40, max_new=14, concurrency=8), [])
    assert {r.finished for r in responses} == {True, False} and not any(END in r.ids for r in responses)
    assert all(len(r.ids) == 14 for r in responses if not r.finished)
    assert all(r.text == TOK.decode(r.ids) for r in responses)

@pytest.mark.vllm
def test_vllm_beside_another_server_mines(vllm, up, tmp_path):
    log = Log()
    main(["mine", "--engine", "vllm", "--policy-url", vllm.url, *up(log), "--n-prompts", "40", "--max-new", "40",
          "--out", str(tmp_path/"run")])
    samples, pairs = (read_jsonl(tmp_path/"run"/f"{n}.jsonl") for n in ("samples", "pairs"))
    want = [(i, k, t) for i in range(40) for k, t in enumerate(TEMPS)]
    assert [(s["prompt_id"], s["k"], s["temperature"]) for s in samples] == want
    assert 0 < len(log.samples()) < 160 and len(pairs) > 10 and sum(s["finished"] for s in samples) > 140

@pytest.mark.vllm
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bf16 is emulated here")
def test_vllm_in_bfloat16(tmp_path):
    "A prompt's log-probability a token lies within 1e-2 of ours; a single token's is as far as in our own bfloat16"
    with served(tmp_path/"miniwiki", dtype="bfloat16") as v:
        theirs = far(v.url)
        assert len(sample([v.url])) == 6                                          # and it passes for our policy
    half = deepcopy(MODEL).bfloat16()
    ours = differences(lambda ids: prompt_logprobs(half, ids))
    assert sum(abs(mean(of_prompt)) < 1e-2 for of_prompt in theirs) >= 29
    theirs, ours = sum(theirs, []), sum(ours, [])                                 # of all tokens
    typical = mean([*map(abs, theirs)])
    assert typical < 1.5 * mean([*map(abs, ours)])
    assert abs(mean(theirs)) < typical / 4                                        # rounding, not a shift
