"The fast paths of a training step against the slow ones, and the reference that is asked once"
import copy, json, math, os, shutil, subprocess, sys
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from wikidpo.chat import load_tokenizer
from wikidpo.files import read_jsonl, write_jsonl
from wikidpo.logprobs import PairDataset, causal_attention, collate, label_logprob, pair_logprob, score_pairs, seq_logprob, weights_digest
from wikidpo.miniwiki import DATA
from wikidpo import model as model_module, training
from wikidpo.sampling import sampler
from wikidpo.model import GPT, Block, GPTConfig, load_checkpoint
from wikidpo.training import TrainConfig, compile_step, dpo, dpo_step, forwards, freeze, reference, step_order

TOK, MINI = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
CFG = TrainConfig(lr=3e-4, batch_size=4, grad_accum_steps=2, warmup_steps=1, seed=0, precision="fp32")

def make(**kw):
    "A random model whose weights are large enough for attention to matter"
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(dict(vocab_size=97, block_size=260, n_layer=2, n_head=4, n_embd=32, ffn_dim=48) | kw))).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)
    return model

MODELS = [make(), make(n_kv_head=2, tie=False), make(n_kv_head=1, head_dim=6)]

def plain(model, c, cm, r, rm): return seq_logprob(model, torch.cat([c, r]), torch.cat([cm, rm])).chunk(2)

def value_and_gradient(f, model, batch):
    model.zero_grad()
    c, r = f(model, *batch)
    ((c - .7 * r) * torch.arange(1, len(c) + 1)).sum().backward()
    return torch.cat([c, r]).detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

def ragged(sizes, rng, context=260):
    "Pairs of given (prompt, chosen, rejected) lengths, cut at the context as PairDataset cuts them"
    def side(p, n): return (p + [rng.randrange(97) for _ in range(n)])[:context], ([0] * len(p) + [1] * n)[:context]
    return [(side(p, c), side(p, r)) for p, c, r in (([rng.randrange(97) for _ in range(a)], b, d) for a, b, d in sizes)]

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.sampled_from(MODELS), st.randoms(use_true_random=False))
def test_one_forward_with_each_prompt_once_is_two_rows_a_pair(sizes, model, rng):
    batch = collate(ragged(sizes, rng))
    (a, ga), (b, gb) = (value_and_gradient(f, model, batch) for f in (plain, pair_logprob))
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-6) and F.cosine_similarity(ga.double(), gb.double(), 0) > .9999

@pytest.mark.parametrize("sizes", [[(1, 1, 1)], [(60, 200, 1), (3, 1, 200)], [(250, 30, 10), (259, 40, 1), (5, 300, 255)]])
def test_long_single_and_cut_responses(sizes):
    import random
    batch = collate(ragged(sizes, random.Random(0)))
    for model in MODELS:
        (a, ga), (b, gb) = (value_and_gradient(f, model, batch) for f in (plain, pair_logprob))
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-6) and F.cosine_similarity(ga.double(), gb.double(), 0) > .9999

def test_200_summed_tokens_agree_on_the_real_model_with_the_definition(tmp_path):
    row = dict(prompt="What is the capital of Peru?", chosen="Lima " * 90, rejected="Rome is in Italy. " * 40)
    write_jsonl(tmp_path/"p.jsonl", [row])
    batch = collate([PairDataset(tmp_path/"p.jsonl", TOK, 256)[0]])
    assert batch[1].sum() > 150 and batch[3].sum() > 150
    with torch.no_grad(): fast, slow = torch.cat(pair_logprob(MINI, *batch)), torch.cat(plain(copy.deepcopy(MINI).double(), *batch))
    assert (fast.double() - slow).abs().max() < 1e-3 and (fast - torch.cat(plain(MINI, *batch))).abs().max() < 1e-3

def test_rejected_cannot_be_seen_from_chosen_nor_the_other_way_round():
    import random
    c, cm, r, rm = collate(ragged([(7, 30, 25), (20, 5, 40)], random.Random(1)))
    noise = lambda ids, mask: torch.where(mask.bool(), torch.randint(97, ids.shape), ids)
    for model in MODELS:
        with torch.no_grad():
            here, other_r, other_c = (pair_logprob(model, *b) for b in ((c, cm, r, rm), (c, cm, noise(r, rm), rm), (noise(c, cm), cm, r, rm)))
        assert torch.equal(here[0], other_r[0]) and torch.equal(here[1], other_c[1])
        assert not torch.equal(here[1], other_r[1]) and not torch.equal(here[0], other_c[0])

@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_block_attention_is_attention(T):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3))
    g, found = torch.randn(2, 3, T, 16), []
    for f in (lambda: causal_attention(q, k, v, fused=False), lambda: causal_attention(q, k, v, fused=True)): found.append([(y := f()), *torch.autograd.grad(y, (q, k, v), g)])
    for a, b in zip(*found): assert torch.allclose(a, b, atol=1e-5)

