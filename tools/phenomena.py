"""What the original lesson claims, measured on MiniWiki, one experiment a claim.

    phenomena.py NAME ...      NAME: see EXPERIMENTS; none: all

Every experiment trains some policies a seed, from the profile's settings with a few changes, and measures each against
the SFT model. Writes nbs/results/phenomena/NAME.json; a run in runs/phenomena that is done is kept.
"""
import argparse
import copy
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from evidence import RESULTS, ROOT, configured, write_results
from measure import Policy, drift, duel, on_pairs
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT
from wikidpo.core.pairs import make_pairs
from wikidpo.core.stats import tally
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.accelerate import accelerate
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.models.policy import open_policy
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.run.mine import mine
from wikidpo.run.train import train
from wikidpo.show.doctor import doctor
from wikidpo.world.grade import grade

RUNS = ROOT / "runs" / "phenomena"
HELD_OUT = 128  # pairs of a seed that no policy is trained on

RECIPES = [(lr, beta) for lr in (2e-4, 4e-4) for beta in (0.5, 1.0, 1.25, 2.0)] + [(8e-4, 1.25)]
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TIGHT = {"lr": 2e-4, "epochs": 3}  # long enough for the leash to be felt
SLACK = {"lr": 1e-4}  # the policy stops long before
FLIPPED = (0.15, 0.3)  # shares of pairs with their labels exchanged
TEMPERATURE_SETS = {"0.7 to 1.3": (0.7, 0.9, 1.1, 1.3), "0.7": (0.7,) * 4, "1.0": (1.0,) * 4}
LENGTHS = (1, 4)  # epochs
HOTTER = 3  # times the profile's learning rate
FOND_OF_LENGTH = 15.0  # points for 100 characters


@dataclass
class Lab:
    "What all runs of a seed share."
    seed: int
    folder: Path
    tok: object
    sft: GPT
    answers: Policy  # of the SFT model
    samples: list  # scored responses
    pairs: list  # to train on
    held_out: PairDataset


@cache
def open_lab(seed: int) -> Lab:
    "Mine with the profile's settings, and set some pairs aside."
    folder, policy = RUNS / f"seed{seed}", configured("policy")
    mine(policy, configured("teacher", seed=seed), configured("mine", seed=seed), folder / "mine")
    samples, pairs = (read_jsonl(folder / "mine" / f"{name}.jsonl") for name in ("samples", "pairs"))
    sft, tok = open_policy(policy)
    write_jsonl(folder / "held_out.jsonl", pairs[-HELD_OUT:])
    held_out = PairDataset(folder / "held_out.jsonl", tok, sft.cfg.block_size)
    return Lab(seed, folder, tok, sft, Policy(sft, tok, 100 + seed), samples, pairs[:-HELD_OUT], held_out)


def teacher(seed: int, **habits) -> OfflineTeacher:
    "The profile's judge with other habits."
    return OfflineTeacher(**configured("teacher", seed=seed).habits() | habits)


def run(lab: Lab, name: str, pairs: list, judge: OfflineTeacher | None = None, **changes) -> dict:
    "Train on these pairs with these changes of the profile, and measure: one row of the results."
    out = lab.folder / name
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    cfg = training(lab, name, pairs, **changes)
    trained = train(configured("policy"), cfg, out)
    model, _ = open_policy(configured("policy"), out / "dpo.pt")
    known = {"steps": trained["steps"], "train_accuracy": trained["reward_accuracy"], "illness": doctor(out)[1]}
    return keep(out, {**changes, **known, **measured(lab, name, model, cfg, judge)})


def run_without_reference(lab: Lab, name: str, pairs: list, **changes) -> dict:
    "The same loop with an engine that says 0 where it is asked what the reference says."
    out = lab.folder / name
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    cfg = training(lab, name, pairs, **changes)
    policy, history = train_without_reference(lab.sft, lab.tok, cfg)
    known = {"steps": len(history), "train_accuracy": history[-1]["reward/accuracy"]}
    return keep(out, {**changes, **known, **measured(lab, name, policy, cfg)})


