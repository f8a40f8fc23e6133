"""Ours and TRL's trainer on the same pairs, judged against SFT, for five seeds: the last table of lesson 09.

    make evidence-trl

Each seed mines 1,024 prompts, trains four times with the same numbers (ours; TRL on our token ids; TRL on conversations; TRL on
pairs.jsonl as it is) and judges each against SFT on 1,000 prompts: about three minutes. Writes nbs/results/trl.json. Some seeds only: python tools/trl_seeds.py 3 4"""
import json, os, sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from wikidpo.adopt import build, save_policy
from wikidpo.chat import load_tokenizer
from wikidpo.files import update_json
from wikidpo.hf import export, from_hf, trl_collator
from wikidpo.model import load_checkpoint
from wikidpo.pairs import MineConfig, mine
from wikidpo.profiles import load_profile, section
from wikidpo.sampling import PolicyConfig
from wikidpo.teacher import TeacherConfig
from wikidpo.training import TrainConfig, train
from wikidpo.winrate import EvaluateConfig, evaluate

ROOT = Path(__file__).resolve().parent.parent
RUNS, OUT, WAYS = ROOT/"runs"/"trl", ROOT/"nbs"/"results"/"trl.json", ("ours", "TRL, our ids", "TRL, conversations", "TRL, as it is")
profile = load_profile("miniwiki")
policy = section(PolicyConfig, "policy", profile["policy"])

def conversation(row):
    "The columns as TRL wants them to apply the chat template"
    return {name: [{"role": role, "content": row[name]}] for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}

def train_trl(way, pairs, cfg, out):
    "The profile's recipe in TRL's words; writes dpo.pt"
    model, ref = (AutoModelForCausalLM.from_pretrained(RUNS/"sft", dtype="float32") for _ in range(2))
    rows = datasets.load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(RUNS/"cache"))
    ids = dict(remove_unused_columns=False) if way == "TRL, our ids" else {}
    args = DPOConfig(str(out), beta=cfg.beta, learning_rate=cfg.lr, num_train_epochs=cfg.epochs, per_device_train_batch_size=cfg.batch_size, gradient_accumulation_steps=cfg.grad_accum_steps,
                     warmup_steps=cfg.warmup_steps, lr_scheduler_type="cosine", adam_beta2=.95, max_grad_norm=cfg.max_grad_norm, max_length=cfg.block_size, seed=cfg.seed,
                     bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", **ids)
    trainer = DPOTrainer(model, ref_model=ref, args=args, processing_class=AutoTokenizer.from_pretrained(RUNS/"sft"),
                         train_dataset=rows.map(conversation) if way == "TRL, conversations" else rows, data_collator=trl_collator(load_tokenizer(policy.tokenizer), cfg.block_size) if ids else None)
    trainer.train()
    shape = load_checkpoint(policy.checkpoint).cfg
    save_policy(out/"dpo.pt", build(shape, from_hf(model.state_dict(), shape, way)))

def seed_run(seed):
    "{way: the judge's section of summary.json} for one seed"
    mined, teacher = RUNS/f"seed{seed}", section(TeacherConfig, "teacher", profile["teacher"] | {"seed": seed})
    counts = mine(policy, teacher, section(MineConfig, "mine", profile["mine"] | {"n_prompts": 1024, "seed": seed}), mined)
    judged = {}
    for way in WAYS:
        out, cfg = RUNS/f"seed{seed} {way}", section(TrainConfig, "train", profile["train"] | {"seed": seed, "pairs": str(mined/"pairs.jsonl"), "wandb": "disabled"})
        if way == "ours": train(policy, cfg, out)
        elif not (out/"dpo.pt").exists(): train_trl(way, mined/"pairs.jsonl", cfg, out)
        j = evaluate(policy, teacher, section(EvaluateConfig, "judge", profile["judge"] | {"seed": seed, "a": str(out/"dpo.pt")}), RUNS/f"judge{seed} {way}")
        judged[way] = {k: j[k] for k in ("n", "win", "tie", "loss", "decided_win_rate", "ci_low", "ci_high", "truth_win_rate")}
        print(f"seed {seed}, {way}: {j['decided_win_rate']:.1%} ({j['ci_low']:.1%} to {j['ci_high']:.1%})", flush=True)
    return {"pairs": counts["pairs"], "ways": judged}

if __name__ == "__main__":
    datasets.disable_progress_bars()
    if not (RUNS/"sft").exists(): export(policy.checkpoint, policy.tokenizer, RUNS/"sft")
    for seed in sys.argv[1:] or range(5): update_json(OUT, **{str(seed): seed_run(int(seed))})
