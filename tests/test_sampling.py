"The sampler against the plain loop, over random ragged batches"
from collections import Counter
from copy import copy, deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from compiler import COMPILER, run_without_compiler
from engines import MINI, TOK
from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.core.config import UNIT
from wikidpo.core.files import UserError
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.core.sample import generate, sample_k
from wikidpo.engine import accelerate
from wikidpo.engine.accelerate import compile_for_sampling, pick_precision, ready_to_sample
from wikidpo.engine.packed import PackedLinear, pack_for_sampling
from wikidpo.engine.ragged import (WORTH_A_FORWARD, CachedRows, common_beginning, generate_ragged, prompts_that_fit,
                                   rows_for, sample_rows, sample_unit, with_rows)
from wikidpo.models.adopt import Foreign
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.world.facts import DATA, prompts

FEW = st.lists(st.integers(0, 5000), min_size=1, max_size=9)
END = end_id(TOK)


def stream(seed): return torch.Generator().manual_seed(seed)


def ragged(**kw): return partial(generate_ragged, **kw)


def greedy(model, prompt, n):
    """The most likely continuation of one prompt alone, the whole prefix at every step.

    (ids without the end, finished, closest race between two tokens)"""
    ids, race = encode_prompt(TOK, prompt), float("inf")
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            top, token = model(torch.tensor([ids]))[0][0, -1].topk(2)
            race = min(race, (top[0] - top[1]).item())
            if token[0] == END: return ids[start:], True, race
            ids = ids + [token[0].item()]
    return ids[start:], False, race


def agree(response, want):
    "The same tokens, unless two of them were so close that rounding decides"
    return (response.ids, response.finished) == want[:2] or want[2] < 1e-4


def test_rows_that_have_ended_do_not_outgrow_a_learners_model():
    "Seven of eight end and make room for others; the eighth ends a step later, and must not grow with those"
    start, room, end = 40, 24, 5
    read = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, targets=None):
            read.append(ids.shape[1])
            assert ids.shape[1] <= start + room - 1
            logits = torch.zeros(*ids.shape, 9)
            place, late = torch.arange(ids.shape[1]), (ids[:, :1] == 7).long()
            ends = (ids[:, :1] < 8) & (place >= start + 18 + late)
            logits[..., end] = torch.where(ends, 1e4, -1e4)
            return logits, None

    asked = [[min(i, 8)] + [8] * (start - 1) for i in range(16)]  # 8: never ends
    u = torch.full((16, room), .5)
    found = generate_ragged(Model(), asked, torch.ones(16), u, 9, end, batch=8)
    assert max(read) == start + room - 1 and [len(row) for row in found] == [20] * 7 + [21] + [room] * 8


@settings(max_examples=8, deadline=None, derandomize=True)
@given(FEW, st.integers(1, 30), st.sampled_from([None, ragged(), ragged(batch=2)]))
def test_greedy_is_identical_with_and_without_cache_in_any_ragged_batch(picks, max_new, grow):
    asked = [prompts("eval")[i] for i in picks]
    groups = sample_k(MINI, TOK, asked, temps=(0,), max_new=max_new, grow=grow)
    for group, prompt in zip(groups, asked, strict=True): assert agree(group[0], greedy(MINI, prompt, max_new))


def test_every_way_to_grow_rows_says_the_same():
    asked, foreign = prompts("eval")[:5], Foreign(MINI, 256)

    def sample(model, grow): return sample_k(model, TOK, asked, (.7, 1.3), 20, generator=stream(3), grow=grow)

    plain = sample(MINI, generate)
    for grow in (None, ragged(), ragged(batch=2)): assert sample(MINI, grow) == plain
    for grow in (None, ragged(), ragged(batch=2)): assert sample(foreign, grow) == plain


