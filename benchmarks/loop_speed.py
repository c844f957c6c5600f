"""How fast MBPO learns from imagination: collecting steps, updating the policy, and what the loop adds to both.

The very training of the suite (`contenders.train_mbpo`) on one simulated market, with stopwatches on its parts: nothing
is rebuilt for the benchmark, so nothing can be left out. Imagined market branches are generated once and reused: what
one imagined step used in training costs is its share of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks import contenders
from benchmarks.contenders import Progress, fit_world_model, silent, train_mbpo
from benchmarks.machine import library_versions, machine
from benchmarks.suite import Cell, lesson_of
from configs import DetentConfig, load_config
from mbpo.snapshots import SnapshotCallback
from mbpo.vec_env import MixedVecEnv

LIBRARIES = ("numpy", "sb3-contrib", "stable-baselines3", "torch")
COLLECT_GOAL, TRAIN_GOAL, OVERHEAD_GOAL = 100_000.0, 15_000.0, 0.1
OVERRIDES = (
    "mbpo.rollout_length=3",
    "mbpo.real_ratio=0",
    "mbpo.ppo.num_envs=4096",
    "mbpo.ppo.batch_size=3072",
    "mbpo.ppo.n_epochs=3",
    "mbpo.ppo.validations=1",
    "world_model.max_epochs=2",
)
"""The sizes of the goals; two epochs of the world model are enough to imagine with."""
SMOKE = (
    *OVERRIDES,
    "mbpo.branch_pool=256",
    "mbpo.ppo.num_envs=64",
    "mbpo.ppo.batch_size=96",
    "evaluation.suite.validation_paths=1",
    "world_model.hidden=[8, 8]",
)


@dataclass(frozen=True, kw_only=True)
class LoopReport:
    """Processor seconds of one training and its parts, one thread."""

    steps: int
    """Steps collected and learned from; all imagined."""
    envs: int
    horizon: int
    pool: int
    """Imagined bars generated before training."""
    imagine_s: float
    """Generating them."""
    env_s: float
    """Stepping the rows: look-up of the next bar, account, reward, masks, observation."""
    collect_s: float
    """Collecting: the rows and the policy's decisions."""
    update_s: float
    """MaskablePPO's updates."""
    other_s: float
    """What the loop adds: fresh branches, statistics, callbacks. Validation is not counted."""
    wall_s: float
    """Wall seconds of collecting and updating."""
    seed: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    @property
    def env_rate(self) -> float:
        """Imagined steps per second, the policy's decisions not counted."""
        return self.steps / self.env_s

    @property
    def collect_rate(self) -> float:
        """Imagined steps per second, the policy's decisions included."""
        return self.steps / self.collect_s

    @property
    def train_rate(self) -> float:
        """Steps per second, collected and learned from."""
        return self.steps / (self.collect_s + self.update_s + self.other_s)

    @property
    def overhead(self) -> float:
        """What the loop adds, as a share of PPO's own time."""
        return self.other_s / (self.collect_s + self.update_s)

    @property
    def reuse(self) -> float:
        """Times each bar of the pool was used."""
        return self.steps / self.pool

    @property
    def missed(self) -> tuple[str, ...]:
        """Goals that are missed."""
        found = {
            "collect": self.collect_rate >= COLLECT_GOAL,
            "train": self.train_rate >= TRAIN_GOAL,
            "overhead": self.overhead <= OVERHEAD_GOAL,
        }
        return tuple(name for name, reached in found.items() if not reached)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        derived = ("env_rate", "collect_rate", "train_rate", "overhead", "reuse", "missed")
        return {**asdict(self), "threads": 1, **{name: getattr(self, name) for name in derived}}


def measure_loop(
    config: DetentConfig | None = None, *, rollouts: int = 48, bars: int = 1250, progress: Progress = silent
) -> LoopReport:
    """Train for a number of rollouts on imagined rows alone.

    Args: config None takes the suite's with `OVERRIDES`; rollouts of `num_envs * rollout_length` steps; bars of the
        simulated training path.
    Raises: ValueError if there is no rollout.
    """
    if rollouts < 1:
        raise ValueError(f"rollouts: expected >= 1, was {rollouts}")
    config = config or load_config("suite", OVERRIDES)
    envs, horizon = config.mbpo.ppo.num_envs, config.mbpo.rollout_length
    steps = rollouts * envs * horizon
    ppo = config.mbpo.ppo.model_copy(update={"total_steps": steps})
    config = config.model_copy(update={"mbpo": config.mbpo.model_copy(update={"ppo": ppo})})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lesson = lesson_of(config, Cell("mbpo", bars))
        model = fit_world_model(lesson, silent)
        with ExitStack() as stack:
            watch = {
                name: stack.enter_context(_stopwatch(owner, method))
                for name, (owner, method) in {
                    "imagine": (contenders, "imagine_branches"),
                    "env": (MixedVecEnv, "step_wait"),
                    "collect": (MaskablePPO, "collect_rollouts"),
                    "update": (MaskablePPO, "train"),
                    "validate": (SnapshotCallback, "score_snapshot"),
                    "learn": (MaskablePPO, "learn"),
                    "before": (BaseCallback, "on_rollout_start"),
                    "after": (BaseCallback, "on_rollout_end"),
                }.items()
            }
            train_mbpo(lesson, model, progress)
    finally:
        torch.set_num_threads(threads)
    spent = {name: sum(processor for _, processor in laps) for name, laps in watch.items()}
    # A snapshot that falls due while learning is scored before a rollout; the last one comes after `learn`.
    inside = sum(processor for _, processor in watch["validate"][:-1])
    between = spent["before"] + spent["after"] - inside
    # sb3 calls them while it collects.
    collected = spent["collect"] - spent["before"] - spent["after"]
    rows = len(lesson.train.values)
    return LoopReport(
        steps=steps,
        envs=envs,
        horizon=horizon,
        pool=max(config.mbpo.branch_pool // rows, 1) * rows * horizon,
        imagine_s=spent["imagine"],
        env_s=spent["env"],
        collect_s=collected,
        update_s=spent["update"],
        other_s=between + spent["learn"] - spent["collect"] - spent["update"],
        wall_s=sum(wall for wall, _ in (*watch["collect"], *watch["update"])),
        seed=lesson.config.seed,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


# Wall and processor seconds of every call of a function while the block runs.
@contextmanager
def _stopwatch(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    original: Callable[..., Any] = getattr(owner, name)
    laps: list[tuple[float, float]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            laps.append((time.perf_counter() - wall, time.process_time() - processor))

    with mock.patch.object(owner, name, timed):
        yield laps
