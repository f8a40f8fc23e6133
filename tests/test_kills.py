"""The steps of a run are stopped while they write: by SIGKILL, SIGINT and SIGTERM, before, in the middle of and after
each write, rename and append. The same command then ends with the bytes of an undisturbed run, and nothing else"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from systems import LINUX

from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.run.folder import write_jsonl
from wikidpo.world.facts import DATA

KILLS = Path(__file__).with_name("kills.py")
STEPS = "mine", "train", "judge", "sweep"
pytestmark = LINUX


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    "{step: words}: each takes a few tenths of a second; `{root}` is the folder of the trial"
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    for name in ("a.pt", "b.pt"):
        save_checkpoint(folder/name, GPT(GPTConfig(vocab_size=2048, n_layer=1, n_head=2, n_embd=16, ffn_dim=32)))
    write_jsonl(folder/"pairs.jsonl", read_jsonl(DATA/"pairs.jsonl")[:8])
    words = {
        "mine": "mine --out {root}/run --n-prompts 6 --max-new 12 --temps .7 1.3 --best 2 --gap 1",
        "train": "train --checkpoint a.pt --out {root}/run --pairs pairs.jsonl --wandb disabled --batch-size 2 "
                 "--grad-accum-steps 1 --epochs 1 --save-every 2 --watch 2 --valid 0",
        "judge": "judge --checkpoint b.pt --a a.pt --out {root}/run --n 4 --max-new 8",
        "sweep": "sweep --checkpoint a.pt --out {root}/run --pairs pairs.jsonl --betas .1 .5 --n-pairs 8 "
                 "--kl-prompts 2 --train.wandb disabled --train.batch-size 4 --train.grad-accum-steps 1 "
                 "--train.epochs 1 --train.watch 2 --train.save-every 1 --train.valid 0 --judge.n 2 --judge.max-new 4",
    }
    files = {name: str(folder/name) for name in ("a.pt", "b.pt", "pairs.jsonl")}
    def whole(text): return [files.get(word, word) for word in text.split()]
    return {step: whole(text) for step, text in words.items()}


def trials(commands, kills):
    "{step: what became of each of its trials}, in memory where it can be had: hundreds of starts wait for no disk"
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        found = subprocess.run([sys.executable, str(KILLS), json.dumps(commands), str(kills), folder],
                               capture_output=True, text=True)
    assert not found.returncode, found.stderr + found.stdout
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    def of(step): return [row for row in rows if row["name"] == step]
    return {step: of(step) for step in commands}


def check(rows, kills):
    "All ended as if undisturbed, and nearly all were stopped where they should be: the last writes may be a tidying up"
    bad = [row for row in rows if row["code"] or row["differ"]]
    assert not bad, bad[:3]
    stopped = [code for row in rows for code in row["stopped"]]
    assert set(stopped) <= {-9, 130, 143, 0} and len(stopped) >= kills
    print(f"{len(stopped) - stopped.count(0)} stops, {stopped.count(0)} starts that had ended before theirs")
    assert stopped.count(0) <= len(stopped) // 3 and {-9, 130, 143} <= set(stopped), stopped


@pytest.fixture(scope="module")
def twenty(commands): return trials(commands, 20)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_stopped_while_it_writes_ends_with_the_same_bytes(twenty, step): check(twenty[step], 20)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_two_hundred_stops_of_each_step(commands, step):
    check(trials({step: commands[step]}, 200)[step], 200)
