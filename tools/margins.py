"""The margins that the beta slider of lesson 01 shows: 10,000 pairs of answers that the trained policy has not seen.

Trains the default policy on the shipped pairs, samples and scores new answers, and takes every two answers to one
question that the teacher scored differently. Writes wikidpo/data/miniwiki/margins.npy; about three minutes on two
cores.
"""
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from evidence import configured
from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.core.files import read_jsonl
from wikidpo.core.logps import seq_logprob
from wikidpo.core.rlhf import join_rows
from wikidpo.models.policy import open_policy
from wikidpo.run.mine import mine
from wikidpo.run.train import train
from wikidpo.world.facts import DATA

WANTED = 10_000


@torch.no_grad()
def ratios(policy, ref, tok, samples: list[dict]) -> torch.Tensor:
    "log pi - log pi_ref of each answer, summed over its tokens, (samples,)."
    out = torch.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["ids"]))
    for i in range(0, len(order), 128):
        rows = [samples[j] for j in order[i:i + 128]]
        prompts = [encode_prompt(tok, s["prompt"]) for s in rows]
        ids, mask = join_rows(prompts, [s["ids"] + [end_id(tok)] * s["finished"] for s in rows])
        out[order[i:i + 128]] = seq_logprob(policy, ids, mask) - seq_logprob(ref, ids, mask)
    return out


def by_score(samples: list[dict]) -> list[tuple[int, int]]:
    "Every two answers to one question that the teacher scored differently, the better one first."
    groups: dict[int, list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault(s["prompt_id"], []).append(i)
    pairs = []
    for group in groups.values():
        for a, b in combinations(group, 2):
            difference = samples[a]["score"] - samples[b]["score"]
            if difference:
                pairs.append((a, b) if difference > 0 else (b, a))
    return pairs


def main() -> None:
    policy = configured("policy")
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp)
        train(policy, configured("train", pairs=str(DATA / "pairs.jsonl"), wandb="disabled"), out)
        mine(policy, configured("teacher"), configured("mine", seed=1, n_prompts=2560), out / "new")
        samples = [s for s in read_jsonl(out / "new" / "samples.jsonl") if s["score"] is not None]
        (dpo, tok), (ref, _) = open_policy(policy, out / "dpo.pt"), open_policy(policy)
    log_ratio, pairs = ratios(dpo, ref, tok, samples), by_score(samples)
    print(f"{len(pairs)} pairs, {WANTED} wanted")
    better, worse = np.array(pairs[:WANTED]).T
    z = (log_ratio[better] - log_ratio[worse]).numpy()
    np.save(DATA / "margins.npy", z.astype(np.float16))
    print(f"{len(z)} margins, mean {z.mean():.2f}, from {z.min():.1f} to {z.max():.1f} nats")


if __name__ == "__main__":
    main()
