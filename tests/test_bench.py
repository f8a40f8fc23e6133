"`make bench` on a model for a test: every contestant does the work for real, and one that is missing is reported"
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from systems import LINUX

sys.path.insert(0, str(Path(__file__).parent.parent/"benchmarks"))
import bench
import front
import material
from contestants import CONTESTANTS, ENVS, ROOT
from page import page
from rows import SHAPES, Row, flop, table
from targets import PartOfTime, Seconds, ShareOfPeak, TimesAsFast, compare, judge, number, verdict
from worker import with_best_batch


def results(monkeypatch, out, *words):
    "The rows in results.json of `bench --quick`"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(out), *words])
    bench.main()
    return json.loads((out/"results.json").read_text())["rows"]


def counts(contestant): return [r["amount"] for r in contestant["repeats"]]


def test_missing_peers_are_reported_and_the_others_measured(monkeypatch, tmp_path):
    for env in ("peers", "vllm"): monkeypatch.setitem(ENVS, env, str(tmp_path/".venv-nowhere/bin/python"))
    row = results(monkeypatch, tmp_path, "sample")["sample"]
    found = row["contestants"]
    for name in ("vllm", "huggingface"): assert found[name] == {"did_not_run": ".venv-nowhere is not installed"}
    assert counts(found["ours"]) == counts(found["lesson"]) == [2 * 4 * 8] * 3 # every response has its full length
    assert set(row["times_as_fast_as"]) == {"lesson"}
    assert row["times_as_fast_as"]["lesson"] == found["ours"]["value"] / found["lesson"]["value"] > 0
    assert row["verdicts"][0] == ["1.5 × vLLM", "did not run"]
    assert row["verdicts"][1][1].split(":")[0] in ("reached", "missed")
    text = (tmp_path/"README.md").read_text()
    assert "| vLLM | did not run: .venv-nowhere is not installed |" in text
    assert f"| {number(found['ours']['value'])} |" in text


def test_the_readme_says_how_long_the_lesson_took_on_a_card():
    rows = json.loads((ROOT/"benchmarks"/"h100"/"results.json").read_text())["rows"]
    seconds = rows["gpu-lesson-smollm2"]["contestants"]["whole"]["value"]
    assert f"the last of these commands took {seconds:.0f} s" in (ROOT/"README.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its rows are measured")
def test_gpu_rows_say_that_there_is_no_gpu(monkeypatch, tmp_path):
    rows = results(monkeypatch, tmp_path, *(name for name in table(True) if name.startswith("gpu-")))
    assert len(rows) == 7
    for row in rows.values():
        assert all(c == {"did_not_run": "no GPU"} for c in row["contestants"].values())
        assert all(answer == "did not run" for _, answer in row["verdicts"])


def test_without_the_real_model_its_rows_say_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(material, "SMOLLM2", tmp_path/"nowhere")
    row = table()["mine-smollm2"]
    why = {"did_not_run": "no checkpoints/smollm2: `wikidpo import smollm2` makes it"}
    assert bench.measure(row, tmp_path) == dict.fromkeys(row.who, why)


def test_answers_of_a_trained_model_end_where_they_end(monkeypatch, tmp_path):
    for env in ("peers", "vllm"): monkeypatch.setitem(ENVS, env, str(tmp_path/".venv-nowhere/bin/python"))
    found = results(monkeypatch, tmp_path, "mine-smollm2", "--rounds", "1")["mine-smollm2"]["contestants"]
    ours, original = found["ours"], found["lesson"]
    assert ours["rows_at_once"] in (4, 8) and original["estimated"] == "from 1 of the prompts"
    assert counts(ours)[0] == ours["tokens_an_answer"] * 16 <= 8 * 16 and 0 < counts(original)[0] <= 8 * 4
    assert f"rows at once {ours['rows_at_once']}; tokens an answer" in (tmp_path/"README.md").read_text()


