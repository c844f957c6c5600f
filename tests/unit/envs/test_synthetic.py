"""The synthetic market: its laws against closed forms, and features that know neither the future nor the truth.

Tolerances are four standard errors, from the closed form where there is one and otherwise from the spread over paths.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr
from scipy.stats import kstest

from configs.evaluation import SyntheticMarketConfig
from data import FEATURE_FIELDS, compute_features, validate_bars
from envs.panel import FeaturePanel
from envs.synthetic import (
    MARKET_FIELDS,
    WARMUP,
    MarketPaths,
    SyntheticPanel,
    assemble_market,
    market_features,
    signal_persistence,
    simulate_market,
    simulate_panel,
    stationary_law,
    transition_matrix,
)

DEFAULT = SyntheticMarketConfig()
SMOOTH = DEFAULT.model_copy(update={"jump_rate": (0.0, 0.0, 0.0)})
ONE_MINUTE = {"bars_per_day": 390}


@pytest.fixture(scope="module")
def market() -> MarketPaths:
    """500,000 daily bars without jumps."""
    return simulate_market(SMOOTH, paths=100, bars=5000, seed=11)


def parts(market: MarketPaths) -> tuple[np.ndarray, np.ndarray]:
    """Gap and intraday log returns of bars 1 .. T-1, [P, T-1]."""
    return np.log(market.open[:, 1:] / market.close[:, :-1]), np.log(market.close / market.open)[:, 1:]


def slope(regressor: np.ndarray, response: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    x, y = regressor.ravel() - regressor.mean(), response.ravel() - response.mean()
    estimate = (x @ y) / (x @ x)
    return estimate, math.sqrt(np.mean(np.square(y - estimate * x)) / (x @ x))


def close_to(sample: np.ndarray, expected: float) -> bool:
    """Whether the mean of independent numbers is within four standard errors of the expected one."""
    return abs(sample.mean() - expected) < 4.0 * sample.std(ddof=1) / math.sqrt(sample.size)


# --- regimes -----------------------------------------------------------------------------------------------


def test_transitions_leave_after_the_mean_stay_and_spread_evenly() -> None:
    expected = [[119 / 120, 1 / 240, 1 / 240], [1 / 120, 59 / 60, 1 / 120], [1 / 60, 1 / 60, 29 / 30]]
    np.testing.assert_allclose(transition_matrix(DEFAULT), expected, rtol=1e-12)


def test_minute_bars_leave_390_times_as_rarely() -> None:
    config = DEFAULT.model_copy(update=ONE_MINUTE)
    assert transition_matrix(config)[2, 0] == pytest.approx(1 / (2 * 30 * 390), rel=1e-12)


@pytest.mark.parametrize(
    ("transition", "law"),
    [
        # Entries are even, so the share of a regime is proportional to its stay, 120 : 60 : 30.
        (transition_matrix(DEFAULT), [4 / 7, 2 / 7, 1 / 7]),
        # Flows balance: 0.1 * 3/4 = 0.3 * 1/4.
        (np.array([[0.9, 0.1], [0.3, 0.7]]), [3 / 4, 1 / 4]),
        # A chain that only alternates still has a law.
        (np.array([[0.0, 1.0], [1.0, 0.0]]), [1 / 2, 1 / 2]),
    ],
)
def test_stationary_law_is_the_one_worked_by_hand(transition: np.ndarray, law: list[float]) -> None:
    np.testing.assert_allclose(stationary_law(transition), law, rtol=1e-9)
    np.testing.assert_allclose(law @ transition, law, rtol=1e-12)


def test_simulated_regimes_follow_the_chain_from_the_first_bar_on(market: MarketPaths) -> None:
    law, transition = stationary_law(transition_matrix(DEFAULT)), transition_matrix(DEFAULT)
    first = simulate_market(DEFAULT, paths=20_000, bars=60, seed=3).regime[:, 0]
    for regime in range(3):
        assert close_to((market.regime == regime).mean(axis=1), law[regime])
        assert close_to((first == regime).astype(float), law[regime])
        after = market.regime[:, 1:][market.regime[:, :-1] == regime]
        for entered in range(3):
            assert close_to((after == entered).astype(float), transition[regime, entered])


# --- signal ------------------------------------------------------------------------------------------------


def test_the_signal_halves_in_its_half_life_at_any_scale() -> None:
    assert signal_persistence(DEFAULT) ** 10 == pytest.approx(0.5, rel=1e-12)
    assert signal_persistence(DEFAULT.model_copy(update=ONE_MINUTE)) ** 3900 == pytest.approx(0.5, rel=1e-9)


def test_the_true_signal_is_a_stationary_unit_autoregression(market: MarketPaths) -> None:
    true = market.true_signal
    persistence = signal_persistence(DEFAULT)
    estimate, error = slope(true[:, :-1], true[:, 1:])
    assert abs(estimate - persistence) < 4 * error
    assert close_to(np.square(true).mean(axis=1), 1.0)
    first = simulate_market(DEFAULT, paths=20_000, bars=60, seed=3).true_signal[:, 0]
    assert close_to(np.square(first), 1.0)


def test_the_observed_signal_adds_independent_noise(market: MarketPaths) -> None:
    noise = market.signal - market.true_signal
    assert close_to(np.square(noise), DEFAULT.signal_noise**2)
    assert close_to(noise[:, 1:] * noise[:, :-1], 0.0)
    assert close_to((noise * market.true_signal).mean(axis=1), 0.0)


def test_without_noise_the_observed_signal_is_the_true_one() -> None:
    market = simulate_market(DEFAULT.model_copy(update={"signal_noise": 0.0}), paths=2, bars=60, seed=1)
    np.testing.assert_array_equal(market.signal, market.true_signal)


def test_the_signal_moves_the_next_bar_by_its_drift(market: MarketPaths) -> None:
    gap, intraday = parts(market)
    drift = np.array(DEFAULT.drift)[market.regime[:, 1:]] / 252
    for response, share in ((gap, 0.2), (intraday, 0.8)):
        estimate, error = slope(market.true_signal[:, :-1], response - share * drift)
        assert abs(estimate - share * DEFAULT.signal_drift / 252) < 4 * error
        # Noise in the regressor attenuates: variance 1 of the signal over that of both.
        estimate, error = slope(market.signal[:, :-1], response - share * drift)
        assert abs(estimate - share * DEFAULT.signal_drift / 252 / (1 + DEFAULT.signal_noise**2)) < 4 * error


def test_the_signal_of_a_bar_does_not_move_that_bar() -> None:
    # A short memory tells the bars apart: the bar's own return correlates with its signal through the last one only,
    # whose weight is the persistence, 2^(-1 / 0.5).
    config = SMOOTH.model_copy(update={"signal_half_life_days": 0.5, "signal_drift": 1.0})
    market = simulate_market(config, paths=100, bars=2000, seed=5)
    gap, intraday = parts(market)
    estimate, error = slope(market.true_signal[:, 1:], gap + intraday)
    assert abs(estimate - 0.25 * 1.0 / 252) < 4 * error


# --- returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars_per_day", [1, 390])
def test_gap_and_intraday_returns_have_their_share_of_each_regimes_law(bars_per_day: int) -> None:
    config = SMOOTH.model_copy(update={"bars_per_day": bars_per_day, "duration_days": (9.0, 6.0, 3.0)})
    market = simulate_market(config, paths=50, bars=8000, seed=7)
    dt = 1 / (252 * bars_per_day)
    regime = market.regime[:, 1:]
    mean = (np.array(config.drift)[regime] + config.signal_drift * market.true_signal[:, :-1]) * dt
    scale = np.array(config.volatility)[regime] * math.sqrt(dt)
    gap, intraday = parts(market)
    gap_score = (gap - 0.2 * mean) / (math.sqrt(0.2) * scale)
    intraday_score = (intraday - 0.8 * mean) / (math.sqrt(0.8) * scale)
    assert close_to(gap_score * intraday_score, 0.0)
    for score in (gap_score, intraday_score):
        assert kstest(score[:, ::40].ravel(), "norm").pvalue > 1e-3
        for state in range(3):
            assert close_to(score[regime == state], 0.0)
            assert close_to(np.square(score[regime == state]), 1.0)


@pytest.mark.parametrize("bars_per_day", [1, 390])
def test_a_year_is_the_same_at_every_scale(bars_per_day: int) -> None:
    flat = {"drift": (4.0, 4.0, 4.0), "volatility": (0.2, 0.2, 0.2), "signal_drift": 0.0, "bars_per_day": bars_per_day}
    config = SMOOTH.model_copy(update=flat)
    gap, intraday = parts(simulate_market(config, paths=50, bars=10_000, seed=9))
    annual = (gap + intraday) * config.bars_per_year
    assert close_to(annual, 4.0)
    assert close_to(np.square(annual - 4.0) / config.bars_per_year, 0.04)


def test_jumps_come_at_the_regimes_rate_and_only_before_the_open() -> None:
    config = DEFAULT.model_copy(
        update={"volatility": (1e-9, 1e-9, 1e-9), "drift": (0.0, 0.0, 0.0), "signal_drift": 0.0}
    )
    market = simulate_market(config, paths=100, bars=5000, seed=13)
    gap, intraday = parts(market)
    jumped = np.abs(gap) > 1e-7
    assert np.abs(intraday).max() < 1e-7
    assert close_to(gap[jumped], 0.0)
    assert close_to(np.square(gap[jumped]), 0.02**2)
    for state, rate in enumerate((0.5, 1.0, 6.0)):
        assert close_to(jumped[market.regime[:, 1:] == state].astype(float), rate / 252)


def test_high_and_low_are_the_extremes_of_a_brownian_motion(market: MarketPaths) -> None:
    assert (market.high >= np.maximum(market.open, market.close)).all()
    assert (market.low <= np.minimum(market.open, market.close)).all()
    still = {"drift": (0.0, 0.0, 0.0), "volatility": (0.2, 0.2, 0.2), "signal_drift": 0.0}
    free = simulate_market(SMOOTH.model_copy(update=still), paths=50, bars=4000, seed=17)
    # The maximum of a driftless motion is distributed as |N(0, s^2)|.
    deviation = 0.2 * math.sqrt(0.8 / 252)
    for extreme in (np.log(free.high / free.open), -np.log(free.low / free.open)):
        assert close_to(extreme, deviation * math.sqrt(2 / math.pi))
        assert kstest(extreme[:, ::10].ravel() / deviation, "halfnorm").pvalue > 1e-3


# The spacing of floats doubles at a power of two: where the log price crosses one, open plus move can miss the close
# by the last bit. Bars that only drift have their close as an extreme; 4 is crossed downwards, -4 upwards.
@pytest.mark.parametrize(("drift", "first_jump"), [(-2.0, 0.0), (2.0, -9.0)])
def test_no_rounding_takes_a_close_out_of_its_range(drift: float, first_jump: float) -> None:
    shape = (2000, 80)
    jump = np.zeros(shape)
    jump[:, 0] = first_jump
    market = assemble_market(
        DEFAULT,
        np.random.default_rng(1),
        regime=np.zeros(shape, dtype=np.int8),
        drift=np.full(shape, drift),
        scale=np.zeros(shape),
        diffusion=np.zeros(shape),
        jump=jump,
    )
    assert (market.high >= np.maximum(market.open, market.close)).all()
    assert (market.low <= np.minimum(market.open, market.close)).all()


# --- spread and volume -------------------------------------------------------------------------------------


def test_spread_and_volume_have_their_regimes_mean_and_a_noise_of_their_own(market: MarketPaths) -> None:
    for state, (spread, volume) in enumerate(zip((1e-4, 2e-4, 5e-4), (0.0, 0.1, 0.5), strict=True)):
        quoted, traded = market.spread[market.regime == state], np.log(market.volume[market.regime == state] / 1e6)
        assert close_to(quoted, spread)
        assert close_to(np.square(np.log(quoted / spread) + 0.6**2 / 2), 0.6**2)
        assert close_to(traded, volume)
        assert close_to(np.square(traded - volume), 0.4**2)


def test_the_spread_does_not_give_the_regime_away(market: MarketPaths) -> None:
    calm, stressed = (np.sort(market.spread[market.regime == state])[::50] for state in (0, 2))
    inverted = np.searchsorted(stressed, calm).mean() / len(stressed)
    # Log spreads differ by log 5 in the mean and by N(0, 2 * 0.6^2) around it.
    assert inverted == pytest.approx(ndtr(-math.log(5) / (0.6 * math.sqrt(2))), abs=0.003)
    silent = simulate_market(DEFAULT.model_copy(update={"spread_noise": 0.0}), paths=3, bars=500, seed=1)
    np.testing.assert_allclose(silent.spread, np.array((1e-4, 2e-4, 5e-4))[silent.regime], rtol=1e-12)


# --- bars and clock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, ONE_MINUTE, {"gap_share": 0.0}, {"gap_share": 1.0}])
def test_every_path_passes_the_checks_of_real_bars(changes: dict) -> None:
    market = simulate_market(DEFAULT.model_copy(update=changes), paths=3, bars=3000, seed=19)
    for path in range(3):
        prices = {name: getattr(market, name)[path] for name in ("open", "high", "low", "close", "volume")}
        frame = pd.DataFrame(prices, index=pd.DatetimeIndex(market.timestamps, name="timestamp"))
        assert len(validate_bars(frame, "synthetic")) == 3000


def test_daily_bars_are_weekdays_and_intraday_bars_minutes_of_them() -> None:
    days = simulate_market(DEFAULT, paths=1, bars=60, seed=0).timestamps
    assert days[[0, 4, 5]].astype("datetime64[D]").astype(str).tolist() == ["2000-01-03", "2000-01-07", "2000-01-10"]
    config = DEFAULT.model_copy(update=ONE_MINUTE)
    minutes = simulate_market(config, paths=1, bars=5 * 390 + 1, seed=0).timestamps
    expected = ["2000-01-03T00:00", "2000-01-03T06:29", "2000-01-04T00:00", "2000-01-10T00:00"]
    assert minutes[[0, 389, 390, 1950]].astype("datetime64[m]").astype(str).tolist() == expected


def test_bars_cannot_be_changed(market: MarketPaths) -> None:
    for field in fields(MarketPaths):
        with pytest.raises(ValueError, match="read-only"):
            getattr(market, field.name)[...] = 0


# --- features ----------------------------------------------------------------------------------------------


def loop_features(market: MarketPaths, path: int, row: int) -> list[float]:
    """The row of one bar from its definition, by plain loops."""
    close, volume, signal = market.close[path], market.volume[path], market.signal[path]
    moves = [math.log(close[bar] / close[bar - 1]) for bar in range(row - 19, row + 1)]
    volumes = [math.log(1 + volume[bar]) for bar in range(row - 19, row + 1)]
    return [
        math.log(market.open[path][row] / close[row - 1]),
        math.log(close[row] / market.open[path][row]),
        math.log(close[row] / close[row - 5]),
        math.log(close[row] / close[row - 20]),
        statistics.stdev(moves) * math.sqrt(252),
        signal[row],
        statistics.fmean(signal[row - 4 : row + 1]),
        statistics.fmean(signal[row - 19 : row + 1]),
        market.spread[path][row],
        volumes[-1] - statistics.fmean(volumes),
    ]


def test_features_equal_their_definition_bar_by_bar() -> None:
    market = simulate_market(DEFAULT, paths=3, bars=64, seed=23)
    panel = market_features(market, DEFAULT)
    assert panel.values.shape == (3, 44, 10)
    expected = [[loop_features(market, path, row) for row in range(WARMUP, 64)] for path in range(3)]
    np.testing.assert_allclose(panel.values, expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_array_equal(panel.timestamps, market.timestamps[WARMUP:])


def test_columns_shared_with_real_bars_are_the_same_numbers() -> None:
    market = simulate_market(DEFAULT, paths=2, bars=200, seed=29)
    panel = market_features(market, DEFAULT)
    prices = {name: getattr(market, name)[1] for name in ("open", "high", "low", "close", "volume")}
    table = compute_features(pd.DataFrame(prices, index=pd.DatetimeIndex(market.timestamps, tz="UTC")), 252, "x")
    shared = [field.name for field in MARKET_FIELDS if field in FEATURE_FIELDS]
    assert shared == ["gap_return", "intraday_return", "return_5", "return_20", "volatility_20", "volume"]
    for name in shared:
        ours = panel.values[1, -len(table) :, panel.names.index(name)]
        np.testing.assert_allclose(ours, table.values[:, table.index(name)], rtol=1e-12, atol=1e-15)


def changed_after(market: MarketPaths, bar: int) -> MarketPaths:
    later = np.arange(market.close.shape[1]) > bar
    series = ("open", "high", "low", "close", "volume", "spread", "signal")
    return replace(
        market, **{name: np.where(later, 3.0 * getattr(market, name), getattr(market, name)) for name in series}
    )


def test_a_row_depends_on_no_later_bar() -> None:
    market = simulate_market(DEFAULT, paths=3, bars=100, seed=31)
    before = market_features(market, DEFAULT).values
    for bar in (WARMUP, 50, 98):
        after = market_features(changed_after(market, bar), DEFAULT).values
        known = bar + 1 - WARMUP
        np.testing.assert_array_equal(after[:, :known], before[:, :known])
        # Scaling all prices leaves the intraday return alone.
        assert (np.delete(after[:, known], 1, axis=1) != np.delete(before[:, known], 1, axis=1)).all()


def test_features_do_not_know_the_truth() -> None:
    market = simulate_market(DEFAULT, paths=3, bars=100, seed=31)
    blind = replace(market, regime=2 - market.regime, true_signal=-market.true_signal)
    np.testing.assert_array_equal(market_features(blind, DEFAULT).values, market_features(market, DEFAULT).values)


def test_a_panel_has_the_asked_rows_and_its_truth_beside_them() -> None:
    panel = simulate_panel(DEFAULT, paths=4, bars=60, seed=37)
    market = simulate_market(DEFAULT, paths=4, bars=60 + WARMUP, seed=37)
    assert panel.features.values.shape == (4, 60, len(MARKET_FIELDS))
    np.testing.assert_array_equal(panel.features.values[:, :, 8], market.spread[:, WARMUP:])
    wide = panel.with_truth()
    assert wide.names == (*panel.features.names, "true_regime", "true_signal")
    np.testing.assert_array_equal(wide.values[:, :, -2], market.regime[:, WARMUP:])
    np.testing.assert_array_equal(wide.values[:, :, -1], market.true_signal[:, WARMUP:])


# --- seeds and bad input -----------------------------------------------------------------------------------


def test_a_seed_fixes_every_number_and_another_changes_every_column() -> None:
    one, same, other = (simulate_panel(DEFAULT, paths=3, bars=200, seed=seed).with_truth() for seed in (41, 41, 42))
    np.testing.assert_array_equal(one.values, same.values)
    assert (one.values != other.values).any(axis=1).all()


def test_paths_differ_and_do_not_depend_on_how_many_there_are() -> None:
    many = simulate_panel(DEFAULT, paths=5, bars=200, seed=43).with_truth()
    few = simulate_panel(DEFAULT, paths=2, bars=200, seed=43).with_truth()
    np.testing.assert_allclose(few.values, many.values[:2], rtol=1e-12, atol=1e-15)
    assert (many.values[0] != many.values[1])[:, :-2].all(axis=0).all()


@pytest.mark.parametrize("simulate", [simulate_market, simulate_panel])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"paths": 0, "bars": 100}, "paths: expected >= 1, was 0"),
        ({"paths": 1, "bars": 59}, "bars: expected >= 60, was 59"),
    ],
)
def test_too_few_paths_or_bars_are_refused(simulate, size: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(DEFAULT, **size, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"duration_days": (9.0, 0.5, 9.0)},
            r"duration_days: expected at least one bar \(1 days\).*was \[9.0, 0.5, 9.0\]",
        ),
        ({"duration_days": (9.0, -1.0, 9.0)}, r"duration_days: expected at least one bar"),
        ({"bars_per_day": 1441}, "bars_per_day: expected at most 1440, was 1441"),
    ],
)
def test_a_market_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_market(DEFAULT.model_copy(update=changes), paths=1, bars=60, seed=0)


def test_features_need_one_bar_more_than_their_longest_window(market: MarketPaths) -> None:
    short = MarketPaths(market.timestamps[:20], *(getattr(market, field.name)[:, :20] for field in fields(market)[1:]))
    with pytest.raises(ValueError, match="bars: expected at least 21, was 20"):
        market_features(short, DEFAULT)


def test_a_truth_of_another_length_is_refused() -> None:
    features: FeaturePanel = simulate_panel(DEFAULT, paths=2, bars=60, seed=1).features
    with pytest.raises(ValueError, match=r"regime: expected \[P, T\] = \[2, 60\], was \[2, 59\]"):
        SyntheticPanel(features, np.zeros((2, 59), dtype=np.int8), np.zeros((2, 60)))
