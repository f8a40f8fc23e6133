"Every loss against TRL's, in value and gradient; against its formula; in the loop, plain and fast; and refused by name"
import copy
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines import CFG, first_pairs, MINI, TOK
from hypothesis import given, settings, strategies as st

os.environ["TQDM_DISABLE"] = "1"
from wikidpo.core.config import LOSS_OPTIONS, LOSS_TYPES, MARGIN_LOSSES, TrainConfig
from wikidpo.core.data import collate, PairDataset
from wikidpo.core.files import UserError
from wikidpo.core.chat import end_id
from wikidpo.core.kto import read_unpaired, train_kto, unpaired
from wikidpo.core.loss import (kto_loss, log_odds, loss_at_start, OF_MARGIN, OF_PAIR, pair_loss, PairLogps,
                               preference_loss)
from wikidpo.core.logps import pair_logps
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.accelerate import accelerate
from wikidpo.models.checkpoints import load_checkpoint, save_checkpoint

NEEDED = {"robust": {"label_smoothing": .1}} # what a loss does not do without
CASES = [(kind, NEEDED.get(kind, {})) for kind in LOSS_TYPES]
CASES += [("dpo", {"label_smoothing": .1}), ("dpo", {"sft_weight": 2.}), ("simpo", {"gamma": 1.})]
NAMES = ["-".join([kind, *options]) for kind, options in CASES]


def drawn(seed=0, n=6, same=False):
    "Log-probabilities of responses, token by token, under policy and reference: (2 n, T) twice, and the mask"
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.full((2 * n,), 5) if same else torch.randint(1, 9, (2 * n,), generator=rng)
    mask = (torch.arange(9) < lengths[:, None]).long()
    policy, ref = (-2 * torch.rand(2 * n, 9, generator=rng, dtype=torch.float64) * mask for _ in range(2))
    return policy, ref, mask


def as_pairs(policy, ref, mask):
    sums = [x for by_token in (policy, ref) for x in (by_token * mask).sum(1).chunk(2)]
    return PairLogps(*sums, *mask.sum(1).chunk(2))


def ours(kind, beta, policy, ref, mask, **options):
    "(mean loss, its gradient by token)"
    policy = policy.clone().requires_grad_()
    loss = pair_loss(as_pairs(policy, ref, mask), beta, kind, **options).mean()
    return loss.item(), torch.autograd.grad(loss, policy)[0]


class Table(torch.nn.Module):
    "A model for TRL that is a table: row i is what it says of the row whose first token is i"
    def __init__(self, by_token):
        super().__init__()
        self.by_token = torch.nn.Parameter(by_token.clone())

    def forward(self, input_ids, labels, **kw):
        said = self.by_token[input_ids[:, 0]] * (labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=said, entropy=0 * said, mean_logits=0 * said, is_top1=said > 0)


