"What a GPU says is what the CPU says; skipped where there is no GPU"
import copy
import math
from dataclasses import replace

import pytest
import torch

from engines import CFG, MINI, TOK, engine, first_pairs
from wikidpo.core.chat import encode_prompt
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.core.sample import sample_k
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.accelerate import ready_to_sample
from wikidpo.engine.graphs import GraphedRows
from wikidpo.engine.ragged import generate_ragged, rows_for, sample_unit
from wikidpo.world.facts import prompts

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def share_equal(one, other):
    "The share of equal responses: rounding may decide a close race, and then the rest of that response"
    pairs = [pair for groups in zip(one, other, strict=True) for pair in zip(*groups, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def on_gpu(model): return copy.deepcopy(model).to(GPU)


@pytest.mark.parametrize("temps", [(0.,), (.7, 1.3)])
def test_responses_are_those_of_the_cpu(temps):
    asked, gpu = prompts("mine")[:100], on_gpu(MINI)

    def sample(model, batch=None):
        def grow(*args): return generate_ragged(*args, batch)
        return sample_k(model, TOK, asked, temps, 40, generator=torch.Generator().manual_seed(1), grow=grow)

    there = sample(gpu)
    assert share_equal(there, sample(MINI)) > .97
    assert share_equal(there, sample(gpu, 7)) > .97


@pytest.mark.parametrize("batch", [100, 9]) # all at once, and prompts that come in when others leave
def test_a_recorded_step_draws_the_same_tokens(batch):
    asked, fast = prompts("mine")[:100], ready_to_sample(on_gpu(MINI), "fp32")
    assert rows_for(fast) is GraphedRows

    def sample(model):
        def grow(*args): return generate_ragged(*args, batch)
        return sample_k(model, TOK, asked, (0., .7, 1.3), 80, generator=torch.Generator().manual_seed(1), grow=grow)

    assert share_equal(sample(fast), sample(on_gpu(MINI))) > .97


@pytest.mark.parametrize("large", [False, True]) # a large model is compiled
@pytest.mark.parametrize("precision, tol", [("fp32", 1e-3), ("bf16", .05)])
def test_a_run_is_that_of_the_cpu(tmp_path, large, precision, tol):
    data, cfg = first_pairs(tmp_path/"pairs.jsonl", 28), replace(CFG, epochs=2)

    def run(model, engine):
        policy = copy.deepcopy(model)
        return train_dpo(policy, freeze(policy), data, cfg, engine)

    there, here = run(on_gpu(MINI), engine(precision, dict(compiled=large))), run(MINI, engine("fp32"))
    assert there[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(there[0]["reward/margin"]) < 1e-5
    for a, b in zip(there, here, strict=True):
        for k in ("loss", "reward/margin", "reward/chosen", "grad_norm"):
            assert abs(a[k] - b[k]) < tol * max(1, abs(b[k])), (k, a, b)


@pytest.fixture(scope="module")
def large():
    "A random model of 21 M parameters on the GPU"
    torch.manual_seed(0)
    cfg = GPTConfig(TOK.get_vocab_size(), block_size=256, n_layer=8, n_head=8, n_embd=512, ffn_dim=1024)
    return on_gpu(GPT(cfg).eval())


@pytest.mark.parametrize("recorded", [False, True])
def test_what_does_not_fit_the_card_is_sampled_in_smaller_batches(large, recorded):
    model, asked = ready_to_sample(large, "fp32") if recorded else large, prompts("mine")[:128]
    most, found = [], []
    for share in (1., .02):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(share)
        try: found.append(sample_unit(model, TOK, asked, 0, 5, max_new=100))
        finally: torch.cuda.set_per_process_memory_fraction(1.)
        most.append(torch.cuda.max_memory_reserved())
    assert share_equal(*found) > .97
    assert most[1] <= .02 * torch.cuda.mem_get_info()[1] < most[0]


def test_the_copy_to_sample_from_is_rounded_and_says_about_the_same():
    asked = prompts("mine")[:100]
    half = ready_to_sample(on_gpu(MINI), "bf16")
    there, here = (sample_k(m, TOK, asked, (0.,), 40) for m in (half, MINI))
    assert share_equal(there, here) > .5 # answers of forty tokens: one close race in a hundred parts half of them
    ids = torch.tensor([encode_prompt(TOK, asked[0])])
    with torch.no_grad(): rough, exact = half(ids.to(GPU))[0][0, -1].cpu().float(), MINI(ids)[0][0, -1]
    assert (rough.softmax(-1) - exact.softmax(-1)).abs().max() < .05
