"The judge over real HTTP: what is sent, what is tried again, what is not, and what is said when nobody answers"
import json
import logging
import math
import socket
import threading
import time
from dataclasses import asdict
from functools import partial

import pytest
from model_server import KEY, Q, answers, error, free_port, reply, scripts, shown
from starlette.responses import HTMLResponse, JSONResponse, Response

from wikidpo.core.files import UserError
from wikidpo.judge.ask import ask_score, ask_verdict, check_teacher, judge_score, Judged, Probe, verdict
from wikidpo.judge.client import make_client
from wikidpo.judge.config import OFFLINE_MODEL, shown_url, TeacherConfig, TeacherLost
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.world.facts import prompts

AT_ONCE = {"retry_after_ms": "1"} # tells a client not to wait before it tries again
BOTH = Probe(constrained=True, expected=True)

@pytest.fixture
def scripted():
    "scripted(*responses) -> (client, script); the server stops after the test"
    with scripts() as start: yield start

def options(script): return [s["body"].get("structured_outputs") for s in script.seen]

def test_request_is_the_lessons(scripted):
    client, script = scripted(reply("7"))
    assert judge_score(client, "judge-x", Q, "Paris.<|end|>") == 7
    client2, script2 = scripted(reply("TIE"))
    assert verdict(client2, "judge-x", Q, "FIRST", "SECOND") == "TIE"
    a, b = script.seen[0]["body"], script2.seen[0]["body"]
    assert (a["model"], a["temperature"], a["max_tokens"]) == ("judge-x", 0, 4)
    assert (b["temperature"], b["max_tokens"]) == (0, 3)
    sent = b["messages"][0]["content"]
    assert "<|end|>" not in json.dumps(a) and sent.index("FIRST") < sent.index("SECOND")
    assert len(script.seen) == len(script2.seen) == 1


# --- retries and complaints

def test_429_is_retried(scripted):
    busy = error(429, "busy", **AT_ONCE)
    client, script = scripted(busy, busy, reply("8"))
    assert ask_score(client, "m", Q, "Paris.") == Judged(8, "8", 1)
    assert len(script.seen) == 3

@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_trouble_is_retried_then_said(scripted, status):
    client, script = scripted(error(status, "engine is dead", **AT_ONCE))
    with pytest.raises(TeacherLost, match=f"HTTP {status}: engine is dead"): judge_score(client, "m", Q, "Paris.")
    assert len(script.seen) == 3

@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_request_is_not_retried(scripted, status):
    client, script = scripted(error(status, "maximum context length is 4096"))
    judged = ask_score(client, "m", Q, "Paris.")
    assert (judged.value, judged.outcome) == (None, "refused")
    assert judged.error == f"HTTP {status}: maximum context length is 4096"
    assert judge_score(client, "m", Q, "x") is None
    assert verdict(client, "m", Q, "x", "y") is None
    assert len(script.seen) == 3 # three questions, three requests

@pytest.mark.parametrize("status,words", [(401, "refuses the key"), (403, "refuses the key"), (404, "no model 'm'")])
def test_key_and_model_end_it(scripted, status, words):
    client, script = scripted(error(status, f"bad key {KEY}"))
    for call in (partial(judge_score, client, "m", Q, "x"), partial(check_teacher, client, "m")):
        with pytest.raises(UserError, match=words) as e: call()
        said = str(e.value)
        assert isinstance(e.value, TeacherLost) == (status == 404) # which a server says as well that comes to itself
        assert KEY not in said and shown_url(client.base_url) in said and "\n" not in said
    assert len(script.seen) == 2

def test_unparsable_is_asked_once_more(scripted):
    client, script = scripted(reply("The answer is"), reply("6"))
    assert ask_score(client, "m", Q, "x") == Judged(6, "6", 2)
    first, second = (s["body"]["messages"] for s in script.seen)
    assert second[0] == first[0]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "The answer is"

