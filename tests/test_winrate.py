"All that two lists of verdicts say: exact tests against counting out, equal length against another fit, coverage"
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import winrate_coverage
from wikidpo.core.files import UserError
from wikidpo.core.stats import count_verdicts, if_all_alike, power, prompts_for, sign_test, win_rate, wilson
from wikidpo.run.controls import best_temperature, controls_table
from wikidpo.run.records import read_object, Summary
from wikidpo.run.winrate import first_place, flip_test, length_controlled, paired, says, win_rate_table, win_rates
from winrate_coverage import coverage, Judge, JUDGES, paired_coverage, words

VERDICTS = st.lists(st.tuples(*[st.sampled_from(["A", "B", "TIE", None])] * 2), min_size=1, max_size=30)


# ---- exact tests

@pytest.mark.parametrize("m", [0, 1, 2, 7, 12])
def test_the_sign_test_counts_out_all_coins(m):
    for win in range(m + 1):
        far = abs(2 * win - m)
        ways = sum(abs(2 * sum(coins) - m) >= far for coins in itertools.product((0, 1), repeat=m))
        assert sign_test(win, m - win) == pytest.approx(ways / 2**m)


def test_the_sign_test_of_very_many_comparisons_is_quick_and_near_the_normal_curve():
    z = 400 / math.sqrt(20_000)  # 10,200 to 9,800, with the correction for whole numbers
    normal = math.erfc((z - 1 / math.sqrt(20_000)) / math.sqrt(2))
    assert sign_test(10_200, 9_800) == pytest.approx(normal, rel=.01)


def test_better_is_never_said_falsely_more_often_than_one_time_in_twenty():
    for m in range(1, 400):
        alarms = [k for k in range(m + 1) if says({"win": k, "loss": m - k}) != "no difference beyond chance"]
        assert sum(math.comb(m, k) for k in alarms) / 2**m <= .05, m


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([-1, -.5, 0, .5, 1]), min_size=1, max_size=9))
def test_the_flip_test_counts_out_all_signs(d):
    far = abs(sum(d)) - 1e-9
    ways = [abs(np.dot(signs, d)) >= far for signs in itertools.product((-1, 1), repeat=len(d))]
    assert flip_test(d) == pytest.approx(np.mean(ways))


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_without_halves_the_flip_test_is_the_sign_test(win, loss, tie):
    assert flip_test([1] * win + [-1] * loss + [0] * tie) == pytest.approx(sign_test(win, loss))


@pytest.mark.parametrize("p, ties", [(.55, .4), (.6, 0), (.52, .9), (.4, .2)])
def test_so_many_prompts_find_it_four_times_in_five(p, ties):
    n = prompts_for(p, ties)
    assert power(p, n * (1 - ties)) == pytest.approx(.8, abs=.002)
    assert prompts_for(1 - p, ties) == n


# ---- what is counted

@settings(max_examples=25, deadline=None, derandomize=True)
@given(VERDICTS)
def test_every_prompt_is_counted_once(pairs):
    first, second = zip(*pairs)
    found = win_rates(first, second)
    assert found["win"] + found["tie"] + found["loss"] == found["n"] == len(pairs) - found["unparsed"]
    assert found["tie_said"] + found["tie_orders"] == found["tie"]
    assert found["unparsed"] == sum(None in pair for pair in pairs)
    if not found["n"]: return
    assert found["win_rate"] == pytest.approx((found["win"] + found["tie"] / 2) / found["n"])
    assert found["net"] == pytest.approx((found["win"] - found["loss"]) / found["n"])
    for name in ("win_rate", "net"): assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(VERDICTS)
def test_the_other_model_has_the_rest(pairs):
    first, second = zip(*pairs)
    here, there = win_rates(first, second), win_rates(second, first)
    assert (here["win"], here["loss"]) == (there["loss"], there["win"])
    if here["n"]: assert here["win_rate"] == pytest.approx(1 - there["win_rate"])
    if here["n"]: assert (here["sign_p"], here["first_place"]) == (there["sign_p"], there["first_place"])


def test_lists_of_different_prompts_are_refused():
    with pytest.raises(ValueError): count_verdicts(["A"], ["A", "B"])


@pytest.mark.parametrize("result, span", [("a", wilson(8, 8)), ("b", wilson(0, 8))])
def test_where_all_went_one_way_there_is_doubt_left(result, span):
    assert win_rate([result] * 8)[1:] == pytest.approx(span)


@pytest.mark.parametrize("result", ["a", "tie", "b"])
def test_an_interval_holds_its_rate_to_the_last_bit(result):
    for n in range(1, 60):
        rate, low, high = win_rate([result] * n)
        assert 0 <= low <= rate <= high <= 1, n


