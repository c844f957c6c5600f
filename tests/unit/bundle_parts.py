"""Small hand-made parts of a bundle, the same in every test and in every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces

from configs.schema import PlannerConfig, RewardConfig, WorldModelConfig
from data import Field, Scaler
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, AccountRules, TradingDynamics
from export import BundleInfo, write_bundle
from masking import RULES, ActionTable, DrawdownLadder, RuleSet, register_rule, trading_rules
from masking.strict_policy import StrictMaskablePolicy
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy
from serving.drift.reference import DriftReference
from world_model import MarketModel
from world_model.marginals import next_row_nll
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser

FIELDS = (
    Field("gap_return", "market", "log return", -0.05, 0.05, "Close to open"),
    Field("intraday_return", "market", "log return", -0.05, 0.05, "Open to close"),
    Field("volatility_20", "market", "annualised", 0.0, 0.8, "Realised volatility"),
    Field("momentum", "signals", "log return", -0.3, 0.3, "Sixty bars"),
)


def make_dynamics(**limits: Any) -> TradingDynamics:
    actions, ladder = ActionTable(), DrawdownLadder()
    return TradingDynamics(
        tuple(field.name for field in FIELDS),
        AccountRules(ladder=ladder, actions=actions),
        RuleSet(trading_rules(ladder=ladder, paper=True, **limits), actions),
        RewardConfig(),
    )


def make_scaler() -> Scaler:
    return Scaler.with_fixed([*FIELDS, *ACCOUNT_FIELDS, UNCERTAINTY_FIELD])


def make_policy(
    dynamics: TradingDynamics, cls: type[StrictMaskablePolicy] = StrictMaskablePolicy, seed: int = 1
) -> StrictMaskablePolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = cls(
            spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32),
            spaces.Discrete(dynamics.num_actions),
            lr_schedule=lambda _: 0.0,
            net_arch=[64, 64],
        )
        # A fresh action layer is nearly uniform; spread the logits as training does.
        with torch.no_grad():
            policy.action_net.weight.mul_(200.0)
            policy.action_net.bias.uniform_(-1.0, 1.0)
    return policy


def make_market_model(fields: Sequence[Field] = FIELDS) -> MarketModel:
    generator = torch.Generator().manual_seed(2)
    size = len(FIELDS)
    config = WorldModelConfig(num_members=3, num_elites=2, hidden=(16, 16))
    spread = torch.tensor([0.01, 0.01, 0.2, 0.1])
    return MarketModel(
        fields,
        config,
        Normaliser(torch.zeros(size), spread),
        Normaliser(torch.zeros(size), spread / 10),
        EnsembleMLP(3, size, size, hidden=config.hidden, logvar_bounds=config.logvar_bounds, generator=generator),
        elites=(0, 2),
        support=(-spread * 5, spread * 5),
    )


def usual_rows(bars: int, seed: int = 0) -> np.ndarray:
    """Independent feature rows [bars, M], float32, whose changes are about as large as the market model expects."""
    rows = np.array([0.001, 0.001, 0.02, 0.01]) * np.random.default_rng(seed).standard_normal((bars, len(FIELDS)))
    return rows.astype(np.float32)


def make_drift(window: int = 12) -> DriftReference:
    rows = usual_rows(600)
    current, following = torch.from_numpy(rows[:-1]), torch.from_numpy(rows[1:])
    nll = next_row_nll(make_market_model(), current, following).mean(dim=1)
    return DriftReference.fit([field.name for field in FIELDS], rows, nll.numpy(), window=window)


def write(destination: Path, **changes: Any) -> BundleInfo:
    dynamics = changes.pop("dynamics", None) or make_dynamics()
    parts: dict[str, Any] = {
        "dynamics": dynamics,
        "scaler": make_scaler(),
        "policy": make_policy(dynamics),
        "market_model": make_market_model(),
        "drift": make_drift(),
        "fields": FIELDS,
        "data_hash": "d" * 64,
        "config_hash": "c" * 64,
        "git_commit": "0" * 40,
        "seeds": {"run": 7},
        "parity_states": 1000,
    }
    return write_bundle(destination, **{**parts, **changes})


def make_planner(config: PlannerConfig, **settings: Any) -> PlannerPolicy:
    """Plans with the value network of `make_policy`. Args: settings: of `make_dynamics`."""
    dynamics = make_dynamics(**settings)
    value = TorchPolicy("value", make_policy(dynamics), make_scaler())
    return PlannerPolicy(dynamics, make_market_model(), config, seed=0, gamma=0.97, value=value)


def write_planned(destination: Path, planner: PlannerPolicy | None = None) -> BundleInfo:
    """A bundle with a planner, by default one that looks one bar ahead."""
    planner = planner or make_planner(PlannerConfig(horizon=1, scenarios=4))
    assert planner.value is not None
    return write(
        destination,
        dynamics=planner.dynamics,
        policy=planner.value.network,
        market_model=planner.model,
        planner=planner,
        noise_tables=2,
    )


@dataclass(frozen=True, kw_only=True)
class Sideways:
    """Looks along an axis, which is another one where actions come first; forbids the largest target in a call."""

    fields: ClassVar[tuple[str, ...]] = ("position",)

    def __call__(self, state: Any) -> Any:
        target = state["target_position"]
        return target < (target.amax(1, keepdims=True) if isinstance(target, torch.Tensor) else target.max(1)[:, None])


@contextmanager
def sideways_dynamics() -> Iterator[TradingDynamics]:
    """Dynamics with that rule, which is registered inside only: modules of tests share one registry."""
    register_rule("sideways")(Sideways)
    try:
        dynamics = make_dynamics()
        yield dynamics.with_rule_set(RuleSet((*dynamics.rule_set.rules, Sideways()), dynamics.rule_set.actions))
    finally:
        del RULES["sideways"]
