"""The run folder against the world: inputs that change, two writers, links, kills, full disks, names, deleted folders,
and W&B that is down. Real files, real processes, real file systems"""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from systems import LINUX

from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.judge.config import TeacherConfig
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.run.config import EvaluateConfig, MineConfig, PolicyConfig, RunTrainConfig, SweepConfig
from wikidpo.run.evaluate import evaluate
from wikidpo.run.folder import JsonlWriter, look_at, update_json, write_atomic, write_jsonl, writing
from wikidpo.run.mine import mine
from wikidpo.run.sweep import predict, sweep
from wikidpo.run.train import train
from wikidpo.world.facts import DATA, prompts

TEACHER = TeacherConfig(noise=0)


def tiny_checkpoint(path, seed=0):
    torch.manual_seed(seed)
    save_checkpoint(path, GPT(GPTConfig(vocab_size=2048, n_layer=1, n_head=2, n_embd=16, ffn_dim=32)))


class World:
    "A folder with copies of all inputs, and the steps on them: each takes a second"
    def __init__(self, folder):
        self.folder, self.out = folder, folder/"run"
        write_jsonl(folder/"prompts.jsonl", [{"prompt": p} for p in prompts("mine")[:6]])
        write_jsonl(folder/"pairs.jsonl", read_jsonl(DATA/"pairs.jsonl")[:8])
        shutil.copy(DATA/"tokenizer.json", folder/"tokenizer.json")
        shutil.copy(DATA/"model.safetensors", folder/"sft.safetensors")
        for seed, name in enumerate(("tiny.pt", "a.pt")): tiny_checkpoint(folder/name, seed)

    def policy(self, checkpoint): return PolicyConfig(str(self.folder/checkpoint), str(self.folder/"tokenizer.json"))

    def mine(self, **how):
        cfg = MineConfig(str(self.folder/"prompts.jsonl"), n_prompts=6, temps=(.7, 1.3), max_new=8, gap=1, best=2)
        return mine(self.policy("sft.safetensors"), TEACHER, cfg, self.out, **how)

    def train(self, **how):
        cfg = RunTrainConfig(pairs=str(self.folder/"pairs.jsonl"), batch_size=2, grad_accum_steps=1, epochs=1,
                             save_every=1, watch=2, precision="fp32", wandb="disabled")
        return train(self.policy("tiny.pt"), cfg, self.out, **how)

    def judge(self, **how):
        cfg = EvaluateConfig(str(self.folder/"prompts.jsonl"), a=str(self.folder/"a.pt"), n=4, max_new=4)
        return evaluate(self.policy("tiny.pt"), TEACHER, cfg, self.out, **how)

    def sweep(self, **how):
        cfg = SweepConfig(str(self.folder/"pairs.jsonl"), betas=(.1, .5), n_pairs=4, kl_prompts=2)
        training = RunTrainConfig(batch_size=4, grad_accum_steps=1, epochs=1, watch=2, wandb="disabled")
        judging = EvaluateConfig(str(self.folder/"prompts.jsonl"), n=2, max_new=4)
        return sweep(self.policy("tiny.pt"), TEACHER, cfg, training, judging, self.out, **how)

    def files(self): return {f.name: f.read_bytes() for f in self.out.iterdir() if f.is_file()}


@pytest.fixture
def world(tmp_path): return World(tmp_path)


@contextmanager
def dying_of_a_full_disk(size=20_000):
    "No file of this process may become larger: the system refuses as it does on a full disk"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    hears = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, hears)


# ---- inputs are known by content

def swap(world, name):
    "Other content under the same name, which every step can read"
    path = world.folder/name
    if path.suffix == ".jsonl": write_jsonl(path, read_jsonl(path)[::-1])
    elif path.suffix == ".pt": tiny_checkpoint(path, 7)
    elif path.exists(): path.write_text(path.read_text() + "\n")
    else: path.write_text("{}")


SWAPPED = [("mine", "prompts.jsonl", "mine.prompts has another content now"),
           ("mine", "tokenizer.json", "mine.tokenizer has another content now"),
           ("train", "tiny.pt", "train.checkpoint has another content now"),
           ("train", "pairs.jsonl", "train.pairs has another content now"),
           ("train", "chat.json", "train.chat was not there"),
           ("judge", "a.pt", "judge.a has another content now"),
           ("judge", "tokenizer.json", "judge.tokenizer has another content now"),
           ("sweep", "pairs.jsonl", "sweep.pairs has another content now")]

