"What a GPU says is what the CPU says; skipped where there is no GPU"
import copy, math
from dataclasses import replace
import pytest, torch
from wikidpo import training
from wikidpo.chat import load_tokenizer
from wikidpo.files import read_jsonl, write_jsonl
from wikidpo.logprobs import PairDataset
from wikidpo.miniwiki import DATA, prompts
from wikidpo.model import GPT, GPTConfig, load_checkpoint
from wikidpo.sampling import sample_k, sample_unit, sampler
from wikidpo.training import TrainConfig, dpo, freeze

GPU = "cuda"
TOK, MINI = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

def same(a, b):
    "The share of equal responses: rounding may decide a close race, and then the rest of that response"
    return sum(x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)) / sum(map(len, a))

@pytest.mark.parametrize("temps", [(0.,), (.7, 1.3)])
def test_responses_are_those_of_the_cpu(temps):
    asked, gpu = prompts("mine")[:100], copy.deepcopy(MINI).to(GPU)
    there, here = (sample_k(m, TOK, asked, temps, 40, generator=torch.Generator().manual_seed(1)) for m in (gpu, MINI))
    assert same(there, here) > .97
    refilled = sample_k(gpu, TOK, asked, temps, 40, generator=torch.Generator().manual_seed(1), batch=7)
    assert same(there, refilled) > .97

@pytest.mark.parametrize("large", [False, True]) # a large model is compiled
@pytest.mark.parametrize("precision, tol", [("fp32", 1e-3), ("bf16", .05)])
def test_a_run_is_that_of_the_cpu(tmp_path, monkeypatch, large, precision, tol):
    monkeypatch.setattr(training, "large", lambda model: large)
    monkeypatch.setattr(training, "keep_memory", lambda: None)
    write_jsonl(tmp_path/"pairs.jsonl", read_jsonl(DATA/"pairs.jsonl")[:28])
    data, cfg = PairDataset(tmp_path/"pairs.jsonl", TOK, 256), TrainConfig(lr=3e-4, batch_size=4, grad_accum_steps=2, warmup_steps=1, epochs=2, seed=0, precision="fp32")
    def run(device, cfg):
        policy = copy.deepcopy(MINI).to(device)
        return dpo(policy, freeze(policy), data, cfg)
    there, here = run(GPU, replace(cfg, precision=precision)), run("cpu", cfg)
    assert there[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(there[0]["reward/margin"]) < 1e-5
    for a, b in zip(there, here, strict=True):
        for k in ("loss", "reward/margin", "reward/chosen", "grad_norm"): assert abs(a[k] - b[k]) < tol * max(1, abs(b[k])), (k, a, b)

def test_what_does_not_fit_the_card_is_sampled_in_smaller_batches():
    torch.manual_seed(0)
    model, asked = GPT(GPTConfig(vocab_size=TOK.get_vocab_size(), block_size=256, n_layer=8, n_head=8, n_embd=512, ffn_dim=1024)).eval().to(GPU), prompts("mine")[:128]
    said, most = [], []
    for share in (1., .02):
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); torch.cuda.set_per_process_memory_fraction(share)
        try: said.append(sample_unit(model, TOK, asked, 0, 5, max_new=100))
        finally: torch.cuda.set_per_process_memory_fraction(1.)
        most.append(torch.cuda.max_memory_reserved())
    assert same(*said) > .97 and most[1] <= .02 * torch.cuda.mem_get_info()[1] < most[0]

def test_the_copy_to_sample_from_is_rounded_and_says_about_the_same():
    asked = prompts("mine")[:100]
    there = sample_k(sampler(copy.deepcopy(MINI).to(GPU), "bf16"), TOK, asked, (0.,), 40)
    assert same(there, sample_k(MINI, TOK, asked, (0.,), 40)) > .8
