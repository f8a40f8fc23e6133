"""Measure lesson 10's sweep on all shipped pairs: one epoch with three seeds.

    beta_sweep.py [FOLDER]     writes nbs/results/beta_sweep.json; runs in FOLDER (runs/beta_sweep) that are done are kept
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

from wikidpo.files import write_atomic
from wikidpo.miniwiki import DATA
from wikidpo.profiles import load_profile, section
from wikidpo.sampling import PolicyConfig
from wikidpo.sweep import SweepConfig, sweep, sweep_table
from wikidpo.teacher import TeacherConfig
from wikidpo.training import TrainConfig
from wikidpo.winrate import EvaluateConfig

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "beta_sweep.json"
SETTINGS = [(1, 0), (1, 1), (1, 2)]  # epochs, seed; add (5, 0) to see what a longer run does (three times as long as the rest together)

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/beta_sweep")
profile = load_profile("miniwiki")
policy, teacher, train, judge = (section(c, n, profile[n]) for c, n in ((PolicyConfig, "policy"), (TeacherConfig, "teacher"), (TrainConfig, "train"), (EvaluateConfig, "judge")))
results = []
for epochs, seed in SETTINGS:
    settings = (replace(teacher, seed=seed), SweepConfig(pairs=str(DATA / "pairs.jsonl")), replace(train, seed=seed, epochs=epochs, wandb="disabled"), replace(judge, seed=seed))
    rows = sweep(policy, *settings, folder / f"epochs{epochs}_seed{seed}")
    print(f"{epochs} epochs, seed {seed}\n{sweep_table(rows)}", flush=True)
    results.append({"epochs": epochs, "seed": seed, "rows": rows})
write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
