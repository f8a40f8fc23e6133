"The original lesson's way, plainly: what this project is measured against"
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import inside
from inside import TOP_K
from worker import best_batch, chosen, facts


def autocast(task): return torch.autocast(task["device"], torch.bfloat16, enabled=task["dtype"] == "bfloat16")


# --- sampling: every step reads the whole sequence again, logits and a loss at every position


@torch.no_grad()
def next_tokens(model, ids, lengths, temps, task):
    "A token drawn for each row, (B,)"
    with autocast(task): logits, _ = model(ids, ids)
    last = logits[torch.arange(len(ids)), lengths - 1].float() / temps
    last[last < last.topk(TOP_K).values[:, [-1]]] = -torch.inf
    return last.softmax(-1).multinomial(1)[:, 0]


def respond(model, tok, prompts, task):
    "Answer one batch of prompts, each at every temperature, to the end; returns the number of tokens"
    repeated, end = [p for p in prompts for _ in task["temps"]], inside.end_id(tok)
    start, rows = torch.tensor([len(p) for p in repeated]), torch.arange(len(repeated))
    temps = torch.tensor(task["temps"] * len(prompts))[:, None]
    ids = torch.zeros(len(rows), int(start.max()) + task["max_new"], dtype=torch.long)
    for row, p in enumerate(repeated): ids[row, :len(p)] = torch.tensor(p)
    stop, done = start.clone(), torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(task["max_new"]):
        new = next_tokens(model, ids[:, :int(stop.max())], stop, temps, task)
        ids[rows, stop] = torch.where(done, end, new)
        stop = torch.where(done, stop, stop + 1)
        done |= new == end
        if done.all(): break
    tok.decode_batch([ids[r, start[r]:stop[r]].tolist() for r in rows])
    return int((stop - start).sum())


def extrapolate(model, prompts, task):
    "The same work, estimated from three of its steps: (tokens, {seconds, how})"
    rows, first, new = len(prompts) * len(task["temps"]), len(prompts[0]), task["max_new"]
    spent = []
    for length in (first, first + new // 2, first + new):
        ids = torch.randint(4, 2000, (rows, length))
        start = perf_counter()
        temps = torch.tensor(task["temps"] * len(prompts))[:, None]
        next_tokens(model, ids, torch.full((rows,), length), temps, task)
        spent.append(perf_counter() - start)
    seconds = (spent[0] + 4 * spent[1] + spent[2]) / 6 * new
    how = "from one step at the first, middle and last length (Simpson's rule)"
    return rows * new, {"seconds": seconds, "estimated": how}


def sample(task):
    "All responses; of a few prompts, or estimated from three steps, where the task says so"
    folder, few = Path(task["folder"]), task.get("few")
    tok, model = inside.tokenizer(folder), inside.policy(folder, task)
    prompts = inside.prompts(folder, task, "ids")[:few]

    def respond_to(some, n): return sum(respond(model, tok, some[i:i + n], task) for i in range(0, len(some), n))

    def run():
        if task["extrapolate"]: return extrapolate(model, prompts, task)
        tokens, rows = respond_to(prompts, n), len(prompts) * len(task["temps"])
        return tokens, {"estimated": f"from {few} of the prompts"} if few else facts(task, n, tokens, rows)
    n = few or best_batch(task, lambda n: respond_to(prompts[:task["part"]], n))
    return run


# --- training: policy and reference read both sides at every step, logits at every position, log_softmax over all


def logps(model, ids, mask):
    "Log-probability of each response, (B,)"
    logp = F.log_softmax(model(ids, ids)[0][:, :-1].float(), -1)
    return (logp.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)


def loss(policy, ref, batch, task):
    "DPO's, of a batch as `collate` makes it"
    ids, mask = batch.rows(task["device"])                        # chosen, then rejected
    with autocast(task):
        policy_logps = logps(policy, ids, mask)
        with torch.no_grad(): ref_logps = logps(ref, ids, mask)
    better, worse = (policy_logps - ref_logps).chunk(2)
    return -F.logsigmoid(.1 * (better - worse)).mean()


def train(task):
    "One epoch over the pairs"
    folder = Path(task["folder"])
    policy = inside.policy(folder, task).train()
    warm, data = (inside.pairs(folder, name, policy) for name in ("warm", "pairs"))
    ref = inside.freeze(policy)
    opt = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(.9, .95), weight_decay=0.)

    def run(data):
        batches = DataLoader(data, task["batch"], shuffle=True, collate_fn=inside.collate)
        for i, batch in enumerate(batches, 1):
            (loss(policy, ref, batch, task) / task["accum"]).backward()
            if i % task["accum"] == 0:
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.)
                opt.step()
                opt.zero_grad(set_to_none=True)
        return len(data)
    run(warm)
    opt.zero_grad()
    return lambda: (run(data), chosen(task))
