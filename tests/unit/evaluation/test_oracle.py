"""The dynamic programme against worlds whose optimum is known, and against backward induction in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs import DetentConfig
from configs.evaluation import SyntheticMarketConfig
from envs import TradingDynamics
from envs.synthetic import signal_persistence, simulate_panel, transition_matrix
from evaluation import BuyAndHold, backtest, evaluate
from evaluation.oracle import TOLERANCE, OraclePolicy, best_valid, columns_of, rouwenhorst, solve_oracle

FEATURES = ("gap_return", "intraday_return", "spread", "volatility_20", "true_regime", "true_signal")
HOLD, FLAT, QUARTER, HALF, THREE_QUARTERS, FULL, LEVERED = range(7)


def world(**changes: Any) -> SyntheticMarketConfig:
    """One regime in three names, no signal, 4 % per year at 10 % volatility: growth-optimal at 4.5 times equity."""
    settings = {
        "drift": (0.04,) * 3,
        "volatility": (0.1,) * 3,
        "spread_bps": (2.0,) * 3,
        "jump_rate": (0.0,) * 3,
        "signal_drift": 0.0,
    }
    return SyntheticMarketConfig.model_validate(settings | changes)


def dynamics_of(
    commission_bps: float = 0.0, spread_share: float = 0.0, features: tuple[str, ...] = FEATURES, **limits: Any
) -> TradingDynamics:
    account = {"commission_bps": commission_bps, "slippage_bps": 0.0, "spread_share": spread_share}
    limits = {"min_holding_bars": 2, "max_position_change": 2.0} | limits
    return TradingDynamics.from_config(features, DetentConfig.model_validate({"account": account, "limits": limits}))


def choices(market: SyntheticMarketConfig, dynamics: TradingDynamics, **state: Any) -> np.ndarray:
    """Actions of the policy at the given columns, all other columns zero."""
    rows = np.broadcast_arrays(*np.atleast_1d(*state.values()))
    states = np.zeros((len(rows[0]), len(dynamics.state_names)), dtype=np.float32)
    states[:, [dynamics.state_names.index(name) for name in state]] = np.stack(rows, axis=1)
    policy = OraclePolicy(dynamics, solve_oracle(market, dynamics))
    return policy.act(states, dynamics.action_masks(states))


# --- worlds with a known optimum --------------------------------------------------------------------------


def test_free_trading_in_a_rising_market_is_fully_invested_from_every_position():
    positions = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    chosen = choices(world(), dynamics_of(), position=positions, holding_time=5.0)
    assert chosen.tolist() == [FULL, FULL, FULL, FULL, HOLD]  # already there: Hold on the tie


def test_growth_of_the_fully_invested_is_the_drift_in_hand():
    # Log growth of p = 1 is the mean log return itself, 0.04 a year: 0.04 + v/2 - v/2.
    solution = solve_oracle(world(), dynamics_of())
    assert solution.growth * 252 == pytest.approx(0.04, rel=1e-12)


def test_variance_too_large_for_the_drift_is_met_with_half_a_position():
    # Simple mean 0.04 = -0.04 + 0.4^2 / 2, variance 0.16: p = 0.04 / 0.16 = 0.25 maximises p * 0.04 - p^2 * 0.08.
    market = world(drift=(-0.04,) * 3, volatility=(0.4,) * 3)
    assert choices(market, dynamics_of(), position=[0.0, 1.0], holding_time=5.0).tolist() == [QUARTER, QUARTER]
    growth = solve_oracle(market, dynamics_of()).growth * 252
    assert growth == pytest.approx(0.25 * 0.04 - 0.25**2 * 0.08, rel=1e-12)


def test_jumps_count_as_variance_of_the_gap():
    # Diffusion 0.1^2 plus four jumps a year of 0.1^2 each: variance 0.05, simple mean 0.025 + 0.05 / 2 = 0.05, and
    # mean / variance = 1 is the best position. Ten jumps a year at the same mean: 0.05 / 0.11, nearest to a half.
    calm = world(drift=(0.025,) * 3, jump_rate=(4.0,) * 3, jump_std=0.1)
    wild = world(drift=(-0.005,) * 3, jump_rate=(10.0,) * 3, jump_std=0.1)
    assert choices(calm, dynamics_of(), position=0.0, holding_time=5.0) == [FULL]
    assert choices(wild, dynamics_of(), position=0.0, holding_time=5.0) == [HALF]


def test_a_falling_market_is_left_and_not_entered():
    chosen = choices(world(drift=(-0.04,) * 3), dynamics_of(), position=[0.0, 0.5, 1.0], holding_time=5.0)
    assert chosen.tolist() == [HOLD, FLAT, FLAT]


def test_leverage_is_used_in_paper_mode_only():
    assert choices(world(), dynamics_of(paper=True), position=0.0, holding_time=5.0) == [LEVERED]
    assert choices(world(), dynamics_of(paper=False), position=0.0, holding_time=5.0) == [FULL]


def test_ruinous_costs_end_all_trading():
    # A signal worth 20 % a year per standard deviation comes and goes in days; a round trip costs 10 % at once.
    market = world(drift=(-0.005,) * 3, signal_drift=0.2)
    signals = np.linspace(-4.0, 4.0, 9)
    chosen = choices(market, dynamics_of(commission_bps=500.0), true_signal=signals, position=0.0, holding_time=5.0)
    assert (chosen == HOLD).all()


def test_costs_open_a_band_in_which_nobody_trades():
    market = world(drift=(-0.005,) * 3, signal_drift=0.2)  # simple mean 0: buy above zero, sell below
    signals = np.linspace(-2.0, 2.0, 81)
    free, costly = dynamics_of(), dynamics_of(commission_bps=10.0)
    when = {"true_signal": signals, "holding_time": 5.0}
    bands = []
    for dynamics in (free, costly):
        flat, full = (choices(market, dynamics, position=position, **when) for position in (0.0, 1.0))
        waits = (flat == HOLD) & (full == HOLD)
        bands.append(np.ptp(signals[waits]) if waits.any() else 0.0)
        assert [flat[0], full[0]] == [HOLD, FLAT]  # sure of a fall
        assert [flat[-1], full[-1]] == [FULL, HOLD]  # sure of a rise
    assert bands[0] < 0.3
    assert bands[1] > 0.8


def test_spread_of_the_next_bar_is_part_of_the_cost():
    # Shares of the quoted spread are paid like a commission of the same size.
    market = world(signal_drift=0.2, spread_bps=(40.0,) * 3)
    by_spread = solve_oracle(market, dynamics_of(spread_share=0.5))
    by_commission = solve_oracle(market, dynamics_of(commission_bps=20.0))
    np.testing.assert_allclose(by_spread.q, by_commission.q, atol=1e-9)
    assert by_spread.growth < solve_oracle(market, dynamics_of()).growth


def test_a_calm_regime_is_held_and_a_stressed_one_left():
    market = world(drift=(0.2, 0.0, -0.5), duration_days=(100.0, 50.0, 50.0))
    regimes = np.array([0.0, 2.0])
    free = dynamics_of(commission_bps=2.0)
    assert choices(market, free, true_regime=regimes, position=0.0, holding_time=5.0).tolist() == [FULL, HOLD]
    assert choices(market, free, true_regime=regimes, position=1.0, holding_time=5.0).tolist() == [HOLD, FLAT]


# --- the solver -------------------------------------------------------------------------------------------


def test_backward_induction_in_plain_loops_finds_the_same_values_and_growth():
    market = world(
        drift=(0.3, 0.0, -0.4),
        volatility=(0.1, 0.2, 0.3),
        duration_days=(4.0, 3.0, 2.0),
        jump_rate=(1.0, 2.0, 6.0),
        spread_bps=(5.0, 10.0, 40.0),
        signal_drift=2.0,
        signal_half_life_days=1.0,
    )
    dynamics = dynamics_of(commission_bps=3.0, spread_share=0.5, min_holding_bars=3, max_position_change=0.6)
    solution = solve_oracle(market, dynamics, signal_std=0.8, signal_points=3)
    q, growth = _backward_induction(market, bars=150, cost=3e-4, spread_share=0.5, holding=3, change=0.6, std=0.8)
    # Only differences between actions mean anything; 1.25 is forbidden, so nobody stands there or goes there.
    assert solution.positions.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    found = solution.q - solution.q[..., :1]
    np.testing.assert_allclose(found[..., :6], (q - q[..., :1])[..., :6], atol=1e-8)
    assert (found[..., LEVERED] == 0).all()
    assert solution.growth == pytest.approx(growth, rel=1e-6)


def _backward_induction(
    market: SyntheticMarketConfig,
    *,
    bars: int,
    cost: float,
    spread_share: float,
    holding: int,
    change: float,
    std: float,
) -> tuple[np.ndarray, float]:
    """Q [3, 3, 5, holding, 7] with `bars` to go, and the growth of the last bar's value."""
    positions = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    stay = (1 + signal_persistence(market)) / 2
    move = 1 - stay
    moves = [
        [stay**2, 2 * stay * move, move**2],
        [stay * move, stay**2 + move**2, stay * move],
        [move**2, 2 * stay * move, stay**2],
    ]
    signals = [-std * 2**0.5, 0.0, std * 2**0.5]
    regimes = transition_matrix(market)
    value = np.zeros((3, 3, 5, holding))
    for _ in range(bars):
        q = np.full((3, 3, 5, holding, 7), np.nan)
        new = np.zeros_like(value)
        for k, y, now, held, action in np.ndindex(q.shape):
            then = now if action == 0 else action - 1
            reward = future = 0.0
            for regime in range(3):
                mean = (market.drift[regime] + market.signal_drift * signals[y]) / 252
                day = market.volatility[regime] ** 2 / 252
                parts = (
                    (now, 0.2 * mean, 0.2 * day + market.jump_rate[regime] / 252 * market.jump_std**2),
                    (then, 0.8 * mean, 0.8 * day),
                )
                for place, log_mean, variance in parts:
                    simple = log_mean + variance / 2
                    growth = positions[place] * simple - positions[place] ** 2 * variance / 2
                    reward += regimes[k, regime] * growth
                rate = cost + spread_share * market.spread_bps[regime] * 1e-4
                reward -= regimes[k, regime] * rate * abs(positions[then] - positions[now])
                if then < 5:
                    after = 0 if then != now else min(held + 1, holding - 1)
                    for z in range(3):
                        future += regimes[k, regime] * moves[y][z] * value[regime, z, then, after]
                q[k, y, now, held, action] = reward + future
        for k, y, now, held in np.ndindex(value.shape):
            allowed = [q[k, y, now, held, 0]]
            for action in range(1, 6):
                free = held + 1 >= holding or positions[now] == 0
                if free and abs(positions[action - 1] - positions[now]) <= change + 1e-6:
                    allowed.append(q[k, y, now, held, action])
            new[k, y, now, held] = max(allowed)
        growth_of_bar = float((new - value).mean())
        value = new
    return q, growth_of_bar


