"""The faulty judge: every kind of fault, alone and mixed, over real sockets. Nothing is mis-scored, nothing is lost,
nothing ends in a traceback, and the same command asks again"""
import json
import random
import re
import time

import pytest
from faulty_server import faulty, KINDS, LOGPROBS, QUICK, SECRET, SLOW
from model_server import answers, completion, error, Q, reply, scripts
from starlette.responses import RedirectResponse

from wikidpo.core.files import read_jsonl, UserError
from wikidpo.judge.ask import ask_score, ask_verdict, check_teacher, no_score, Probe
from wikidpo.judge.client import make_client
from wikidpo.judge.config import OFFLINE_MODEL as M, TeacherConfig, TeacherLost
from wikidpo.judge.offline import offline_app, OfflineTeacher
from wikidpo.judge.pool import JudgePool
from wikidpo.run.config import EvaluateConfig, MineConfig, PolicyConfig
from wikidpo.run.evaluate import evaluate
from wikidpo.run.mine import mine
from wikidpo.world.facts import DATA, prompts

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
APP, TEACHER = offline_app(), OfflineTeacher()
EXPECTED = Probe(constrained=True, expected=True)

@pytest.fixture
def scripted():
    with scripts() as start: yield start

def items(n, seed=0):
    "Questions and answers, with what the teacher says to them"
    rng = random.Random(seed)
    return [(q, rng.choice([*answers(q).values()])) for q in rng.sample(prompts("eval"), n)]


# --- one kind alone

def judged_alone(kind, ask):
    "What came of one call to a server that has this fault each time"
    seconds = 1 if kind in SLOW else 20
    with faulty(APP, [kind]) as server, make_client(server.url, SECRET, timeout=seconds, retries=0) as client:
        try: return ask(client)
        except TeacherLost as e: return no_score(e)

@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_no_score_and_no_verdict_and_has_a_reason(kind):
    for ask in (ask_score, ask_verdict):
        texts = ["The capital of France is Paris.", "Lima."][:1 if ask is ask_score else 2]
        judged = judged_alone(kind, lambda c, ask=ask, texts=texts: ask(c, M, Q, *texts))
        assert judged.value is None and judged.reason and "\n" not in judged.reason
        assert len(judged.reason) <= 300 and len(judged.reply) <= 200
        assert SECRET not in judged.reason + judged.reply

@pytest.mark.parametrize("kind", [*LOGPROBS, *random.Random(1).sample(sorted(QUICK), 20)])
def test_a_fault_is_no_expected_score(kind):
    judged = judged_alone(kind, lambda c: ask_score(c, M, Q, "Lima.", EXPECTED))
    assert judged.value is None and judged.reason

@pytest.mark.parametrize("kind", ["empty", "html", "500", "302", "deep nesting", "dropped", "bytes", "404", "429"])
def test_a_server_that_has_only_faults_is_refused_in_a_line(kind):
    with faulty(APP, [kind]) as server, make_client(server.url, SECRET, retries=0) as client:
        with pytest.raises(UserError) as e: check_teacher(client, M)
    said = str(e.value)
    assert server.url in said and "\n" not in said and SECRET not in said and len(said) < 700
    assert "wikidpo teacher" in said or "last address" in said

@pytest.mark.parametrize("kind", SLOW)
def test_a_deadline_is_for_the_whole_call(kind):
    "A byte comes every third of a second, and each would be in time; 60 of them are not"
    start = time.monotonic()
    judged = judged_alone(kind, lambda c: ask_score(c, M, Q, "x"))
    assert judged.reason == "no answer in time" and time.monotonic() - start < 10

def test_a_kind_that_passes_half_of_the_time_passes_the_interview():
    for seed in range(4):
        with faulty(APP, QUICK, .5, seed) as server, make_client(server.url, retries=0) as client:
            assert check_teacher(client, M).expected is False


# --- many calls

def judge_all(client, jobs, ask=ask_score, give_up=no_score, concurrency=8):
    "{job: what came of it}"
    out = {}
    with JudgePool(lambda job: ask(client, M, *job), out.__setitem__, concurrency, give_up=give_up) as pool:
        pool.submit(jobs)
    return out

def agree(out, jobs):
    "Every job is there, scored as the teacher scores it or listed with a reason; returns how many are listed"
    assert out.keys() == set(jobs)
    for (q, text), judged in out.items():
        if judged.value is None: assert judged.reason
        else: assert judged.value == TEACHER.score(q, text) and not judged.reason
    return sum(judged.value is None for judged in out.values())

