"Training on pairs: ours, the lesson's step, TRL. task: folder, pairs, batch (pairs a forward), accum (forwards a step), dtype, device; see bench.py"
import json
from pathlib import Path
from time import perf_counter

from worker import serve


def config(task):
    from wikidpo.training import TrainConfig
    return TrainConfig(lr=1e-6, batch_size=task["batch"], grad_accum_steps=task["accum"], warmup_steps=0, precision="bf16" if task["dtype"] == "bfloat16" else "fp32", wandb="disabled")


def ours(task):
    import torch
    from wikidpo.chat import load_tokenizer
    from wikidpo.logprobs import PairDataset
    from wikidpo.model import load_checkpoint
    from tempfile import TemporaryDirectory
    from wikidpo import training
    folder, cuda, spent = Path(task["folder"]), task["device"] == "cuda", {}
    model = load_checkpoint(folder/"model.safetensors", task["device"])
    warm, data = (PairDataset(folder/f"{name}.jsonl", load_tokenizer(folder/"tokenizer.json"), model.cfg.block_size) for name in ("warm", "pairs"))
    ref = training.freeze(model)

    def apart(name): # its seconds go to `spent`, not to the step
        f = getattr(training, name)
        def timed(*args):
            start = perf_counter()
            said = f(*args)
            spent[f"{name}_s"] = perf_counter() - start
            return said
        setattr(training, name, timed)
    for name in ("reference", "compile_step"): apart(name)
    training.dpo(model, ref, warm, config(task))

    def run():
        if cuda: torch.cuda.reset_peak_memory_stats()
        with TemporaryDirectory() as cache:                           # empty: nobody has asked the reference yet
            start = perf_counter()
            training.dpo(model, ref, data, config(task), cache=cache)
            if cuda: torch.cuda.synchronize()
            facts = spent | {"seconds": perf_counter() - start - sum(spent.values())}
        return len(data), facts | ({"peak_gb": torch.cuda.max_memory_reserved() / 1e9} if cuda else {})
    return run


def kind(name):
    "Which share of the profile an operation belongs to"
    if name in ("aten::mm", "aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise"): return "matrix products"
    if "scaled_dot_product" in name or "flash" in name: return "fused attention"
    return "copies" if name in ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "mkldnn::_reorder_linear_weight") else "the rest"


def profile(task):
    "Ours under torch's profiler: what share of the operations' time the products take, fused attention, moving numbers about, and the rest"
    from collections import Counter
    from torch import profiler
    run, time = ours(task), f"self_{'device' if task['device'] == 'cuda' else 'cpu'}_time_total"
    def profiled():
        with profiler.profile() as seen: amount, facts = run()
        spent = Counter()
        for e in seen.key_averages(): spent[kind(e.key)] += getattr(e, time)
        return amount, facts | {f"{name} share": t / spent.total() for name, t in spent.most_common()}
    return profiled


def lesson(task):
    "Lesson 10's way: policy and reference read both sides at every step, logits at every position, log_softmax over all of them"
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader
    from wikidpo.chat import load_tokenizer
    from wikidpo.logprobs import PairDataset, collate
    from wikidpo.model import load_checkpoint
    from wikidpo.training import freeze
    folder = Path(task["folder"])
    policy = load_checkpoint(folder/"model.safetensors", task["device"]).train()
    warm, data = (PairDataset(folder/f"{name}.jsonl", load_tokenizer(folder/"tokenizer.json"), policy.cfg.block_size) for name in ("warm", "pairs"))
    ref = freeze(policy)
    opt = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(.9, .95), weight_decay=0.)

    def logprob(model, ids, mask):
        logp = F.log_softmax(model(ids, ids)[0][:, :-1].float(), -1)
        return (logp.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)

    def run(data=data):
        for i, (c, c_mask, r, r_mask) in enumerate(DataLoader(data, task["batch"], shuffle=True, collate_fn=collate), 1):
            ids, mask = torch.cat([c, r]).to(task["device"]), torch.cat([c_mask, r_mask]).to(task["device"])
            with torch.autocast(task["device"], torch.bfloat16, enabled=task["dtype"] == "bfloat16"):
                pi = logprob(policy, ids, mask)
                with torch.no_grad(): rf = logprob(ref, ids, mask)
            chosen, rejected = (pi - rf).chunk(2)
            (-F.logsigmoid(.1 * (chosen - rejected)).mean() / task["accum"]).backward()
            if i % task["accum"] == 0:
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.)
                opt.step(); opt.zero_grad(set_to_none=True)
        return len(data)
    run(warm)
    opt.zero_grad()
    return run


def trl(task):
    import datasets, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    folder, spent = Path(task["folder"]), {}

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args, **kw):
            start = perf_counter()
            out = super()._precompute_ref_logps(*args, **kw)
            spent["reference_s"] = perf_counter() - start
            return out

    rows = [json.loads(line) for line in open(folder/"pairs.jsonl")]
    talk = [{name: [{"role": role, "content": r[name]}] for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))} for r in rows]
    args = DPOConfig(str(folder/"trl"), beta=.1, learning_rate=1e-6, num_train_epochs=1, per_device_train_batch_size=task["batch"], gradient_accumulation_steps=task["accum"],
                     bf16=task["dtype"] == "bfloat16", gradient_checkpointing=False, precompute_ref_log_probs=True, adam_beta2=.95, use_cpu=True, report_to="none", save_strategy="no",
                     logging_strategy="no", disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(folder/"hf", dtype=torch.float32)
    trainer = Timed(model, args=args, train_dataset=datasets.Dataset.from_list(talk), processing_class=AutoTokenizer.from_pretrained(folder/"hf"))
    for x in trainer.train_dataset: assert len(x["prompt_ids"] + x["chosen_ids"]) == len(x["prompt_ids"] + x["rejected_ids"]) == task["long"], "TRL made other tokens of the text"
    def run():
        start = perf_counter()
        trainer.train()
        return len(rows), {"seconds": perf_counter() - start, **spent}
    return run


if __name__ == "__main__": serve({"ours": ours, "profile": profile, "lesson": lesson, "trl": trl})
