"Starting vLLM, as far as that goes without one; tests/test_vllm.py has the rest"
import importlib.util
import socket
import sys

import pytest

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
