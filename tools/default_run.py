"""The evidence for the default run: the lesson with five seeds, and the same pairs with ten times the learning rate.

Writes nbs/results/default_run.json, which the notebooks and the README show, and images/default_run.svg. About one minute
a seed on two cores: `make evidence`. With --figure it only draws the figure again."""
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

def figure(results):
    "Win rates with their intervals, a row for each run"
    import matplotlib
    matplotlib.use("svg"); matplotlib.rcParams["svg.hashsalt"] = "wikidpo"
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7, 2.8)); ax = fig.subplots()
    ax.axvline(.5, color="#999999", ls="--", lw=1)
    for kind, colour, name, y0 in (("default", "#0072B2", f"default, learning rate {results['lr']:.0e}", 0), ("lr_x10", "#D55E00", "ten times the learning rate", 6)):
        for i, r in enumerate(results[kind]):
            j = r["judge"]
            ax.plot([j["ci_low"], j["ci_high"]], [y0 + i] * 2, color=colour, lw=4, alpha=.35, solid_capstyle="butt")
            ax.plot(j["decided_win_rate"], y0 + i, "o" if kind == "default" else "s", color=colour, ms=5, label=name if i == 0 else None)
    n = len(results["seeds"])
    ax.set(xlim=(0, 1), xlabel="share of decided comparisons won against the SFT model, with 95 % interval", yticks=[*range(n), *range(6, 6 + n)], yticklabels=[f"seed {s}" for s in results["seeds"]] * 2)
    ax.invert_yaxis(); ax.legend(frameon=False, loc="center left", bbox_to_anchor=(.1, .5)); ax.spines[["top", "right"]].set_visible(False); fig.tight_layout()
    fig.savefig(ROOT/"images"/"default_run.svg", metadata={"Date": None})

if __name__ == "__main__":
    if "--figure" in sys.argv: figure(json.loads(OUT.read_text())); sys.exit()
    lr = yaml.safe_load((ROOT/"wikidpo"/"profiles"/"miniwiki.yaml").read_text())["train"]["lr"]
    for seed in SEEDS: run(seed, lr)
    rows = {kind: [summary(f"seed{s}{tail}") for s in SEEDS] for kind, tail in (("default", ""), ("lr_x10", "_lr_x10"))}
    OUT.parent.mkdir(exist_ok=True)
    results = {"lr": lr, "seeds": list(SEEDS), **rows}
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    figure(results)
    for kind, runs in rows.items():
        for s, r in zip(SEEDS, runs):
            j, t = r["judge"], r["train"]
            print(f"{kind:8} seed {s}: win rate {j['decided_win_rate']:.3f} [{j['ci_low']:.3f}, {j['ci_high']:.3f}] of {j['win'] + j['loss']} decided, n {j['n']}; margin {t['reward_margin']:.2f}, accuracy {t['reward_accuracy']:.2f}")
