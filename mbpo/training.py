"""Training a masked PPO policy: the same loop for MBPO and for the model-free baseline.

Both come through `train_policy`, so masks, costs, validation and the choice of the best snapshot are equal by
construction; environment and PPO settings are each one's own. sb3-contrib's MaskablePPO is used unmodified.

With a `Checkpoint`, everything training depends on is written after each validation. A training that was killed and is
started again goes on from there and ends in the same weights, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO

from configs.section import PPOConfig
from data.files import canonical_json, sha256_bytes
from envs.vec_env import TradingVecEnv
from masking.strict_policy import StrictMaskablePolicy
from mbpo.checkpoint import Checkpoint, CheckpointError
from mbpo.learner_state import learner_state, restore_learner
from mbpo.policy import TorchPolicy
from mbpo.snapshots import Log, Progress, SnapshotCallback, TrainedPolicy, Validate, broken_weight
from mbpo.vec_env import MixedVecEnv


def train_policy(
    env: TradingVecEnv,
    config: PPOConfig,
    *,
    n_steps: int,
    seed: int,
    name: str,
    validate: Validate[TorchPolicy],
    log: Log | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainedPolicy[TorchPolicy]:
    """Train a policy and keep the snapshot with the best validation score.

    Args:
        env: real rows, or real and imagined ones (`MixedVecEnv`, which is re-branched before each rollout).
        n_steps: steps per row between updates; the rollout length H for `MixedVecEnv`.
        seed: of weights, action sampling and minibatch order.
        checkpoint: where training is kept after each validation, and gone on with if it was interrupted. Removing it in
            the end is the caller's, once the result is safe.

    Raises: FloatingPointError if a weight becomes NaN or infinite, with the place of the last good state; RuntimeError
        if the audit of executed actions, which is logged with each snapshot, finds a forbidden one; CheckpointError if
        the checkpoint is damaged or of another training.
    """
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
    if checkpoint is not None:
        settings = {"settings": config.model_dump(mode="json"), "n_steps": n_steps, "seed": seed, "name": name}
        key = sha256_bytes(canonical_json({"key": checkpoint.key, "rows": env.num_envs, **settings}).encode())
        checkpoint = replace(checkpoint, key=key)
    callback = _PPOCallback(
        TorchPolicy(name, model.policy, env.scaler),
        name=name,
        total_steps=config.total_steps,
        validations=config.validations,
        validate=validate,
        log=log,
        progress=progress,
        early_stopping=config.early_stopping,
        checkpoint=checkpoint,
    )
    return callback.train(model)


class _PPOCallback(SnapshotCallback[TorchPolicy]):
    # What MaskablePPO's loop is told: where branches start and what cut ones are worth, and when to save.

    def __init__(self, policy: TorchPolicy, *, checkpoint: Checkpoint | None, **settings: Any) -> None:
        super().__init__(policy, **settings)
        self.checkpoint = checkpoint
        self._saved_at: int | None = None

    def train(self, model: Any) -> TrainedPolicy[TorchPolicy]:
        if self.checkpoint is not None:
            self._resume(model, self.checkpoint)
        try:
            return super().train(model)
        except ValueError as error:
            # A policy of NaN is refused wherever it is asked first, often in the middle of an update.
            weight = broken_weight(model)
            if weight is None:
                raise
            raise self.diverged(weight) from error

    def diverged(self, weight: str) -> FloatingPointError:
        error = super().diverged(weight)
        if self.checkpoint is None or self._saved_at is None:
            return error
        return FloatingPointError(
            f"{error}; the last good state, after {self._saved_at} steps, with the best policy up to then, "
            f"is in {self.checkpoint.path}"
        )

    def _resume(self, model: MaskablePPO, checkpoint: Checkpoint) -> None:
        state = checkpoint.read()
        if state is None:
            return
        try:
            restore_learner(model, model.env, state["learner"])
            self.load_state_dict(state["snapshots"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path}: expected the state of this training: {error}") from error
        self.num_timesteps = self._saved_at = model.num_timesteps

    def _save(self) -> None:
        if self.checkpoint is not None:
            learner = learner_state(self.model, self._environment)
            self.checkpoint.write({"learner": learner, "snapshots": self.state_dict()})
            self._saved_at = self.num_timesteps

    def _on_rollout_start(self) -> None:
        self.refuse_broken_weights()
        due = self.num_timesteps >= self._next
        super()._on_rollout_start()
        if due:
            self._save()
        env = self._environment
        if isinstance(env, MixedVecEnv):
            self.model._last_obs = env.start_rollout(self._done, self.model.n_steps)  # type: ignore[attr-defined]
            starts = self.model._last_episode_starts
            if starts is not None:
                starts[env.num_real :] = True

    def _on_step(self) -> bool:
        self._bootstrap_truncated()
        return super()._on_step()

    def _on_rollout_end(self) -> None:
        env = self._environment
        if isinstance(env, MixedVecEnv):
            env.end_rollout(self._done)

    # sb3 would ask for the value of one truncated row at a time, 47 us each. It is told that none was truncated after
    # their values have been added to the rewards, which is what it does with them.
    def _bootstrap_truncated(self) -> None:
        infos, dones = self.locals["infos"], self.locals["dones"]
        rows = [row for row in np.flatnonzero(dones) if infos[row]["TimeLimit.truncated"]]
        if not rows:
            return
        last = torch.from_numpy(np.stack([infos[row]["terminal_observation"] for row in rows]))
        with torch.no_grad():
            values = self.policy.network.predict_values(last).squeeze(1).numpy()
        self.locals["rewards"][rows] += self.model.gamma * values  # type: ignore[attr-defined]
        for row in rows:
            infos[row]["TimeLimit.truncated"] = False

    @property
    def _done(self) -> float:
        return self.num_timesteps / self.total_steps

    def _rollout_metrics(self) -> dict[str, float]:
        env = self._environment
        return env.take_statistics() if isinstance(env, MixedVecEnv) else {}
