"""What everything else is held against.

How fast this machine multiplies matrices and reads memory, how long the whole lesson takes, and how much processor
time a command that only has to answer."""
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from time import perf_counter

from worker import serve

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("mine", "train", "judge")
WIKIDPO = "from wikidpo.cli import main; main()" # what the command `wikidpo` runs


def product(dtype):
    "Matrix products in this precision; GFLOP"
    def get_ready(task):
        import torch
        n, device = task["size"], task["device"]
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

        def run():
            for _ in range(task["times"]): a @ b
            if device == "cuda": torch.cuda.synchronize()
            return task["times"] * 2 * n**3 / 1e9
        run()
        return run
    return get_ready


def memory(task):
    "Sums over far more than the caches hold; GB"
    import torch
    x = torch.ones(task["size"]) # float32

    def run():
        for _ in range(task["times"]): x.sum()
        return task["times"] * 4 * task["size"] / 1e9
    run()
    return run


def wikidpo(tree, *words):
    "The command with the package that lies in a folder, run there: a profile names files from where it runs"
    subprocess.run([sys.executable, "-P", "-c", WIKIDPO, *words], check=True, stdout=sys.stderr, cwd=tree,
                   env=os.environ | {"PYTHONPATH": str(tree)})


def lesson(task, tree=ROOT): # where the package lies
    "The whole lesson; seconds, and those of its phases"
    def run():
        with tempfile.TemporaryDirectory() as out:
            start = perf_counter()
            wikidpo(tree, "lesson", "--out", f"{out}/run", *task["args"])
            seconds = perf_counter() - start
            summary = json.loads(Path(out, "run", "summary.json").read_text())
            return seconds, {f"{phase}_s": float(summary[phase]["seconds"]) for phase in PHASES}
    return run


def lesson_before(task):
    "The same with the package as it was at a commit, which makes its own files first"
    tree = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, tree)
    archive = subprocess.run(["git", "-C", ROOT, "archive", task["before"], "wikidpo"], capture_output=True)
    if archive.returncode: raise RuntimeError(f"this clone has no commit {task['before']}")
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    for words in task.get("first", []): wikidpo(tree, *words)
    return lesson(task, tree)


def processor_time():
    "Of the child processes that have ended; seconds"
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def answering(*words, refused=False):
    "A Python that runs these words in a process of its own; seconds of processor time"
    def get_ready(task):
        def run():
            before = processor_time()
            done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True)
            spent = processor_time() - before
            if refused == (done.returncode == 0):
                raise RuntimeError(done.stderr.strip().split("\n")[-1] or "accepted what should be refused")
            return spent
        run() # the first one compiles
        return run
    return get_ready


CONTESTANTS = {
    "float32": product("float32"),
    "bfloat16": product("bfloat16"),
    "memory": memory,
    "whole": lesson,
    "before": lesson_before,
    "help": answering(WIKIDPO, "--help"),
    "train-help": answering(WIKIDPO, "train", "--help"),
    "refused": answering(WIKIDPO, "train", "--lr", "x", refused=True),
    "import": answering("import wikidpo"),
    "import-loss": answering("import wikidpo.core.loss"),
}

if __name__ == "__main__": serve(CONTESTANTS)