@settings(max_examples=8, deadline=None, derandomize=True)
@given(FEW, st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_a_row_says_the_same_whoever_stands_beside_it(picks, batch, max_new, seed):
    asked = [prompts("eval")[i] for i in picks]
    whole, refilled = (sample_k(MINI, TOK, asked, max_new=max_new, generator=stream(seed), grow=ragged(batch=b))
                       for b in (None, batch))
    assert whole == refilled


class Small(GPT):
    "A model on a card that holds 70 rows"
    def head(self, h):
        if h.dim() == 2 and len(h) > 70: raise torch.OutOfMemoryError
        return super().head(h)


def test_a_unit_is_the_same_in_any_batch_and_after_running_out_of_memory():
    asked, small = prompts("mine")[:60], load_checkpoint(DATA/"model.safetensors")
    small.__class__ = Small

    def unit(model, **kw): return sample_unit(model, TOK, asked, 0, 5, max_new=40, **kw)

    assert unit(MINI) == unit(MINI, batch=7) == unit(small)
    with pytest.raises(UserError, match="71 responses of 4 tokens to one prompt do not fit"):
        sample_k(small, TOK, asked[:2], temps=(1.,) * 71, max_new=4, grow=ragged())


@pytest.mark.parametrize("grow", [None, ragged()])
def test_every_token_of_a_response_is_drawn_from_its_exact_distribution(grow):
    n, temp, start = 3000, 3., encode_prompt(TOK, prompts("eval")[5])
    responses, = sample_k(MINI, TOK, prompts("eval")[5:6], (temp,) * n, 3, generator=stream(1), grow=grow)
    first = Counter(r.ids[0] if r.ids else END for r in responses)
    common = first.most_common(1)[0][0]
    second = Counter((r.ids + [END])[1] for r in responses if r.ids and r.ids[0] == common)
    for prefix, drawn in ((start, first), (start + [common], second)):
        with torch.no_grad(): top, ids = MINI(torch.tensor([prefix]))[0][0, -1].topk(50)
        want, n = dict(zip(ids.tolist(), (top / temp).softmax(-1).tolist(), strict=True)), drawn.total()
        likely = [i for i in want if n * want[i] >= 5]
        chi2 = sum((drawn[i] - n * want[i]) ** 2 / (n * want[i]) for i in likely)
        assert set(drawn) <= set(want) and len(likely) > 3
        assert chi2 < len(likely) + 4 * (2 * len(likely)) ** .5


HEADS = st.sampled_from([(4, 4), (4, 2), (6, 1)])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3), HEADS, st.booleans())
def test_the_cache_is_the_whole_prefix_for_every_shape_of_head(lengths, k, heads, tie):
    torch.manual_seed(sum(lengths))
    model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=heads[0], n_kv_head=heads[1], head_dim=6,
                          n_embd=24, ffn_dim=32, tie=tie, rope_scaling=(4., 1., 4., 8))).eval()
    asked = [torch.randint(50, (n,)).tolist() for n in lengths]
    u = torch.rand(len(asked) * k, 21)
    with torch.no_grad():                                         # no end: 21 tokens each
        tokens = sample_rows(lambda: CachedRows(model, k), asked, torch.ones(len(u)), u, 50, -1, 2)
    for r, row in enumerate(tokens.tolist()): assert_drawn_by(model, asked[r // k], row, u[r])


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("n", [WORTH_A_FORWARD - 1, WORTH_A_FORWARD, 25])
def test_prompts_that_begin_alike_get_the_answers_that_each_gets_alone(heads, n):
    torch.manual_seed(n)
    model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=heads[0], n_kv_head=heads[1], head_dim=6,
                          n_embd=24, ffn_dim=32)).eval()
    begin = torch.randint(50, (n,)).tolist()
    asked = [begin + [i, *torch.randint(50, (size,)).tolist()] for i, size in enumerate((7, 0, 12, 3, 1))]
    assert common_beginning(asked) == n
    assert common_beginning([begin, begin]) == n - 1 # each keeps a token of its own
    u = torch.rand(2 * len(asked), 15)
    found = generate_ragged(model, asked, torch.ones(len(u)), u, 50, -1, 2)
    for r, row in enumerate(found): assert_drawn_by(model, asked[r // 2], row, u[r])


@torch.no_grad()
def test_prompts_are_read_some_at_a_time_with_little_padding():
    asked = [list(range(i, i + 4 + i // 2)) for i in range(100)]  # the shortest first
    read, rows = [], CachedRows(MINI, 2)
    hook = MINI.embed.register_forward_hook(lambda layer, args, out: read.append(args[0].numel()))
    rows.add(asked)
    hook.remove()
    assert len(read) == 4 and sum(read) < 1.3 * sum(map(len, asked)) < .7 * 100 * len(asked[-1])
    first = rows.logits
    rows.append(torch.arange(200) % 90)
    for i in (0, 31, 32, 64, 99):
        alone = MINI(torch.tensor([asked[i] + [2 * i % 90]]))[0][0, -2:]
        assert torch.allclose(torch.stack([first[2 * i], rows.logits[2 * i]]), alone, atol=1e-4)


@torch.no_grad()
def assert_drawn_by(model, prompt, row, u):
    "Each token is the one in whose share of the exact probability its uniform number falls"
    logits = model(torch.tensor([prompt + row]))[0][0, len(prompt) - 1:-1]
    p = logits.softmax(-1).sort(descending=True)
    place = (p.indices == torch.tensor(row)[:, None]).int().argmax(-1, keepdim=True)
    high = p.values.cumsum(-1).gather(1, place)[:, 0]
    low = high - p.values.gather(1, place)[:, 0]
    assert ((u < high + 1e-4) & (u > low - 1e-4)).all()


def test_a_model_that_is_no_gpt_is_sampled_as_it_is():
    other = torch.nn.Linear(2, 2)
    assert ready_to_sample(other) is other


def test_in_bf16_the_logits_are_those_of_fp32_within_rounding():
    half, asked = ready_to_sample(MINI, "bf16"), [encode_prompt(TOK, p) for p in prompts("eval")[:4]]
    assert MINI.embed.weight.dtype is torch.float32
    assert ready_to_sample(MINI).embed.weight.dtype is torch.float32        # a first run says the same everywhere
    with torch.no_grad():
        exact, rough = CachedRows(MINI, 2), CachedRows(half, 2)
        for rows in (exact, rough): rows.add(asked)
        for _ in range(20):
            token = exact.logits.argmax(-1)
            for rows in (exact, rough): rows.append(token)
            assert (exact.logits.softmax(-1) - rough.logits.float().softmax(-1)).abs().max() < .05
    assert pick_precision("fp32", "cpu") == "fp32" and pick_precision("auto", "cpu") in ("fp32", "bf16")


def test_rows_beside_a_teacher_fit_what_is_free():
    cfg, left = GPTConfig(), int(5.3e9)
    n = prompts_that_fit(cfg, left, 100, 256, 4)
    assert 40 < n < 100 and prompts_that_fit(cfg, 2 * left, 100, 256, 4) in (2 * n, 2 * n + 1)
    assert prompts_that_fit(cfg, 1, 100, 256, 4) == 1
    kept = n * (100 + 4 * 256) * 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * 2       # in bf16
    assert kept < .8 * left < 4.3e9


def test_finished_means_the_end_was_said_and_cut_means_it_was_not():
    for grow in (None, ragged()):
        groups = sample_k(MINI, TOK, prompts("mine")[:40], max_new=9, generator=stream(0), grow=grow)
        responses = sum(groups, [])
        assert {r.finished for r in responses} == {True, False}
        assert all(len(r.ids) == 9 for r in responses if not r.finished)
        assert all(len(r.ids) <= 8 for r in responses if r.finished)
        assert all(END not in r.ids and TOK.decode(r.ids) == r.text for r in responses)


def test_temperatures_stand_in_order_and_zero_is_greedy():
    for group in sample_k(MINI, TOK, prompts("eval")[:3], temps=(0, 1.5, 0), max_new=20):
        assert [r.temperature for r in group] == [0, 1.5, 0] and group[0].ids == group[2].ids


def test_top_k_one_is_greedy_and_top_k_beyond_the_vocabulary_is_allowed():
    asked = prompts("eval")[:3]

    def ids(**kw): return [group[0].ids for group in sample_k(MINI, TOK, asked, max_new=12, **kw)]

    assert ids(temps=(1.3,), top_k=1) == ids(temps=(0,))
    assert len(ids(temps=(1.,), top_k=10**6)) == 3


def test_colder_rows_stay_closer_to_the_mode():
    asked = prompts("eval")[:200]
    groups = sample_k(MINI, TOK, asked, temps=(.2, 1.5, 0), max_new=24, generator=stream(0), grow=ragged())

    def like_the_mode(k): return sum(group[k].ids == group[2].ids for group in groups)

    assert like_the_mode(0) > like_the_mode(1) + 40


def test_units_do_not_depend_on_each_other():
    asked = prompts("mine")[:2 * UNIT]

    def unit(i): return sample_unit(MINI, TOK, asked, i, 7, max_new=8)

    second = unit(1)
    unit(0)
    assert unit(1) == second
    torch.manual_seed(99)
    assert unit(1) == second                                      # nor on the global random state


def test_a_prompt_that_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match="leaves no room for 200 new ones in a context of 256: 'Tell me all about the"):
        sample_k(MINI, TOK, ["Tell me all about the ants " * 12], max_new=200)


def test_grouped_heads_sample_like_the_plain_loop():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOK.get_vocab_size(), block_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                          ffn_dim=48)).eval()
    asked = prompts("eval")[:4]
    for grow in (None, ragged()):
        groups = sample_k(model, TOK, asked, temps=(0,), max_new=10, grow=grow)
        for group, prompt in zip(groups, asked, strict=True): assert agree(group[0], greedy(model, prompt, 10))


def test_memory_is_kept_for_a_large_model_alone(monkeypatch):
    kept = []
    monkeypatch.setattr(accelerate, "keep_memory", lambda: kept.append(1))
    ready_to_sample(MINI, "fp32")
    assert not kept
    monkeypatch.setattr(accelerate, "is_large", lambda model: True)
    ready_to_sample(MINI, "fp32")
    assert kept == [1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_a_model_says_the_same_with_packed_weights():
    "In float32: the copy's weights are packed, and the model stays as it was"
    fast, asked = ready_to_sample(MINI, "fp32"), [encode_prompt(TOK, p) for p in prompts("eval")[:20]]
    layers = [block.mlp.down for block in fast.blocks]
    assert all(isinstance(layer, PackedLinear) and layer.weight.dtype == torch.float32 for layer in layers)
    assert all(isinstance(block.mlp.down, nn.Linear) for block in MINI.blocks)
    both = [CachedRows(model, 2) for model in (MINI, fast)]
    for rows in both: rows.add(asked)
    for _ in range(12):
        plain, packed = (rows.logits.log_softmax(-1) for rows in both)
        assert (plain - packed).abs().max() < 1e-4
        for rows in both: rows.append(plain.argmax(-1))
    temp, u = torch.zeros(20), torch.zeros(20, 24)
    assert generate_ragged(fast, asked, temp, u, 50, END) == generate_ragged(MINI, asked, temp, u, 50, END)


def test_another_kind_of_batch_belongs_to_the_copy_alone():
    "The copy shares the weights; the model knows nothing of it"
    made, before = [], {*vars(MINI)}

    class Noted(CachedRows):
        def __init__(self, *args):
            made.append(args[1])
            super().__init__(*args)

    other, asked = with_rows(copy(MINI), Noted), [encode_prompt(TOK, p) for p in prompts("eval")[:3]]
    temp, u = torch.zeros(6), torch.zeros(6, 12)
    assert generate_ragged(other, asked, temp, u, 50, END) == generate_ragged(MINI, asked, temp, u, 50, END)
    assert made == [2] and rows_for(other) is Noted and rows_for(MINI) is CachedRows
    assert type(MINI) is GPT and {*vars(MINI)} == before and other.embed is MINI.embed


NATIVE = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bf16 units")


def small_half(n_kv_head=4, n_layer=3):
    torch.manual_seed(n_kv_head)
    cfg = GPTConfig(vocab_size=97, block_size=128, n_layer=n_layer, n_head=4, n_kv_head=n_kv_head, n_embd=96,
                    ffn_dim=80)
    return GPT(cfg).eval().bfloat16()


@NATIVE
@COMPILER
@pytest.mark.parametrize("n_kv_head", [4, 2])
@torch.no_grad()
def test_compiled_blocks_say_what_plain_ones_say(n_kv_head):
    plain, calls = small_half(n_kv_head), []
    fast = compile_for_sampling(pack_for_sampling(deepcopy(plain)))
    batches = [rows_for(m)(m, 4) for m in (plain, fast)]
    compiled = batches[1].compiled_block

    def counted(block, x, *args):
        calls.append(len(x))
        return compiled(block, x, *args)

    batches[1].compiled_block = counted
    for b in batches: b.add([[7, 8, 9], [5] * 11, [3, 4], list(range(20)), [1, 2, 3], [90]])
    with torch.compiler.set_stance("fail_on_recompile"):              # one block for every size
        for step in range(40):
            for b in batches:
                if step == 5: b.keep(torch.tensor([i for i in range(24) if i % 3]))
                if step == 9: b.add([[11] * 15, [12, 13]])
                if step == 30: b.keep(torch.arange(3))                # too few rows for the compiled path
                b.append(torch.arange(len(b.cache.slot)) % 89 + step)
            assert (batches[0].logits.float() - batches[1].logits.float()).abs().max() < .02
    assert calls == [24] * 15 + [16] * 12 + [24] * 63


WITHOUT_COMPILER = """if True:
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    from test_sampling import *
    model = compile_for_sampling(pack_for_sampling(small_half(n_layer=2)))
    with torch.no_grad():
        b = rows_for(model)(model, 4)
        b.add([[1, 2, 3]] * 5)
        b.append(torch.arange(20))
    print(rows_for(model).__name__, tuple(b.logits.shape))"""


@NATIVE
def test_without_a_compiler_sampling_goes_on_and_says_so(tmp_path):
    done = run_without_compiler(WITHOUT_COMPILER, tmp_path)
    assert done.stdout.strip() == "CachedRows (20, 97)", done.stderr