@pytest.mark.parametrize("step, name, says", SWAPPED)
def test_an_input_that_changed_under_its_name_is_refused_and_begun_anew_when_asked(world, step, name, says):
    "Half-way, as after a kill, and when the step is done"
    run = getattr(world, step)
    run()
    before = world.files()
    kept = (world.folder/name).read_bytes() if (world.folder/name).exists() else None
    swap(world, name)
    with pytest.raises(UserError, match=says): run()
    if step != "sweep": (world.out/"summary.json").unlink()
    with pytest.raises(UserError, match=says): run()
    assert {k: v for k, v in before.items() if k != "summary.json"} == {
        k: v for k, v in world.files().items() if k != "summary.json"}
    if name.endswith(".json"): return                                # other tokenizers and templates are core's
    run(restart=True)
    anew = world.files()
    shutil.rmtree(world.out)
    run()
    assert {k: v for k, v in anew.items() if k != "summary.json"} == {
        k: v for k, v in world.files().items() if k != "summary.json"}
    assert kept != (world.folder/name).read_bytes()


def test_restart_leaves_other_steps_alone(world):
    world.mine()
    world.judge()
    verdicts = (world.out/"verdicts.jsonl").read_bytes()
    swap(world, "prompts.jsonl")
    world.mine(restart=True)
    assert (world.out/"verdicts.jsonl").read_bytes() == verdicts
    assert set(json.loads((world.out/"summary.json").read_text())) == {"mine", "judge"}
    config = yaml.safe_load((world.out/"config.yaml").read_text())
    assert config["mine"]["inputs"]["prompts"] != config["judge"]["inputs"]["prompts"]


def test_a_folder_from_before_the_hashes_is_believed_and_one_with_short_ones_is_checked(world):
    world.judge()
    path = world.out/"config.yaml"
    config = yaml.safe_load(path.read_text())
    inputs = config["judge"].pop("inputs")
    path.write_text(yaml.safe_dump(config))
    assert world.judge()["n"] == 4                                    # no hashes at all
    short = {f"sha_{name}": inputs[name][:12] for name in ("a", "b", "prompts")}
    path.write_text(yaml.safe_dump({"judge": config["judge"] | short}))
    assert world.judge()["n"] == 4
    swap(world, "a.pt")
    with pytest.raises(UserError, match="judge.a has another content now"): world.judge()


def test_a_prediction_may_stand_there_before_the_sweep(world):
    predict(world.out, margin=.1, closest=.5, wins=.1)
    assert len(world.sweep()) == 2
    assert not [f.name for f in world.out.rglob("*") if f.name.startswith(".") and f.name != ".cache"]


# ---- one writer

