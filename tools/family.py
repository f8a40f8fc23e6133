"""The losses of lesson 14, each trained on the same MiniWiki pairs, at a rate and a beta of its own.

    family.py tune [NAME ...]      try each method's settings on a seed of their own: nbs/results/family/tuning.json
    family.py train [NAME ...]     the best of them with three seeds: nbs/results/family/family.json
    family.py rounds               DPO in one round, in two, and in a longer one: nbs/results/family/rounds.json

NAME: see METHODS; none: all. Every run takes a third of a seed's pairs, 28 steps, and lasts about fifteen seconds on
a free core; one in runs/phenomena that is done is kept.
"""
import argparse
import copy
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

from evidence import RESULTS, configured, write_results
from measure import Policy, compare, drift, on_pairs
from phenomena import RUNS, Lab, keep, open_lab, teacher, training
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.core.kto import train_kto, unpaired
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.accelerate import accelerate
from wikidpo.models.adopt import save_policy
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.run.mine import mine

SEEDS = 0, 1, 2
TUNED_ON = 7  # a seed that no result is taken from
RATES = 4e-4, 8e-4
SHARE = 3  # every third pair
NEW_PROMPTS = 1024  # that a second round is mined from
TEMPERATURE = 0.7  # of the answers that are compared
KNOBS = "lr", "beta", "label_smoothing", "gamma", "sft_weight"

# With a beta of 1.25 a pair of DPO's has let go at 2.9 nats. The others' is the one that asks for about as much: their
# losses rest, or fall flat, there. An answer has 22 tokens: a margin a token has a beta that is 22 times as large. Of
# SimPO and ORPO, which measure no distance from a reference, two are tried.
METHODS = {
    "dpo": [{"beta": 1.25}],
    "cdpo": [{"beta": 1.25, "label_smoothing": 0.05}],
    "robust": [{"beta": 1.25, "label_smoothing": 0.05}],
    "ipo": [{"beta": 0.17}],
    "hinge": [{"beta": 0.35}],
    "dpo_norm": [{"beta": 27.0}],
    "ipo_norm": [{"beta": 3.8}],
    "simpo": [{"beta": 10.0, "gamma": 5.0}, {"beta": 3.0, "gamma": 1.5}],
    "orpo": [{"beta": 3.0}, {"beta": 0.3}],
    "dpo+sft": [{"beta": 1.25, "sft_weight": 3.0}],
    "apo_zero": [{"beta": 1.25}],
    "apo_down": [{"beta": 1.25}],
    "kto": [{"beta": 1.25}],
}
TUNED_AS = {"cdpo": "dpo", "robust": "dpo", "dpo+sft": "dpo", "ipo_norm": "ipo"}  # their rate is that of the other
LOSS_OF = {"cdpo": "dpo", "dpo+sft": "dpo", "kto": "dpo"}  # of a method that is no loss_type


def settings(method: str) -> list[dict]:
    "The settings that are tried for a method."
    return [{"lr": lr, **changes} for changes, lr in product(METHODS[method], RATES)]


def folder_of(method: str, changes: dict) -> str:
    return "family " + method + "".join(f" {k}{v:g}" for k, v in changes.items())


def run(lab: Lab, method: str, changes: dict, measure) -> dict:
    "Train a method with these settings, and measure: one row of the results."
    name = folder_of(method, changes)
    out = lab.folder / name
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    start = time.perf_counter()
    pairs = lab.pairs[::SHARE]
    cfg = training(lab, name, pairs, loss_type=LOSS_OF.get(method, method), **changes)
    policy, history = trained(lab, method, cfg)
    row = {"method": method, "seed": lab.seed, **changes, "pairs": len(pairs), "steps": len(history)}
    return keep(out, {**row, **measure(lab, policy, cfg), "seconds": round(time.perf_counter() - start, 1)})


def trained(lab: Lab, method: str, cfg) -> tuple:
    "A copy of the SFT model after training, and the metrics of its steps."
    policy = copy.deepcopy(lab.sft).requires_grad_(True)
    dataset = PairDataset(cfg.pairs, lab.tok, lab.sft.cfg.block_size)
    if method != "kto":
        return policy, train_dpo(policy, freeze(lab.sft), dataset, cfg, accelerate(cfg.precision))
    cfg.batch_size *= 2  # answers: as many as in a step of pairs
    answers = unpaired(dataset)
    return policy, train_kto(policy, freeze(lab.sft), answers, cfg, engine=accelerate(cfg.precision))


def tried(lab: Lab, model, cfg) -> dict:
    "Held-out pairs, and good answers to the questions that nothing else is measured on."
    policy = Policy(model, lab.tok, 200 + lab.seed)
    return {**on_pairs(model, lab.sft, lab.held_out, cfg.beta), "good": policy.good(TEMPERATURE, policy.world.choice)}


def measured(lab: Lab, model, cfg) -> dict:
    "Held-out pairs, distance, length, and win rates against the SFT model."
    policy = Policy(model, lab.tok, 200 + lab.seed)
    answers, theirs = policy.answers(TEMPERATURE), lab.answers.answers(TEMPERATURE)
    return {
        **on_pairs(model, lab.sft, lab.held_out, cfg.beta),
        **drift(model, lab.sft, lab.tok, lab.seed),
        **compare(answers, theirs, teacher(lab.seed)),
        "good": policy.good(TEMPERATURE),
        "sft_good": lab.answers.good(TEMPERATURE),
        "chars": fmean(map(len, answers)),
        "sft_chars": fmean(map(len, theirs)),
    }