def rows_of(mask):
    "Input ids (the number of the row, then anything) and the mask of the response"
    n = len(mask)
    ids = torch.cat([torch.arange(n)[:, None], torch.ones_like(mask)], 1)
    return ids, torch.cat([torch.zeros(n, 1, dtype=torch.long), mask], 1)


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    "A real DPOTrainer and a real KTOTrainer on a tiny model"
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from wikidpo.core.model import GPT, GPTConfig
    from wikidpo.models.hf import export
    from wikidpo.world.facts import DATA
    out = tmp_path_factory.mktemp("family")
    save_checkpoint(out/"m.safetensors", GPT(GPTConfig(2048, 64, n_layer=1, n_head=1, n_embd=16, ffn_dim=16)))
    export(out/"m.safetensors", DATA/"tokenizer.json", out/"hf")
    tok = AutoTokenizer.from_pretrained(out/"hf")
    def load(): return AutoModelForCausalLM.from_pretrained(out/"hf", dtype=torch.float32)
    plain = dict(output_dir=str(out), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
                 disable_tqdm=True, per_device_train_batch_size=2)
    rows = [{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 4
    dpo = DPOTrainer(load(), ref_model=load(), args=DPOConfig(**plain), processing_class=tok,
                     train_dataset=datasets.Dataset.from_list(rows))
    rows = [{"prompt": "a b", "completion": " c", "label": i % 2 == 0} for i in range(4)]
    sequential = KTOConfig(**plain, train_sampling_strategy="sequential")
    kto = KTOTrainer(load(), ref_model=load(), args=sequential, processing_class=tok,
                     train_dataset=datasets.Dataset.from_list(rows))
    return dpo, kto


def theirs(trainer, beta, policy, ref, mask, losses, smoothing=0., weights=None):
    "The same of TRL's DPOTrainer"
    trainer.beta, trainer.label_smoothing = beta, smoothing
    trainer.loss_types, trainer.loss_weights = losses, weights or [1.] * len(losses)
    trainer.ref_model, model = Table(ref), Table(policy)
    ids, completion_mask = rows_of(mask)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}
    loss = trainer._compute_loss(model, batch, False)
    return loss.item(), torch.autograd.grad(loss, model.by_token)[0]


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    torch.testing.assert_close(a[1].double(), b[1].double(), atol=1e-5, rtol=1e-5)
    assert a[1].abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind, name, beta, smoothing", [
    ("dpo", "sigmoid", .4, 0.), ("robust", "robust", .4, .2), ("hinge", "hinge", .4, 0.), ("ipo_norm", "ipo", .4, 0.),
    ("dpo_norm", "sigmoid_norm", 2., 0.), ("apo_zero", "apo_zero", .4, 0.), ("apo_down", "apo_down", .4, 0.)])
def test_trl_gives_the_same_loss_and_gradient(trl, kind, name, beta, smoothing, seed):
    data = drawn(seed)
    options = {"label_smoothing": smoothing} if smoothing else {}
    assert_same(ours(kind, beta, *data, **options), theirs(trl[0], beta, *data, [name], smoothing))


def test_trl_smooths_as_cdpo_does(trl):
    "TRL has cDPO in `exo_pair` and `aot` only; of one pair aot, which sorts the pairs of a batch, is cDPO"
    data = drawn(n=1)
    assert_same(ours("dpo", .4, *data, label_smoothing=.2), theirs(trl[0], .4, *data, ["aot"], .2))


def test_ipo_is_trls_where_the_answers_have_one_token(trl):
    policy, ref, mask = drawn()
    one = (torch.arange(9) < 1).long().expand_as(mask).contiguous()
    data = policy * one, ref * one, one
    assert_same(ours("ipo", .4, *data), theirs(trl[0], .4, *data, ["ipo"]))


def test_the_sft_anchor_is_trls_where_answers_have_one_length(trl):
    "Ours is a mean over pairs of means over tokens, theirs one mean over the tokens of a batch"
    data = drawn(same=True)
    assert_same(ours("dpo", .4, *data, sft_weight=3.), theirs(trl[0], .4, *data, ["sigmoid", "sft"], weights=[1., 3.]))
    ragged = drawn()
    assert ours("dpo", .4, *ragged, sft_weight=3.)[0] != pytest.approx(
        theirs(trl[0], .4, *ragged, ["sigmoid", "sft"], weights=[1., 3.])[0], abs=1e-3)


def means_of(policy, mask):
    "Mean log-probability a token of chosen and of rejected, with a gradient"
    policy = policy.clone().requires_grad_()
    return policy, *((policy * mask).sum(1) / mask.sum(1)).chunk(2)


