"""Training on pairs: ours, the lesson's step, TRL.

task: folder, pairs, batch (pairs a forward), accum (forwards a step), batches (those to try, where each contestant
has its own), dtype, device; see rows.py"""
import json
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from worker import chosen, serve, with_best_batch


def ours(task):
    "This project; the reference's pass and compiling are measured beside the steps"
    import torch

    import inside
    folder, cuda, spent = Path(task["folder"]), task["device"] == "cuda", {}
    policy = inside.policy(folder, task)
    warm, data = (inside.pairs(folder, name, policy) for name in ("warm", "pairs"))
    ref = inside.freeze(policy)
    inside.clock_beside(spent)
    inside.train(policy, ref, warm, task)
    task = with_best_batch(task, lambda tried: partial(inside.train, policy, ref, warm, tried))

    def run():
        if cuda: torch.cuda.reset_peak_memory_stats()
        with TemporaryDirectory() as cache: # empty: nobody has asked the reference yet
            start = perf_counter()
            inside.train(policy, ref, data, task, cache)
            if cuda: torch.cuda.synchronize()
            facts = spent | {"seconds": perf_counter() - start - sum(spent.values())}
        if cuda: facts["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return len(data), facts | chosen(task)
    return run


KINDS = { # words in the names of operations (CPU) and of kernels (GPU), the first that fits
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise", "nvjet", "gemm", "gemv"),
    "fused attention": ("scaled_dot_product", "flash", "sdpa", "cudnn_generated"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "mkldnn::_reorder_linear_weight",
               "memcpy", "memset", "copy_kernel", "catarray"),
}


def kind(name):
    "Which share of the profile an operation belongs to"
    for words, parts in KINDS.items():
        if any(part in name.lower() for part in parts): return words
    return "the rest"


def own_times(seen, on_gpu):
    "(name, microseconds) of what ran: kernels on a GPU, else operations"
    if not on_gpu: return [(event.key, event.self_cpu_time_total) for event in seen.key_averages()]
    kernels = [event for event in seen.key_averages() if event.device_type.name == "CUDA"]
    return [(event.key, event.self_device_time_total) for event in kernels]


def profile(task):
    "Ours under torch's profiler: the shares of products, fused attention, moving numbers about, and the rest"
    from torch import profiler
    run, on_gpu = ours(task), task["device"] == "cuda"

    def profiled():
        with profiler.profile() as seen: amount, facts = run()
        spent = Counter()
        for name, time in own_times(seen, on_gpu): spent[kind(name)] += time
        shares = {f"{name} share": t / spent.total() for name, t in spent.most_common()}
        return amount, facts | shares
    return profiled


def lesson(task):
    "The course's way"
    import lesson
    return lesson.train(task)


def trl_config(task):
    "The same recipe in TRL's words"
    from trl import DPOConfig
    return DPOConfig(
        str(Path(task["folder"])/"trl"), beta=.1, learning_rate=1e-6, num_train_epochs=1, adam_beta2=.95,
        per_device_train_batch_size=task["batch"], gradient_accumulation_steps=task["accum"],
        bf16=task["dtype"] == "bfloat16", gradient_checkpointing=False, precompute_ref_log_probs=True, use_cpu=True,
        train_sampling_strategy="group_by_length" if "batches" in task else "random", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False) # the lengths would be among them


def timed_trainer(spent):
    "TRL's trainer, which writes the seconds of the reference's pass into `spent`"
    from trl import DPOTrainer

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args, **kw):
            start = perf_counter()
            out = super()._precompute_ref_logps(*args, **kw)
            spent["reference_s"] = perf_counter() - start
            return out
    return Timed


def trl(task):
    "TRL's DPOTrainer; the reference asked before, as it offers. (Its forwards without padding are switched off.)"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, spent = Path(task["folder"]), {}
    tok = AutoTokenizer.from_pretrained(folder/"hf")

    def trainer(name, task):
        model = AutoModelForCausalLM.from_pretrained(folder/"hf", dtype=torch.float32)
        data, kind = conversations(folder/f"{name}.jsonl"), timed_trainer(spent)
        made = kind(model, args=trl_config(task), train_dataset=data, processing_class=tok)
        lengths = [len(x["prompt_ids"]) + max(len(x["chosen_ids"]), len(x["rejected_ids"])) for x in made.train_dataset]
        made.train_dataset = made.train_dataset.add_column("length", lengths) # to be grouped by
        return made
    task = with_best_batch(task, lambda tried: trainer("warm", tried).train)
    measured = trainer("pairs", task)
    check_tokens(measured.train_dataset, task)

    def run():
        start = perf_counter()
        measured.train()
        return task["pairs"], {"seconds": perf_counter() - start, **spent, **chosen(task)}
    return run


def conversations(path):
    "The pairs as TRL wants them to apply the chat template"
    import datasets
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

    def talk(row): return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    return datasets.Dataset.from_list([talk(json.loads(line)) for line in open(path)])


def check_tokens(data, task):
    "TRL made the same tokens of the text: of a made-up one all, of a real one but for two in a hundred"
    found = sum(len(x["prompt_ids"] + x[side]) for x in data for side in ("chosen_ids", "rejected_ids"))
    ours = json.loads((Path(task["folder"])/"prompts.json").read_text())["pair_tokens"]
    assert abs(found - ours) <= (.02 * ours if "batches" in task else 0), "TRL made other tokens of the text"


if __name__ == "__main__": serve({"ours": ours, "profile": profile, "lesson": lesson, "trl": trl})
