"Sampling: K responses to each prompt, ours and the others'. task: folder, prompts, temps, max_new, device; see rows.py"
import json
import os
from collections import Counter
from pathlib import Path
from time import perf_counter

from worker import serve

TOP_K = 50


def ours(task):
    "This project: `sample_k` of a model that is ready to sample"
    import torch

    import inside
    folder, cuda = Path(task["folder"]), task["device"] == "cuda"
    tok, model = inside.tokenizer(folder), inside.fast_sampler(folder, task)
    asked = inside.prompts(folder, task, "texts")

    def run():
        if cuda: torch.cuda.reset_peak_memory_stats()
        responses = inside.sample(model, tok, asked, task, task["max_new"])
        tokens = sum(len(r.ids) + r.finished for r in responses)
        return tokens, {"peak_gb": torch.cuda.max_memory_reserved() / 1e9} if cuda else {}
    inside.sample(model, tok, asked if cuda else asked[:1], task, 2)
    return run


class Clock:
    "Seconds that the parts of a program take, each without the parts inside it"
    def __init__(self): self.spent, self.inner = Counter(), [0.]

    def put_on(self, owner, function, name):
        part = getattr(owner, function)

        def timed(*args, **kw):
            start = perf_counter()
            self.inner.append(0.)
            out = part(*args, **kw)
            took = perf_counter() - start
            self.spent[name] += took - self.inner.pop()
            self.inner[-1] += took
            return out
        setattr(owner, function, timed)


def profile(task):
    "Ours, with a clock around the parts: what share of the time each takes"
    import inside
    clock = Clock()
    for part in inside.SAMPLING_PARTS: clock.put_on(*part)
    run = ours(task)

    def profiled():
        clock.spent.clear()
        start = perf_counter()
        amount, _ = run()
        total = perf_counter() - start
        shares = {f"{name} share": seconds / total for name, seconds in clock.spent.items()}
        return amount, shares | {"the rest share": 1 - sum(clock.spent.values()) / total}
    return profiled


def lesson(task):
    "The course's way"
    import lesson
    return lesson.sample(task)


def prompt_ids(folder, task):
    "Token ids of the task's prompts, without the package"
    return json.loads((folder/"prompts.json").read_text())["ids"][:task["prompts"]]


def huggingface(task):
    "transformers' generate, all rows at once"
    import torch
    from transformers import AutoModelForCausalLM
    folder = Path(task["folder"])
    model = AutoModelForCausalLM.from_pretrained(folder/"hf", dtype=getattr(torch, task["dtype"])).eval()
    prompts = prompt_ids(folder, task)
    ids = torch.tensor([p for p in prompts for _ in task["temps"]])
    mask = torch.ones_like(ids)

    def generate(n):
        out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=TOP_K, max_new_tokens=n, min_new_tokens=n)
        return out[:, ids.shape[1]:].numel()
    generate(2)
    return lambda: generate(task["max_new"])


def vllm(task):
    "vLLM, in this process"
    cores = sorted(os.sched_getaffinity(0))[:task["threads"]] # all of them: left to itself, vLLM keeps one free
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4",
                   "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    from vllm import LLM, SamplingParams
    folder, temps = Path(task["folder"]), task["temps"]
    prompts = prompt_ids(folder, task)
    llm = LLM(str(folder/"hf"), dtype=task["dtype"], skip_tokenizer_init=True, seed=0,
              max_model_len=len(prompts[0]) + task["max_new"], max_num_seqs=len(prompts) * len(temps))

    def generate(n):
        common = dict(top_k=TOP_K, max_tokens=n, ignore_eos=True, detokenize=False)
        params = [SamplingParams(temperature=t, **common) for _ in prompts for t in temps]
        asked = [{"prompt_token_ids": p} for p in prompts for _ in temps]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False))
    generate(2)
    return lambda: generate(task["max_new"])


if __name__ == "__main__":
    serve({"ours": ours, "profile": profile, "lesson": lesson, "huggingface": huggingface, "vllm": vllm})
