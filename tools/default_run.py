"""The evidence for the default run: the lesson with five seeds, the same with ten times the learning rate, and the SFT model against itself sampled colder.

Writes nbs/results/default_run.json, which the notebooks and the README show. About two minutes a seed on two cores: `make evidence`."""
import json, subprocess, sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RUNS, OUT = ROOT/"runs"/"evidence", ROOT/"nbs"/"results"/"default_run.json"
SEEDS = range(5)

def wikidpo(*words): subprocess.run([sys.executable, "-c", "from wikidpo.cli import main; main()", *map(str, words)], check=True, cwd=ROOT)

def summary(name): return json.loads((RUNS/name/"summary.json").read_text())

def run(seed, lr):
    "The default run and the hot one, on the same pairs"
    wikidpo("lesson", "--seed", seed, "--out", RUNS/f"seed{seed}")
    hot = RUNS/f"seed{seed}_lr_x10"
    wikidpo("train", "--seed", seed, "--lr", 10 * lr, "--pairs", RUNS/f"seed{seed}"/"pairs.jsonl", "--out", hot)
    wikidpo("judge", "--seed", seed, "--teacher.seed", seed, "--out", hot)

if __name__ == "__main__":
    lr = yaml.safe_load((ROOT/"wikidpo"/"profiles"/"miniwiki.yaml").read_text())["train"]["lr"]
    for seed in SEEDS: run(seed, lr)
    rows = {kind: [summary(f"seed{s}{tail}") for s in SEEDS] for kind, tail in (("default", ""), ("lr_x10", "_lr_x10"))}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"lr": lr, "seeds": list(SEEDS), **rows}, indent=1) + "\n")
    for kind, runs in rows.items():
        for s, r in zip(SEEDS, runs):
            j, t = r["judge"], r["train"]
            print(f"{kind:8} seed {s}: win rate {j['decided_win_rate']:.3f} [{j['ci_low']:.3f}, {j['ci_high']:.3f}] of {j['win'] + j['loss']} decided, n {j['n']}; margin {t['reward_margin']:.2f}, accuracy {t['reward_accuracy']:.2f}")
