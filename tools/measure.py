"""What a policy is worth: its answers at several temperatures, win rates by judge and by truth, and how far it went.

Used by the tools that measure evidence. Answers are compared on a world's test prompts; a temperature is chosen on
others, so that the choice does not flatter the result.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch

from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.core.data import PairDataset, collate
from wikidpo.core.logps import pair_logps, seq_logprob
from wikidpo.core.model import GPT
from wikidpo.core.rlhf import join_rows
from wikidpo.core.stats import tally, wilson
from wikidpo.core.train import micro_batches
from wikidpo.engine.accelerate import ready_to_sample
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.run.evaluate import gen_all
from wikidpo.world.facts import prompts
from wikidpo.world.grounded import tasks
from wikidpo.world.grounded import truth as grade

TEMPERATURES = (0.0, 0.4, 0.7, 1.0)
GOOD = 6  # points by the truth, the filter `best` of mining
TOP_K = 50  # as the profiles sample
ALIKE = 10  # characters: answers that differ by no more are about equally long
FEW = 16  # rows whose log-probabilities are taken at once: a vocabulary of 49,152 makes them large
RETIRED = 0.025  # a pair begins with a weight of one half; below a twentieth of it, it has retired


@dataclass(frozen=True)
class World:
    "The prompts on which policies are compared, those on which a temperature is chosen, and how answers are drawn."
    test: tuple
    choice: tuple
    max_new: int
    batch: int


MINIWIKI = World(tuple(prompts("eval")[:1000]), tuple(prompts("eval")[1000:1500]), 64, 256)
GROUNDED = World(tuple(t.prompt for t in tasks("eval")[:256]), tuple(t.prompt for t in tasks("tune")[:96]), 48, 64)


@dataclass
class Policy:
    "A model and the seed of its answers; what was asked once is kept."
    model: GPT
    tok: object
    seed: int
    world: World = MINIWIKI

    def __post_init__(self):
        self.kept, self.sampler = {}, ready_to_sample(self.model)

    def answers(self, temperature: float, questions: Sequence[str] | None = None) -> list[str]:
        questions = questions or self.world.test
        key = temperature, questions[0]
        if key not in self.kept:
            how = {"temperature": temperature, "max_new": self.world.max_new, "top_k": TOP_K, "seed": self.seed}
            self.kept[key] = [r.text for r in gen_all(self.sampler, self.tok, questions, self.world.batch, **how)]
        return self.kept[key]

    def good(self, temperature: float, questions: Sequence[str] | None = None) -> float:
        "Share of good answers, by the truth."
        questions = questions or self.world.test
        return fmean(x >= GOOD for x in truth(questions, self.answers(temperature, questions)))

    @cached_property
    def best(self) -> float:
        "The temperature with the largest share of good answers where it is chosen."
        return max(TEMPERATURES, key=lambda t: self.good(t, self.world.choice))


def truth(questions: Sequence[str], answers: Sequence[str]) -> list[int]:
    "The points of each answer, by the truth."
    return [grade(q, a).score for q, a in zip(questions, answers, strict=True)]


def rate(wins: int, losses: int) -> dict:
    "A win rate among decided comparisons, with its 95 % interval."
    low, high = wilson(wins, wins + losses)
    share = wins / (wins + losses) if wins + losses else None
    return {"win": wins, "loss": losses, "rate": share, "low": low, "high": high}


def compare(a: Sequence[str], b: Sequence[str], judge: OfflineTeacher, world: World = MINIWIKI) -> dict:
    """Two lists of answers to the test prompts: the win rate of the first by the judge, in both orders, and by the
    truth; and by the judge where the two answers are about equally long."""
    rows = list(zip(world.test, a, b, strict=True))
    verdicts = [tally(judge.verdict(q, x, y), judge.verdict(q, y, x)) for q, x, y in rows]
    alike = [v for v, (_, x, y) in zip(verdicts, rows) if abs(len(x) - len(y)) <= ALIKE]
    signs = [x - y for x, y in zip(truth(world.test, a), truth(world.test, b))]
    return {
        "judge": rate(verdicts.count("a"), verdicts.count("b")),
        "truth": rate(sum(s > 0 for s in signs), sum(s < 0 for s in signs)),
        "equal_length": rate(alike.count("a"), alike.count("b")),
    }


def duel(policy: Policy, sft: Policy, judge: OfflineTeacher) -> dict:
    "DPO against SFT, each at its own best temperature and both at 0.7; shares of good answers and their length."
    return {
        "good": {str(t): policy.good(t) for t in TEMPERATURES},
        "sft_good": {str(t): sft.good(t) for t in TEMPERATURES},
        "best": policy.best,
        "sft_best": sft.best,
        "at_best": compare(policy.answers(policy.best), sft.answers(sft.best), judge, policy.world),
        "at_0.7": compare(policy.answers(0.7), sft.answers(0.7), judge, policy.world),
        "chars": fmean(map(len, policy.answers(0.7))),
        "sft_chars": fmean(map(len, sft.answers(0.7))),
    }


@torch.no_grad()
def drift(policy: GPT, ref: GPT, tok, seed: int, n: int = 256, world: World = MINIWIKI) -> dict:
    """How far a policy went, over one answer to each of n questions, drawn at temperature 1 from the whole vocabulary:
    KL to the reference with its standard error, and entropy, both in nats an answer."""
    how = {"temperature": 1.0, "max_new": world.max_new, "top_k": policy.cfg.vocab_size, "seed": seed}
    own, theirs = [], []
    for at in range(0, n, world.batch):
        asked = world.test[at : min(at + world.batch, n)]
        responses = gen_all(policy, tok, asked, world.batch, **how)
        rows = [r.ids + [end_id(tok)] * r.finished for r in responses]
        ids, mask = join_rows([encode_prompt(tok, q) for q in asked], rows)
        for few in zip(ids.split(FEW), mask.split(FEW)):
            own.append(seq_logprob(policy, *few).double())
            theirs.append(seq_logprob(ref, *few).double())
    own = torch.cat(own)
    ratio = own - torch.cat(theirs)
    return {"kl": ratio.mean().item(), "kl_se": (ratio.std() / n**0.5).item(), "entropy": -own.mean().item()}


@torch.no_grad()
def log_ratios(policy: GPT, ref: GPT, dataset: PairDataset) -> torch.Tensor:
    "log pi - log pi_ref of chosen and rejected of each pair, (pairs, 2) nats."
    found = torch.zeros(len(dataset), 2)
    for pair_ids in micro_batches(dataset, range(len(dataset)), 64):
        batch = collate([dataset[i] for i in pair_ids])
        ours, theirs = pair_logps(policy, batch), pair_logps(ref, batch)
        found[pair_ids] = torch.stack([x - y for x, y in zip(ours, theirs)], 1)
    return found


def on_pairs(policy: GPT, ref: GPT, held_out: PairDataset, beta: float) -> dict:
    "What a policy says of pairs that it was not trained on."
    ratios = log_ratios(policy, ref, held_out)
    z = ratios[:, 0] - ratios[:, 1]
    return {
        "z": z.mean().item(),
        "chosen": ratios[:, 0].mean().item(),
        "rejected": ratios[:, 1].mean().item(),
        "accuracy": (z > 0).float().mean().item(),
        "retired": (torch.sigmoid(-beta * z) < RETIRED).float().mean().item(),
    }
