"""The evidence for the default run: the lesson with five seeds, and the same pairs with ten times the learning rate.

Writes nbs/results/default_run.json, which the notebooks and the README show, and images/default_run.svg. About one
minute a seed on two cores: `make evidence`. Runs that are done are kept in runs/evidence, whatever the code has become
since: remove that folder to measure anew. With --figure it only draws the figure again.
"""
import json
import subprocess
import sys

import matplotlib
from matplotlib.figure import Figure

from evidence import PROFILE, RESULTS, ROOT, win_rate_of_decided, write_results

RUNS = ROOT / "runs" / "evidence"
SEEDS = range(5)
KINDS = {"default": "", "lr_x10": "_lr_x10"}  # a run's folder is its seed with this behind it


def wikidpo(*words) -> None:
    "Run the command `wikidpo`."
    command = [sys.executable, "-c", "from wikidpo.cli import main; main()", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT)


def summaries(tail: str) -> list[dict]:
    "summary.json of one kind of run, a seed each."
    paths = [RUNS / f"seed{seed}{tail}" / "summary.json" for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths]


def run(seed: int, lr: float) -> None:
    "The default run and the hot one, on the same pairs."
    plain, hot = RUNS / f"seed{seed}", RUNS / f"seed{seed}_lr_x10"
    wikidpo("lesson", "--seed", seed, "--out", plain)
    wikidpo("train", "--seed", seed, "--lr", 10 * lr, "--pairs", plain / "pairs.jsonl", "--out", hot)
    wikidpo("judge", "--seed", seed, "--teacher.seed", seed, "--out", hot)


def draw(ax, runs: list[dict], first: int, colour: str, marker: str, label: str) -> None:
    "Win rates with their intervals, a row for each run, from the row `first` on."
    for y, result in enumerate(runs, first):
        judged = result["judge"]
        interval = [judged["ci_low"], judged["ci_high"]]
        ax.plot(interval, [y, y], color=colour, lw=4, alpha=0.35, solid_capstyle="butt")
        shown = {"label": label} if y == first else {}
        ax.plot(judged["decided_win_rate"], y, marker, color=colour, ms=5, **shown)


def figure(results: dict) -> None:
    "Write images/default_run.svg."
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wikidpo"
    fig = Figure(figsize=(7, 2.8))
    ax = fig.subplots()
    ax.axvline(0.5, color="#999999", ls="--", lw=1)
    draw(ax, results["default"], 0, "#0072B2", "o", f"default, learning rate {results['lr']:.0e}")
    draw(ax, results["lr_x10"], 6, "#D55E00", "s", "ten times the learning rate")
    n = len(results["seeds"])
    ax.set(
        xlim=(0, 1),
        xlabel="share of decided comparisons won against the SFT model, with 95 % interval",
        yticks=[*range(n), *range(6, 6 + n)],
        yticklabels=[f"seed {s}" for s in results["seeds"]] * 2,
    )
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(0.1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "default_run.svg", metadata={"Date": None})


def main() -> None:
    lr = PROFILE["train"]["lr"]
    for seed in SEEDS:
        run(seed, lr)
    rows = {kind: summaries(tail) for kind, tail in KINDS.items()}
    results = {"lr": lr, "seeds": list(SEEDS), **rows}
    write_results("default_run", results)
    figure(results)
    for kind, runs in rows.items():
        for seed, r in zip(SEEDS, runs):
            judged, train = r["judge"], r["train"]
            trained = f"margin {train['reward_margin']:.2f}, accuracy {train['reward_accuracy']:.2f}"
            print(f"{kind:8} seed {seed}: {win_rate_of_decided(judged)} decided, n {judged['n']}; {trained}")


if __name__ == "__main__":
    if "--figure" in sys.argv:
        figure(json.loads((RESULTS / "default_run.json").read_text()))
    else:
        main()
