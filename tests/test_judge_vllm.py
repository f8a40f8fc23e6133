"Starting vLLM, as far as that goes without one; tests/test_vllm.py has the rest"
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from systems import LINUX

from wikidpo.core.files import UserError
from wikidpo.judge import vllm
from wikidpo.judge.config import VllmConfig
from wikidpo.judge.vllm import find_vllm, Vllm
from wikidpo.run.profiles import load_profile

without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this environment has vLLM")

def serves(monkeypatch, tmp_path, python, **settings):
    "What a person reads when vLLM cannot be started"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        with Vllm(VllmConfig(**dict(python=python, port=0) | settings)): pass
    assert "\n" not in str(e.value)
    return str(e.value)

def test_vllm_port_taken(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        assert "is taken" in serves(monkeypatch, tmp_path, sys.executable, port=s.getsockname()[1])

@without_vllm
def test_a_python_without_vllm(monkeypatch, tmp_path):
    why = serves(monkeypatch, tmp_path, sys.executable)
    assert "there is no vLLM in" in why and "make teacher" in why
    assert "cannot be started" in serves(monkeypatch, tmp_path, str(tmp_path/"nothing"))

@without_vllm
def test_where_vllm_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WIKIDPO_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm, "PACKAGE_HOME", tmp_path/"site-packages")
    with pytest.raises(UserError, match="make teacher"): find_vllm()
    for folder in (tmp_path/"site-packages", tmp_path): # the later one goes before
        beside = folder/".venv-vllm"/"bin"/"python"
        beside.parent.mkdir(parents=True)
        beside.touch()
        assert find_vllm() == str(beside)
    monkeypatch.setenv("WIKIDPO_VLLM_PYTHON", "/opt/other/python")
    assert find_vllm() == "/opt/other/python"

def test_the_profile_and_the_verb_agree():
    teacher, cfg = load_profile("wikigpt")["teacher"], VllmConfig()
    assert (teacher["url"], teacher["model"]) == (f"http://localhost:{cfg.port}/v1", cfg.serve_model)


# --- nothing is left behind

STAND_IN = """#!/bin/sh
sleep 600 &
echo $$ $! > {pids}.new
mv {pids}.new {pids}
wait
"""
START = """
import sys
from wikidpo.judge.config import VllmConfig
from wikidpo.judge.vllm import serve_vllm
serve_vllm(VllmConfig(python=sys.argv[1], port=0))
"""

def alive(pid):
    "Whether a process runs; one that nobody has waited for yet does not"
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False

def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(.05)

def start_server(tmp_path, code):
    "A process that runs `code`, with a stand-in for vLLM that writes its pid and its child's into `pids`"
    stand_in = tmp_path/"python"
    stand_in.write_text(STAND_IN.format(pids=tmp_path/"pids"))
    stand_in.chmod(0o755)
    return subprocess.Popen([sys.executable, "-c", code, str(stand_in)], stderr=subprocess.DEVNULL,
                            start_new_session=True, env=os.environ | {"TQDM_DISABLE": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

@pytest.fixture
def started(tmp_path):
    "(the process of `wikidpo teacher`, the pids of a stand-in for vLLM and of its child)"
    ours, pids = start_server(tmp_path, START), tmp_path/"pids"
    try:
        wait_until(pids.exists)
        theirs = [int(n) for n in pids.read_text().split()]
        wait_until(lambda: watchers(theirs[0]))
        yield ours, theirs
    finally:
        ours.kill()
        ours.wait()

@LINUX
@pytest.mark.parametrize("whole_group", [False, True])
def test_sigkill_leaves_no_vllm_behind(started, whole_group):
    "Killed by force, alone or with all that the shell started: the server and its child end all the same"
    ours, theirs = started
    assert all(map(alive, theirs))
    (os.killpg if whole_group else os.kill)(ours.pid, signal.SIGKILL)
    ours.wait()
    wait_until(lambda: not any(map(alive, theirs)))

@LINUX
def test_a_signal_to_end_leaves_no_vllm_and_no_watcher(started):
    ours, theirs = started
    ours.send_signal(signal.SIGTERM)
    ours.wait(60)
    wait_until(lambda: not any(map(alive, theirs)))
    wait_until(lambda: not watchers(theirs[0]), 20)

WORST_MOMENT = """
import subprocess
wait = subprocess.Popen._wait
def interrupted(process, timeout):
    if timeout != 1: return wait(process, timeout)
    subprocess.Popen._wait = wait
    process._waitpid_lock.acquire()
    raise KeyboardInterrupt # from a signal between these two lines of the library
subprocess.Popen._wait = interrupted
"""

@LINUX
def test_a_signal_while_python_waits_for_vllm_leaves_nothing_waiting(tmp_path):
    "The library never gives the lock back that it held; we end all the same"
    ours = start_server(tmp_path, WORST_MOMENT + START)
    try: assert ours.wait(100) == 0
    finally:
        ours.kill()
        ours.wait()
    assert not any(alive(int(n)) for n in (tmp_path/"pids").read_text().split())

def watchers(group):
    "The processes that watch a group"
    return [p for p in os.listdir("/proc") if p.isdigit() and watches(p, group)]

def watches(pid, group):
    "Whether a process is the watcher of a group"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f: words = f.read().split(b"\0")
    except OSError: return False
    return words[:1] == [b"/bin/sh"] and str(group).encode() in words
