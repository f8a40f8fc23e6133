"""Several processes through the real torchrun command.

The numbers of one process, one run folder, one complaint, and a run that goes on with another number of them."""
import signal
import subprocess
import sys
import time

import pytest
import torch

from wikidpo.core.files import read_jsonl
from wikidpo.run.folder import write_jsonl
from wikidpo.world.facts import DATA

FLAGS = ["--block-size", "256", "--valid", "0", "--lr", "3e-4", "--batch-size", "4", "--grad-accum-steps", "2",
         "--warmup-steps", "1", "--wandb", "disabled", "--device", "cpu"]
SLOW = pytest.mark.slow                                           # each starts processes for ten seconds or more


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "5 steps of 8, then one of 1: a rank with nothing to do"
    path = tmp_path_factory.mktemp("pairs")/"pairs.jsonl"
    write_jsonl(path, read_jsonl(DATA/"pairs.jsonl")[:41])
    return path


def command(n, pairs, out, *flags):
    how = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"] if n > 1 else []
    return [sys.executable, *how, "-m", "wikidpo.run.train", "--pairs", str(pairs), "--out", str(out), *FLAGS, *flags]


def run(*args): return subprocess.run(command(*args), capture_output=True, text=True, timeout=300)


def stop_when_saved(n, pairs, out, *flags, with_signal=signal.SIGTERM):
    "Start a run, and end it as soon as it has saved a state"
    process = subprocess.Popen(command(n, pairs, out, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out/"state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.01)
    process.send_signal(with_signal)
    process.communicate()


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")/"run"
    done = run(1, pairs, out)
    assert done.returncode == 0, done.stderr
    return out


def assert_same(one, other, tol=5e-5):
    "Metrics and weights of two run folders agree"
    metrics = [read_jsonl(folder/"metrics.jsonl") for folder in (one, other)]
    assert len(metrics[0]) == len(metrics[1]) == 6
    for a, b in zip(*metrics, strict=True): assert {k: pytest.approx(v, rel=tol, abs=tol) for k, v in a.items()} == b
    wa, wb = (torch.load(folder/"dpo.pt", weights_only=True)["model"] for folder in (one, other))
    largest = max(w.abs().max() for w in wa.values())
    assert max((wa[k] - wb[k]).abs().max() for k in wa) < 1e-4 < largest
    assert not (other/"state.pt").exists()


@pytest.mark.parametrize("n, flags", [(2, []), (2, ["--shard"])])
def test_processes_give_the_numbers_of_one(pairs, alone, tmp_path, n, flags):
    done = run(n, pairs, tmp_path/"run", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 steps") == 1                      # one voice
    assert_same(alone, tmp_path/"run")


def test_shards_with_unequally_many_forwards_end(tmp_path):
    "The last step has three pairs for one process, two forwards, and two for the other; each gathers all weights"
    write_jsonl(tmp_path/"pairs.jsonl", read_jsonl(DATA/"pairs.jsonl")[:13])
    flags = ["--batch-size", "2", "--grad-accum-steps", "4"]
    for n, more in ((1, []), (2, ["--shard"])):
        done = run(n, tmp_path/"pairs.jsonl", tmp_path/str(n), *flags, *more)
        assert done.returncode == 0, done.stderr
    metrics = [read_jsonl(tmp_path/name/"metrics.jsonl") for name in ("1", "2")]
    for a, b in zip(*metrics, strict=True): assert {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in a.items()} == b


@pytest.mark.parametrize("first, then, flags", [
    (2, 1, []), pytest.param(1, 2, [], marks=SLOW), pytest.param(2, 3, ["--shard"], marks=SLOW)])
def test_a_run_that_was_stopped_goes_on_with_another_number_of_processes(pairs, alone, tmp_path, first, then, flags):
    flags = ["--save-every", "2", *flags]
    stop_when_saved(first, pairs, tmp_path/"run", *flags)
    assert not (tmp_path/"run"/"dpo.pt").exists(), "it was too quick to be stopped"
    done = run(then, pairs, tmp_path/"run", *flags)
    assert done.returncode == 0, done.stderr
    assert_same(alone, tmp_path/"run")


@SLOW
def test_one_wandb_run_also_when_it_goes_on(pairs, tmp_path):
    assert run(2, pairs, tmp_path/"run", "--wandb", "offline").returncode == 0
    (tmp_path/"run"/"summary.json").unlink()
    assert run(2, pairs, tmp_path/"run", "--wandb", "offline").returncode == 0
    runs = (tmp_path/"run"/"wandb").glob("offline-run-*")
    assert len({folder.name.split("-")[-1] for folder in runs}) == 1


@pytest.mark.parametrize("flags, says", [
    (["--pairs", "none.jsonl"], "error: none.jsonl: no such file"),
    pytest.param(["--lr", "1e30"], "lower train.lr", marks=SLOW),
    pytest.param(["--beta", "0"], "error: beta is 0", marks=SLOW)])
def test_all_processes_end_with_one_line(pairs, tmp_path, flags, says):
    done = run(2, pairs, tmp_path/"run", *flags)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and done.stderr.count(says) == 1, done.stderr
    assert not (tmp_path/"run"/"dpo.pt").exists()


def test_the_run_folder_of_another_run_is_refused_once(pairs, alone):
    done = run(2, pairs, alone, "--beta", "0.5")
    says = "holds another run (train.beta is 1.25 there, 0.5 here)"
    assert done.stderr.count(says) == 1, done.stderr


def test_a_state_of_other_pairs_is_refused(pairs, tmp_path):
    mine = tmp_path/"pairs.jsonl"
    write_jsonl(mine, read_jsonl(pairs))
    stop_when_saved(1, mine, tmp_path/"run", "--save-every", "1", with_signal=signal.SIGKILL)
    write_jsonl(mine, read_jsonl(pairs)[1:])
    assert "train.pairs has another content now" in run(1, mine, tmp_path/"run", "--save-every", "1").stderr


def test_one_process_has_nothing_to_share(pairs, tmp_path):
    assert "nothing to share with one process" in run(1, pairs, tmp_path/"other", "--shard").stderr
