"""What makes a good pair? Measured for lesson 05: who writes the chosen side, and where the filters stand.

    pairs_study.py [FOLDER]

Writes nbs/results/pairs_study.json; runs in FOLDER (runs/pairs_study) that are done are kept.

One mining a seed (the profile's). Then, all else being equal, policies trained with the profile's settings on
- own: pairs of the model's own answers, gap 2 and best 6, the lesson's filters
- teacher: the same prompts and rejected answers, but the chosen one is the teacher's text, a correct answer in words
  that the policy was never trained to say
- filters: pairs by other filters from the same samples
each on the same number of pairs, and each compared with the SFT policy on the same prompts. `make evidence-pairs`.
"""
import random
import re
import sys
from pathlib import Path

from evidence import JUDGED, configured, win_rate, write_results
from wikidpo.core.files import read_jsonl
from wikidpo.core.pairs import make_pairs
from wikidpo.run.evaluate import evaluate
from wikidpo.run.folder import write_jsonl
from wikidpo.run.mine import mine
from wikidpo.run.train import train
from wikidpo.world.facts import find_fact

SEEDS = range(3)
FILTERS = {"own": (2, 6), "best >= 1": (2, 1), "gap >= 1, best >= 1": (1, 1), "gap >= 7": (7, 6)}
PHRASES = (
    "It is {v}.",
    "The answer to this question is {v}.",
    "According to the sources, that would be {v}.",
    "You are looking for {v}.",
)
PHRASING = re.compile("|".join(re.escape(p).replace(r"\{v\}", ".+") for p in PHRASES))


def teacher_text(prompt: str) -> str:
    "A correct answer as another author would write it."
    return random.Random(prompt).choice(PHRASES).format(v=find_fact(prompt).value)


def off_policy(pair: dict) -> dict:
    "The same prompt and rejected answer, the chosen side written by the teacher."
    kept = {k: v for k, v in pair.items() if k not in ("chosen_tokens", "chosen_finished")}
    return kept | {"chosen": teacher_text(pair["prompt"])}


def phrasing(verdicts: list[dict]) -> dict:
    "How many answers are in the teacher's words, and how many of these are right."
    copied = [r for r in verdicts if PHRASING.fullmatch(r["a"])]
    right = sum(r["truth_a"] >= 6 for r in copied)
    return {
        "teacher_phrasing": len(copied) / len(verdicts),
        "phrased_right": right / len(copied) if copied else None,
    }


def measure(seed: int, name: str, pairs: list[dict], n: int, folder: Path) -> dict:
    "Train on n of these pairs and compare with the SFT policy: one row of the results."
    out = folder / name.replace(" ", "").replace(">=", "")
    path = folder / f"{out.name}.jsonl"
    write_jsonl(path, random.Random(seed).sample(pairs, n))
    policy = configured("policy")
    trained = train(policy, configured("train", seed=seed, pairs=str(path), wandb="disabled"), out)
    judged = evaluate(policy, configured("teacher", seed=seed), configured("judge", seed=seed), out)
    return {
        "seed": seed,
        "pairs": name,
        "of": len(pairs),
        "trained_on": n,
        "margin": trained["reward_margin"],
        "accuracy": trained["valid_accuracy"],  # of pairs that were held out; the last steps have too few
        "chosen": trained["reward_chosen"],
        **phrasing(read_jsonl(out / "verdicts.jsonl")),
        **{k: judged[k] for k in (*JUDGED, "chars_a", "chars_b")},
    }


def line(row: dict) -> str:
    "A row of the results, for the terminal."
    counts = f"seed {row['seed']}  {row['pairs']:20} {row['trained_on']} of {row['of']:,} pairs"
    trained = f"margin {row['margin']:.2f}, accuracy {row['accuracy']:.2f}"
    return f"{counts}: win rate {win_rate(row)}, by the truth {row['truth_win_rate']:.1%}; {trained}"


def main(folder: Path) -> None:
    results = []
    for seed in SEEDS:
        ours, teacher = folder / f"seed{seed}", configured("teacher", seed=seed)
        mine(configured("policy"), teacher, configured("mine", seed=seed), ours / "mine")
        samples = read_jsonl(ours / "mine" / "samples.jsonl")
        found = {name: make_pairs(samples, *limits)[0] for name, limits in FILTERS.items()}
        found["teacher"] = [off_policy(p) for p in found["own"]]
        n = min(map(len, found.values()))
        for name, pairs in found.items():
            results.append(measure(seed, name, pairs, n, ours))
            print(line(results[-1]), flush=True)
        write_results("pairs_study", results)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pairs_study"))
