"The shipped policy and the recipe that rebuilds it"
import subprocess, sys
import pytest, torch
from wikidpo.core.chat import load_tokenizer
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.pairs import make_pairs
from wikidpo.core.sample import sample_k
from wikidpo.engine.ragged import sample_unit
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.run.profiles import load_profile, section
from wikidpo.world.config import SftConfig
from wikidpo.world.facts import DATA, prompts
from wikidpo.world.grade import grade
from wikidpo.world.sft import sft

TELL_THE_FACT = {"crisp", "terse", "padded", "sloppy", "rambling", "hallucinated"}

def behaviour(folder):
    "Shares of answers that tell the fact, and that are good, at temperature 0 and 0.7; of prompts that give a pair"
    tok, model = load_tokenizer(folder/"tokenizer.json"), load_checkpoint(folder/"model.safetensors")
    asked, shares = prompts("eval")[:500], {}
    for t in (0, .7):
        groups = sample_k(model, tok, asked, temps=(t,), max_new=64, generator=torch.Generator().manual_seed(0))
        grades = [grade(prompt, group[0].text) for prompt, group in zip(asked, groups)]
        shares[f"right at {t}"] = sum(g.label in TELL_THE_FACT for g in grades) / 500
        shares[f"good at {t}"] = sum(g.score >= 6 for g in grades) / 500
    return shares | {"survival": make_pairs(mined(model, tok))[1]["pairs"] / 256}

def mined(model, tok):
    "Scored samples of 256 prompts"
    teacher, asked, rows = OfflineTeacher(), prompts("mine")[:256], []
    for i, group in enumerate(sample_unit(model, tok, asked, 0, 0, max_new=64)):
        for k, r in enumerate(group):
            score = teacher.score(asked[i], r.text) if r.text.strip() else None
            rows.append(dict(prompt_id=i, k=k, prompt=asked[i], text=r.text, temperature=r.temperature,
                             ids=r.ids, finished=r.finished, score=score))
    return rows

def test_shipped_prompts_are_those_of_the_splits():
    for split in ("mine", "eval"):
        assert [r["prompt"] for r in read_jsonl(DATA/f"prompts_{split}.jsonl")] == prompts(split)

def test_the_recipe_is_read_without_torch():
    code = "import sys, wikidpo.world.config; print(sorted({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

@pytest.mark.parametrize("change,complaint", [
    (dict(crisp=.9), "sft: the shares of crisp, padded, rambling, wrong must not be negative and sum to 1, found"),
    (dict(crisp=-.2, padded=.7), "must not be negative"),
    (dict(steps=0), "sft.steps: must be at least 1"),
    (dict(batch_size=0), "sft.batch_size: must be at least 1")])
def test_a_recipe_that_cannot_be_followed_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint): SftConfig(**change)

def test_shipped_pairs_come_from_mining_prompts_and_the_shipped_tokenizer():
    tok, pairs = load_tokenizer(DATA/"tokenizer.json"), read_jsonl(DATA/"pairs.jsonl")
    assert {p["prompt"] for p in pairs} <= set(prompts("mine")) and len(pairs) > 1000
    assert all(tok.decode(p[f"{s}_tokens"]) == p[s] for p in pairs for s in ("chosen", "rejected"))

def test_the_most_likely_answer_of_the_shipped_policy_is_right_in_the_fact_and_wrong_in_the_form():
    b = behaviour(DATA)
    assert b["right at 0"] >= .75 and b["good at 0"] <= .4, b
    assert b["good at 0"] < b["good at 0.7"] < .5 and .5 <= b["survival"] <= .8, b # of 256 prompts; 0.73 of all

def test_a_few_shipped_pairs_are_in_the_wrong_order_by_the_truth():
    pairs = read_jsonl(DATA/"pairs.jsonl")
    gaps = [grade(p["prompt"], p["chosen"]).score - grade(p["prompt"], p["rejected"]).score for p in pairs]
    assert .03 <= sum(gap < 0 for gap in gaps) / len(pairs) <= .1
    assert .5 <= len(pairs) / 2048 <= .75

@pytest.mark.slow
def test_the_recipe_rebuilds_a_policy_that_behaves_alike(tmp_path):
    sft(section(SftConfig, "sft", load_profile("miniwiki")["sft"]), tmp_path)
    ours, theirs = behaviour(tmp_path), behaviour(DATA)
    assert (tmp_path/"tokenizer.json").read_bytes() == (DATA/"tokenizer.json").read_bytes()
    assert all(abs(ours[k] - theirs[k]) < .12 for k in ours), (ours, theirs)