def test_a_mixture_of_faults_mis_scores_nothing():
    jobs = items(60)
    with faulty(APP, QUICK, .3) as server, make_client(server.url, retries=0) as client:
        listed = agree(judge_all(client, jobs), jobs)
        again = [job for job, judged in judge_all(client, jobs).items() if judged.value is None]
        assert listed < 20 and len(server.faults) > 20
        server.share = 0. # it has recovered
        assert agree(judge_all(client, again), again) == 0

def test_a_mixture_of_faults_at_verdicts():
    jobs = [(q, text, answers(q)["padded"]) for q, text in items(30)]
    with faulty(APP, QUICK, .3, 1) as server, make_client(server.url, retries=0) as client:
        out = judge_all(client, jobs, ask_verdict)
    for job, judged in out.items(): assert judged.reason or judged.value == TEACHER.verdict(*job)
    assert out.keys() == set(jobs) and sum(not judged.reason for judged in out.values()) > 15

def test_a_mixture_of_faults_at_expected_scores():
    jobs = items(30)
    def ask(*args): return ask_score(*args, EXPECTED)
    right = judge_all(make_client(), jobs, ask)
    with faulty(APP, [*QUICK, *LOGPROBS], .3, 2) as server, make_client(server.url, retries=0) as client:
        out = judge_all(client, jobs, ask)
    for job, judged in out.items(): assert judged.reason or judged == right[job]
    assert out.keys() == set(jobs) and sum(not judged.reason for judged in out.values()) > 15

def test_a_judge_with_nothing_but_faults_stops_the_work():
    "After so many in a row, not after two thousand; and a line says how to go on"
    with faulty(APP, ["500"]) as server, make_client(server.url, retries=0) as client:
        with pytest.raises(UserError, match="20 calls in a row failed.*HTTP 500.*The same command goes on"):
            judge_all(client, [(Q, str(i)) for i in range(2000)])
    assert 20 <= len(server.asked) < 40

def test_the_server_says_when_to_come_back(scripted):
    "Longer than the client waits by itself: the pool leaves the server in peace, and the item is asked again"
    client, script = scripted(error(503, "loading", retry_after="0.7"), reply("7"), retries=0)
    start, out = time.monotonic(), {}
    with JudgePool(lambda i: ask_score(client, "m", Q, "x"), out.__setitem__, 1) as pool: pool.submit([0])
    assert out[0].value == 7 and len(script.seen) == 2 and time.monotonic() - start >= .7

def test_waiting_for_a_server_ends_with_the_pool(scripted):
    client, _ = scripted(error(503, "loading", retry_after="600"), retries=0)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(lambda i: ask_score(client, "m", Q, "x"), print, 4) as pool:
            pool.submit(range(9))
            while pool.lost < 4: time.sleep(.01)
            raise KeyboardInterrupt
    assert time.monotonic() - start < 30 and not any(t.is_alive() for t in pool.threads)


# --- what goes out, and what is kept

def test_a_redirect_is_not_followed(scripted):
    "Neither key nor question reach another origin, and a person reads where to"
    _, elsewhere = scripted(reply("7"))
    for status in (301, 302, 303, 307, 308):
        to = elsewhere.url.replace("http://", "http://me:pass-word@") + "/chat/completions?key=sk-x"
        client, script = scripted(RedirectResponse(to, status), retries=0)
        with pytest.raises(TeacherLost, match="sends elsewhere") as e: ask_score(client, "m", Q, "x")
        assert elsewhere.url in str(e.value) and "pass-word" not in str(e.value) and "sk-x" not in str(e.value)
        assert len(script.seen) == 1 and elsewhere.seen == []

def test_what_the_environment_says_to_openai_stays_here(scripted, monkeypatch):
    told = dict(OPENAI_ORG_ID="org-1", OPENAI_PROJECT_ID="proj-1", OPENAI_BASE_URL="http://127.0.0.1:9/v1",
                OPENAI_API_KEY="sk-openai", OPENAI_ADMIN_KEY="sk-adm",
                OPENAI_CUSTOM_HEADERS="X-Mine: tell-tale\nAuthorization: Bearer sk-other\nCookie: sk-cookie")
    for name, value in told.items(): monkeypatch.setenv(name, value)
    client, script = scripted(reply("7"))
    assert ask_score(client, "m", Q, "x").value == 7
    assert check_teacher(client, "m").constrained is False
    for seen in script.seen:
        assert seen["headers"]["authorization"] == "Bearer sk-canary-0123456789"
        text, words = json.dumps(seen), ["org-1", "proj-1", "sk-openai", "sk-adm", "tell-tale", "sk-other", "sk-cookie"]
        for word in words: assert word not in text

