from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configs import load_config
from configs.evaluation import SyntheticMarketConfig
from data import FEATURE_FIELDS
from envs import TradingDynamics
from envs.synthetic import simulate_panel
from evaluation import backtest
from evaluation.rules import LinearSignal, VolatilityTarget, best_of, fit_linear_signal, signal_column
from masking import InvalidMaskError

HOLD, ZERO, QUARTER, HALF, THREE_QUARTERS, ALL = range(6)
NAMES = ("gap_return", "intraday_return", "volatility_20", "signal_5")
DYNAMICS = TradingDynamics.from_config(NAMES, load_config())
FREE = np.ones((1, 7), bool)


def rows(**columns: list[float]) -> np.ndarray:
    """State rows that are zero but for the given columns."""
    state = np.zeros((len(next(iter(columns.values()))), len(DYNAMICS.state_names)), np.float32)
    for name, values in columns.items():
        state[:, DYNAMICS.state_names.index(name)] = values
    return state


def free(count: int) -> np.ndarray:
    return np.repeat(FREE, count, axis=0)


def by_threshold(scores: dict[float, float]) -> Callable[[LinearSignal], float]:
    """A validation whose score is looked up in units of the training standard deviation, which is 2."""
    return lambda policy: scores[policy.threshold / 2.0]


# Signal -2, 2, -2, 2: mean 0, standard deviation 2.
TRAIN = np.zeros((4, 4))
TRAIN[:, 3] = [-2.0, 2.0, -2.0, 2.0]


# --- linear signal ------------------------------------------------------------------------------------------


def test_linear_signal_is_all_in_above_the_threshold_and_out_at_or_below_it():
    policy = LinearSignal(DYNAMICS, "signal_5", 0.5)
    state = rows(signal_5=[0.6, 0.5, 0.4, 0.6], position=[0.0, 1.0, 0.5, 1.0])
    assert policy.act(state, free(4)).tolist() == [ALL, ZERO, ZERO, HOLD]


def test_linear_signal_takes_the_nearest_valid_step_under_the_real_limits():
    # At most 0.6 per decision: from 0 only 0.5 is near enough to 1.
    state = rows(signal_5=[1.0], volatility_20=[0.1])
    assert LinearSignal(DYNAMICS, "signal_5").act(state, DYNAMICS.action_masks(state)).tolist() == [HALF]


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_rules_hold_where_their_column_is_not_finite(unknown):
    state = rows(signal_5=[unknown], volatility_20=[unknown], position=[0.5])
    assert LinearSignal(DYNAMICS, "signal_5").act(state, FREE).tolist() == [HOLD]
    assert VolatilityTarget(DYNAMICS).act(state, FREE).tolist() == [HOLD]


def test_rules_hold_where_the_position_is_unknown():
    state = rows(signal_5=[1.0], volatility_20=[0.1], position=[math.nan])
    assert LinearSignal(DYNAMICS, "signal_5").act(state, FREE).tolist() == [HOLD]
    assert VolatilityTarget(DYNAMICS).act(state, FREE).tolist() == [HOLD]


def test_signal_column_prefers_the_signal_and_falls_back_to_the_trend_of_real_bars():
    assert signal_column(NAMES) == "signal_5"
    assert signal_column([field.name for field in FEATURE_FIELDS]) == "ma_distance_120"
    with pytest.raises(ValueError, match="names: expected signal_5 or ma_distance_120, was spread, volume"):
        signal_column(["spread", "volume"])


def test_a_missing_column_is_named_with_its_likeliest_intention():
    with pytest.raises(ValueError, match=r"column: .*was 'signal5'; did you mean 'signal_5'\?"):
        LinearSignal(DYNAMICS, "signal5")


# --- volatility targeting -----------------------------------------------------------------------------------


def test_volatility_target_scales_the_position_and_caps_it_at_one():
    # 0.1 / volatility: 0.2 -> 0.5, 0.4 -> 0.25, 0.1 -> 1, 0.05 -> 2 capped at 1, 0 -> infinity capped at 1.
    state = rows(volatility_20=[0.2, 0.4, 0.1, 0.05, 0.0])
    assert VolatilityTarget(DYNAMICS, 0.1).act(state, free(5)).tolist() == [HALF, QUARTER, ALL, ALL, ALL]


