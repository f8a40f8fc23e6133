"The shipped policy and the recipe that rebuilds it"
from collections import Counter
import pytest, torch
from wikidpo.chat import load_tokenizer
from wikidpo.files import read_jsonl
from wikidpo.miniwiki import DATA, grade, prompts
from wikidpo.model import load_checkpoint
from wikidpo.pairs import make_pairs
from wikidpo.profiles import load_profile, section
from wikidpo.sampling import TEMPS, sample_k, sample_unit
from wikidpo.sft import SftConfig, sft
from wikidpo.teacher import OfflineTeacher

def behaviour(folder):
    "Share of crisp answers at temperature 0 and 0.7, and of prompts that survive the filters"
    tok, model = load_tokenizer(folder/"tokenizer.json"), load_checkpoint(folder/"model.safetensors")
    asked, out = prompts("eval")[:500], {}
    for t in (0, .7):
        g = sample_k(model, tok, asked, temps=(t,), max_new=64, generator=torch.Generator().manual_seed(0))
        out[f"crisp at {t}"] = Counter(grade(p, r[0].text).label for p, r in zip(asked, g))["crisp"] / 500
    teacher, mined = OfflineTeacher(.5, .45, 0), prompts("mine")[:256]
    rows = [dict(prompt_id=i, k=k, prompt=mined[i], text=r.text, temperature=r.temperature, ids=r.ids, finished=r.finished, score=teacher.score(mined[i], r.text) if r.text.strip() else None)
            for i, g in enumerate(sample_unit(model, tok, mined, 0, 0, max_new=64)) for k, r in enumerate(g)]
    return out | {"survival": make_pairs(rows)[1]["pairs"] / 256}

def test_shipped_prompts_are_those_of_the_splits():
    for split in ("mine", "eval"): assert [r["prompt"] for r in read_jsonl(DATA/f"prompts_{split}.jsonl")] == prompts(split)

def test_shipped_pairs_come_from_mining_prompts_and_the_shipped_tokenizer():
    tok, pairs = load_tokenizer(DATA/"tokenizer.json"), read_jsonl(DATA/"pairs.jsonl")
    assert {p["prompt"] for p in pairs} <= set(prompts("mine")) and len(pairs) > 1000
    assert all(tok.decode(p[f"{s}_tokens"]) == p[s] for p in pairs for s in ("chosen", "rejected"))

def test_shipped_policy_owns_good_and_bad_answers():
    b = behaviour(DATA)
    assert b["crisp at 0.7"] < b["crisp at 0"] and .5 <= b["survival"] <= .75, b

@pytest.mark.slow
def test_the_recipe_rebuilds_a_policy_that_behaves_alike(tmp_path):
    sft(section(SftConfig, "sft", load_profile("miniwiki")["sft"]), tmp_path)
    ours, theirs = behaviour(tmp_path), behaviour(DATA)
    assert (tmp_path/"tokenizer.json").read_bytes() == (DATA/"tokenizer.json").read_bytes()
    assert all(abs(ours[k] - theirs[k]) < .12 for k in ours), (ours, theirs)
