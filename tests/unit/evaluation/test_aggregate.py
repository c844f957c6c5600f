from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import NotDecidable, interquartile_mean, probability_of_improvement, sharpe_by_path

SETTINGS = {"level": 0.95, "resamples": 500, "seed": 1}


def test_interquartile_mean_by_hand():
    # Of 0..6 and 1000, the middle four are 2, 3, 4 and 5.
    scores = np.array([[5.0, 0.0, 1000.0, 3.0], [1.0, 6.0, 2.0, 4.0]])
    assert interquartile_mean(scores, **SETTINGS).estimate == 3.5


def test_an_outlier_hardly_moves_the_interquartile_mean():
    scores = np.random.default_rng(0).normal(1.0, 0.1, (5, 40))
    spoilt = scores.copy()
    spoilt[2, 7] = 1e6
    plain, robust = interquartile_mean(scores, **SETTINGS), interquartile_mean(spoilt, **SETTINGS)
    assert robust.estimate == pytest.approx(plain.estimate, abs=0.005)
    assert robust.standard_error < 2 * plain.standard_error


def test_shifting_and_scaling_scores_shifts_and_scales_the_interval():
    scores = np.random.default_rng(1).normal(0.0, 1.0, (4, 20))
    plain, moved = interquartile_mean(scores, **SETTINGS), interquartile_mean(3.0 + 2.0 * scores, **SETTINGS)
    assert (moved.estimate, moved.low, moved.high) == pytest.approx(
        tuple(3.0 + 2.0 * value for value in (plain.estimate, plain.low, plain.high))
    )


def test_the_resampled_error_is_that_of_a_trimmed_mean():
    # One seed, many paths: the asymptotic error of a trimmed mean uses the winsorised variance (Tukey and McLaughlin).
    scores = np.random.default_rng(2).normal(0.0, 1.0, (1, 400))
    ordered = np.sort(scores[0])
    winsorised = np.clip(ordered, ordered[100], ordered[-101])
    expected = winsorised.std(ddof=1) / (0.5 * math.sqrt(400))
    interval = interquartile_mean(scores, level=0.95, resamples=2000, seed=0)
    assert interval.standard_error == pytest.approx(expected, rel=0.1)
    assert "one training run" in interval.method


def test_interquartile_mean_covers_with_three_seeds():
    rng = np.random.default_rng(3)
    N, covered = 150, 0
    for run in range(N):
        scores = rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 1, (1, 20)) + rng.normal(0, 0.5, (3, 20))
        interval = interquartile_mean(scores, level=0.95, resamples=60, seed=run)
        covered += interval.low <= 0.0 <= interval.high
    assert covered / N >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / N)


def test_probability_of_improvement_by_hand_with_a_tie():
    # Wins [[1, 1/2, 0], [1, 1, 0]]: 3.5 of 6. Seed means 1/2 and 2/3, path means 1, 3/4 and 0.
    a = np.array([[2.0, 1.0, 0.0], [5.0, 5.0, 0.0]])
    b = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    interval = probability_of_improvement(a, b, level=0.5)
    assert interval.estimate == pytest.approx(3.5 / 6)
    of_seeds, of_paths = (1 / 6) ** 2 / 2 / 2, np.var([1.0, 0.75, 0.0], ddof=1) / 3
    reach = math.sqrt(stats.t.ppf(0.75, 1) ** 2 * of_seeds + stats.t.ppf(0.75, 2) ** 2 * of_paths)
    assert (interval.low, interval.high) == pytest.approx((3.5 / 6 - reach, 3.5 / 6 + reach))


def test_exchanging_sides_mirrors_the_probability_and_order_is_all_that_counts():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 1.0, (2, 4, 30))
    there, back = probability_of_improvement(a, b, level=0.95), probability_of_improvement(b, a, level=0.95)
    assert (back.low, back.high) == pytest.approx((1 - there.high, 1 - there.low))
    assert probability_of_improvement(np.exp(a), np.exp(b), level=0.95) == there


def test_the_same_policy_at_another_leverage_ties():
    returns = np.random.default_rng(5).normal(0.0003, 0.01, (2, 30, 200)).astype(np.float32)
    ratios = sharpe_by_path(returns, 252)
    levered = sharpe_by_path(np.float32(0.3) * returns, 252)
    assert (ratios != levered).any()
    assert probability_of_improvement(levered, ratios, level=0.95).estimate == 0.5
    # Whatever the scale of the scores.
    assert probability_of_improvement(1e-9 * ratios, 1e-9 * levered, level=0.95).estimate == 0.5
    assert probability_of_improvement(2e-9 * np.abs(ratios), 1e-9 * np.abs(ratios), level=0.95).estimate == 1.0


def test_a_probability_stays_within_zero_and_one():
    wins = np.ones((2, 4))
    wins[0, 0] = -1.0
    interval = probability_of_improvement(wins, np.zeros((1, 4)), level=0.99)
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(("seeds", "pairs"), [(5, 5), (1, 20), (30, 20)])
def test_winning_every_pair_is_bounded_by_the_pairs_that_are_independent(seeds, pairs):
    better, worse = np.ones((seeds, 20)), np.zeros((seeds, 20))
    interval = probability_of_improvement(better, worse, level=0.95)
    # Winning all of n pairs happens with chance p^n: the bound solves p^n = 2.5 %.
    assert (interval.estimate, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / pairs))
    assert f"exact binomial of {pairs} independent pairs" in interval.method
    losing = probability_of_improvement(worse, better, level=0.95)
    assert (losing.low, losing.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / pairs)))


def test_bad_scores_are_refused():
    scores = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"scores: expected \[S, P\], was shape \[3\]"):
        interquartile_mean(np.ones(3), **SETTINGS)
    with pytest.raises(ValueError, match=r"scores: expected finite \[S, P\], was nan at \[0, 1\]"):
        interquartile_mean([[1.0, math.nan]], **SETTINGS)
    with pytest.raises(ValueError, match="resamples: expected at least 2, was 1"):
        interquartile_mean(scores, level=0.95, resamples=1, seed=0)
    with pytest.raises(ValueError, match=r"expected the same \[S, P\], .* was \[2, 3\] and \[2, 2\]"):
        probability_of_improvement(scores, scores[:, :2], level=0.95)
    with pytest.raises(ValueError, match=r"expected the same \[S, P\], .* was \[2, 3\] and \[3, 3\]"):
        probability_of_improvement(scores, np.ones((3, 3)), level=0.95)


@pytest.mark.parametrize("statistic", [
    lambda one: interquartile_mean(one, **SETTINGS),
    lambda one: probability_of_improvement(one, one, level=0.95),
])  # fmt: skip
def test_one_path_cannot_be_decided(statistic):
    with pytest.raises(NotDecidable, match="needs 1 more paths: expected at least 2 paths"):
        statistic(np.ones((4, 1)))
