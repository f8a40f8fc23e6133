"""Ours and TRL's trainer on the same pairs, judged against SFT, for three seeds: the last table of lesson 10.

    make evidence-trl

Each seed mines 1,024 prompts, trains four times with the same numbers (ours; TRL on our token ids; TRL on
conversations; TRL on pairs.jsonl as it is) and judges each against SFT on 1,000 prompts: about three minutes. Writes
nbs/results/trl.json. Some seeds only: python tools/trl_seeds.py 1 2
"""
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # before these are imported
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from evidence import JUDGED, RESULTS, ROOT, configured, win_rate
from wikidpo.core.chat import load_tokenizer
from wikidpo.models.adopt import build_gpt, save_policy
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.models.hf import export, from_hf, trl_collator
from wikidpo.run.config import RunTrainConfig
from wikidpo.run.evaluate import evaluate
from wikidpo.run.folder import update_json
from wikidpo.run.mine import mine
from wikidpo.run.train import train

RUNS = ROOT / "runs" / "trl"
OUR_IDS, CONVERSATIONS = "TRL, our ids", "TRL, conversations"
WAYS = ("ours", OUR_IDS, CONVERSATIONS, "TRL, as it is")
POLICY = configured("policy")


def conversation(row: dict) -> dict:
    "The columns as TRL wants them to apply the chat template."
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


def trl_config(cfg: RunTrainConfig, out: Path, **more) -> DPOConfig:
    "The profile's recipe in TRL's words."
    return DPOConfig(
        str(out),
        beta=cfg.beta,
        learning_rate=cfg.lr,
        num_train_epochs=cfg.epochs,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.grad_accum_steps,
        warmup_steps=cfg.warmup_steps,
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        max_grad_norm=cfg.max_grad_norm,
        max_length=cfg.block_size,
        seed=cfg.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{"report_to": "none", "logging_strategy": "no"} | more,
    )


def train_trl(way: str, pairs: Path, cfg: RunTrainConfig, out: Path) -> None:
    "Train with TRL; writes dpo.pt."
    model, ref = (AutoModelForCausalLM.from_pretrained(RUNS / "sft", dtype="float32") for _ in range(2))
    rows = datasets.load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(RUNS / "cache"))
    collator, more = None, {}
    if way == OUR_IDS:
        collator = trl_collator(load_tokenizer(POLICY.tokenizer), cfg.block_size)
        more = {"remove_unused_columns": False}
    trainer = DPOTrainer(
        model,
        ref_model=ref,
        args=trl_config(cfg, out, **more),
        processing_class=AutoTokenizer.from_pretrained(RUNS / "sft"),
        train_dataset=rows.map(conversation) if way == CONVERSATIONS else rows,
        data_collator=collator,
    )
    trainer.train()
    shape = load_checkpoint(POLICY.checkpoint).cfg
    save_policy(out / "dpo.pt", build_gpt(shape, from_hf(model.state_dict(), shape, way)))


def run(seed: int) -> dict:
    "{way: the judge's section of summary.json} for one seed."
    mined, teacher = RUNS / f"seed{seed}", configured("teacher", seed=seed)
    counts = mine(POLICY, teacher, configured("mine", n_prompts=1024, seed=seed), mined)
    pairs, ways = mined / "pairs.jsonl", {}
    cfg = configured("train", seed=seed, pairs=str(pairs), valid=0.0, wandb="disabled")
    for way in WAYS:
        out = RUNS / f"seed{seed} {way}"
        if way == "ours":
            train(POLICY, cfg, out)
        elif not (out / "dpo.pt").exists():
            train_trl(way, pairs, cfg, out)
        comparison = configured("judge", seed=seed, a=str(out / "dpo.pt"))
        judged = evaluate(POLICY, teacher, comparison, RUNS / f"judge{seed} {way}")
        ways[way] = {k: judged[k] for k in JUDGED}
        print(f"seed {seed}, {way}: {win_rate(judged)}", flush=True)
    return {"pairs": counts["pairs"], "ways": ways}


def main(seeds: list[str]) -> None:
    datasets.disable_progress_bars()
    if not (RUNS / "sft").exists():
        export(POLICY.checkpoint, POLICY.tokenizer, RUNS / "sft")
    for seed in map(int, seeds):
        update_json(RESULTS / "trl.json", **{str(seed): run(seed)})


if __name__ == "__main__":
    main(sys.argv[1:] or list("012"))
