"""Snapshots on the way: every learner is validated at even intervals and its best weights are kept, not its last.

One callback for all learners, so that none gets more looks at the validation window than another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

PolicyT = TypeVar("PolicyT")
"""The decision function a learner hands over: `name`, and `act(state, action_masks)`."""

Validate = Callable[[PolicyT], Mapping[str, float]]
"""Scores a policy on the validation window; must contain the key `score`, higher is better."""

Log = Callable[[Mapping[str, float], int], None]
"""Receives metrics and the number of environment steps so far."""

Progress = Callable[[int, int], None]
"""Receives steps done and steps in all."""


@dataclass
class TrainedPolicy(Generic[PolicyT]):
    """The snapshot that scored best on validation, and how training went."""

    policy: PolicyT
    best_step: int
    best_score: float
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


class _StoppedEarly(Exception):  # noqa: N818 - a way out of the learner's loop, not an error
    pass


class SnapshotCallback(BaseCallback, Generic[PolicyT]):
    """Validates at even intervals and keeps the best weights.

    Args:
        policy: decides with the learner's current weights.
        total_steps: environment steps in all; validations: how many snapshots are scored on the way.
        early_stopping: validations in a row without a better score that end training; 0 never does.

    Raises: FloatingPointError if a weight becomes NaN or infinite; RuntimeError if the audit of executed actions, which
        is logged with each snapshot, finds a forbidden one.
    """

    def __init__(
        self,
        policy: PolicyT,
        *,
        name: str,
        total_steps: int,
        validations: int,
        validate: Validate[PolicyT],
        log: Log | None,
        progress: Progress | None,
        early_stopping: int = 0,
    ) -> None:
        super().__init__()
        self.policy, self.name, self.total_steps = policy, name, total_steps
        self._validate, self._log, self._progress = validate, log, progress
        self._early_stopping = early_stopping
        self._interval = max(total_steps // validations, 1)
        self._next = self._interval
        self._last_scored = -1
        self.best_score, self.best_step = -math.inf, 0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, float]] = []
        self._clock = (0, time.perf_counter())

    def train(self, model: BaseAlgorithm) -> TrainedPolicy[PolicyT]:
        """Run the learner to its last step, or from where it stands to there, and put its best weights back."""
        # Without this sb3 makes a folder for its own logs among the temporary files.
        model.set_logger(Logger(folder=None, output_formats=[]))
        begun = model.num_timesteps
        self._clock = (begun, time.perf_counter())
        with suppress(_StoppedEarly):
            model.learn(self.total_steps - begun, callback=self, reset_num_timesteps=not begun)
        self.score_snapshot()
        model.policy.load_state_dict(self.best_weights)
        return TrainedPolicy(self.policy, self.best_step, self.best_score, model.num_timesteps, self.history)

    def score_snapshot(self) -> None:
        """Validate the current weights and keep them if they are the best so far."""
        if self._last_scored == self.num_timesteps:
            return
        self._last_scored = self.num_timesteps
        begun, began = self._clock
        seconds = time.perf_counter() - began
        self.refuse_broken_weights()
        metrics = dict(self._validate(self.policy))
        score = metrics["score"]
        audit = self._environment.audit
        metrics |= self._rollout_metrics() | audit.as_metrics()
        if audit.invalid:
            raise RuntimeError(f"{self.name}: expected 0 executed actions that their mask forbids, was {audit}")
        # sb3's logger keeps the newest value of each training statistic by name.
        losses = {
            key.split("/")[-1]: float(value) for key, value in self.logger.name_to_value.items() if "train/" in key
        }
        # JSON has no NaN: explained variance, for one, is undefined while all returns are equal.
        finite = {key: float(value) for key, value in {**metrics, **losses}.items() if math.isfinite(value)}
        self.history.append({"step": float(self.num_timesteps), **finite})
        # Not in the history, which is the same whenever and wherever the training is repeated.
        self._report(self.history[-1], steps_per_second=(self.num_timesteps - begun) / seconds)
        if not self.best_weights or score > self.best_score or math.isnan(self.best_score):
            self.best_score, self.best_step = score, self.num_timesteps
            weights = self.model.policy.state_dict()
            self.best_weights = {key: value.detach().clone() for key, value in weights.items()}
        self._clock = (self.num_timesteps, time.perf_counter())

    def refuse_broken_weights(self) -> None:
        """Raise FloatingPointError where a weight is NaN or infinite."""
        broken = broken_weight(self.model)
        if broken:
            raise self.diverged(broken)

    def diverged(self, weight: str) -> FloatingPointError:
        """The error that names a broken weight."""
        return FloatingPointError(f"{self.name}: expected finite weights, {weight} is not after {self.num_timesteps}")

    def state_dict(self) -> dict[str, Any]:
        """Scores, history and best weights so far, as a tree of arrays, tensors and JSON values."""
        return {
            "next": self._next,
            "last_scored": self._last_scored,
            "best_score": np.array(self.best_score),  # JSON has no NaN
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; what was logged then is logged again."""
        self._next, self._last_scored = state["next"], state["last_scored"]
        self.best_score, self.best_step = float(state["best_score"]), state["best_step"]
        self.best_weights = {name: torch.from_numpy(array) for name, array in state["best_weights"].items()}
        self.history = state["history"]
        for entry in self.history:
            self._report(entry)

    def _report(self, entry: Mapping[str, float], **more: float) -> None:
        if self._log is not None:
            self._log({key: value for key, value in entry.items() if key != "step"} | more, int(entry["step"]))

    @property
    def _environment(self) -> Any:
        # Behind any wrapper, which has the audit and the rows.
        return self.training_env.unwrapped

    def _rollout_metrics(self) -> dict[str, float]:
        # What else an environment knows about the steps since the last snapshot.
        return {}

    def _on_rollout_start(self) -> None:
        # The previous update is complete here, so this is where a snapshot is whole.
        if self.num_timesteps >= self._next:
            self.score_snapshot()
            self._next += self._interval
            since_best = sum(entry["step"] > self.best_step for entry in self.history)
            if self._early_stopping and since_best >= self._early_stopping:
                raise _StoppedEarly

    def _on_step(self) -> bool:
        if self._progress is not None:
            self._progress(min(self.num_timesteps, self.total_steps), self.total_steps)
        return True


def broken_weight(model: BaseAlgorithm) -> str | None:
    """Name of a weight that is NaN or infinite."""
    weights = model.policy.state_dict()
    return next((key for key, value in weights.items() if not bool(torch.isfinite(value).all())), None)
