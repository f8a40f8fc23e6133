"import, export and publish, killed at their writes: the same command ends as if nothing had happened"
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch

from wikidpo.cli import main
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.models.hf import export
from wikidpo.world.facts import DATA

EVERY = [pytest.param(8, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def stopped(folder, every, *words):
    "What tests/stopped.py found"
    script = Path(__file__).with_name("stopped.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, script, folder, str(every), *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['kills']} kills")
    assert found["different"] == []
    return found["kills"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A tiny WikiGPT as a checkpoint, and as a Hugging Face folder"
    where = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=2048, block_size=64, n_layer=1, n_head=2, n_embd=16, ffn_dim=24)
    save_checkpoint(where/"tiny.pt", GPT(config))
    export(where/"tiny.pt", DATA/"tokenizer.json", where/"hf")
    return where


@pytest.mark.parametrize("every", EVERY)
def test_import_and_export(tmp_path, tiny, every):
    (tmp_path/"a").mkdir()
    (tmp_path/"b").mkdir()
    out = tmp_path/"a"/"here"
    kills = stopped(tmp_path/"a", every, "import", tiny/"hf", "--out", out)
    out = tmp_path/"b"/"there"
    kills += stopped(tmp_path/"b", every, "export", "--checkpoint", tiny/"tiny.pt", "--tokenizer",
                     DATA/"tokenizer.json", "--out", out)
    assert kills >= 32 // every


@pytest.mark.parametrize("every", EVERY)
def test_publish(tmp_path, every):
    main(["mine", "--n-prompts", "24", "--out", str(tmp_path/"run")])
    clone = tmp_path/"clone"
    subprocess.run(["git", "init", "-q", clone], check=True)
    for words in (["user.name", "me"], ["user.email", "me@example.org"], ["gc.auto", "0"]):
        subprocess.run(["git", "-C", clone, "config", *words], check=True)
    kills = stopped(clone, every, "publish", clone, "--out", tmp_path/"run", "--license", "mit", "--commit")
    assert kills >= 8 // every
    count = subprocess.run(["git", "-C", clone, "rev-list", "--count", "HEAD"], capture_output=True, text=True).stdout
    state = subprocess.run(["git", "-C", clone, "status", "--porcelain"], capture_output=True, text=True).stdout
    assert count.strip() == "1" and state == ""
