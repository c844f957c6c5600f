from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from configs import load_config
from configs.evaluation import SyntheticMarketConfig
from data import Field
from envs import TradingDynamics
from envs.panel import FeaturePanel
from envs.synthetic import simulate_panel
from evaluation import BacktestResult, Policy, backtest, evaluate
from evaluation.forecast import RidgeForecast, RidgePolicy
from evaluation.leak import PREDICTIVE, shuffled_market, with_tomorrow
from evaluation.rules import LinearSignal

NAMES = ("gap_return", "intraday_return", *PREDICTIVE)


def panel(values: np.ndarray, names: tuple[str, ...] = NAMES) -> FeaturePanel:
    closes = np.datetime64("2020-01-01") + np.arange(values.shape[1])
    fields = tuple(Field(name, "market", "1", -np.inf, np.inf, name) for name in names)
    return FeaturePanel(closes, fields, values)


def counting(paths: int, length: int) -> FeaturePanel:
    """Every entry is different, so each can be found again."""
    return panel(np.arange(paths * length * len(NAMES), dtype=float).reshape(paths, length, len(NAMES)))


def offsets(market: FeaturePanel, shuffled: FeaturePanel) -> list[int]:
    """Rows by which the signal of each path was delayed: where its first entry went."""
    before, after = market.values[:, :, 2], shuffled.values[:, :, 2]
    return [int(np.flatnonzero(after[path] == before[path, 0])[0]) for path in range(len(market))]


def walk(features: FeaturePanel, make_policy: Callable[[TradingDynamics], Policy]) -> BacktestResult:
    dynamics = TradingDynamics.from_config(features.names, load_config())
    return backtest(dynamics, features.values, features.timestamps, make_policy(dynamics))


# --- tomorrow -----------------------------------------------------------------------------------------------


def test_tomorrow_is_the_whole_next_bar_and_zero_in_the_last_row():
    values = np.zeros((2, 3, 5))
    values[0, :, :2] = [[0.5, 0.25], [0.01, 0.02], [-0.03, 0.01]]
    values[1, :, :2] = [[0.0, 0.0], [0.1, 0.0], [0.0, 0.2]]
    leaked = with_tomorrow(panel(values))
    assert leaked.names == (*NAMES, "tomorrow_return")
    np.testing.assert_allclose(leaked.values[:, :, -1], [[0.03, -0.02, 0.0], [0.1, 0.2, 0.0]])
    np.testing.assert_array_equal(leaked.values[:, :, :-1], values)


def test_whoever_knows_tomorrow_earns_a_multiple_of_whoever_hears_the_signal():
    market = with_tomorrow(simulate_panel(SyntheticMarketConfig(), paths=20, bars=500, seed=3).features)
    results = {
        name: walk(market, lambda dynamics, column=name: LinearSignal(dynamics, column))
        for name in ("tomorrow_return", "signal_5")
    }
    assert all(result.invalid_actions == 0 for result in results.values())
    ratios = {name: evaluate(result, 252).sharpe for name, result in results.items()}
    assert ratios["tomorrow_return"] > 2.0
    assert ratios["tomorrow_return"] > 2.0 * ratios["signal_5"]


def test_tomorrow_is_added_once_and_needs_both_returns():
    market = counting(1, 5)
    with pytest.raises(ValueError, match=r"repeated \['tomorrow_return'\]"):
        with_tomorrow(with_tomorrow(market))
    with pytest.raises(ValueError, match="panel: expected a column 'intraday_return', was gap_return, signal"):
        with_tomorrow(panel(np.zeros((1, 3, 2)), ("gap_return", "signal")))


# --- shuffled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 5, 6, 7, 100])
def test_signals_move_together_in_a_circle_by_at_least_a_quarter_of_the_path(length):
    market = counting(50, length)
    shuffled = shuffled_market(market, seed=1)
    moved = offsets(market, shuffled)
    assert min(moved) >= length / 4
    assert max(moved) <= length - length / 4
    for path, offset in enumerate(moved):
        expected = np.roll(market.values[path, :, 2:], offset, axis=0)
        np.testing.assert_array_equal(shuffled.values[path, :, 2:], expected)


def test_returns_stay_where_they_are_and_the_input_is_not_touched():
    market = counting(3, 40)
    before = market.values.copy()
    shuffled = shuffled_market(market, seed=1)
    np.testing.assert_array_equal(shuffled.values[:, :, :2], before[:, :, :2])
    np.testing.assert_array_equal(market.values, before)
    assert (shuffled.fields, shuffled.timestamps is market.timestamps) == (market.fields, True)


def test_each_market_has_an_offset_of_its_own_and_each_seed_other_ones():
    market = counting(20, 400)
    first, again, other = (shuffled_market(market, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.values, again.values)
    assert offsets(market, first) != offsets(market, other)
    assert len(set(offsets(market, first))) > 10


def test_shuffled_signals_predict_nothing():
    market = simulate_panel(SyntheticMarketConfig(signal_drift=2.0), paths=40, bars=1000, seed=4).features
    shuffled = shuffled_market(market, seed=1)
    truth, noise = (RidgeForecast.fit(rows.values, rows.names, 1, 1.0) for rows in (market, shuffled))

    def explained(forecast: RidgeForecast, features: FeaturePanel) -> float:
        signals = [features.names.index(name) for name in PREDICTIVE]
        part = features.values[:, :-1, signals] @ forecast.coefficients[signals]
        bar_return = features.values[:, 1:, :2].sum(axis=2)
        return float(np.corrcoef(part.ravel(), bar_return.ravel())[0, 1])

    # Three fitted coefficients on 40,000 rows: chance alone gives about sqrt(3 / 40,000) = 0.009.
    assert explained(truth, market) > 0.1
    assert abs(explained(noise, shuffled)) < 0.025


def test_shuffled_signals_are_worth_no_more_than_none():
    # Past returns follow the signal too, so the yardstick is the same learner without the signal columns, not zero.
    config = SyntheticMarketConfig(drift=(0.0, 0.0, 0.0), signal_drift=0.5)
    train, test = (simulate_panel(config, paths=20, bars=750, seed=seed).features for seed in (8, 9))
    silent = tuple(name for name in train.names if name not in PREDICTIVE)

    def score(train: FeaturePanel, test: FeaturePanel, names: tuple[str, ...]) -> float:
        columns = [train.names.index(name) for name in names]
        forecast = RidgeForecast.fit(train.values[:, :, columns], names, 5, 100.0)
        result = walk(test, lambda dynamics: RidgePolicy(dynamics, forecast, risk_aversion=20.0, bars_per_year=252))
        return evaluate(result, 252).sharpe

    without = score(train, test, silent)
    assert score(train, test, train.names) > without + 0.5
    assert abs(score(shuffled_market(train, 1), shuffled_market(test, 2), train.names) - without) < 0.2


def test_a_market_that_cannot_be_shuffled_is_refused():
    with pytest.raises(ValueError, match="panel: expected at least 4 rows, was 3"):
        shuffled_market(counting(1, 3), seed=0)
    with pytest.raises(ValueError, match="panel: expected a column 'signal', was gap_return, intraday_return"):
        shuffled_market(panel(np.zeros((1, 9, 2)), NAMES[:2]), seed=0)