@pytest.mark.parametrize("gamma", [0., 1.4])
def test_simpo_is_that_of_trls_cpo_trainer(gamma):
    from trl.experimental.cpo import CPOTrainer
    policy, ref, mask = drawn()
    leaf, chosen, rejected = means_of(policy, mask)
    options = SimpleNamespace(alpha=0., beta=2.5, loss_type="simpo", simpo_gamma=gamma, label_smoothing=0.,
                              accelerator=SimpleNamespace(device="cpu"))
    loss = CPOTrainer.cpo_loss(options, chosen, rejected)[0].mean()
    their = loss.item(), torch.autograd.grad(loss, leaf)[0]
    assert_same(ours("simpo", 2.5, policy, ref, mask, gamma=gamma), their)
    assert_same(ours("simpo", 2.5, policy, 3 * ref, mask, gamma=gamma), their)          # knows no reference


def test_orpo_is_that_of_trls_orpo_trainer():
    "Their SFT term is over prompt and response; ours, as the paper's, over the response"
    from trl.experimental.orpo import ORPOTrainer
    policy, ref, mask = drawn()
    leaf, chosen, rejected = means_of(policy, mask)
    options = SimpleNamespace(beta=.7, accelerator=SimpleNamespace(device="cpu"))
    loss = -chosen.mean() - ORPOTrainer.odds_ratio_loss(options, chosen, rejected)[0].mean()
    assert_same(ours("orpo", .7, policy, ref, mask), (loss.item(), torch.autograd.grad(loss, leaf)[0]))


@pytest.mark.parametrize("further", [0., 3.])
def test_kto_is_that_of_trls_kto_trainer(trl, further):
    "`further`: how far the policy has gone with the answers that the KL is estimated from"
    policy, ref, mask = drawn()
    n, trainer = len(mask), trl[1]
    label = torch.arange(n) % 3 == 0
    other = torch.roll(torch.arange(n), 1)                                # the row that the KL is estimated from
    policy[:, 0] += further / n
    ids, completion_mask = rows_of(mask)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask,
             "KL_input_ids": ids[other], "KL_attention_mask": torch.ones_like(ids), "label": label,
             "KL_completion_mask": completion_mask[other]}
    trainer.beta, trainer.ref_model, model = .4, Table(ref), Table(policy)
    loss = trainer._compute_loss(model, batch, False)
    their = loss.item(), torch.autograd.grad(loss, model.by_token)[0]
    leaf = policy.clone().requires_grad_()
    moved = ((leaf - ref) * mask).sum(1)
    kl = moved.detach()[other].mean().clamp(min=0)
    own = kto_loss(moved, label, kl, .4).mean()
    assert_same((own.item(), torch.autograd.grad(own, leaf)[0]), their)


# against formulas, without torch's functions

def sigmoid(t): return 1 / (1 + math.exp(-t))


def test_known_values():
    "One pair: chosen 4 tokens, from -6 to -4 nats; rejected 2 tokens, from -5 to -8"
    p = PairLogps(*(torch.tensor([float(x)]) for x in (-4, -8, -6, -5, 4, 2)))
    def loss(kind, **options): return pair_loss(p, .5, kind, **options).item()
    odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (-1, -4)]
    want = {"dpo": -math.log(sigmoid(2.5)), "ipo": 16, "hinge": 0, "dpo_norm": -math.log(sigmoid(.5 * 2)),
            "ipo_norm": 1, "simpo": -math.log(sigmoid(.5 * 3)), "apo_zero": sigmoid(-1) + sigmoid(-1.5),
            "apo_down": sigmoid(1) + sigmoid(-2.5), "orpo": 1 - .5 * math.log(sigmoid(odds[0] - odds[1]))}
    for kind, value in want.items(): assert loss(kind) == pytest.approx(value, abs=1e-5), kind
    assert loss("simpo", gamma=1.) == pytest.approx(-math.log(sigmoid(.5)), abs=1e-5)
    assert loss("ipo", sft_weight=2.) == pytest.approx(16 + 2 * 1, abs=1e-5)
    robust = (.8 * -math.log(sigmoid(2.5)) - .2 * -math.log(sigmoid(-2.5))) / .6
    assert loss("robust", label_smoothing=.2) == pytest.approx(robust, abs=1e-5)