@pytest.mark.parametrize("text", ["no idea", "", None])
def test_unparsable_twice_is_no_score(scripted, text):
    client, script = scripted(reply(text))
    judged = ask_verdict(client, "m", Q, "x", "y")
    assert (judged.value, judged.tries, judged.outcome, len(script.seen)) == (None, 2, "unparsable", 2)

@pytest.mark.parametrize("page", [
    HTMLResponse("<h1>hello</h1>"), JSONResponse(dict(hello=1)), Response("{", media_type="application/json"),
    JSONResponse(dict(id="x", choices=[])), JSONResponse([1])])
def test_not_a_model_server(scripted, page):
    client, _ = scripted(page)
    for call in (partial(check_teacher, client, "m"), partial(judge_score, client, "m", Q, "x")):
        with pytest.raises(UserError, match="not as an OpenAI-compatible server"): call()

def test_unreachable():
    url = f"http://127.0.0.1:{free_port()}/v1"
    client = make_client(url, api_key=KEY, retries=0)
    with pytest.raises(TeacherLost) as e: check_teacher(client, "m", url)
    for part in (url, "refused", "`wikidpo teacher`", "wikidpo teacher --offline", "'offline'"):
        assert part in str(e.value)
    assert KEY not in str(e.value) and "\n" not in str(e.value)

def test_probe_does_not_retry_and_times_out(scripted):
    def slow(request):
        time.sleep(.8)
        return reply("9")
    client, script = scripted(slow, timeout=.2)
    with pytest.raises(TeacherLost, match="did not answer in time"): check_teacher(client, "m")
    assert len(script.seen) == 1 and script.seen[0]["body"]["max_tokens"] == 1

def test_probe_passes_whatever_the_word(scripted):
    client, _ = scripted(reply("Hello"))
    check_teacher(client, "m")

