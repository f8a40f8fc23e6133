"The doctor on logs from elsewhere: what each kind of file becomes, and what is said of trainings by the real TRL"
import csv, json, math, time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from wikidpo.cli import main
from wikidpo.core.config import TrainConfig
from wikidpo.core.files import UserError
from wikidpo.core.loss import preference_loss
from wikidpo.show.doctor import CHANGES, doctor, early_signs, evidence_of, log_signs, prescription
from wikidpo.show.logs import as_log, known_name, read_log
from wikidpo.show.signs import starts_at_equal_models

RECORDED = Path(__file__).parent.parent/"nbs"/"results"/"doctor"   # by tools/doctor_logs.py
BETA = 1.25                                                        # of all of them but low_beta


def history(name="healthy"):
    return json.loads((RECORDED/f"{name}.json").read_text())["log_history"]


def said(name, beta=None):
    "{sign: whether it holds}, text, cause"
    path = RECORDED/f"{name}.json"
    return {s.name: s.holds for s in log_signs(read_log(path), beta)}, *doctor(path, beta)


def failing(signs): return [name for name, holds in signs.items() if holds is False]


FIRST, CHOSEN, LOSS = ("the first loss is that of equal models", "the chosen reward stays near 0",
                       "the loss glides down, and not to 0")
DIRECTION, TEMPLATE = "chosen and rejected are the right way round", "the model is asked in the form that it knows"


@pytest.mark.parametrize("beta", [None, BETA])
def test_a_healthy_training_by_trl(beta):
    signs, text, cause = said("healthy", beta)
    assert cause == "" and failing(signs) == [] and "worth a look" not in text, text
    assert signs[FIRST] and signs[LOSS] and signs[CHOSEN]
    assert ("nats at the end" in text) == bool(beta) and ("--beta supplies it" in text) == (not beta)


def test_records_that_are_means_have_no_first_step():
    "With logging_steps=5 TRL logs is the mean over these"
    signs, text, cause = said("every_fifth")
    assert cause == "" and failing(signs) == [] and signs[FIRST] is None, text
    assert "the mean over 5 steps" in text and "logging_first_step=True" in text


def test_thirty_times_the_learning_rate():
    signs, text, cause = said("hot", BETA)
    assert "learning rate is too high" in cause and signs[FIRST] and not signs[CHOSEN], text
    assert "divide the learning rate" in text


def test_reversed_pairs_leave_a_hint_and_no_proof():
    signs, text, cause = said("reversed", BETA)
    assert cause == "" and signs[DIRECTION] is None, text
    assert "LOOK" in text and "worth a look: the rejected answers are the likelier ones" in text


def test_no_log_shows_a_missing_chat_template():
    signs, text, _ = said("no_template", BETA)
    assert signs[TEMPLATE] is None and "print tokenizer.decode(trainer.train_dataset[0]['prompt_ids'])" in text
    assert "likelier ones" not in text


@pytest.mark.parametrize("margin, holds", [(0., True), (-2.5e-8, True), (1.1e-5, False), (-.002, False)])
def test_a_gpu_may_round_the_first_margin(margin, holds):
    "On an H100 a reference that was the policy's start gave -2.5e-8"
    rising = {"loss": [math.log(2), .6, .5], "reward/margin": [margin, .1, .3]}
    assert starts_at_equal_models(evidence_of(rising, {"beta": .1})).holds is holds
    assert starts_at_equal_models(evidence_of(rising, {"beta": .1, "loss_type": "simpo", "gamma": .5})).holds is holds


def test_another_reference():
    signs, text, cause = said("wrong_reference", BETA)
    assert "not the policy's start" in cause and failing(signs)[0] == FIRST, text
    assert "give the reference the checkpoint that the policy starts from" in text


def test_a_beta_that_hides_what_was_learnt():
    "Rewards are beta times nats: without beta it cannot be told from a learning rate that is too low"
    signs, text, cause = said("low_beta", .001)
    assert "beta is too low: the policy has moved by" in cause and failing(signs) == [LOSS] and "raise beta" in text
    signs, text, cause = said("low_beta")
    assert "only with beta can one tell" in cause and failing(signs) == [LOSS] and "ask again with --beta" in text


def test_a_log_that_gives_its_beta_away():
    "Rewards and log-probabilities have both grown by far more than their noise"
    text = said("hot")[1]
    said_beta = float(text.split("by its log-probabilities about ")[1].split()[0])
    assert BETA / 1.25 < said_beta < BETA * 1.25


