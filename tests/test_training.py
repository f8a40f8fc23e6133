"The training traps, each with the number that betrays it"
import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import wandb
from hypothesis import given, settings, strategies as st

from engines import CFG, MINI, TOK, engine, first_pairs, one_step, run
from wikidpo.core.chat import encode_prompt, end_id
from wikidpo.core.data import PairDataset, collate, pad_right
from wikidpo.core.files import UserError, read_jsonl
from wikidpo.core.logps import seq_logprob
from wikidpo.core.train import PlainEngine, accumulate, freeze, lr_at, set_lr
from wikidpo.engine.accelerate import training_parts
from wikidpo.engine.scoring import Scoring, TrainingParts
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.run.config import PolicyConfig, RunTrainConfig
from wikidpo.run.folder import write_jsonl
from wikidpo.run.train import hold_out, MarginWatcher, start_wandb, summarise, train, Validation, Watched
from wikidpo.world.facts import DATA

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
BASE = RunTrainConfig(lr=3e-4, batch_size=8, grad_accum_steps=2, warmup_steps=1, seed=0, precision="fp32",
                      wandb="disabled")
PLAIN = replace(CFG, batch_size=8)
ENGINES = [lambda: None, engine, lambda: engine(cached=False), lambda: engine("bf16")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return first_pairs(tmp_path_factory.mktemp("pairs")/"pairs.jsonl", 44)


def by_definition(model, prompt, response):
    "Sum of log-probabilities with a plain Python loop over the tokens, in float64"
    logps = model(torch.tensor([prompt + response]))[0][0].double().log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, t].item() for i, t in enumerate(response))


LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 40))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(LENGTHS, min_size=1, max_size=5), st.integers(0, 9), st.randoms(use_true_random=False))
def test_seq_logprob_is_the_definition_for_any_ragged_batch(sizes, extra, rng):
    def tokens(n): return [rng.randrange(4, 2000) for _ in range(n)]
    rows = [(tokens(p), tokens(r)) for p, r in sizes]
    ids, _ = pad_right([p + r for p, r in rows])
    mask, _ = pad_right([[0] * len(p) + [1] * len(r) for p, r in rows])
    with torch.no_grad():
        found = seq_logprob(MINI, F.pad(ids, (0, extra)), F.pad(mask, (0, extra)))
        want = torch.tensor([by_definition(MINI, *row) for row in rows], dtype=torch.double)
    assert torch.allclose(found.double(), want, atol=1e-3, rtol=1e-5)


def test_sampled_ids_are_what_is_trained_on(data):
    for pair, (prompt, chosen, rejected) in zip(data.pairs, data.rows, strict=True):
        assert prompt == encode_prompt(TOK, pair["prompt"])
        assert chosen == pair["chosen_tokens"] + [end_id(TOK)] * pair["chosen_finished"]
        assert rejected == pair["rejected_tokens"] + [end_id(TOK)] * pair["rejected_finished"]


def test_pad_equal_to_end_does_not_mask_the_real_end(data):
    batch = collate([data[i] for i in range(8)])
    ids, mask = batch.chosen_ids, batch.chosen_mask
    assert (mask.sum(1) == torch.tensor([len(data.rows[i][1]) for i in range(8)])).all()
    lengths = torch.tensor([len(data[i][0][0]) for i in range(8)])
    padded_with_end = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, end_id(TOK))
    with torch.no_grad():
        a, b = seq_logprob(MINI, ids, mask), seq_logprob(MINI, padded_with_end, mask)
    assert torch.allclose(a, b, atol=1e-4)


def test_changing_rejected_leaves_chosen_alone(data):
    batch = collate([data[0], data[1]])
    _, mask = batch.rows()

    def chosen(rejected_ids):
        return seq_logprob(MINI, torch.cat([batch.chosen_ids, rejected_ids]), mask)[:2]

    noise = torch.randint_like(batch.rejected_ids, 4, 2000)
    with torch.no_grad(): assert torch.allclose(chosen(batch.rejected_ids), chosen(noise), atol=1e-5)