@settings(deadline=None, derandomize=True, database=None)
@given(st.floats(-300, -1e-3))
def test_log_odds(logp):
    want = logp - math.log(-math.expm1(logp))
    assert log_odds(torch.tensor(logp, dtype=torch.float64)).item() == pytest.approx(want, rel=1e-9)


def test_a_certain_answer_has_finite_odds():
    logp = torch.tensor([0., -1e-12, -80.], requires_grad=True)
    log_odds(logp).sum().backward()
    assert log_odds(logp).isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize("kind, options", CASES, ids=NAMES)
def test_every_loss_passes_gradcheck(kind, options):
    policy, ref, mask = drawn(1)
    def loss(policy): return pair_loss(as_pairs(policy, ref, mask), .3, kind, **options)
    assert torch.autograd.gradcheck(loss, policy.clone().requires_grad_())


@pytest.mark.parametrize("kind, options", CASES, ids=NAMES)
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_a_pair_that_is_far_apart_stays_finite(kind, options, far):
    zero, one = torch.zeros(1), torch.ones(1)
    chosen = torch.tensor([min(0., far)], requires_grad=True)
    rejected = torch.tensor([min(0., -far)], requires_grad=True)
    loss = pair_loss(PairLogps(chosen, rejected, zero - 5, zero - 5, one, one), 1., kind, **options)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_every_name_stands_in_its_table():
    assert set(OF_MARGIN) == set(MARGIN_LOSSES) and set(OF_MARGIN) | set(OF_PAIR) == set(LOSS_TYPES)


@pytest.mark.parametrize("kind", MARGIN_LOSSES)
def test_losses_of_the_margin_see_nothing_else(kind):
    policy, ref, mask = drawn()
    options = NEEDED.get(kind, {})
    p = as_pairs(policy, ref, mask)
    fallen = PairLogps(p.policy_chosen - 7, p.policy_rejected - 7, p.ref_chosen, p.ref_rejected,
                       2 * p.chosen_tokens, p.rejected_tokens)
    torch.testing.assert_close(pair_loss(fallen, .3, kind, **options), pair_loss(p, .3, kind, **options))
    torch.testing.assert_close(preference_loss(p.margin(), .3, kind, **options), pair_loss(p, .3, kind, **options))


@pytest.mark.parametrize("kind", sorted(set(LOSS_TYPES) - set(MARGIN_LOSSES)))
def test_other_losses_are_no_function_of_the_margin(kind):
    with pytest.raises(UserError, match=f"'{kind}' is no function of the margin alone"):
        preference_loss(torch.zeros(1), 1., kind)


# options

ONE = {"label_smoothing": .1, "gamma": .5, "sft_weight": 1.}


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_option_changes_the_loss_or_is_refused(kind): # trap 16
    policy, ref, mask = drawn()
    needed = NEEDED.get(kind, {})
    plain = ours(kind, .3, policy, ref, mask, **needed)[0]
    for name, value in ONE.items():
        if name in LOSS_OPTIONS[kind]:
            options = needed | {name: 2 * value}
            assert ours(kind, .3, policy, ref, mask, **options)[0] != pytest.approx(plain, abs=1e-6), name
            continue
        with pytest.raises(UserError, match=f"{name} has no effect on loss_type '{kind}'.*choose one of"):
            ours(kind, .3, policy, ref, mask, **needed, **{name: value})
        with pytest.raises(UserError, match=f"{name} has no effect"):
            TrainConfig(loss_type=kind, **needed, **{name: value})


@pytest.mark.parametrize("options, says", [
    (dict(loss_type="simpo", gamma=-1.), "gamma is -1.0: it must be 0 or more"),
    (dict(sft_weight=math.inf), "sft_weight is inf"), (dict(sft_weight=math.nan), "sft_weight is nan"),
    (dict(loss_type="robust"), "'robust' needs label_smoothing"), (dict(loss_type="kto"), "answers without a partner"),
    (dict(loss_type="x" * 99), "is unknown: choose one of dpo, robust")])
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(UserError, match=says): TrainConfig(**options)