# What people posted, in numbers
NOTHING = {"rewards/chosen": 0., "rewards/rejected": 0., "rewards/margins": 0., "rewards/accuracies": 0.}
LN2 = {"loss": .6931} | NOTHING

AT_ONCE = [{"loss": .003, "rewards/accuracies": 1., "rewards/chosen": 2., "rewards/margins": step, "step": step,
            "grad_norm": .1} for step in range(2, 30)]


@pytest.mark.parametrize("words, rows", [
    ("no token of a response counts", [LN2 | {"logps/chosen": 0., "logps/rejected": 0.}]),
    ("or the reference is the policy itself", [LN2 | {"logps/chosen": -76.8, "logps/rejected": -93.5}] * 4),
    ("no weight is trained, or beta is 0", [LN2 | {"loss": .6934, "grad_norm": 0.}] * 9),
    ("the reference trains along", [LN2 | {"grad_norm": 2.}] * 9),
    ("not the policy's start", [{"step": 1, "loss": .3271, "rewards/chosen": 9.77, "rewards/margins": 4.07}]),
    ("not the policy's start", [{"step": 5, "loss": 0., "accuracy": 1.}, {"step": 10, "loss": 0., "accuracy": 1.}]),
    ("fp16", [{"loss": .69, "rewards/chosen": 0., "rewards/margins": 0.}] +
             [{"loss": 0., "rewards/chosen": math.nan, "rewards/margins": math.nan, "grad_norm": math.nan}] * 9),
    ("something trivial", [{"step": 1} | LN2] + AT_ONCE)])
def test_what_public_threads_show(words, rows):
    found = log_signs(as_log("thread.json", "a list", rows))
    causes = [s.cause for s in found if s.holds is False]
    assert causes and words in causes[0], found
    assert prescription(causes[0])


def test_a_log_without_losses_is_read_by_its_fifths():
    "Not by its last record alone"
    rows = [{"step": i + 1, "grad_norm": 1 + .4 * (i % 3) / 2, "rewards/accuracies": .7} for i in range(100)]
    rows[-1] |= {"grad_norm": 1.75, "rewards/accuracies": .5}
    found = log_signs(as_log("x", "x", rows))
    assert not [s for s in found if s.holds is False], found
    few = log_signs(as_log("x", "x", [{"step": i + 1, "rewards/chosen": -.1} for i in range(100)]))
    assert not [s for s in few if "too few" in s.found], few


def test_a_first_loss_that_is_rounded_or_in_bf16_is_ln_2():
    for loss in (.6931, .6932, .6934, .6914):
        first = next(s for s in log_signs(as_log("x", "x", [LN2 | {"loss": loss, "step": 1}])) if s.name == FIRST)
        assert first.holds, loss
    off = next(s for s in log_signs(as_log("x", "x", [LN2 | {"loss": .7031, "step": 1}])) if s.name == FIRST)
    assert off.holds is False


def test_every_change_is_for_a_cause():
    "No phrase of the prescriptions has gone stale: the rooms of the doctor say each"
    rooms = Path(__file__).parent.parent/"wikidpo"/"show"
    said = " ".join((rooms/name).read_text() for name in ("signs.py", "doctor.py"))
    for words in CHANGES: assert said.count(words) >= 2 or words in (rooms/"signs.py").read_text(), words


# Files

KEPT = "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm", "step"


def renamed(row, rename): return {rename(k): v for k, v in row.items()}


def rows():
    def kept(row): return {k: row[k] for k in KEPT if k in row}
    return [kept(row) for row in history() if "loss" in row]


def train_slash(name): return name if name == "step" else f"train/{name}"


def as_csv(path, rename=lambda name: name, delimiter=","):
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, [rename(k) for k in KEPT], delimiter=delimiter)
        table.writeheader()
        table.writerows(renamed(row, rename) for row in rows())


def write_all(tmp_path):
    "The same history in every form that a file may have"
    lines = [json.dumps(r) for r in rows()]
    (tmp_path/"lines.jsonl").write_text("\n".join(lines) + "\n")
    prefixed = [json.dumps(renamed(row, train_slash)) for row in rows()]
    (tmp_path/"prefixed.jsonl").write_text("\n".join(prefixed))
    (tmp_path/"history.json").write_text(json.dumps(history()))
    def as_text(row): return str({k: str(v) for k, v in row.items() if k != "step"})
    printed = [as_text(row) for row in rows()]
    (tmp_path/"terminal.log").write_text("  3%|##   | 2/64 [00:01<00:30]\n" + "\n".join(printed))
    as_csv(tmp_path/"plain.csv")
    as_csv(tmp_path/"semicolons.csv", delimiter=";")
    as_csv(tmp_path/"wandb.csv", lambda k: "Step" if k == "step" else f"fine-sun-7 - train/{k}")
    (tmp_path/"output"/"checkpoint-64").mkdir(parents=True)
    (tmp_path/"output"/"checkpoint-9").mkdir()
    (tmp_path/"output"/"checkpoint-64"/"trainer_state.json").write_text(json.dumps({"log_history": history()}))
    (tmp_path/"output"/"checkpoint-9"/"trainer_state.json").write_text(json.dumps({"log_history": history()[:9]}))


