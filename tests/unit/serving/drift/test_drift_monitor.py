"""The drift monitor: few false alarms on autocorrelated features, changes found, each bar once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from drift_parts import FAST, MIXED, WINDOW, autoregressions, fitted, nats, share, verdict

from configs.evaluation import SyntheticMarketConfig
from envs.synthetic import MARKET_FIELDS, simulate_panel
from serving.drift import statistics
from serving.drift.monitor import DriftLevel, DriftMonitor, DriftReference

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