def test_nothing_but_ties_says_less_the_fewer_there_are():
    few, many = win_rate(["tie"] * 5), win_rate(["tie"] * 500)
    assert few[0] == many[0] == .5 and few[1] < .3 < .49 < many[1] < .5 < many[2]
    assert if_all_alike(.5, 5) == few[1:]


def test_no_comparison_and_a_sure_one_have_numbers_too():
    rate, *interval = win_rate([])
    assert math.isnan(rate) and interval == [0, 1]
    assert power(1., 100) == power(0., 100) == 1 and power(1., 3) == 0


def test_one_prompt_or_none_breaks_nothing():
    for first, second in itertools.product(("A", "B", "TIE", None), repeat=2):
        found = win_rates([first], [second], [0])
        json.dumps(found, allow_nan=False)
        if found["n"]: assert win_rate_table(found)
    assert win_rates([], [], [])["n"] == 0


def test_the_place_is_drawn_with_its_prompt():
    rng = np.random.default_rng(0)
    likes = rng.random(200) < .5  # on half the prompts the first place wins both times, on half the second
    share, low, high = first_place(np.where(likes, "A", "B").tolist(), np.where(likes, "A", "B").tolist())
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(.25 / 200), rel=.1)  # and not of 400


# ---- equal length

def lbfgs(first, second, longer, ridge=.01):
    "The same regression by another way: gradients from autograd, minimized by L-BFGS"
    d = torch.tanh(torch.tensor(longer, dtype=torch.double) / np.std(longer))
    order = torch.ones(len(first), dtype=torch.double)
    x = torch.cat([torch.stack([order, d, order], 1), torch.stack([order, d, -order], 1)])
    points = {"A": 1., "TIE": .5, "B": 0.}
    y = torch.tensor([points[v] for v in first] + [1 - points[v] for v in second], dtype=torch.double)
    w = torch.zeros(3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") + ridge / 2 * w @ w
        value.backward()
        return value
    optimizer.step(loss)
    return ((w[0] + w[2]).sigmoid() + (w[0] - w[2]).sigmoid()).item() / 2


def simulated(judge, seed=0):
    rng = np.random.default_rng(seed)
    quality, chars = judge.quality(rng, judge.prompts)
    return [*map(words, judge.verdicts(rng, quality, chars)), chars]


@pytest.mark.parametrize("name", JUDGES)
def test_the_rate_at_equal_length_against_another_fit(name):
    found = simulated(JUDGES[name])
    assert length_controlled(*found)[0] == pytest.approx(lbfgs(*found), abs=1e-6)


def test_the_interval_at_equal_length_is_that_of_fits_one_by_one():
    first, second, chars = simulated(Judge(prompts=80, taste=1., longer=20.))
    rng, rates = np.random.default_rng(5), []
    for _ in range(150):
        i = rng.integers(80, size=80)
        scale = np.std(chars[i]) / np.std(chars)  # the spread stays that of all prompts
        rates.append(lbfgs([first[j] for j in i], [second[j] for j in i], chars[i] * scale))
    _, low, high = length_controlled(first, second, chars)
    assert (low, high) == pytest.approx(np.quantile(rates, [.025, .975]), abs=.025)


def test_a_habit_of_place_is_no_win_at_equal_length():
    "All said A first: the intercept is 0, whatever the lengths"
    rate, low, high = length_controlled(["A"] * 30, ["A"] * 30, list(range(-9, 21)))
    assert rate == pytest.approx(.5) and low < .45 and high > .55


def test_answers_that_are_all_equally_long_change_nothing():
    first, second, _ = simulated(Judge(lead=.5))
    points = {"A": 1., "TIE": .5, "B": 0.}
    mean = (sum(map(points.get, first)) + sum(1 - points[v] for v in second)) / 2 / len(first)
    assert length_controlled(first, second, [0] * len(first))[0] == pytest.approx(mean, abs=.002)


@pytest.mark.parametrize("longer", [[7] * 200, list(range(100, 300)), list(range(-201, -1))])
def test_nothing_is_said_of_equal_length_where_one_side_is_always_longer(longer):
    first, second, _ = simulated(Judge(lead=.5))
    found = win_rates(first, second, longer)
    assert (found["equal_length"], found["equal_length_low"], found["equal_length_high"]) == (None, 0, 1)
    assert "at equal length" not in win_rate_table(found)


@pytest.mark.parametrize("first, second", [("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A")])
def test_perfect_separation_has_a_finite_answer(first, second):
    rate, low, high = length_controlled([first] * 40, [second] * 40, list(range(-20, 20)))
    assert 0 <= low <= rate <= high <= 1 and high - low > .02


# ---- two challengers

def test_what_both_challengers_share_says_nothing():
    "The same difference, once on prompts where both fare alike and once where they do not"
    alike = paired(["a"] * 50 + ["b"] * 50, ["a"] * 44 + ["b"] * 56)
    apart = paired(["a"] * 50 + ["b"] * 50, ["b"] * 50 + ["a"] * 44 + ["b"] * 6)
    assert alike["difference"] == apart["difference"] == pytest.approx(.06)
    assert alike["p"] < .05 < apart["p"] and alike["low"] > 0 > apart["low"]


def test_a_prompt_without_a_verdict_of_one_challenger_is_left_out():
    assert paired(["a", None, "b"], ["b", "a", None]) | {"low": 0, "high": 0} == {
        "n": 1, "difference": 1., "low": 0, "high": 0, "p": 1.}
    assert paired([None], ["a"])["n"] == 0


def test_the_best_temperature_is_not_compared_where_it_was_chosen():
    rng = np.random.default_rng(0)
    results = {f"at_{t}": rng.choice(["a", "tie", "b"], 60).tolist() for t in range(40)}  # none is better
    challenger = rng.choice(["a", "tie", "b"], 60).tolist()
    best = best_temperature(results, challenger)
    assert best["challenger_minus_best"] == paired(challenger[1::2], results[best["control"]][1::2])
    chosen = win_rate(results[best["control"]][::2])
    assert chosen[1] > .5, "the best of forty looks better where it was chosen"
    assert best["win_rate"] == win_rate(results[best["control"]][1::2])[0] < chosen[0]


def test_a_temperature_that_has_verdicts_in_one_half_alone_is_not_the_best():
    challenger, half, whole = ["tie"] * 4, ["a", None, "a", None], ["a", "b", "b", "b"]
    assert best_temperature({"half": half, "whole": whole}, challenger)["control"] == "whole"
    assert best_temperature({"half": half}, challenger) is None


# ---- what the intervals promise, on judges whose true preference is known

@pytest.mark.parametrize("name", ["no difference", "a taste for length"])
def test_intervals_hold_the_truth(name):
    "The fast version: 60 experiments; 51 of 60 is what an interval of 95 % has less often than once in 500 times"
    held = coverage(JUDGES[name], 60)
    rates = {k: share for k, share in held.items() if k != "better or worse"}
    assert len(rates) == 5 and min(rates.values()) > 51 / 60, rates
    if name == "no difference": assert held["better or worse"] <= 9 / 60


def within(found):
    "What is promised of 1,000 experiments"
    for name, judge in found["judges"].items():
        held = dict(judge["held"])
        alarms, at_equal_length = held.pop("better or worse"), held.pop("equal_length")
        assert .93 <= min(held.values()) and max(held.values()) <= .97, (name, held)
        assert .90 <= at_equal_length <= .97, name
        if name == "no difference": assert alarms <= .05
    for held in found["paired"].values(): assert .93 <= held["difference"] <= .97
    assert found["paired"]["a lead of 0.0"]["better or worse"] <= .05


def test_the_committed_experiments_are_within_what_is_promised():
    found = json.loads(winrate_coverage.OUT.read_text())
    assert found["experiments"] == 1000 and set(found["judges"]) == set(JUDGES)
    within(found)


@pytest.mark.slow  # four to five minutes on one core
def test_a_thousand_experiments_are_within_what_is_promised():
    held = {name: {"held": coverage(judge, 1000, seed=1)} for name, judge in JUDGES.items()}
    within({"judges": held, "paired": {f"a lead of {lead}": paired_coverage(lead, 1000, seed=1) for lead in (0., .3)}})


# ---- as it stands in a file

def test_a_summary_with_half_of_a_rate_is_refused(tmp_path):
    judged = win_rates(["A"] * 3, ["B"] * 3, [-1, 0, 1])
    path = tmp_path/"summary.json"
    path.write_text(json.dumps({"judge": judged | {"controls": {"itself": judged}}}))
    assert read_object(path, Summary)["judge"]["controls"]["itself"] == judged
    for key, wrong in (("win_rate_low", None), ("sign_p", "small"), ("equal_length_high", "1"), ("net", 7)):
        for broken in (judged | {key: wrong}, judged | {"controls": {"itself": judged | {key: wrong}}}):
            path.write_text(json.dumps({"judge": broken}))
            with pytest.raises(UserError, match="summary.json"): read_object(path, Summary)


def test_the_table_of_the_controls_says_what_is_not_as_it_should_be():
    def found(win, loss):
        return win_rates(["A"] * win + ["B"] * loss + ["A"] * 9, ["B"] * win + ["A"] * loss + ["A"] * 9)

    lines = controls_table({"controls": {"itself": found(10, 11), "constant": found(2, 30)}}).split("\n")
    assert all(line.count("as it should be") == 1 for line in lines[1:])
    lines = controls_table({"controls": {"itself": found(30, 2), "constant": found(11, 10)}}).split("\n")
    assert all("NOT AS IT SHOULD BE" in line for line in lines[1:])