WRITER = """
import sys, time
from wikidpo.run.folder import writing
with writing(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""

@contextmanager
def another_writer(out):
    "A process that holds a folder"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("step", ["mine", "train", "judge", "sweep"])
def test_the_second_writer_is_told_who_the_first_is_and_readers_read(world, step):
    getattr(world, step)()
    before = world.files()
    with another_writer(world.out) as first:
        who = re.escape(f"is being written by process {first.pid} on {socket.gethostname()} since 20")
        with pytest.raises(UserError, match=who): getattr(world, step)()
        assert world.files().items() >= before.items()               # a reader, while the first holds the folder
    getattr(world, step)()                                           # killed: its lock is none
    assert not (world.out/".lock").exists()


def test_of_many_that_begin_at_once_one_writes(tmp_path):
    "It holds the folder until the others have given up"
    code = ("import sys\nfrom wikidpo.run.folder import update_json, writing\n"
            "with writing(sys.argv[1]):\n    sys.stdin.read()\n    update_json(sys.argv[1] + '/summary.json', mine={})")
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    many = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"run")], **pipes) for _ in range(4)]
    try:
        end = time.monotonic() + 120
        while (writing := sum(p.poll() is None for p in many)) > 1:
            assert time.monotonic() < end, f"{writing} write at once"
            time.sleep(.05)
        errors = [p.communicate()[1] for p in many]
    finally:
        for p in many: p.kill()
    assert sorted(p.returncode == 0 for p in many) == [False] * 3 + [True]
    assert all("is being written by" in e or "cannot be written" in e for p, e in zip(many, errors) if p.returncode)
    assert [f.name for f in (tmp_path/"run").iterdir()] == ["summary.json"]


# ---- looked at before anything is touched

@pytest.mark.parametrize("name", ["responses.jsonl", "samples.jsonl", "config.yaml", "summary.json", ".lock"])
def test_nothing_is_written_through_a_link(world, tmp_path, name):
    world.mine()
    secret = tmp_path/"secret"
    secret.write_text("a line\nand half a line")
    (world.out/name).unlink(missing_ok=True)
    (world.out/name).symlink_to(secret)
    for run in (world.mine, world.judge, world.train):
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"): run()
    assert secret.read_text() == "a line\nand half a line"


def test_the_writers_themselves_do_not_follow_a_link(tmp_path):
    (tmp_path/"secret").write_text("a line\nand half a line")
    for name in ("x.jsonl", "summary.json"): (tmp_path/name).symlink_to(tmp_path/"secret")
    with pytest.raises(UserError, match="x.jsonl: cannot be written"): JsonlWriter(tmp_path/"x.jsonl")
    write_atomic(tmp_path/"summary.json", "{}")                       # takes the place of the link
    assert (tmp_path/"secret").read_text() == "a line\nand half a line" and not (tmp_path/"summary.json").is_symlink()


def test_a_folder_of_somebody_else_is_refused_before_it_is_changed(world):
    world.out.mkdir()
    (world.out/"responses.jsonl").write_text('{"mine": 1}\n{"torn')
    for run in (world.mine, world.train, world.judge, world.sweep):
        with pytest.raises(UserError, match="holds other files and is no run folder"): run()
    assert world.files() == {"responses.jsonl": b'{"mine": 1}\n{"torn'}


def test_a_step_killed_in_its_first_write_goes_on_and_clears_up(world):
    dead = subprocess.Popen(["true"])
    dead.wait()
    world.out.mkdir()
    for name in (f".config.yaml.{dead.pid}.tmp", f".state.pt.{dead.pid}.tmp"): (world.out/name).write_text("mi")
    (world.out/".lock").write_text("process 1 on a machine that is no more")
    world.mine()
    assert sorted(world.files()) == ["config.yaml", "pairs.jsonl", "responses.jsonl", "samples.jsonl", "summary.json"]


# ---- margins

def interrupted_training(world):
    "A training that was stopped behind its last step; margins.jsonl as it should be"
    world.train()
    whole = (world.out/"margins.jsonl").read_bytes()
    shutil.rmtree(world.out)
    with writing(world.out): write_atomic(world.out/"config.yaml", "{}")
    (world.out/"dpo.pt").mkdir()                                      # where the checkpoint should be: none is written
    with pytest.raises(UserError, match="dpo.pt: cannot be written"): world.train()
    (world.out/"dpo.pt").rmdir()
    assert (world.out/"state.pt").exists() and (world.out/"margins.jsonl").read_bytes() == whole
    return whole


def test_margins_that_were_lost_are_left_out_and_said_so(world, capsys):
    "The torn line is of a step whose weights are gone: the state was saved behind it"
    whole = interrupted_training(world)
    lines = whole.splitlines(keepends=True)
    (world.out/"margins.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    world.train()
    assert (world.out/"margins.jsonl").read_bytes() == b"".join(lines[:3])
    said = capsys.readouterr().out
    assert [int(n) for n in re.findall("no margins of step (.); its weights are gone", said)] == [3, 4]


# ---- disks

@pytest.mark.parametrize("step", ["mine", "train", "judge"])
def test_a_full_disk_is_a_line_and_the_step_goes_on_later(world, step, tmp_path):
    run = getattr(world, step)
    run()
    whole = world.files()
    shutil.rmtree(world.out)
    shutil.rmtree(world.folder/".cache", ignore_errors=True)
    for size in {0, *(len(data) - 1 for data in whole.values())}:    # each file in turn is one byte too long
        with dying_of_a_full_disk(size), pytest.raises(UserError, match=r"cannot be written \(File too large\)"): run()
        assert not list(world.folder.rglob("*.tmp"))
        lines = [f.read_bytes() for f in world.out.glob("*.jsonl")]
        assert all(text.endswith(b"\n") for text in lines if text)
    run()
    assert without_summary(world.files()) == without_summary(whole)


def without_summary(files): return {k: v for k, v in files.items() if k != "summary.json"}


FILLING = """
import os
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.run.folder import JsonlWriter, write_atomic
with JsonlWriter("full/x.jsonl") as f:
    try:
        while True: f.write({"text": "x" * 999})
    except UserError as e: print(e)