def test_values_satisfy_the_bellman_equation_at_the_default_market():
    solution = solve_oracle(SyntheticMarketConfig(), dynamics_of(commission_bps=1.5, spread_share=0.5))
    assert solution.residual < TOLERANCE
    assert solution.q.shape == (3, 41, 5, 2, 7)
    assert np.isfinite(solution.q).all()


def test_a_finer_signal_grid_changes_growth_by_less_than_half_a_percent():
    dynamics = dynamics_of(commission_bps=1.5, spread_share=0.5, min_holding_bars=3, max_position_change=0.6)
    coarse, fine = (solve_oracle(SyntheticMarketConfig(), dynamics, signal_points=points) for points in (41, 121))
    assert coarse.growth == pytest.approx(fine.growth, rel=5e-3)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("regime", [0.0, 1.0, 2.0])
def test_a_higher_signal_never_asks_for_less(regime: float, position: float):
    dynamics = dynamics_of(commission_bps=1.5, spread_share=0.5, min_holding_bars=3, max_position_change=0.6)
    where = {"true_regime": regime, "position": position, "holding_time": 9.0}
    chosen = choices(SyntheticMarketConfig(), dynamics, true_signal=np.linspace(-5.0, 5.0, 201), **where)
    after = np.where(chosen == HOLD, position, dynamics.rule_set.actions.target_positions(np.zeros(1))[0, chosen])
    assert (np.diff(after) >= 0).all()
    assert after[0] <= position <= after[-1]
    assert after[0] < after[-1]


