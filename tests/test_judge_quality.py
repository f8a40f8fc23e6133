"The judge under test: its errors counted by hand, a win rate corrected by votes, the same question asked twice"
import json
import random

import numpy as np
import pytest

from wikidpo.judge.quality import (corrected_win_rate, CORRECTIONS, errors_table, judge_errors, OUTCOMES,
                                   outcome_table, repeat_agreement)
from wikidpo.show.vote import BlindVote


def row(first, second, result, a="long answer", b="short"):
    return {"first": first, "second": second, "result": result, "a": a, "b": b}


def test_errors_are_counted_of_what_they_are_errors_of():
    rows = [row("A", "B", "a"), row("B", "A", "b"), row("A", "A", "tie"),        # a is better
            row("A", "B", "a"), row("B", "A", "b"), row("TIE", "TIE", "tie"),    # neither is
            row("A", "B", "a", "same", "same"), row("A", "B", "a", "five5", "five6"),
            row(None, "A", None)]
    errors = judge_errors(rows, ["a"] * 3 + ["tie"] * 5 + ["b"])
    assert errors == {"right": (1, 3), "wrong": (1, 3), "undecided": (1, 3), "made up": (3, 4), "longer": (1, 2),
                      "first place": (8, 14)}
    table = errors_table(errors)
    assert "made up      75.0% of     4" in table and len(table.split("\n")) == 6
    assert "nothing to count" in errors_table(judge_errors([], []))
    with pytest.raises(ValueError): judge_errors(rows, ["a"])


def test_the_table_has_the_truth_down_and_the_judge_across():
    table = outcome_table(["a", "a", "b", "tie", "a"], ["a", "tie", "a", "tie", None])
    assert table.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 1]] and OUTCOMES == ("a", "b", "tie")


SURE = 10**6 # votes, so many that only the formula is left


def test_with_many_votes_both_corrections_find_the_truth():
    "Sensitivity .8 and false alarms .15 for wins, .7 and .1 for losses: the shares that come of it are known"
    errors = np.array([[.8, .1, .1], [.15, .7, .15], [.15, .1, .75]])
    truth = np.array([.5, .2, .3])
    table, judged = SURE * truth[:, None] * errors, SURE * (truth @ errors)
    for how in CORRECTIONS:
        rate, low, high = corrected_win_rate(table, judged, how)
        assert rate == pytest.approx(.65, abs=1e-3) and high - low < .01 and low <= rate <= high
    by_hand = (judged[0] / SURE - .15) / (.8 - .15)                             # Rogan and Gladen's line
    assert by_hand == pytest.approx(truth[0])
    elsewhere = np.array([.2, .2, .6])
    other = SURE * elsewhere[:, None] * errors                                  # votes on other answers
    assert corrected_win_rate(other, judged)[0] == pytest.approx(.65, abs=1e-3)
    assert abs(corrected_win_rate(other, judged, "double sampling")[0] - .65) > .05


@pytest.mark.parametrize("how", CORRECTIONS)
def test_the_other_models_rate_is_the_rest(how):
    table, judged = np.array([[30, 3, 5], [4, 20, 6], [2, 3, 17]]), [500, 300, 200]
    swapped = table[[1, 0, 2]][:, [1, 0, 2]]
    rate, low, high = corrected_win_rate(table, judged, how)
    other, other_low, other_high = corrected_win_rate(swapped, [300, 500, 200], how)
    assert rate == pytest.approx(1 - other) and low == pytest.approx(1 - other_high, abs=.02)
    assert low < rate < high and high == pytest.approx(1 - other_low, abs=.02)


@pytest.mark.parametrize("how", CORRECTIONS)
def test_few_votes_and_odd_tables_leave_wide_intervals_and_no_nan(how):
    for table in (np.zeros((3, 3)), np.diag([5, 0, 0]), np.full((3, 3), 2), np.eye(3)[::-1] * 9):
        rate, low, high = corrected_win_rate(table, [50, 30, 20], how)
        assert 0 <= low <= high <= 1 and 0 <= rate <= 1 and high - low > .15


@pytest.mark.parametrize("how", CORRECTIONS)
def test_ten_wins_of_ten_are_no_certainty(how):
    rate, low, high = corrected_win_rate(SURE * np.eye(3), [10, 0, 0], how)      # a judge that never errs
    assert low < .95 < rate < 1 and high > .99


def test_the_interval_counts_the_votes_as_well_as_the_prompts():
    table, judged = np.array([[30, 3, 5], [4, 20, 6], [2, 3, 17]]), np.array([500, 300, 200])
    def width(votes, prompts, how):
        _, low, high = corrected_win_rate(votes * table, prompts * judged, how)
        return high - low
    for how in CORRECTIONS:
        assert width(10, 1, how) < .6 * width(1, 1, how)                         # more votes, the same prompts
        assert width(1, 100, how) > .7 * width(1, 1, how)                        # more prompts, as few votes


def test_a_judge_that_changes_its_mind_is_found_out():
    before = [row("A", "B", "a"), row("A", "B", "a"), row(None, "A", None), row("TIE", "A", "tie")]
    assert repeat_agreement(before, before) == (7, 7)
    after = [row("A", "A", "tie"), row("B", "A", "b"), row("A", "A", "tie"), row("TIE", None, None)]
    assert repeat_agreement(before, after) == (3, 6)
    assert repeat_agreement([], []) == (0, 0)
    with pytest.raises(ValueError): repeat_agreement(before, after[1:])


def test_a_blind_vote_corrects_the_win_rate_of_its_prompts(tmp_path):
    rng = random.Random(0)
    rows = [{"prompt_id": i, "prompt": f"{i}?", "a": f"a{i}", "b": f"b{i}", "result": rng.choice("aab")}
            for i in range(200)]
    path = tmp_path/"votes.jsonl"
    path.write_text("".join(json.dumps({"prompt_id": i, "vote": rng.choice("ab")}) + "\n" for i in range(60)))
    vote = BlindVote(rows, path)
    results = [r["result"] for r in rows]
    judged = [results.count(outcome) for outcome in OUTCOMES]
    assert vote.corrected() == corrected_win_rate(vote.table(), judged, "double sampling")
    assert vote.corrected("rogan-gladen") == corrected_win_rate(vote.table(), judged)
    _, low, high = vote.corrected()
    assert low < .5 < high                                                       # who votes by a coin finds a half
