"TRL's DPOTrainer and ours: the same ids give the same numbers, and pairs.jsonl goes in as it is"
import os
from functools import partial

import pytest, torch
import torch.nn.functional as F

os.environ["TQDM_DISABLE"] = "1"
import datasets
from smol import gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from wikidpo.core.chat import end_id, load_tokenizer
from wikidpo.core.data import collate, PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.core.logps import pair_logps
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.models.checkpoints import load_checkpoint, save_checkpoint
from wikidpo.models.hf import export, from_hf, import_, trl_collator
from wikidpo.run.folder import write_jsonl
from wikidpo.core.config import TrainConfig
from wikidpo.core.train import accumulate, freeze, lr_at, PlainEngine, step_schedule, train_dpo
from wikidpo.engine.accelerate import accelerate
from wikidpo.world.facts import DATA, statement
from wikidpo.world.grounded import tasks

TOK, STEPS = load_tokenizer(DATA/"tokenizer.json"), 20
CFG = TrainConfig(lr=3e-4, batch_size=4, grad_accum_steps=2, warmup_steps=4, seed=3)

@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A folder with pairs.jsonl (20 steps of 8 pairs, some rejected responses cut) and a small random policy, in our
    form and in Hugging Face's"""
    out = tmp_path_factory.mktemp("trl")
    rows = read_jsonl(DATA/"pairs.jsonl")[:STEPS * 8]
    for r in rows[::5]:
        start = r["rejected_tokens"][:5]
        r |= {"rejected_tokens": start, "rejected": TOK.decode(start), "rejected_finished": False}
    write_jsonl(out/"pairs.jsonl", rows)
    torch.manual_seed(0)
    cfg = GPTConfig(TOK.get_vocab_size(), 256, n_layer=2, n_head=2, n_embd=48, ffn_dim=96)
    save_checkpoint(out/"model.safetensors", GPT(cfg))
    export(out/"model.safetensors", DATA/"tokenizer.json", out/"hf")
    return out

def load(tmp): return AutoModelForCausalLM.from_pretrained(tmp/"hf", dtype=torch.float32)

RECIPE = dict(
    beta=CFG.beta, learning_rate=CFG.lr, num_train_epochs=1, per_device_train_batch_size=CFG.batch_size,
    gradient_accumulation_steps=CFG.grad_accum_steps, bf16=False, gradient_checkpointing=False, use_cpu=True,
    report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)

def trainer(tmp, order=None, model=None, optimizers=(None, None), tok=TOK, **kw):
    "TRL with our recipe; with an order, on our token ids"
    rows = datasets.load_dataset("json", data_files=str(tmp/"pairs.jsonl"), split="train", cache_dir=str(tmp/"cache"))
    collator = trl_collator(tok) if order else None
    if order:
        rows = rows.select(order)
        kw = dict(remove_unused_columns=False, train_sampling_strategy="sequential") | kw
    args = DPOConfig(str(tmp/"out"), **RECIPE | kw)
    return DPOTrainer(model or load(tmp), ref_model=load(tmp), args=args, train_dataset=rows,
                      processing_class=AutoTokenizer.from_pretrained(tmp/"hf"), data_collator=collator,
                      optimizers=optimizers)

@pytest.fixture(scope="module")
def twins(tmp):
    """Both after 20 optimizer steps from the same weights on the same ids:
    (our policy, reference and metrics; TRL's trainer and metrics; the pairs)"""
    data, policy = PairDataset(tmp/"pairs.jsonl", TOK, 256), load_checkpoint(tmp/"model.safetensors")
    ref = freeze(policy)
    ours = train_dpo(policy, ref, data, CFG, accelerate("fp32"))
    model = load(tmp)
    opt = torch.optim.AdamW(model.parameters(), lr=CFG.lr, betas=(.9, .95), weight_decay=0.)
    factor = partial(lr_at, steps=STEPS, warmup_steps=CFG.warmup_steps)
    optimizers = opt, torch.optim.lr_scheduler.LambdaLR(opt, factor)
    theirs = trainer(tmp, sum(step_schedule(len(data), CFG), []), model, optimizers)
    theirs.train()
    return policy, ref, ours, theirs, [h for h in theirs.state.log_history if "loss" in h], data

