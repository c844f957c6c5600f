"""Reward functions: pure array-API functions of what a bar did to the account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat

from configs.schema import RewardConfig
from envs.account import StepOutcome

RewardFunction = Callable[[StepOutcome, RewardConfig], Any]

REWARDS: dict[str, RewardFunction] = {}


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Make a reward selectable by `reward.name`; a taken name is an error."""

    def register(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise ValueError(f"reward {name!r} is already registered")
        REWARDS[name] = function
        return function

    return register


def reward_function(name: str) -> RewardFunction:
    """Look a reward up by name."""
    if name not in REWARDS:
        raise ValueError(f"reward.name: expected one of {sorted(REWARDS)}, was {name!r}")
    return REWARDS[name]


@register_reward("n1")
def reward_n1(outcome: StepOutcome, config: RewardConfig) -> Any:
    """`w_p * (r - risk_aversion / 2 * r^2) / profit_scale - w_d * drawdown / drawdown_scale - w_c * 1[limit breached]`.

    With `r` the log growth of equity: mean-variance utility per bar (Markowitz 1952, doi:10.2307/2975974), which a
    growth-optimal account exceeds in risk for no better Sharpe ratio.

    Args: outcome with arrays [B]. Returns: [B], dimensionless, about one unit per typical day.
    """
    xp = array_api_compat.array_namespace(outcome.log_return)
    breached = xp.astype(outcome.breached, outcome.log_return.dtype)
    utility = outcome.log_return * (1 - 0.5 * config.risk_aversion * outcome.log_return)
    return (
        config.profit_weight / config.profit_scale * utility
        - config.drawdown_weight / config.drawdown_scale * outcome.drawdown
        - config.breach_weight * breached
    )
