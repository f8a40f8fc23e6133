"The engine runs the one loop: the reference asked once, parts put on, runs that go on"
import copy
import math
import threading
from dataclasses import replace

import pytest
import torch

from compiler import COMPILER
from engines import CFG, MINI, TOK, engine, first_pairs, run
from wikidpo.core.data import PairDataset
from wikidpo.core.logps import pair_logps
from wikidpo.core.model import causal, GPT
from wikidpo.core.train import PlainEngine, freeze, step_schedule, train_dpo
from wikidpo.engine import accelerate as accelerate_module, memory, scoring as scoring_module
from wikidpo.engine.accelerate import WORTH_COMPILING, ready_to_sample, training_parts
from wikidpo.engine.packed import LinearWithCopies
from wikidpo.engine.reference_cache import logps_table, tensors_digest, weights_digest
from wikidpo.engine.training import TrainingEngine
from wikidpo.models.adopt import Foreign
from wikidpo.run.folder import write_jsonl

LOGGED = ("loss", "reward/margin", "reward/chosen", "grad_norm")
NATIVE = torch.cpu._is_avx512_bf16_supported()
BF16 = pytest.mark.skipif(not NATIVE, reason="this processor does not multiply in bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return first_pairs(tmp_path_factory.mktemp("pairs")/"pairs.jsonl", 28)


def assert_close_runs(one, other, tol, names=LOGGED):
    for a, b in zip(one, other, strict=True):
        for k in names: assert abs(a[k] - b[k]) < tol * max(1, abs(a[k])), (k, a, b)


def assert_starts_at_ln_2(history):
    assert history[0]["reward/margin"] == 0 and abs(history[0]["loss"] - math.log(2)) < 1e-6


# --- the reference, once


def test_the_engine_gives_the_run_of_the_plain_engine(data):
    plain = run(data, cfg=replace(CFG, epochs=2))
    for kw in (dict(), dict(cached=False)):
        fast = run(data, engine(**kw), replace(CFG, epochs=2))
        assert_close_runs(plain, fast, 1e-5)
        assert_starts_at_ln_2(fast)


@pytest.mark.parametrize("cached", [True, False])
def test_batches_prepared_ahead_give_the_same_run(data, cached):
    "Also of a learner's own model, whose batches are not listed"
    for model in (MINI, Foreign(MINI, 256)):
        now, ahead = (run(data, engine(changes=dict(prefetch=on), cached=cached), replace(CFG, epochs=2), model)
                      for on in (False, True))
        assert now == ahead


def test_a_run_that_ends_early_prepares_no_more(data):
    class Stop(Exception): pass

    def stop(metrics): raise Stop
    e = engine(changes=dict(prefetch=True))
    before = threading.active_count()
    with pytest.raises(Stop): run(data, e, callbacks=[stop])
    assert next(e.ahead, None) is None and threading.active_count() == before


@pytest.mark.parametrize("precision, tol", [("fp32", 1e-5), ("bf16", .02)])
def test_a_run_with_the_cache_is_the_run_without(data, tmp_path, precision, tol):
    cfg = replace(CFG, epochs=2)
    if precision == "bf16" and not NATIVE: data, _ = data.split(len(data) - 8)    # emulated, a step takes seconds
    live = run(data, engine(precision, cached=False), cfg)
    made, found = (run(data, engine(precision, cache=tmp_path), cfg) for _ in range(2))
    assert made == found and len(list(tmp_path.iterdir())) == 1
    assert_close_runs(live, made, tol, ("loss", "reward/margin", "reward/chosen", "lr"))
    assert_starts_at_ln_2(live)
    assert_starts_at_ln_2(made)


def test_the_cache_moves_neither_the_random_state_nor_the_order(data, tmp_path):
    class Watching(PairDataset):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    watching, orders = copy.copy(data), []
    watching.__class__ = Watching
    for kw in (dict(cached=False), dict(cache=tmp_path), dict(cache=tmp_path)):
        seen, before = [], torch.random.get_rng_state()
        run(watching, engine(**kw), replace(CFG, epochs=2))
        assert torch.equal(before, torch.random.get_rng_state())
        orders.append(seen[-2 * len(data):])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(2 * list(range(len(data))))


class Table:
    "The reference tables of some runs, and the files in which they are kept"
    def __init__(self, folder, data): self.folder, self.data = folder, data

    def __call__(self, model=MINI, data=None, precision="fp32", **kw):
        data, cfg = data or self.data, replace(CFG, **kw)
        e = engine(precision, cache=self.folder)
        with e.running(copy.deepcopy(MINI), model, data, step_schedule(len(data), cfg), cfg): return e.table

    @property
    def files(self): return len(list(self.folder.iterdir()))


def test_the_cache_belongs_to_one_reference_one_set_of_pairs_one_tokenizer_one_precision(data, tmp_path):
    table = Table(tmp_path, data)
    first = table()
    for kw in (dict(beta=.5), dict(lr=1e-5), dict(epochs=3), dict(loss_type="ipo")):      # a sweep asks once
        assert torch.equal(table(**kw), first) and table.files == 1
    moved = copy.deepcopy(MINI)
    with torch.no_grad(): moved.norm.weight[0] = torch.nextafter(moved.norm.weight[0], torch.tensor(9.))
    table(moved)
    assert table.files == 2                                       # one bit of one weight
    rows = tmp_path.parent/"rows.jsonl"
    write_jsonl(rows, [data.pairs[0] | {"chosen": "Something else."}, *data.pairs[1:]])
    other = table(data=PairDataset(rows, TOK, 256))
    assert table.files == 3 and not torch.equal(other[0], first[0])
    assert torch.allclose(other[1:], first[1:], atol=1e-4)
    write_jsonl(rows, data.pairs)
    tok = copy.deepcopy(TOK)
    tok.add_tokens(["<another>"])
    table(data=PairDataset(rows, tok, 256))
    assert table.files == 4
    table(precision="bf16")
    assert table.files == 5


@pytest.mark.parametrize("change", [
    dict(rope_theta=500.), dict(norm_eps=1e-3), dict(rope_scaling=(8., 1., 4., 64))])
def test_the_cache_belongs_to_one_configuration(data, tmp_path, change):
    "The same weights, read with another one, give other numbers"
    table, other = Table(tmp_path, data), GPT(replace(MINI.cfg, **change)).eval()
    other.load_state_dict(MINI.state_dict())
    assert not torch.allclose(table(), table(other), atol=1e-3) and table.files == 2


@pytest.mark.parametrize("part", [dict(attention=causal), dict(chunk=7)])
def test_the_cache_belongs_to_the_parts_that_were_put_on(data, tmp_path, part):
    run(data, engine(cache=tmp_path))
    assert_starts_at_ln_2(run(data, engine(changes=part, cache=tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_is_what_is_read(data, tmp_path):
    honest = run(data, engine(cache=tmp_path))
    path, = tmp_path.iterdir()
    table = torch.load(path)["table"] + torch.tensor([5., 0.])
    torch.save({"table": table, "digest": tensors_digest({path.name: table})}, path)
    lied = run(data, engine(cache=tmp_path))
    assert lied[0]["reward/chosen"] == pytest.approx(honest[0]["reward/chosen"] - .5, abs=1e-5)


def test_the_table_of_the_first_epoch_counts_every_pair_once(data):
    e = engine()
    cfg = replace(CFG, epochs=2)
    schedule = step_schedule(len(data), cfg)
    with e.running(copy.deepcopy(MINI), MINI, data, schedule, cfg):
        groups = [group for pair_ids in schedule[:len(schedule) // 2] for group in e.groups(pair_ids)]
        table = e.table
    assert sorted(i for group in groups for i in group) == list(range(len(data)))
    alone = logps_table(lambda batch: pair_logps(MINI, batch), data, [[i] for i in range(len(data))])
    assert torch.allclose(table, alone, atol=1e-4)


def test_digest_sees_every_weight():
    seen = {weights_digest(MINI)}
    for name in MINI.state_dict():
        model = copy.deepcopy(MINI)
        model.state_dict()[name].view(-1)[-1] += 1e-3
        seen.add(weights_digest(model))
    assert len(seen) == 1 + len(MINI.state_dict())


# --- parts put on


def test_a_short_run_on_a_gpu_is_not_compiled(monkeypatch):
    large = GPT(replace(MINI.cfg, vocab_size=32768, n_embd=640))
    short, long = WORTH_COMPILING - 1, WORTH_COMPILING
    assert training_parts(large, "fp32", tokens=short).compiled                  # on a CPU seconds, and worth it
    monkeypatch.setattr(accelerate_module, "device_of", lambda model: "cuda")
    assert [training_parts(large, "fp32", tokens=n).compiled for n in (short, long, math.inf)] == [False, True, True]
    assert not training_parts(MINI, "fp32").compiled


def test_an_engine_is_told_how_many_tokens_it_reads(data):
    seen = []

    def choose(policy, tokens):
        seen.append(tokens)
        return training_parts(policy, "fp32")
    run(data, TrainingEngine(choose), replace(CFG, epochs=2))
    assert seen == [2 * sum(len(prompt) + len(a) + len(b) for prompt, a, b in data.rows)]


@COMPILER
@pytest.mark.parametrize("cached", [True, False])
def test_a_compiled_run_is_the_run(data, tmp_path, compiler, cached):
    cfg, policy = replace(CFG, epochs=2), copy.deepcopy(MINI)
    plain = run(data, engine(cache=tmp_path, cached=cached), cfg)
    compiled = engine(changes=dict(compiled=True), cache=tmp_path, cached=cached)
    fast = train_dpo(policy, freeze(policy), data, cfg, compiled)
    assert compiled.scoring.compiled
    assert_starts_at_ln_2(fast)
    assert_close_runs(plain, fast, 1e-3)
    assert len(list(tmp_path.iterdir())) == 2 * cached            # what a compiled reference said has a name of its own


@BF16
@pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=COMPILER)])
def test_a_run_with_packed_copies_is_the_run_and_leaves_none(data, compiler, compiling):
    cfg, policy, seen = replace(CFG, epochs=2, lr=1e-3), copy.deepcopy(MINI), []
    plain = run(data, engine("bf16"), cfg)

    def look(metrics):                                            # between two steps: the copies are of that moment
        layers = [m for m in policy.modules() if isinstance(m, LinearWithCopies)]
        seen.append(bool(layers) and all(torch.equal(m.copies[0].to_dense(), m.weight.bfloat16()) for m in layers))

    packed = engine("bf16", dict(packed=True, compiled=compiling))
    fast = train_dpo(policy, freeze(policy), data, cfg, packed, [look])
    assert_starts_at_ln_2(fast)
    assert all(seen) and len(seen) == len(fast)
    assert_close_runs(plain, fast, .02, ("loss", "reward/margin", "grad_norm"))
    assert not any(isinstance(m, LinearWithCopies) for m in policy.modules())
    copy.deepcopy(policy)                                         # a packed weight could not be copied


class Stop(Exception): pass


def stop_in_the_middle(data, cfg, policy, state, **kw):
    "A run that saves every step and is stopped behind its middle"
    e = engine(**kw, state=state)
    middle = len(step_schedule(len(data), cfg)) // 2

    def save_and_stop(metrics):
        if metrics["step"] <= middle: e.save()
        else: raise Stop

    with pytest.raises(Stop): train_dpo(policy, freeze(MINI), data, cfg, e, [save_and_stop])


@pytest.mark.parametrize("kw", [
    dict(), pytest.param(dict(precision="bf16", changes=dict(packed=True)), marks=BF16)])
def test_a_run_that_was_stopped_goes_on_and_packs_the_weights_it_loads(data, tmp_path, kw):
    cfg, stopped, before = replace(CFG, epochs=2, lr=1e-3), copy.deepcopy(MINI), []
    whole = run(data, engine(**kw), cfg)
    stop_in_the_middle(data, cfg, stopped, tmp_path/"state.pt", **kw)
    assert not any(isinstance(m, LinearWithCopies) for m in stopped.modules())
    assert ready_to_sample(stopped, "bf16") is not stopped        # it can be sampled from, by the weights that it has
    again = engine(**kw, state=tmp_path/"state.pt", on_resume=before.append)
    assert run(data, again, cfg) == whole
    assert before == whole[:len(whole) // 2]


class Noted:
    "In place of `KeptMemory`: what is asked of it"
    asked: list[str] = []
    def __init__(self): self.asked.append("keep")
    def after_step(self): self.asked.append("step")


def test_a_large_model_alone_keeps_memory(data, monkeypatch):
    monkeypatch.setattr(scoring_module, "KeptMemory", Noted)
    run(data, engine())
    assert not Noted.asked
    history = run(data, engine(changes=dict(keep_memory=True)))
    assert Noted.asked == ["keep"] + ["step"] * len(history)


def test_memory_that_has_grown_by_a_quarter_is_given_back(monkeypatch):
    held, given_back = iter([9, 100, 125, 126, 99, 126, 127, 150, 157, 99]), []
    monkeypatch.setattr(memory, "keep_memory", lambda: None)
    monkeypatch.setattr(memory, "held_memory", lambda: next(held))
    kept = memory.KeptMemory()
    monkeypatch.setattr(memory, "give_back_memory", lambda: given_back.append(kept.steps))
    for _ in range(10): kept.after_step()
    assert given_back == [4, 6, 7, 9] # after the second in a row as much is needed: 156 are allowed


def test_the_plain_engine_and_this_one_answer_the_same_questions():
    asked = {name for name in vars(PlainEngine) if not name.startswith("_")}
    assert asked <= set(dir(engine()))
