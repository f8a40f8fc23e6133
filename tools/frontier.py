"""Win rate against KL while a policy trains, for three betas and five seeds: the frontier of lesson 09.

    make evidence-frontier       or: frontier.py 5, to add a seed to those that are written down

Each run trains four epochs on 256 of the shipped pairs at twice the profile's learning rate, so that it goes far, and
looks at itself every 8 of its 64 steps on 256 prompts: KL to the reference, perplexity of MiniWiki's text, win rate
against SFT by the profile's judge; and on 64 held-out pairs. A minute or so a run on one core. Writes
nbs/results/frontier.json: a row a look, and what the looks of each run took. A run in runs/frontier that is done is
kept.
"""
import json
import sys

from evidence import PROFILE, RESULTS, ROOT, configured, write_results
from wikidpo.core.files import read_jsonl
from wikidpo.run.folder import write_jsonl
from wikidpo.run.train import train
from wikidpo.world.facts import DATA

RUNS = ROOT / "runs" / "frontier"
BETAS = (0.03, 0.3, 3.0)
SEEDS = (0, 1, 2, 3, 4)
PAIRS, HELD_OUT = 320, 64
FAR = {"lr": 8e-4, "epochs": 4, "warmup_steps": 5, "valid": HELD_OUT / PAIRS}
LOOKS = {"eval_every": 8, "eval_n": 256, "eval_judge": True, "eval_prompts": PROFILE["judge"]["prompts"]}
SEEN = ("kl", "kl_se", "perplexity", "win_rate", "win_low", "win_high", "decided")
MEASURED = ("valid/loss", "valid/accuracy")  # on the held-out pairs


def looks_of(folder, beta: float, seed: int) -> list[dict]:
    "What every look of a run saw, the start among them."
    of_steps = {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    rows = []
    for row in read_jsonl(folder / "looks.jsonl"):
        measured = of_steps.get(row["step"], {})
        numbers = {name: row["seen"][name] for name in SEEN if name in row["seen"]}
        numbers |= {name.replace("/", "_"): measured[name] for name in MEASURED if name in measured}
        rounded = {name: round(value, 4) for name, value in numbers.items()}
        rows.append({"beta": beta, "seed": seed, "step": row["step"], **rounded})
    return rows


def run(beta: float, seed: int) -> tuple[list[dict], dict]:
    "Train and look; (a row a look, what it took)."
    folder = RUNS / f"beta{beta:g}_seed{seed}"
    pairs = RUNS / "pairs.jsonl"
    write_jsonl(pairs, read_jsonl(DATA / "pairs.jsonl")[:PAIRS])
    changes = {"beta": beta, "seed": seed, "pairs": str(pairs), "wandb": "disabled", "watch": 0}
    cfg = configured("train", **changes, **FAR, **LOOKS)
    done = train(configured("policy"), cfg, folder, teacher=configured("teacher", seed=seed))
    spent = sum(row["seen"].get("seconds", 0.0) for row in read_jsonl(folder / "looks.jsonl"))
    took = {"beta": beta, "seed": seed, "seconds": done["seconds"], "looking": round(spent, 1)}
    return looks_of(folder, beta, seed), took


def others(seeds: list[int]) -> tuple[list[dict], list[dict]]:
    "What is written down of other seeds: (looks, what they took)."
    known = json.loads((RESULTS / "frontier.json").read_text())
    def kept(rows): return [row for row in rows if row["seed"] not in seeds]
    return kept(known["looks"]), kept(known["took"])


def main(seeds: list[int]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    rows, took = others(seeds) if seeds else ([], [])
    for seed in seeds or SEEDS:
        for beta in BETAS:
            looks, seconds = run(beta, seed)
            rows, took = rows + looks, [*took, seconds]
            print(json.dumps(seconds), json.dumps(looks[-1]), flush=True)
            write_results("frontier", {"looks": rows, "took": took})


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
