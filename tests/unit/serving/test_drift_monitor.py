"""The drift monitor: statistics against SciPy, few false alarms on autocorrelated features, changes found."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.evaluation import SyntheticMarketConfig
from data import DataError, canonical_json
from envs.synthetic import MARKET_FIELDS, simulate_panel
from serving.drift import statistics
from serving.drift.monitor import DriftLevel, DriftMonitor, DriftReference, DriftSettings, DriftStatus
from serving.errors import BundleFormatError

WINDOW = 60
FAST = np.array([0.0, 0.0, 0.3, 0.5])
"""Persistence of the features, as returns and ranges have it."""
MIXED = np.array([0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
"""With some that remember longer than a window, as volatilities and momentum do."""


def autoregressions(rng: np.random.Generator, paths: int, bars: int, persistence: np.ndarray) -> np.ndarray:
    """Stationary AR(1) of unit variance, [paths, bars, M]."""
    row = rng.standard_normal((paths, len(persistence)))
    rows = np.empty((paths, bars, len(persistence)))
    scale = np.sqrt(1.0 - persistence**2)
    for bar in range(bars):
        row = persistence * row + scale * rng.standard_normal(row.shape)
        rows[:, bar] = row
    return rows


def nats(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """NLL per bar of a right forecast of five standard normals whose errors are `scale` times too large."""
    errors = scale * rng.standard_normal((*shape, 5))
    return (0.5 * np.log(2.0 * np.pi) + 0.5 * errors**2).mean(axis=-1)


def fitted(rng: np.random.Generator, bars: int, persistence: np.ndarray) -> DriftReference:
    names = [f"feature_{index}" for index in range(len(persistence))]
    return DriftReference.fit(names, autoregressions(rng, 1, bars, persistence)[0], nats(rng, 400))


def verdict(reference: DriftReference, rows: np.ndarray, nll: Any = None, **changes: float) -> DriftStatus:
    monitor = DriftMonitor(reference, DriftSettings(**changes))
    for bar, row in enumerate(rows):
        assert monitor.observe(row, None if nll is None else float(nll[bar]), bar_time=float(bar))
    return monitor.status()


def share(statuses: list[DriftStatus], *levels: DriftLevel) -> float:
    return sum(status.level in levels for status in statuses) / len(statuses)


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return fitted(np.random.default_rng(1), 2000, FAST)


# --- statistics -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int64, 40, elements=st.integers(0, 30)),
    hnp.arrays(np.int64, 90, elements=st.integers(0, 30)),
)
def test_distance_is_scipys_where_every_value_has_a_bin_of_its_own(ours, theirs):
    counts = [np.bincount(sample, minlength=31) for sample in (ours, theirs)]
    expected = scipy.stats.ks_2samp(ours, theirs, method="asymp").statistic
    assert statistics.kolmogorov_distance(*counts) == pytest.approx(expected, abs=1e-12)


def test_p_value_is_kolmogorovs():
    scaled = np.concatenate((np.linspace(0.0, 3.0, 61), [5.0, 20.0]))
    np.testing.assert_allclose(statistics.kolmogorov_p(scaled), scipy.special.kolmogorov(scaled), atol=1e-12)


@pytest.mark.parametrize("degrees", [3.0, 5.0, 11.0, 30.0, 95.0])
@pytest.mark.parametrize("level", [0.9, 0.99, 0.9967, 0.99967])
def test_student_quantile_is_scipys_and_errs_on_the_quiet_side(degrees, level):
    expected = scipy.stats.t.ppf(level, degrees)
    assert statistics.student_quantile(level, degrees) == pytest.approx(expected, rel=0.03 if degrees >= 5.0 else 0.12)


def test_limit_of_many_windows_is_that_of_the_distribution_with_these_moments():
    draws = np.random.default_rng(0).gumbel(size=200_000)
    tail = statistics.Tail.fit(draws, len(draws))
    for rate in (0.01, 0.001):
        assert (draws > tail.limit(rate)).mean() == pytest.approx(rate, rel=0.35)
    symmetric = statistics.Tail(mean=2.0, std=3.0, skew=0.0, windows=1e9)
    assert symmetric.limit(0.01) == pytest.approx(scipy.stats.norm.ppf(0.99, 2.0, 3.0), abs=1e-6)


def test_fewer_windows_put_the_limit_further_out():
    limits = [statistics.Tail(mean=0.0, std=1.0, skew=0.3, windows=n).limit(0.001) for n in (4.0, 8.0, 20.0, 60.0)]
    assert limits == sorted(limits, reverse=True)
    # Two sources of doubt: the spread is an estimate, and so is the mean.
    four = statistics.Tail(mean=0.0, std=1.0, skew=0.0, windows=4.0)
    assert four.limit(0.001) == pytest.approx(statistics.student_quantile(0.999, 5.0) * np.sqrt(1.0 + 1.0 / 4.0))


def test_stability_index_by_hand():
    # 8 and 2 of 10 rows, half a row added to each of 2 bins; 1 and 1 of 2.
    possible = np.array([True, True])
    found = statistics.stability_index(np.array([8, 2]), np.array([1, 1]), possible)
    assert found == pytest.approx((8.5 / 11 - 0.5) * np.log(8.5 / 5.5) + (2.5 / 11 - 0.5) * np.log(2.5 / 5.5))
    assert statistics.stability_index(np.array([5, 5]), np.array([5, 5]), possible) == 0.0
    # A bin between equal edges is none.
    void = statistics.stability_index(np.array([8, 0, 2]), np.array([1, 0, 1]), np.array([True, False, True]))
    assert void == pytest.approx(found)


def test_fit_compares_each_window_with_the_rows_outside_it():
    rows = np.random.default_rng(20).standard_normal(240).astype(np.float32)
    reference = DriftReference.fit(["noise"], rows[:, None])
    cuts = reference.edges[0]
    assert cuts.tolist() == np.sort(rows)[[2, 23, 47, 71, 95, 119, 143, 167, 191, 215, 237]].tolist()
    psi, roots = [], []
    for start in range(181):
        inside = np.isin(np.arange(240), np.arange(start, start + WINDOW))
        ours, theirs = (
            np.bincount(np.searchsorted(cuts, part), minlength=12) for part in (rows[inside], rows[~inside])
        )
        p, q = (ours + 0.5) / 66, (theirs + 0.5) / 186
        psi.append(((p - q) * np.log(p / q)).sum())
        roots.append(np.sqrt(np.abs(ours.cumsum() / 60 - theirs.cumsum() / 180).max()))
    assert reference.psi_expected[0] == pytest.approx(np.mean(psi))
    assert reference.psi.centre[0] == pytest.approx(np.mean(np.cbrt(psi)))
    assert reference.ks.centre[0] == pytest.approx(np.mean(roots))
    assert reference.ks.spread[0] == pytest.approx(np.std(roots))


@pytest.mark.parametrize(("window", "within"), [(WINDOW, 0.2), (600, 0.07)])
def test_stability_index_without_drift_is_expected_to_be_that_of_a_chi_square(window, within):
    rows = np.random.default_rng(2).standard_normal((100 * window, 1))
    expected = 11 * (1 / window + 1 / (99 * window))
    assert DriftReference.fit(["noise"], rows, window=window).psi_expected[0] == pytest.approx(expected, rel=within)


def test_stability_index_without_drift_is_above_the_usual_limit_and_its_excess_is_not():
    rng = np.random.default_rng(2)
    reference = DriftReference.fit(["noise"], rng.standard_normal((4000, 1)))
    assert reference.psi_expected[0] > 0.1  # "some drift" by the usual convention
    excess = [verdict(reference, rows).psi["noise"] for rows in rng.standard_normal((200, WINDOW, 1))]
    assert np.mean(excess) == pytest.approx(0.0, abs=0.015)


def test_p_values_hold_for_persistent_bars_too():
    rng = np.random.default_rng(3)
    persistence = np.array([0.0, 0.9])
    reference = DriftReference.fit(["fast", "slow"], autoregressions(rng, 1, 20_000, persistence)[0])
    found = [verdict(reference, rows).ks for rows in autoregressions(rng, 1000, WINDOW, persistence)]
    for name in reference.names:
        p = np.array([one[name] for one in found])
        # On the quiet side for independent bars, because the bins are coarse.
        assert 0.005 < (p < 0.05).mean() < 0.08
        assert (p < 0.01).mean() < 0.025
    assert reference.independent_bars[0] > 45.0
    assert 3.0 < reference.independent_bars[1] < 12.0


# --- false alarms and power -------------------------------------------------------------------------------


def test_windows_of_the_same_process_alarm_at_the_nominal_rate():
    rng = np.random.default_rng(5)
    found, naive = [], 0
    for _ in range(15):
        reference = fitted(rng, 1250, MIXED)
        for rows in autoregressions(rng, 60, WINDOW, MIXED):
            found.append(verdict(reference, rows, nats(rng, WINDOW)))
            distance = np.sqrt(WINDOW) * np.array([_textbook_distance(reference, rows, m) for m in range(len(MIXED))])
            naive += len(MIXED) * statistics.kolmogorov_p(distance).min() < 0.01
    # Nominal are 1 % and 0.1 %; what the test can tell apart with 900 windows is twice that.
    assert share(found, DriftLevel.WARNING, DriftLevel.ALARM) <= 0.02
    assert share(found, DriftLevel.ALARM) <= 0.004
    # The textbook test, corrected for the number of features alone, cries wolf.
    assert naive / len(found) > 0.9


def test_short_training_window_costs_power_and_not_false_alarms():
    rng = np.random.default_rng(21)
    found = []
    for _ in range(30):
        reference = fitted(rng, 500, MIXED)
        found += [verdict(reference, rows) for rows in autoregressions(rng, 30, WINDOW, MIXED)]
    assert share(found, DriftLevel.WARNING, DriftLevel.ALARM) <= 0.02
    assert share(found, DriftLevel.ALARM) <= 0.006


def _textbook_distance(reference: DriftReference, rows: np.ndarray, column: int) -> float:
    bins = np.searchsorted(reference.edges[column], rows[:, column].astype(np.float32))
    counts = np.bincount(bins, minlength=12)
    return float(statistics.kolmogorov_distance(counts, reference.counts[column]))


def test_settings_move_the_rate():
    rng = np.random.default_rng(6)
    reference = fitted(rng, 2000, FAST)
    windows = autoregressions(rng, 300, WINDOW, FAST)
    loose = [
        verdict(reference, rows, warning_rate=0.3, alarm_rate=0.3, psi_warning=0.0, psi_alarm=0.0) for rows in windows
    ]
    assert 0.1 < share(loose, DriftLevel.ALARM) < 0.4


def test_market_with_regimes_alarms_rarely_and_a_shifted_signal_is_found():
    names = [field.name for field in MARKET_FIELDS]
    quiet, shifted = [], []
    for seed in range(6):
        train = simulate_panel(SyntheticMarketConfig(), paths=1, bars=1250, seed=seed).features.values[0]
        fresh = simulate_panel(SyntheticMarketConfig(), paths=50, bars=WINDOW, seed=1000 + seed).features.values
        reference = DriftReference.fit(names, train)
        quiet += [verdict(reference, rows) for rows in fresh]
        fresh = fresh[:10].copy()
        signal = names.index("signal")
        fresh[:, :, signal] += 3.0 * train[:, signal].std()
        shifted += [verdict(reference, rows) for rows in fresh]
    assert share(quiet, DriftLevel.WARNING, DriftLevel.ALARM) <= 0.03
    assert share(quiet, DriftLevel.ALARM) <= 0.01
    assert share(shifted, DriftLevel.WARNING, DriftLevel.ALARM) > 0.9
    assert share(shifted, DriftLevel.ALARM) > 0.7


@pytest.mark.parametrize("column", [0, 3])
def test_mean_shift_of_three_deviations_is_an_alarm_within_the_window(reference, column):
    rng = np.random.default_rng(7)
    shift = 3.0 * (np.arange(len(FAST)) == column)
    for clean, rows in zip(*autoregressions(rng, 20, WINDOW, FAST).reshape(2, 10, WINDOW, -1), strict=True):
        monitor = DriftMonitor(reference)
        levels = []
        for bar, row in enumerate(np.concatenate((clean, rows + shift))):
            monitor.observe(row, bar_time=float(bar))
            levels.append(monitor.status().level)
        assert levels[WINDOW - 1] is DriftLevel.OK
        assert DriftLevel.ALARM in levels[WINDOW:]
        status = monitor.status()
        assert (status.level, status.worst) == (DriftLevel.ALARM, f"feature_{column}")
        assert f"feature_{column}" in status.words
        assert status.psi[f"feature_{column}"] > 1.0
        assert status.ks[f"feature_{column}"] < 1e-6


def test_doubled_volatility_is_found_within_the_window():
    rng = np.random.default_rng(8)
    reference = fitted(rng, 3000, np.zeros(10))
    found = [verdict(reference, 2.0 * rows) for rows in autoregressions(rng, 30, WINDOW, np.zeros(10))]
    assert share(found, DriftLevel.ALARM) > 0.9


def test_halved_volatility_is_found_too():
    rng = np.random.default_rng(9)
    reference = fitted(rng, 3000, np.zeros(10))
    found = [verdict(reference, 0.4 * rows) for rows in autoregressions(rng, 30, WINDOW, np.zeros(10))]
    assert share(found, DriftLevel.WARNING, DriftLevel.ALARM) > 0.9


def test_worse_forecast_is_an_alarm_though_features_are_as_ever(reference):
    rng = np.random.default_rng(10)
    rows = autoregressions(rng, 1, WINDOW, FAST)[0]
    usual = verdict(reference, rows, nats(rng, WINDOW))
    assert usual.level is DriftLevel.OK
    assert usual.nll_z is not None
    assert abs(usual.nll_z) < 3.5
    worse = verdict(reference, rows, nats(rng, WINDOW, scale=2.0))
    assert worse.level is DriftLevel.ALARM
    assert "NLL" in worse.words
    assert reference.nll is not None
    assert worse.nll_mean is not None
    assert worse.nll_mean > reference.nll.mean + 1.0
    better = verdict(reference, rows, nats(rng, WINDOW, scale=0.3))
    assert better.level is DriftLevel.OK


def test_one_jump_in_the_forecast_error_is_no_drift(reference):
    rng = np.random.default_rng(11)
    rows, nll = autoregressions(rng, 1, WINDOW, FAST)[0], nats(rng, WINDOW)
    nll[30] = 1e6
    assert verdict(reference, rows, nll).level is DriftLevel.OK


def test_small_excess_is_no_drift_however_improbable():
    rng = np.random.default_rng(12)
    reference = fitted(rng, 3000, np.zeros(4))
    rows = 1.6 * autoregressions(rng, 1, WINDOW, np.zeros(4))[0]
    loud = verdict(reference, rows, warning_rate=0.4, alarm_rate=0.4)
    largest = max(loud.psi.values())
    # KS hardly sees it at the alarm rate, PSI does: only the floor keeps it down.
    strict = {"warning_rate": 0.4, "alarm_rate": 1e-9}
    assert verdict(reference, rows, **strict, psi_warning=0.0).level is DriftLevel.WARNING
    assert "PSI" not in verdict(reference, rows, **strict, psi_warning=largest + 0.01, psi_alarm=1e3).words


# --- bars -------------------------------------------------------------------------------------------------


def test_no_verdict_before_the_window_is_full(reference):
    monitor = DriftMonitor(reference)
    for bar in range(WINDOW - 1):
        monitor.observe(np.full(4, 9.0), 100.0, bar_time=float(bar))
    early = monitor.status()
    assert (early.level, early.bars, early.psi, early.worst) == (DriftLevel.OK, WINDOW - 1, {}, None)
    assert early.words == "59 of 60 bars seen, no verdict yet"
    monitor.observe(np.full(4, 9.0), 100.0, bar_time=float(WINDOW))
    assert monitor.status().level is DriftLevel.ALARM


def test_each_bar_counts_once_and_older_ones_do_not(reference):
    monitor = DriftMonitor(reference)
    assert monitor.observe(np.zeros(4), bar_time=10.0)
    assert not monitor.observe(np.ones(4), bar_time=10.0)
    assert not monitor.observe(np.ones(4), bar_time=9.0)
    assert not monitor.observe(np.ones(4), bar_time=float("nan"))
    assert monitor.status().bars == 1
    assert monitor.observe(np.ones(4), bar_time=11.0)
    assert monitor.status().bars == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_bar_that_is_not_finite_in_single_precision_is_left_out(reference, bad):
    monitor = DriftMonitor(reference)
    assert not monitor.observe(np.array([0.0, bad, 0.0, 0.0]), bar_time=1.0)
    assert monitor.observe(np.zeros(4), bar_time=1.0)


@pytest.mark.parametrize("shape", [(3,), (1, 4), ()])
def test_row_of_another_shape_is_refused(reference, shape):
    with pytest.raises(ValueError, match=r"features: expected \[4\]"):
        DriftMonitor(reference).observe(np.zeros(shape), bar_time=1.0)


def test_window_slides_and_old_bars_leave_no_trace(reference):
    rng = np.random.default_rng(13)
    rows, nll = autoregressions(rng, 1, 4 * WINDOW + 7, FAST)[0], nats(rng, 4 * WINDOW + 7)
    rows[:100] += 5.0
    through = DriftMonitor(reference)
    for bar, row in enumerate(rows):
        through.observe(row, float(nll[bar]), bar_time=float(bar))
    found, fresh = through.status(), verdict(reference, rows[-WINDOW:], nll[-WINDOW:])
    assert found.nll_mean == pytest.approx(fresh.nll_mean)
    assert (found.psi, found.ks, found.level, found.words) == (fresh.psi, fresh.ks, fresh.level, fresh.words)


def test_bars_without_a_likelihood_are_done_without(reference):
    rng = np.random.default_rng(14)
    rows, nll = autoregressions(rng, 1, WINDOW, FAST)[0], nats(rng, WINDOW, scale=1.3)
    few = [*nll[:20], *[np.nan] * 40]
    assert verdict(reference, rows, few).nll_z is None
    half = verdict(reference, rows, [*nll[:30], *[np.inf] * 30])
    assert half.nll_mean == pytest.approx(nll[:30].mean())
    twice = verdict(reference, rows, [*nll[:30], *nll[:30]])
    assert reference.nll is not None
    tail = reference.nll.tail
    assert half.nll_z is not None
    assert twice.nll_z is not None
    expected = np.sqrt(0.5) * (tail.mean + tail.std * twice.nll_z)
    assert tail.mean + tail.std * half.nll_z == pytest.approx(expected, rel=0.05)


def test_verdict_is_computed_once_per_bar(reference):
    monitor = DriftMonitor(reference)
    monitor.observe(np.zeros(4), bar_time=1.0)
    first = monitor.status()
    assert monitor.status() is first
    monitor.observe(np.zeros(4), bar_time=1.0)
    assert monitor.status() is first
    monitor.observe(np.zeros(4), bar_time=2.0)
    assert monitor.status() is not first


# --- columns that are not continuous ----------------------------------------------------------------------


def test_column_that_stood_still_is_not_watched():
    rng = np.random.default_rng(15)
    values = rng.standard_normal((1500, 3))
    values[:, 1] = 0.1
    values[:, 2] = 0.0
    values[700, 2] = 1.0
    reference = DriftReference.fit(["moving", "constant", "once"], values)
    assert reference.watched.tolist() == [True, False, False]
    status = verdict(reference, np.column_stack((rng.standard_normal(WINDOW), np.ones(WINDOW), np.ones(WINDOW))))
    assert (status.level, list(status.psi), list(status.ks)) == (DriftLevel.OK, ["moving"], ["moving"])


def test_nothing_watched_is_no_drift():
    reference = DriftReference.fit(["constant"], np.ones((300, 1)))
    status = verdict(reference, np.full((WINDOW, 1), 7.0))
    assert (status.level, status.worst, status.psi) == (DriftLevel.OK, None, {})


@pytest.mark.parametrize("change", [lambda x: np.where(x > 0.0, x, -1.0), np.zeros_like, lambda x: x + 3.0])
def test_column_with_many_equal_values_is_watched_on_both_sides(change: Callable[[np.ndarray], np.ndarray]):
    rng = np.random.default_rng(16)
    spread = np.maximum(rng.standard_normal((3000, 1)), 0.0)  # half of it zero, as estimated spreads are
    reference = DriftReference.fit(["spread"], spread)
    fresh = np.maximum(rng.standard_normal((WINDOW, 1)), 0.0)
    assert verdict(reference, fresh).level is DriftLevel.OK
    assert verdict(reference, change(fresh)).level is DriftLevel.ALARM


# --- reference --------------------------------------------------------------------------------------------


def test_reference_survives_its_file_exactly(reference):
    text = canonical_json(reference.to_dict())
    again = DriftReference.from_dict(json.loads(text))
    assert canonical_json(again.to_dict()) == text
    assert (again.edges.dtype, again.counts.dtype) == (np.float32, np.int64)
    rng = np.random.default_rng(17)
    rows, nll = autoregressions(rng, 1, WINDOW, FAST)[0] + 0.5, nats(rng, WINDOW)
    assert verdict(again, rows, nll) == verdict(reference, rows, nll)
    without = DriftReference.fit(["one"], rng.standard_normal((500, 1)))
    assert DriftReference.from_dict(without.to_dict()).nll is None


def test_fit_is_deterministic():
    values = autoregressions(np.random.default_rng(18), 1, 600, FAST)[0]
    first, second = (DriftReference.fit("abcd", values).to_dict() for _ in range(2))
    assert first == second


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format_version", 2), "format_version"),
        (_set("window", 60.5), "window"),
        (_set("window", 5), "window"),
        (_set("names", []), "names"),
        (_set("names", ["a", "a", "b", "c"]), "names: expected each once"),
        (_set("names", ["a", "b", "c"]), "edges: expected 3 entries"),
        (_set("more", 1), "more"),
        (lambda raw: raw.pop("psi"), "psi"),
        (lambda raw: raw["edges"][0].reverse(), "edges: expected ascending"),
        (lambda raw: raw["edges"][0].pop(), "edges.0"),
        (lambda raw: raw["edges"][0].__setitem__(0, float("nan")), "edges.0"),
        (lambda raw: raw["counts"][1].__setitem__(3, -1), "counts.1.3"),
        (lambda raw: raw["counts"][1].__setitem__(3, 10**6), "counts: expected the same number"),
        (_set("psi_expected", [0.1]), "psi_expected: expected 4 entries"),
        (_set("psi.spread", [0.0] * 4), "psi.spread.0"),
        (_set("ks.centre", [0.1]), "ks.centre: expected 4"),
        (_set("ks.tail.windows", 0.0), "ks.tail.windows"),
        (_set("ks.tail.skew", 3.0), "ks.tail.skew"),
        (_set("nll.mean", "1.0"), "nll.mean"),
        (lambda raw: raw["nll"]["quantiles"].reverse(), "nll.quantiles: expected ascending"),
        (lambda raw: raw["nll"]["quantiles"].pop(), "nll.quantiles"),
    ],
)
def test_file_that_is_not_as_written_is_refused(reference, change, words):
    raw = copy.deepcopy(reference.to_dict())
    change(raw)
    with pytest.raises(BundleFormatError, match=rf"^drift\.json: .*{words}"):
        DriftReference.from_dict(raw)


def test_file_that_is_no_object_is_refused():
    with pytest.raises(BundleFormatError, match=r"^drift\.json: "):
        DriftReference.from_dict([])  # type: ignore[arg-type]


def test_rows_that_nothing_can_be_learned_from_are_refused():
    rows = np.zeros((240, 2))
    with pytest.raises(DataError, match="values: expected at least 240 rows, was 239"):
        DriftReference.fit("ab", rows[1:])
    bad = rows.copy()
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match="values: expected finite numbers, 1 are not"):
        DriftReference.fit("ab", bad)
    with pytest.raises(DataError, match="nll: expected at least 180 rows, was 10"):
        DriftReference.fit("ab", rows, np.zeros(10))
    with pytest.raises(ValueError, match=r"values: expected \[T, 3\], was \[240, 2\]"):
        DriftReference.fit("abc", rows)
    with pytest.raises(ValueError, match=r"nll: expected \[N\]"):
        DriftReference.fit("ab", rows, rows)
    with pytest.raises(ValueError, match="window: expected at least 12 bars, was 11"):
        DriftReference.fit("ab", rows, window=11)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"psi_warning": 0.3}, "psi_warning"),
        ({"psi_warning": -0.1}, "psi_warning"),
        ({"psi_alarm": float("nan")}, "psi_alarm"),
        ({"alarm_rate": 0.0}, "alarm_rate"),
        ({"alarm_rate": 0.02}, "alarm_rate"),
        ({"warning_rate": 0.5}, "warning_rate"),
    ],
)
def test_settings_that_contradict_are_refused(changes, field):
    with pytest.raises(ValueError, match=f"^drift: .*{field}"):
        DriftSettings(**changes)


def test_serving_process_needs_no_scipy_for_it():
    code = (
        "import sys, serving.drift.monitor\n"
        "print(sorted({'scipy', 'pandas', 'torch', 'mlflow', 'gymnasium', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