@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_head_in_pieces_is_the_head(n):
    h, labels, w = torch.randn(n, 32, requires_grad=True), torch.randint(97, (n,)), torch.randn(n)
    model, found = MODELS[0], []
    for f in (lambda: label_logprob(model, h, labels), lambda: model.head(h).log_softmax(-1).gather(-1, labels[:, None])[:, 0]):
        found.append([(y := f()), *torch.autograd.grad((y * w).sum(), (h, model.embed.weight))])
    for a, b in zip(*found): assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)

def test_bf16_rounds_the_weights_once_and_gives_the_gradient_of_fp32(data):
    def gradient(precision, *sizes):
        model, rows, at = copy.deepcopy(MINI), [data[i] for i in range(8)], [0]
        for n in sizes: at.append(at[-1] + n)
        dpo_step(model, MINI, [collate(rows[a:b]) for a, b in zip(at, at[1:])], replace(CFG, precision=precision))
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = gradient("fp32", 8)
    for sizes in ((8,), (4, 4), (1,) * 8): assert F.cosine_similarity(gradient("bf16", *sizes), exact, 0) > .999

# --- the reference, once

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")/"pairs.jsonl"
    write_jsonl(path, read_jsonl(DATA/"pairs.jsonl")[:28])
    return PairDataset(path, TOK, 256)

def run(data, cache=None, model=MINI, **kw):
    policy = copy.deepcopy(model)
    return dpo(policy, freeze(policy), data, replace(CFG, **kw), cache=cache)

@pytest.mark.parametrize("precision, tol", [("fp32", 1e-5), ("bf16", .02)])
def test_a_run_with_the_cache_is_the_run_without(data, tmp_path, precision, tol):
    live = run(data, reference="live", epochs=2, precision=precision)
    made, found = (run(data, tmp_path, epochs=2, precision=precision) for _ in range(2))
    assert made == found and len(list(tmp_path.iterdir())) == 1
    for a, b in zip(live, made):
        for k in ("loss", "reward/margin", "reward/chosen", "lr"): assert abs(a[k] - b[k]) < tol * max(1, abs(a[k])), (k, a, b)
    assert made[0]["reward/margin"] == live[0]["reward/margin"] == 0 and abs(made[0]["loss"] - math.log(2)) < 1e-6

def test_the_cache_moves_neither_the_random_state_nor_the_order(data, tmp_path):
    class Watching(PairDataset):
        def __getitem__(self, i): seen.append(i); return super().__getitem__(i)
    watching, orders = copy.copy(data), []
    watching.__class__ = Watching
    for kw in (dict(reference="live"), dict(cache=tmp_path), dict(cache=tmp_path)):
        seen, before = [], torch.random.get_rng_state()
        run(watching, epochs=2, **kw)
        assert torch.equal(before, torch.random.get_rng_state())
        orders.append(seen[-2 * len(data):])
    assert orders[0] == orders[1] == orders[2] and sorted(orders[0]) == sorted(2 * list(range(len(data))))

def test_the_cache_belongs_to_one_reference_one_set_of_pairs_one_tokenizer_one_precision(data, tmp_path):
    table = lambda model=MINI, data=data, **kw: reference(model, data, replace(CFG, **kw), step_order(len(data), replace(CFG, **kw)), tmp_path)
    files = lambda: len(list(tmp_path.iterdir()))
    first = table()
    for kw in (dict(beta=.5), dict(lr=1e-5), dict(epochs=3), dict(loss_type="ipo")): assert torch.equal(table(**kw), first) and files() == 1       # a sweep asks once
    moved = copy.deepcopy(MINI)
    with torch.no_grad(): moved.norm.weight[0] = torch.nextafter(moved.norm.weight[0], torch.tensor(9.))
    table(moved); assert files() == 2                                            # one bit of one weight
    rows = tmp_path.parent/"rows.jsonl"
    write_jsonl(rows, [data.pairs[0] | {"chosen": "Something else."}, *data.pairs[1:]])
    other = table(data=PairDataset(rows, TOK, 256)); assert files() == 3
    assert not torch.equal(other[0], first[0]) and torch.allclose(other[1:], first[1:], atol=1e-4)
    write_jsonl(rows, data.pairs); tok = copy.deepcopy(TOK); tok.add_tokens(["<another>"])
    table(data=PairDataset(rows, tok, 256)); assert files() == 4
    table(precision="bf16"); assert files() == 5

def test_the_cache_is_what_is_read(data, tmp_path):
    honest = run(data, tmp_path)
    path, = tmp_path.iterdir()
    torch.save(torch.load(path) + torch.tensor([5., 0.]), path)
    assert run(data, tmp_path)[0]["reward/chosen"] == pytest.approx(honest[0]["reward/chosen"] - .5, abs=1e-5)

