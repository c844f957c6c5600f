from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics.interval import Interval, NotDecidable
from evaluation.statistics.limits import (
    NonInferiority,
    drawdown_non_inferiority,
    kill_switch_difference,
    quantile_upper_bound,
)


def killed(paths: int, *events: int, seeds: int = 1) -> np.ndarray:
    """No event but on the given paths, for every seed."""
    table = np.zeros((seeds, paths), dtype=bool)
    table[:, list(events)] = True
    return table


def test_drawdown_by_hand():
    # Excesses of 0.01 and 0.03: mean 0.02, standard error 0.01, one degree of freedom.
    test = drawdown_non_inferiority([[0.11, 0.13]], [[0.10, 0.10]], margin=0.05, level=0.95)
    assert test.interval.estimate == pytest.approx(0.02, rel=1e-9)
    assert test.interval.high == pytest.approx(0.02 + 0.01 * stats.t.ppf(0.975, 1), rel=1e-9)
    assert (test.holds, test.violated) == (False, False)
    # Smallest N with 0.02 + t * sqrt(0.0002 / N) < 0.05.
    needed = next(n for n in range(2, 99) if 0.02 + stats.t.ppf(0.975, n - 1) * math.sqrt(2e-4 / n) < 0.05)
    assert (test.paths, test.paths_needed) == (2, needed)


def test_an_equal_drawdown_is_not_worse_and_one_beyond_the_margin_is():
    rng = np.random.default_rng(1)
    b = 0.1 + 0.01 * rng.random((3, 40))
    equal = drawdown_non_inferiority(b, b, margin=0.0, level=0.95)
    assert (equal.interval.estimate, equal.interval.high) == (0.0, 0.0)
    assert not equal.violated
    assert drawdown_non_inferiority(b, b, margin=0.02, level=0.95).holds
    worse = drawdown_non_inferiority(b + 0.03, b, margin=0.02, level=0.95)
    assert (worse.holds, worse.violated, worse.paths_needed) == (False, True, None)
    better = drawdown_non_inferiority(b - 0.03, b, margin=0.02, level=0.95)
    assert better.holds
    assert better.interval.estimate == pytest.approx(-0.03, rel=1e-9)


def loss(low: float, estimate: float, high: float) -> NonInferiority:
    return NonInferiority(Interval(estimate, low, high, 0.95, "given"), margin=0.02, paths=50, paths_needed=None)


@pytest.mark.parametrize(
    ("test", "holds", "violated"),
    [
        (loss(-0.010, 0.000, 0.010), True, False),
        (loss(-0.010, 0.010, 0.030), False, False),
        (loss(-0.001, 0.030, 0.061), False, False),
        (loss(0.000, 0.030, 0.060), False, False),
        (loss(0.001, 0.030, 0.059), False, True),
        (loss(0.001, 0.019, 0.037), False, False),
        (loss(math.nan, 0.030, 0.059), False, True),
        (loss(-0.010, math.nan, 0.059), False, True),
        (loss(-0.010, 0.010, math.nan), False, True),
    ],
)
def test_worse_takes_an_estimate_beyond_the_margin_and_proof_that_it_is_worse_at_all(test, holds, violated):
    assert (test.holds, test.violated) == (holds, violated)


def test_a_baseline_without_seeds_is_paired_with_every_seed():
    a = np.array([[0.10, 0.12, 0.14], [0.12, 0.13, 0.15]])
    b = np.array([[0.10, 0.11, 0.13]])
    once = drawdown_non_inferiority(a, b, margin=0.02, level=0.95)
    assert once == drawdown_non_inferiority(a, np.repeat(b, 2, axis=0), margin=0.02, level=0.95)


def test_no_number_of_paths_makes_up_for_seeds_that_disagree():
    rng = np.random.default_rng(2)
    a = 0.2 + np.array([[-0.05], [0.0], [0.05]]) + 0.001 * rng.standard_normal((3, 30))
    test = drawdown_non_inferiority(a, np.full((1, 30), 0.2), margin=0.02, level=0.95)
    assert (test.holds, test.violated, test.paths_needed) == (False, False, None)


