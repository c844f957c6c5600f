"""Training a masked PPO policy: the same loop for MBPO and for the model-free baseline.

Both come through `train_policy`, so masks, costs, validation and the choice of the best snapshot are equal by
construction; environment and PPO settings are each one's own. sb3-contrib's MaskablePPO is used unmodified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from configs.schema import PPOConfig
from envs.vec_env import TradingVecEnv
from masking.strict_policy import StrictMaskablePolicy
from mbpo.policy import TorchPolicy
from mbpo.vec_env import MixedVecEnv

Validate = Callable[[TorchPolicy], Mapping[str, float]]
"""Scores a policy on the validation window; must contain the key `score`, higher is better."""

Log = Callable[[Mapping[str, float], int], None]
"""Receives metrics and the number of environment steps so far."""

Progress = Callable[[int, int], None]
"""Receives steps done and steps in all."""


@dataclass
class TrainedPolicy:
    """The snapshot that scored best on validation, and how training went."""

    policy: TorchPolicy
    best_step: int
    best_score: float
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


def train_policy(
    env: TradingVecEnv,
    config: PPOConfig,
    *,
    n_steps: int,
    seed: int,
    name: str,
    validate: Validate,
    log: Log | None = None,
    progress: Progress | None = None,
) -> TrainedPolicy:
    """Train a policy and keep the snapshot with the best validation score.

    Args:
        env: real rows, or real and imagined ones (`MixedVecEnv`, which is re-branched before each rollout).
        n_steps: steps per row between updates; the rollout length H for `MixedVecEnv`.
        seed: of weights, action sampling and minibatch order.

    Raises: FloatingPointError if a weight becomes NaN or infinite; ValueError if `n_steps` exceeds H; RuntimeError if
        the audit of executed actions, which is logged with each snapshot, finds a forbidden one.
    """
    if isinstance(env, MixedVecEnv) and n_steps > env.branches.horizon:
        raise ValueError(f"n_steps: expected at most the rollout length {env.branches.horizon}, was {n_steps}")
    model = MaskablePPO(
        StrictMaskablePolicy,
        env,
        learning_rate=config.learning_rate,
        n_steps=n_steps,
        batch_size=min(config.batch_size, n_steps * env.num_envs),
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef,
        clip_range=config.clip_range,
        policy_kwargs={"net_arch": list(config.net_arch)},
        seed=seed,
        device="cpu",
        verbose=0,
    )
    # Without this sb3 makes a folder for its own logs among the temporary files.
    model.set_logger(Logger(folder=None, output_formats=[]))
    callback = _TrainingCallback(config, name, validate, log, progress)
    model.learn(config.total_steps, callback=callback)
    callback.score_snapshot()
    model.policy.load_state_dict(callback.best_weights)
    return TrainedPolicy(
        TorchPolicy(name, model.policy, env.scaler),
        callback.best_step,
        callback.best_score,
        model.num_timesteps,
        callback.history,
    )


class _TrainingCallback(BaseCallback):
    # Re-branches imagined rows, validates at even intervals, keeps the best weights.

    def __init__(
        self, config: PPOConfig, name: str, validate: Validate, log: Log | None, progress: Progress | None
    ) -> None:
        super().__init__()
        self.config, self.name = config, name
        self._validate, self._log, self._progress = validate, log, progress
        self._interval = max(config.total_steps // config.validations, 1)
        self._next = self._interval
        self._last_scored = -1
        self.best_score, self.best_step = -math.inf, 0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, float]] = []

    def _on_rollout_start(self) -> None:
        # The previous update is complete here, so this is where a snapshot is whole.
        if self.num_timesteps >= self._next:
            self.score_snapshot()
            self._next += self._interval
        env = self.training_env
        if isinstance(env, MixedVecEnv):
            self.model._last_obs = env.rebranch()
            starts = self.model._last_episode_starts
            if starts is not None:
                starts[env.num_real :] = True

    def _on_step(self) -> bool:
        if self._progress is not None:
            self._progress(min(self.num_timesteps, self.config.total_steps), self.config.total_steps)
        return True

    def score_snapshot(self) -> None:
        """Validate the current weights and keep them if they are the best so far."""
        if self._last_scored == self.num_timesteps:
            return
        self._last_scored = self.num_timesteps
        weights = self.model.policy.state_dict()
        broken = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise FloatingPointError(
                f"{self.name}: expected finite weights, {broken[0]} is not after {self.num_timesteps}"
            )
        env: Any = self.training_env
        metrics = dict(
            self._validate(TorchPolicy(self.name, cast(StrictMaskablePolicy, self.model.policy), env.scaler))
        )
        score = metrics["score"]
        if isinstance(env, MixedVecEnv):
            metrics |= env.take_statistics()
        metrics |= env.audit.as_metrics()
        if env.audit.invalid:
            raise RuntimeError(f"{self.name}: expected 0 executed actions that their mask forbids, was {env.audit}")
        # sb3's logger keeps the newest value of each training statistic by name.
        losses = {
            key.split("/")[-1]: float(value) for key, value in self.logger.name_to_value.items() if "train/" in key
        }
        # JSON has no NaN: explained variance, for one, is undefined while all returns are equal.
        finite = {key: float(value) for key, value in {**metrics, **losses}.items() if math.isfinite(value)}
        self.history.append({"step": float(self.num_timesteps), **finite})
        if self._log is not None:
            self._log({key: value for key, value in self.history[-1].items() if key != "step"}, self.num_timesteps)
        if not self.best_weights or score > self.best_score:
            self.best_score, self.best_step = score, self.num_timesteps
            self.best_weights = {key: value.detach().clone() for key, value in weights.items()}
