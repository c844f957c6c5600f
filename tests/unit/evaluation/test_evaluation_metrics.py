from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

import evaluation
from evaluation import (
    Flat,
    RandomValid,
    annual_return,
    annual_volatility,
    backtest,
    cost_paid,
    evaluate,
    hit_rate,
    kill_switch_rate,
    max_drawdown,
    mean_exposure,
    sharpe_ratio,
    time_in_state,
    turnover_per_year,
)
from evaluation.metrics import calmar_ratio, metrics_by_path, sortino_ratio
from masking import TradingState

RETURNS = [0.01, 0.03, -0.01, 0.01]
"""Mean 0.01; squared deviations sum to 0.0008."""


def test_sharpe_by_hand():
    # 0.01 / sqrt(0.0008 / 3) * sqrt(252) = sqrt(0.375 * 252)
    assert sharpe_ratio(RETURNS, 252) == pytest.approx(math.sqrt(94.5), rel=1e-12)
    assert sharpe_ratio([-value for value in RETURNS], 252) == pytest.approx(-math.sqrt(94.5), rel=1e-12)


def test_sharpe_of_an_account_that_never_moved_is_zero():
    assert sharpe_ratio([0.0] * 5, 252) == 0.0


@pytest.mark.parametrize("constant", [0.01, -0.01, 1e-6])
def test_sharpe_of_a_constant_gain_does_not_exist_even_up_to_rounding(constant):
    assert math.isnan(sharpe_ratio([constant] * 10, 252))
    rounded = np.expm1(np.diff(np.log(np.cumprod([1.0] + [1 + constant] * 10))))
    assert math.isnan(sharpe_ratio(rounded, 252))


def test_sharpe_needs_two_bars():
    with pytest.raises(ValueError, match="returns: expected one path of at least 2 values"):
        sharpe_ratio([0.01], 252)


def test_sortino_by_hand_counts_every_bar_in_the_downside():
    # Mean 0.01; the one loss of 0.01 among four bars deviates by 0.005.
    assert sortino_ratio(RETURNS, 252) == pytest.approx(2 * math.sqrt(252), rel=1e-12)
    assert sortino_ratio([-0.02] * 5, 252) == pytest.approx(-math.sqrt(252), rel=1e-12)


def test_sortino_without_a_loss_does_not_exist_unless_nothing_was_risked():
    assert math.isnan(sortino_ratio([0.01, 0.02, 0.0], 252))
    assert math.isnan(sortino_ratio([0.01, 0.02, -1e-18], 252))
    assert sortino_ratio([0.0] * 5, 252) == 0.0


def test_calmar_by_hand():
    # 1 to 0.8 to 1.1 in a year: a tenth gained, a fifth lost on the way.
    assert calmar_ratio(np.diff(np.log([1.0, 0.8, 1.1])), 2) == pytest.approx(0.5, rel=1e-12)
    assert calmar_ratio([math.log(0.5)], 1) == pytest.approx(-1.0, rel=1e-12)


def test_calmar_without_a_drawdown_does_not_exist_unless_nothing_was_risked():
    assert math.isnan(calmar_ratio([0.1, 0.0, 0.2], 252))
    assert math.isnan(calmar_ratio([0.1, -1e-12, 0.2], 252))
    assert calmar_ratio([0.0] * 5, 252) == 0.0


def test_annual_return_compounds():
    # Two quarters of 10 % are 1.1 ** 4 - 1 a year.
    assert annual_return([math.log(1.1)] * 2, 4) == pytest.approx(0.4641, rel=1e-12)
    assert annual_return([math.log(0.5)], 1) == pytest.approx(-0.5, rel=1e-12)
    assert annual_return([10.0], 252) == math.inf