def test_volatility_target_does_not_trade_for_less_than_half_a_step():
    # Wanted 0.5. From 0.4 the target 0.5 is nearer than Hold, but only 0.1 away; 0.375 is exactly half a step away.
    state = rows(volatility_20=[0.2] * 4, position=[0.4, 0.625, 0.375, 0.3])
    assert VolatilityTarget(DYNAMICS, 0.1).act(state, free(4)).tolist() == [HOLD, HOLD, HOLD, HALF]


# --- fitting ------------------------------------------------------------------------------------------------


def test_fit_picks_the_threshold_of_the_best_score_in_training_deviations():
    scores = {0.0: 1.0, -0.5: 0.5, 0.5: 2.0, -1.0: math.nan}
    fitted = fit_linear_signal(DYNAMICS, TRAIN, by_threshold(scores))
    assert (fitted.column, fitted.threshold) == ("signal_5", 1.0)


def test_fit_reads_all_paths_of_a_panel():
    fitted = fit_linear_signal(DYNAMICS, np.stack((TRAIN, TRAIN)), by_threshold({0.0: 0, -0.5: 0, 0.5: 0, -1.0: 3}))
    assert fitted.threshold == -2.0


def test_equal_scores_keep_the_zero_threshold_and_nan_never_wins():
    assert fit_linear_signal(DYNAMICS, TRAIN, lambda _: 0.7).threshold == 0.0
    scores = {0.0: math.nan, -0.5: -3.0, 0.5: math.nan, -1.0: -4.0}
    assert fit_linear_signal(DYNAMICS, TRAIN, by_threshold(scores)).threshold == -1.0


def test_fit_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="validate: expected a number for at least one of 4 candidates"):
        fit_linear_signal(DYNAMICS, TRAIN, lambda _: math.nan)
    with pytest.raises(ValueError, match=r"train: expected \[n, 4\] or \[P, n, 4\], was \[4, 3\]"):
        fit_linear_signal(DYNAMICS, TRAIN[:, :3], lambda _: 0.0)
    with pytest.raises(ValueError, match=r"train: expected \[n, 4\].*was \[0, 4\]"):
        fit_linear_signal(DYNAMICS, TRAIN[:0], lambda _: 0.0)
    with pytest.raises(ValueError, match="train: expected finite values, column 'signal_5'"):
        fit_linear_signal(DYNAMICS, np.where(TRAIN == 2.0, math.nan, TRAIN), lambda _: 0.0)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="threshold: expected a finite number, was nan"):
        LinearSignal(DYNAMICS, "signal_5", math.nan)
    for target in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="target: expected a positive finite number"):
            VolatilityTarget(DYNAMICS, target)


def test_best_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one of 0 candidates"):
        best_of([], lambda _: 0.0)


# --- validity -----------------------------------------------------------------------------------------------


@given(
    arrays.arrays(np.float32, (5, len(DYNAMICS.state_names)), elements=st.floats(width=32)),
    arrays.arrays(np.bool_, (5, 7)),
)
def test_no_state_and_no_mask_makes_a_rule_choose_a_forbidden_action(state, action_masks):
    action_masks[:, HOLD] = True
    for policy in (LinearSignal(DYNAMICS, "signal_5"), VolatilityTarget(DYNAMICS)):
        chosen = policy.act(state, action_masks)
        assert chosen.dtype == np.int64
        assert action_masks[np.arange(5), chosen].all()


def test_malformed_masks_are_refused():
    for policy in (LinearSignal(DYNAMICS, "signal_5"), VolatilityTarget(DYNAMICS)):
        with pytest.raises(InvalidMaskError, match="dtype bool"):
            policy.act(rows(position=[0.0]), np.ones((1, 7)))


def test_rules_walk_a_synthetic_market_without_a_forbidden_action():
    config = SyntheticMarketConfig()
    panel = simulate_panel(config, paths=4, bars=200, seed=5).features
    dynamics = TradingDynamics.from_config(panel.names, load_config(overrides=["account.spread_share=0.5"]))
    for policy in (LinearSignal(dynamics, "signal_5"), VolatilityTarget(dynamics)):
        result = backtest(dynamics, panel.values, panel.timestamps, policy)
        assert result.invalid_actions == 0
        assert result.turnover.sum() > 1.0
