"The fast ways to a log-probability against the plain one"
import copy
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from compiler import COMPILER, run_without_compiler
from engines import CFG, MINI, MODELS, TOK, collate, first_pairs, one_step, engine, ragged, value_and_gradient
from wikidpo.core.data import PairBatch, PairDataset
from wikidpo.core.logps import pair_logps
from wikidpo.core.model import Block, causal
from wikidpo.core.train import freeze
from wikidpo.engine import compiled as compiled_module, head as head_module, packed as packed_module
from wikidpo.engine.attention import block_attention
from wikidpo.engine.compiled import try_compiled
from wikidpo.engine.head import ChunkedHead, softmax_and_logps
from wikidpo.engine.scoring import Scoring, TrainingParts
from wikidpo.engine.shared_prompt import WORTH_SHARING, Scorer, read_once
from wikidpo.run.folder import write_jsonl

NATIVE = torch.cpu._is_avx512_bf16_supported()
BF16 = pytest.mark.skipif(not NATIVE, reason="this processor does not multiply in bf16")
LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
score = Scorer()


def assert_same_values_and_gradients(one, other, model, batch, cosine=.9999):
    (a, ga), (b, gb) = value_and_gradient(one, model, batch), value_and_gradient(other, model, batch)
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-6)
    assert F.cosine_similarity(ga.double(), gb.double(), 0) > cosine


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(LENGTHS, min_size=1, max_size=6), st.sampled_from(MODELS), st.randoms(use_true_random=False))
def test_one_forward_with_each_prompt_once_is_two_rows_a_pair(sizes, model, rng):
    assert_same_values_and_gradients(pair_logps, score, model, collate(ragged(sizes, rng)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(LENGTHS, min_size=1, max_size=5), st.integers(0, 40), st.sampled_from(MODELS),
       st.randoms(use_true_random=False))
def test_what_all_prompts_begin_with_is_read_once_for_all_rows(sizes, n, model, rng):
    begin = [rng.randrange(97) for _ in range(n)]

    def longer(side): return begin + side[0], [0] * n + side[1]
    batch = collate([(longer(chosen), longer(rejected)) for chosen, rejected in ragged(sizes, rng)])
    tokens = read_once(batch)
    shared = int(tokens.in_every_row.sum())
    assert shared == 0 or shared >= max(n, WORTH_SHARING)
    assert shared or n < WORTH_SHARING
    read = sum(p + c + r - 2 for p, c, r in sizes) + n * len(sizes) # each prompt once, no response's last token
    assert len(tokens.ids) == read - shared * (len(sizes) - 1)
    assert_same_values_and_gradients(pair_logps, score, model, batch)


@pytest.mark.parametrize("sizes", [
    [(1, 1, 1)], [(60, 200, 1), (3, 1, 200)], [(250, 30, 10), (259, 40, 1), (5, 300, 255)]])
def test_long_single_and_cut_responses(sizes):
    batch = collate(ragged(sizes, random.Random(0)))
    for model in MODELS: assert_same_values_and_gradients(pair_logps, score, model, batch)


def test_200_summed_tokens_agree_on_the_real_model_with_the_definition(tmp_path):
    row = dict(prompt="What is the capital of Peru?", chosen="Lima " * 90, rejected="Rome is in Italy. " * 40)
    write_jsonl(tmp_path/"p.jsonl", [row])
    batch = collate([PairDataset(tmp_path/"p.jsonl", TOK, 256)[0]])
    assert batch.chosen_mask.sum() > 150 and batch.rejected_mask.sum() > 150
    with torch.no_grad():
        fast = torch.cat(score(MINI, batch))
        plain = torch.cat(pair_logps(MINI, batch))
        exact = torch.cat(pair_logps(copy.deepcopy(MINI).double(), batch))
    assert (fast.double() - exact).abs().max() < 1e-3
    assert (fast - plain).abs().max() < 1e-3


def test_rejected_cannot_be_seen_from_chosen_nor_the_other_way_round():
    batch = collate(ragged([(7, 30, 25), (20, 5, 40)], random.Random(1)))

    def noise(ids, mask): return torch.where(mask.bool(), torch.randint(97, ids.shape), ids)

    other_rejected = PairBatch(batch.chosen_ids, batch.chosen_mask,
                               noise(batch.rejected_ids, batch.rejected_mask), batch.rejected_mask)
    other_chosen = PairBatch(noise(batch.chosen_ids, batch.chosen_mask), batch.chosen_mask,
                             batch.rejected_ids, batch.rejected_mask)
    for model in MODELS:
        with torch.no_grad():
            here, new_rejected, new_chosen = (score(model, b) for b in (batch, other_rejected, other_chosen))
        assert torch.equal(here[0], new_rejected[0]) and torch.equal(here[1], new_chosen[1])
        assert not torch.equal(here[1], new_rejected[1]) and not torch.equal(here[0], new_chosen[0])


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_attention_is_attention(T, groups):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 16, requires_grad=True) for heads in (4, groups, groups))
    g, found = torch.randn(2, 4, T, 16), []
    for attend in (block_attention, causal):
        y = attend(q, k, v)
        found.append([y, *torch.autograd.grad(y, (q, k, v), g)])
    for a, b in zip(*found, strict=True): assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_head_in_pieces_is_the_head(n):
    h, labels, weights = torch.randn(n, 32, requires_grad=True), torch.randint(97, (n,)), torch.randn(n)
    model, found = MODELS[0], []
    plain = model.head(h).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    for y in (ChunkedHead(model, 128)(h, labels), plain):
        found.append([y, *torch.autograd.grad((y * weights).sum(), (h, model.embed.weight))])
    for a, b in zip(*found, strict=True): assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_the_head_holds_one_piece_where_nobody_asks_for_a_gradient():
    "Also of a model that is being trained, as when held-out pairs are measured"
    model, held = copy.deepcopy(MODELS[0]), []

    def softmax(z, y, out):
        held.append(out.untyped_storage().nbytes() // (4 * z.shape[1]))
        return softmax_and_logps(z, y, out)

    head, h, labels = ChunkedHead(model, 100, softmax), torch.randn(1000, 32), torch.randint(97, (1000,))
    assert model.embed.weight.requires_grad
    with torch.no_grad(): alone = head(h, labels)
    trained = head(h, labels)
    assert held == [100] * 10 + [1000] * 10 and torch.equal(alone, trained)


def test_bf16_rounds_the_weights_once_and_gives_the_gradient_of_fp32(tmp_path):
    data = first_pairs(tmp_path/"pairs.jsonl", 8)

    def gradient(precision, batch_size):
        cfg = CFG.__class__(**vars(CFG) | {"batch_size": batch_size})
        return one_step(engine(precision), copy.deepcopy(MINI), freeze(MINI), data, range(8), cfg)[0]

    exact = gradient("fp32", 8)
    for batch_size in (8, 4, 1): assert F.cosine_similarity(gradient("bf16", batch_size), exact, 0) > .999


# --- compiled


SIZES = [[(5, 9, 70)], [(30, 100, 90)] * 6, [(250, 30, 10), (259, 40, 1), (5, 255, 254)], [(2, 3, 1)] * 3]


@COMPILER
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_pairs_are_pairs_at_any_length_and_policy_and_reference_stay_equal(precision, compiler):
    rng = random.Random(0)
    for plain in MODELS[:2]:
        model = copy.deepcopy(plain)
        scoring = Scoring(model, freeze(plain), TrainingParts(precision=precision, compiled=True))
        with scoring.put_on(), torch._dynamo.config.patch(error_on_recompile=True):
            assert scoring.compiled and all(p.grad is None for p in model.parameters())
            for sizes in SIZES:
                batch = collate(ragged(sizes, rng))
                if precision == "fp32":
                    (a, ga), (b, gb) = (value_and_gradient(f, m, batch) for f, m in (
                        (score, plain), (lambda _, batch: scoring.policy(batch), model)))
                    assert torch.allclose(a, b, atol=1e-4, rtol=1e-6)
                    assert F.cosine_similarity(ga.double(), gb.double(), 0) > .9999
                with scoring.step_scope():
                    policy = torch.cat(scoring.policy(batch))
                    with torch.no_grad(): ref = torch.cat(scoring.ref(batch))
                assert torch.equal(policy, ref)


WITHOUT_COMPILER = """if True:
    import random, sys
    sys.path.insert(0, sys.argv[1])
    from engines import *
    from wikidpo.core.train import freeze
    from wikidpo.engine.scoring import Scoring, TrainingParts
    scoring = Scoring(MODELS[0], freeze(MODELS[0]), TrainingParts(compiled=True))
    batch = collate(ragged([(7, 30, 25), (20, 5, 40)], random.Random(0)))
    with scoring.put_on(): print(scoring.compiled, scoring.policy(batch)[0].shape)"""


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    done = run_without_compiler(WITHOUT_COMPILER, tmp_path)
    assert done.stdout.strip() == "False torch.Size([2])", done.stderr


def test_a_pytorch_that_does_not_know_an_option_goes_uncompiled():
    says = "goes on without compiled blocks, and slower: Unexpected optimization option no_such_option"
    with pytest.warns(UserWarning, match=says):
        assert try_compiled(Block.forward, lambda f: None, no_such_option=True) is Block.forward


def test_a_compiler_that_fails_late_leaves_no_gradient_behind(monkeypatch):
    model = copy.deepcopy(MODELS[0])
    scoring = Scoring(model, freeze(model), TrainingParts(compiled=True))

    def late(f, **options):
        def run(block, *args):
            if not torch.is_grad_enabled(): return f(block, *args)
            y = f(block, *args)
            y.sum().backward()
            raise RuntimeError("too late")
        return run

    monkeypatch.setattr(compiled_module, "compiled", late)
    with pytest.warns(UserWarning, match="slower: too late"), scoring.put_on(): assert not scoring.compiled
    assert all(p.grad is None for p in model.parameters())


# --- packed copies of the weights


def test_all_copies_for_training_are_in_bf16(monkeypatch):
    "Whatever the processor: one that cannot pack in bf16 is not asked to, so the packing itself stands aside here"
    kinds = []

    def note(weight):
        kinds.append(weight.dtype)
        return weight

    for module in (head_module, packed_module): monkeypatch.setattr(module, "pack_weight", note)
    model = copy.deepcopy(MODELS[0])
    with Scoring(model, freeze(MODELS[0]), TrainingParts(precision="bf16", packed=True)).put_on(): pass
    layers = 4 * len(model.blocks) + 1                            # with the head; the reference's go one way alone
    assert kinds == [torch.bfloat16] * 3 * layers


@BF16
def test_packed_copies_change_no_value_and_no_gradient():
    rng = random.Random(0)
    for plain in MODELS:
        packed = copy.deepcopy(plain)
        scoring = Scoring(packed, freeze(plain), TrainingParts(precision="bf16", packed=True))
        with scoring.put_on():
            for sizes in SIZES[:2] + SIZES[3:]:
                batch = collate(ragged(sizes, rng))
                with scoring.step_scope():
                    a, ga = value_and_gradient(score, plain, batch)
                    b, gb = value_and_gradient(lambda _, batch: scoring.policy(batch), packed, batch)
                    with torch.no_grad(): c = torch.cat(scoring.ref(batch))
                assert torch.allclose(a, b, rtol=1e-3)
                assert F.cosine_similarity(ga.double(), gb.double(), 0) > .9999
                assert ga.dtype == gb.dtype == torch.float32
                assert torch.equal(b, c)                          # the reference has copies for the way there alone


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_what_was_put_on_is_taken_off_in_every_case(error):
    model, ref = copy.deepcopy(MINI), freeze(MINI)
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    try:
        with Scoring(model, ref, TrainingParts(precision="bf16", packed=NATIVE)).put_on():
            if NATIVE: assert [(type(m), sorted(m.__dict__)) for m in model.modules()] != before
            if error: raise error
    except (KeyboardInterrupt, RuntimeError): pass
    for m in (model, ref): assert [(type(x), sorted(x.__dict__)) for x in m.modules()] == before
    copy.deepcopy(model)                                          # a packed weight could not be copied


MEMORY = """if True:
    import resource, sys, torch
    from wikidpo.engine.memory import keep_memory
    if sys.argv[1] == "keep": keep_memory()
    def fill(): torch.empty(2**26).fill_(1.)
    for _ in range(10): fill() # the places settle
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""


def test_memory_that_is_kept_is_not_asked_for_again():
    "Page faults of a tensor of 256 MB that was freed and comes again, in a process of its own"
    def faults(how):
        command = [sys.executable, "-c", MEMORY, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kept, given_back = faults("keep"), faults("give back")
    assert kept < 1000 and (sys.platform != "linux" or given_back > 10 * kept)


def test_warnings_name_the_caller():
    def fail(f): raise RuntimeError("no compiler")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try_compiled(Block.forward, fail)
    assert seen[0].filename == __file__