def test_annual_volatility_by_hand():
    assert annual_volatility(RETURNS, 252) == pytest.approx(math.sqrt(0.0008 / 3 * 252), rel=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        annual_volatility([0.01], 252)


def test_max_drawdown_is_from_the_all_time_peak_and_counts_the_start():
    assert max_drawdown([1.0, 0.9, 1.2, 0.6, 1.5, 1.35]) == pytest.approx(0.5, rel=1e-12)
    assert max_drawdown([1.0, 0.8, 0.9]) == pytest.approx(0.2, rel=1e-12)
    assert max_drawdown([1.0, 1.1, 1.2]) == 0.0


def test_kill_switch_rate_by_hand():
    assert kill_switch_rate([True, False, False, True]) == 0.5


def test_turnover_per_year_by_hand():
    # One unit traded in four bars is 63 in 252.
    assert turnover_per_year([0.5, 0.0, 0.5, 0.0], 252) == pytest.approx(63.0, rel=1e-12)


def test_mean_exposure_is_of_the_size():
    assert mean_exposure([0.5, -0.5, 1.0, 0.0]) == 0.5


def test_cost_paid_compounds():
    assert cost_paid([0.1, 0.0, 0.2]) == pytest.approx(0.28, rel=1e-12)


def test_time_in_state_by_hand():
    codes = [0, 0, 1, 2, 2]
    assert [time_in_state(codes, state) for state in TradingState] == [0.4, 0.2, 0.4]


def test_hit_rate_leaves_idle_bars_out():
    assert hit_rate([0.1, -0.1, 0.2, 0.0]) == pytest.approx(2 / 3, rel=1e-12)
    assert math.isnan(hit_rate([0.0, 0.0]))


@pytest.mark.parametrize(
    "metric",
    [
        lambda path: sharpe_ratio(path, 252),
        lambda path: annual_return(path, 252),
        lambda path: annual_volatility(path, 252),
        lambda path: sortino_ratio(path, 252),
        lambda path: calmar_ratio(path, 252),
        lambda path: turnover_per_year(path, 252),
        max_drawdown,
        mean_exposure,
        cost_paid,
        hit_rate,
    ],
)
def test_nan_in_gives_nan_out(metric):
    assert math.isnan(metric([0.01, math.nan, 0.02]))


@pytest.mark.parametrize("path", [[], [[0.1, 0.2]]])
def test_metrics_take_exactly_one_path(path):
    for metric in (max_drawdown, mean_exposure, cost_paid, hit_rate, kill_switch_rate):
        with pytest.raises(ValueError, match="expected one path"):
            metric(path)


@pytest.mark.parametrize("bars_per_year", [0, -252, math.nan, math.inf])
def test_bars_per_year_must_be_positive(bars_per_year):
    for metric in (sharpe_ratio, sortino_ratio, calmar_ratio, annual_return, annual_volatility, turnover_per_year):
        with pytest.raises(ValueError, match="bars_per_year"):
            metric(RETURNS, bars_per_year)


def test_evaluate_the_hand_worked_backtest(round_trip):
    """Numbers from `test_backtest.test_four_bars_worked_by_hand`, four bars to the year."""
    metrics = evaluate(round_trip, bars_per_year=4)
    final = 1.092859297
    returns = [0.09945, 1.03948 / 1.09945 - 1, 0.0, final / 1.03948 - 1]
    mean = sum(returns) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in returns) / 3)
    expected = {
        "policy": "script",
        "bars": 4,
        "paths": 1,
        "sharpe": mean / deviation * 2,
        "sortino": mean / abs(returns[1] / 2) * 2,
        "calmar": (final - 1) * 11 / 0.6,
        "annual_return": final - 1,
        "annual_volatility": deviation * 2,
        "max_drawdown": 0.6 / 11,
        "worst_drawdown": 0.6 / 11,
        "kill_switch_rate": 0.0,
        "turnover_per_year": 0.5 + 5.94 / 10.94,
        "exposure": (6 / 11 + 2 * 5.4 / 10.4) / 4,
        "cost_paid": 1 - 0.9995 * (1 - 0.001 * 5.94 / 10.94),
        "hit_rate": 2 / 3,
        "time_active": 1.0,
        "time_reduce_only": 0.0,
        "time_halted": 0.0,
        "reward_per_bar": 25 * math.log(final) - 0.02 / 0.15 * (1.2 / 11 + 1 - final / 1.09945) / 4,
        "invalid_actions": 0,
    }
    actual = metrics.to_dict()
    assert actual.pop("policy") == expected.pop("policy")
    assert actual == pytest.approx(expected, rel=1e-9)


def test_cost_paid_is_what_the_account_would_have_had_without_costs(make_dynamics, make_history, script, round_trip):
    moves = ((0.0, 0.0), (0.1, 0.2), (-0.1, 0.0), (0.0, 0.0), (0.1, -0.3))
    free = backtest(make_dynamics(cost_rate=0.0), *make_history(*moves), script([3, 0, 0, 1]))
    share = evaluate(round_trip, 252).cost_paid
    assert round_trip.equity[-1, 0] / (1 - share) == pytest.approx(free.equity[-1, 0], rel=1e-12)


