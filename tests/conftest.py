"Fixtures that several files of tests share"
import signal
import sys

import pytest

# jsonschema, which nbformat imports, would compile a grammar of web addresses in every process: nothing here has one
# to check, and without this package it goes on. (`python -X importtime -c "import nbformat"` says what it takes.)
sys.modules.setdefault("rfc3987_syntax", None)

from served import served

# What a shell starts in the background has SIGINT ignored, and so have its children; Ctrl-C is tested here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    "A running `Vllm` that serves MiniWiki: vllm.url is its base URL, vllm.cfg.serve_model the model's name"
    with served(tmp_path_factory.mktemp("served")/"miniwiki") as v: yield v


@pytest.fixture
def compiler():
    "Other tests compiled other models: at some number of them PyTorch stops"
    import torch
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
