"Many calls at once: each once, none lost, an end to it when the teacher dies, and nothing written after the end"
import random
import threading
import time

import pytest
from model_server import Q, error, free_port, reply, scripts

from wikidpo.core.files import UserError
from wikidpo.judge.client import ask_score, make_client
from wikidpo.judge.config import TeacherLost
from wikidpo.judge.pool import JudgePool

@pytest.fixture
def scripted():
    "scripted(*responses) -> (client, script); the server stops after the test"
    with scripts() as start: yield start

def keep_in(results):
    "A `done` that keeps the items"
    return lambda item, result: results.append(item)

def test_pool_does_all_once_whatever_the_order():
    out, lock = [], threading.Lock()
    busy, most = 0, 0
    def fn(i):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(random.random() / 200)
        with lock: busy -= 1
        return i * i
    with JudgePool(fn, lambda i, r: out.append((i, r)), concurrency=7) as pool:
        pool.submit(range(100))
        pool.submit(i for i in range(100, 200))
    assert sorted(out) == [(i, i * i) for i in range(200)] and most == 7

def test_pool_stops_when_the_teacher_goes_away(scripted):
    "After 40 requests the server is gone: the queue of 2,000 is not burnt, and what was judged is kept"
    client, script = scripted(*[reply("7")] * 40, error(503, "shutting down"), retries=0)
    out = []
    def ask(i): return ask_score(client, "m", Q, f"answer {i}")
    with pytest.raises(TeacherLost, match="shutting down"):
        with JudgePool(ask, keep_in(out), concurrency=4, max_lost=5) as pool: pool.submit(range(2000))
    assert len(out) == len(set(out)) == 40
    assert 45 <= len(script.seen) <= 40 + 4 + 5 + 3 # a late success may begin the count anew

def test_pool_stops_on_a_closed_port():
    client, tried = make_client(f"http://127.0.0.1:{free_port()}/v1", retries=0), []
    def fn(i):
        tried.append(i)
        return ask_score(client, "m", Q, "x")
    pool = JudgePool(fn, lambda *_: pytest.fail("nothing was judged"), concurrency=4, max_lost=5)
    with pytest.raises(UserError, match="refused"):
        with pool: pool.submit(range(1000))
    assert 5 <= len(tried) <= 5 + 3
    with pytest.raises(UserError, match="refused"): pool.submit([1])

def test_pool_submit_tells_the_sampler():
    "Who samples for long learns at the next submit that the teacher is gone, and nothing was asked in between"
    tried = []
    def fn(i):
        tried.append(i)
        raise TeacherLost("gone")
    with pytest.raises(TeacherLost):
        with JudgePool(fn, print, concurrency=2, max_lost=3) as pool:
            pool.submit(range(100))
            time.sleep(.2)
            n = len(tried)
            time.sleep(.2)
            assert n == len(tried) <= 4
            pool.submit(range(100, 200))
            pytest.fail("submit must raise")

def test_pool_puts_a_lost_call_back():
    failed_once, out, lock = set(), [], threading.Lock()
    def fn(i):
        with lock:
            if i % 5 == 0 and i not in failed_once:
                failed_once.add(i)
                raise TeacherLost("hiccup")
        return i
    with JudgePool(fn, keep_in(out), concurrency=1, max_lost=3) as pool: pool.submit(range(50))
    assert sorted(out) == list(range(50))

def test_pool_one_item_that_never_comes():
    def fn(i):
        if i == 3: raise TeacherLost("always too long")
        return i
    out = []
    with pytest.raises(TeacherLost, match="too long"):
        with JudgePool(fn, keep_in(out), concurrency=2) as pool: pool.submit(range(20))
    assert sorted(out) == [i for i in range(20) if i != 3]

def test_pool_ctrl_c_keeps_what_is_in_flight():
    "Four calls are in flight when Ctrl-C comes: they are written, what waited is not begun, and then no more"
    begun, out, go = [], [], threading.Event()
    def fn(i):
        begun.append(i)
        go.wait()
        time.sleep(.05)
        return i
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(fn, keep_in(out), concurrency=4) as pool:
            pool.submit(range(100))
            while len(begun) < 4: time.sleep(.01)
            go.set()
            raise KeyboardInterrupt
    assert sorted(out) == sorted(begun) and len(out) == 4
    time.sleep(.1)
    assert len(out) == 4 and not any(t.is_alive() for t in pool.threads)

def test_pool_grace_ends():
    out, go, begun = [], threading.Event(), threading.Event()
    def fn(i):
        begun.set()
        go.wait()
        return i
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(fn, keep_in(out), concurrency=2, grace=.2) as pool:
            pool.submit(range(4))
            begun.wait()
            raise KeyboardInterrupt
    assert time.monotonic() - start < 2
    go.set()
    for t in pool.threads: t.join(1)
    assert out == [] # the file is closed by now: a late result must not reach it

@pytest.mark.parametrize("where", ["fn", "done"])
def test_pool_passes_on_a_bug(where):
    def boom(*_): raise ZeroDivisionError
    def fine(*_): return 0
    fn, done = (boom, fine) if where == "fn" else (fine, boom)
    with pytest.raises(ZeroDivisionError):
        with JudgePool(fn, done, concurrency=3) as pool: pool.submit(range(10))

def test_pool_many_refusals_are_results(scripted):
    client, script = scripted(error(400, "too long"))
    out = []
    def ask(i): return ask_score(client, "m", Q, "x")
    with JudgePool(ask, lambda i, r: out.append(r.outcome), concurrency=4, max_lost=3) as pool: pool.submit(range(30))
    assert out == ["refused"] * 30 and len(script.seen) == 30

def test_pool_tries_an_item_three_times_and_no_more():
    tried = []
    def fn(i):
        tried.append(i)
        raise TeacherLost("always too long")
    with pytest.raises(TeacherLost):
        with JudgePool(fn, print, concurrency=1, max_lost=50) as pool: pool.submit([7])
    assert tried == [7] * 3