def train_without_reference(sft: GPT, tok, cfg) -> tuple[GPT, list[dict]]:
    "A policy trained by the loop as it is, with an engine that knows no reference; the metrics of its steps."
    policy, engine = copy.deepcopy(sft).requires_grad_(True), accelerate(cfg.precision)
    engine.ref_logps = lambda batch: (torch.zeros(len(batch)), torch.zeros(len(batch)))
    dataset = PairDataset(cfg.pairs, tok, sft.cfg.block_size)
    return policy, train_dpo(policy, freeze(sft), dataset, cfg, engine)


def training(lab: Lab, name: str, pairs: list, **changes):
    "The profile's training with these changes, on these pairs."
    path = lab.folder / f"{name}.jsonl"
    write_jsonl(path, pairs)
    return configured("train", seed=lab.seed, pairs=str(path), valid=0.0, wandb="disabled", **changes)


def measured(lab: Lab, name: str, model: GPT, cfg, judge: OfflineTeacher | None = None) -> dict:
    policy = Policy(model, lab.tok, 200 + lab.seed)
    return {
        "seed": lab.seed,
        "name": name,
        **on_pairs(model, lab.sft, lab.held_out, cfg.beta),
        **drift(model, lab.sft, lab.tok, lab.seed),
        **duel(policy, lab.answers, judge or teacher(lab.seed)),
        "samples": policy.answers(0.7)[:3],
    }


def keep(out: Path, row: dict) -> dict:
    "Write a row down, so that it is not measured again."
    out.mkdir(exist_ok=True)
    write_atomic(out / "row.json", json.dumps(row, indent=1) + "\n")
    return row


def default(lab: Lab) -> list[dict]:
    "1, 3, 4: not only colder; pairs retire; the chosen reward falls in health."
    return [run(lab, "default", lab.pairs)]


def recipe(lab: Lab) -> list[dict]:
    "Where the profile's learning rate and beta come from."
    return [run(lab, f"lr{lr:g} beta{beta:g}", lab.pairs, lr=lr, beta=beta) for lr, beta in RECIPES]


def hot(lab: Lab) -> list[dict]:
    "6: ten times the learning rate."
    return [*default(lab), run(lab, "hot", lab.pairs, lr=10 * configured("train").lr)]


def leash(lab: Lab) -> list[dict]:
    "2 and 4: betas over more than two decades, in a run that is long enough to feel them."
    return [run(lab, f"leash{beta}", lab.pairs, beta=beta, **TIGHT) for beta in BETAS]


def slack(lab: Lab) -> list[dict]:
    "2: the same betas where the run stops before the leash is felt."
    return [run(lab, f"slack{beta}", lab.pairs, beta=beta, **SLACK) for beta in BETAS]


def reference(lab: Lab) -> list[dict]:
    """5: with the reference, without it, and "raise chosen, lower rejected" at its word: over growing lengths of
    training."""
    pairs = lab.pairs[::3]  # so that four epochs take a minute
    at_its_word = {"loss_type": "hinge", "beta": 1e-3}  # a straight line up to z = 1,000 nats
    rows = []
    for epochs in LENGTHS:
        tail = f"crisp {epochs}"
        found = {
            "with": run(lab, f"with {tail}", pairs, epochs=epochs),
            "without": run_without_reference(lab, f"without {tail}", pairs, epochs=epochs),
            "at its word": run_without_reference(lab, f"at its word {tail}", pairs, epochs=epochs, **at_its_word),
        }
        rows += [row | {"method": method} for method, row in found.items()]
    return rows


def regimes(lab: Lab) -> list[dict]:
    "5, where it might be otherwise: a hotter rate, and pairs whose chosen side is the longer one."
    pairs, hotter = lab.pairs[::3], {"lr": HOTTER * configured("train").lr}
    cases = {"hotter": (pairs, hotter), "longer": (longer_chosen(lab)[: len(pairs)], {})}
    rows = []
    for regime, (pairs, changes) in cases.items():
        found = {
            "with": run(lab, f"with {regime}", pairs, **changes),
            "without": run_without_reference(lab, f"without {regime}", pairs, **changes),
        }
        rows += [row | {"method": method, "regime": regime} for method, row in found.items()]
    return rows