try: write_atomic("full/summary.json", "x" * 99_999)
except UserError as e: print(e)
print(len(read_jsonl("full/x.jsonl")))
print(os.listdir("full"))
"""

def test_what_pytorch_writes_meets_a_full_disk_as_everything_does(tmp_path):
    "Its writer calls it an unexpected position"
    path = tmp_path/"state.pt"
    write_atomic(path, partial(torch.save, {"w": torch.ones(3)}))
    with dying_of_a_full_disk(), pytest.raises(UserError, match=r"state.pt: cannot be written \(File too large\)"):
        write_atomic(path, partial(torch.save, {"w": torch.ones(99_999)}))
    assert torch.load(path)["w"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["state.pt"]
    with pytest.raises(RuntimeError, match="another fault"): write_atomic(path, fail)


def fail(file): raise RuntimeError("another fault")


@LINUX
def test_a_small_file_system_that_is_full(world, tmp_path):
    "A tmpfs of 64 KB, in a mount namespace of its own"
    (tmp_path/"full").mkdir()
    mounted = "mount -t tmpfs -o size=64k tmpfs full && exec \"$@\""
    found = subprocess.run(["unshare", "-rm", "sh", "-c", mounted, "sh", sys.executable, "-c", FILLING],
                           capture_output=True, text=True, cwd=tmp_path)
    if "unshare" in found.stderr or "mount:" in found.stderr: pytest.skip("this machine gives nobody a mount")
    first, second, n, names = found.stdout.splitlines()
    assert first == "full/x.jsonl: cannot be written (No space left on device)"
    assert second == "full/summary.json: cannot be written (No space left on device)"
    assert int(n) > 50 and names == "['x.jsonl']"


@LINUX
def test_places_that_cannot_be_written_to(world, tmp_path):
    (tmp_path/"a file").write_text("x")
    long = "n" * 300
    for out, says in (((tmp_path/"a file"/"run"), "Not a directory"), (tmp_path/long, "File name too long"),
                      (Path("/proc/run"), "No such file")):
        world.out = out
        with pytest.raises(UserError, match=f"cannot be written .{says}"): world.mine()
    with pytest.raises(UserError, match="cannot be written .File name too long"): write_atomic(tmp_path/long, "x")
    write_atomic(tmp_path/("n" * 250), "x")                           # no longer than a name may be
    assert (tmp_path/"a file").read_text() == "x"


def test_a_folder_that_may_only_be_read(world, tmp_path):
    "In a child that gives up root's right to write everywhere"
    world.mine()
    before, said = world.files(), tmp_path/"said"
    said.touch()
    said.chmod(0o666)
    for folder in [tmp_path, *tmp_path.parents]: # anybody may pass
        if not folder.stat().st_mode & 0o001: folder.chmod(0o755)
    world.out.chmod(0o555)
    if not (pid := os.fork()):
        if os.getuid() == 0: os.setuid(65534)
        try:
            with writing(world.out): said.write_text("written")
        except UserError as e: said.write_text(str(e))
        finally: os._exit(0)
    os.waitpid(pid, 0)
    world.out.chmod(0o755)
    assert said.read_text() == f"{world.out}: cannot be written (Permission denied)" and world.files() == before


# ---- the folder goes away

@pytest.mark.parametrize("step", ["mine", "train", "judge"])
def test_a_folder_deleted_during_the_run_stops_it_in_a_line(world, step):
    "By another thread, as soon as the first line of results stands there"
    watched = {"mine": "samples.jsonl", "train": "metrics.jsonl", "judge": "verdicts.jsonl"}[step]
    def delete():
        end = time.time() + 60
        while time.time() < end and not ((world.out/watched).exists() and (world.out/watched).stat().st_size): pass
        shutil.rmtree(world.out, ignore_errors=True)
    thread = threading.Thread(target=delete)
    thread.start()
    try:
        with pytest.raises(UserError, match="was deleted while|no such file"): getattr(world, step)()
    finally: thread.join()


# ---- text

def test_a_half_character_is_not_half_written(tmp_path):
    with JsonlWriter(tmp_path/"x.jsonl") as f:
        f.write({"text": "whole"})
        with pytest.raises(UserError, match="x.jsonl: cannot be written .half a character"):
            f.write([{"text": "whole"}, {"text": "\ud800"}])
    assert read_jsonl(tmp_path/"x.jsonl") == [{"text": "whole"}]
    with pytest.raises(UserError, match="half a character"): write_atomic(tmp_path/"x.jsonl", "\udfff")
    assert read_jsonl(tmp_path/"x.jsonl") == [{"text": "whole"}]


def test_a_long_torn_line_is_cut_wherever_it_begins(tmp_path):
    for size in (1, 65_535, 65_536, 65_537, 200_000):
        (tmp_path/"x.jsonl").write_bytes(b'{"i": 0}\n' + b"\xc3" * size)
        with JsonlWriter(tmp_path/"x.jsonl") as f: f.write({"i": 1})
        assert [r["i"] for r in read_jsonl(tmp_path/"x.jsonl")] == [0, 1]


@pytest.mark.parametrize("text, says", [("[1]", "expected an object"), ("{", "broken JSON"), ("\xff", "")])
def test_a_summary_that_is_none_is_named(tmp_path, text, says):
    (tmp_path/"summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"summary.json: .*{says}"): update_json(tmp_path/"summary.json", mine={})


# ---- before it begins

def test_judge_refuses_a_prompt_that_is_too_long_before_the_first_is_asked(world):
    rows = [{"prompt": "Who?"}] * 300 + [{"prompt": "word " * 2000}]
    write_jsonl(world.folder/"long.jsonl", rows)
    cfg = EvaluateConfig(str(world.folder/"long.jsonl"), a=str(world.folder/"a.pt"), n=400, max_new=4)
    with pytest.raises(UserError, match="long.jsonl: prompt 301 is too long to leave room for judge.max_new 4"):
        evaluate(world.policy("tiny.pt"), TEACHER, cfg, world.out)
    assert not world.out.exists()


# ---- W&B

def answering(status=None):
    "(the address of a server that says only this, or nothing at all; the server)"
    server = socket.create_server(("127.0.0.1", 0))
    def serve():
        while True:
            try: connection, _ = server.accept()
            except OSError: return
            kept.append(connection)
            if status: connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())
    kept = []
    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", server


@pytest.mark.parametrize("how", [pytest.param("down", marks=pytest.mark.slow), "silent"])
def test_wandb_that_cannot_be_reached_does_not_stop_a_training(world, tmp_path, how):
    url, server = answering()
    if how == "down": server.close()
    env = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "TQDM_DISABLE": "1"}
    env.pop("WANDB_MODE", None)                                       # it would decide, and nobody would be asked
    words = ["train", "--checkpoint", world.folder/"tiny.pt", "--pairs", world.folder/"pairs.jsonl", "--out", world.out,
             "--batch-size", 2, "--valid", 0, "--watch", 0, "--wandb", "auto"]
    done = subprocess.run([sys.executable, "-c", "from wikidpo.cli import main; main()", *map(str, words)],
                          env=env, capture_output=True, text=True)
    server.close()
    assert done.returncode == 0, done.stderr
    assert f"W&B: {url} does not answer; the run goes on offline" in done.stdout
    assert list((world.out/"wandb").glob("offline-run-*")) and read_jsonl(world.out/"metrics.jsonl")


def test_training_goes_on_without_wandb(world):
    "It is not installed; and it cannot begin a run where its folder should be"
    words = ["train", "--checkpoint", world.folder/"tiny.pt", "--pairs", world.folder/"pairs.jsonl", "--out", world.out,
             "--batch-size", 2, "--valid", 0, "--watch", 0, "--wandb", "offline"]
    code = "import sys; sys.modules['wandb'] = None; from wikidpo.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and "W&B: is not installed" in done.stdout
    assert read_jsonl(world.out/"metrics.jsonl")


# ---- signals and kernels

def test_sigterm_is_heard_as_ctrl_c(world):
    "The same command goes on afterwards"
    words = ["mine", "--checkpoint", str(world.folder/"sft.safetensors"), "--out", str(world.out),
             "--prompts", str(DATA/"prompts_mine.jsonl"), "--n-prompts", "60", "--max-new", "40"]
    process = subprocess.Popen([sys.executable, "-c", "from wikidpo.cli import main; main()", *words],
                               stderr=subprocess.PIPE, text=True)
    while not (world.out/"config.yaml").exists():
        time.sleep(.02)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and "the same command goes on from here" in err and "Traceback" not in err
    assert not (world.out/".lock").exists() and look_at(world.out) is None


CELL = """
from pathlib import Path
from wikidpo.judge.config import TeacherConfig
from wikidpo.run.config import MineConfig, PolicyConfig
from wikidpo.run.mine import mine
from wikidpo.world.facts import DATA
policy = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"))
cfg = MineConfig(str(DATA/"prompts_mine.jsonl"), n_prompts=60, temps=(.7, 1.3), max_new=24, batch=64)
summary = mine(policy, TeacherConfig(), cfg, OUT)
"""

def run_cell(client, code, meanwhile=lambda: None):
    "What a cell that is run in a kernel ends with: ok or the name of its error"
    message = client.execute(code)
    meanwhile()
    while True:
        reply = client.get_shell_msg(timeout=300)
        if reply["parent_header"].get("msg_id") == message: return reply["content"].get("ename", "ok")


def test_an_interrupted_cell_leaves_the_kernel_usable_and_goes_on(tmp_path):
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", env=os.environ | {"TQDM_DISABLE": "1"})
    def interrupt():
        end = time.time() + 200
        while time.time() < end and not (tmp_path/"run"/"responses.jsonl").exists(): time.sleep(.02)
        manager.interrupt_kernel()
    try:
        cell = CELL.replace("OUT", repr(str(tmp_path/"run")))
        assert run_cell(client, cell, interrupt) == "KeyboardInterrupt"
        assert run_cell(client, "assert policy.device == 'auto'") == "ok"
        assert not (tmp_path/"run"/"summary.json").exists() and not (tmp_path/"run"/".lock").exists()
        assert run_cell(client, cell) == "ok"
        assert run_cell(client, CELL.replace("OUT", repr(str(tmp_path/"whole")))) == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    for name in ("responses.jsonl", "samples.jsonl", "pairs.jsonl", "config.yaml"):
        assert (tmp_path/"run"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes(), name


TWO_RUNS = """
import sys
from pathlib import Path
from wikidpo.run.config import PolicyConfig, RunTrainConfig
from wikidpo.run.train import train
folder = Path(sys.argv[1])
policy = PolicyConfig(str(folder/"sft.safetensors"), str(folder/"tokenizer.json"))
how = dict(pairs=str(folder/"pairs.jsonl"), batch_size=2, grad_accum_steps=1, watch=0, valid=0, wandb="offline")
train(policy, RunTrainConfig(**how, epochs=8), folder/"run")
train(policy, RunTrainConfig(**how, epochs=1), folder/"next")
"""


def wandbs_of(pid):
    "The processes that W&B has started for one process"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError): # it ends while it is looked at
            parent = int((process/"stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"wandb" in (process/"cmdline").read_bytes(): found.append(int(process.name))
    return found


@LINUX
def test_wandb_that_is_killed_in_the_middle_stops_no_training(world):
    "The real one, offline: its process dies of SIGKILL; the run ends as ever, and the next begins with another W&B"
    log, env = world.out/"metrics.jsonl", {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    training = subprocess.Popen([sys.executable, "-c", TWO_RUNS, str(world.folder)], env=env | {"TQDM_DISABLE": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while training.poll() is None and not (log.exists() and log.stat().st_size): time.sleep(.01)
    assert (killed := wandbs_of(training.pid)), training.communicate()
    for pid in killed: os.kill(pid, signal.SIGKILL)
    said, err = training.communicate()
    assert training.returncode == 0 and "Traceback" not in err, err             # W&B itself may advertise
    assert said.count("W&B: is left alone; the metrics are in metrics.jsonl (Connection") == 1 == said.count("\n")
    assert [row["step"] for row in read_jsonl(log)] == list(range(1, 33)) and (world.out/"dpo.pt").exists()
    assert list((world.folder/"next"/"wandb").glob("offline-run-*/*.wandb"))