def line(row: dict) -> str:
    "A row for the terminal."
    at = " ".join(f"{k} {row[k]:g}" for k in KNOBS if k in row)
    found = f"z {row['z']:5.1f} chosen {row['chosen']:+6.2f} good {row['good']:.0%}"
    if "kl" in row:
        judge, truth = (f"{row[by]['rate']:.1%}" for by in ("judge", "truth"))
        found += f" KL {row['kl']:5.2f} chars {row['chars']:5.1f} judge {judge} truth {truth}"
    return f"{row['seed']} {row['method']:9} {at:32} {found} {row['seconds']:.0f} s"


def tune(methods: list[str]) -> None:
    "Each setting of each method, on the seed that is kept for it."
    lab = open_lab(TUNED_ON)
    for method in methods:
        for changes in settings(method):
            print(line(run(lab, method, changes, tried)), flush=True)
        gather("tuning", [TUNED_ON], [folder_of(m, changes) for m in METHODS for changes in settings(m)])


def chosen(method: str) -> dict:
    "The settings of a method with the most good answers where they were tried."
    if method in TUNED_AS:
        return {"lr": chosen(TUNED_AS[method])["lr"], **METHODS[method][0]}
    rows = json.loads((RESULTS / "family" / "tuning.json").read_text())
    best = max((r for r in rows if r["method"] == method), key=lambda r: r["good"])
    return {k: best[k] for k in KNOBS if k in best}


def train_all(methods: list[str]) -> None:
    "Each method at its best settings, with every seed."
    for seed in SEEDS:
        lab = open_lab(seed)
        for method in methods:
            print(line(run(lab, method, chosen(method), measured)), flush=True)
        gather("family", SEEDS, [folder_of(m, chosen(m)) for m in METHODS])


def gather(name: str, seeds: Sequence[int], folders: list[str]) -> None:
    "Write down what there is of these seeds and folders; rows of settings that have been given up stay out."
    paths = [RUNS / f"seed{seed}" / folder / "row.json" for folder in folders for seed in seeds]
    write_results(f"family/{name}", [json.loads(path.read_text()) for path in paths if path.exists()])


def rounds() -> None:
    "One round, a longer one, and a second one on pairs of the trained policy, held to the first reference or the new."
    found = []
    for seed in SEEDS:
        for row in rounds_of(open_lab(seed)):
            found.append(row)
            print(row["name"], row["reference"], line(row | {"method": row["name"]}), flush=True)
        write_results("family/rounds", found)


def rounds_of(lab: Lab) -> list[dict]:
    "The four policies of a seed, measured."
    out = lab.folder / "rounds"
    if (out / "rows.json").exists():
        return json.loads((out / "rows.json").read_text())
    part, cfg = lab.pairs[::SHARE], chosen("dpo")
    first = one_round(lab, "first", lab.sft, lab.sft, part, cfg)
    mined = mine_again(lab, out, first)
    again = mined["pairs"][: len(part)]
    policies = {
        ("one round", "the SFT model", len(part)): first,
        ("one longer round", "the SFT model", 2 * len(part)):
            one_round(lab, "longer", lab.sft, lab.sft, [*part, *lab.pairs[1::SHARE]][: 2 * len(part)], cfg),
        ("two rounds", "the SFT model", len(part) + len(again)):
            one_round(lab, "second", first, lab.sft, again, cfg),
        ("two rounds", "the policy of round one", len(part) + len(again)):
            one_round(lab, "second", first, first, again, cfg),
    }
    rows = []
    for (name, reference, pairs), policy in policies.items():
        start = time.perf_counter()
        known = {"name": name, "reference": reference, "seed": lab.seed, **cfg, "pairs": pairs, "yield": mined["yield"]}
        row = {**known, **measured(lab, policy, training(lab, "rounds", part, **cfg))}
        rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
    write_atomic(out / "rows.json", json.dumps(rows, indent=1) + "\n")
    return rows


def one_round(lab: Lab, name: str, policy, reference, pairs: list, changes: dict):
    "The policy that DPO makes of a copy of this one."
    cfg = training(lab, f"rounds {name}", pairs, **changes)
    dataset, policy = PairDataset(cfg.pairs, lab.tok, lab.sft.cfg.block_size), copy.deepcopy(policy)
    train_dpo(policy.requires_grad_(True), freeze(reference), dataset, cfg, accelerate(cfg.precision))
    return policy


def mine_again(lab: Lab, out: Path, policy) -> dict:
    "Pairs of the trained policy, on prompts that the first round did not have, and the share of prompts that give one."
    out.mkdir(exist_ok=True)
    save_policy(out / "first.safetensors", policy)
    used = configured("mine").n_prompts
    prompts = read_jsonl(configured("mine").prompts)[used : used + NEW_PROMPTS]
    write_jsonl(out / "prompts.jsonl", prompts)
    cfg = configured("mine", seed=lab.seed, prompts=str(out / "prompts.jsonl"), n_prompts=len(prompts))
    model = configured("policy", checkpoint=str(out / "first.safetensors"))
    mine(model, configured("teacher", seed=lab.seed), cfg, out / "mine")
    pairs = read_jsonl(out / "mine" / "pairs.jsonl")
    return {"pairs": pairs, "yield": len(pairs) / len(prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tune", "train", "rounds"])
    parser.add_argument("names", nargs="*", choices=[*METHODS, []], metavar="NAME")
    asked = parser.parse_args()
    (RESULTS / "family").mkdir(exist_ok=True)
    if asked.what == "rounds":
        return rounds()
    names = asked.names or list(METHODS)
    if asked.what == "train":
        return train_all(names)
    tune([name for name in names if name not in TUNED_AS])


if __name__ == "__main__":
    main()