def test_every_form_of_a_log_says_the_same(tmp_path):
    write_all(tmp_path)
    want = read_log(RECORDED/"healthy.json")
    for path in sorted(tmp_path.iterdir()):
        log = read_log(path)
        assert log.steps == (want.steps if path.name not in ("terminal.log", "wandb.csv") else []), path.name
        for name in ("loss", "reward/margin", "reward/chosen", "grad_norm"):
            assert log.columns[name] == want.columns[name], (path.name, name)
        assert doctor(path)[1] == ""


def whole_log(folder, n):
    "The log once W&B has written it all, which may be a moment after `finish`"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(UserError):
            if len((log := read_log(folder)).steps) == n: return log
        time.sleep(.1)
    return read_log(folder)


def test_a_local_wandb_run(tmp_path):
    "Written by W&B itself; long enough for records that go over the end of a block"
    import wandb
    settings = wandb.Settings(silent=True, disable_git=True, x_disable_meta=True)
    run = wandb.init(dir=tmp_path, mode="offline", config={"beta": BETA}, settings=settings)
    for row in rows():
        run.log(renamed(row, train_slash) | {"train/global_step": row["step"], "noise": "x" * 3000})
    run.finish()
    folder = next((tmp_path/"wandb").glob("offline-run-*"))
    log = whole_log(folder, len(rows()))
    assert log.beta == BETA and log.steps == read_log(RECORDED/"healthy.json").steps
    text, cause = doctor(folder)
    assert cause == "" and "a local W&B run, steps 1 to 40" in text and "; beta 1.25" in text
    whole = next(folder.glob("*.wandb"))
    torn = tmp_path/"torn.wandb"
    torn.write_bytes(whole.read_bytes()[:-2000])
    assert 30 < len(read_log(torn).columns["loss"]) <= 40
    broken = bytearray(whole.read_bytes())
    broken[20_000:20_200] = bytes(range(200))
    (tmp_path/"broken.wandb").write_bytes(broken)
    with pytest.raises(UserError, match="is broken|none of the columns"): read_log(tmp_path/"broken.wandb")


def test_a_log_of_held_out_pairs_alone():
    only = [{"eval_loss": .69 - .01 * s, "eval_rewards/margins": .1 * s, "step": s} for s in range(1, 9)]
    log = as_log("x", "x", only)
    assert log.columns["loss"][-1] == pytest.approx(.61) and log.held_out == log.columns


