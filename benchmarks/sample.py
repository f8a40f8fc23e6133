"Sampling: K responses to each prompt, ours and the others'. task: folder, prompts (token ids), temps, max_new, device; see bench.py"
import json
from pathlib import Path

from worker import serve

TOP_K = 50


def ours(task):
    import torch
    from wikidpo.chat import load_tokenizer
    from wikidpo.model import load_checkpoint
    from wikidpo.sampling import sample_k, sampler
    folder = Path(task["folder"])
    tok, model = load_tokenizer(folder/"tokenizer.json"), sampler(load_checkpoint(folder/"model.safetensors", task["device"]), {"bfloat16": "bf16"}.get(task["dtype"], "fp32"))
    asked, cuda = json.loads((folder/"prompts.json").read_text())["texts"][:task["prompts"]], task["device"] == "cuda"
    def run():
        if cuda: torch.cuda.reset_peak_memory_stats()
        said = [r for group in sample_k(model, tok, asked, tuple(task["temps"]), task["max_new"], TOP_K) for r in group]
        return sum(len(r.ids) + r.finished for r in said), {"peak_gb": torch.cuda.max_memory_reserved() / 1e9} if cuda else {}
    sample_k(model, tok, asked[:1], tuple(task["temps"]), 2, TOP_K)
    return run


def profile(task):
    "Ours, with a clock around the parts: what share of the time each takes, without the parts inside it"
    from collections import Counter
    from time import perf_counter
    from wikidpo import model, sampling
    spent, inner = Counter(), [0.]
    def clock(name, f):
        def timed(*args, **kw):
            start = perf_counter()
            inner.append(0.)
            out = f(*args, **kw)
            took = perf_counter() - start
            spent[name] += took - inner.pop()
            inner[-1] += took
            return out
        return timed
    for owner, method, name in ((model, "packed_linear", "linear layers"), (model.GPT, "extend", "attention, norms and the rest of the blocks"), (model.GPT, "prefill", "the same of the prompts"), (model.Cache, "step", "growing the cache"), (sampling, "draw", "drawing")):
        setattr(owner, method, clock(name, getattr(owner, method)))
    run = ours(task)
    def profiled():
        spent.clear()
        start = perf_counter()
        amount, _ = run()
        total = perf_counter() - start
        return amount, {f"{name} share": t / total for name, t in spent.items()} | {"the rest share": 1 - sum(spent.values()) / total}
    return profiled


def lesson(task):
    "Lesson 10's way: every step reads the whole sequence again, logits and a loss at every position, under autocast"
    import torch
    from wikidpo.chat import load_tokenizer
    from wikidpo.model import load_checkpoint
    folder = Path(task["folder"])
    tok, model = load_tokenizer(folder/"tokenizer.json"), load_checkpoint(folder/"model.safetensors", task["device"])
    prompts, k = json.loads((folder/"prompts.json").read_text())["ids"][:task["prompts"]], len(task["temps"])
    end = tok.token_to_id("<|end|>")

    @torch.no_grad()
    def step(x, cur, temp):
        with torch.autocast(task["device"], torch.bfloat16, enabled=task["dtype"] == "bfloat16"): logits, _ = model(x, x)
        last = logits[torch.arange(len(x)), cur - 1].float() / temp
        last[last < last.topk(TOP_K).values[:, [-1]]] = -torch.inf
        return last.softmax(-1).multinomial(1)[:, 0]

    def whole(group): # one batch of prompts, to its end
        lens = torch.tensor([len(p) for p in group for _ in range(k)])
        x, cur, done = torch.zeros(len(lens), int(lens.max()) + task["max_new"], dtype=torch.long), lens.clone(), torch.zeros(len(lens), dtype=torch.bool)
        for row, p in enumerate(p for p in group for _ in range(k)): x[row, :len(p)] = torch.tensor(p)
        temp, rows = torch.tensor(task["temps"] * len(group))[:, None], torch.arange(len(lens))
        for _ in range(task["max_new"]):
            nxt = step(x[:, :int(cur.max())], cur, temp)
            x[rows, cur] = torch.where(done, end, nxt)
            cur = torch.where(done, cur, cur + 1)
            done |= nxt == end
            if done.all(): break
        tok.decode_batch([x[r, lens[r]:cur[r]].tolist() for r in rows])
        return int((cur - lens).sum())

    def run():
        if not task["extrapolate"]: return sum(whole(prompts[i:i + task["batch"]]) for i in range(0, len(prompts), task["batch"]))
        from time import perf_counter
        spent, n, rows = [], len(prompts[0]), len(prompts) * k
        for length in (n, n + task["max_new"] // 2, n + task["max_new"]):
            x, start = torch.randint(4, 2000, (rows, length)), perf_counter()
            step(x, torch.full((rows,), length), torch.tensor(task["temps"] * len(prompts))[:, None])
            spent.append(perf_counter() - start)
        return rows * task["max_new"], {"seconds": (spent[0] + 4 * spent[1] + spent[2]) / 6 * task["max_new"], "estimated": "from one step at the first, middle and last length (Simpson's rule)"}
    return run


def huggingface(task):
    import torch
    from transformers import AutoModelForCausalLM
    folder = Path(task["folder"])
    model = AutoModelForCausalLM.from_pretrained(folder/"hf", dtype=getattr(torch, task["dtype"])).eval()
    prompts = json.loads((folder/"prompts.json").read_text())["ids"][:task["prompts"]]
    ids, n = torch.tensor([p for p in prompts for _ in task["temps"]]), task["max_new"]
    def generate(n): return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=TOP_K, max_new_tokens=n, min_new_tokens=n)
    generate(2)
    return lambda: generate(n)[:, ids.shape[1]:].numel()


def vllm(task):
    import os
    cores = sorted(os.sched_getaffinity(0))[:task["threads"]]                          # all of them: left to itself, vLLM keeps one free
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    from vllm import LLM, SamplingParams
    folder = Path(task["folder"])
    prompts = json.loads((folder/"prompts.json").read_text())["ids"][:task["prompts"]]
    llm = LLM(str(folder/"hf"), dtype=task["dtype"], skip_tokenizer_init=True, max_model_len=len(prompts[0]) + task["max_new"], max_num_seqs=len(prompts) * len(task["temps"]), seed=0)
    def generate(n):
        params = [SamplingParams(temperature=t, top_k=TOP_K, max_tokens=n, ignore_eos=True, detokenize=False) for _ in prompts for t in task["temps"]]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate([{"prompt_token_ids": p} for p in prompts for _ in task["temps"]], params, use_tqdm=False))
    generate(2)
    return lambda: generate(task["max_new"])


if __name__ == "__main__": serve({"ours": ours, "profile": profile, "lesson": lesson, "huggingface": huggingface, "vllm": vllm})
