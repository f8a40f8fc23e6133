"""The evidence for lesson 00: reward model and PPO against DPO on the same pairs, with the leash and without it, over several seeds.

Writes nbs/results/rlhf.json, which the lesson shows. A run is a folder under runs/rlhf; one that is there is not run again, so a command that
was stopped goes on where it was. About four minutes a seed on one core."""
import copy, json, time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch

from wikidpo.chat import encode_prompt, encode_response, load_tokenizer
from wikidpo.files import read_jsonl, update_json, write_atomic, write_jsonl
from wikidpo.logprobs import PairDataset
from wikidpo.miniwiki import DATA, prompts
from wikidpo.model import load_checkpoint, save_checkpoint
from wikidpo.profiles import load_profile, section
from wikidpo.rlhf import PPOConfig, RewardConfig, ScalarModel, join_rows, ppo, reward_accuracy, score, train_reward
from wikidpo.sampling import PolicyConfig
from wikidpo.teacher import TeacherConfig
from wikidpo.training import TrainConfig, dpo, freeze
from wikidpo.winrate import EvaluateConfig, evaluate

ROOT = Path(__file__).resolve().parent.parent
RUNS, OUT = ROOT/"runs"/"rlhf", ROOT/"nbs"/"results"/"rlhf.json"
SEEDS, HELD_OUT, PROFILE = range(3), 201, load_profile("miniwiki")
PPO = {"ppo": {}, "ppo_no_leash": {"kl": 0.}, "ppo_gentle": {"lr": 1e-4}} # changes to PPOConfig
TOK, SFT = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
PAIRS = read_jsonl(DATA/"pairs.jsonl")
for split, rows in (("train", PAIRS[:-HELD_OUT]), ("test", PAIRS[-HELD_OUT:])): write_jsonl(RUNS/f"{split}.jsonl", rows)
TRAIN, TEST = (PairDataset(RUNS/f"{split}.jsonl", TOK, SFT.cfg.block_size) for split in ("train", "test"))

def judge(out, seed):
    "The teacher's and the truth's comparison with the SFT model: (summary, rows)"
    teacher, cfg = PROFILE["teacher"] | {"seed": seed}, PROFILE["judge"] | {"seed": seed, "a": str(out/"policy.pt")}
    summary = evaluate(section(PolicyConfig, "policy", PROFILE["policy"]), section(TeacherConfig, "teacher", teacher), section(EvaluateConfig, "judge", cfg), out/"judge")
    return summary, read_jsonl(out/"judge"/"verdicts.jsonl")

def reward_model(seed):
    "The reward model of a seed, trained once"
    out, rm = RUNS/f"seed{seed}"/"reward", ScalarModel(SFT)
    if not (out/"rm.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        losses = train_reward(rm, TRAIN, RewardConfig(seed=seed))
        update_json(out/"summary.json", seconds=round(time.perf_counter() - start, 1), loss_last=fmean(losses[-5:]), accuracy=reward_accuracy(rm, TEST))
        torch.save(rm.state_dict(), out/"rm.pt")
    rm.load_state_dict(torch.load(out/"rm.pt"))
    return rm.requires_grad_(False)

def run(seed, name, rm):
    "One policy: trained, judged, and scored by the reward model; nothing if it is there"
    out = RUNS/f"seed{seed}"/name
    if not (out/"policy.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        policy, start = copy.deepcopy(SFT), time.perf_counter()
        if name == "dpo": history = dpo(policy, freeze(SFT), TRAIN, section(TrainConfig, "train", PROFILE["train"] | {"seed": seed}))
        else: history = ppo(policy, freeze(SFT), rm, ScalarModel(SFT), TOK, prompts("mine"), PPOConfig(seed=seed, **PPO[name]))
        update_json(out/"summary.json", seconds=round(time.perf_counter() - start, 1), history=history)
        save_checkpoint(out/"policy.pt", policy)
    summary, rows = judge(out, seed)
    update_json(out/"summary.json", judge=summary, score=scores(rm, rows, "a"), score_sft=scores(rm, rows, "b"), truth=fmean(r["truth_a"] for r in rows), truth_sft=fmean(r["truth_b"] for r in rows))

@torch.no_grad()
def scores(rm, rows, side):
    "Mean score of the answers in verdicts.jsonl"
    packed = join_rows([encode_prompt(TOK, r["prompt"]) for r in rows], [encode_response(TOK, r[side], r[f"finished_{side}"]) for r in rows])
    return torch.cat([score(rm, *part) for part in zip(*(t.split(100) for t in packed))]).mean().item()

def write(seeds):
    "Collect the runs of these seeds"
    read = lambda name: [json.loads((RUNS/f"seed{s}"/name/"summary.json").read_text()) for s in seeds]
    results = {"seeds": list(seeds), "pairs": len(TRAIN), "ppo_config": asdict(PPOConfig()), **{name: read(name) for name in ("reward", "dpo", *PPO)}}
    write_atomic(OUT, json.dumps(results, indent=1) + "\n")
    return results

if __name__ == "__main__":
    for i, seed in enumerate(SEEDS):
        rm = reward_model(seed)
        for name in ("dpo", *PPO): run(seed, name, rm)
        results = write(SEEDS[:i + 1])
    for name in ("dpo", *PPO):
        for s, r in zip(SEEDS, results[name]):
            j = r["judge"]
            print(f"{name:13} seed {s}: win rate {j['decided_win_rate']:.3f} [{j['ci_low']:.3f}, {j['ci_high']:.3f}] of {j['win'] + j['loss']}; by the truth {j['truth_win_rate']:.3f}; reward model {r['score']:.2f} (SFT {r['score_sft']:.2f}); {r['seconds']:.0f} s")
