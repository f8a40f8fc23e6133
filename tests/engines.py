"What the tests of core and engine share: small models, the shipped one, ragged pairs"
import copy
from dataclasses import replace

import torch

from wikidpo.core.chat import load_tokenizer
from wikidpo.core.config import TrainConfig
from wikidpo.core.data import PairDataset, collate
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.core.train import PlainEngine, accumulate, freeze, train_dpo
from wikidpo.engine.accelerate import training_parts
from wikidpo.engine.training import TrainingEngine
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.run.folder import write_jsonl
from wikidpo.world.facts import DATA

TOK, MINI = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
CFG = TrainConfig(lr=3e-4, batch_size=4, grad_accum_steps=2, warmup_steps=1, seed=0)


def random_model(**shape):
    "A random model whose weights are large enough for attention to matter"
    torch.manual_seed(0)
    small = dict(vocab_size=97, block_size=260, n_layer=2, n_head=4, n_embd=32, ffn_dim=48)
    model = GPT(GPTConfig(**small | shape)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)
    return model


MODELS = [random_model(), random_model(n_kv_head=2, tie=False), random_model(n_kv_head=1, head_dim=6)]


def ragged(sizes, rng, context=260):
    "Pairs of given (prompt, chosen, rejected) lengths, cut at the context as PairDataset cuts them"
    def ids(n): return [rng.randrange(97) for _ in range(n)]

    def side(prompt, n):
        mask = [0] * len(prompt) + [1] * n
        return (prompt + ids(n))[:context], mask[:context]

    prompts = [(ids(p), c, r) for p, c, r in sizes]
    return [(side(p, c), side(p, r)) for p, c, r in prompts]


def first_pairs(path, n):
    "A PairDataset of the first shipped pairs"
    write_jsonl(path, read_jsonl(DATA/"pairs.jsonl")[:n])
    return PairDataset(path, TOK, 256)


def value_and_gradient(f, model, batch):
    "(log-probabilities of both sides, gradient of a weighted difference)"
    model.zero_grad()
    chosen, rejected = f(model, batch)
    weights = torch.arange(1, len(chosen) + 1)
    ((chosen - .7 * rejected) * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.cat([chosen, rejected]).detach(), gradient


def engine(precision="fp32", changes=None, **kw):
    "The engine of this machine, with some of its parts put on or left out"
    return TrainingEngine(lambda policy, tokens: replace(training_parts(policy, precision), **changes or {}), **kw)


def run(data, engine=None, cfg=CFG, model=MINI, callbacks=()):
    "The metrics of a run from a copy of a model"
    policy = copy.deepcopy(model)
    return train_dpo(policy, freeze(policy), data, cfg, engine, callbacks)


def one_step(engine, policy, ref, data, pair_ids, cfg):
    "(gradient, logged means) of one optimizer step, before the optimizer"
    with engine.running(policy, ref, data, [list(pair_ids)], cfg):
        means = accumulate(engine, list(pair_ids), cfg).means()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), means


__all__ = ["CFG", "MINI", "MODELS", "TOK", "PlainEngine", "collate", "engine", "first_pairs", "one_step",
           "ragged", "random_model", "run", "value_and_gradient"]
