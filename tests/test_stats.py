"The statistics of a comparison: intervals against simulation, and the rule of two orders"
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from wikidpo.core.stats import bootstrap, detectable, power, tally, wilson


def test_the_statistics_need_no_torch():
    code = "import sys, wikidpo.core.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- intervals

@settings(deadline=None, derandomize=True)
@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_is_the_inverted_score_test(k, n):
    k = min(k, n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    for end in (low, high):  # at an end inside (0, 1) the score statistic is exactly z
        if not 1e-9 < end < 1 - 1e-9: continue
        score = abs(k / n - end) / math.sqrt(end * (1 - end) / n)
        assert score == pytest.approx(1.96, abs=1e-6)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_covers_the_truth_where_the_textbook_interval_does_not():
    n, p = 40, .03
    ks = np.random.default_rng(0).binomial(n, p, 20_000).tolist()
    intervals = [wilson(k, n) for k in ks]
    inside = np.mean([low <= p <= high for low, high in intervals])
    wald = np.mean([abs(k / n - p) <= 1.96 * math.sqrt(k / n * (1 - k / n) / n) for k in ks])
    assert inside > .93 and wald < .80


def test_nothing_is_known_of_a_rate_without_trials():
    assert wilson(0, 0) == (0, 1)


# ---- what could have been found

@pytest.mark.parametrize("alpha", [.05, .2])
def test_two_equal_models_are_found_different_as_often_as_the_level_says(alpha):
    "On either side: half of it each"
    assert power(.5, 200, alpha) == pytest.approx(alpha) and power(.4, 90) == pytest.approx(power(.6, 90))


@pytest.mark.parametrize("n, ties, p", [(300, .4, .55), (1000, .4, .55), (1000, .5, .6), (200, .2, .6)])
def test_power_against_the_whole_experiment(n, ties, p):
    rng = np.random.default_rng(n)
    decided = rng.binomial(n, 1 - ties, 20_000)
    wins = rng.binomial(decided, p)
    intervals = map(wilson, wins.tolist(), decided.tolist())
    found = np.mean([not low <= .5 <= high for low, high in intervals])
    assert found == pytest.approx(power(p, n * (1 - ties)), abs=.02)


def test_300_prompts_see_a_true_55_percent_one_time_in_four():
    assert power(.55, 300 * .6) == pytest.approx(.25, abs=.03)
    assert .60 < detectable(300 * .6) < .61


@settings(deadline=None, derandomize=True)
@given(st.integers(8, 20_000))
def test_detectable_is_where_the_power_is_80_percent(m):
    assert power(detectable(m), m) == pytest.approx(.8, abs=1e-4)
    assert detectable(m + 1) < detectable(m)


def test_nothing_is_detectable_with_nothing():
    assert detectable(0) == detectable(3) == 1.0
    assert detectable(5) == 1. > detectable(6), "five of five are no evidence: a coin does it one time in 16"


# ---- the bootstrap

def test_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    x = np.random.default_rng(3).normal(5, 2, 400)
    low, high = bootstrap(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=.06)


def width(num, den=None):
    low, high = bootstrap(num, den)
    return high - low


def test_bootstrap_resamples_prompts_not_rows():  # trap 27
    ease = np.random.default_rng(5).choice([.0, 1.], 100)     # every answer to a prompt fares alike
    wins, rows = ease * 8, np.repeat(ease, 8)
    assert width(wins, np.full(100, 8)) > 2.3 * width(rows)   # sqrt(8) = 2.8


def test_bootstrap_is_as_wide_as_its_level_says_and_the_same_again():
    x = np.random.default_rng(3).normal(5, 2, 400)
    error = x.std(ddof=1) / 20
    assert width(x) == pytest.approx(2 * 1.96 * error, rel=.05) and bootstrap(x) == bootstrap(x)
    low, high = bootstrap(x, level=.8)
    assert high - low == pytest.approx(2 * 1.2816 * error, rel=.06)


def test_bootstrap_draws_both_parts_of_a_ratio_together():
    den = np.arange(1., 40)
    assert bootstrap(.25 * den, den) == pytest.approx((.25, .25))


def test_bootstrap_leaves_out_draws_in_which_nothing_was_decided():
    assert bootstrap([1, 0, 0], [1, 0, 0]) == (1, 1)


def test_bootstrap_of_nothing_decided():
    assert all(map(math.isnan, bootstrap([0, 0], [0, 0])))


# ---- the rule

@pytest.mark.parametrize("first", ["A", "B", "TIE"])
@pytest.mark.parametrize("second", ["A", "B", "TIE"])
def test_the_rule_is_the_lesson_s(first, second):
    a = (first == "A") + (second == "B")
    b = (first == "B") + (second == "A")
    assert tally(first, second) == ("a" if a == 2 else "b" if b == 2 else "tie")


@pytest.mark.parametrize("verdict", ["A", "B", "TIE", None])
def test_an_unreadable_verdict_is_no_tie(verdict):  # trap 19
    assert tally(verdict, None) is None and tally(None, verdict) is None
