"""Reward N1 by hand, and the registry of rewards."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch

from configs.schema import RewardConfig
from envs import REWARDS, StepOutcome, register_reward, reward_function

CONFIG = RewardConfig(profit_weight=2.0, drawdown_weight=0.5, breach_weight=3.0, profit_scale=0.01, drawdown_scale=0.15)


def outcome(xp, log_return, drawdown, breached) -> StepOutcome:
    rows = [xp.asarray(column, dtype=xp.float64) for column in (log_return, drawdown)]
    zero = xp.zeros_like(rows[0])
    return StepOutcome(
        log_return=rows[0],
        cost=zero,
        turnover=zero,
        flattened=zero > 0,
        breached=xp.asarray(breached),
        drawdown=rows[1],
        target=zero,
    )


@pytest.mark.parametrize("xp", [np, torch, array_api_strict], ids=["numpy", "torch", "strict"])
def test_n1_pays_profit_and_charges_drawdown_and_breach(xp) -> None:
    reward = reward_function("n1")(outcome(xp, [0.01, -0.02, 0.0], [0.0, 0.03, 0.15], [False, False, True]), CONFIG)
    # 2 * 1; 2 * -2 - .5 * .2; -.5 * 1 - 3.
    np.testing.assert_allclose(np.asarray(reward), [2.0, -4.1, -3.5], rtol=1e-12)


def test_by_default_a_typical_day_of_profit_counts_one_unit_and_a_breach_costs_more_than_nothing() -> None:
    calm, breach = reward_function("n1")(outcome(np, [0.01, 0.01], [0.0, 0.0], [False, True]), RewardConfig())
    np.testing.assert_allclose([calm, calm - breach], [1.0, RewardConfig().breach_weight], rtol=1e-12)


def test_risk_aversion_charges_half_the_square_of_a_return() -> None:
    config = RewardConfig(profit_scale=0.01, drawdown_weight=0.0, risk_aversion=5.0)
    gain, loss = reward_function("n1")(outcome(np, [0.02, -0.02], [0.0, 0.0], [False, False]), config)
    assert (gain, loss) == pytest.approx((1.9, -2.1))


def test_costs_reach_the_reward_through_the_return_only() -> None:
    plain = outcome(np, [0.01], [0.0], [False])
    dear = plain._replace(cost=np.array([0.5]), turnover=np.array([9.0]), flattened=np.array([True]))
    np.testing.assert_array_equal(reward_function("n1")(plain, CONFIG), reward_function("n1")(dear, CONFIG))


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward.name: expected one of \['n1'\], was 'n2'"):
        reward_function("n2")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="reward 'n1' is already registered"):
        register_reward("n1")(reward_function("n1"))


def test_a_reward_of_ones_own_is_found_by_name() -> None:
    try:

        @register_reward("log_return")
        def log_return(outcome: StepOutcome, config: RewardConfig):
            return outcome.log_return

        assert reward_function("log_return") is log_return
    finally:
        del REWARDS["log_return"]
