"What the contestants work on: models, prompts and pairs, in one folder for all of them"
import json
import random
import tempfile
from functools import cache
from pathlib import Path

import torch

from contestants import ROOT
from rows import PROMPT, SHAPES
from wikidpo.core.chat import encode_prompt, end_id, load_tokenizer
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT
from wikidpo.engine.memory import give_back_memory
from wikidpo.judge.config import TeacherConfig
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.models.hf import export
from wikidpo.run.config import MineConfig, PolicyConfig
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.run.mine import mine
from wikidpo.run.profiles import load_profile, section
from wikidpo.world.facts import DATA
from wikidpo.world.grounded import tasks

SMOLLM2 = ROOT/"checkpoints"/"smollm2"
MINED = ROOT/"runs"/"bench" # pairs of the real model, kept for the next start
MINED_PROMPTS = 1280 # 43 to 46 of 100 give a pair
TRIED = 16 # pairs for trying batch sizes; they are none of those measured


# --- trained models, with what they said themselves


def miniwiki(folder, pairs):
    "The shipped policy into the folder; (texts of prompts, pairs)"
    for name in ("model.safetensors", "tokenizer.json"): (folder/name).write_bytes((DATA/name).read_bytes())
    return [row["prompt"] for row in read_jsonl(DATA/"prompts_mine.jsonl")], read_jsonl(DATA/"pairs.jsonl")


def smollm2(folder, pairs):
    "SmolLM2-135M-Instruct into the folder; (its prompts, about texts; pairs, if any are wanted)"
    if not SMOLLM2.is_dir(): raise RuntimeError("no checkpoints/smollm2: `wikidpo import smollm2` makes it")
    for path in SMOLLM2.iterdir(): (folder/path.name).symlink_to(path.resolve())
    texts = [task.prompt for task in tasks("mine")]
    return texts, mined(texts[:MINED_PROMPTS]) if pairs else []


def mined(texts):
    "Pairs as the profile smollm2 mines them"
    profile, prompts = load_profile("smollm2"), MINED/"prompts.jsonl"
    files = dict(checkpoint=str(SMOLLM2/"model.safetensors"), tokenizer=str(SMOLLM2/"tokenizer.json"))
    policy = section(PolicyConfig, "policy", profile["policy"] | files)
    teacher = section(TeacherConfig, "teacher", profile["teacher"])
    cfg = section(MineConfig, "mine", profile["mine"] | dict(prompts=str(prompts), n_prompts=len(texts)))
    MINED.mkdir(parents=True, exist_ok=True)
    write_jsonl(prompts, [{"prompt": text} for text in texts])
    mine(policy, teacher, cfg, MINED/"run")
    give_back_memory() # which the contestants need
    return read_jsonl(MINED/"run"/"pairs.jsonl")


TRAINED = {"miniwiki": miniwiki, "smollm2": smollm2}


def trained(folder, model, pairs):
    "Write pairs.jsonl, and warm.jsonl with those that come behind them; returns texts of prompts"
    texts, found = TRAINED[model](folder, pairs)
    if pairs:
        if len(found) < pairs + 1: raise RuntimeError(f"{len(found)} pairs were mined, {pairs} are to be trained on")
        write_jsonl(folder/"pairs.jsonl", found[:pairs])
        write_jsonl(folder/"warm.jsonl", found[pairs:pairs + TRIED])
    return texts


# --- models without training


def random_model(folder, cfg):
    "Write a model without training and its tokenizer; returns both. No response of it ends before its full length"
    tok = load_tokenizer(DATA/"tokenizer.json")
    missing = [f"<{i}>" for i in range(cfg.vocab_size - tok.get_vocab_size())] # beside MiniWiki's symbols
    tok.add_tokens(missing)
    tok.save(str(folder/"tokenizer.json"))
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad(): model.embed.weight[tok.token_to_id("<|end|>")] = 0 # never among the most likely
    save_checkpoint(folder/"model.safetensors", model)
    return tok, missing


def random_text(folder, tok, words, prompts, pairs, warm, long):
    "Write pairs.jsonl and warm.jsonl, those to warm up with; returns texts of prompts"
    rng = random.Random(0)

    def text(n): return "".join(rng.choices(words, k=n))
    texts = [text(PROMPT) for _ in range(prompts)]
    answer = long - 1 - len(encode_prompt(tok, text(PROMPT))) # and the end
    for name, count in (("pairs", pairs), ("warm", min(pairs, warm))):
        rows = [{"prompt": text(PROMPT), "chosen": text(answer), "rejected": text(answer)} for _ in range(count)]
        write_jsonl(folder/f"{name}.jsonl", rows)
    return texts


def pair_tokens(path, tok, most):
    "Tokens in both sides of all pairs"
    rows = PairDataset(path, tok, most).rows
    return sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows)


@cache
def artifact(folder, model, prompts, pairs, warm, long):
    "A folder with model.safetensors, tokenizer.json, hf/, and prompts.json or pairs.jsonl"
    out = Path(tempfile.mkdtemp(dir=folder))
    if model in TRAINED: texts = trained(out, model, pairs)[:prompts]
    else:
        tok, words = random_model(out, SHAPES[model])
        texts = random_text(out, tok, words, prompts, pairs, warm, long)
    export(out/"model.safetensors", out/"tokenizer.json", out/"hf")
    tok = load_tokenizer(out/"tokenizer.json")
    ids = [encode_prompt(tok, text) for text in texts]
    facts = {"texts": texts, "ids": ids, "end": end_id(tok)}
    if pairs: facts["pair_tokens"] = pair_tokens(out/"pairs.jsonl", tok, SHAPES[model].block_size)
    write_atomic(out/"prompts.json", json.dumps(facts))
    return str(out)
