"Configurations, profiles and files: refused before anything is computed, and without torch"
import json, math, re, subprocess, sys
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest

from wikidpo.core.config import check_loss_options, LOSS_TYPES, TrainConfig
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.run import config
from wikidpo.run.folder import JsonlWriter, update_json
from wikidpo.run.profiles import claim, difference, finished, load_profile, section

SECTIONS = {"policy": config.PolicyConfig, "mine": config.MineConfig, "train": config.RunTrainConfig,
            "judge": config.EvaluateConfig}

def test_configurations_and_profiles_bring_no_torch_along():
    code = ("import sys, wikidpo.run.config, wikidpo.run.profiles, wikidpo.run.folder, wikidpo.core.config; "
            "print({'torch', 'numpy', 'openai', 'transformers', 'wandb'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

@pytest.mark.parametrize("profile", ["miniwiki", "smollm2", "wikigpt"])
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_of_a_shipped_profile_is_valid(profile, name):
    values = load_profile(profile)[name]
    cfg = section(SECTIONS[name], name, values)
    for key, value in values.items():
        found = getattr(cfg, key)
        assert (list(found) if isinstance(found, tuple) else found) == value

def complaint(check, *options):
    "What a check says against these options, or None"
    try: check(*options)
    except UserError as e: return str(e)

def test_loss_options_are_refused_as_the_loss_refuses_them():
    "The plain checks say yes and no where `pair_loss` does, in the same words"
    import torch
    from wikidpo.core.loss import pair_loss, PairLogps
    pair = PairLogps(*torch.full((4, 1), -1.), *torch.ones(2, 1))
    def loss(*options): pair_loss(pair, *options)
    for options in product((0, -1, math.inf, math.nan, .1), (*LOSS_TYPES, "sft"), (-.1, 0, .1, .5)):
        assert complaint(check_loss_options, *options) == complaint(loss, *options), options
    assert complaint(check_loss_options) is None

def test_a_run_trains_with_all_that_the_loop_needs():
    loop = {f.name for f in fields(TrainConfig)}
    run = {f.name for f in fields(config.RunTrainConfig)}
    assert loop < run
    around = {"pairs", "valid", "watch", "reference", "save_every", "shard", "precision", "wandb", "project",
              "on_sickness"}
    looks = {name for name in run if name.startswith("eval_")}
    assert run - loop == around | looks

def test_a_folder_is_claimed_once(tmp_path, capsys):
    out = tmp_path/"run"
    assert claim(out, "mine", {"seed": 0, "temps": (.7, 1.3)}) is None
    assert claim(out, "train", {"beta": .1}) is None
    update_json(out/"summary.json", mine={"pairs": 3})
    assert finished(out, "mine", {"seed": 0, "temps": [.7, 1.3]}) == {"pairs": 3}
    assert "mine: already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="train.beta is 0.1 there, 0.5 here"): claim(out, "train", {"beta": .5})
    newer = {"beta": .1, "gamma": 0.} # an option that came later, and is off
    with pytest.raises(UserError, match="train.gamma is None there, 0.5 here"):
        claim(out, "train", newer | {"gamma": .5})
    assert claim(out, "train", newer) is None
    (tmp_path/"notes.txt").touch()
    with pytest.raises(UserError, match="is no run folder"): claim(tmp_path, "mine", {})

@pytest.mark.parametrize("step, change, says", [
    ("train", {"save_every": 50, "wandb": "disabled", "project": "mine"}, None),
    ("train", {"lr": 1.}, "train.lr is 0.1 there, 1.0 here"),
    ("mine", {"teacher": {"concurrency": 8, "timeout_s": 9., "retries": 5, "api_key_env": "KEY"}}, None),
    ("mine", {"teacher": {"url": "http://elsewhere:8001/v1"}}, None),
    ("mine", {"teacher": {"url": "offline"}}, "mine.teacher.url is 'http://here:8000/v1' there, 'offline' here"),
    ("mine", {"teacher": {"model": "other"}}, "mine.teacher.model is 'judge' there, 'other' here")])
def test_what_does_not_decide_about_a_result_may_change(tmp_path, step, change, says):
    "A teacher that is asked less at a time, as its refusal advises, goes on in the same folder; else the key is named"
    teacher = {"url": "http://here:8000/v1", "model": "judge", "concurrency": 32, "timeout_s": 60., "retries": 2}
    asked = {"lr": .1, "save_every": 25, "wandb": "auto", "teacher": teacher}
    claim(tmp_path/"run", step, asked)
    new = asked | {k: asked[k] | v if k == "teacher" else v for k, v in change.items()}
    if says:
        with pytest.raises(UserError, match=re.escape(says)): claim(tmp_path/"run", step, new)
    else: assert claim(tmp_path/"run", step, new) is None


def test_a_file_that_has_moved_and_is_the_same_is_the_same(tmp_path):
    "As of a package that lies elsewhere on another machine, and of a run folder that was renamed"
    def section(path, sha):
        return {"policy": {"checkpoint": path}, "a": path, "inputs": {"checkpoint": sha, "a": "1" * 64}}

    assert difference("judge", section("here/dpo.pt", "2" * 64), section("/there/dpo.pt", "2" * 64)) is None
    assert "policy.checkpoint is" in difference("judge", section("here", "2" * 64), section("there", "3" * 64))
    assert "policy.checkpoint is" in difference("judge", section("here", None), section("there", None))


def test_a_step_that_cannot_begin_anew_is_not_told_to(tmp_path):
    claim(tmp_path/"run", "mine", {"seed": 0})
    for restart, words in ((False, "with --restart"), (None, "choose another --out")):
        with pytest.raises(UserError, match=f"{words}$"): claim(tmp_path/"run", "mine", {"seed": 1}, restart)


@pytest.mark.parametrize("name", ["prompts", "sweep", "teacher"])
@pytest.mark.parametrize("profile", ["miniwiki", "smollm2", "wikigpt"])
def test_a_file_laid_over_a_profile_may_bring_a_section_that_it_need_not_have(tmp_path, profile, name):
    (tmp_path/"more.yaml").write_text(f"{name}:\n  new: 1\n")
    assert load_profile(profile, tmp_path/"more.yaml")[name]["new"] == 1

def test_a_torn_line_is_cut_off_and_the_rest_kept(tmp_path):
    path = tmp_path/"rows.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "é"}]
    with JsonlWriter(path) as f: f.write(rows)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with JsonlWriter(path) as f: f.write({"text": "new"})
        assert read_jsonl(path) == rows[:whole[:cut].count(b"\n")] + [{"text": "new"}]

def test_the_old_summary_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path/"summary.json"
    update_json(path, mine={"pairs": 3})
    with pytest.raises(TypeError): update_json(path, train={Path})
    assert json.loads(path.read_text()) == {"mine": {"pairs": 3}} and list(tmp_path.iterdir()) == [path]
