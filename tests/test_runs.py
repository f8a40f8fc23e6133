"Reading run folders: columns, missing and broken parts, and the figure"
import io, math

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from runfolder import make_run, metrics, write_jsonl
from wikidpo.files import UserError
from wikidpo.runs import PANELS, curves, load_run, trailing_mean


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
    with pytest.raises(UserError, match=r"samples.jsonl:1"): run.samples


@pytest.mark.parametrize("steps", [(), ("mine",), ("train",), ("judge",)])
def test_missing_parts_are_empty(tmp_path, steps):
    run = load_run(make_run(tmp_path/"run", steps))
    assert bool(run.metrics) == ("train" in steps) and bool(run.pairs) == ("mine" in steps) and bool(run.verdicts) == ("judge" in steps)


def test_a_column_that_begins_late_keeps_its_place(tmp_path):
    write_jsonl(tmp_path/"metrics.jsonl", [{"step": 1, "loss": .7}, {"step": 2, "loss": .6, "extra": 5}])
    m = load_run(tmp_path).metrics
    assert math.isnan(m["extra"][0]) and m["extra"][1] == 5


@pytest.mark.parametrize("name, text, says", [("config.yaml", "a: [1", "config.yaml: cannot be read"), ("config.yaml", "- 1\n- 2", "config.yaml: expected names"),
                                              ("summary.json", '{"mine": ', "summary.json: cannot be read"), ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2")])
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


def test_curves_draw_every_panel_and_leak_nothing(tmp_path):
    cool, hot = load_run(make_run(tmp_path/"cool")), load_run(make_run(tmp_path/"hot"))
    fig = curves(cool, hot)
    assert isinstance(fig, Figure) and pyplot.get_fignums() == []
    assert [ax.get_title(loc="left") for ax in fig.axes] == [p.title for p in PANELS]
    for ax, panel in zip(fig.axes, PANELS):
        values = {tuple(line.get_ydata()) for line in ax.lines}
        for col in panel.columns: assert tuple(cool.metrics[col]) in values, col
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