def test_a_contestant_takes_the_batch_with_which_it_is_fastest():
    seen = []

    def prepare(task):
        time.sleep(.5 if task["batch"] == 8 else 0) # getting ready counts for nobody, and so does the first run
        runs = []

        def train():
            seen.append((task["batch"], task["accum"]))
            time.sleep(0 if task["batch"] == 8 and runs else .3)
            runs.append(task)
        return train
    task = dict(batch=4, accum=8)
    assert with_best_batch(task, prepare) == task and not seen # nothing to try
    best = with_best_batch(task | dict(batches=[4, 8, 16]), prepare)
    assert (best["batch"], best["accum"]) == (8, 4)
    assert seen == [(4, 8), (4, 8), (8, 4), (8, 4), (16, 2), (16, 2)]


def test_a_contestant_that_fails_says_why(tmp_path):
    row = Row("", "sample.py", dict(device="cpu", folder=str(tmp_path)), ("ours",))
    assert "tokenizer.json" in bench.measure(row, tmp_path)["ours"]["did_not_run"]


def test_a_command_is_measured_by_its_processor_time_and_must_do_what_it_should(tmp_path):
    row = Row("", "yardstick.py", dict(device="cpu"), ("import", "import-loss"), "s", (Seconds(60, "import"),), 2)
    found = bench.measure(row, tmp_path)
    ours = found["import"]
    assert counts(ours) == [ours["low"], ours["high"]] or counts(ours) == [ours["high"], ours["low"]]
    assert all(0 < r["amount"] for r in ours["repeats"]) and ours["value"] < 60
    (target,) = row.targets
    assert target.words(row) == '60 s for `python -c "import wikidpo"`'
    assert verdict(target, row, found, {}) == f"reached: {number(ours['value'])}"


def test_arithmetic():
    repeats = [{"amount": 30, "seconds": s} for s in (1., 3., 2.)]
    assert bench.summary(repeats, "tokens/s") == {"value": 15, "low": 10, "high": 30, "seconds": 2.}
    cfg = SHAPES["110M"]
    # two operations for each weight: the course's figure for this shape
    assert abs(flop(cfg, 1, context=1) / 2 - 110.1e6) < 1e5
    assert flop(cfg, 100, 4) == 4 * flop(cfg, 100)


@LINUX
def test_what_a_large_run_costs_is_measured_in_a_process_of_its_own():
    import load
    from rows import LOADS
    assert set(load.JOBS) == set(LOADS) == set(table()["load"].who)
    found = load.measured("load-doctor", 20)
    assert 0 < found["seconds"] < 60 and .05 < found["peak_gb"] < 4
    row = table()["load"]
    contestants = dict.fromkeys(LOADS, {"value": 2., "growth": 100., "peak_gb": .5})
    answers = {t.words(row): verdict(t, row, contestants, {}) for t in row.targets}
    assert answers["under 1 GB for `PairDataset`"] == "reached: 0.5"
    assert answers["at most 15 × for ten times the prompts for the report"] == "missed: 100"
    assert len(answers) == 3 * len(LOADS)


def test_verdicts():
    targets = (TimesAsFast(3, "trl"), Seconds(90), ShareOfPeak(.4))
    row = Row("", "", {}, ("ours", "trl"), targets=targets)
    found = {"ours": {"value": 8., "seconds": 91.}, "trl": {"value": 2.}}
    compared = compare(row, found, None)
    assert [(t.words(row), verdict(t, row, found, compared)) for t in targets] == [
        ("3 × TRL", "reached: 4"),
        ("90 s", "missed: 91"),
        ("40% of the matrix rate", "did not run"),
    ]
    half = PartOfTime(.5, "before")
    row = Row("", "", {}, ("whole", "before"), "s", (half,))
    assert half.words(row) == "0.5 × the time of this project before it was made fast"
    for seconds, answer in ((50., "reached: 0.5"), (60., "missed: 0.6")):
        found = {"whole": {"value": seconds}, "before": {"value": 100.}}
        assert verdict(half, row, found, compare(row, found, None)) == answer
    alone = {"whole": {"value": 50.}, "before": {"did_not_run": "this clone has no commit d46b10a"}}
    assert verdict(half, row, alone, compare(row, alone, None)) == "did not run"


