"""A bundle to serve where none is given: of the default config and its sizes, untrained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces

from benchmarks.planner_tasks import untrained_market
from configs import config_hash
from configs.schema import DetentConfig, PlannerConfig
from data import Scaler
from data.features import FEATURE_FIELDS
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, TradingDynamics
from export import write_bundle
from masking.strict_policy import StrictMaskablePolicy
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy

EXACT = PlannerConfig(search="exhaustive", horizon=3, scenarios=320)
"""Tries every sequence of actions; its graph takes minutes to write and to prove."""
PARITY_STATES = 1_000


def make_bundle(destination: Path, planner: PlannerConfig | None = None) -> Path:
    """Write a bundle; None writes one without a planner. Raises: ParityError, ExportError, OSError."""
    config, rng = DetentConfig(), np.random.default_rng(0)
    names = tuple(field.name for field in FEATURE_FIELDS)
    dynamics = TradingDynamics.from_config(names, config)
    features = Scaler.fit(0.01 * rng.standard_normal((256, len(names))), names)
    scaler = Scaler.concat([features, Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))])
    market, policy = untrained_market(config), _policy(dynamics, config.mbpo.ppo.net_arch)
    search = None
    if planner is not None:
        value = TorchPolicy("value", policy, scaler)
        search = PlannerPolicy(dynamics, market, planner, seed=0, gamma=config.mbpo.ppo.gamma, value=value)
    info = write_bundle(
        destination,
        dynamics=dynamics,
        scaler=scaler,
        policy=policy,
        market_model=market,
        planner=search,
        fields=FEATURE_FIELDS,
        data_hash="0" * 64,
        config_hash=config_hash(config),
        git_commit="unknown",
        seeds={"policy": 0},
        parity_states=PARITY_STATES,
    )
    return info.path


def _policy(dynamics: TradingDynamics, net_arch: tuple[int, ...]) -> StrictMaskablePolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = StrictMaskablePolicy(
            spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32),
            spaces.Discrete(dynamics.num_actions),
            lr_schedule=lambda _: 0.0,
            net_arch=list(net_arch),
        )
        # A fresh action layer is nearly uniform; training spreads the logits.
        with torch.no_grad():
            policy.action_net.weight.mul_(100.0)
    policy.set_training_mode(False)
    return policy
