"""Do the intervals of a comparison hold what they promise? Simulated judges whose true preference is known.

    winrate_coverage.py                        all judges, 1,000 experiments each: nbs/results/winrate_coverage.json
    winrate_coverage.py --experiments 100 --out /tmp/x.json

A prompt has a difference in quality and one in length; the judge sees their sum, a habit of place and noise of its own
at each of its two verdicts, and says TIE where that is small. What is true of it is computed from two million prompts,
its taste at equal length with the length difference set to 0.
"""
import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from wikidpo.run.winrate import paired, win_rates

OUT = Path(__file__).resolve().parent.parent/"nbs/results/winrate_coverage.json"
RATES = ("win_rate", "net", "first_place", "equal_length")
LEVEL = .05  # of what the report calls better


@dataclass(frozen=True)
class Judge:
    "A simulated judge and what it compares"

    prompts: int = 200
    lead: float = 0.  # of model a in quality, where the spread over prompts is 1
    taste: float = 0.  # for length
    longer: float = 0.  # characters by which a's answers are longer on average, with a spread of 40
    habit: float = .5  # of naming the first place
    band: float = .5  # of what it calls a tie

    def quality(self, rng, n):
        "Differences in quality and in characters, (n,) each"
        return rng.normal(self.lead, 1, n), np.rint(rng.normal(self.longer, 40, n))

    def verdicts(self, rng, quality, chars):
        "'A', 'B' and 'TIE' as 1, -1 and 0, with a shown first and with a shown second, (n,) each"
        pull = quality + self.taste * np.tanh(chars / 40)
        first = pull + self.habit + rng.logistic(size=len(pull))
        second = -pull + self.habit + rng.logistic(size=len(pull))
        return [np.where(abs(u) < self.band, 0, np.sign(u)).astype(int) for u in (first, second)]


JUDGES = {
    "no difference": Judge(),
    "a small lead": Judge(lead=.3),
    "a large lead": Judge(lead=1.5, prompts=150),
    "a taste for length": Judge(lead=.3, taste=1., longer=20.),
    "a taste for length, and only that": Judge(taste=1., longer=30.),
}


def words(verdicts):
    return [{1: "A", 0: "TIE", -1: "B"}[v] for v in verdicts.tolist()]


def truth(judge, prompts=2_000_000):
    "What the numbers of `win_rates` are with so many prompts that chance has no say"
    rng = np.random.default_rng(12345)
    quality, chars = judge.quality(rng, prompts)
    first, second = judge.verdicts(rng, quality, chars)
    win, loss = ((first == 1) & (second == -1)).mean(), ((first == -1) & (second == 1)).mean()
    named, won = (first != 0).sum() + (second != 0).sum(), (first == 1).sum() + (second == 1).sum()
    even = judge.verdicts(rng, quality, 0 * chars)
    true = {"win_rate": (1 + win - loss) / 2, "net": win - loss, "decided_win_rate": win / (win + loss),
            "first_place": won / named, "equal_length": (2 + even[0].mean() - even[1].mean()) / 4}
    return {k: round(float(v), 4) for k, v in true.items()}


def intervals(found):
    "The intervals of one experiment"
    return {k: (found[f"{k}_low"], found[f"{k}_high"]) for k in RATES} | {
        "decided_win_rate": (found["ci_low"], found["ci_high"])}


def coverage(judge, experiments, seed=0):
    "The share of experiments in which each interval holds the truth, and in which the sign test says better or worse"
    true, held, rng = truth(judge), Counter(), np.random.default_rng(seed)
    for _ in range(experiments):
        quality, chars = judge.quality(rng, judge.prompts)
        found = win_rates(*map(words, judge.verdicts(rng, quality, chars)), chars)
        held.update({k: int(low <= true[k] <= high) for k, (low, high) in intervals(found).items()})
        held["better or worse"] += int(found["sign_p"] <= LEVEL)
    return {k: n / experiments for k, n in held.items()}


def results(judge, rng, quality):
    "'a', 'tie' and 'b' of one challenger on prompts of this quality"
    first, second = judge.verdicts(rng, quality, np.zeros(len(quality)))
    return np.where(first * second == -1, np.where(first == 1, "a", "b"), "tie").tolist()


def paired_coverage(lead, experiments, prompts=200, seed=0):
    "The same of two challengers on the same prompts, of which the first has so large a lead"
    judge, rng = Judge(), np.random.default_rng(seed)

    def compare(n):
        quality, _ = judge.quality(rng, n)
        own = rng.normal(0, .5, (2, n))  # what is not common to both challengers
        return results(judge, rng, quality + own[0] + lead), results(judge, rng, quality + own[1])

    points = {"a": 1, "tie": .5, "b": 0}
    one, two = compare(1_000_000)
    true = (sum(map(points.get, one)) - sum(map(points.get, two))) / len(one) if lead else 0.
    held = Counter()
    for _ in range(experiments):
        found = paired(*compare(prompts))
        held["difference"] += int(found["low"] <= true <= found["high"])
        held["better or worse"] += int(found["p"] <= LEVEL)
    return {k: n / experiments for k, n in held.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--experiments", type=int, default=1000)
    p.add_argument("--out", type=Path, default=OUT)
    args = p.parse_args()
    judges = {name: {"judge": asdict(judge), "truth": truth(judge), "held": coverage(judge, args.experiments)}
              for name, judge in JUDGES.items()}
    pairs = {f"a lead of {lead}": paired_coverage(lead, args.experiments) for lead in (0., .3)}
    found = {"experiments": args.experiments, "judges": judges, "paired": pairs}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__": main()