def test_the_lesson_of_an_earlier_commit_runs_its_own_package(monkeypatch, tmp_path):
    import yardstick
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    (tmp_path/"wikidpo").mkdir()
    package = """import json, pathlib, sys

def main():
    made = pathlib.Path("made")
    if sys.argv[1] == "import": return made.write_text("7")
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir()
    summary = {phase: {"seconds": int(made.read_text())} for phase in ("mine", "train", "judge")}
    (out/"summary.json").write_text(json.dumps(summary))
"""
    (tmp_path/"wikidpo"/"cli.py").write_text(package)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "early"]): subprocess.run(git + words, check=True)
    (tmp_path/"wikidpo"/"cli.py").write_text("def main(): raise SystemExit('the package of today')\n")
    monkeypatch.setattr(yardstick, "ROOT", tmp_path)
    seconds, found = yardstick.lesson_before({"args": [], "before": "HEAD", "first": [["import"]]})()
    assert seconds > 0 and found == dict.fromkeys(("mine_s", "train_s", "judge_s"), 7.)
    with pytest.raises(RuntimeError, match="this clone has no commit abcdef0"):
        yardstick.lesson_before({"args": [], "before": "abcdef0"})


def test_a_contestant_that_has_ended_is_told_by_its_last_words():
    "Also one that was ready and ended before its turn, as for want of memory"
    task = {"device": "cpu", "dtype": "float32", "threads": 1, "size": 8, "times": 1}
    worker = bench.Worker("yardstick.py", "float32", task)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="it ended without a word"): worker.measure()
    worker.close()


@pytest.mark.parametrize("day,share", [("2026-11-25", .5), ("2026-11-27", None)])
def test_the_machine_of_another_day_is_no_measure(day, share):
    "A yardstick counts for the rows of its own day"
    known = {"product": Row("", "", {}, ("bfloat16",)), "train": Row("", "", {}, ("ours",), flop=1e9)}
    rows = {"product": {"measured": "2026-11-25 10:59 UTC", "contestants": {"bfloat16": {"value": 8., "high": 8.}}},
            "train": {"measured": f"{day} 13:17 UTC", "contestants": {"ours": {"value": 4.}}}}
    judge(rows, known)
    assert rows["train"].get("of_peak") == (share and {"ours": share})


@pytest.mark.parametrize("dtype,share,limit", [("bfloat16", .5, 5.), ("float32", 1., 2.5)])
def test_a_row_is_held_to_the_rates_of_its_precision(dtype, share, limit):
    "Its products to those in the same precision, its reading to the bytes of its numbers"
    day = {"measured": "2026-11-25 10:59 UTC"}
    known = {"product": Row("", "", {}, ("float32", "bfloat16")), "memory": Row("", "", {}, ("memory",)),
             "sample": Row("", "", {}, ("ours",), flop=1e9, least=1e8, reads=1e9)}
    def best(rate): return {"value": rate, "high": rate}
    rows = {"product": day | {"contestants": {"bfloat16": best(8.), "float32": best(4.)}},
            "memory": day | {"contestants": {"memory": best(10.)}},
            "sample": day | {"task": {"dtype": dtype}, "contestants": {"ours": {"value": 4.}}}}
    judge(rows, known)
    assert rows["sample"]["of_peak"] == {"ours": share} and rows["sample"]["limit"] == limit


PAGES = sorted(path.parent.name for path in Path(bench.HERE).glob("*/results.json"))


@pytest.mark.parametrize("folder", PAGES)
def test_a_machines_page_is_what_its_results_say(folder):
    found, committed = front.measured()[folder], (bench.HERE/folder/"README.md").read_text()
    assert page(found, "../README.md") == committed
    judge(found["rows"], table())
    assert page(json.loads(json.dumps(found)), "../README.md") == committed


def test_the_first_page_has_every_machine_and_every_target():
    assert sorted(front.MACHINES) == PAGES
    text = front.front(table(), front.measured())
    assert text == (bench.HERE/"README.md").read_text()
    for name, row in table().items():
        lines = [line for line in text.splitlines() if line.startswith(f"| {row.brief} (`{name}`) |")]
        assert len(lines) == (1 if len(row.targets) > front.MANY else len(row.targets)), name
        assert bool(row.brief) == bool(row.targets), name


