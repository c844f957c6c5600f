"""Luck taken out of rewards: its mean is zero, and what is left is what was expected."""

import numpy as np
import pytest
from mbpo_worlds import make_dynamics

from configs.schema import RewardConfig
from envs import initial_account
from mbpo.control_variate import unforeseen_reward
from mbpo.imagination import Forecast

REWARD = RewardConfig(profit_weight=2.0, profit_scale=0.01, risk_aversion=5.0)


def forecast(rows: int) -> Forecast:
    return Forecast(np.tile([0.001, -0.002], (rows, 1)), np.tile([0.004**2, 0.01**2], (rows, 1)))


def luck_of(positions: np.ndarray, moves: np.ndarray, expected: Forecast) -> np.ndarray:
    return unforeseen_reward(REWARD, *(tuple(part.T) for part in (positions, moves, *expected)))


def test_luck_by_hand() -> None:
    # Half a position overnight, a full one by day: E r = 0.0005 - 0.002, surprise 0.5 * 0.002 + 0.012.
    luck = luck_of(np.array([[0.5, 1.0]]), np.array([[0.003, 0.01]]), forecast(1))
    variance = 0.25 * 0.004**2 + 0.01**2
    utility = 0.013 * (1 + 5.0 * 0.0015) - 2.5 * (0.013**2 - variance)
    assert luck.tolist() == pytest.approx([200.0 * utility])


def test_a_flat_account_has_no_luck() -> None:
    assert luck_of(np.zeros((1, 2)), np.array([[0.1, -0.2]]), forecast(1)).tolist() == [0.0]


@pytest.mark.parametrize("action", [0, 3, 6])
def test_rewards_keep_their_mean_and_lose_nearly_all_their_variance(action: int) -> None:
    rows = 200_000
    expected = forecast(rows)
    rng = np.random.default_rng(0)
    moves = expected.mean + np.sqrt(expected.variance) * rng.standard_normal((rows, 2))
    dynamics = make_dynamics(REWARD)
    account = initial_account(rows, np, dtype=np.float64)
    features = np.column_stack((moves, np.full(rows, 0.1), np.zeros(rows)))
    start = account._replace(position=np.full(rows, 0.25))
    _, outcome, reward = dynamics.step(start, np.full(rows, action), features)
    luck = luck_of(np.stack((start.position, outcome.target), axis=1), moves, expected)
    error = luck.std() / np.sqrt(rows)
    assert abs(luck.mean()) < 4 * error
    # What is left is second order in the move.
    assert (reward - luck).std() < 0.03 * reward.std()
