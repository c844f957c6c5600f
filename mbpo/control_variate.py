"""Rewards without the luck of the bar: a control variate from what the world model expected.

A day's return is many times its own forecast, so a learner spends nearly all its samples on averaging noise out.
The account step is known, so the part of a bar's reward that comes from the unforeseen part of its return is known as
well, for any action, and its mean under the world model is zero: taken out, the reward keeps its mean and loses its
variance (control variates, Glasserman 2003, doi:10.1007/978-0-387-21617-1, sec. 4.1). It is made for reward N1; for
another its mean is zero as well, but it need not make the variance smaller. Letters: B batch.
"""

from __future__ import annotations

import numpy as np

from configs.schema import RewardConfig
from mbpo.imagination import Forecast


def unforeseen_reward(reward: RewardConfig, positions: np.ndarray, moves: np.ndarray, forecast: Forecast) -> np.ndarray:
    """The part of reward N1 that the world model could not foresee, of mean zero where its forecast holds.

    With `r = sum_i p_i move_i` the utility `r - a/2 r^2` departs from its expectation by
    `e (1 - a E[r]) - a/2 (e^2 - Var[r])`, where `e = r - E[r]`. First order in costs and in the move: the growth
    `log(1 + p (exp(move) - 1))` is taken for `p * move`. Drawdown and breach terms stay as they happened.

    Args: positions [B, 2] held overnight and after the trade, multiples of equity; moves [B, 2] gap and intraday log
        return; forecast of them, each [B, 2].
    Returns: [B], reward units.
    """
    expected = (positions * forecast.mean).sum(axis=1)
    surprise = (positions * (moves - forecast.mean)).sum(axis=1)
    risk = surprise**2 - (positions**2 * forecast.variance).sum(axis=1)
    aversion = reward.risk_aversion
    utility = surprise * (1 - aversion * expected) - 0.5 * aversion * risk
    unforeseen: np.ndarray = reward.profit_weight / reward.profit_scale * utility
    return unforeseen