def test_the_first_page_shows_what_is_reached_missed_and_not_measured():
    rows = {"train": Row("", "", {}, ("ours", "trl"), brief="training", targets=(TimesAsFast(3, "trl"), Seconds(90))),
            "load": Row("", "", {}, ("ours",), brief="large runs", targets=tuple(map(Seconds, range(1, 6))))}
    limit = "missed: 2; at this machine's measured rates at most 2.5"
    loads = [["1 s", "missed: 2"], ["2 s", "reached: 2"], ["3 s", "reached: 2"], ["4 s", "reached: 2"],
             ["5 s", "reached: 2"]]
    machines = {
        "epyc": {"rows": {"train": {"verdicts": [["3 × TRL", limit], ["90 s", "did not run"]], "note": "mended"}}},
        "xeon": {"rows": {"train": {"verdicts": [["3 × TRL", "reached: 3.1"], ["90 s", "reached: 80"]]},
                          "load": {"verdicts": loads}}}}
    assert front.targets(rows, machines) == [
        "| | target | [EPYC](epyc/README.md) | [Xeon](xeon/README.md) |",
        "|---|---|---|---|",
        r"| training (`train`) | 3 × TRL | 2 ✗ (2.5) \* | 3.1 ✓ |",
        "| training (`train`) | 90 s |  | 80 ✓ |",
        "| large runs (`load`) | 5 limits |  | 4 of 5 ✗ |",
    ]


def test_the_readme_tells_what_was_measured():
    "Its table is the first page's, as far as others are compared with"
    def compares(row): return any(isinstance(t, TimesAsFast) for t in row.targets)
    rows = {name: row for name, row in table().items() if compares(row)}
    machines = {folder: found for folder, found in front.measured().items() if folder != "h100"}
    told = (ROOT/"README.md").read_text().splitlines()
    lines = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line) for line in front.targets(rows, machines)]
    assert len(lines) > 10 and set(lines) <= set(told)


def test_numbers_of_a_quick_run_cannot_be_published(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(bench.HERE/"mine")])
    with pytest.raises(SystemExit): bench.main()
    assert "--quick needs another --out" in capsys.readouterr().err


def test_rows_of_another_machine_are_not_lost(monkeypatch, tmp_path):
    found = {"machine": {"cpu": "another"}, "rows": {}}
    (tmp_path/"results.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="name another folder with --out"): results(monkeypatch, tmp_path, "product")
    assert json.loads((tmp_path/"results.json").read_text()) == found


@pytest.mark.slow
def test_every_row_runs(monkeypatch, tmp_path):
    rows, known = results(monkeypatch, tmp_path), table(True)
    assert list(rows) == list(known)
    for name, row in rows.items():
        for who, c in row["contestants"].items():
            no_gpu = name.startswith("gpu-") and not torch.cuda.is_available()
            missing = no_gpu or not Path(ENVS[CONTESTANTS[who].env]).exists()
            assert ("did_not_run" in c) == missing, (name, who, c)
            if missing: continue
            assert 0 < c["low"] <= c["value"] <= c["high"] and len(c["repeats"]) == known[name].rounds
    for name, want in (("train", [4, 4]), ("sample", [64] * 3), ("step-smollm2", [4, 4]), ("epoch-smollm2", [8])):
        assert all(counts(c) == want for c in rows[name]["contestants"].values() if "value" in c)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply in bf16")
def test_the_profile_counts_packed_products_as_products():
    from torch import profiler
    from train import kind

    from wikidpo.core.model import GPT, GPTConfig
    from wikidpo.engine.packed import packed_copies
    model = GPT(GPTConfig(vocab_size=97, n_layer=1, n_head=4, n_embd=32, ffn_dim=48))
    with profiler.profile() as seen, packed_copies(model):
        with torch.autocast("cpu", torch.bfloat16): logits, _ = model(torch.zeros(2, 9, dtype=torch.long))
        logits.sum().backward()
    names = [e.key for e in seen.key_averages() if e.key.startswith(("mkldnn::", "aten::mm"))]
    found = {name: kind(name) for name in names}
    assert set(found.values()) == {"matrix products", "copies"} and len(found) >= 3, found