@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_key_that_is_repeated_is_not_kept(scripted, status):
    "As it is, in the URL, percent-encoded, in base64"
    _, script = scripted(reply("7"))
    words = "sk-canary-0123456789 pass/word pass%2Fword bWU6cGFzcy93b3Jk sk-que+ry sk-que%2Bry"
    script.responses = [reply(words) if status == 200 else error(status, words)]
    url = script.url.replace("http://", "http://me:pass%2Fword@") + "?key=sk-que%2Bry"
    client = make_client(url, "sk-canary-0123456789", retries=0)
    try: judged = ask_score(client, "m", Q, "x")
    except TeacherLost as e: judged = no_score(e)
    kept = judged.reply + judged.reason
    assert "***" in kept
    for secret in ("sk-canary", "pass/word", "pass%2F", "bWU6", "sk-que"): assert secret not in kept

def test_a_long_reply_is_cut_before_it_is_kept_or_said_again(scripted):
    client, script = scripted(reply("word " * 20_000), reply("7"))
    assert ask_score(client, "m", Q, "x").value == 7
    assert len(script.seen[1]["body"]["messages"][1]["content"]) == 200
    client, _ = scripted(reply(" " * 5_000 + "10")) # it is read to its end
    judged = ask_score(client, "m", Q, "x")
    assert judged.value == 10 and len(judged.reply) == 200

def test_a_one_that_may_be_half_a_ten_is_asked_again(scripted):
    client, script = scripted(completion("1", finish_reason="length"), reply("10"))
    judged = ask_score(client, "m", Q, "x")
    assert (judged.value, judged.tries) == (10, 2)
    client, _ = scripted(completion("1\n\nThe", finish_reason="length"))
    assert ask_score(client, "m", Q, "x").value == 1


# --- whole commands

def asking(url, **more): return TeacherConfig(url=url, retries=0, timeout_s=20., concurrency=8, **more)

def to_the_end(step, *args):
    "A command, given again until it ends; how often it stopped"
    for stopped in range(40):
        try: return step(*args), stopped
        except UserError as e: assert "goes on" in str(e) or "teacher" in str(e), e
    pytest.fail("forty times were not enough")

def mining(n=12): return MineConfig(str(DATA/"prompts_mine.jsonl"), n_prompts=n, seed=0, max_new=8, gap=1, best=1)

