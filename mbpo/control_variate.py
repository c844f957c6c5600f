"""Rewards without the luck of the bar: a control variate from what the world model expected.

A day's return is many times its own forecast, so a learner spends nearly all its samples on averaging noise out.
The account step is known, so the part of a bar's reward that comes from the unforeseen part of its return is known as
well, for any action, and its mean under the world model is zero: taken out, the reward keeps its mean and loses its
variance (control variates, Glasserman 2003, doi:10.1007/978-0-387-21617-1, sec. 4.1). It is made for reward N1; for
another its mean is zero as well, but it need not make the variance smaller. Letters: B batch.
"""

from __future__ import annotations

from typing import Any

from configs.schema import RewardConfig

Pair = tuple[Any, Any]
"""Of the gap and of the move from open to close: arrays of any namespace that broadcast to [B]."""


def unforeseen_reward(reward: RewardConfig, positions: Pair, moves: Pair, mean: Pair, variance: Pair) -> Any:
    """The part of reward N1 that the world model could not foresee, of mean zero where its forecast holds.

    With `r = sum_i p_i move_i` the utility `r - a/2 r^2` departs from its expectation by
    `e (1 - a E[r]) - a/2 (e^2 - Var[r])`, where `e = r - E[r]`. First order in costs and in the move: the growth
    `log(1 + p (exp(move) - 1))` is taken for `p * move`. Drawdown and breach terms stay as they happened.

    Args: positions held overnight and after the trade, multiples of equity; moves, log returns; what was expected of
        them: mean and variance.
    Returns: [B], reward units.
    """
    held, target = positions
    expected = held * mean[0] + target * mean[1]
    surprise = held * (moves[0] - mean[0]) + target * (moves[1] - mean[1])
    risk = surprise * surprise - (held * held * variance[0] + target * target * variance[1])
    aversion = reward.risk_aversion
    utility = surprise * (1 - aversion * expected) - 0.5 * aversion * risk
    return reward.profit_weight / reward.profit_scale * utility
