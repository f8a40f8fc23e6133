"""What makes a good pair? Measured for lesson 05, all else being equal: which responses stand on the chosen side, and where the two filters stand.

    pairs_study.py [FOLDER]     writes nbs/results/pairs_study.json; runs in FOLDER (runs/pairs_study) that are done are kept

One mining a seed (the profile's). Then policies trained with the profile's settings on
- own: pairs of the model's own answers, gap 2 and best 6, the lesson's filters
- teacher: the same prompts and rejected answers, but the chosen one is the teacher's text, a correct answer in words that the policy was never trained to say
- filters: pairs by other filters from the same samples
each on the same number of pairs, and each compared with the SFT policy on the same prompts. `make evidence-pairs`."""
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

from wikidpo.files import read_jsonl, write_atomic, write_jsonl
from wikidpo.miniwiki import find_fact
from wikidpo.pairs import MineConfig, make_pairs, mine
from wikidpo.profiles import load_profile, section
from wikidpo.sampling import PolicyConfig
from wikidpo.teacher import TeacherConfig
from wikidpo.training import TrainConfig, train
from wikidpo.winrate import EvaluateConfig, evaluate

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "pairs_study.json"
SEEDS = range(3)
FILTERS = {"own": (2, 6), "best >= 1": (2, 1), "gap >= 1, best >= 1": (1, 1), "gap >= 7": (7, 6)}
PHRASES = ("It is {v}.", "The answer to this question is {v}.", "According to the sources, that would be {v}.", "You are looking for {v}.")
PHRASING = re.compile("|".join(re.escape(p).replace(r"\{v\}", ".+") for p in PHRASES))


def teacher_text(prompt):
    "A correct answer as another author would write it"
    return random.Random(prompt).choice(PHRASES).format(v=find_fact(prompt).value)


def off_policy(pairs):
    "The same prompts and rejected answers, the chosen side written by the teacher"
    return [{k: v for k, v in p.items() if k not in ("chosen_tokens", "chosen_finished")} | {"chosen": teacher_text(p["prompt"])} for p in pairs]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pairs_study")
profile = load_profile("miniwiki")
policy, teacher, mining, training, judging = (section(c, n, profile[n]) for c, n in ((PolicyConfig, "policy"), (TeacherConfig, "teacher"), (MineConfig, "mine"), (TrainConfig, "train"), (EvaluateConfig, "judge")))
results = []
for seed in SEEDS:
    judge = replace(teacher, seed=seed)
    mine(policy, judge, replace(mining, seed=seed), folder / f"seed{seed}" / "mine")
    samples = read_jsonl(folder / f"seed{seed}" / "mine" / "samples.jsonl")
    found = {name: make_pairs(samples, *limits)[0] for name, limits in FILTERS.items()}
    found["teacher"] = off_policy(found["own"])
    n = min(map(len, found.values()))
    for name, pairs in found.items():
        out = folder / f"seed{seed}" / name.replace(" ", "").replace(">=", "")
        path = folder / f"seed{seed}" / f"{out.name}.jsonl"
        write_jsonl(path, random.Random(seed).sample(pairs, n))
        t = train(policy, replace(training, seed=seed, pairs=str(path), wandb="disabled"), out)
        j = evaluate(policy, judge, replace(judging, seed=seed), out)
        answers = [r["a"] for r in read_jsonl(out / "verdicts.jsonl")]
        copied = [bool(PHRASING.fullmatch(a)) for a in answers]
        right = [r["truth_a"] >= 6 for r, c in zip(read_jsonl(out / "verdicts.jsonl"), copied) if c]
        results.append({"seed": seed, "pairs": name, "of": len(pairs), "trained_on": n, "margin": t["reward_margin"], "accuracy": t["reward_accuracy"], "chosen": t["reward_chosen"], "teacher_phrasing": sum(copied) / len(copied), "phrased_right": sum(right) / len(right) if right else None,
                        **{k: j[k] for k in ("n", "win", "tie", "loss", "decided_win_rate", "ci_low", "ci_high", "truth_win_rate", "chars_a", "chars_b")}})
        print(f"seed {seed}  {name:20} {n} of {len(pairs):,} pairs: win rate {j['decided_win_rate']:.1%} ({j['ci_low']:.1%} to {j['ci_high']:.1%}), by the truth {j['truth_win_rate']:.1%}; margin {t['reward_margin']:.2f}, accuracy {t['reward_accuracy']:.2f}", flush=True)
write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
