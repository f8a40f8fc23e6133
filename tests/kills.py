"""Stops commands at each of their writes, renames and appends, and runs them again.

`python tests/kills.py '{"mine": ["mine", "--out", "{root}/run", ...]}' KILLS FOLDER` imports everything once and
forks a child for every start, so that a kill costs what the command itself takes. `{root}` in the words is
FOLDER/mine. A line of JSON for each trial: where it was stopped, and in which files its folder differs from that of an
undisturbed run."""
import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

PHASES = {"write": ("before", "middle", "after"), "replace": ("before", "after"), "ftruncate": ("before", "after"),
          "unlink": ("before", "after"), "mkdir": ("before",), "open": ("after",)}
SIGNALS = (signal.SIGKILL,) * 3 + (signal.SIGINT, signal.SIGTERM)


class Watch:
    "Counts what this process changes below a folder, and stops it at one of these changes"
    def __init__(self, root, stop_at=None, phase=None, how=None):
        self.root, self.stop_at = os.path.realpath(root), stop_at
        self.phase, self.how = phase, how
        self.seen, self.lock = [], threading.Lock()
        for name in PHASES: setattr(os, name, self.wrapped(name, getattr(os, name)))

    def is_ours(self, what):
        is_open = isinstance(what, int)
        path = os.readlink(f"/proc/self/fd/{what}") if is_open else os.path.abspath(os.fsdecode(what))
        return path.startswith(self.root + "/")

    def wrapped(self, name, call):
        def changing(*args, **kw):
            reading = name == "open" and not args[1] & os.O_CREAT
            if reading or kw.get("dir_fd") is not None or not self.is_ours(args[0]): return call(*args, **kw)
            with self.lock:
                self.seen.append(name)
                here = len(self.seen) - 1 == self.stop_at
            if here and self.phase == "before": self.stop()
            half = self.phase == "middle" and name == "write"         # of a second start, another change may be here
            if here and half: args = args[0], args[1][:len(args[1]) // 2]
            found = call(*args, **kw)
            if here and self.phase != "before": self.stop()
            return found
        return changing

    def stop(self): os.kill(os.getpid(), self.how)


def start(words, log, root, point=None):
    "Run the command in a child, stopped at a point; (exit status, or -signal; the changes that it made)"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd in (1, 2): os.dup2(out, fd)
            watch = Watch(root, *point or ())
            from wikidpo.cli import main
            code = 0
            main(words)
        except SystemExit as e: code = e.code or 0
        except BaseException:
            code = 70
            traceback.print_exc()
        os.write(write, " ".join(watch.seen).encode())
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as f: seen = f.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def snapshot(root):
    "{file: its bytes}, without the seconds that a step took"
    def content(path):
        if path.name != "summary.json": return path.read_bytes()
        return {step: values | {"seconds": 0} for step, values in json.loads(path.read_text()).items()}
    return {str(f.relative_to(root)): content(f) for f in sorted(root.rglob("*")) if f.is_file()}


def trials(words, kills, root, seed=0):
    "Stop the command so often, each time at another change, or twice in a row where there are not so many"
    log = root.with_suffix(".log")
    words, rng = [w.replace("{root}", str(root)) for w in words], random.Random(seed)
    shutil.rmtree(root, ignore_errors=True)
    code, seen = start(words, log, root)
    if code: raise SystemExit(f"the undisturbed run ended with {code}: {log.read_text()}")
    whole = snapshot(root)
    points = [(i, phase) for i, name in enumerate(seen) for phase in PHASES[name]]
    few = [points[i * len(points) // kills] for i in range(kills)]
    plans = [[point] for point in (few if kills <= len(points) else points)]
    while sum(map(len, plans)) < kills: plans.append(rng.choices(points, k=2))
    for n, plan in enumerate(plans):
        shutil.rmtree(root, ignore_errors=True)
        hows = [SIGNALS[(n + k) % len(SIGNALS)] for k in range(len(plan))]
        stopped = [start(words, log, root, (*point, how))[0] for point, how in zip(plan, hows)]
        code = start(words, log, root)[0]
        found = snapshot(root)
        differ = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
        where = [f"{phase} {i}, {seen[i]}" for i, phase in plan]
        says = log.read_text()[-500:] if code or differ else ""
        yield {"stopped": stopped, "where": where, "code": code, "differ": differ, "says": says}


if __name__ == "__main__":
    os.environ.update(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)          # a shell's background ignores it
    import torch
    import torch._dynamo
    torch.set_num_threads(1)                                          # a pool of threads would not survive the fork
    for room in ("cli", "run.evaluate", "run.mine", "run.sweep", "run.train"): import_module(f"wikidpo.{room}")
    from wikidpo.world.facts import find_fact
    find_fact("")                                                     # makes an index, once for all children
    for name, words in json.loads(sys.argv[1]).items():
        for trial in trials(words, int(sys.argv[2]), Path(sys.argv[3])/name):
            print(json.dumps({"name": name} | trial), flush=True)