def test_tighter_limits_and_higher_costs_never_raise_growth():
    market = SyntheticMarketConfig()
    loose = solve_oracle(market, dynamics_of(commission_bps=1.5, min_holding_bars=0, max_position_change=1.0)).growth
    held = solve_oracle(market, dynamics_of(commission_bps=1.5, min_holding_bars=5, max_position_change=1.0)).growth
    small = solve_oracle(market, dynamics_of(commission_bps=1.5, min_holding_bars=0, max_position_change=0.3)).growth
    costly = solve_oracle(market, dynamics_of(commission_bps=9.0, min_holding_bars=0, max_position_change=1.0)).growth
    assert loose > held > 0
    assert loose > small > 0
    assert loose > costly > 0


@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.933, 0.9998])
def test_signal_chain_has_the_moments_of_the_autoregression(persistence: float):
    grid, moves = rouwenhorst(persistence, 41)
    law = np.linalg.matrix_power((moves + np.eye(41)) / 2, 2**24)[20]
    np.testing.assert_allclose(moves.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(moves @ grid, persistence * grid, atol=1e-10)
    assert law @ grid**2 == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(moves @ grid**2 - (moves @ grid) ** 2, 1 - persistence**2, atol=1e-9)


def test_values_that_do_not_settle_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evaluation.oracle.MAX_SWEEPS", 5)
    with pytest.raises(ValueError, match="expected values that settle within 5 sweeps, the last one moved them by"):
        solve_oracle(SyntheticMarketConfig(), dynamics_of(commission_bps=5.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signal_std": 0.0}, "signal_std: expected a positive number, was 0.0"),
        ({"signal_std": float("nan")}, "signal_std: expected a positive number, was nan"),
        ({"signal_points": 2}, "signal_points: expected >= 3, was 2"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        solve_oracle(world(), dynamics_of(), **arguments)


# --- the policy -------------------------------------------------------------------------------------------


def test_values_between_grid_points_are_interpolated_and_clipped_at_the_ends():
    solution = solve_oracle(world(signal_drift=0.2), dynamics_of(commission_bps=5.0))
    left, right = solution.signals[20:22]
    signal = np.array([left, 0.75 * left + 0.25 * right, 1e3, -1e3])
    values = solution.action_values(signal, np.array([0.26, 0.26, 0.9, 0.0]), np.array([1.0, 7.0, 2.0, 0.0]))
    q = solution.q
    assert values.shape == (4, 3, 7)
    np.testing.assert_allclose(values[0], q[:, 20, 1, 0])
    np.testing.assert_allclose(values[1], 0.75 * q[:, 20, 1, 1] + 0.25 * q[:, 21, 1, 1])
    np.testing.assert_allclose(values[2], q[:, -1, 4, 1])
    np.testing.assert_allclose(values[3], q[:, 0, 0, 0])


def test_best_valid_respects_the_mask_and_prefers_hold_on_ties():
    values = np.array([[0.0, 1.0, 2.0], [1.0, 1.0 + 1e-12, 0.0], [0.0, -1.0, 5.0], [0.0, 1.0, 1.0]])
    masks = np.array([[True, True, True], [True, True, True], [True, True, False], [True, True, True]])
    assert best_valid(values, masks).tolist() == [2, HOLD, HOLD, 1]


def test_forbidden_best_action_gives_way_to_the_next_best():
    dynamics = dynamics_of(max_position_change=0.6)
    assert choices(world(), dynamics, position=0.3, holding_time=5.0) == [THREE_QUARTERS]  # 1 is 0.7 away
    assert choices(world(), dynamics, position=0.3, holding_time=1.0) == [HOLD]  # still bound to the last trade


def test_missing_truth_names_the_columns():
    dynamics = dynamics_of(features=FEATURES[:4])
    with pytest.raises(ValueError, match=r"missing \['true_signal', 'true_regime'\]; widen the feature panel"):
        OraclePolicy(dynamics, solve_oracle(world(), dynamics))
    assert columns_of(dynamics, ("spread",)) == [2]


def test_oracle_is_never_invalid_and_beats_buy_and_hold_at_the_default_limits():
    market = SyntheticMarketConfig()
    panel = simulate_panel(market, paths=16, bars=1000, seed=11)
    wide = panel.with_truth()
    dynamics = TradingDynamics.from_config(wide.names, DetentConfig())
    policies = (OraclePolicy(dynamics, solve_oracle(market, dynamics)), BuyAndHold(dynamics))
    oracle, passive = (
        evaluate(backtest(dynamics, wide.values, wide.timestamps, policy), market.bars_per_year) for policy in policies
    )
    assert oracle.invalid_actions == 0
    assert oracle.sharpe > passive.sharpe + 0.4
    assert oracle.kill_switch_rate <= passive.kill_switch_rate


def test_promised_growth_is_earned_where_no_ladder_binds():
    # Three standard errors of 64 paths; the ladder is moved out of reach, so the programme leaves nothing out.
    market = SyntheticMarketConfig()
    wide = simulate_panel(market, paths=64, bars=1000, seed=12).with_truth()
    limits = {"soft_drawdown": 0.9, "hard_drawdown": 0.91, "kill_drawdown": 0.92, "max_volatility": 9.0}
    dynamics = TradingDynamics.from_config(wide.names, DetentConfig.model_validate({"limits": limits}))
    solution = solve_oracle(market, dynamics)
    result = backtest(dynamics, wide.values, wide.timestamps, OraclePolicy(dynamics, solution))
    growth = result.log_returns.mean(axis=0)
    assert abs(growth.mean() - solution.growth) < 3 * growth.std(ddof=1) / 8
