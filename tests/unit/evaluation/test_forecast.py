from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configs import load_config
from configs.evaluation import RidgeConfig, SyntheticMarketConfig
from envs import TradingDynamics
from envs.synthetic import simulate_panel
from evaluation import backtest
from evaluation.forecast import RidgeForecast, RidgePolicy, fit_ridge
from masking import InvalidMaskError

HOLD, ZERO, QUARTER, HALF, THREE_QUARTERS, ALL, LEVERED = range(7)
NAMES = ("gap_return", "intraday_return", "volatility_20", "spread", "signal_5")
# No commission: 10 bp slippage and half the spread per traded notional.
COSTS = ["account.commission_bps=0", "account.slippage_bps=10", "account.spread_share=0.5"]
DYNAMICS = TradingDynamics.from_config(NAMES, load_config(overrides=COSTS))
UNLEVERED = np.array([[True] * 6 + [False]])
# The forecast is the column signal_5 itself, as a log return per bar.
ECHO = RidgeForecast(NAMES, 5, 1.0, np.array([0.0, 0.0, 0.0, 0.0, 1.0]), 0.0)


def rows(**columns: list[float]) -> np.ndarray:
    """State rows that are zero but for the given columns."""
    state = np.zeros((len(next(iter(columns.values()))), len(DYNAMICS.state_names)), np.float32)
    for name, values in columns.items():
        state[:, DYNAMICS.state_names.index(name)] = values
    return state


def policy(risk_aversion: float = 0.0, forecast: RidgeForecast = ECHO) -> RidgePolicy:
    return RidgePolicy(DYNAMICS, forecast, risk_aversion=risk_aversion, bars_per_year=100)


def choose(ridge: RidgePolicy, state: np.ndarray) -> list[int]:
    return ridge.act(state, np.repeat(UNLEVERED, len(state), axis=0)).tolist()


def noisy_rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 0.02, (*shape, len(NAMES))) * np.array([1.0, 1.0, 5.0, 0.01, 40.0])


# --- the regression -----------------------------------------------------------------------------------------


def test_one_feature_by_hand():
    # Gaps 0, 2, 4, 6, so the bars after rows 0-2 return 2, 4, 6: least squares has slope 1. The standard deviation is
    # sqrt(5) and rows 0-2 lie -2, 0, 2 from their mean: Gram (4 + 0 + 4) / 5 = 1.6, so a penalty of 1.6 halves the
    # slope, and the intercept is 4 - 2 / 2 = 3. The intraday return is constant.
    train = np.column_stack((np.arange(0.0, 8.0, 2.0), np.zeros(4)))
    forecast = RidgeForecast.fit(train, ("gap_return", "intraday_return"), 1, 1.6)
    np.testing.assert_allclose(forecast.coefficients, [0.5, 0.0], atol=1e-12)
    assert forecast.intercept == pytest.approx(3.0)
    np.testing.assert_allclose(forecast(np.array([[6.0, 0.0], [0.0, 9.0]])), [6.0, 3.0])


@pytest.mark.parametrize("horizon", [1, 4])
def test_without_penalty_it_is_ordinary_least_squares(horizon):
    train = noisy_rows(1, 2, 30)
    inputs, targets = [], []
    for path in train:
        for row in range(30 - horizon):
            inputs.append([1.0, *path[row]])
            targets.append(np.mean([path[row + ahead][:2].sum() for ahead in range(1, horizon + 1)]))
    solution = np.linalg.lstsq(np.array(inputs), np.array(targets))[0]
    forecast = RidgeForecast.fit(train, NAMES, horizon, 1e-10)
    np.testing.assert_allclose([forecast.intercept, *forecast.coefficients], solution, rtol=1e-6, atol=1e-9)


def test_the_penalty_is_that_of_an_augmented_least_squares_problem():
    # Ridge is least squares with sqrt(penalty) * I as further rows whose targets are zero.
    train, penalty = noisy_rows(2, 40), 7.0
    scale = train.std(axis=0)
    inputs, targets = train[:-1] / scale, train[1:, :2].sum(axis=1)
    centred = np.vstack((inputs - inputs.mean(axis=0), math.sqrt(penalty) * np.eye(5)))
    solution = np.linalg.lstsq(centred, np.concatenate((targets - targets.mean(), np.zeros(5))))[0]
    np.testing.assert_allclose(RidgeForecast.fit(train, NAMES, 1, penalty).coefficients * scale, solution, rtol=1e-9)