def test_bf16_logits_are_summed_in_float32():
    "200 summed tokens: bf16 all the way drifts by tenths of a nat, upcast first does not"
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 32768).bfloat16(), torch.randint(32768, (200,))

    class Fixed(torch.nn.Module):
        def forward(self, ids, targets): return F.pad(logits, (0, 0, 0, 1))[None], None

    ids = F.pad(labels, (1, 0))[None]
    exact = logits.double().log_softmax(-1).gather(-1, labels[:, None]).sum()
    low = logits.log_softmax(-1).gather(-1, labels[:, None]).float().sum()
    ours = seq_logprob(Fixed(), ids, torch.ones_like(ids))[0]
    assert abs(ours - exact) < .01 < .1 < abs(low - exact)


class Noisy(torch.nn.Module):
    "A learner's model with dropout"
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.cfg = copy.deepcopy(MINI), torch.nn.Dropout(.3), MINI.cfg

    def forward(self, ids, targets=None): return self.inner.head(self.drop(self.inner.hidden(ids))), None


@pytest.mark.parametrize("make", [lambda: copy.deepcopy(MINI), Noisy])
@pytest.mark.parametrize("make_engine", ENGINES)
def test_first_loss_is_ln_2_and_margins_are_zero(data, make, make_engine):
    from wikidpo.core.train import train_dpo
    policy = make().train()
    history = train_dpo(policy, freeze(policy), data, PLAIN, make_engine())
    assert abs(history[0]["loss"] - math.log(2)) < 1e-6 and history[0]["reward/margin"] == 0
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize("make_engine", ENGINES[:2])
def test_reference_does_not_move_and_policy_does(data, make_engine):
    from wikidpo.core.train import train_dpo
    policy = copy.deepcopy(MINI)
    ref = freeze(policy)
    before = [p.clone() for p in ref.parameters()]
    train_dpo(policy, ref, data, PLAIN, make_engine())
    assert all(torch.equal(a, b) for a, b in zip(before, ref.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 3])
@pytest.mark.parametrize("make_engine", [PlainEngine, engine])
def test_accumulation_gives_the_gradient_of_one_batch_also_when_ragged(data, batch_size, make_engine):
    "11 pairs in forwards of 1; 4, 4 and 3; 10 and 1; 3, 3, 3 and 2"
    def step(batch_size):
        policy = copy.deepcopy(MINI)
        with torch.no_grad(): policy.embed.weight.mul_(1.01)
        return one_step(make_engine(), policy, freeze(MINI), data, range(11), replace(CFG, batch_size=batch_size))

    (gradient, means), (whole, whole_means) = step(batch_size), step(11)
    assert F.cosine_similarity(gradient, whole, 0) > .99999 and torch.allclose(gradient, whole, atol=1e-4)
    assert all(abs(means[k] - whole_means[k]) < 1e-5 for k in means)


def test_every_pair_is_seen_once_an_epoch_also_in_the_last_partial_window(data):
    seen = []

    class Counting(PairDataset):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    counting = copy.copy(data)
    counting.__class__ = Counting
    history = run(counting, cfg=replace(PLAIN, epochs=2))
    assert sorted(seen) == sorted(2 * list(range(44))) and seen[:44] != seen[44:]
    assert len(history) == 2 * 3


def test_order_depends_on_the_seed_and_on_nothing_else(data):
    def history(seed, noise):
        torch.manual_seed(noise)
        return run(data, cfg=replace(PLAIN, seed=seed))

    first = history(0, 1)
    assert first == history(0, 2) and first != history(5, 1)


def test_schedule_warms_up_and_ends_at_zero():
    lrs = [lr_at(s, 300, 20) for s in range(300)]
    assert lrs[:20] == sorted(lrs[:20]) and lrs[20:] == sorted(lrs[20:], reverse=True)
    assert max(lrs) == 1 and 0 < lrs[-1] < 1e-3 and lrs[0] > 0


@pytest.mark.parametrize("norm", [1e9, .01])
def test_a_step_of_the_plain_engine_is_adamw_with_a_clipped_gradient(data, norm):
    "Three steps against torch's own optimizer with the course's numbers, fed with the gradients one by one"
    cfg = replace(CFG, batch_size=8, max_grad_norm=norm, warmup_steps=1)
    ours, theirs, ref = copy.deepcopy(MINI), copy.deepcopy(MINI), freeze(MINI)
    engine, groups = PlainEngine(), [list(range(8)), list(range(8, 16)), list(range(3))]
    opt = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(.9, .95), weight_decay=0.)
    with engine.running(ours, ref, data, groups, cfg):
        own, _ = engine.start()
        for pair_ids in groups:
            set_lr(own, 1e-3)
            accumulate(engine, pair_ids, cfg)
            gradients = [p.grad.clone() for p in ours.parameters()]
            length = torch.cat([g.flatten() for g in gradients]).norm().item()
            for p, g in zip(theirs.parameters(), gradients, strict=True): p.grad = g * min(1., norm / length)
            assert engine.step(own) == pytest.approx(length, rel=1e-3)
            opt.step()
            assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True): assert torch.allclose(a, b, atol=3e-6)


