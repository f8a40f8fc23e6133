"""The evidence for lesson 01: reward model and PPO against DPO on the same pairs, on and off the leash, several seeds.

Writes nbs/results/rlhf.json, which the lesson shows. A run is a folder under runs/rlhf; one that is there is not run
again, so a command that was stopped goes on where it was. About four minutes a seed on one core.
"""
import copy
import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from evidence import ROOT, configured, win_rate_of_decided, write_results
from wikidpo.core.chat import encode_prompt, encode_response, load_tokenizer
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT
from wikidpo.core.rlhf import (join_rows, ppo, PPOConfig, reward_accuracy, reward_score,
                               RewardConfig, ScalarModel, train_reward)
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.accelerate import accelerate
from wikidpo.models.checkpoints import load_checkpoint, save_checkpoint
from wikidpo.run.evaluate import evaluate
from wikidpo.run.folder import update_json, write_atomic, write_jsonl
from wikidpo.world.facts import DATA, prompts

RUNS = ROOT / "runs" / "rlhf"
SEEDS, HELD_OUT = range(3), 201
PPO = {"ppo": {}, "ppo_no_leash": {"kl": 0.0}, "ppo_gentle": {"lr": 1e-4}}  # changes to PPOConfig
NAMES = ("dpo", *PPO)


@dataclass
class Start:
    "What every run starts from."
    tok: object
    sft: GPT
    train: PairDataset
    test: PairDataset


def load() -> Start:
    tok, sft = load_tokenizer(DATA / "tokenizer.json"), load_checkpoint(DATA / "model.safetensors")
    pairs = read_jsonl(DATA / "pairs.jsonl")
    write_jsonl(RUNS / "train.jsonl", pairs[:-HELD_OUT])
    write_jsonl(RUNS / "test.jsonl", pairs[-HELD_OUT:])
    train, test = (PairDataset(RUNS / f"{split}.jsonl", tok, sft.cfg.block_size) for split in ("train", "test"))
    return Start(tok, sft, train, test)


def judge(out: Path, seed: int) -> tuple[dict, list[dict]]:
    "The teacher's and the truth's comparison with the SFT model: (summary, rows)."
    cfg = configured("judge", seed=seed, a=str(out / "policy.pt"))
    summary = evaluate(configured("policy"), configured("teacher", seed=seed), cfg, out / "judge")
    return summary, read_jsonl(out / "judge" / "verdicts.jsonl")


def reward_model(start: Start, seed: int) -> ScalarModel:
    "The reward model of a seed, trained once."
    out, rm = RUNS / f"seed{seed}" / "reward", ScalarModel(start.sft)
    if not (out / "rm.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        losses = train_reward(rm, start.train, RewardConfig(seed=seed))
        seconds = round(time.perf_counter() - began, 1)
        accuracy = reward_accuracy(rm, start.test)
        update_json(out / "summary.json", seconds=seconds, loss_last=fmean(losses[-5:]), accuracy=accuracy)
        file = io.BytesIO()
        torch.save(rm.state_dict(), file)
        write_atomic(out / "rm.pt", file.getvalue())
    rm.load_state_dict(torch.load(out / "rm.pt"))
    return rm.requires_grad_(False)


def train(start: Start, seed: int, name: str, rm: ScalarModel) -> tuple[GPT, list[dict]]:
    "A policy, trained by DPO or PPO, and the metrics of its steps."
    policy, ref = copy.deepcopy(start.sft), freeze(start.sft)
    if name == "dpo":
        cfg = configured("train", seed=seed)
        history = train_dpo(policy, ref, start.train, cfg, accelerate(cfg.precision))
    else:
        value, cfg = ScalarModel(start.sft), PPOConfig(seed=seed, **PPO[name])
        history = ppo(policy, ref, rm, value, start.tok, prompts("mine"), cfg)
    return policy, history


def run(start: Start, seed: int, name: str, rm: ScalarModel) -> None:
    "One policy: trained, judged, and scored by the reward model; not trained again if it is there."
    out = RUNS / f"seed{seed}" / name
    if not (out / "policy.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        policy, history = train(start, seed, name, rm)
        update_json(out / "summary.json", seconds=round(time.perf_counter() - began, 1), history=history)
        save_checkpoint(out / "policy.pt", policy)
    summary, rows = judge(out, seed)
    update_json(
        out / "summary.json",
        judge=summary,
        score=mean_score(start.tok, rm, rows, "a"),
        score_sft=mean_score(start.tok, rm, rows, "b"),
        truth=fmean(r["truth_a"] for r in rows),
        truth_sft=fmean(r["truth_b"] for r in rows),
    )


@torch.no_grad()
def mean_score(tok, rm: ScalarModel, rows: list[dict], side: str) -> float:
    "Mean score of the answers of one side in verdicts.jsonl."
    answers = [encode_response(tok, r[side], r[f"finished_{side}"]) for r in rows]
    ids, mask = join_rows([encode_prompt(tok, r["prompt"]) for r in rows], answers)
    parts = zip(ids.split(100), mask.split(100))
    return torch.cat([reward_score(rm, *part) for part in parts]).mean().item()


def collect(start: Start, seeds: range) -> dict:
    "The runs of these seeds, as nbs/results/rlhf.json has them."
    results = {"seeds": list(seeds), "pairs": len(start.train), "ppo_config": asdict(PPOConfig())}
    for name in ("reward", *NAMES):
        paths = [RUNS / f"seed{seed}" / name / "summary.json" for seed in seeds]
        results[name] = [json.loads(path.read_text()) for path in paths]
    return results


def main() -> None:
    start = load()
    for i, seed in enumerate(SEEDS):
        rm = reward_model(start, seed)
        for name in NAMES:
            run(start, seed, name, rm)
        results = collect(start, SEEDS[:i + 1])
        write_results("rlhf", results)
    for name in NAMES:
        for seed, r in zip(SEEDS, results[name]):
            judged = f"{win_rate_of_decided(r['judge'])}; by the truth {r['judge']['truth_win_rate']:.3f}"
            scored = f"reward model {r['score']:.2f} (SFT {r['score_sft']:.2f})"
            print(f"{name:13} seed {seed}: {judged}; {scored}; {r['seconds']:.0f} s")


if __name__ == "__main__":
    main()
