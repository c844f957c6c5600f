"""A tiny market and dynamics for the tests of `mbpo`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from configs.schema import RewardConfig
from data import FeatureTable, Field, Scaler
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, AccountRules, TradingDynamics
from masking import ActionTable, RuleSet, trading_rules
from mbpo.imagination import Forecast
from world_model.model import Outlook

FIELDS = (
    Field("gap_return", "market", "log return", -np.inf, np.inf, "gap"),
    Field("intraday_return", "market", "log return", -np.inf, np.inf, "move"),
    Field("volatility_20", "market", "per sqrt(year)", 0.0, np.inf, "volatility"),
    Field("signal", "signals", "1", -np.inf, np.inf, "sign of the next move"),
)
NAMES = tuple(field.name for field in FIELDS)


def make_dynamics(reward: RewardConfig | None = None, cost_rate: float = 3e-4, **rules: object) -> TradingDynamics:
    return TradingDynamics(
        NAMES,
        AccountRules(cost_rate=cost_rate),
        RuleSet(trading_rules(**rules), ActionTable()),
        reward or RewardConfig(),
    )


def make_features(rows: int, seed: int = 0, move: float = 0.01) -> np.ndarray:
    """Moves of fixed size whose sign the signal of the bar before gives away."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], rows + 1)
    features = np.zeros((rows, len(FIELDS)))
    features[:, 1] = move * sign[:-1]
    features[:, 2] = 0.16
    features[:, 3] = sign[1:]
    return features


def make_table(rows: int, seed: int = 0, start: str = "2020-01-01") -> FeatureTable:
    times = pd.date_range(start, periods=rows, freq="D", tz="UTC")
    return FeatureTable(times, "toy", FIELDS, make_features(rows, seed))


def make_scaler(features: np.ndarray) -> Scaler:
    return Scaler.concat([Scaler.fit(features, NAMES), Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))])


def no_forecast(rows: int) -> Forecast:
    return Forecast(np.zeros((rows, 2)), np.zeros((rows, 2)))


class SteppingMarket:
    """A market model worked by hand: each step adds 1 to the signal, plus the noise; disagreement is the signal."""

    elites = (0, 2)
    fields = FIELDS

    def __init__(self) -> None:
        self.members: set[int] = set()

    def sample_next(self, features: torch.Tensor, member: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        self.members |= set(member.tolist())
        following = features.clone()
        following[:, :2] = 0.001 * noise[:, :2]
        following[:, 3] += 1
        return following

    def advance(
        self, features: torch.Tensor, member: torch.Tensor, noise: torch.Tensor, columns: list[int]
    ) -> tuple[torch.Tensor, Outlook]:
        seen = self.outlook(features)
        kept = Outlook(seen.mean[:, columns], seen.variance[:, columns], seen.disagreement)
        return self.sample_next(features, member, noise), kept

    def outlook(self, features: torch.Tensor) -> Outlook:
        mean = features.clone()
        mean[:, :2] = 0.0
        mean[:, 3] += 1
        return Outlook(mean, torch.full_like(features, 1e-6), features[:, 3])

    def disagreement(self, features: torch.Tensor) -> torch.Tensor:
        return self.outlook(features).disagreement

    def at_edge(self, features: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(features), dtype=torch.bool)