def test_every_step_has_its_learning_rate_and_no_dropout(data):
    seen = []

    class Watching(PlainEngine):
        def step(self, opt):
            seen.append((opt.param_groups[0]["lr"], self.policy.training))
            return super().step(opt)

    history = run(data, Watching(), replace(PLAIN, warmup_steps=1))
    lrs = [CFG.lr * lr_at(s, len(history), 1) for s in range(len(history))]
    assert seen == [(lr, False) for lr in lrs] and [m["lr"] for m in history] == lrs
    assert lr_at(0, 100, 20) == pytest.approx(1 / 21) and lr_at(20, 100, 20) == 1
    assert lr_at(60, 100, 20) == pytest.approx(.5)
    assert history[0]["reward/accuracy"] == 0, "of equal models no pair is right"


def test_a_forward_holds_the_batch_size_and_pairs_of_like_length(data):
    from wikidpo.core.train import micro_batches
    groups = micro_batches(data, range(11), 4)
    assert [len(g) for g in groups] == [4, 4, 3]

    def length(i): return len(data.rows[i][0]) + max(map(len, data.rows[i][1:]))
    assert [length(i) for g in groups for i in g] == sorted(map(length, range(11)))


def test_a_run_that_explodes_says_so(data):
    with pytest.raises(UserError, match="no longer a number at step .*lower train.lr"):
        run(data, cfg=replace(PLAIN, lr=1e30))


# --- `wikidpo train`

CHANGES = dict(seed=1, pairs="other", block_size=24, beta=.2, loss_type="ipo", label_smoothing=.1, gamma=.5,
               sft_weight=1., lr=1e-3, epochs=2, batch_size=4, grad_accum_steps=1, warmup_steps=0, max_grad_norm=.01,
               precision="bf16", valid=.25)
LOOKS = {f.name for f in fields(RunTrainConfig) if f.name.startswith("eval_")} | {"on_sickness"}    # test_watch.py
ELSEWHERE = LOOKS | {"wandb", "project", "reference", "save_every", "shard", "watch"} # test_ranks.py, test_widgets.py


@pytest.fixture(scope="module")
def files(tmp_path_factory, data):
    "Folder with pairs.jsonl, other.jsonl, and the run of BASE in base/"
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder/"pairs.jsonl", data.pairs)
    write_jsonl(folder/"other.jsonl", data.pairs[:30])
    train(POLICY, replace(BASE, pairs=str(folder/"pairs.jsonl")), folder/"base")
    return folder


def metrics_of(files, name, **kw):
    train(POLICY, replace(BASE, **{"pairs": str(files/"pairs.jsonl")} | kw), files/name)
    return (files/name/"metrics.jsonl").read_text()


