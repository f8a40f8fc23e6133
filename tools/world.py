"""MiniWiki rebuilt, as it ships: wikidpo/data/miniwiki.

    world.py model      tokenizer, policy and prompts, by the recipe of the profile (about six minutes on two cores)
    world.py pairs      pairs.jsonl: the profile's mining, with that policy (half a minute)
    world.py margins    margins.npy: what the default run makes of pairs that it has not seen (a minute)

`make world` runs all three, in this order. Each is made from what the one before it wrote.
"""
import shutil
import sys
import tempfile
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import numpy as np

from evidence import PROFILE, configured
from measure import log_ratios
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.models.policy import open_policy
from wikidpo.run.folder import write_jsonl
from wikidpo.run.mine import mine
from wikidpo.run.profiles import section
from wikidpo.run.train import train
from wikidpo.world.config import SftConfig
from wikidpo.world.facts import DATA
from wikidpo.world.sft import sft

WANTED = 10_000  # margins


def model(folder: Path) -> None:
    "The shipped policy, its tokenizer, and the prompts."
    print(sft(section(SftConfig, "sft", PROFILE["sft"]), DATA))


def pairs(folder: Path) -> None:
    "The shipped pairs: one mining with the profile's settings."
    print(mine(configured("policy"), configured("teacher"), configured("mine"), folder))
    shutil.copy(folder / "pairs.jsonl", DATA / "pairs.jsonl")


def margins(folder: Path) -> None:
    """The margins that the beta slider of lesson 02 shows: those of WANTED pairs of answers that the default policy has
    not seen, each two answers to one question that the filters of mining would tell apart."""
    policy, cfg = configured("policy"), configured("mine", seed=1, n_prompts=4096)
    train(policy, configured("train", pairs=str(DATA / "pairs.jsonl"), wandb="disabled"), folder)
    mine(policy, configured("teacher"), cfg, folder / "new")
    samples = [s for s in read_jsonl(folder / "new" / "samples.jsonl") if s["score"] is not None]
    write_jsonl(folder / "all.jsonl", every_pair(samples, cfg)[:WANTED])
    (dpo, tok), (ref, _) = open_policy(policy, folder / "dpo.pt"), open_policy(policy)
    ratios = log_ratios(dpo, ref, PairDataset(folder / "all.jsonl", tok, ref.cfg.block_size))
    z = (ratios[:, 0] - ratios[:, 1]).numpy()
    np.save(DATA / "margins.npy", z.astype(np.float16))
    print(f"{len(z)} margins, mean {z.mean():.2f}, from {z.min():.1f} to {z.max():.1f} nats")


def every_pair(samples: list[dict], cfg) -> list[dict]:
    "Every two answers to one question whose scores pass both filters of mining."
    groups: dict[int, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt_id"], []).append(sample)
    twos = [sorted(two, key=itemgetter("score")) for group in groups.values() for two in combinations(group, 2)]
    return [pair(better, worse) for worse, better in twos if passes(better, worse, cfg)]


def passes(better: dict, worse: dict, cfg) -> bool:
    gap = better["score"] - worse["score"]
    return gap >= cfg.gap and better["score"] >= cfg.best and better["text"] != worse["text"]


def pair(better: dict, worse: dict) -> dict:
    "As in pairs.jsonl."
    sides = {"chosen": better, "rejected": worse}
    row = {"prompt": better["prompt"]}
    for side, sample in sides.items():
        row |= {side: sample["text"], f"{side}_tokens": sample["ids"], f"{side}_finished": sample["finished"]}
    return row


PARTS = {f.__name__: f for f in (model, pairs, margins)}


def main(names: list[str]) -> None:
    if wrong := set(names) - set(PARTS):
        sys.exit(f"error: no part {wrong.pop()!r}: there are {', '.join(PARTS)}")
    for name in names or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder) / "run")


if __name__ == "__main__":
    main(sys.argv[1:])