def longer_chosen(lab: Lab) -> list:
    "The pairs of a judge who likes length whose chosen answer is the longer one."
    return [p for p in fond_pairs(lab) if len(p["chosen_tokens"]) > len(p["rejected_tokens"])]


def fond_judge(lab: Lab) -> OfflineTeacher:
    return teacher(lab.seed, length_bias=FOND_OF_LENGTH)


def fond_pairs(lab: Lab) -> list:
    "As many pairs, of the same samples, from a judge who likes length."
    judge = fond_judge(lab)
    scored = [s | {"score": judge.score(s["prompt"], s["text"])} for s in lab.samples if s["score"] is not None]
    return make_pairs(scored)[0][:len(lab.pairs)]


def rambler(lab: Lab) -> list[dict]:
    "7: pairs from a judge who likes length, judged by the same one."
    judge = fond_judge(lab)
    return [run(lab, "by a fond judge", lab.pairs, judge), run(lab, "rambler", fond_pairs(lab), judge)]


def temperatures(lab: Lab) -> list[dict]:
    "8: samples at four temperatures against four at one; as many pairs of each."
    found = {name: mined_at(lab, temps) for name, temps in TEMPERATURE_SETS.items()}
    n = min(len(pairs) for pairs, _ in found.values())
    rows = []
    for name, (pairs, survival) in found.items():
        colder = [p["temp_chosen"] < p["temp_rejected"] for p in pairs]
        row = run(lab, f"temperatures {name}", pairs[:n])
        rows.append(row | {"survival": survival, "chosen_colder": sum(colder) / len(colder)})
    return rows


def mined_at(lab: Lab, temps: tuple) -> tuple[list, float]:
    "(pairs, share of the prompts that give one) of a mining at these temperatures."
    if temps == configured("mine").temps:
        return lab.pairs, (len(lab.pairs) + HELD_OUT) / configured("mine").n_prompts
    out = lab.folder / f"mine{temps[0]}"
    cfg = configured("mine", seed=lab.seed, temps=temps)
    counts = mine(configured("policy"), configured("teacher", seed=lab.seed), cfg, out)
    return read_jsonl(out / "pairs.jsonl"), counts["survival"]


def noise(lab: Lab) -> list[dict]:
    "10: labels exchanged, and what cDPO's smoothing brings."
    rows = [row | {"flipped": 0.0, "label_smoothing": 0.0} for row in default(lab)]
    for share in FLIPPED:
        pairs = flip(lab.pairs, share, lab.seed)
        for smoothing in (0.0, share):
            row = run(lab, f"flipped{share} smoothed{smoothing}", pairs, label_smoothing=smoothing)
            rows.append(row | {"flipped": share, "label_smoothing": smoothing})
    return rows


def flip(pairs: list, share: float, seed: int) -> list:
    "The pairs with chosen and rejected exchanged in this share of them."
    wrong = set(random.Random(seed).sample(range(len(pairs)), int(share * len(pairs))))
    return [exchanged(p) if i in wrong else p for i, p in enumerate(pairs)]


def exchanged(pair: dict) -> dict:
    "The pair with its two sides exchanged."
    other = {"chosen": "rejected", "rejected": "chosen"}
    names = {k: k.replace(side, other[side]) for k in pair for side in other if side in k}
    return {names.get(k, k): v for k, v in pair.items()}


