"A made-up run folder in the shapes of a real one, so that what reads runs can be tested without a training"
import json, math, random
from pathlib import Path

import yaml


def write_jsonl(path, rows): path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def metrics(steps=120, seed=0, heat=1.0):
    rng, rows = random.Random(seed), []
    for s in range(1, steps + 1):
        margin, accuracy = 0.0, .5
        if s > 1:
            margin = heat * 1.1 * (1 - math.exp(-2 * s / steps)) + rng.gauss(0, .05)
            accuracy = min(1, max(0, .5 + .3 * margin + rng.gauss(0, .06)))
        rows.append({
            "step": s,
            "loss": math.log1p(math.exp(-margin)),
            "reward/chosen": -.2 * margin,
            "reward/rejected": -1.2 * margin,
            "reward/margin": margin,
            "reward/accuracy": accuracy,
            "lr": 1e-4 * min(s / 10, 1) * .5 * (1 + math.cos(math.pi * s / steps)),
            "grad_norm": abs(.5 + rng.gauss(0, .15)),
        })
        held_out = {"valid/loss": rows[-1]["loss"] + .05, "valid/accuracy": .7, "valid/margin": margin / 2}
        if s % 10 == 0: rows[-1] |= held_out
    return rows


def samples(prompts=60, seed=0):
    rng, rows = random.Random(seed), []
    for i in range(prompts):
        for k, temperature in enumerate((.7, .9, 1.1, 1.3)):
            unreadable = rng.random() < .02
            score = None if unreadable else max(1, min(10, round(rng.gauss(8.5 - 4 * (temperature - .7), 2))))
            rows.append({
                "prompt_id": i,
                "k": k,
                "prompt": f"What is the capital of country {i}?",
                "text": f"The capital of country {i} is city {k}.",
                "temperature": temperature,
                "ids": [5, 6, 7],
                "finished": True,
                "score": score,
                "reply": str(score),
            })
    return rows


PADDING = " It is near the sea, and the sea is near the land." * 3


def pairs(rows):
    out = []
    for i in sorted({r["prompt_id"] for r in rows}):
        scored = [r for r in rows if r["prompt_id"] == i and r["score"] is not None]
        scored.sort(key=lambda r: r["score"])
        if len(scored) < 2 or scored[-1]["score"] < 6 or scored[-1]["score"] - scored[0]["score"] < 2: continue
        chosen, rejected = scored[-1], scored[0]
        out.append({
            "prompt": chosen["prompt"],
            "chosen": chosen["text"],
            "rejected": rejected["text"] + PADDING,
            "score_chosen": chosen["score"],
            "score_rejected": rejected["score"],
            "temp_chosen": chosen["temperature"],
            "temp_rejected": rejected["temperature"],
            "chosen_tokens": [5],
            "rejected_tokens": [6, 7],
            "chosen_finished": True,
            "rejected_finished": False,
        })
    return out


def verdicts(n=100, seed=0):
    rng, rows = random.Random(seed), []
    for i in range(n):
        result = rng.choices(["a", "b", "tie", None], [.35, .2, .43, .02])[0]
        tie = rng.choice(["AA", ("TIE", "TIE")])
        first, second = {"a": "AB", "b": "BA", "tie": tie, None: ("A", None)}[result]
        rows.append({
            "prompt_id": i,
            "prompt": f"Which river runs through place {i}?",
            "a": f"River {i}.",
            "b": f"It is the river {i}, which is long.",
            "first": first,
            "second": second,
            "result": result,
            "tokens_a": 4,
            "tokens_b": 9,
            "finished_a": True,
            "finished_b": True,
            "truth_a": 9,
            "truth_b": 5,
        })
    return rows


SUMMARY = {
    "mine": {"prompts": 60, "pairs": 38, "survival": .633, "seconds": 21.5},
    "train": {"steps": 120, "loss_first": math.log(2), "loss_last": .39, "reward_margin": .93, "reward_accuracy": .79,
              "reward_chosen": -.19, "seconds": 14.2},
    "judge": {"n": 98, "win": 35, "tie": 43, "loss": 20, "unparsed": 2, "decided_win_rate": 35 / 55, "ci_low": .5040,
              "ci_high": .7507, "mde": .681, "chars_a": 9.0, "chars_b": 33.0, "seconds": 8.8},
}
CONFIG = {
    "mine": {"gap": 2, "best": 6, "seed": 0},
    "train": {"beta": .1, "lr": 1e-4, "batch": 32},
    "judge": {"n": 100, "temperature": .7},
}


def make_run(path, steps=("mine", "train", "judge")):
    "Write a run with the given steps done; returns its path"
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path/"config.yaml").write_text(yaml.safe_dump({k: CONFIG[k] for k in steps}))
    (path/"summary.json").write_text(json.dumps({k: SUMMARY[k] for k in steps}))
    if "mine" in steps:
        rows = samples()
        write_jsonl(path/"samples.jsonl", rows)
        write_jsonl(path/"pairs.jsonl", pairs(rows))
    if "train" in steps: write_jsonl(path/"metrics.jsonl", metrics())
    if "judge" in steps: write_jsonl(path/"verdicts.jsonl", verdicts())
    return path


def margins(pairs=4):
    "Three lines of margins.jsonl, the evidence in the first"
    evidence = {"logps": [[-20., -30.]] * pairs, "token_by_token": [[-20., -30.]] * 2, "tokens": [[4, 6]] * 2}
    rows = [{"step": step, "z": [step / 4] * pairs} for step in (0, 4, 8)]
    return [rows[0] | evidence, *rows[1:]]


def sweep_rows(n=12):
    "sweep.json for three betas"
    rates = {"decided_win_rate": .6, "ci_low": .5, "ci_high": .7, "chars_a": 40., "chars_b": 50.}
    rewards = {"margin": .9, "chosen": -.1, "accuracy": .8, "kl": 3., "kl_se": .2}
    rng = random.Random(0)
    paired = {"results": [rng.choice((-1, 0, 1)) for _ in range(n)], "log_ratios": [rng.gauss(3, 1) for _ in range(n)]}
    return [{"beta": beta} | rewards | rates | paired for beta in (.05, .1, .5)]