def test_drawdowns_that_cannot_be_compared_are_refused():
    good = np.full((2, 3), 0.1)
    with pytest.raises(ValueError, match="same paths, was 3 and 2"):
        drawdown_non_inferiority(good, good[:, :2], margin=0.02, level=0.95)
    with pytest.raises(ValueError, match="same seeds, or one seed on a side, was 2 and 3"):
        drawdown_non_inferiority(good, np.full((3, 3), 0.1), margin=0.02, level=0.95)
    with pytest.raises(ValueError, match="a: expected finite"):
        drawdown_non_inferiority(good * math.nan, good, margin=0.02, level=0.95)
    with pytest.raises(ValueError, match="b: expected drawdowns as fractions from 0 to 1, was 10 to 10"):
        drawdown_non_inferiority(good, good * 100, margin=0.02, level=0.95)
    with pytest.raises(ValueError, match="margin: expected a fraction"):
        drawdown_non_inferiority(good, good, margin=-0.02, level=0.95)
    with pytest.raises(NotDecidable, match="needs 1 more paths"):
        drawdown_non_inferiority(good[:, :1], good[:, :1], margin=0.02, level=0.95)


def test_without_an_event_the_rate_is_below_three_over_n():
    test = kill_switch_difference(killed(100), killed(100), margin=0.02, level=0.95)
    assert test.rate_a_bound == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-9)
    assert test.rate_a_bound < 3 / 100
    assert (test.rate_a, test.rate_b, test.paths_with_events, test.p_value) == (0.0, 0.0, (0, 0), 1.0)
    # 2.5 % above, half of it for each of the two bounds.
    assert test.difference.interval.high == pytest.approx(1 - 0.0125 ** (1 / 100), rel=1e-9)
    assert test.difference.interval.low == pytest.approx(-test.difference.interval.high, rel=1e-9)
    assert (test.holds, test.difference.violated) == (False, False)


def test_217_paths_without_an_event_keep_a_margin_of_two_percent_and_216_do_not():
    assert math.ceil(math.log(0.0125) / math.log(0.98)) == 217
    assert kill_switch_difference(killed(100), killed(100), margin=0.02, level=0.95).difference.paths_needed == 217
    assert kill_switch_difference(killed(217), killed(217), margin=0.02, level=0.95).holds
    assert not kill_switch_difference(killed(216), killed(216), margin=0.02, level=0.95).holds


def test_seeds_on_one_path_are_no_further_paths():
    one = kill_switch_difference(killed(100), killed(100), margin=0.02, level=0.95)
    five = kill_switch_difference(killed(100, seeds=5), killed(100, seeds=5), margin=0.02, level=0.95)
    assert five.difference.interval.high == pytest.approx(one.difference.interval.high, rel=1e-9)
    assert five.rate_a_bound == pytest.approx(one.rate_a_bound, rel=1e-9)
    assert five.difference.paths_needed == 217


def test_discordant_paths_are_bounded_by_clopper_and_pearson():
    # Paths 0 and 1 kill both and say nothing; a alone on three, b alone on one, of 20.
    test = kill_switch_difference(killed(20, 0, 1, 2, 3, 4), killed(20, 0, 1, 5), margin=0.02, level=0.9)
    only_a = stats.binomtest(3, 20).proportion_ci(0.95, method="exact")
    only_b = stats.binomtest(1, 20).proportion_ci(0.95, method="exact")
    interval = test.difference.interval
    assert interval.estimate == pytest.approx(0.1, rel=1e-9)
    assert interval.high == pytest.approx(only_a.high - only_b.low, rel=1e-6)
    assert interval.low == pytest.approx(only_a.low - only_b.high, rel=1e-6)
    # McNemar: at least 3 of 4 fair coins.
    assert test.p_value == pytest.approx(5 / 16, rel=1e-9)
    # Twelve points beyond the margin, and still no proof that `a` is worse.
    assert interval.low < 0.0
    assert (test.holds, test.difference.violated) == (False, False)


def test_equal_rates_are_equal_however_the_kills_are_spread_over_seeds():
    """a dies in one run of five on 20 % of the paths, b in all five on 4 %: both rates are 4 %."""
    a, b = np.zeros((5, 100), dtype=bool), np.zeros((5, 100), dtype=bool)
    a[np.arange(20) % 5, np.arange(20)] = True
    b[:, 96:] = True
    test = kill_switch_difference(a, b, margin=0.02, level=0.95)
    assert (test.rate_a, test.rate_b) == (0.04, 0.04)
    assert test.p_value == 1.0
    # What a sign test of the shares would say: more kills of a on 20 paths, fewer on 4.
    assert stats.binomtest(20, 24, alternative="greater").pvalue < 0.001
    # The first run is killed alone on four paths of a, on none of b; the smallest of five counts five times.
    b[0] = False
    assert kill_switch_difference(a, b, margin=0.02, level=0.95).p_value == pytest.approx(5 * 0.5**4)


