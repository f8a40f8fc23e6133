"The short form of the lesson on a real model: SmolLM2 imported, 16 tasks, a few steps, a verdict, a report"
import json
import math
from pathlib import Path

import pytest
import yaml
from smol import gguf_file

from wikidpo.cli import main
from wikidpo.core.chat import encode_prompt, load_tokenizer
from wikidpo.core.files import read_jsonl
from wikidpo.run.folder import write_jsonl
from wikidpo.run.profiles import load_profile
from wikidpo.world.grounded import find_task, tasks, truth

pytestmark = pytest.mark.smollm2
SMALL = {"mine": {"n_prompts": 16, "best": 4, "gap": 1, "batch": 16},
         "train": {"epochs": 1, "batch_size": 6, "grad_accum_steps": 1, "warmup_steps": 1, "watch": 0,
                   "wandb": "disabled", "precision": "fp32"},
         "judge": {"n": 4, "batch": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A folder with the imported model and the prompts, as the profile wants them"
    d = tmp_path_factory.mktemp("smollm2")
    main(["import", str(gguf_file()), "--out", str(d/"checkpoints"/"smollm2")])
    questions = [t for t in tasks("mine") if t.kind == "question"]
    for split, chosen in (("mine", questions[:16]), ("eval", tasks("eval")[:4])):
        write_jsonl(d/"prompts"/f"prompts_{split}.jsonl", [{"prompt": t.prompt} for t in chosen])
    (d/"small.yaml").write_text(yaml.safe_dump(SMALL))
    return d


def test_the_short_form_of_the_lesson(folder, monkeypatch):
    monkeypatch.chdir(folder)
    main(["lesson", "--profile", "smollm2", "--config", "small.yaml", "--out", "run"])
    samples, pairs, metrics = (read_jsonl(folder/"run"/f"{n}.jsonl") for n in ("samples", "pairs", "metrics"))
    assert len(samples) == 16*4 and {find_task(r["prompt"]).kind for r in samples} == {"question"}
    # a model that reads: many answers hold what is asked for, and most others are words too
    assert sum(truth(r["prompt"], r["text"]).label == "empty" for r in samples) < 8
    assert sum(truth(r["prompt"], r["text"]).score >= 4 for r in samples) > 8
    assert len(pairs) >= 4
    assert len(metrics) == math.ceil(len(pairs) / SMALL["train"]["batch_size"])
    assert abs(metrics[0]["loss"] - .693147) < 1e-4 and metrics[0]["reward/margin"] == 0
    summary = json.loads((folder/"run"/"summary.json").read_text())
    assert summary["judge"]["n"] == 4 and (folder/"run"/"report.html").stat().st_size > 10_000


def test_what_is_missing_is_said_with_the_command_that_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for remedy in ("`wikidpo prompts` makes one", "`wikidpo import MODEL --out checkpoints/smollm2` makes it"):
        with pytest.raises(SystemExit): main(["mine", "--profile", "smollm2", "--out", "run"])
        assert remedy in capsys.readouterr().err
        write_jsonl(tmp_path/"prompts"/"prompts_mine.jsonl", [{"prompt": "Who?"}])


def test_every_prompt_fits_the_block(folder):
    profile, tok = load_profile("smollm2"), load_tokenizer(folder/"checkpoints"/"smollm2"/"tokenizer.json")
    longest = max(len(encode_prompt(tok, t.prompt)) for t in tasks("mine")[:1000])
    assert longest + profile["mine"]["max_new"] <= profile["train"]["block_size"]
