"Several processes through the real torchrun command: the numbers of one process, one run folder, one complaint, and a run that goes on with another number of them"
import json, signal, subprocess, sys, time
import pytest, torch
from wikidpo.files import read_jsonl, write_jsonl
from wikidpo.miniwiki import DATA

FLAGS = ["--block-size", "256", "--lr", "3e-4", "--batch-size", "4", "--grad-accum-steps", "2", "--warmup-steps", "1", "--wandb", "disabled", "--device", "cpu"]
SLOW = pytest.mark.slow                                                   # each starts processes for ten seconds or more

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")/"pairs.jsonl"
    write_jsonl(path, read_jsonl(DATA/"pairs.jsonl")[:41])                  # 5 steps of 8, then one of 1: a rank with nothing to do
    return path

def command(n, pairs, out, *flags):
    how = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"] if n > 1 else []
    return [sys.executable, *how, "-m", "wikidpo.training", "--pairs", str(pairs), "--out", str(out), *FLAGS, *flags]

def run(*a): return subprocess.run(command(*a), capture_output=True, text=True, timeout=300)

@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")/"run"
    done = run(1, pairs, out)
    assert done.returncode == 0, done.stderr
    return out

def same(a, b, tol=1e-5):
    "Metrics and weights of two run folders agree"
    rows = [read_jsonl(r/"metrics.jsonl") for r in (a, b)]
    assert len(rows[0]) == len(rows[1]) == 6
    for x, y in zip(*rows): assert {k: pytest.approx(v, rel=tol, abs=tol) for k, v in x.items()} == y
    wa, wb = (torch.load(r/"dpo.pt", weights_only=True)["model"] for r in (a, b))
    start = torch.cat([w.flatten() for w in wa.values()])
    assert max((wa[k] - wb[k]).abs().max() for k in wa) < 1e-4 < start.abs().max()
    assert not (b/"state.pt").exists()

@pytest.mark.parametrize("n, flags", [(2, []), (2, ["--shard"])])
def test_processes_give_the_numbers_of_one(pairs, alone, tmp_path, n, flags):
    done = run(n, pairs, tmp_path/"run", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 steps") == 1                               # one voice
    same(alone, tmp_path/"run")

@pytest.mark.parametrize("first, then, flags", [(2, 1, []), pytest.param(1, 2, [], marks=SLOW), pytest.param(2, 3, ["--shard"], marks=SLOW)])
def test_a_run_that_was_stopped_goes_on_with_another_number_of_processes(pairs, alone, tmp_path, first, then, flags):
    state, flags = tmp_path/"run"/"state.pt", ["--save-every", "2", *flags]
    p = subprocess.Popen(command(first, pairs, tmp_path/"run", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not state.exists(): assert p.poll() is None, p.stderr.read(); time.sleep(.01)
    p.terminate(); p.communicate()
    assert not (tmp_path/"run"/"dpo.pt").exists(), "it was too quick to be stopped"
    done = run(then, pairs, tmp_path/"run", *flags)
    assert done.returncode == 0, done.stderr
    same(alone, tmp_path/"run")

@SLOW
def test_one_wandb_run_also_when_it_goes_on(pairs, tmp_path):
    assert run(2, pairs, tmp_path/"run", "--wandb", "offline").returncode == 0
    (tmp_path/"run"/"summary.json").unlink()
    assert run(2, pairs, tmp_path/"run", "--wandb", "offline").returncode == 0
    assert len({f.name.split("-")[-1] for f in (tmp_path/"run"/"wandb").glob("offline-run-*")}) == 1

@pytest.mark.parametrize("flags, says", [(["--pairs", "none.jsonl"], "error: none.jsonl: no such file"), pytest.param(["--lr", "1e30"], "lower train.lr", marks=SLOW), pytest.param(["--beta", "0"], "error: beta is 0", marks=SLOW)])
def test_all_processes_end_with_one_line(pairs, tmp_path, flags, says):
    done = run(2, pairs, tmp_path/"run", *flags)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and done.stderr.count(says) == 1, done.stderr
    assert not (tmp_path/"run"/"dpo.pt").exists()

def test_the_run_folder_of_another_run_is_refused_once(pairs, alone):
    done = run(2, pairs, alone, "--beta", "0.5")
    assert done.stderr.count("holds another run (train.beta is 0.1 there, 0.5 here)") == 1, done.stderr

def test_a_state_of_other_pairs_is_refused(pairs, tmp_path):
    mine, state = tmp_path/"pairs.jsonl", tmp_path/"run"/"state.pt"
    write_jsonl(mine, read_jsonl(pairs))
    p = subprocess.Popen(command(1, mine, tmp_path/"run", "--save-every", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state.exists(): assert p.poll() is None; time.sleep(.01)
    p.kill(); p.communicate()
    write_jsonl(mine, read_jsonl(pairs)[1:])
    assert "begun with other pairs" in run(1, mine, tmp_path/"run", "--save-every", "1").stderr
    assert "nothing to share with one process" in run(1, pairs, tmp_path/"other", "--shard").stderr