def test_drawdowns_that_all_differ_by_the_same_are_no_certainty_on_few_paths():
    few, many = np.full((2, 29), 0.1), np.full((2, 30), 0.1)
    with pytest.raises(NotDecidable, match="needs 1 more paths: the drawdowns of all 29 paths differ by the same"):
        drawdown_non_inferiority(few, few, margin=0.02, level=0.95)
    assert drawdown_non_inferiority(many, many, margin=0.02, level=0.95).holds


def test_several_seeds_are_bounded_by_hoeffding():
    rng = np.random.default_rng(3)
    a, b = rng.random((4, 200)) < 0.06, rng.random((4, 200)) < 0.02
    test = kill_switch_difference(a, b, margin=0.02, level=0.95)
    x, y = (a & ~b).mean(), (b & ~a).mean()

    def entropy(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    # The upper end is u(x) - l(y); both solve 200 * KL = log(1 / 0.0125).
    grid = np.linspace(1e-6, 1 - 1e-6, 2_000_001)
    wide = [
        grid[200 * np.array(p * np.log(p / grid) + (1 - p) * np.log((1 - p) / (1 - grid))) < math.log(80)]
        for p in (x, y)
    ]
    assert 200 * entropy(x, wide[0][-1]) == pytest.approx(math.log(80), rel=1e-3)
    assert test.difference.interval.high == pytest.approx(wide[0][-1] - wide[1][0], abs=1e-5)
    assert test.difference.interval.low == pytest.approx(wide[0][0] - wide[1][-1], abs=1e-5)
    assert test.rate_a == pytest.approx(a.mean(), rel=1e-12)
    assert test.paths_with_events == (a.any(axis=0).sum(), b.any(axis=0).sum())


def test_the_upper_end_fails_rarely_even_where_all_seeds_fall_together():
    """A market that kills one seed of `a` kills all: 60 paths are worth 60, not 180."""
    rng = np.random.default_rng(4)
    misses = 0
    for _ in range(1000):
        a = np.repeat(rng.random((1, 60)) < 0.05, 3, axis=0)
        misses += (
            kill_switch_difference(a, killed(60, seeds=3), margin=0.02, level=0.95).difference.interval.high < 0.05
        )
    assert misses / 1000 <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 1000)


@pytest.mark.parametrize("table", [np.zeros((1, 3)), np.zeros(3, dtype=bool), np.zeros((1, 0), dtype=bool)])
def test_kill_switch_tables_are_bool_seeds_by_paths(table):
    with pytest.raises(ValueError, match=r"killed_a: expected bool \[S, P\]"):
        kill_switch_difference(table, killed(3), margin=0.02, level=0.95)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, was 95"):
        kill_switch_difference(killed(3), killed(3), margin=0.02, level=95)


def test_quantile_bound_by_hand():
    # Of ten samples 8 or fewer lie below the median with 98.9 %, 7 or fewer with 94.5 %.
    assert quantile_upper_bound(np.arange(10, 0, -1), 0.5, level=0.95) == 9.0
    assert quantile_upper_bound(np.arange(10, 0, -1), 0.5, level=0.94) == 8.0


@pytest.mark.parametrize(("level", "enough"), [(0.99, 459), (0.95, 299)])
def test_samples_that_the_99th_percentile_takes(level, enough):
    assert quantile_upper_bound(np.arange(enough), level=level) == enough - 1
    with pytest.raises(NotDecidable, match=f"needs 1 more samples.*takes {enough}, was {enough - 1}") as refused:
        quantile_upper_bound(np.arange(enough - 1), level=level)
    assert refused.value.needed == 1


@pytest.mark.parametrize("n", [300, 500, 2000])
def test_the_order_statistic_covers_at_its_level_and_the_next_lower_one_does_not(n):
    rank = int(quantile_upper_bound(np.arange(1, n + 1), level=0.95))
    # The r-th of n uniform samples is Beta(r, n - r + 1).
    assert stats.beta.sf(0.99, rank, n - rank + 1) >= 0.95
    assert stats.beta.sf(0.99, rank - 1, n - rank + 2) < 0.95


def test_quantile_bound_refuses_what_is_no_sample():
    for samples in ([], [1.0, math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="samples: expected numbers"):
            quantile_upper_bound(samples, level=0.95)
    with pytest.raises(ValueError, match="q: expected a number between 0 and 1, was 99"):
        quantile_upper_bound([1.0], 99, level=0.95)