def confirm(lab: Lab) -> list[dict]:
    "11: pairs that a comparison in both orders confirms, against as many at random, with and without planted errors."
    rows = []
    for share in (0.0, *FLIPPED):
        pairs = flip(lab.pairs, share, lab.seed)
        results = [compared(p, teacher(lab.seed)) for p in pairs]
        kept = [p for p, result in zip(pairs, results) if result == "a"]
        dice = random.Random(lab.seed + int(1000 * share))  # other ones than those that chose what to exchange
        arms = {"all": pairs, "confirmed": kept, "random": dice.sample(pairs, len(kept))}
        known = {"flipped": share, "tied": results.count("tie"), "reversed": results.count("b")}
        for arm, those in arms.items():
            row = planted(lab, share) if arm == "all" else run(lab, f"{arm} flipped{share}", those)
            rows.append(row | {"arm": arm, **known, **state(those)})
    return rows


def planted(lab: Lab, share: float) -> dict:
    "All pairs with this share of them exchanged: a row of `noise`."
    if not share:
        return run(lab, "default", lab.pairs)
    return run(lab, f"flipped{share} smoothed0.0", flip(lab.pairs, share, lab.seed), label_smoothing=0.0)


def compared(pair: dict, judge: OfflineTeacher) -> str:
    "What a comparison in both orders says: a for chosen, b for rejected, or tie."
    asked, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    return tally(judge.verdict(asked, chosen, rejected), judge.verdict(asked, rejected, chosen))


def state(pairs: list) -> dict:
    "How many pairs there are, and in which share of them the truth prefers the rejected answer, or neither."
    gaps = [grade(p["prompt"], p["chosen"]).score - grade(p["prompt"], p["rejected"]).score for p in pairs]
    wrong, equal = sum(g < 0 for g in gaps), gaps.count(0)
    return {"pairs": len(pairs), "wrong": wrong / len(pairs), "equal": equal / len(pairs)}


CLAIMS = (recipe, default, hot, leash, slack, reference, regimes, rambler, temperatures, noise, confirm)
EXPERIMENTS = {f.__name__: f for f in CLAIMS}
SEEDS = {"default": 5, "hot": 5}  # three for the others, which take minutes a seed


def figure(rows: list[dict]) -> None:
    "Write images/temperatures.svg: no temperature gives what DPO gives."
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wikidpo"
    fig = Figure(figsize=(7, 3))
    ax = fig.subplots()
    for key, colour, name in (("good", "#0072B2", "DPO"), ("sft_good", "#D55E00", "SFT")):
        for row in rows:
            shown = {"label": name} if row is rows[0] else {}
            ax.plot([float(t) for t in row[key]], row[key].values(), "o-", color=colour, ms=4, lw=1.2, **shown)
    ax.set(ylim=(0, 1), xlabel="temperature", ylabel="share of good answers")
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "temperatures.svg", metadata={"Date": None})


def line(row: dict) -> str:
    "A row for the terminal."
    def rate(where, by):
        r = row[where][by]
        return "-" if r["rate"] is None else f"{r['rate']:.1%} ({r['low']:.1%} to {r['high']:.1%})"

    moved = f"z {row['z']:6.1f} chosen {row['chosen']:+6.2f} KL {row['kl']:5.2f} retired {row['retired']:4.0%}"
    best = f"T {row['best']:g} against {row['sft_best']:g}: judge {rate('at_best', 'judge')}"
    at7 = f"0.7: judge {rate('at_0.7', 'judge')} truth {rate('at_0.7', 'truth')}"
    words = f"accuracy {row['train_accuracy']:.2f} / {row['accuracy']:.2f}; good at 0 {row['good']['0.0']:.0%}"
    return f"{row['seed']} {row['name']:24} {moved}; {words}; {best} truth {rate('at_best', 'truth')}; {at7}"


def experiment(name: str) -> None:
    "Run an experiment and write its results, anew after each seed."
    found = []
    for seed in range(SEEDS.get(name, 3)):
        for row in EXPERIMENTS[name](open_lab(seed)):
            found.append(row)
            print(f"{name:12} {line(row)}", flush=True)
        write_results(f"phenomena/{name}", found)
    if name == "default":
        figure(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], metavar="NAME")
    (RESULTS / "phenomena").mkdir(exist_ok=True)
    for name in parser.parse_args().names or EXPERIMENTS:
        experiment(name)


if __name__ == "__main__":
    main()
