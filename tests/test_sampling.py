"The sampler against the plain loop, over random ragged batches"
import os, shutil, subprocess, sys
from collections import Counter
from copy import deepcopy
import pytest, torch
from hypothesis import given, settings, strategies as st
from wikidpo.adopt import Foreign
from wikidpo.chat import encode_prompt, end_id, load_tokenizer
from wikidpo.files import UserError
from wikidpo.miniwiki import DATA, prompts
from wikidpo import sampling
from wikidpo.model import GPT, GPTConfig, load_checkpoint, pack
from wikidpo.sampling import TEMPS, UNIT, Cached, pick_precision, prompts_that_fit, sample_k, sample_rows, sample_unit, sampler

TOK, MODEL = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")

def greedy(model, prompt, n):
    "The most likely continuation of one prompt alone, the whole prefix at every step: (ids without the end, finished, closest race between two tokens)"
    ids, race = encode_prompt(TOK, prompt), float("inf")
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            top, idx = model(torch.tensor([ids]))[0][0, -1].topk(2)
            race = min(race, (top[0] - top[1]).item())
            if idx[0] == end_id(TOK): return ids[start:], True, race
            ids = ids + [idx[0].item()]
    return ids[start:], False, race

def agree(response, want):
    "The same tokens, unless two of them were so close that rounding decides"
    return (response.ids, response.finished) == want[:2] or want[2] < 1e-4

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=7), st.integers(1, 30))
def test_greedy_is_identical_with_and_without_cache_in_any_ragged_batch(picks, max_new):
    asked = [prompts("eval")[i] for i in picks]
    out = sample_k(MODEL, TOK, asked, temps=(0,), max_new=max_new)
    assert all(agree(g[0], greedy(MODEL, p, max_new)) for g, p in zip(out, asked, strict=True))

def test_a_model_behind_the_plain_contract_says_the_same():
    asked = prompts("eval")[:5]
    fast, slow, refilled = (sample_k(m, TOK, asked, temps=(.7, 1.3), max_new=20, generator=torch.Generator().manual_seed(3), batch=b) for m, b in ((MODEL, None), (Foreign(MODEL, 256), None), (Foreign(MODEL, 256), 2)))
    assert fast == slow == refilled

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5000), min_size=2, max_size=9), st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_a_row_says_the_same_whoever_stands_beside_it(picks, batch, max_new, seed):
    asked = [prompts("eval")[i] for i in picks]
    whole, refilled = (sample_k(MODEL, TOK, asked, max_new=max_new, generator=torch.Generator().manual_seed(seed), batch=b) for b in (None, batch))
    assert whole == refilled

def test_a_unit_is_the_same_in_any_batch_and_after_running_out_of_memory():
    asked = prompts("mine")[:60]
    class Small(GPT):
        def extend(self, ids, cache):
            if len(ids) > 70: raise torch.OutOfMemoryError
            return super().extend(ids, cache)
    small = load_checkpoint(DATA/"model.safetensors")
    small.__class__ = Small
    whole = sample_unit(MODEL, TOK, asked, 0, 5, max_new=40)
    assert whole == sample_unit(MODEL, TOK, asked, 0, 5, max_new=40, batch=7) == sample_unit(small, TOK, asked, 0, 5, max_new=40)
    with pytest.raises(UserError, match="71 responses of 4 tokens to one prompt do not fit"): sample_k(small, TOK, asked[:2], temps=(1.,) * 71, max_new=4)