@pytest.mark.parametrize("expected", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mining_lists_what_has_no_score_and_asks_again(tmp_path, capsys, expected):
    mine(POLICY, TeacherConfig(expected=expected), mining(), tmp_path/"right")
    right = {(s["prompt_id"], s["k"]): s for s in read_jsonl(tmp_path/"right"/"samples.jsonl")}
    with faulty(APP, [*QUICK, "the key"], .3 if expected else .6, 3) as server:
        teacher = asking(server.url, expected=expected)
        summary, _ = to_the_end(mine, POLICY, teacher, mining(), tmp_path/"run")
        rows, out = read_jsonl(tmp_path/"run"/"samples.jsonl"), capsys.readouterr().out
        assert [(s["prompt_id"], s["k"]) for s in rows] == [*right] and len(rows) == 48
        missing = [s for s in rows if s["score"] is None]
        for s in rows: assert s["error"] if s in missing else s == right[s["prompt_id"], s["k"]]
        assert summary["unparsable"] == len(missing) == sum(summary["no_score"].values()) > 0
        assert re.search(rf"mine: {len(missing)} of 48 answers have no score \(.*the same command asks again", out)
        server.share = 0.
        before = len(server.asked)
        mine(POLICY, teacher, mining(), tmp_path/"run")
        assert len(server.asked) - before <= 2 * len(missing) + 2 # these alone, and the two of the interview
        mine(POLICY, teacher, mining(), tmp_path/"run")
    for name in ("samples.jsonl", "pairs.jsonl", "responses.jsonl"):
        assert (tmp_path/"run"/name).read_bytes() == (tmp_path/"right"/name).read_bytes()
    assert SECRET.encode() not in b"".join(f.read_bytes() for f in (tmp_path/"run").iterdir())

def test_a_mining_without_a_score_is_no_dead_end(tmp_path):
    "Every answer could not be read; the judge recovers, and the same command ends"
    with faulty(APP, ["prose"]) as server:
        with pytest.raises(UserError, match="no prompt survived.*deserves a good score"):
            mine(POLICY, asking(server.url), mining(4), tmp_path/"run")
        server.share = 0.
        assert mine(POLICY, asking(server.url), mining(4), tmp_path/"run")["unparsable"] == 0

def test_what_was_trained_on_is_not_changed(tmp_path, capsys):
    with faulty(APP, ["prose"], .5) as server:
        done, _ = to_the_end(mine, POLICY, asking(server.url), mining(4), tmp_path/"run")
        assert done["unparsable"] > 0
        config = tmp_path/"run"/"config.yaml"
        config.write_text(config.read_text() + "train: {beta: 0.1}\n")
        server.share, pairs = 0., (tmp_path/"run"/"pairs.jsonl").read_bytes()
        assert mine(POLICY, asking(server.url), mining(4), tmp_path/"run") == done
        assert (tmp_path/"run"/"pairs.jsonl").read_bytes() == pairs

def test_verdicts_that_are_missing_are_asked_for_again(tmp_path, capsys):
    cfg = EvaluateConfig(str(DATA/"prompts_eval.jsonl"), a=str(DATA/"model.safetensors"), n=16, max_new=8)
    evaluate(POLICY, TeacherConfig(), cfg, tmp_path/"right")
    right = read_jsonl(tmp_path/"right"/"verdicts.jsonl")
    with faulty(APP, QUICK, .6, 5) as server:
        summary, _ = to_the_end(evaluate, POLICY, asking(server.url), cfg, tmp_path/"run")
        rows = read_jsonl(tmp_path/"run"/"verdicts.jsonl")
        assert [r["prompt_id"] for r in rows] == list(range(16))
        missing = [r for r in rows if r["result"] is None]
        for r, want in zip(rows, right): assert r["error"] if r in missing else r == want
        assert summary["unparsed"] == len(missing) == sum(summary["no_verdict"].values()) > 0
        assert f"judge: {len(missing)} of 16 prompts have no verdict" in capsys.readouterr().out
        server.share = 0.
        assert evaluate(POLICY, asking(server.url), cfg, tmp_path/"run")["unparsed"] == 0
    assert (tmp_path/"run"/"verdicts.jsonl").read_bytes() == (tmp_path/"right"/"verdicts.jsonl").read_bytes()


# --- the whole of it

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_at_a_tenth(kind):
    jobs = items(80)
    with faulty(APP, [kind], .1) as server, make_client(server.url, SECRET, timeout=5, retries=1) as client:
        assert agree(judge_all(client, jobs), jobs) <= 8
        assert server.faults
        print(f"{len(server.faults)} faults, {len(jobs)} answers")

@pytest.mark.slow
@pytest.mark.parametrize("share", [.1, .3, .5])
def test_all_kinds_mixed(share):
    jobs = items(400)
    with faulty(APP, KINDS, share, int(10 * share)) as server:
        with make_client(server.url, SECRET, timeout=5, retries=1) as client:
            assert agree(judge_all(client, jobs, concurrency=32), jobs) < 100 * share
            assert len(server.faults) > 100 * share
            print(f"{len(server.faults)} faults, {len(jobs)} answers")

@pytest.mark.slow
def test_all_kinds_at_all_requests():
    jobs = items(200)
    with faulty(APP, KINDS) as server, make_client(server.url, SECRET, timeout=5, retries=1) as client:
        try: out = judge_all(client, jobs, concurrency=32)
        except UserError as e: assert "20 calls in a row failed" in str(e)
        else: assert agree(out, jobs) == 200

@pytest.mark.slow
@pytest.mark.parametrize("share", [.1, .5, 1.])
def test_verdicts_from_all_kinds(share):
    jobs = [(q, text, answers(q)["padded"]) for q, text in items(150)]
    with faulty(APP, KINDS, share, 4) as server, make_client(server.url, timeout=5, retries=1) as client:
        try: out = judge_all(client, jobs, ask_verdict, concurrency=32)
        except UserError as e:
            assert "calls in a row failed" in str(e)
            return
    assert out.keys() == set(jobs)
    for job, judged in out.items(): assert judged.reason or judged.value == TEACHER.verdict(*job)
