from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics.crossed import VarianceComponents, crossed_mean
from evaluation.statistics.interval import Interval
from evaluation.statistics.power import chance_of_showing, paths_needed, power_table, seeds_needed
from evaluation.statistics.sharpe import SharpeDifference

TEN_YEARS = 2520


def observed(components: VarianceComponents, **changes: Any) -> SharpeDifference:
    """A comparison whose spread is known; its estimate plays no part."""
    interval = Interval(0.0, -1.0, 1.0, level=0.95, method="known")
    sizes = {"seeds": 5, "paths": 20, "bars": TEN_YEARS, "block": math.nan} | changes
    return SharpeDifference(interval, interval, np.zeros(1), components, correlation=0.9, by_seed=np.zeros(1), **sizes)


def test_many_paths_follow_the_textbook_formula():
    # One seed, so the paths are all there is: N = ((z_0.975 + z_0.8) / gain)^2 * variance.
    known = observed(VarianceComponents(math.nan, 0.04, 0.0), seeds=1)
    textbook = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 0.01) ** 2 * 0.04
    assert textbook == pytest.approx(3139.6, abs=0.1)
    assert paths_needed(known, 0.01, power=0.8) == pytest.approx(textbook, rel=1e-3)
    assert paths_needed(known, 0.11, threshold=0.10, power=0.8) == paths_needed(known, 0.01, power=0.8)


def test_a_tenth_of_sharpe_takes_three_centuries_of_one_market():
    """Two policies whose ten-year difference has a standard error of 0.2, in blocks of ten days."""
    known = observed(VarianceComponents(math.nan, 0.04, 0.0), seeds=1, paths=1, block=10.0)
    rows = power_table(known, 252, min_gain=0.10, power=0.8)
    row = next(row for row in rows if (row.gain, row.threshold) == (0.1, 0.0))
    # ((1.960 + 0.842) / 0.1)^2 * 0.04 = 31.4 times ten years.
    assert row.paths == 32
    assert row.years == 320.0
    assert row.seeds is None
    assert row.chance == pytest.approx(stats.norm.sf(1.96 - 0.5), abs=0.003)


@pytest.mark.parametrize(("seeds", "paths", "gain"), [(3, 20, 0.3), (5, 40, 0.2), (4, 8, 0.25), (1, 12, 0.2)])
def test_the_chance_is_how_often_simulated_intervals_show_the_gain(seeds, paths, gain):
    components = VarianceComponents(0.006 if seeds > 1 else math.nan, 0.02, 0.10)
    known = observed(components, seeds=seeds, paths=paths)
    rng = np.random.default_rng(seeds)
    runs = 2000
    tables = gain + math.sqrt(0.02) * rng.standard_normal((runs, 1, paths))
    if seeds > 1:
        tables = tables + math.sqrt(0.006) * rng.standard_normal((runs, seeds, 1))
    tables = tables + math.sqrt(0.10) * rng.standard_normal((runs, seeds, paths))
    shown = np.mean([crossed_mean(table, level=0.95, resamples=1, seed=0).interval.low > 0 for table in tables])
    chance = chance_of_showing(known, gain, seeds=seeds, paths=paths)
    assert 0.2 < chance < 0.95
    assert chance == pytest.approx(shown, abs=2 * math.sqrt(0.25 / runs) + 0.01)


def test_the_answer_is_enough_and_one_less_is_not():
    known = observed(VarianceComponents(0.004, 0.02, 0.05))
    paths = paths_needed(known, 0.2, power=0.8)
    assert chance_of_showing(known, 0.2, seeds=5, paths=paths) >= 0.8
    assert chance_of_showing(known, 0.2, seeds=5, paths=paths - 1) < 0.8
    seeds = seeds_needed(known, 0.1, power=0.8)
    assert chance_of_showing(known, 0.1, seeds=seeds, paths=20) >= 0.8
    assert chance_of_showing(known, 0.1, seeds=seeds - 1, paths=20) < 0.8


def test_paths_do_not_make_up_for_seeds_nor_seeds_for_paths():
    unsteady = observed(VarianceComponents(0.09, 0.0, 0.01), seeds=3)
    assert paths_needed(unsteady, 0.1, power=0.8) is None
    assert seeds_needed(unsteady, 0.1, power=0.8) is not None
    rough = observed(VarianceComponents(0.0, 0.09, 0.01), paths=4)
    assert seeds_needed(rough, 0.1, power=0.8) is None
    assert paths_needed(rough, 0.1, power=0.8) is not None


def test_a_gain_at_the_threshold_is_never_shown_with_power():
    rows = power_table(observed(VarianceComponents(0.0004, 0.002, 0.05)), 252, min_gain=0.10, power=0.8)
    assert [(row.gain, row.threshold) for row in rows] == [(g, t) for t in (0.0, 0.1) for g in (0.05, 0.1, 0.2, 0.3)]
    for row in rows:
        if row.gain <= row.threshold:
            assert (row.paths, row.years, row.seeds) == (None, None, None)
            assert row.chance <= 0.025
        else:
            assert row.paths is not None
    needed = [row.paths for row in rows[1:4]]
    assert needed == sorted(needed, reverse=True)
    # A lower bound above 0.10 for a gain of 0.30 is a lower bound above 0 for one of 0.20.
    assert rows[7].paths == rows[2].paths
    assert rows[2].years == rows[2].paths * 10


def test_equal_policies_on_equal_paths_show_any_gain_at_once():
    known = observed(VarianceComponents(0.0, 0.0, 0.0))
    assert paths_needed(known, 0.1, power=0.8) == 2
    assert paths_needed(known, 0.0, power=0.8) is None


@pytest.mark.parametrize("power", [0.0, 1.0, 80, math.nan])
def test_power_is_a_probability(power):
    with pytest.raises(ValueError, match="power: expected a number between 0 and 1"):
        power_table(observed(VarianceComponents(0.0, 0.02, 0.0)), 252, min_gain=0.1, power=power)