def test_a_huge_penalty_forecasts_the_mean_target():
    train = noisy_rows(3, 50)
    forecast = RidgeForecast.fit(train, NAMES, 1, 1e12)
    np.testing.assert_allclose(forecast(train), train[1:, :2].sum(axis=1).mean(), rtol=1e-6)


def test_units_of_a_feature_do_not_matter():
    train = noisy_rows(4, 60)
    rescaled = train * np.array([1.0, 1.0, 1.0, 1e6, 1e-6]) + np.array([0.0, 0.0, 0.0, 5.0, -2.0])
    first, second = (RidgeForecast.fit(values, NAMES, 3, 10.0)(values) for values in (train, rescaled))
    np.testing.assert_allclose(first, second, rtol=1e-8)


def test_fits_that_share_a_gram_matrix_equal_single_fits():
    train, penalties = noisy_rows(5, 3, 40), (0.1, 10.0, 1000.0)
    for penalty, shared in zip(penalties, RidgeForecast.fit_each(train, NAMES, 5, penalties), strict=True):
        alone = RidgeForecast.fit(train, NAMES, 5, penalty)
        assert (shared.horizon, shared.penalty, shared.names) == (5, penalty, NAMES)
        np.testing.assert_array_equal(shared.coefficients, alone.coefficients)
        assert shared.intercept == alone.intercept


def test_rows_behind_the_training_window_change_nothing():
    history = noisy_rows(6, 2, 80)
    other = history.copy()
    other[:, 50:] = 1e3
    first, second = (RidgeForecast.fit(values[:, :50], NAMES, 10, 1.0) for values in (history, other))
    np.testing.assert_array_equal(first.coefficients, second.coefficients)


def test_targets_end_with_their_market():
    # The move of market 1 is seen by no row of market 0: with all else silent, only its own last row precedes it.
    train = np.zeros((2, 6, 3))
    train[0, -1, 2] = 1.0  # a signal in the last row of market 0, right before market 1 in memory
    train[1, 0, 0] = 5.0
    forecast = RidgeForecast.fit(train, ("gap_return", "intraday_return", "signal"), 1, 1e-6)
    np.testing.assert_array_equal(forecast.coefficients, 0.0)
    assert forecast.intercept == 0.0


def test_a_constant_column_gets_no_weight_whatever_its_size():
    train = noisy_rows(7, 50)
    for constant in (0.0, 0.1, 1e9):
        train[:, 4] = constant
        forecast = RidgeForecast.fit(train, NAMES, 1, 1e-3)
        assert forecast.coefficients[4] == 0.0
        assert np.isfinite(forecast.coefficients).all()


def test_training_rows_that_cannot_be_used_are_refused():
    train = noisy_rows(8, 12)
    with pytest.raises(ValueError, match=r"train: expected at least horizon \+ 2 = 13 rows, was 12"):
        RidgeForecast.fit(train, NAMES, 11, 1.0)
    with pytest.raises(ValueError, match=r"train: expected \[n, 5\] or \[P, n, 5\], was \[12, 4\]"):
        RidgeForecast.fit(train[:, :4], NAMES, 1, 1.0)
    with pytest.raises(ValueError, match=r"names: .*missing \['intraday_return'\]"):
        RidgeForecast.fit(train[:, :1], ("gap_return",), 1, 1.0)
    train[3, 2] = np.nan
    with pytest.raises(ValueError, match="train: expected finite values, column 'volatility_20'"):
        RidgeForecast.fit(train, NAMES, 1, 1.0)


def test_fit_arguments_out_of_range_are_refused():
    train = noisy_rows(9, 12)
    with pytest.raises(ValueError, match="horizon: expected at least 1 bar, was 0"):
        RidgeForecast.fit(train, NAMES, 0, 1.0)
    for penalty in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="penalty: expected a positive finite number"):
            RidgeForecast.fit(train, NAMES, 1, penalty)


# --- the choice ---------------------------------------------------------------------------------------------


def test_a_trade_is_made_where_its_gain_exceeds_its_cost_only():
    # Cost 0.001 per notional, gain 5 * signal: break-even at 2 bp per bar, both ways.
    state = rows(signal_5=[2.1e-4, 1.9e-4, -1.9e-4, -2.1e-4, -1.9e-4], position=[0.0, 0.0, 1.0, 1.0, 0.0])
    assert choose(policy(), state) == [ALL, HOLD, HOLD, ZERO, HOLD]