def test_losses_and_rewards_agree_at_every_step(twins):
    _, _, ours, _, theirs, _ = twins
    assert len(ours) == len(theirs) == STEPS
    assert abs(ours[0]["loss"] - .693147) < 1e-5
    assert sum(h["loss"] for h in ours) / STEPS < ours[0]["loss"] - .005             # a step has 8 pairs: noisy
    names = {"loss": "loss", "reward/chosen": "rewards/chosen", "reward/rejected": "rewards/rejected",
             "reward/margin": "rewards/margins", "reward/accuracy": "rewards/accuracies", "grad_norm": "grad_norm",
             "lr": "learning_rate"}
    for a, b in zip(ours, theirs):
        for x, y in names.items(): assert abs(a[x] - b[y]) < 1e-4, (a["step"], x, a[x], b[y])

def test_every_pair_has_the_same_log_probabilities(twins, tmp):
    policy, ref, _, theirs, _, data = twins
    rows, moved = read_jsonl(tmp/"pairs.jsonl")[:16], []
    for ours, model in ((policy, theirs.model), (ref, theirs.ref_model)):
        with torch.no_grad(): a = torch.stack(pair_logps(ours, collate([data[i] for i in range(16)])))
        b = torch.stack(theirs.compute_ref_log_probs(model, theirs.data_collator(rows)))
        assert (a - b).abs().max() < 1e-4
        moved.append(a)
    assert (moved[0] - moved[1]).abs().min() > 1e-3                        # the policies did train

def test_gradients_point_the_same_way(twins, tmp):
    policy, ref, _, theirs, _, data = twins
    policy.zero_grad()
    theirs.model.zero_grad()
    engine = PlainEngine()
    with engine.running(policy, ref, data, [], CFG): accumulate(engine, range(8), CFG)
    theirs.training_step(theirs.model, theirs.data_collator(read_jsonl(tmp/"pairs.jsonl")[:8]))
    back = from_hf({k: p.grad for k, p in theirs.model.named_parameters()}, policy.cfg, "TRL")
    ours = {k: p.grad for k, p in policy.named_parameters()}
    def flat(grads): return torch.cat([grads[k].flatten() for k in back]).double()
    a, b = flat(ours), flat(back)
    assert a.norm() > 0 and F.cosine_similarity(a, b, 0) > .9999

def test_weights_agree_after_20_steps(twins, tmp):
    policy, ref, _, theirs, _, _ = twins
    back, start = from_hf(theirs.model.state_dict(), policy.cfg, "TRL"), ref.state_dict()
    for k, w in policy.state_dict().items(): assert (w - back[k]).abs().max() < 1e-5, k
    assert max((back[k] - start[k]).abs().max() for k in back) > 1e-3