def test_every_field_is_tried():
    assert set(CHANGES) | ELSEWHERE == {f.name for f in fields(RunTrainConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_of_the_configuration_changes_something_or_is_refused(files, data, name):
    value = str(files/"other.jsonl") if name == "pairs" else CHANGES[name]
    if name == "block_size":
        assert any(len(prompt) >= 24 for prompt, *_ in data.rows)
        with pytest.raises(UserError, match="leaves no room"): metrics_of(files, name, block_size=24)
        return
    if name == "gamma":
        with pytest.raises(UserError, match="gamma has no effect"): metrics_of(files, name, gamma=value)
        return
    assert metrics_of(files, name, **{name: value}) != (files/"base"/"metrics.jsonl").read_text()


@pytest.mark.parametrize("variable, wanted", [("disabled", None), ("offline", "offline"), ("dryrun", "offline")])
def test_what_wandb_mode_says_counts_where_nobody_asks_for_more(tmp_path, monkeypatch, variable, wanted):
    "Also for somebody who is logged in"
    for name, value in {"WANDB_MODE": variable, "WANDB_API_KEY": "0" * 40}.items(): monkeypatch.setenv(name, value)
    run = start_wandb(RunTrainConfig(wandb="auto"), tmp_path, {})
    assert (run and run.settings.mode) == wanted
    if run: run.finish()


QUIET_WANDB = """
import sys
from pathlib import Path
import openai # of which W&B would say that it has found it
from wikidpo.run.config import RunTrainConfig
from wikidpo.run.train import start_wandb
start_wandb(RunTrainConfig(), Path(sys.argv[1]), {}).finish()
"""


def test_wandb_prints_nothing_of_its_own(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_SILENT")}
    command = [sys.executable, "-c", QUIET_WANDB, str(tmp_path)]
    done = subprocess.run(command, env=env | {"WANDB_API_KEY": ""}, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_settings_that_wandb_refuses_do_not_stop_a_training(tmp_path, monkeypatch, capsys):
    wandb.teardown()                                                  # it has read its settings for an earlier test
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in {"WANDB_BASE_URL": "wandb.example", "WANDB_API_KEY": "0" * 40}.items():
        monkeypatch.setenv(name, value)
    assert start_wandb(RunTrainConfig(wandb="auto"), tmp_path, {}) is None
    assert "its settings cannot be used; the metrics are in metrics.jsonl alone" in capsys.readouterr().out


def test_wandb_and_its_project(files):
    metrics_of(files, "wandb", wandb="offline", project="another")
    assert list((files/"wandb"/"wandb").glob("offline-run-*"))


def test_a_live_reference_is_not_kept_and_a_cached_one_is(files):
    kept = set((files/".cache").iterdir())
    metrics_of(files, "live", seed=7, reference="live")
    assert set((files/".cache").iterdir()) == kept
    metrics_of(files, "again", seed=7)
    assert len(set((files/".cache").iterdir()) - kept) == 1
    with pytest.raises(UserError, match="train.reference: expected one of cached, live, found 'none'"):
        replace(BASE, reference="none")


def test_the_watched_pairs_are_computed_twice(files, data):
    "margins.jsonl holds two independent computations of the reference's log-probabilities, the second token by token"
    first = read_jsonl(files/"base"/"margins.jsonl")[0]
    watched = [data.rows[i] for i in range(0, 44, 44 // 32)[:8]]

    def logps(prompt, *sides): return [by_definition(MINI, prompt, side) for side in sides]

    want = torch.tensor([logps(*row) for row in watched])
    assert first["tokens"] == [[len(chosen), len(rejected)] for _, chosen, rejected in watched]
    for name in ("logps", "token_by_token"):
        assert torch.allclose(torch.tensor(first[name])[:8], want.float(), atol=1e-3), name


def test_a_look_reads_pairs_of_about_one_length_together(data):
    "A forward is as wide as its longest pair; what is found stands in the order that was asked for"
    asked = [7, 3, 30, 12, 21, 40, 1]
    scoring = Scoring(MINI, freeze(MINI), training_parts(MINI, "fp32"))
    watched = Watched(replace(BASE, batch_size=2), scoring, data, asked, 12)
    def length(i): return len(data.rows[i][0]) + max(map(len, data.rows[i][1:]))
    lengths = [list(map(length, group)) for group in watched.groups]
    assert sorted(sum(watched.groups, [])) == sorted(asked)
    assert all(max(short) <= min(long) for short, long in zip(lengths, lengths[1:]))
    def logps(prompt, *sides): return [by_definition(MINI, prompt, side) for side in sides]
    want = torch.tensor([logps(*data.rows[i]) for i in asked])
    assert torch.allclose(watched.ref_logps, want.float(), atol=1e-3)


def test_a_watcher_that_goes_on_writes_no_step_twice(data, tmp_path):
    "The margins are those of the models as they are: none at the start, then what the policy has moved"
    policy, ref = copy.deepcopy(MINI), freeze(MINI)
    watched = Watched(BASE, Scoring(policy, ref, training_parts(policy, "fp32")), data, range(5), 12)
    assert watched.margins().tolist() == [0.] * 5
    measured = {"step": 1}
    Validation(BASE, watched)(measured)
    assert measured["valid/accuracy"] == 0 == measured["valid/margin"], "of equal models no pair is right"
    first = MarginWatcher(tmp_path, watched, ref)
    with torch.no_grad(): policy.embed.weight.mul_(1.01)
    moved = watched.margins()
    assert moved.abs().min() > 1e-3
    first({"step": 1})
    going_on = MarginWatcher(tmp_path, watched, ref)
    for step in (1, 2, 3): going_on({"step": step})
    rows = read_jsonl(tmp_path/"margins.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["z"] == [0.] * 5 and rows[-1]["z"] == pytest.approx(moved.tolist(), abs=1e-3)
    want = by_definition_margins(policy, data.rows[:5])
    assert moved.tolist() == pytest.approx(want.tolist(), abs=2e-3)


def test_a_summary_is_the_mean_of_the_end():
    def step(i):
        return {"step": i, "loss": float(i), "reward/margin": 2. * i, "reward/accuracy": i / 40, "reward/chosen": -i}

    found = summarise([step(i) for i in range(1, 41)] + [step(40) | {"valid/loss": .5}])
    assert found["steps"] == 41 and found["loss_first"] == 1 and found["valid_loss"] == .5
    assert found["loss_last"] == pytest.approx((38 + 39 + 40 + 40) / 4)
    assert found["reward_margin"] == pytest.approx(2 * found["loss_last"])


def test_held_out_pairs_are_measured_and_not_trained_on(files, data):
    "A run that holds out a quarter of 44 pairs trains as one on the first 33, and knows more"
    write_jsonl(files/"first33.jsonl", data.pairs[:33])
    metrics_of(files, "33", pairs=str(files/"first33.jsonl"), epochs=2)
    metrics_of(files, "held out", valid=.25, epochs=2)
    plain, measured = (read_jsonl(files/name/"metrics.jsonl") for name in ("33", "held out"))
    assert [without_valid(row) for row in measured] == plain
    z = by_definition_margins(load_checkpoint(files/"held out"/"dpo.pt"), data.rows[33:])
    losses = -F.logsigmoid(BASE.beta * z)
    want = {"valid/loss": losses.mean(), "valid/accuracy": (z > 0).double().mean(),
            "valid/margin": BASE.beta * z.mean()}
    assert {k: measured[-1][k] for k in want} == pytest.approx({k: v.item() for k, v in want.items()}, abs=1e-4)
    summary = json.loads((files/"held out"/"summary.json").read_text())["train"]
    assert summary["valid_loss"] == measured[-1]["valid/loss"] and summary["pairs"] == 33


def without_valid(row): return {k: v for k, v in row.items() if not k.startswith("valid/")}


def by_definition_margins(policy, rows):
    "z of each row in nats, token by token in float64"
    def log_ratio(prompt, side): return by_definition(policy, prompt, side) - by_definition(MINI, prompt, side)
    with torch.no_grad():
        return torch.tensor([log_ratio(p, c) - log_ratio(p, r) for p, c, r in rows], dtype=torch.double)


def test_what_is_held_out_is_measured_at_every_twelfth_of_a_run_and_at_its_end(files):
    metrics_of(files, "dozen", valid=.25, batch_size=1, grad_accum_steps=1)
    rows = read_jsonl(files/"dozen"/"metrics.jsonl")
    assert [row["step"] for row in rows if "valid/loss" in row] == [*range(3, 34, 3)]


@pytest.mark.parametrize("steps, looks", [(1, 1), (11, 11), (12, 12), (13, 7), (23, 12), (24, 12), (83, 12), (300, 12)])
def test_a_run_of_any_length_is_looked_at_a_dozen_times_at_most(data, steps, looks):
    watched = Watched(BASE, Scoring(MINI, MINI, TrainingParts()), data, [0], steps)
    due = [step for step in range(1, steps + 1) if watched.is_due(step)]
    assert len(due) == looks and due[-1] == steps


def test_nothing_is_held_out_where_nobody_can_measure_it(data):
    assert hold_out(data, replace(BASE, valid=.25, shard=True)) == (data, None)
    assert [len(part) for part in hold_out(data, replace(BASE, valid=.25))] == [33, 11]


def test_a_run_that_explodes_leaves_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="lower train.lr"):
        train(POLICY, replace(BASE, pairs=str(DATA/"pairs.jsonl"), lr=1e30), tmp_path/"run")
    assert not (tmp_path/"run"/"dpo.pt").exists()


def test_a_trained_checkpoint_is_in_the_form_of_the_original_and_loads(files):
    ckpt = torch.load(files/"base"/"dpo.pt", weights_only=True)
    assert set(ckpt) == {"model", "config", "digest"} # the original reads the first two
    assert load_checkpoint(files/"base"/"dpo.pt").cfg == MINI.cfg
