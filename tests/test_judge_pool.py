"Many calls at once: each once, none lost, an end to it when the teacher dies, and nothing written after the end"
import os
import random
import signal
import threading
import time
import tracemalloc
from collections import Counter

import pytest
from model_server import Q, error, free_port, reply, scripts

from wikidpo.core.files import UserError
from wikidpo.judge.ask import ask_score
from wikidpo.judge.client import make_client
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
        return i
    def answer_once_it_ends():
        while not pool.ending: time.sleep(.01)
        go.set()
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(fn, keep_in(out), concurrency=4) as pool:
            pool.submit(range(100))
            while len(begun) < 4: time.sleep(.01)
            threading.Thread(target=answer_once_it_ends).start()
            raise KeyboardInterrupt
    assert sorted(out) == sorted(begun) and len(out) == 4
    time.sleep(.1)
    assert len(out) == 4 and not any(t.is_alive() for t in pool.threads)

def test_pool_grace_ends():
    out, go, begun = [], threading.Event(), threading.Event()
    def fn(i):
        begun.set()
        go.wait(30)
        return i
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(fn, keep_in(out), concurrency=2, grace=.2) as pool:
            pool.submit(range(4))
            begun.wait()
            raise KeyboardInterrupt
    assert any(t.is_alive() for t in pool.threads) # it did not wait for them
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


# ---- a queue that is no longer than it must be

def test_pool_takes_no_more_items_than_it_has_room_for():
    "While the teacher stands still, a generator of a million rows is read so far and no further"
    go, taken, out = threading.Event(), [], []
    def rows():
        for i in range(10**6):
            if len(out) >= 500: return
            taken.append(i)
            yield i
    def fn(i):
        go.wait()
        return i
    with JudgePool(fn, keep_in(out), concurrency=4, waiting=50) as pool:
        feeder = threading.Thread(target=pool.submit, args=(rows(),))
        feeder.start()
        while len(taken) < 55: time.sleep(.001) # the last of them is in the hand of `submit`
        time.sleep(.1)
        assert len(taken) == 55 and not out
        go.set()
        feeder.join()
    assert sorted(out) == taken and len(taken) >= 500

def test_pool_that_stops_wakes_who_waits_for_room():
    go = threading.Event()
    def fn(i):
        go.wait()
        raise TeacherLost("gone")
    with pytest.raises(TeacherLost, match="3 calls in a row failed. The last: gone"):
        with JudgePool(fn, print, concurrency=2, max_lost=3, waiting=5) as pool:
            threading.Timer(.05, go.set).start()
            pool.submit(range(1000))
            pytest.fail("submit must raise")

def test_pool_ctrl_c_reaches_who_waits_for_room():
    "A real SIGINT, while `submit` waits"
    go, out = threading.Event(), []
    def fn(i):
        go.wait()
        return i
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        while not pool.ending: time.sleep(.01)
        go.set()
    with pytest.raises(KeyboardInterrupt):
        with JudgePool(fn, keep_in(out), concurrency=3, waiting=5) as pool:
            threading.Timer(.1, interrupt).start()
            pool.submit(range(1000))
            pytest.fail("submit must be interrupted")
    assert sorted(out) == [0, 1, 2]

def test_pool_lost_calls_find_room_in_a_full_queue():
    "Each call is lost twice, with one place to wait: what is put back never waits for itself"
    tries, out = Counter(), []
    def fn(i):
        tries[i] += 1
        if tries[i] < 3: raise TeacherLost("hiccup")
        return i
    with JudgePool(fn, keep_in(out), concurrency=2, max_lost=10**6, waiting=1) as pool: pool.submit(range(200))
    assert sorted(out) == list(range(200)) and set(tries.values()) == {3}

def test_pool_holds_few_of_many_rows():
    "20,000 rows of 2 kB pass through: of their 40 MB, no more than the queue's share is there at a time"
    def rows():
        for i in range(20_000): yield {"id": i, "text": f"{i} " * 400}
    def judge():
        with JudgePool(lambda row: 7, lambda row, score: None, concurrency=4, waiting=500) as pool:
            pool.submit(rows())
    tracemalloc.start()
    try:
        judge()
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally: tracemalloc.stop()
