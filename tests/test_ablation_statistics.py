"""Simulated scores are as NDCG has them: many exact 0 and 1, queries that are hard for everyone, seeds with noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_rel

from vlmembed.ablation.statistics import compare, holm, seed_variance

TRIALS = 1_000
#: Rates over 1,000 trials are off by 0.7 points at 5 %: three times that.
SLACK = 0.02


def simulate(
    generator: np.random.Generator,
    settings: int = 2,
    seeds: int = 3,
    queries: int = 120,
    own: float = 0.5,
    shift: float = 0.0,
    ease: float = 0.5,
) -> list[np.ndarray]:
    """Draw settings that do not differ.

    ``own`` is the deviation of one seed's and query's noise, ``shift`` of what a seed does to all queries of a run;
    the higher ``ease`` is, the more scores are exactly 1.
    """
    difficulty = generator.normal(ease, 0.6, queries)
    taste = generator.normal(0, 0.3, (settings, 1, queries))
    noise = generator.normal(0, own, (settings, seeds, queries)) + generator.normal(0, shift, (settings, seeds, 1))
    return list((difficulty + taste + noise).clip(0, 1))


def rate(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def found_without_difference(**how: float) -> float:
    generator = np.random.default_rng(0)
    trials = (simulate(generator, **how) for _ in range(TRIALS))
    return rate([any(pair.corrected < 0.05 for pair in compare(trial).values()) for trial in trials])


@pytest.mark.parametrize(
    "how",
    [
        {"seeds": 1},
        {"seeds": 1, "queries": 30},
        {"seeds": 3},
        {"seeds": 3, "shift": 0.1},
        {"seeds": 2, "shift": 0.1},
        {"seeds": 3, "shift": 0.5},
        {"seeds": 3, "ease": 1.6},
        {"seeds": 3, "settings": 6},
        {"seeds": 3, "settings": 6, "shift": 0.1},
    ],
    ids=str,
)
def test_no_difference_is_found_where_there_is_none(how: dict[str, float]) -> None:
    """With several settings: in any of the pairs, as the best is chosen after looking."""
    assert found_without_difference(**how) <= 0.05 + SLACK


def test_the_test_is_not_shy_either() -> None:
    """A test that never finds anything passes the one above."""
    assert found_without_difference(seeds=1) >= 0.05 - SLACK
    assert found_without_difference(seeds=5, shift=0.2) >= 0.05 - SLACK


def test_seeds_that_shift_whole_runs_deceive_a_test_over_queries_alone() -> None:
    """Why the variance of seeds is in: with it hidden, most trials without a difference find one."""
    generator = np.random.default_rng(0)
    trials = [simulate(generator, queries=300, shift=0.1) for _ in range(200)]
    hidden = [[rows.mean(0, keepdims=True) for rows in each] for each in trials]
    assert rate([compare(each)[0, 1].p_value < 0.05 for each in hidden]) > 0.3
    assert rate([compare(each)[0, 1].p_value < 0.05 for each in trials]) <= 0.05 + 2 * SLACK


@pytest.mark.parametrize(
    ("settings", "seeds", "shift", "loss"),
    [(2, 1, 0.0, 0.0), (2, 3, 0.0, 0.25), (2, 3, 0.1, 0.25), (10, 3, 0.0, 0.06), (10, 3, 0.1, 0.06)],
)
def test_a_planted_difference_is_found_as_often_as_theory_allows(
    settings: int, seeds: int, shift: float, loss: float
) -> None:
    """Power at c standard errors is P(|z + c| > 1.96): 52 % at 2, 85 % at 3, 98 % at 4, for any two-sided 5 % test.

    Where the variance of seeds has to be learnt from few of them, some of it is the price.
    """
    generator = np.random.default_rng(0)
    trials = [simulate(generator, settings, seeds, shift=shift) for _ in range(600 // settings)]
    standard_error = np.std([each[0].mean() - each[1].mean() for each in trials])
    for planted in (2, 3, 4, 5):
        planting = ([each[0] + planted * standard_error, *each[1:]] for each in trials)
        found = rate([compare(each)[0, 1].p_value < 0.05 for each in planting])
        power = norm.sf(1.96 - planted) + norm.cdf(-1.96 - planted)
        deviation = np.sqrt(power * (1 - power) / len(trials))
        assert power - loss - 3 * deviation - 0.01 <= found <= power + 3 * deviation


def test_with_one_seed_it_is_the_paired_t_test() -> None:
    first, second = simulate(np.random.default_rng(3), seeds=1, queries=300)
    pair, expected = compare([first + 0.06, second])[0, 1], ttest_rel(first[0] + 0.06, second[0])
    assert pair.p_value == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    assert (pair.difference - pair.margin, pair.difference + pair.margin) == pytest.approx((low, high))


def test_with_seeds_it_is_worked_by_hand() -> None:
    """Satterthwaite (1946) for V = query + (between - within) (1/2 + 1/3), pooled over settings of 2 and 3 seeds."""
    first, second = simulate(np.random.default_rng(5), seeds=3, queries=50, shift=0.3)
    first = first[:2]
    query = np.var(first.mean(0) - second.mean(0), ddof=1) / 50
    between = (np.var(first.mean(1), ddof=1) + 2 * np.var(second.mean(1), ddof=1)) / 3
    # Two-way analysis of variance: what is left of all squares after those of rows and columns, over (S - 1) (Q - 1).
    squares = [
        rows.var() * rows.size - 50 * rows.mean(1).var() * len(rows) - len(rows) * rows.mean(0).var() * 50
        for rows in (first, second)
    ]
    within = sum(squares) / (3 * 49) / 50
    variance = query + (between - within) * (1 / 2 + 1 / 3)
    freedom = variance**2 / (query**2 / 49 + (between * (1 / 2 + 1 / 3)) ** 2 / 3)
    pair = compare([first, second])[0, 1]
    assert between > within
    assert pair.margin == pytest.approx(t.ppf(0.975, freedom) * np.sqrt(variance))
    assert pair.p_value == pytest.approx(2 * t.sf(abs(pair.difference) / np.sqrt(variance), freedom))


def test_the_interval_excludes_zero_where_the_p_value_says_so() -> None:
    generator = np.random.default_rng(0)
    pairs = [pair for _ in range(50) for pair in compare(simulate(generator, settings=4, shift=0.05)).values()]
    assert all((abs(pair.difference) > pair.margin) == (pair.p_value < 0.05) for pair in pairs)


def test_the_variance_of_seeds_is_estimated_without_bias() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.normal(0, 0.5, (4, 50)) + generator.normal(0, 0.3, (4, 1)) for _ in range(3_000)]
    between, within, freedom = seed_variance([*rows, generator.normal(0, 1, (1, 50))])
    assert freedom == 9_000
    assert within == pytest.approx(0.5**2 / 50, rel=0.05)
    assert between - within == pytest.approx(0.3**2, rel=0.05)


def test_equal_settings_have_p_of_one_and_a_constant_difference_is_certain() -> None:
    (scores,) = simulate(np.random.default_rng(0), settings=1)
    # Seeds in another order: the sums may differ in the last bit, and nothing else does.
    pairs = compare([scores, scores.copy(), scores[[2, 0, 1]]]).values()
    assert {(pair.p_value, pair.corrected, pair.verdict) for pair in pairs} == {(1.0, 1.0, "within noise")}
    assert compare([np.full((1, 4), 0.75), np.full((1, 4), 0.25)])[0, 1].verdict == "better"


def test_comparisons_are_antisymmetric() -> None:
    scores = simulate(np.random.default_rng(0), settings=3)
    pairs = compare(scores)
    assert pairs[0, 2].difference == pytest.approx(scores[0].mean() - scores[2].mean())
    assert len(pairs) == 6
    for (first, second), pair in pairs.items():
        assert pairs[second, first] == replace(pair, difference=-pair.difference)


def test_holm_as_worked_by_hand() -> None:
    """Smallest times 4, next times 3, …; the third, 2 × 0.03 = 0.06, lifts the last, 0.04, to itself."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).size == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([np.zeros((3, 5)), np.zeros((3, 4))], "got (seeds, queries) [(3, 5), (3, 4)]"),
        ([np.zeros((3, 1))], "at least 2 queries"),
        ([np.zeros((0, 5))], "a seed each"),
        ([np.zeros((1, 3)), np.array([[0, 1, np.nan]])], "setting 1, seed 0, query 2 has the score nan"),
    ],
)
def test_what_cannot_be_compared_is_refused(scores: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(scores)
