"""A small known world: three feature columns, scripted policies, and histories written as simple returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from configs.schema import RewardConfig
from envs import AccountRules, TradingDynamics
from evaluation import BacktestResult, backtest
from masking import ActionTable, DrawdownLadder, RuleSet, trading_rules

REWARD = RewardConfig(
    profit_weight=1.0, drawdown_weight=0.02, breach_weight=1.0, profit_scale=0.01, drawdown_scale=0.15
)
FEATURES = ("gap_return", "intraday_return", "volatility_20")


class Script:
    """Plays a list of actions, the same on every path."""

    name = "script"

    def __init__(self, actions: Sequence[int]) -> None:
        self._actions = iter(actions)

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        return np.full(len(state), next(self._actions))


@pytest.fixture
def make_dynamics() -> Callable[..., TradingDynamics]:
    """Dynamics with the default limits, or with the given ones."""

    def make(cost_rate: float = 1e-3, ladder: DrawdownLadder | None = None, **limits: Any) -> TradingDynamics:
        ladder = ladder or DrawdownLadder()
        rules = RuleSet(trading_rules(ladder=ladder, **limits), ActionTable())
        return TradingDynamics(FEATURES, AccountRules(cost_rate=cost_rate, ladder=ladder), rules, REWARD)

    return make


@pytest.fixture
def make_history() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Features [T, 3] and daily timestamps [T] from simple (gap, intraday) returns of each row."""

    def make(*moves: tuple[float, float], volatility: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
        returns = np.log1p(np.array(moves))
        features = np.column_stack((returns, np.full(len(returns), volatility)))
        return features, np.datetime64("2020-01-01", "ns") + np.arange(len(returns)) * np.timedelta64(1, "D")

    return make


@pytest.fixture
def rough_history() -> tuple[np.ndarray, np.ndarray]:
    """600 bars of falling, jumping prices with the volatility column crossing the breaker: every rung is hit."""
    rng = np.random.default_rng(7)
    gap = np.where(rng.random(600) < 0.03, -0.07, 0.004 * rng.standard_normal(600))
    intraday = -0.001 + 0.02 * rng.standard_normal(600)
    features = np.column_stack((gap, intraday, 0.4 + 0.3 * np.sin(np.arange(600) / 15)))
    return features, np.datetime64("2020-01-01", "ns") + np.arange(600) * np.timedelta64(1, "D")


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def round_trip(make_dynamics: Any, make_history: Any) -> BacktestResult:
    """Buy a half, hold through a fall, sell all: four bars whose numbers are worked in `test_backtest`."""
    features, timestamps = make_history((0.0, 0.0), (0.1, 0.2), (-0.1, 0.0), (0.0, 0.0), (0.1, -0.3))
    return backtest(make_dynamics(), features, timestamps, Script([3, 0, 0, 1]))
