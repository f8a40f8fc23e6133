"Fixtures that several files of tests share"
import pytest

from served import served

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
