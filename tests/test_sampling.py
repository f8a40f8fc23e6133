"The sampler against the plain loop, over random ragged batches"
import random
import pytest, torch
from hypothesis import given, settings, strategies as st
from wikidpo.adopt import Foreign
from wikidpo.chat import encode_prompt, end_id, load_tokenizer
from wikidpo.files import UserError
from wikidpo.miniwiki import DATA, prompts
from wikidpo.model import GPT, GPTConfig, load_checkpoint
from wikidpo.sampling import TEMPS, UNIT, sample_k, sample_unit

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
    fast, slow = (sample_k(m, TOK, asked, temps=(.7, 1.3), max_new=20, generator=torch.Generator().manual_seed(3)) for m in (MODEL, Foreign(MODEL, 256)))
    assert fast == slow

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
