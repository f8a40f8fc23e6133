"`make bench` on a model for a test: every contestant does the work for real, and one that is missing is reported"
import json, sys
from pathlib import Path

import pytest, torch

sys.path.insert(0, str(Path(__file__).parent.parent/"benchmarks"))
import bench

def results(monkeypatch, out, *words):
    "results.json of `bench --quick`"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(out), *words])
    bench.main()
    return json.loads((out/"results.json").read_text())["rows"]

def counts(contestant): return [r["amount"] for r in contestant["repeats"]]

def test_missing_peers_are_reported_and_the_others_measured(monkeypatch, tmp_path):
    for env in ("peers", "vllm"): monkeypatch.setitem(bench.ENVS, env, str(tmp_path/".venv-nowhere/bin/python"))
    row = results(monkeypatch, tmp_path, "sample")["sample"]
    found = row["contestants"]
    for name in ("vllm", "huggingface"): assert found[name] == {"did_not_run": ".venv-nowhere is not installed"}
    assert counts(found["ours"]) == counts(found["lesson"]) == [2 * 4 * 8] * 3                   # every response has its full length
    assert set(row["times_as_fast_as"]) == {"lesson"} and row["times_as_fast_as"]["lesson"] == found["ours"]["value"] / found["lesson"]["value"] > 0
    assert row["verdicts"][0] == ["1.5 × vLLM", "did not run"] and row["verdicts"][1][1].split(":")[0] in ("reached", "missed")
    page = (tmp_path/"README.md").read_text()
    assert "| vLLM | did not run: .venv-nowhere is not installed |" in page and f"| {bench.number(found['ours']['value'])} |" in page

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its rows are measured")
def test_gpu_rows_say_that_there_is_no_gpu(monkeypatch, tmp_path):
    rows = results(monkeypatch, tmp_path, *(name for name in bench.table(True) if name.startswith("gpu-")))
    assert len(rows) == 6 and all(c == {"did_not_run": "no GPU"} for r in rows.values() for c in r["contestants"].values())
    assert all(said == "did not run" for r in rows.values() for _, said in r["verdicts"])

def test_a_contestant_that_fails_says_why(tmp_path):
    row = bench.Row("", "sample.py", dict(device="cpu", folder=str(tmp_path)), ("ours",))
    assert "tokenizer.json" in bench.measure(row, tmp_path)["ours"]["did_not_run"]

def test_arithmetic():
    assert bench.summary([{"amount": 30, "seconds": s} for s in (1., 3., 2.)], "tokens/s") == {"value": 15, "low": 10, "high": 30, "seconds": 2.}
    cfg = bench.SHAPES["110M"]
    assert abs(bench.flop(cfg, 1, context=1) / 2 - 110.1e6) < 1e5                           # two operations for each weight: the course's figure for this shape
    assert bench.flop(cfg, 100, 4) == 4 * bench.flop(cfg, 100)
    row = bench.Row("", "", {}, ("ours", "trl"), targets={"trl": 3, "seconds": 90, "of_peak": .4})
    found = {"ours": {"value": 8., "seconds": 91.}, "trl": {"value": 2.}}
    assert list(bench.verdict(row, found, bench.compare(row, found, None))) == [("3 × TRL", "reached: 4"), ("90 s", "missed: 91"), ("40% of the matrix rate", "did not run")]

def test_numbers_of_a_quick_run_cannot_be_published(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick"])
    with pytest.raises(SystemExit): bench.main()
    assert "--quick needs another --out" in capsys.readouterr().err

@pytest.mark.slow
def test_every_row_runs(monkeypatch, tmp_path):
    rows = results(monkeypatch, tmp_path)
    assert list(rows) == list(bench.table(True))
    for name, row in rows.items():
        for who, c in row["contestants"].items():
            missing = not Path(bench.ENVS[bench.WHO[who][1]]).exists() or name.startswith("gpu-") and not torch.cuda.is_available()
            assert ("did_not_run" in c) == missing, (name, who, c)
            if not missing: assert 0 < c["low"] <= c["value"] <= c["high"] and len(c["repeats"]) == bench.table(True)[name].rounds
    assert {tuple(counts(c)) for c in rows["train"]["contestants"].values() if "value" in c} == {(4, 4)}
    assert {tuple(counts(c)) for c in rows["sample"]["contestants"].values() if "value" in c} == {(64,) * 3}

@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply in bf16")
def test_the_profile_counts_packed_products_as_products():
    from torch import profiler
    from train import kind
    from wikidpo.model import GPT, GPTConfig, pack_copies
    model = GPT(GPTConfig(vocab_size=97, n_layer=1, n_head=4, n_embd=32, ffn_dim=48))
    with profiler.profile() as seen:
        pack_copies(model)
        with torch.autocast("cpu", torch.bfloat16): model(torch.zeros(2, 9, dtype=torch.long))[0].sum().backward()
    found = {e.key: kind(e.key) for e in seen.key_averages() if e.key.startswith(("mkldnn::", "aten::mm"))}
    assert set(found.values()) == {"matrix products", "copies"} and len(found) >= 3, found
