"Reading run folders: columns, missing and broken parts, the figure, and the doctor"
import io, json, math, random, statistics

import pytest, yaml
from matplotlib import pyplot
from matplotlib.figure import Figure

from runfolder import make_run, metrics, write_jsonl
from wikidpo.cli import main
from wikidpo.core.files import UserError
from wikidpo.show.curves import curves, PANELS, trailing_mean
from wikidpo.run.config import RunTrainConfig
from wikidpo.run.profiles import load_profile, section
from wikidpo.show.doctor import doctor, signs
from wikidpo.show.run import load_run
from wikidpo.show.signs import CHECKS, ORIGINAL_CHECKS, ORIGINAL_SETTINGS


def test_a_whole_run(tmp_path):
    run = load_run(make_run(tmp_path/"run"))
    assert run.config["train"]["beta"] == .1 and run.summary["judge"]["win"] == 35
    assert len(run.metrics["loss"]) == 120 and run.metrics["step"] == list(range(1, 121))
    assert len(run.samples) == 240 and len(run.verdicts) == 100 and run.pairs[0]["score_chosen"] >= 6


def test_large_files_are_read_late(tmp_path):
    path = make_run(tmp_path/"run")
    (path/"samples.jsonl").write_text("not JSON\n")
    run = load_run(path)
    assert run.pairs
    with pytest.raises(UserError, match=r"samples.jsonl:1"): _ = run.samples


@pytest.mark.parametrize("steps", [(), ("mine",), ("train",), ("judge",)])
def test_missing_parts_are_empty(tmp_path, steps):
    run = load_run(make_run(tmp_path/"run", steps))
    assert bool(run.metrics) == ("train" in steps)
    assert bool(run.pairs) == ("mine" in steps)
    assert bool(run.verdicts) == ("judge" in steps)


def test_a_column_that_begins_late_keeps_its_place(tmp_path):
    write_jsonl(tmp_path/"metrics.jsonl", [{"step": 1, "loss": .7}, {"step": 2, "loss": .6, "extra": 5}])
    m = load_run(tmp_path).metrics
    assert math.isnan(m["extra"][0]) and m["extra"][1] == 5