def test_half_the_quoted_spread_widens_the_band():
    # A spread of 20 bp doubles the cost: break-even at 4 bp. A spread below zero is free, not a rebate.
    state = rows(signal_5=[3.9e-4, 4.1e-4, 1.9e-4], spread=[2e-3, 2e-3, -1e-3])
    assert choose(policy(), state) == [HOLD, ALL, HOLD]


def test_risk_aversion_sizes_the_position():
    # Variance 0.2^2 / 100 = 4e-4 per bar. Per bar: p * mean - 2 / 2 * 4e-4 * p^2 is best at p = mean / 8e-4; the cost
    # takes 2 bp per bar off the mean: 6e-4 -> (6e-4 - 2e-4) / 8e-4 = 0.5, 1.1e-3 -> 1.125, capped by the mask.
    state = rows(signal_5=[6e-4, 1.1e-3], volatility_20=[0.2, 0.2])
    assert choose(policy(risk_aversion=2.0), state) == [HALF, ALL]
    # From 1 the cost is saved by staying: marginal gain at p is 3e-4 - 8e-4 * p against 2e-4 per bar saved: p = 0.625,
    # so 0.5 and 0.75 are worth the same and the lower index is taken.
    state = rows(signal_5=[3e-4], volatility_20=[0.2], position=[1.0])
    assert choose(policy(risk_aversion=2.0), state) == [HALF]


def test_the_choice_is_the_best_of_a_plain_loop():
    rng = np.random.default_rng(11)
    state = rows(
        signal_5=rng.normal(0, 5e-4, 300),
        volatility_20=rng.uniform(0.05, 0.4, 300),
        spread=rng.uniform(0, 2e-3, 300),
        position=rng.uniform(0, 1.1, 300),
    )
    action_masks = rng.random((300, 7)) < 0.6
    action_masks[:, HOLD] = True
    chosen = policy(risk_aversion=3.0).act(state, action_masks)
    for row in range(300):
        signal, volatility, spread, position = (
            float(state[row, DYNAMICS.state_names.index(name)])
            for name in ("signal_5", "volatility_20", "spread", "position")
        )
        best, highest = None, -math.inf
        for action, target in enumerate((position, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)):
            growth = 5 * (target * signal - 3.0 / 2 * target**2 * volatility**2 / 100)
            value = growth - abs(target - position) * (1e-3 + 0.5 * spread)
            if action_masks[row, action] and value > highest + 1e-12:
                best, highest = action, value
        assert chosen[row] == best
    assert len(set(chosen.tolist())) == 7


def test_hold_wins_ties_and_rounding_causes_no_trade():
    # No forecast, no risk: staying at 0 equals the target 0. A strong forecast at a position one float32 step below 1
    # gains nothing by trading to 1.
    almost = np.nextafter(np.float32(1), np.float32(0))
    assert choose(policy(), rows(signal_5=[0.0, 0.5], position=[0.0, almost])) == [HOLD, HOLD]
    # A ninth of the cost per bar over nine bars just pays for a trade; in floats 0.75 gains 1e-19.
    break_even = RidgeForecast(NAMES, 9, 1.0, np.zeros(5), 1e-3 / 9)
    assert choose(policy(forecast=break_even), rows(position=[0.0])) == [HOLD]


def test_a_mask_of_the_best_action_leaves_the_next_best():
    action_masks = np.array([[True, True, True, True, False, False, False]])
    assert policy().act(rows(signal_5=[1e-2]), action_masks).tolist() == [HALF]


@pytest.mark.parametrize("column", ["gap_return", "signal_5", "volatility_20", "spread", "position"])
@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_holds_that_row_only(column, unknown):
    state = rows(signal_5=[1e-2, 1e-2])
    state[0, DYNAMICS.state_names.index(column)] = unknown
    # With the intercept a row of zeros would buy: unknown is not zero.
    optimist = RidgeForecast(NAMES, 5, 1.0, ECHO.coefficients, 1e-2)
    assert choose(policy(1.0, optimist), state) == [HOLD, ALL]


