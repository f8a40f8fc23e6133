"The sweep: one run a beta, what is predicted beforehand, and what the intervals leave open"
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from wikidpo.cli import main
from wikidpo.core.files import UserError, read_jsonl
from wikidpo.judge.config import TeacherConfig
from wikidpo.models.policy import open_policy
from wikidpo.run.config import EvaluateConfig, PolicyConfig, RunTrainConfig, SweepConfig
from wikidpo.run.sweep import kl_gap, predict, score_prediction, score_table, sweep, win_rate_gap
from wikidpo.run.watch import kl_to_reference, log_ratios
from wikidpo.world.facts import DATA

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
TRAIN = RunTrainConfig(lr=3e-3, batch_size=8, grad_accum_steps=1, warmup_steps=1, block_size=256, precision="fp32",
                       wandb="disabled", watch=0)
JUDGE = EvaluateConfig(prompts=str(DATA/"prompts_eval.jsonl"), n=6, max_new=24, batch=16)
CFG = SweepConfig(pairs=str(DATA/"pairs.jsonl"), betas=(.1, 1.), n_pairs=32, kl_prompts=5)


# ---- what a sweep says

def row(beta, margin=1., kl=1., rate=.5, results=(1, -1) * 50, ratios=(1., 1.2) * 50):
    unused = {"chosen": 0, "kl_se": .1, "ci_low": 0, "ci_high": 1, "chars_a": 40, "chars_b": 60}
    return unused | {"beta": beta, "margin": margin, "kl": kl, "decided_win_rate": rate, "results": list(results),
            "log_ratios": list(ratios)}


def written(out, *rows):
    (out/"sweep.json").write_text(json.dumps(rows))
    return out


def test_a_prediction_is_right_wrong_or_open(tmp_path):
    predict(tmp_path, margin=.5, closest=.1, wins=.1)
    clear = row(.5, margin=3, kl=9, rate=.9, results=(1,) * 90 + (-1,) * 10, ratios=(9., 9.2) * 50)
    assert score_prediction(written(tmp_path, row(.1), clear)) == [
        ("margin", .5, .5, "right"), ("closest", .1, .1, "right"), ("wins", .1, .5, "wrong")]
    assert score_table(tmp_path).count("right") == 2
    alike = row(.5, margin=3, kl=1.001, rate=.51, results=(1,) * 51 + (-1,) * 49)
    assert [mark for *_, mark in score_prediction(written(tmp_path, row(.1), alike))] == ["right", "open", "open"]


def test_a_prediction_answers_all_questions_and_comes_first(tmp_path):
    for answers in ({}, {"margin": 1.}, {"margin": 1., "closest": 1., "wins": 1., "luck": 1.}):
        with pytest.raises(UserError, match="a prediction answers margin, closest, wins"): predict(tmp_path, **answers)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="make one with `predict`"): score_prediction(tmp_path)
    with pytest.raises(UserError, match="no sweep.json"): score_table(tmp_path)
    assert "no prediction was stored" in score_table(written(tmp_path, row(.1), row(.5)))


def test_the_gap_of_two_win_rates_counts_decided_questions():
    "Against the normal approximation; ties do not narrow it, and both are drawn with the same questions"
    rng = np.random.default_rng(0)
    a, b = (rng.choice([1, -1, 0], 400, p=p) for p in ([.42, .28, .3], [.3, .4, .3]))
    low, high = win_rate_gap(a, b)

    def rate(x): return (x == 1).sum() / (x != 0).sum()
    def variance(x): return rate(x) * (1 - rate(x)) / (x != 0).sum()
    middle, half = rate(a) - rate(b), 1.96 * (variance(a) + variance(b)) ** .5
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=.015)
    assert high - low == pytest.approx(2 * half, rel=.08)
    assert win_rate_gap(a, a) == (0, 0) and win_rate_gap(a, b) == (low, high)


def test_the_gap_of_two_distances_is_paired():
    d = np.random.default_rng(1).normal(3, 2, 300)
    low, high = kl_gap(d + .1, d)
    assert low == pytest.approx(.1) and high == pytest.approx(.1)