@pytest.mark.parametrize("name, text, words", [
    ("a.json", '{"loss": ', "a.json:1: broken JSON"),
    ("a.json", '{"log_history": [1, 2]}', "expected a list of records"),
    ("a.json", '[{"loss": "high"}]', "record 1, 'loss': expected a number, found 'high'"),
    ("a.json", '[{"loss": 1e300}]', "1e\\+300 is no loss"),
    ("a.json", "[]", "none of the columns loss, .*found: none"),
    ("a.jsonl", '{"loss": 1}\n{"lo', "a.jsonl:2: broken JSON"),
    ("a.jsonl", '{"reward": 1}\n', "none of the columns loss, .*found: reward"),
    ("a.csv", "loss,grad_norm\n1,2,3\n", "more fields than the head line"),
    ("a.csv", "loss\nhigh\n", "record 1, 'loss': expected a number"),
    ("a.csv", "red - loss,blue - loss\n1,2\n", "'red - loss' and 'blue - loss' are both there; keep one run"),
    ("a.csv", "", "none of the columns"),
    ("a.wandb", "", "no local run of W&B")])
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, name, text, words):
    (tmp_path/name).write_text(text)
    with pytest.raises(UserError, match=words) as e: doctor(tmp_path/name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_missing_columns_are_named(tmp_path):
    def panel(slope): # what a W&B panel exports: one number of one run
        lines = [f"{s},{.6931 - slope * s:.4f},0\n" for s in range(40)]
        (tmp_path/"panel.csv").write_text("Step,run - train/loss,run - train/loss__MIN\n" + "".join(lines))
        return doctor(tmp_path/"panel.csv")
    text, cause = panel(.004)
    assert "this log has no rewards/margins" in text and "this log has no grad_norm" in text
    assert "ok     the loss glides down" in text and cause == "", text
    assert "only with beta can one tell which" in panel(0)[1]
    (tmp_path/"norm.csv").write_text("grad_norm\n1\n2\n")
    assert doctor(tmp_path/"norm.csv")[0].endswith("too little stands in this log to say anything")


def test_names_of_other_trainers():
    same = ["loss", "train/loss", "loss/train", "sunny-3 - train/loss"]
    assert {known_name(name) for name in same} == {(False, "loss")}
    assert known_name("rewards_eval/margins") == (True, "reward/margin") and known_name("loss/total") is None


def test_the_command(tmp_path, capsys):
    main(["doctor", str(RECORDED/"healthy.json"), "--beta", "1.25"])
    assert "; beta 1.25" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(["doctor", str(RECORDED/"hot.json")])
    assert e.value.code == 2 and "is sick: the policy is fleeing" in capsys.readouterr().err
    for beta in ("0", "-1", "nan"):
        with pytest.raises(SystemExit) as e: main(["doctor", str(RECORDED/"healthy.json"), "--beta", beta])
        assert e.value.code == 2 and "it must be a positive number" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recorded_trainings_made_again(tmp_path):
    "The real TRL, one training for each mistake: what the doctor says of the recorded logs, it says of these"
    from doctor_logs import train_by_trl
    said = {}
    for name in ("healthy", "every_fifth", "hot", "reversed", "no_template", "wrong_reference", "low_beta"):
        train_by_trl(name, tmp_path/name, reference=tmp_path/"healthy" if name == "wrong_reference" else None)
        said[name] = doctor(tmp_path/name, .001 if name == "low_beta" else BETA)
    for name in ("healthy", "every_fifth", "reversed", "no_template"): assert said[name][1] == "", said[name][0]
    assert "learning rate is too high" in said["hot"][1] and "beta is too low" in said["low_beta"][1]
    assert "not the policy's start" in said["wrong_reference"][1]
    assert [name for name in said if "likelier ones" in said[name][0]] == ["reversed"]


@pytest.mark.slow
def test_trl_tells_wandb_its_beta(tmp_path, monkeypatch):
    from doctor_logs import train_by_trl
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train_by_trl("healthy", tmp_path/"run", 160, report_to="wandb")
    import wandb
    wandb.finish()
    log = whole_log(next((tmp_path/"wandb").glob("offline-run-*")), 10)
    assert log.beta == BETA and log.steps == [float(step) for step in range(1, 11)]
    assert log.columns["reward/margin"] == pytest.approx(read_log(tmp_path/"run").columns["reward/margin"])


@pytest.mark.parametrize("loss_type, nats, sick", [
    ("simpo", -2., False), ("dpo_norm", -2., False), ("simpo", -25., True), ("dpo", -2., True)])
def test_a_loss_of_means_is_held_to_nats_and_not_to_rewards(loss_type, nats, sick):
    "Its beta is some twenty times as large, and so is every reward"
    beta = 2.2
    row = {"loss": .6, "reward/margin": 1., "reward/accuracy": .7, "reward/chosen": beta * nats, "grad_norm": 1.}
    failing = [s.name for s in early_signs([row] * 20, TrainConfig(beta=beta, loss_type=loss_type)) if s.holds is False]
    assert (CHOSEN in failing) == sick


@pytest.mark.parametrize("smoothing, margin", [(.1, 3.), (.2, 1.5)])
def test_a_robust_loss_below_zero_is_no_illness(smoothing, margin):
    "A pair that is right has a loss below 0 there; others would be called too easy"
    cfg = TrainConfig(loss_type="robust", label_smoothing=smoothing)
    def row(z): return {"loss": preference_loss(torch.tensor(z / cfg.beta), cfg.beta, "robust", smoothing).item(),
                        "reward/margin": z, "reward/accuracy": .85, "reward/chosen": z / 3, "grad_norm": 1.}
    rows = [row(margin * i / 39) for i in range(40)]
    failing = [s.name for s in early_signs(rows, cfg) if s.holds is False]
    assert rows[-1]["loss"] < .07 and not failing, failing


def test_a_log_of_losses_alone_with_a_small_beta(tmp_path):
    (tmp_path/"log.csv").write_text("step,loss,grad_norm\n" + "".join(f"{i},0.69,1.0\n" for i in range(1, 13)))
    said, cause = doctor(tmp_path/"log.csv", .01)
    assert "this log has no rewards/margins" in said and cause
