"""Walk-forward over real bars: every policy learns on the past, chooses on the next stretch and is judged on the one
after, fold by fold, each fold's account starting flat.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.comparison import METRICS, Walked
from benchmarks.contenders import LEARNERS, Lesson, settings_of, silent
from benchmarks.folds import FoldResult, FoldTask
from benchmarks.suite import judge, source_hash
from configs import DetentConfig
from data import LOOKBACK, FeatureTable, Field, HistoryError, Split, walk_forward_splits
from envs.panel import FeaturePanel


def plan_folds(config: DetentConfig, num_rows: int) -> list[Split]:
    """The folds of `data.split`, oldest first, with purge and embargo.

    Raises: HistoryError if no fold fits, or if test windows overlap: a bar judged twice would count twice.
    """
    split, walk = config.data.split, config.evaluation.walk_forward
    if split.step_years < split.test_years:
        raise HistoryError(
            f"data.split.step_years: expected at least test_years={split.test_years:g}, or test windows overlap and "
            f"their bars count twice, was {split.step_years:g}"
        )
    purge = LOOKBACK + config.mbpo.rollout_length
    folds = walk_forward_splits(num_rows, split, config.data.bars_per_year, purge, embargo=walk.embargo_bars)
    return folds if walk.max_folds is None else folds[-walk.max_folds :]


def fold_tasks(config: DetentConfig, table: FeatureTable, data_hash: str) -> list[FoldTask]:
    """One task per fold, learner and training run; those that do not learn run once per fold."""
    common = config.model_dump(mode="json", include={"limits", "account", "reward", "env"})
    version = source_hash()
    tasks = []
    for number, fold in enumerate(plan_folds(config, len(table))):
        for learner in ("references", *config.evaluation.walk_forward.learners):
            for run in range(1 if learner == "references" else config.evaluation.walk_forward.num_seeds):
                seeded = config.model_copy(update={"seed": config.seed + run})
                windows = {name: [window.start, window.stop] for name, window in asdict(fold).items()}
                identity = {
                    "fold": windows,
                    "learner": learner,
                    "run": run,
                    "seed": seeded.seed,
                    "settings": {**common, **settings_of(config, learner)},
                    "bars_per_year": config.data.bars_per_year,
                    "data": data_hash,
                    "version": version,
                }
                label = f"fold {number + 1}, {learner}, run {run + 1}"
                tasks.append(FoldTask(label, identity, (seeded, table, fold, learner, number)))
    return tasks


def work_on_fold(task: FoldTask) -> dict[str, Any]:
    """Fit one learner on a fold and walk its policies over the test window; see `benchmarks.suite.work_on_cell`."""
    config, table, fold, learner, number = task.payload
    lesson = Lesson(
        config=config,
        train=table.rows(fold.train),
        validation=panel_of(table.rows(fold.validation)),
        bars_per_year=config.data.bars_per_year,
        lookback=LOOKBACK,
        score="reward_per_bar",
    )
    started = time.perf_counter()
    fitted = LEARNERS[learner](lesson, silent)
    seconds = time.perf_counter() - started
    test = panel_of(table.rows(fold.test))
    output: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name, one in fitted.items():
        walked = judge(config, one, lesson.dynamics, test, bars_per_year=config.data.bars_per_year)
        output |= {f"{name}.{key}": value for key, value in walked.items()}
        facts[name] = {"family": one.family, "notes": dict(one.notes), "fit_seconds": seconds, "fold": number}
    return {**output, "facts": facts}


def panel_of(table: FeatureTable) -> FeaturePanel:
    """A table as a panel of one market."""
    times = table.timestamps.tz_convert("UTC").tz_localize(None).to_numpy()
    fields: tuple[Field, ...] = table.fields
    return FeaturePanel(times, fields, table.values[None])


def join_folds(results: Sequence[FoldResult], tasks: Sequence[FoldTask]) -> dict[str, Walked]:
    """Every policy over all folds: returns are joined to one path [S, 1, n], metrics stay apart by fold [S, F]."""
    runs: dict[str, dict[int, dict[int, tuple[dict[str, Any], dict[str, Any]]]]] = {}
    for result, task in zip(results, tasks, strict=True):
        number, run = task.payload[-1], int(task.identity["run"])
        for name, facts in result.values["facts"].items():
            prefix = f"{name}."
            arrays = {key.removeprefix(prefix): value for key, value in result.arrays.items() if key.startswith(prefix)}
            runs.setdefault(name, {}).setdefault(run, {})[number] = (arrays, facts)
    return {name: _joined(name, by_run) for name, by_run in runs.items()}


def _joined(name: str, by_run: dict[int, dict[int, tuple[dict[str, Any], dict[str, Any]]]]) -> Walked:
    rows = [[by_fold[number] for number in sorted(by_fold)] for _, by_fold in sorted(by_run.items())]
    cells = [cell for row in rows for cell in row]
    scores = [facts["notes"].get("validation_score", np.nan) for _, facts in cells]
    return Walked(
        name=name,
        family=cells[0][1]["family"],
        train_bars=0,
        returns=np.stack([np.concatenate([arrays["returns"] for arrays, _ in row], axis=1) for row in rows]),
        metrics={key: np.array([[float(arrays[key][0]) for arrays, _ in row] for row in rows]) for key in METRICS},
        decision_ms=np.concatenate([arrays["decision_ms"] for arrays, _ in cells]),
        invalid_actions=int(sum(int(arrays["invalid_actions"].sum()) for arrays, _ in cells)),
        validation_score=float(np.mean(scores)),
        fit_seconds=float(np.mean([facts["fit_seconds"] for _, facts in cells])),
    )