def test_several_paths_are_averaged_path_by_path(make_dynamics, rough_history):
    result = backtest(make_dynamics(), *rough_history, RandomValid(2), batch=6)
    metrics = evaluate(result, 252)
    simple = np.expm1(result.log_returns)
    sharpes = [sharpe_ratio(simple[:, path], 252) for path in range(6)]
    assert len(set(sharpes)) == 6
    assert metrics.sharpe == pytest.approx(np.mean(sharpes), rel=1e-12)
    assert metrics.sortino == pytest.approx(np.mean([sortino_ratio(path, 252) for path in simple.T]), rel=1e-12)
    calmars = [calmar_ratio(path, 252) for path in result.log_returns.T]
    assert metrics.calmar == pytest.approx(np.mean(calmars), rel=1e-12)
    drawdowns = result.drawdown.max(axis=0)
    assert metrics.max_drawdown == pytest.approx(drawdowns.mean(), rel=1e-12)
    assert metrics.worst_drawdown == drawdowns.max()
    assert metrics.kill_switch_rate == result.killed.mean() > 0
    times = (metrics.time_active, metrics.time_reduce_only, metrics.time_halted)
    assert min(times) > 0
    assert sum(times) == pytest.approx(1.0, rel=1e-12)


def test_every_metric_of_every_path_is_the_single_path_function_of_it(make_dynamics, rough_history):
    played = backtest(make_dynamics(), *rough_history, RandomValid(2), batch=4)
    # Path 1 never moved, path 2 only gained, path 3 lost its record: the NaN rules hold path by path.
    shape = np.ones_like(played.log_returns)
    shape[:, 1] = 0.0
    shape[:, 3] = np.nan
    returns = played.log_returns * shape
    returns[:, 2] = np.abs(returns[:, 2])
    result = dataclasses.replace(
        played, log_returns=returns, equity=np.exp(np.vstack((np.zeros(4), np.cumsum(returns, axis=0))))
    )
    table = metrics_by_path(result, 252)
    simple = np.expm1(result.log_returns)
    expected = {
        "sharpe": [sharpe_ratio(path, 252) for path in simple.T],
        "sortino": [sortino_ratio(path, 252) for path in simple.T],
        "calmar": [calmar_ratio(path, 252) for path in returns.T],
        "annual_return": [annual_return(path, 252) for path in returns.T],
        "annual_volatility": [annual_volatility(path, 252) for path in simple.T],
        "max_drawdown": [max_drawdown(path) for path in result.equity.T],
        "turnover_per_year": [turnover_per_year(path, 252) for path in result.turnover.T],
        "exposure": [mean_exposure(path) for path in result.position[1:].T],
        "cost_paid": [cost_paid(path) for path in result.cost.T],
        "hit_rate": [hit_rate(path) for path in simple.T],
        "time_active": [time_in_state(path, TradingState.ACTIVE) for path in result.trading_state[1:].T],
        "time_reduce_only": [time_in_state(path, TradingState.REDUCE_ONLY) for path in result.trading_state[1:].T],
        "time_halted": [time_in_state(path, TradingState.HALTED) for path in result.trading_state[1:].T],
        "killed": played.killed,
        "reward_per_bar": played.reward.mean(axis=0),
    }
    assert list(table) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], np.array(values, dtype=float), rtol=1e-10, err_msg=name)
    assert [list(np.isnan(table[name])) for name in ("sharpe", "sortino", "calmar", "hit_rate")] == [
        [False, False, False, True],
        [False, False, True, True],
        [False, False, True, True],
        [False, True, False, True],
    ]


def test_a_metric_missing_on_one_path_is_missing_in_the_average_and_null_in_json(make_dynamics, rough_history):
    dynamics = make_dynamics()
    metrics = evaluate(backtest(dynamics, *rough_history, Flat(dynamics)), 252)
    assert metrics.sharpe == 0.0
    assert math.isnan(metrics.hit_rate)
    raw = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert raw["hit_rate"] is None
    assert raw["annual_return"] == 0.0
    active = backtest(dynamics, *rough_history, RandomValid(3), batch=2)
    still = dataclasses.replace(active, log_returns=active.log_returns * [1.0, 0.0])
    assert math.isnan(evaluate(still, 252).hit_rate)


def test_a_forbidden_action_in_the_record_shows_in_the_metrics(round_trip):
    forged = dataclasses.replace(round_trip, actions=np.full_like(round_trip.actions, 6))
    assert evaluate(forged, 252).invalid_actions == 4


def test_one_bar_is_too_short_to_evaluate(make_dynamics, make_history, script):
    result = backtest(make_dynamics(), *make_history((0.0, 0.0), (0.0, 0.0)), script([0]))
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(result, 252)


def test_public_names_are_sorted_and_exist():
    assert evaluation.__all__ == sorted(evaluation.__all__)
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