@pytest.mark.parametrize("name, text, says", [
    ("config.yaml", "a: [1", "config.yaml: broken YAML"),
    ("config.yaml", "- 1\n- 2", "config.yaml: expected an object with fields"),
    ("summary.json", '{"mine": ', "summary.json: broken JSON"),
    ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2")])
def test_broken_files_are_named(tmp_path, name, text, says):
    make_run(tmp_path/"run")
    (tmp_path/"run"/name).write_text(text)
    with pytest.raises(UserError, match=says) as e: load_run(tmp_path/"run")
    assert "\n" not in str(e.value)


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"): load_run(tmp_path/"none")
    (tmp_path/"notes.txt").write_text("hello")
    with pytest.raises(UserError, match="no run in this folder"): load_run(tmp_path)
    with pytest.raises(UserError, match="no such folder"): load_run(tmp_path/"notes.txt")


def test_trailing_mean():
    assert trailing_mean([2., 4., 6.], 1) == [2., 4., 6.]
    assert trailing_mean([2., 4., 6.], 9) == [2., 3., 4.]
    assert math.isnan(trailing_mean([math.nan, 1.], 1)[0])


@pytest.mark.parametrize("n, w", [(1, 1), (5, 5), (7, 3), (40, 4), (41, 10), (1000, 37)])
def test_a_trailing_mean_is_that_of_its_window_whatever_stood_before(n, w):
    "Huge values and missing ones leave no trace in the windows behind them"
    rng = random.Random(n)
    xs = [rng.choice([rng.gauss(0, 1), rng.gauss(0, 1), 1e15, math.nan, -math.inf]) for _ in range(n // 2)]
    xs += [rng.gauss(0, 1) for _ in range(n - len(xs))]
    for i, found in enumerate(trailing_mean(xs, w)):
        finite = [x for x in xs[max(0, i + 1 - w):i + 1] if math.isfinite(x)]
        expected = statistics.fmean(finite) if finite else math.nan
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15 * max(map(abs, finite), default=0), nan_ok=True)


def test_curves_draw_every_panel_and_leak_nothing(tmp_path):
    cool, hot = load_run(make_run(tmp_path/"cool")), load_run(make_run(tmp_path/"hot"))
    fig = curves(cool, hot)
    assert isinstance(fig, Figure) and pyplot.get_fignums() == []
    assert [ax.get_title(loc="left") for ax in fig.axes] == [p.title for p in PANELS]
    for ax, panel in zip(fig.axes, PANELS):
        values = {tuple(line.get_ydata()) for line in ax.lines}
        for column in panel.columns: assert tuple(filter(math.isfinite, cool.metrics[column])) in values, column
    assert any(abs(line.get_ydata()[0] - math.log(2)) < 1e-12 for line in fig.axes[0].lines), "the ln 2 line"
    fig.savefig(io.StringIO(), format="svg")


def test_curves_of_a_run_with_holes(tmp_path):
    rows = metrics(5)
    rows[2] |= {"loss": math.nan, "grad_norm": math.inf}
    write_jsonl(tmp_path/"metrics.jsonl", rows)
    curves(load_run(tmp_path)).savefig(io.StringIO(), format="svg")
    write_jsonl(tmp_path/"metrics.jsonl", [{"step": 1, "loss": math.log(2)}])
    curves(load_run(tmp_path)).savefig(io.StringIO(), format="svg")


def test_no_metrics_no_curves(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl"): curves(load_run(make_run(tmp_path/"run", ("mine",))))


def test_two_runs_are_told_apart_by_name(tmp_path):
    a, b = load_run(make_run(tmp_path/"cool")), load_run(make_run(tmp_path/"hot $x_1$"))
    assert not curves(a).legends
    assert [t.get_text() for t in curves(a, b).legends[0].get_texts()] == ["cool", "hot $x_1$"]
    curves(a, b).savefig(io.StringIO(), format="svg")


CHOSEN, MARGIN, ACCURACY = "reward/chosen", "reward/margin", "reward/accuracy"
BY_TOKEN, TOKENS = [[-8., -20.], [-3., -9.]], [[10, 40], [5, 20]]


def sick(path, change=lambda rows: None, watched=None, **train):
    "A run folder with some numbers changed; `watched`: the lines of margins.jsonl"
    make_run(path, ("train",))
    (path/"config.yaml").write_text(yaml.safe_dump({"train": {"beta": .1} | train}))
    rows = metrics()
    change(rows)
    write_jsonl(path/"metrics.jsonl", rows)
    if watched: write_jsonl(path/"margins.jsonl", watched)
    return path


def scale(**by):
    "A change: columns times a factor"
    return each(lambda r: {name: r[name] * factor for name, factor in by.items()})


def put(at, **values):
    "A change: numbers of one step"
    return lambda rows: rows[at].update(values)


def each(new, begin=0):
    "A change: new(row) -> numbers of every step from `begin` on"
    def change(rows):
        for r in rows[begin:]: r.update(new(r))
    return change


def watching(logps, z=2.):
    "The lines of margins.jsonl of two pairs: before the first step, and at the end"
    return [{"step": 0, "z": [0., 0.], "logps": logps, "token_by_token": BY_TOKEN, "tokens": TOKENS},
            {"step": 120, "z": [z, z]}]


def test_the_doctor_finds_health(tmp_path):
    for path in (sick(tmp_path/"bare"), sick(tmp_path/"watched", watched=watching(BY_TOKEN))):
        text, cause = doctor(path)
        assert cause == "" and "FAILS" not in text and text.endswith("healthy, as far as this folder says")
    # without margins.jsonl one sign cannot be told
    assert [s.holds for s in signs(load_run(tmp_path/"bare"))].count(None) == 1
    assert all(s.holds for s in signs(load_run(tmp_path/"watched")))
    assert len(signs(load_run(tmp_path/"watched"))) == len(CHECKS)


MEANS = [[-8/10, -20/40], [-3/5, -9/20]] # BY_TOKEN over TOKENS
HARDLY_MOVED = each(lambda r: {"loss": math.log(2) - .001 * r["step"] / 120, MARGIN: r[MARGIN] / 200, CHOSEN: 0.})
NOTHING_LEARNT = each(lambda r: {"loss": math.log(2), MARGIN: 1e-5 * r["step"] * (r["step"] > 1)})
GROWING_NORM = each(lambda r: {"grad_norm": r["grad_norm"] * (1 + r["step"] / 40)})
WILD = each(lambda r: {"loss": .2 if r["step"] % 3 else 9.}, begin=40) # mean 3.1, with a standard error of 0.8
TOO_EASY = each(lambda r: {"loss": .01}, begin=10)
NOISE = each(lambda r: {"loss": .70 if r["step"] > 1 else math.log(2), ACCURACY: .5})


def backwards(rows):
    for r in rows:
        growing = 1 + r["step"] / 99 if r["step"] > 1 else 1
        r.update({"loss": math.log(2) * growing, MARGIN: -r[MARGIN], ACCURACY: .1})


@pytest.mark.parametrize("words, how", [
    ("not the policy's start", dict(change=put(0, loss=.69320))),
    ("not the policy's start", dict(change=put(0, **{MARGIN: 1.1e-5}))),
    ("a mean over the tokens", dict(watched=watching(MEANS))),
    ("other tokens count", dict(watched=watching([[-22., -35.], [-17., -24.]]))),
    # as if one <|end|> were left out
    ("other tokens count", dict(watched=watching([[-7.7, -20.], [-3., -9.]]), precision="fp32")),
    ("trains along", dict(change=scale(**{MARGIN: 0.}))),
    ("trains along", dict(change=scale(**{MARGIN: .02}), watched=watching(BY_TOKEN, 40.))),
    ("learning rate is too high", dict(change=scale(**{CHOSEN: 20.}))),
    ("beta is too low", dict(change=scale(**{CHOSEN: 5.}), beta=.02)),
    ("beta is too low: the policy has moved", dict(change=HARDLY_MOVED, beta=.002)),
    ("learning rate is too low", dict(change=NOTHING_LEARNT)),
    ("learning rate is too high", dict(change=GROWING_NORM)),
    ("wrecked: the learning rate is too high", dict(change=WILD)),
    ("known by heart", dict(change=TOO_EASY, epochs=3)),
    ("something trivial", dict(change=TOO_EASY)),
    ("wrong way round", dict(change=backwards)),
    ("pairs are noise", dict(change=NOISE)),
    ("something trivial", dict(change=each(lambda r: {ACCURACY: 1.}))),
])
def test_the_doctor_names_the_illness(tmp_path, words, how):
    text, cause = doctor(sick(tmp_path/"run", **how))
    assert words in cause and "FAILS" in text, text


def test_a_wild_loss_does_not_glide(tmp_path):
    "Its standard error is so large that the mean alone would excuse it"
    loss = next(s for s in signs(load_run(sick(tmp_path/"wild", change=WILD))) if "glides" in s.name)
    assert loss.holds is False and "single steps 0.20 to 9.00" in loss.found
    one_step = sick(tmp_path/"one step", change=put(-1, loss=60.)) # the mean 3, less two errors below 0
    assert "the loss glides down, and not to 0" in failing(one_step)


def test_a_margin_that_comes_up_from_below_0_and_stays_there_does_not_grow(tmp_path):
    run = sick(tmp_path/"below", change=each(lambda r: {MARGIN: r["step"] / 240 - 1}, begin=1))
    assert "the margin grows from 0" in failing(run)


def failing(run):
    "The names of the signs that do not hold"
    return [s.name for s in signs(load_run(run)) if s.holds is False]


def ends_at(loss, accuracy):
    "A change: the last half of a run"
    return each(lambda r: {"loss": loss, ACCURACY: accuracy}, begin=60)


def wikigpt(path, loss=.58, accuracy=.78, judged=None, **train):
    "A run with the settings of the profile wikigpt that ends with these numbers"
    run = sick(path, change=ends_at(loss, accuracy), **ORIGINAL_SETTINGS | {"lr": 1e-6} | train)
    (run/"summary.json").write_text(json.dumps({"judge": judged} if judged else {}))
    return run


def judged(rate, low, high):
    counts = {"n": 300, "win": 120, "tie": 80, "loss": 100}
    return counts | {"decided_win_rate": rate, "ci_low": low, "ci_high": high}


def test_the_settings_of_the_original_lesson_are_those_of_its_profile():
    "And no other profile has them"
    for name in ("wikigpt", "miniwiki", "smollm2"):
        train = section(RunTrainConfig, "train", load_profile(name)["train"])
        same = all(getattr(train, key) == value for key, value in ORIGINAL_SETTINGS.items())
        assert same == (name == "wikigpt"), name


@pytest.mark.parametrize("numbers", [
    {}, {"loss": .55}, {"loss": .62}, {"accuracy": .7}, {"accuracy": .85}, {"judged": judged(.6, .52, .68)},
    {"judged": judged(.5, .4, .6)}, {"judged": judged(.72, .62, .8)}, {"judged": judged(None, 0., 1.)}])
def test_a_wikigpt_run_inside_the_ranges_of_the_original_lesson_is_healthy(tmp_path, numbers):
    run = wikigpt(tmp_path/"run", **numbers)
    assert doctor(run)[1] == "", doctor(run)[0]
    assert len(signs(load_run(run))) == len(CHECKS) + len(ORIGINAL_CHECKS)


@pytest.mark.parametrize("words, numbers", [
    ("more was learnt than in the original lesson", {"loss": .5}),
    ("less was learnt than in the original lesson", {"loss": .65}),
    ("less was learnt than in the original lesson", {"accuracy": .66}),
    ("more was learnt than in the original lesson", {"accuracy": .9}),
    ("the answers hardly got better", {"judged": judged(.45, .4, .52)}),
    ("look at lengths", {"judged": judged(.8, .7, .88)})])
def test_a_wikigpt_run_outside_the_ranges_is_told_so(tmp_path, words, numbers):
    text, cause = doctor(wikigpt(tmp_path/"run", **numbers))
    assert words in cause and "FAILS" in text, text


def orpo_losses(seed):
    "A loss that depends on the pairs, and falls by five parts in a hundred under the noise of the batch"
    rng = random.Random(seed)
    return [1.6 - .08 * i / 119 + rng.gauss(0, .09) for i in range(120)]


def test_a_noisy_first_batch_says_nothing_of_a_loss_that_depends_on_the_pairs(tmp_path):
    "Where equal models have no loss of their own, the end is held to the first fifth, not to one batch"
    failed = 0
    for seed in range(40):
        def change(rows, losses=orpo_losses(seed)):
            for row, loss in zip(rows, losses): row["loss"] = loss
        found = signs(load_run(sick(tmp_path/str(seed), change, loss_type="orpo")))
        assert "should be" not in found[0].found.split(";")[0], found[0]
        failed += any(s.holds is False and s.name == "the loss glides down, and not to 0" for s in found)
    assert failed <= 1


def test_a_loss_that_lowers_the_chosen_answers_is_not_called_fleeing(tmp_path):
    "apo_down does it by design; 20 nats are too far for it too"
    def change(rows, by=-2.):
        for row in rows: row["reward/chosen"] = by
    name = "the chosen reward stays near 0"
    def holds(path, **train):
        return next(s.holds for s in signs(load_run(sick(path, change, beta=1., **train))) if s.name == name)
    assert holds(tmp_path/"a", loss_type="apo_down") and not holds(tmp_path/"b", loss_type="dpo")


@pytest.mark.parametrize("other", [{"beta": 1.25}, {"block_size": 256}, {"epochs": 2}, {"loss_type": "ipo"},
                                   {"sft_weight": .2}])
def test_other_settings_are_not_held_to_these_ranges(tmp_path, other):
    checks = signs(load_run(wikigpt(tmp_path/"run", loss=.4, accuracy=.9, **other)))
    assert not any("original" in s.name for s in checks)


@pytest.mark.parametrize("loss_type, first", [("ipo", 25.), ("hinge", 1.)])
def test_the_first_loss_of_other_losses(tmp_path, loss_type, first):
    "ln 2 is that of DPO; two equal models have another one under IPO and hinge"
    rescaled = each(lambda r: {"loss": first * r["loss"] / math.log(2)})
    good = sick(tmp_path/"good", change=rescaled, loss_type=loss_type)
    bad = sick(tmp_path/"bad", loss_type=loss_type)
    assert signs(load_run(good))[0].holds and not signs(load_run(bad))[0].holds


def test_the_doctor_says_when_it_is_too_early_or_nothing_is_there(tmp_path):
    path = sick(tmp_path/"run", change=lambda rows: rows.__delitem__(slice(3, None)))
    assert "3 steps are too few" in doctor(path)[0] and doctor(path)[1] == ""
    warming_up = sick(tmp_path/"warming_up", change=lambda rows: rows.__delitem__(slice(6, None)), warmup_steps=8,
                      watched=watching(BY_TOKEN, 40.)) # the policy has moved, the log is a step behind
    assert "6 steps are too few" in doctor(warming_up)[0] and doctor(warming_up)[1] == ""
    with pytest.raises(UserError, match="no metrics.jsonl yet"): doctor(make_run(tmp_path/"mined", ("mine",)))
    write_jsonl(path/"metrics.jsonl", [{"step": 1, "loss": .69}])
    with pytest.raises(UserError, match="'reward/margin' is missing or not a number"): doctor(path)
    endless = sick(tmp_path/"endless", change=put(7, grad_norm=math.inf))
    with pytest.raises(UserError, match="'grad_norm' is missing or not a number"): doctor(endless)
    # nothing moved: no proof
    still = sick(tmp_path/"still", change=scale(**{MARGIN: 0.}), watched=watching(BY_TOKEN, 0.))
    assert doctor(still)[0].count("ok     the reference stands still") == 1
    (still/"config.yaml").write_text("train:\n")
    doctor(still)


def test_the_command(tmp_path, capsys):
    main(["doctor", str(sick(tmp_path/"well"))])
    assert "ok     the first loss" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(["doctor", str(sick(tmp_path/"ill", change=put(0, loss=.7)))])
    printed = capsys.readouterr()
    assert e.value.code == 2 and printed.err.startswith("error: ")
    assert "is sick: the reference is not the policy's start" in printed.err and "FAILS" in printed.out