def test_the_key_is_nowhere(scripted, caplog, monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    client, script = scripted(error(500, f"you sent {KEY}"), retries=0)
    cfg = TeacherConfig(url=str(client.base_url), api_key_env="SOME_KEY", retries=0)
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as e: judge_score(cfg.client(), "m", Q, "x")
    assert script.seen[0]["headers"]["authorization"] == f"Bearer {KEY}" # it did travel
    written = str(e.value), repr(e.value), repr(cfg), json.dumps(asdict(cfg)), repr(cfg.client()), caplog.text
    for text in written: assert KEY not in text
    assert "***" in str(e.value)
    monkeypatch.delenv("SOME_KEY")
    assert cfg.client().api_key == "EMPTY"

def test_a_password_in_the_url_is_not_shown():
    client = make_client(f"http://me:pass@127.0.0.1:{free_port()}/v1", retries=0)
    with pytest.raises(UserError) as e: check_teacher(client, "m")
    assert "pass@" not in str(e.value) and "http://127.0.0.1" in str(e.value)

@pytest.mark.parametrize("url", [
    "", "localhost:8000", "ftp://x/v1", "http://", "Offline", "http://me:se/cret@host/v1", "me:secret@host/v1",
    "http://127.0.0.1:99999/v1", f"http://{'a' * 64}/v1", "http://a..b/v1", f"ftp://{'a.' * 1500}com/v1"])
def test_no_url(url):
    with pytest.raises(UserError, match="teacher.url is .*such as http://127.0.0.1:8000/v1$") as e: make_client(url)
    assert "cret" not in str(e.value)

def test_secrets_in_the_url_travel_and_stay_unwritten(scripted):
    "A password and a ?key= reach the server, and neither the record of a run nor what the server says about them"
    _, script = scripted(error(403, "no: me, pass-word, sk-query"), reply("7"))
    url = f"http://me:pass-word@{script.url.removeprefix('http://')}?key=sk-query"
    client = make_client(url, retries=0)
    with pytest.raises(UserError, match="refuses the key") as e: check_teacher(client, "m", url)
    assert judge_score(client, "m", Q, "x") == 7
    sent = script.seen[0]
    assert sent["headers"]["authorization"] == "Basic bWU6cGFzcy13b3Jk" and sent["query"] == "key=sk-query"
    for text in (str(e.value), json.dumps(TeacherConfig(url=url).record())):
        assert script.url in text and "pass-word" not in text and "sk-query" not in text

def test_a_key_instead_of_its_variable():
    with pytest.raises(UserError, match="name of an environment variable") as e: TeacherConfig(api_key_env=KEY)
    assert KEY not in str(e.value)

def test_closing_a_client_hangs_up():
    "A server that is thinking sees the connection end when the client is closed, though a thread still waits for it"
    asked, gone, failed = threading.Event(), threading.Event(), []
    def think():
        with listening.accept()[0] as s:
            while b'"messages"' not in s.recv(65536): pass
            asked.set()
            s.settimeout(5)
            if s.recv(1) == b"": gone.set()
    def ask():
        try: ask_score(client, "m", Q, "x")
        except Exception as e: failed.append(e)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=think, daemon=True).start()
        client = make_client(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", retries=0)
        waiting = threading.Thread(target=ask, daemon=True)
        waiting.start()
        assert asked.wait(5)
        client.close()
        assert gone.wait(5)
        waiting.join(5)
        assert isinstance(failed[0], TeacherLost)

@pytest.mark.parametrize("key", ["sk-secret\nsecond", "sk-s\u00e9cret", "sk secret"])
def test_a_key_that_cannot_travel(key):
    with pytest.raises(UserError, match="key has a blank") as e: make_client("http://127.0.0.1:1/v1", api_key=key)
    assert "cret" not in str(e.value)

@pytest.mark.parametrize("bad", [
    dict(concurrency=0), dict(retries=-1), dict(timeout_s=0), dict(noise=-.1), dict(noise=float("nan")),
    dict(noise=float("inf")), dict(position_bias=float("nan")), dict(length_bias=float("inf")),
    dict(concurrency=30_000), dict(timeout_s=float("inf"))])
def test_config_ranges(bad):
    with pytest.raises(UserError, match=f"teacher.{next(iter(bad))}"): TeacherConfig(**bad)

def test_a_local_teacher_is_not_behind_the_proxy(scripted, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    client, _ = scripted(reply("7"), retries=0)
    assert judge_score(client, "m", Q, "x") == 7


# --- constrained replies and expected scores

@pytest.mark.parametrize("second,constrained", [
    (reply("quartz"), True), (reply("9"), False), (reply("quartz is"), False), (reply(None), False),
    (error(400, "unknown option"), False), (error(422), False)])
def test_whether_it_constrains_is_seen_from_the_reply(scripted, second, constrained):
    client, script = scripted(reply("9"), second)
    assert check_teacher(client, "m") == Probe(constrained=constrained)
    assert options(script) == [None, dict(choice=["quartz"])]

def test_a_server_that_dies_of_the_probe_is_in_trouble(scripted):
    client, _ = scripted(reply("9"), error(500, "engine is dead"))
    with pytest.raises(TeacherLost, match="engine is dead"): check_teacher(client, "m")

def test_choices_are_sent_only_where_they_are_kept(scripted):
    client, script = scripted(reply("10"), reply("TIE"), reply("7"))
    assert ask_score(client, "m", Q, "x", Probe(constrained=True)).value == 10
    assert ask_verdict(client, "m", Q, "x", "y", Probe(constrained=True)).value == "TIE"
    assert ask_score(client, "m", Q, "x").value == 7
    assert options(script) == [dict(choice=[str(i) for i in range(1, 11)]), dict(choice=["A", "B", "TIE"]), None]

def test_a_promise_to_constrain_is_not_trusted(scripted):
    client, _ = scripted(reply("100"))
    judged = ask_score(client, "m", Q, "x", Probe(constrained=True))
    assert (judged.value, judged.tries) == (None, 2)

def test_expected_score_divides_the_one_from_the_ten(scripted):
    "The first token '1' has .6; nine times in ten a '0' follows: .06 for the label 1, .54 for the label 10"
    client, script = scripted(shown("1", {"1": .6, " 9": .2, "9": .1, "The": .1}),
                              shown("10", {"1": 1., "2": 0.}, {"0": .9, "<|im_end|>": .1}))
    judged = ask_score(client, "m", Q, "x", BOTH)
    assert judged.value == round((.06 * 1 + .54 * 10 + .3 * 9) / .9, 2)
    assert judged.mass == .9 and judged.reply == "1:0.06 9:0.30 10:0.54"
    first, second = (s["body"] for s in script.seen)
    assert (first["max_tokens"], first["logprobs"], first["top_logprobs"]) == (1, True, 20)
    assert (second["max_tokens"], second["logprobs"], second["top_logprobs"]) == (2, True, 20)
    assert options(script) == [None, dict(choice=["1", "10"])]

@pytest.mark.parametrize("second", [
    shown("10", {"10": .7, "1": .3}, {"<|im_end|>": 1.}), shown("10", {"10": .7, "1": .3}),
    shown("1", {"1": .6, "10": .4}, {"<|im_end|>": 1., "0": 0.})])
def test_expected_score_where_ten_is_one_token(scripted, second):
    client, _ = scripted(shown("10", {"10": .5, "9": .3, "1": .2}), second)
    assert ask_score(client, "m", Q, "x", BOTH).value == 7.9

@pytest.mark.parametrize("first", [{"9": .8, "8": .2}, {"7": .9995, "1": .0005}])
def test_expected_score_asks_once_where_the_one_is_clear(scripted, first):
    client, script = scripted(shown("9", first))
    judged = ask_score(client, "m", Q, "x", BOTH)
    assert abs(judged.value - sum(int(k) * v for k, v in first.items())) < .006
    assert len(script.seen) == 1

@pytest.mark.parametrize("page,mass", [
    (shown("I", {"I": .7, "7": .3}), .3), (reply("7"), 0.), (shown("x", {"x": 1.}), 0.)])
def test_little_label_mass_is_no_score(scripted, page, mass):
    client, script = scripted(page)
    judged = ask_score(client, "m", Q, "x", BOTH)
    assert (judged.value, judged.mass, judged.outcome, len(script.seen)) == (None, mass, "unparsable", 1)

@pytest.mark.parametrize("first,words", [
    (reply("9"), "gives no probabilities"), (shown("1", {"1": .6, "9": .4}), "does not show '10' as one token")])
def test_expected_scores_are_refused_where_they_would_be_wrong(scripted, first, words):
    client, _ = scripted(first, error(400))
    with pytest.raises(UserError, match=words) as e: check_teacher(client, "m", expected=True)
    assert "teacher.expected" in str(e.value) and "\n" not in str(e.value)

def test_expected_scores_without_constraints_where_ten_is_one_token(scripted):
    client, _ = scripted(shown("10", {"10": .6, "1": .1, "9": .3}), error(400))
    assert check_teacher(client, "m", expected=True) == Probe(constrained=False, expected=True)

def test_offline_expected_is_near_the_reading_and_never_outside():
    client, teacher = make_client(), OfflineTeacher()
    for question in prompts("eval")[:40]:
        for text in answers(question).values():
            judged = ask_score(client, OFFLINE_MODEL, question, text, BOTH)
            logprobs = teacher.logprobs(question, text)
            assert abs(sum(math.exp(v) for v in logprobs.values()) - 1) < 1e-9
            assert next(iter(logprobs)) == str(teacher.score(question, text))
            reading = min(9.7, max(1.3, teacher.read(question, text, "alone")))
            assert judged.outcome == "ok" and 1 <= judged.value <= 10
            assert abs(judged.value - reading) <= .3 + 1e-9 and judged.mass > .999


@pytest.mark.parametrize("url", ["offline", "http://127.0.0.1:9/v1"])
def test_a_misspelt_option_of_a_client_is_refused(url):
    with pytest.raises(TypeError, match="apikey"): make_client(url, apikey=KEY)