@given(
    arrays.arrays(np.float32, (5, len(DYNAMICS.state_names)), elements=st.floats(width=32)),
    arrays.arrays(np.bool_, (5, 7)),
)
def test_no_state_and_no_mask_makes_it_choose_a_forbidden_action(state, action_masks):
    action_masks[:, HOLD] = True
    chosen = policy(risk_aversion=1.0).act(state, action_masks)
    assert chosen.dtype == np.int64
    assert action_masks[np.arange(5), chosen].all()


def test_the_spread_is_read_only_where_it_is_paid():
    free = TradingDynamics.from_config(NAMES[:3], load_config())
    forecast = RidgeForecast(NAMES[:3], 5, 1.0, np.zeros(3), 1e-2)
    ridge = RidgePolicy(free, forecast, risk_aversion=0.0, bars_per_year=252)
    assert ridge.act(np.zeros((1, len(free.state_names)), np.float32), UNLEVERED).tolist() == [ALL]


def test_a_policy_that_cannot_work_is_refused():
    forecast = RidgeForecast(("signal5",), 5, 1.0, np.zeros(1), 0.0)
    with pytest.raises(ValueError, match=r"column: .*was 'signal5'; did you mean 'signal_5'\?"):
        policy(forecast=forecast)
    for risk_aversion in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="risk_aversion: expected a finite number >= 0"):
            policy(risk_aversion)
    for bars_per_year in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bars_per_year: expected a positive finite number"):
            RidgePolicy(DYNAMICS, ECHO, risk_aversion=0.0, bars_per_year=bars_per_year)
    with pytest.raises(InvalidMaskError, match="dtype bool"):
        policy().act(rows(position=[0.0]), np.ones((1, 7)))


# --- the grid -----------------------------------------------------------------------------------------------


GRID = RidgeConfig(horizons=(1, 3), penalties=(1.0, 10.0), risk_aversions=(0.0, 2.0))


def settings(ridge: RidgePolicy) -> tuple[int, float, float]:
    return ridge.forecast.horizon, ridge.forecast.penalty, ridge.risk_aversion


def test_the_grid_is_searched_whole_and_its_best_is_taken():
    seen = []

    def validate(ridge: RidgePolicy) -> float:
        seen.append(settings(ridge))
        return {(3, 1.0, 2.0): 1.5, (1, 1.0, 0.0): math.nan}.get(settings(ridge), 1.0)

    best = fit_ridge(DYNAMICS, noisy_rows(12, 30), NAMES, GRID, validate, bars_per_year=252)
    assert settings(best) == (3, 1.0, 2.0)
    assert seen == [(h, p, r) for h in (1, 3) for p in (1.0, 10.0) for r in (0.0, 2.0)]
    np.testing.assert_array_equal(
        best.forecast.coefficients, RidgeForecast.fit(noisy_rows(12, 30), NAMES, 3, 1.0).coefficients
    )


def test_equal_scores_keep_the_first_and_only_nan_is_an_error():
    train = noisy_rows(13, 30)
    assert settings(fit_ridge(DYNAMICS, train, NAMES, GRID, lambda _: 0.0, bars_per_year=252)) == (1, 1.0, 0.0)
    with pytest.raises(ValueError, match="at least one of 8 candidates"):
        fit_ridge(DYNAMICS, train, NAMES, GRID, lambda _: math.nan, bars_per_year=252)


def test_it_finds_the_signal_of_a_known_market_and_trades_it_without_a_forbidden_action():
    # Strong, clean signal: 1 standard deviation is worth 2.0 per year.
    config = SyntheticMarketConfig(signal_drift=2.0, signal_noise=0.0)
    train = simulate_panel(config, paths=1, bars=3000, seed=1).features
    test = simulate_panel(config, paths=4, bars=300, seed=2).features
    dynamics = TradingDynamics.from_config(train.names, load_config(overrides=COSTS))
    forecast = RidgeForecast.fit(train.values, train.names, 1, 10.0)
    # Features near their means but for a signal of one deviation in all three averages.
    signals = [train.names.index(name) for name in ("signal", "signal_5", "signal_20")]
    assert forecast.coefficients[signals].sum() == pytest.approx(2.0 / 252, rel=0.5)
    ridge = RidgePolicy(dynamics, forecast, risk_aversion=1.0, bars_per_year=252)
    result = backtest(dynamics, test.values, test.timestamps, ridge)
    assert result.invalid_actions == 0
    assert (result.equity[-1] > 1.1).all()
