"""Measure lesson 10's sweep on all shipped pairs: one epoch with three seeds.

    beta_sweep.py [FOLDER]

Writes nbs/results/beta_sweep.json; runs in FOLDER (runs/beta_sweep) that are done are kept.
"""
import sys
from pathlib import Path

from evidence import configured, write_results
from wikidpo.run.config import SweepConfig
from wikidpo.run.sweep import sweep, sweep_table
from wikidpo.world.facts import DATA

# Epochs, seed; add (5, 0) to see what a longer run does (three times as long as the rest together)
SETTINGS = [(1, 0), (1, 1), (1, 2)]


def measure(epochs: int, seed: int, folder: Path) -> list[dict]:
    "The rows of one sweep."
    return sweep(
        configured("policy"),
        configured("teacher", seed=seed),
        SweepConfig(pairs=str(DATA / "pairs.jsonl")),
        configured("train", seed=seed, epochs=epochs, wandb="disabled"),
        configured("judge", seed=seed),
        folder / f"epochs{epochs}_seed{seed}",
    )


def main(folder: Path) -> None:
    results = []
    for epochs, seed in SETTINGS:
        rows = measure(epochs, seed, folder)
        print(f"{epochs} epochs, seed {seed}\n{sweep_table(rows)}", flush=True)
        results.append({"epochs": epochs, "seed": seed, "rows": rows})
    write_results("beta_sweep", results)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/beta_sweep"))
