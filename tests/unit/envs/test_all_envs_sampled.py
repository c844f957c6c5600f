"""Ten million sampled actions over the batched environments, each judged by arithmetic written here once more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from envs_worlds import dynamics, market, scaler_of

from envs.batch import BatchVecEnv
from envs.masked_cartpole import MaskedCartPoleVecEnv
from envs.portfolio import LIMITS, PortfolioVecEnv
from envs.vec_env import HistoryVecEnv

ROWS = 4096
LOTS = np.arange(-50.0, 60.0, 10.0)

Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""State rows before a step and actions to which of them are valid, bool [B]."""


def trading() -> HistoryVecEnv:
    features = market(2000, seed=7, swing=0.03)
    features[::7, 2] = 0.8  # above the volatility breaker
    return HistoryVecEnv(dynamics(), scaler_of(features), features, num_envs=ROWS, episode_bars=200, seed=0)


def judge_trading(state: np.ndarray, actions: np.ndarray) -> np.ndarray:
    volatility, position, _, drawdown, _, holding, code = state[:, 2:9].T
    target = np.array([np.nan, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25])[actions]
    reduces = target <= position + 1e-6
    spared = (code >= 1) & reduces
    ok = (code < 2) & (drawdown < 0.12) & (((code < 1) & (drawdown < 0.08)) | reduces)
    ok &= ((volatility < 0.6) | reduces) & (target <= 1.0 + 1e-6)
    ok &= ((abs(target - position) <= 0.6 + 1e-6) | spared) & ((holding >= 3) | (position == 0) | spared)
    return (actions == 0) | ok


def judge_cartpole(obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    buttons = np.rint(obs[:, 4:] * 9).astype(int)
    return (actions[:, None] == buttons).any(axis=1)


def judge_published(state: np.ndarray, actions: np.ndarray) -> np.ndarray:
    cash, units, prices = state[:, 0], state[:, 1:4].astype(float), state[:, 4:].astype(float)
    share = units * prices / (cash + (units * prices).sum(axis=1))[:, None]
    may_buy = np.stack((cash >= 1, share[:, 1] <= 2 / 3, share[:, 2] <= 1 / 3), axis=1)
    lots = LOTS[actions]
    return ((lots == 0) | np.where(lots > 0, may_buy, units + lots >= 0)).all(axis=1)


def judge_strict(state: np.ndarray, actions: np.ndarray) -> np.ndarray:
    cash, units, prices = state[:, 0].astype(float), state[:, 1:4].astype(float), state[:, 4:].astype(float)
    lots = LOTS[actions]
    cost = abs(lots) * np.where(lots > 0, (0.03, 0.045, 0.035), (0.025, 0.035, 0.03))
    after, cash = units + lots, cash - (lots * prices + cost).sum(axis=1)
    value = cash + (after * prices).sum(axis=1)
    bought = lots > 0
    shares = (~bought | (after * prices <= np.array([1.0, 2 / 3, 1 / 3]) * value[:, None] + 1e-6)).all(axis=1)
    return (after >= 0).all(axis=1) & (~bought.any(axis=1) | ((cash >= 1 - 1e-6) & shares))


def sampled(env: BatchVecEnv, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env, PortfolioVecEnv) and env.portfolio.variant == "strict":
        return LIMITS.sample(env.portfolio.state, rng)
    masks = env.action_masks()
    masks = masks.reshape(ROWS, 3, 11) if isinstance(env, PortfolioVecEnv) else masks
    return np.where(masks, rng.random(masks.shape, dtype=np.float32), -1.0).argmax(axis=-1)


def rows_of(env: BatchVecEnv) -> np.ndarray:
    if isinstance(env, PortfolioVecEnv):
        return env.portfolio.state
    return env.walks.state if isinstance(env, HistoryVecEnv) else env._observe()


@pytest.mark.parametrize(
    ("build", "judge", "steps"),
    [
        (trading, judge_trading, 1100),
        (lambda: MaskedCartPoleVecEnv(ROWS, seed=0), judge_cartpole, 700),
        (lambda: PortfolioVecEnv(ROWS, "published", seed=0), judge_published, 400),
        (lambda: PortfolioVecEnv(ROWS, "strict", seed=0), judge_strict, 250),
    ],
    ids=["trading", "masked cartpole", "portfolio as published", "strict portfolio"],
)
def test_no_sampled_action_is_forbidden(build: Callable[[], BatchVecEnv], judge: Judge, steps: int) -> None:
    env, rng = build(), np.random.default_rng(1)
    env.reset()
    moved = 0
    for _ in range(steps):
        rows, actions = rows_of(env).copy(), sampled(env, rng)
        assert judge(rows, actions).all()
        env.step(actions)
        moved += int((actions != 0).sum())
    assert (env.audit.executed, env.audit.invalid) == (steps * ROWS, 0)
    assert moved > 0.1 * steps * ROWS