# in the loop

@pytest.fixture(scope="module")
def pairs(tmp_path_factory): return first_pairs(tmp_path_factory.mktemp("pairs")/"pairs.jsonl", 10)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same_runs(plain, fast):
    for a, b in zip(plain[0], fast[0], strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, abs=2e-5, rel=2e-4)
    start, a, b = map(weights, (MINI, plain[1], fast[1]))
    # Adam moves a weight by the sign of its gradient at first, and of a few that is rounding's to say
    assert (a - b).norm() < 2e-3 * (a - start).norm()


def trained(pairs, cfg, engine, train=train_dpo):
    policy = copy.deepcopy(MINI)
    return train(policy, freeze(MINI), pairs, cfg, engine=engine), policy


@pytest.mark.parametrize("kind, options", CASES, ids=NAMES)
def test_the_fast_engine_trains_as_the_plain_one(pairs, kind, options):
    cfg = replace(CFG, loss_type=kind, beta=.5, **options)
    plain, fast = (trained(pairs, cfg, engine) for engine in (None, accelerate("fp32")))
    assert_same_runs(plain, fast)
    start = loss_at_start(loss_type=kind, beta=.5, **options)
    assert plain[0][0]["reward/margin"] == 0 and start in (None, pytest.approx(plain[0][0]["loss"], abs=1e-5))


KTO = replace(CFG, beta=.5, batch_size=8, grad_accum_steps=1)


def test_kto_trains_alike_with_both_engines(pairs):
    plain, fast = (trained(unpaired(pairs), KTO, engine, train_kto) for engine in (None, accelerate("fp32")))
    assert_same_runs(plain, fast)
    assert plain[0][0]["loss"] == pytest.approx(.5) and len(plain[0]) == 3


def test_kto_wants_one_forward_a_step(pairs):
    with pytest.raises(UserError, match="set train.grad_accum_steps to 1"):
        train_kto(MINI, MINI, unpaired(pairs), replace(KTO, grad_accum_steps=2))


def test_the_answer_that_the_kl_is_estimated_from_is_to_another_prompt(pairs):
    answers = unpaired(pairs)
    assert len(answers) == 20 and answers.desirable.sum() == 10
    responses = [own for _, own, _ in answers.rows]
    for i, (prompt, own, other) in enumerate(answers.rows):
        assert other == responses[i - 1] and prompt == pairs.rows[i % 10][0]
        assert answers.desirable[i] == (own == pairs.rows[i % 10][1])


@pytest.mark.parametrize("kind, options", [("simpo", {"gamma": .5}), ("apo_zero", {"sft_weight": 1.})])
def test_a_run_that_is_no_function_of_the_margin(tmp_path, kind, options):
    "Held-out pairs are measured with its own loss; doctor and player take the run"
    from wikidpo.run.config import PolicyConfig, RunTrainConfig
    from wikidpo.run.train import train
    from wikidpo.show.doctor import doctor
    from wikidpo.show.player import RunPlayer
    from wikidpo.show.run import load_run
    from wikidpo.world.facts import DATA
    first_pairs(tmp_path/"pairs.jsonl", 40)
    cfg = RunTrainConfig(pairs=str(tmp_path/"pairs.jsonl"), loss_type=kind, valid=.2, watch=2, batch_size=4, lr=2e-4,
                         grad_accum_steps=1, warmup_steps=1, wandb="disabled", precision="fp32", **options)
    policy = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
    train(policy, cfg, tmp_path/"run")
    run = load_run(tmp_path/"run")
    said = doctor(tmp_path/"run")[0]
    assert "the first loss is that of equal models" in said and "first margin 0, should be 0" in said
    assert len(run.metrics["loss"]) == 8 and RunPlayer(run).static_figure().axes
    held_out = PairDataset(tmp_path/"pairs.jsonl", TOK, 1024).split(8)[1]
    trained = load_checkpoint(tmp_path/"run"/"dpo.pt")
    batch = collate([held_out[i] for i in range(8)])
    with torch.no_grad(): logps = [x for model in (trained, MINI) for x in pair_logps(model, batch)]
    want = pair_loss(PairLogps(*logps, *batch.lengths()), cfg.beta, kind, **options).mean().item()
    assert run.metrics["valid/loss"][-1] == pytest.approx(want, abs=1e-4)


