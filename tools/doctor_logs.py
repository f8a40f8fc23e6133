"""Trainings by TRL's own DPOTrainer, one healthy and five with a mistake: the logs that the doctor is tested on.

    make evidence-doctor

Each trains MiniWiki's policy on the same 640 shipped pairs for one epoch with one thing changed, logs every step (the
healthy one a second time every fifth), and keeps what `trainer.state.save_to_json` writes, less the columns that say
nothing about DPO. About four minutes on two CPU cores. Writes nbs/results/doctor/NAME.json.
Some only: tools/doctor_logs.py healthy reversed
"""
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # before these are imported
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from evidence import RESULTS, configured
from trl_seeds import conversation, trl_config
from wikidpo.core.files import read_jsonl
from wikidpo.models.hf import export
from wikidpo.run.folder import write_atomic
from wikidpo.world.facts import DATA

PAIRS = 640
COLUMNS = ("prompt", "chosen", "rejected")
LEFT_OUT = ("num_tokens", "epoch", "logits/chosen", "logits/rejected")
NAMES = ("healthy", "every_fifth", "hot", "no_template", "reversed", "wrong_reference", "low_beta")


def pairs_for(name: str, n: int = PAIRS) -> datasets.Dataset:
    "The pairs as this run gets them: conversations, except where the template is forgotten."

    def columns(row: dict) -> dict:
        return {k: row[k] for k in COLUMNS}

    rows = [columns(row) for row in read_jsonl(DATA / "pairs.jsonl")[:n]]
    if name == "reversed":
        rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    if name != "no_template":
        rows = [conversation(row) for row in rows]
    return datasets.Dataset.from_list(rows)


def recipe(name: str, out: Path, **more) -> DPOConfig:
    "The profile's recipe at a quarter of its learning rate, as in lesson 10, with the one change of this run."
    cfg = configured("train")
    lr = 30 * cfg.lr / 4 if name == "hot" else cfg.lr / 4
    beta = 0.001 if name == "low_beta" else cfg.beta
    every = 5 if name == "every_fifth" else 1
    return trl_config(replace(cfg, lr=lr, beta=beta, epochs=1), out,
                      logging_strategy="steps", logging_steps=every, **more)


def train_by_trl(name: str, out: Path, n: int = PAIRS, reference: Path | None = None, **more) -> DPOTrainer:
    "One run; writes its model and trainer_state.json. `reference`: another model than the policy's start."
    sft = out.parent / "sft"
    if not sft.exists():
        export(DATA / "model.safetensors", DATA / "tokenizer.json", sft)
    model, ref = (AutoModelForCausalLM.from_pretrained(m, dtype="float32") for m in (sft, reference or sft))
    trainer = DPOTrainer(
        model,
        ref_model=ref,
        args=recipe(name, out, **more),
        processing_class=AutoTokenizer.from_pretrained(sft),
        train_dataset=pairs_for(name, n),
    )
    trainer.train()
    trainer.save_model(str(out))
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    return trainer


def kept(path: Path) -> dict:
    "What the doctor reads of a trainer_state.json, in few digits."
    rows = json.loads(path.read_text())["log_history"]

    def short(row: dict) -> dict:
        return {k: float(f"{v:.6g}") for k, v in row.items() if k not in LEFT_OUT}

    return {"log_history": [short(row) for row in rows]}


def main(names: list[str]) -> None:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        for name in names:
            reference = tmp / "healthy" if name == "wrong_reference" else None  # another training of the same start
            if reference and not reference.exists():
                train_by_trl("healthy", reference)
            train_by_trl(name, tmp / name, reference=reference)
            state = kept(tmp / name / "trainer_state.json")
            rows = ",\n".join(json.dumps(row) for row in state["log_history"])
            write_atomic(RESULTS / "doctor" / f"{name}.json", f'{{"log_history": [\n{rows}\n]}}\n')
            print(name, state["log_history"][-2], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
