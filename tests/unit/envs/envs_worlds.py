"""Small exact worlds for the environment tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from configs.schema import AccountConfig, DetentConfig, LimitsConfig
from data import Scaler
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, Account, TradingDynamics, initial_account

FEATURES = ("gap_return", "intraday_return", "volatility_20")

LOOSE = {
    "max_exposure": 1.25,
    "paper": True,
    "min_holding_bars": 0,
    "max_position_change": 2.0,
    "max_volatility": 100.0,
}
"""Limits under which every action of an ACTIVE account is valid."""


def dynamics(*, feature_names: tuple[str, ...] = FEATURES, cost_bps: float = 10.0, **limits: Any) -> TradingDynamics:
    """Trading with the default limits, or those given; trading a notional of 1 costs 0.001."""
    config = DetentConfig(
        limits=LimitsConfig(**limits), account=AccountConfig(commission_bps=cost_bps, slippage_bps=0.0)
    )
    return TradingDynamics.from_config(feature_names, config)


def market(bars: int, *, seed: int = 0, swing: float = 0.01) -> np.ndarray:
    """Random feature rows [T, 3]: gap and intraday log returns, and a volatility below every breaker."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(0.0, swing, (bars, 3))
    rows[:, 2] = rng.uniform(0.1, 0.4, bars)
    return rows


def moves(*simple: tuple[float, float]) -> np.ndarray:
    """Feature rows [T, 3] from simple (gap, intraday) returns; volatility 0.2."""
    rows = np.full((len(simple), 3), 0.2)
    rows[:, :2] = np.log1p(np.array(simple))
    return rows


def scaler_of(features: np.ndarray) -> Scaler:
    """Scaler of the observation: features by quantiles, the account by its fixed ranges."""
    return Scaler.concat([Scaler.fit(features, FEATURES), Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))])


def fresh(batch: int = 1, xp: Any = np) -> Account:
    return initial_account(batch, xp, dtype=xp.float64)


def random_valid(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One valid action per row, uniformly."""
    return np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1)