def test_pairs_jsonl_goes_in_as_it_is(tmp):
    as_is = trainer(tmp, max_steps=2)
    as_is.train()
    first, row = as_is.state.log_history[0], as_is.train_dataset[0]
    assert abs(first["loss"] - .693147) < 1e-5
    assert as_is.state.global_step == 2 and len(as_is.train_dataset) == STEPS * 8
    assert TOK.decode(row["prompt_ids"]) == row["prompt"]                                 # no template
    assert row["rejected_ids"][-1] == end_id(TOK)                                         # an end never reached
    batch = next(iter(as_is.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}               # none of our other columns

def test_collator_hands_over_the_sampled_ids(tmp):
    data, rows = PairDataset(tmp/"pairs.jsonl", TOK, 256), read_jsonl(tmp/"pairs.jsonl")
    theirs, ours = trl_collator(TOK)(rows[:12]), collate([data[i] for i in range(12)])
    ids, mask = ours.rows()
    assert torch.equal(theirs["input_ids"], ids) and torch.equal(theirs["completion_mask"], mask)
    cut = ours.rejected_ids[0][ours.rejected_mask[0].bool()]
    assert rows[0]["rejected_finished"] is False and end_id(TOK) not in cut
    assert trl_collator(TOK, 20)(rows[:12])["input_ids"].shape[1] == 20

def test_collator_tokenises_rows_without_ids(tmp):
    row = read_jsonl(tmp/"pairs.jsonl")[1]
    text = {k: row[k] for k in ("prompt", "chosen", "rejected")}
    with_end = text | {k: row[k] + "<|end|>" for k in ("chosen", "rejected")}            # as TRL hands rows on
    def ids(r): return trl_collator(TOK)([r])["input_ids"]
    assert torch.equal(ids(row), ids(text)) and torch.equal(ids(text), ids(with_end))

LETTERS = [TOK.token_to_id(c) for c in "Lima."]

@pytest.mark.parametrize("change", [
    {}, {"chosen": "Lima!"}, {"chosen_tokens": [5000, 9000]}, {"chosen_tokens": None}, {"chosen_finished": None},
    {"chosen_tokens": [*LETTERS, end_id(TOK)]}, {"chosen_tokens": None, "chosen_finished": False}])
def test_collator_and_dataset_take_the_same_ids(change):
    "Edited texts, ids of another tokenizer, none, with an end, cut"
    row = {"prompt": "What is the capital of Peru?", "chosen": "Lima.", "rejected": "Rome, I think.",
           "chosen_tokens": LETTERS, "chosen_finished": True} | change
    ours = {name: value for name, value in row.items() if value is not None}
    ids, mask = collate([PairDataset([ours], TOK, 256)[0]]).rows()
    theirs = trl_collator(TOK)([row])
    assert torch.equal(theirs["input_ids"], ids) and torch.equal(theirs["completion_mask"], mask)

@pytest.mark.slow
def test_a_real_model_over_20_steps(tmp_path):
    "SmolLM2 on its own profile's kind of pairs: every logged number of both trainers, and the weights in the end"
    folder, n = tmp_path/"smollm2", 2*STEPS
    import_(gguf_file(), folder)
    files = folder/"model.safetensors", folder/"tokenizer.json"
    export(*files, tmp_path/"hf")
    tok, some = load_tokenizer(files[1]), [t for t in tasks("mine") if t.kind == "question"][:n]
    rows = [{"prompt": t.prompt, "chosen": statement(t.wanted[0]), "rejected": statement(t.others[0])} for t in some]
    write_jsonl(tmp_path/"pairs.jsonl", [r | {"score_chosen": 9, "score_rejected": 2} for r in rows])
    cfg = TrainConfig(lr=1e-5, batch_size=2, grad_accum_steps=1, warmup_steps=4, seed=3)
    data, policy = PairDataset(tmp_path/"pairs.jsonl", tok, 256), load_checkpoint(files[0])
    ours = train_dpo(policy, freeze(policy), data, cfg, accelerate("fp32"))
    model = load(tmp_path)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(.9, .95), weight_decay=0.)
    decay = torch.optim.lr_scheduler.LambdaLR(opt, partial(lr_at, steps=STEPS, warmup_steps=cfg.warmup_steps))
    order = sum(step_schedule(len(data), cfg), [])
    theirs = trainer(tmp_path, order, model, (opt, decay), tok=tok, beta=cfg.beta, learning_rate=cfg.lr,
                     per_device_train_batch_size=2, gradient_accumulation_steps=1)
    theirs.train()
    logged = [h for h in theirs.state.log_history if "loss" in h]
    assert len(ours) == len(logged) == STEPS and ours[-1]["loss"] < ours[0]["loss"]
    names = {"loss": "loss", "reward/chosen": "rewards/chosen", "reward/rejected": "rewards/rejected"}
    for a, b in zip(ours, logged):
        for x, y in names.items(): assert abs(a[x] - b[y]) < 1e-3, (a["step"], x, a[x], b[y])
    back = from_hf(theirs.model.state_dict(), policy.cfg, "TRL")
    for k, w in policy.state_dict().items(): assert (w - back[k]).abs().max() < 1e-5, k