def test_every_token_of_a_response_is_drawn_from_its_exact_distribution():
    [said], n, temp = sample_k(MODEL, TOK, prompts("eval")[5:6], temps=(3.,) * 3000, max_new=3, generator=torch.Generator().manual_seed(1)), 3000, 3.
    start = encode_prompt(TOK, prompts("eval")[5])
    seen = Counter(r.ids[0] if r.ids else end_id(TOK) for r in said)
    second = [r for r in said if r.ids and r.ids[0] == seen.most_common(1)[0][0]]
    for prefix, drawn in ((start, seen), (start + [seen.most_common(1)[0][0]], Counter((r.ids + [end_id(TOK)])[1] for r in second))):
        with torch.no_grad(): top, idx = MODEL(torch.tensor([prefix]))[0][0, -1].topk(50)
        want, n = dict(zip(idx.tolist(), (top / temp).softmax(-1).tolist())), drawn.total()
        likely = [i for i in want if n * want[i] >= 5]
        chi2 = sum((drawn[i] - n * want[i]) ** 2 / (n * want[i]) for i in likely)
        assert set(drawn) <= set(want) and len(likely) > 3 and chi2 < len(likely) + 4 * (2 * len(likely)) ** .5

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans())
def test_the_cache_is_the_whole_prefix_for_every_shape_of_head(lengths, k, heads, tie):
    torch.manual_seed(sum(lengths))
    m = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=heads[0], n_kv_head=heads[1], head_dim=6, n_embd=24, ffn_dim=32, tie=tie, rope_scaling=(4., 1., 4., 8))).eval()
    asked = [torch.randint(50, (n,)).tolist() for n in lengths]
    u = torch.rand(len(asked) * k, 21)
    said = sample_rows(lambda: Cached(m, k), asked, torch.ones(len(u)), u, 50, -1, 2)             # no end: 21 tokens each
    with torch.no_grad():
        for r, row in enumerate(said.tolist()):
            p = m(torch.tensor([asked[r // k] + row]))[0][0, len(asked[r // k]) - 1:-1].softmax(-1).sort(descending=True)
            at = (p.indices == torch.tensor(row)[:, None]).int().argmax(-1, keepdim=True)
            high = p.values.cumsum(-1).gather(1, at)[:, 0]
            assert ((u[r] < high + 1e-4) & (u[r] > high - p.values.gather(1, at)[:, 0] - 1e-4)).all()

def test_in_bf16_the_logits_are_those_of_fp32_within_rounding():
    half, asked = sampler(MODEL, "bf16"), [encode_prompt(TOK, p) for p in prompts("eval")[:4]]
    assert MODEL.embed.weight.dtype is torch.float32 and sampler(MODEL) is MODEL                     # too small to gain
    with torch.no_grad():
        exact, rough = (Cached(m, 2) for m in (MODEL, half))
        for rows in (exact, rough): rows.add(asked)
        for step in range(20):
            nxt = exact.logits.argmax(-1)
            for rows in (exact, rough): rows.append(nxt)
            assert (exact.logits.softmax(-1) - rough.logits.float().softmax(-1)).abs().max() < .05
    assert pick_precision("fp32", "cpu") == "fp32" and pick_precision("auto", "cpu") in ("fp32", "bf16")

def test_rows_beside_a_teacher_fit_what_is_free():
    cfg, left = GPTConfig(), int(5.3e9)
    n = prompts_that_fit(cfg, left, 100, 256, 4)
    assert 40 < n < 100 and prompts_that_fit(cfg, 2 * left, 100, 256, 4) in (2 * n, 2 * n + 1) and prompts_that_fit(cfg, 1, 100, 256, 4) == 1
    kept = n * (100 + 4 * 256) * 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * 2                   # in bf16
    assert kept < .8 * left < 4.3e9

def test_finished_means_the_end_was_said_and_cut_means_it_was_not():
    out = [r for g in sample_k(MODEL, TOK, prompts("mine")[:40], max_new=9, generator=torch.Generator().manual_seed(0)) for r in g]
    assert {r.finished for r in out} == {True, False}
    assert all(len(r.ids) == 9 for r in out if not r.finished) and all(len(r.ids) <= 8 for r in out if r.finished)
    assert all(end_id(TOK) not in r.ids for r in out) and all(TOK.decode(r.ids) == r.text for r in out)

def test_temperatures_stand_in_order_and_zero_is_greedy():
    g = sample_k(MODEL, TOK, prompts("eval")[:3], temps=(0, 1.5, 0), max_new=20)
    assert all([r.temperature for r in row] == [0, 1.5, 0] and row[0].ids == row[2].ids for row in g)

def test_top_k_one_is_greedy_and_top_k_beyond_the_vocabulary_is_allowed():
    asked = prompts("eval")[:3]
    assert [r[0].ids for r in sample_k(MODEL, TOK, asked, temps=(1.3,), top_k=1, max_new=12)] == [r[0].ids for r in sample_k(MODEL, TOK, asked, temps=(0,), max_new=12)]
    assert len(sample_k(MODEL, TOK, asked, temps=(1.,), top_k=10**6, max_new=4)) == 3

def test_colder_rows_stay_closer_to_the_mode():
    g = sample_k(MODEL, TOK, prompts("eval")[:200], temps=(.2, 1.5), max_new=24, generator=torch.Generator().manual_seed(0))
    mode = [r[0].ids for r in sample_k(MODEL, TOK, prompts("eval")[:200], temps=(0,), max_new=24)]
    same = [sum(row[k].ids == m for row, m in zip(g, mode)) for k in (0, 1)]
    assert same[0] > same[1] + 40

def test_units_do_not_depend_on_each_other():
    asked = prompts("mine")[:2 * UNIT]
    second = sample_unit(MODEL, TOK, asked, 1, 7, max_new=8)
    sample_unit(MODEL, TOK, asked, 0, 7, max_new=8)
    assert sample_unit(MODEL, TOK, asked, 1, 7, max_new=8) == second
    torch.manual_seed(99)
    assert sample_unit(MODEL, TOK, asked, 1, 7, max_new=8) == second            # nor on the global random state

def test_a_prompt_that_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match="leaves no room for 200 new ones in a context of 256: 'Tell me all about the ants"): sample_k(MODEL, TOK, ["Tell me all about the ants " * 12], max_new=200)

def test_grouped_heads_sample_like_the_plain_loop():
    torch.manual_seed(0)
    m = GPT(GPTConfig(vocab_size=TOK.get_vocab_size(), block_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48)).eval()
    out = sample_k(m, TOK, prompts("eval")[:4], temps=(0,), max_new=10)
    assert all(agree(g[0], greedy(m, p, 10)) for g, p in zip(out, prompts("eval")[:4], strict=True))

def test_memory_is_kept_for_a_large_model_alone(monkeypatch):
    kept = []
    monkeypatch.setattr(sampling, "keep_memory", lambda: kept.append(1))
    sampler(MODEL, "fp32"); assert not kept
    monkeypatch.setattr(sampling, "large", lambda model: True)
    sampler(MODEL, "fp32"); assert kept == [1]

NATIVE = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bf16 units")

@NATIVE
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
@pytest.mark.parametrize("kv", [4, 2])
def test_compiled_blocks_say_what_plain_ones_say(kv):
    torch.manual_seed(kv)
    plain = GPT(GPTConfig(vocab_size=97, block_size=128, n_layer=3, n_head=4, n_kv_head=kv, n_embd=96, ffn_dim=80)).eval().bfloat16()
    fast = pack(deepcopy(plain), True)
    calls, compiled = [], fast.compiled
    fast.compiled = lambda *args: calls.append(len(args[1])) or compiled(*args)
    with torch.no_grad():
        batches = [Cached(m, 4) for m in (plain, fast)]
        for b in batches: b.add([[7, 8, 9], [5] * 11, [3, 4], list(range(20)), [1, 2, 3], [90]])
        for step in range(40):
            if step == 5: [b.keep(torch.tensor([i for i in range(24) if i % 3])) for b in batches]
            if step == 9: [b.add([[11] * 15, [12, 13]]) for b in batches]
            if step == 30: [b.keep(torch.arange(3)) for b in batches]             # too few rows for the compiled path
            for b in batches: b.append(torch.arange(len(b.cache.at)) % 89 + step)
            assert (batches[0].logits.float() - batches[1].logits.float()).abs().max() < .02
    assert calls == [24] * 15 + [16] * 12 + [24] * 63

@NATIVE
def test_without_a_compiler_sampling_goes_on_and_says_so(tmp_path):
    code = """
import torch
from wikidpo.model import GPT, GPTConfig, pack
from wikidpo.sampling import Cached
m = pack(GPT(GPTConfig(vocab_size=97, block_size=64, n_layer=2, n_head=4, n_embd=96, ffn_dim=80)).eval().bfloat16(), True)
with torch.no_grad(): b = Cached(m, 4); b.add([[1, 2, 3]] * 5); b.append(torch.arange(20))
print(m.compiled, tuple(b.logits.shape))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert said.stdout.strip() == "None (20, 97)", said.stderr
    assert "goes on without compiled blocks, and slower: InvalidCxxCompiler: No working C++ compiler found" in said.stderr
