"""The margins that the beta slider of lesson 01 shows: 10,000 pairs of answers that the trained policy has not seen.

Trains the default policy on the shipped pairs, samples and scores new answers, and takes every two answers to one question
that the teacher scored differently. Writes wikidpo/data/miniwiki/margins.npy; about three minutes on two cores."""
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from wikidpo.chat import encode_prompt, end_id
from wikidpo.files import read_jsonl
from wikidpo.logprobs import seq_logprob
from wikidpo.miniwiki import DATA
from wikidpo.pairs import MineConfig, mine
from wikidpo.profiles import load_profile, section
from wikidpo.sampling import PolicyConfig, open_policy, pad_right
from wikidpo.teacher import TeacherConfig
from wikidpo.training import TrainConfig, train

WANTED = 10_000


@torch.no_grad()
def ratios(policy, ref, tok, samples):
    "log pi - log pi_ref of each answer, summed over its tokens, (samples,)"
    out = torch.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["ids"]))
    for i in range(0, len(order), 128):
        rows = [(encode_prompt(tok, s["prompt"]), s["ids"] + [end_id(tok)] * s["finished"]) for s in (samples[j] for j in order[i:i + 128])]
        ids, mask = (pad_right(x)[0] for x in ([p + r for p, r in rows], [[0] * len(p) + [1] * len(r) for p, r in rows]))
        out[order[i:i + 128]] = seq_logprob(policy, ids, mask) - seq_logprob(ref, ids, mask)
    return out


if __name__ == "__main__":
    profile = load_profile("miniwiki")
    policy, teacher = section(PolicyConfig, "policy", profile["policy"]), section(TeacherConfig, "teacher", profile["teacher"])
    with tempfile.TemporaryDirectory() as tmp:
        train(policy, section(TrainConfig, "train", profile["train"] | {"pairs": str(DATA/"pairs.jsonl"), "wandb": "disabled"}), Path(tmp))
        mine(policy, teacher, section(MineConfig, "mine", profile["mine"] | {"seed": 1, "n_prompts": 2560}), Path(tmp)/"new")
        samples = [s for s in read_jsonl(Path(tmp)/"new"/"samples.jsonl") if s["score"] is not None]
        (dpo, tok), (ref, _) = open_policy(policy, Path(tmp)/"dpo.pt"), open_policy(policy)
    log_ratio, groups = ratios(dpo, ref, tok, samples), {}
    for i, s in enumerate(samples): groups.setdefault(s["prompt_id"], []).append(i)
    pairs = [(a, b) if samples[a]["score"] > samples[b]["score"] else (b, a) for g in groups.values() for a, b in combinations(g, 2) if samples[a]["score"] != samples[b]["score"]]
    print(f"{len(pairs)} pairs, {WANTED} wanted")
    better, worse = np.array(pairs[:WANTED]).T
    z = (log_ratio[better] - log_ratio[worse]).numpy()
    np.save(DATA/"margins.npy", z.astype(np.float16))
    print(f"{len(z)} margins, mean {z.mean():.2f}, from {z.min():.1f} to {z.max():.1f} nats")
