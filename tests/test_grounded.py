"Tasks about a text: splits, truth, and a judge that knows it"
import json
import random
from collections import Counter

import pytest

from wikidpo.judge.ask import check_teacher, judge_score, verdict
from wikidpo.judge.client import make_client
from wikidpo.judge.config import OFFLINE_MODEL
from wikidpo.judge.prompts import fenced
from wikidpo.world.facts import statement
from wikidpo.world.grounded import find_task, grade_task, TASK_KINDS, TASK_SPLITS, tasks, truth


def best_answer(task):
    if task.kind in ("question", "summary"): return " ".join(map(statement, task.wanted))
    if task.kind == "json": return json.dumps({f.kind: f.value for f in task.wanted})
    return ", ".join(f.value for f in task.wanted)


def test_splits_share_no_prompt_and_no_statement():
    def prompts(split): return {t.prompt for t in tasks(split)}
    def told(split): return {f for t in tasks(split) for f in t.wanted + t.others}
    for parts in (prompts, told):
        mine, tune, held_out = map(parts, TASK_SPLITS)
        assert not mine & held_out and not mine & tune and not tune & held_out
    assert len(tasks("mine")) > 5000 and len(tasks("eval")) > 2000
    assert {t.kind for t in tasks("eval")} == set(TASK_KINDS)


def test_every_task_has_a_right_answer_and_copying_is_none():
    for split in TASK_SPLITS:
        for t in tasks(split):
            passage = t.prompt.split("Text: ")[1].split("\n")[0]
            assert grade_task(t.prompt, best_answer(t)).label == "right", t
            assert grade_task(t.prompt, passage).score < 6, t
            assert grade_task(t.prompt, passage.split(". ")[0] + ".").score < 6, t


def test_what_an_answer_lacks_has_a_name():
    wanted = Counter()
    for t in tasks("eval")[:300]:
        good = best_answer(t)
        assert grade_task(t.prompt, "").label == "empty"
        assert grade_task(t.prompt, "I cannot say.").label == "off-topic"
        assert grade_task(t.prompt, f"{good} This is also what Zaphod Beeblebrox found in 9876.").label in (
            "made up", "rambling"), good
        if t.kind == "json": assert grade_task(t.prompt, f"```json\n{good}\n```").label == "form"
        if len(t.wanted) > 1: wanted[grade_task(t.prompt, statement(t.wanted[0])).label] += 1
    assert wanted["partial"] > .8*wanted.total()


def test_the_prompt_is_found_behind_a_fence():
    for t in tasks("eval")[:100]: assert find_task(fenced(t.prompt).strip("`\n")) == t


def test_the_offline_judge_grades_tasks_through_the_client():
    "Without noise its score is the truth; it prefers the better answer in both orders"
    rng = random.Random(0)
    with make_client(noise=0, position_bias=0) as client:
        check_teacher(client, OFFLINE_MODEL)
        for t in rng.sample(tasks("eval"), 20):
            good, bad = best_answer(t), "I cannot say."
            assert judge_score(client, OFFLINE_MODEL, t.prompt, good) == truth(t.prompt, good).score == 9
            assert verdict(client, OFFLINE_MODEL, t.prompt, good, bad) == "A"
            assert verdict(client, OFFLINE_MODEL, t.prompt, bad, good) == "B"


def test_anything_else_has_no_truth():
    with pytest.raises(KeyError): grade_task("Who are you?", "Nobody.")