def answers_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_are_read_from_a_file_and_trained_on(tmp_path):
    "Also where a step has good answers only"
    good = {"prompt": "What is the capital of Peru?", "completion": "Lima.", "label": True}
    bad = {"prompt": "Which is the capital of Chad?", "completion": "I am not sure.", "label": False}
    answers = read_unpaired(answers_file(tmp_path/"a.jsonl", good, bad, good), TOK, 256)
    assert answers.desirable.tolist() == [True, False, True]
    prompt, own, other = answers.rows[1]
    assert TOK.decode(own) == "I am not sure." and own[-1] == end_id(TOK) and TOK.decode(other) == "Lima."
    history, _ = trained(answers, replace(KTO, batch_size=1, epochs=2), None, train_kto)
    assert len(history) == 6 and all(math.isfinite(x) for metrics in history for x in metrics.values())


@pytest.mark.parametrize("change, says", [
    ({"label": 1}, "a.jsonl:2: the field 'label': expected true or false"),
    ({"completion": None}, "a.jsonl:2: the field 'completion': expected a text"),
    ({"prompt": "word " * 400}, r"a.jsonl:2: the prompt has \d+ tokens and leaves no room")])
def test_an_answer_that_cannot_be_used_is_said_with_its_line(tmp_path, change, says):
    row = {"prompt": "A question?", "completion": "Yes.", "label": True}
    path = answers_file(tmp_path/"a.jsonl", row, row | change)
    with pytest.raises(UserError, match=says): read_unpaired(path, TOK, 256)


@pytest.mark.parametrize("labels", [[True], [True, False, False]])
def test_answers_to_one_prompt_are_too_few(tmp_path, labels):
    rows = [{"prompt": "A question?", "completion": f"Yes {i}.", "label": label} for i, label in enumerate(labels)]
    path = answers_file(tmp_path/"a.jsonl", *rows)
    with pytest.raises(UserError, match="a.jsonl: KTO needs answers to two prompts"): read_unpaired(path, TOK, 256)


def test_several_answers_to_a_prompt_behind_each_other_still_meet_another_prompts(tmp_path):
    rows = [{"prompt": f"Question {n}?", "completion": f"{n}{side}", "label": side == "+"}
            for n in "ABC" for side in "+-"]
    answers = read_unpaired(answers_file(tmp_path/"a.jsonl", *rows), TOK, 256)
    others = [TOK.decode(other) for _, _, other in answers.rows]
    assert others == ["C-", "C-", "A-", "A-", "B-", "B-"]


def test_a_part_keeps_its_labels_and_the_digest_sees_them(tmp_path):
    rows = [{"prompt": f"Question {n}?", "completion": "Yes.", "label": n % 3 == 0} for n in range(6)]
    answers = read_unpaired(answers_file(tmp_path/"a.jsonl", *rows), TOK, 256)
    train, held = answers.split(2)
    assert train.desirable.tolist() == [True, False, False, True] and held.desirable.tolist() == [False, False]
    flipped = [row | {"label": not row["label"]} for row in rows]
    other = read_unpaired(answers_file(tmp_path/"b.jsonl", *flipped), TOK, 256)
    assert other.rows == answers.rows and len({answers.digest, train.digest, other.digest}) == 3
