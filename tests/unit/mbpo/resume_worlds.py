"""Trainings small enough to be interrupted in many places; run as a script, one that waits to be killed.

`python resume_worlds.py KIND PATH` trains KIND (mbpo or model_free) with its checkpoint at PATH and prints a line for
each validation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mbpo_worlds import SteppingMarket, make_dynamics, make_features, make_scaler

from configs.schema import PenaltyScheduleConfig, PPOConfig
from envs.vec_env import HistoryVecEnv, TradingVecEnv
from mbpo import (
    Checkpoint,
    MixedVecEnv,
    StartBuffer,
    TorchPolicy,
    TrainedPolicy,
    historical_forecast,
    imagine_market,
    train_policy,
)
from mbpo.penalty import penalty_schedule
from mbpo.ramp import Ramp

FEATURES = make_features(200)
DYNAMICS = make_dynamics(min_holding_bars=0, max_position_change=2.0)
SCALER = make_scaler(FEATURES)
# Rollouts of 4 steps and a validation after every second one.
SMALL = PPOConfig(
    total_steps=768, num_envs=16, n_steps=4, batch_size=48, n_epochs=2, learning_rate=1e-3, net_arch=(8,),
    validations=6,
)  # fmt: skip

Weights = dict[str, torch.Tensor]


def build(kind: str) -> TradingVecEnv:
    if kind == "model_free":
        return HistoryVecEnv(DYNAMICS, SCALER, FEATURES, num_envs=16, episode_bars=20, seed=3)
    branches = imagine_market(
        SteppingMarket(),  # type: ignore[arg-type]
        FEATURES,
        horizon=4,
        branches_per_row=2,
        generator=torch.Generator().manual_seed(0),
    )
    branches.supported[::5] = False
    rows = np.arange(0, 190, 10)
    states = np.zeros((len(rows), len(DYNAMICS.state_names)), np.float32)
    states[:, :4] = FEATURES[rows]
    return MixedVecEnv(
        DYNAMICS,
        SCALER,
        FEATURES,
        np.linspace(0.0, 0.2, len(FEATURES)),
        historical_forecast(SteppingMarket(), FEATURES),  # type: ignore[arg-type]
        branches,
        StartBuffer(rows, states, capacity=300),
        num_envs=16,
        real_ratio=0.5,
        penalty_coef=0.1,
        control_variate=1.0,
        episode_bars=20,
        seed=3,
        penalty=penalty_schedule(PenaltyScheduleConfig(kind="reward_gap", step_size=0.5), 0.1),
        lengths=Ramp(1, 4, 0.0, 0.5),
        risk_aversion=Ramp(1.0, 9.0, 0.0, 0.8),
    )


def train(
    kind: str,
    path: Path | None = None,
    config: PPOConfig = SMALL,
    seen: dict[int, Weights] | None = None,
    score: Callable[[int], float] | None = None,
    **options: Any,
) -> tuple[TrainedPolicy[TorchPolicy], dict[int, Weights]]:
    """Train, and return the weights at each validation by the number of steps so far; they are added to `seen`.

    Args: score of a number of steps; None is a sum of weights, which neither rises nor falls throughout.
    """
    seen = {} if seen is None else seen
    env = build(kind)

    def validate(policy: TorchPolicy) -> Mapping[str, float]:
        steps = env.audit.executed
        weights = seen[steps] = {name: value.clone() for name, value in policy.network.state_dict().items()}
        print(steps, flush=True)  # noqa: T201 - what the test waits for
        return {"score": float(weights["action_net.weight"].sum()) if score is None else score(steps)}

    checkpoint = None if path is None else Checkpoint(path, "key")
    trained = train_policy(
        env, config, n_steps=4, seed=5, name=kind, validate=validate, checkpoint=checkpoint, **options
    )
    return trained, seen


ENDLESS = SMALL.model_copy(update={"total_steps": 10**9, "validations": 10**9 // 128})
"""Validated as often, and never done."""


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), ENDLESS)