def test_reference_of_the_first_epoch_counts_every_pair_once(data):
    order = step_order(len(data), replace(CFG, epochs=2))
    flat = [i for pairs in order[:len(order) // 2] for f in forwards(data, pairs, CFG) for i in f]
    assert sorted(flat) == list(range(len(data)))
    one_by_one = score_pairs(MINI, data, [[i] for i in range(len(data))])
    assert torch.allclose(reference(MINI, data, CFG, order), one_by_one, atol=1e-4)

def test_digest_sees_every_weight():
    seen = {weights_digest(MINI)}
    for name in MINI.state_dict():
        model = copy.deepcopy(MINI)
        model.state_dict()[name].view(-1)[-1] += 1e-3
        seen.add(weights_digest(model))
    assert len(seen) == 1 + len(MINI.state_dict())

def test_memory_that_is_kept_is_not_asked_for_again():
    "Page faults of a tensor of 256 MB that was freed and comes again, in a process of its own, with and without `keep_memory`"
    code = """if True:
        import resource, sys, torch
        from wikidpo.model import keep_memory
        if sys.argv[1] == "keep": keep_memory()
        fill = lambda: torch.empty(2**26).fill_(1.)
        for _ in range(10): fill() # the places settle
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fill()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout) for how in ("keep", "give back")}
    assert faults["keep"] < 1000 and (sys.platform != "linux" or faults["give back"] > 10 * faults["keep"])

# --- compiled

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")

@pytest.fixture
def compiler():
    torch._dynamo.reset()                                                         # other tests compiled other models: at some number of them PyTorch stops
    yield
    torch._dynamo.reset()

@COMPILER
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_pairs_are_pairs_at_any_length_and_policy_and_reference_stay_equal(precision, compiler):
    import random
    rng, cfg = random.Random(0), replace(CFG, precision=precision)
    for plain in MODELS[:2]:
        model, ref = copy.deepcopy(plain), freeze(plain)
        compile_step(model, ref, cfg)
        assert model.compiled is ref.compiled is not None and all(p.grad is None for p in model.parameters())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for sizes in ([(5, 9, 70)], [(30, 100, 90)] * 6, [(250, 30, 10), (259, 40, 1), (5, 255, 254)], [(2, 3, 1)] * 3):
                batch = collate(ragged(sizes, rng))
                if precision == "fp32":
                    (a, ga), (b, gb) = (value_and_gradient(pair_logprob, m, batch) for m in (plain, model))
                    assert torch.allclose(a, b, atol=1e-4, rtol=1e-6) and F.cosine_similarity(ga.double(), gb.double(), 0) > .9999
                said = dpo_step(model, ref, [batch], cfg)
                assert said["reward/margin"] == 0 and abs(said["loss"] - math.log(2)) < 1e-6

@COMPILER
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_a_compiled_run_is_the_run(data, tmp_path, monkeypatch, compiler, reference):
    plain = run(data, tmp_path, epochs=2, reference=reference)
    monkeypatch.setattr(training, "large", lambda model: True); monkeypatch.setattr(training, "keep_memory", lambda: None)
    used, compiled = [], model_module.compiled
    monkeypatch.setattr(model_module, "compiled", lambda f, **kw: used.append(f) or compiled(f, **kw))
    policy = copy.deepcopy(MINI)
    fast = dpo(policy, freeze(policy), data, replace(CFG, epochs=2, reference=reference), cache=tmp_path)
    assert used == [Block.forward] * 2 and policy.compiled is None
    assert fast[0]["reward/margin"] == 0 and abs(fast[0]["loss"] - math.log(2)) < 1e-6
    for a, b in zip(plain, fast, strict=True):
        for k in ("loss", "reward/margin", "reward/chosen", "grad_norm"): assert abs(a[k] - b[k]) < 1e-3 * max(1, abs(a[k])), (k, a, b)
    assert len(list(tmp_path.iterdir())) == 2 * (reference == "cached")           # what a compiled reference said has a name of its own

# --- packed copies of the weights

BF16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply in bf16")

@BF16
def test_packed_copies_change_no_value_and_no_gradient():
    import random
    rng = random.Random(0)
    for plain in MODELS:
        packed, ref = copy.deepcopy(plain), freeze(plain)
        for m in (packed, ref): model_module.pack_copies(m)
        for sizes in ([(5, 9, 70)], [(30, 100, 90)] * 6, [(2, 3, 1)] * 3):
            batch = collate(ragged(sizes, rng))
            with torch.autocast("cpu", torch.bfloat16):
                (a, ga), (b, gb) = (value_and_gradient(pair_logprob, m, batch) for m in (plain, packed))
                with torch.no_grad(): c = torch.cat(pair_logprob(ref, *batch))
            assert torch.allclose(a, b, rtol=1e-3) and F.cosine_similarity(ga.double(), gb.double(), 0) > .9999 and ga.dtype == gb.dtype == torch.float32
            assert torch.equal(b, c)                                              # the reference has copies for the way there alone

@BF16
@pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=COMPILER)])
def test_a_run_with_packed_copies_is_the_run_and_leaves_none(data, tmp_path, monkeypatch, compiler, compiling):
    cfg, packed, many = replace(CFG, epochs=2, precision="bf16", lr=1e-3), [], model_module.pack_copies
    policy = copy.deepcopy(MINI)
    plain = dpo(policy, freeze(policy), data, cfg)
    monkeypatch.setattr(training, "large", lambda model: True); monkeypatch.setattr(training, "keep_memory", lambda: None)
    if not compiling: monkeypatch.setattr(training, "compile_step", lambda *args: None)
    monkeypatch.setattr(training, "pack_copies", lambda m, wanted=True: packed.append((m, wanted)) or many(m, wanted))
    policy, ref, seen = copy.deepcopy(MINI), freeze(MINI), []
    def look(m): seen.append(all(torch.equal(layer.copies[0].to_dense(), layer.weight.bfloat16()) for layer in policy.modules() if isinstance(layer, model_module.Linear)))
    fast = dpo(policy, ref, data, cfg, look)
    assert fast[0]["reward/margin"] == 0 and [m for m, wanted in packed if wanted] == [policy, ref] + [policy] * len(fast)
    assert all(seen) and len(seen) == len(fast)                                   # who looks between two steps sees the weights of that moment
    for a, b in zip(plain, fast, strict=True):
        for k in ("loss", "reward/margin", "grad_norm"): assert abs(a[k] - b[k]) < .02 * max(1, abs(a[k])), (k, a, b)
    for m in (policy, ref): assert m.copies is None and all(layer.copies is None for layer in m.modules() if isinstance(layer, model_module.Linear))
    copy.deepcopy(policy)                                                         # a packed weight could not be copied

@BF16
def test_a_run_that_goes_on_packs_the_weights_it_loads(data, tmp_path, monkeypatch, compiler):
    monkeypatch.setattr(training, "large", lambda model: True); monkeypatch.setattr(training, "keep_memory", lambda: None); monkeypatch.setattr(training, "compile_step", lambda *args: None)
    cfg, policy = replace(CFG, epochs=2, precision="bf16", lr=1e-3, save_every=1), copy.deepcopy(MINI)
    whole = dpo(policy, freeze(policy), data, cfg)
    class Stop(Exception): pass
    def stop(m):
        if m["step"] == len(whole) // 2 + 1: raise Stop
    stopped = copy.deepcopy(MINI)
    with pytest.raises(Stop): dpo(stopped, freeze(MINI), data, cfg, stop, tmp_path/"state.pt")
    assert stopped.copies is None and sampler(stopped, "bf16").copies is None     # it can be sampled from, by the weights that it has
    assert dpo(copy.deepcopy(MINI), freeze(MINI), data, cfg, state=tmp_path/"state.pt") == whole

def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    code = """if True:
        import sys; sys.path.insert(0, sys.argv[1])
        from test_logprobs import *
        model, ref = MODELS[0], freeze(MODELS[0])
        import random
        rows = ragged([(7, 30, 25), (20, 5, 40)], random.Random(0))
        compile_step(model, ref, CFG)
        print(model.compiled, ref.compiled, dpo_step(model, ref, [collate(rows)], CFG)["reward/margin"])"""
    said = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], capture_output=True, text=True, env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert said.stdout.strip() == "None None 0.0", said.stderr
    assert "goes on without compiled blocks, and slower: InvalidCxxCompiler: No working C++ compiler found" in said.stderr

def test_a_pytorch_that_does_not_know_an_option_trains_uncompiled():
    model = copy.deepcopy(MINI)
    with pytest.warns(UserWarning, match="goes on without compiled blocks, and slower: Unexpected optimization option no_such_option"):
        model_module.try_compiled([model], lambda: None, no_such_option=True)
    assert model.compiled is None

def test_a_compiler_that_fails_late_leaves_no_gradient_behind(monkeypatch):
    model, ref = copy.deepcopy(MODELS[0]), freeze(MODELS[0])
    def late(*args): step(*args); raise RuntimeError("too late")
    step = training.dpo_step
    monkeypatch.setattr(training, "dpo_step", late); monkeypatch.setattr(model_module, "compiled", lambda f, **kw: f)
    with pytest.warns(UserWarning, match="goes on without compiled blocks, and slower: too late"): compile_step(model, ref, CFG)
    assert model.compiled is ref.compiled is None and all(p.grad is None for p in model.parameters())
