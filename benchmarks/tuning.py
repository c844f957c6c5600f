"""Settings of a learner tried on validation markets, on training paths that the suite does not use.

The first trial is the settings in force; the others are drawn from the learner's grid. How many were tried goes into
`evaluation.suite.trials`, so that the deflated Sharpe ratio counts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from benchmarks.contenders import LEARNERS, settings_of, shared_settings, silent
from benchmarks.folds import FoldResult, FoldTask
from benchmarks.suite import NOT_IN_CELLS, Cell, lesson_of, source_hash
from configs import ConfigError, DetentConfig

TUNING_RUNS = 50_000
"""Training runs of the tuning are numbered from here on: paths that no run of the suite learns on."""

GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "model_free": {
        "model_free.total_steps": (300_000, 600_000, 1_200_000, 2_400_000),
        "model_free.learning_rate": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "model_free.ent_coef": (0.0, 0.003, 0.01, 0.03),
        "model_free.gamma": (0.8, 0.9, 0.95, 0.97, 0.99),
        "model_free.gae_lambda": (0.8, 0.95, 1.0),
        "model_free.net_arch": ((32, 32), (64, 64)),
        "model_free.n_epochs": (3, 5, 10),
        "model_free.batch_size": (512, 1024, 3072),
    },
    "sac": {
        "evaluation.sac.total_steps": (50_000, 100_000, 200_000),
        "evaluation.sac.learning_rate": (1e-4, 3e-4, 1e-3),
        "evaluation.sac.gamma": (0.8, 0.9, 0.97, 0.99),
        "evaluation.sac.gradient_steps": (2, 4, 8),
    },
    "masked_dqn": {
        "evaluation.dqn.total_steps": (100_000, 200_000, 400_000),
        "evaluation.dqn.learning_rate": (1e-4, 2e-4, 5e-4),
        "evaluation.dqn.gamma": (0.8, 0.9, 0.97, 0.99),
        "evaluation.dqn.gradient_steps": (2, 4, 8),
    },
    "mbpo": {
        "mbpo.ppo.total_steps": (600_000, 1_200_000),
        "mbpo.ppo.num_envs": (512, 2048),
        "mbpo.ppo.learning_rate": (5e-4, 1e-3, 2e-3),
        "mbpo.ppo.ent_coef": (0.0, 0.003, 0.01),
        "mbpo.ppo.gamma": (0.9, 0.97, 0.99),
        "mbpo.ppo.gae_lambda": (0.8, 0.95, 1.0),
        "mbpo.ppo.n_epochs": (3, 5),
        "mbpo.ppo.batch_size": (1024, 3072),
        "mbpo.rollout_length": (1, 3, 5),
        "mbpo.penalty_coef": (0.0, 0.05, 0.1),
        "mbpo.real_ratio": (0.0, 0.25, 0.5),
        "mbpo.usual_position": (0.5, 0.7, 1.0),
    },
}
"""Values tried for each learner; rule and forecast policies search a grid of their own in every fit."""


@dataclass(frozen=True)
class Trial:
    """One setting and what it was worth."""

    settings: dict[str, Any]
    """Dotted path -> value; empty for the settings in force."""
    scores: tuple[float, ...]
    """Best validation score of each tuning run; NaN where none exists."""
    seconds: float
    """Mean time of a fit."""

    @property
    def score(self) -> float:
        """Mean over runs; NaN if one has none."""
        return float(np.mean(self.scores))


def draw_trials(learner: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different settings of a learner's grid, the settings in force first.

    Raises: ConfigError on a learner without a grid, or more trials than the grid has.
    """
    if learner not in GRIDS:
        raise ConfigError(f"--tune: expected one of {', '.join(GRIDS)}, was {learner!r}")
    grid = GRIDS[learner]
    size = math.prod(len(values) for values in grid.values())
    if not 1 <= count <= size:
        raise ConfigError(f"--trials: expected 1 to {size} for {learner}, was {count}")
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, Any]] = [{}]
    while len(drawn) < count:
        trial = {name: values[int(rng.integers(len(values)))] for name, values in grid.items()}
        if trial not in drawn:
            drawn.append(trial)
    return drawn


def tuning_tasks(
    config: DetentConfig, learner: str, trials: Sequence[Mapping[str, Any]], *, train_bars: int, runs: int
) -> list[FoldTask]:
    """One task per trial and run."""
    tasks = []
    version = source_hash("benchmarks/tuning.py")
    suite = config.evaluation.suite.model_dump(mode="json", exclude=set(NOT_IN_CELLS))
    markets = {"market": config.evaluation.market.model_dump(mode="json"), "suite": suite}
    common = shared_settings(config)
    for number, settings in enumerate(trials):
        tried = with_settings(config, settings)
        for run in range(runs):
            cell = Cell(learner, train_bars, TUNING_RUNS + run)
            identity = {
                "tuning": learner,
                "train_bars": train_bars,
                "run": run,
                "settings": {**common, **markets, **settings_of(tried, learner)},
                "version": version,
                # Two trials may agree in every value that counts; they are still two trials.
                "trial": number,
            }
            tasks.append(FoldTask(f"{learner}, trial {number + 1}, run {run + 1}", identity, (tried, cell)))
    return tasks


def work_on_trial(task: FoldTask) -> dict[str, Any]:
    """Fit one trial once. Returns: `score` [1], the best on validation."""
    config, cell = task.payload
    fitted = LEARNERS[cell.learner](lesson_of(config, cell), silent)
    # An array, since a score may be NaN, which JSON has not.
    return {"score": np.array([fitted[cell.learner].notes["validation_score"]])}


def rank_trials(trials: Sequence[Mapping[str, Any]], results: Sequence[FoldResult]) -> list[Trial]:
    """Trials, best mean score first, those without one last.

    Args: results of `tuning_tasks`, in their order.
    Raises: ValueError unless every trial has the same number of results.
    """
    if not trials or not results or len(results) % len(trials):
        raise ValueError(f"results: expected as many for each of {len(trials)} trials, was {len(results)} in all")
    runs = len(results) // len(trials)
    joined = []
    for number, settings in enumerate(trials):
        mine = results[number * runs : (number + 1) * runs]
        scores = tuple(float(result.arrays["score"][0]) for result in mine)
        joined.append(Trial(dict(settings), scores, float(np.mean([result.seconds for result in mine]))))
    return sorted(joined, key=lambda trial: -trial.score if math.isfinite(trial.score) else math.inf)


def with_settings(config: DetentConfig, settings: Mapping[str, Any]) -> DetentConfig:
    """The config with values replaced by dotted path, validated again.

    Raises: ConfigError on a path that does not exist, or a value that is not allowed.
    """
    values = config.model_dump()
    for path, value in settings.items():
        *parents, leaf = path.split(".")
        section: Any = values
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            raise ConfigError(f"{path}: expected the path of a setting, `detent config show` lists them all")
        section[leaf] = value
    try:
        return DetentConfig.model_validate(values)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}, was {one['input']!r}" for one in error.errors()]
        raise ConfigError("\n".join(said)) from error