# ---- a real one

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    predict(out, margin=1., closest=1., wins=.1)
    return out, sweep(POLICY, TeacherConfig(), CFG, TRAIN, JUDGE, out)


def test_a_run_for_each_beta_alike_in_all_else(swept):
    out, rows = swept
    assert json.loads((out/"sweep.json").read_text()) == rows and [row["beta"] for row in rows] == [.1, 1.]
    assert read_jsonl(out/"pairs32.jsonl") == read_jsonl(DATA/"pairs.jsonl")[:32]
    first, second = (open_policy(POLICY, out/name/"dpo.pt")[0].state_dict() for name in ("beta0.1", "beta1"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for row, name in zip(rows, ("beta0.1", "beta1")):
        summary = json.loads((out/name/"summary.json").read_text())
        assert row["margin"] == summary["train"]["reward_margin"] and row["win"] == summary["judge"]["win"]
        verdicts = [v["result"] for v in read_jsonl(out/name/"verdicts.jsonl")]
        assert row["results"] == [{"a": 1, "b": -1}.get(v, 0) for v in verdicts] and len(verdicts) == 6


def test_the_distance_is_the_mean_of_the_log_ratios_and_its_error(swept):
    out, rows = swept
    for row in rows:
        d = np.array(row["log_ratios"])
        assert len(d) == 5 and row["kl"] == pytest.approx(d.mean(), abs=1e-3)
        assert row["kl_se"] == pytest.approx(d.std(ddof=1) / 5**.5, abs=1e-3)
    policy, tok = open_policy(POLICY, out/"beta0.1"/"dpo.pt")
    ref, _ = open_policy(POLICY)
    prompts = ["What is the capital of Peru?", "Who painted Guernica?"]
    assert log_ratios(ref, ref, tok, prompts).abs().max() == 0
    d = log_ratios(policy, ref, tok, prompts)
    assert kl_to_reference(policy, ref, tok, prompts) == pytest.approx((d.mean().item(), d.std().item() / 2**.5))


def test_what_no_sweep_can_compare_is_refused_before_anything_is_written(tmp_path):
    (tmp_path/"one.jsonl").write_text('{"prompt": "Who?"}\n')
    one = str(tmp_path/"one.jsonl")
    for change, says in ((dict(a="dpo.pt"), "judge.a: a sweep judges"), (dict(prompts=one), "needs two prompts")):
        with pytest.raises(UserError, match=says):
            sweep(POLICY, TeacherConfig(), CFG, TRAIN, replace(JUDGE, **change), tmp_path/"sweep")
    assert not (tmp_path/"sweep").exists()


@pytest.mark.parametrize("words, says", [
    (["--predict", "0", ".1", ".1"], "predict: 0 is none of the betas of this sweep (0.05, 0.1"),
    (["--train.pairs", "other.jsonl"], "train.pairs: a sweep trains on --pairs")])
def test_a_prediction_or_pairs_that_a_sweep_cannot_take(tmp_path, capsys, words, says):
    asked = ["sweep", *words, "--betas", "0.05", "0.1", "--out", str(tmp_path/"sweep")]
    with pytest.raises(SystemExit) as e: main(asked)
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/"sweep").exists()


def test_how_often_a_sweep_saves_does_not_decide_about_it(swept):
    out, rows = swept
    assert sweep(POLICY, TeacherConfig(), CFG, replace(TRAIN, save_every=7, project="x"), JUDGE, out) == rows


def test_a_sweep_that_is_done_is_kept(swept):
    out, rows = swept
    before = {p: p.read_bytes() for p in out.glob("*/*.pt")}
    assert sweep(POLICY, TeacherConfig(), CFG, TRAIN, JUDGE, out) == rows
    assert {p: p.read_bytes() for p in out.glob("*/*.pt")} == before
    with pytest.raises(UserError, match="is no prediction"): predict(out, margin=.1, closest=.1, wins=.1)
    with pytest.raises(UserError, match="holds another run"):
        sweep(POLICY, TeacherConfig(), CFG, replace(TRAIN, lr=1e-3), JUDGE, out)
