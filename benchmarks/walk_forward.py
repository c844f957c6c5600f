"""Walk-forward over real bars: every policy learns on the past, chooses on the next stretch and is judged on the one
after, fold by fold, each fold's account starting flat.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.comparison import METRICS, Arrays, Walked, arrays_of, gather
from benchmarks.contenders import LEARNERS, Lesson, check_learners, settings_of, shared_settings, silent
from benchmarks.folds import FoldResult, FoldTask
from benchmarks.suite import judge, source_hash
from configs import DetentConfig
from data import LOOKBACK, DataError, FeatureTable, Field, HistoryError, Split, walk_forward_splits
from envs.panel import FeaturePanel

Run = tuple[Arrays, Mapping[str, Any]]
"""Arrays and facts of one policy, as `benchmarks.comparison.gather` takes them."""


def plan_folds(config: DetentConfig, num_rows: int) -> list[Split]:
    """The folds of `data.split`, oldest first, with purge and embargo.

    Raises: HistoryError if no fold fits, or if test windows overlap: a bar judged twice would count twice.
    """
    split, walk = config.data.split, config.evaluation.walk_forward
    purge = LOOKBACK + config.mbpo.rollout_length
    folds = walk_forward_splits(num_rows, split, config.data.bars_per_year, purge, embargo=walk.embargo_bars)
    kept = folds if walk.max_folds is None else folds[-walk.max_folds :]
    if any(later.test.start < earlier.test.stop for earlier, later in pairwise(kept)):
        raise HistoryError(
            f"data.split.step_years: expected at least test_years={split.test_years:g}, or test windows overlap and "
            f"their bars count twice, was {split.step_years:g}"
        )
    return kept


def fold_tasks(config: DetentConfig, table: FeatureTable, data_hash: str) -> list[FoldTask]:
    """One task per fold, learner and training run; those that do not learn run once per fold.

    Raises: HistoryError as `plan_folds`; DataError on prices that do not move; ConfigError on learners that do not
        exist, or that leave the claim without one of its sides.
    """
    evaluation = config.evaluation
    check_learners("evaluation.walk_forward.learners", evaluation.walk_forward.learners, evaluation.verdict.challenger)
    common = shared_settings(config)
    version = source_hash("benchmarks/walk_forward.py")
    tasks = []
    for number, fold in enumerate(plan_folds(config, len(table))):
        _refuse_still_prices(table, fold, number)
        for learner in ("references", *evaluation.walk_forward.learners):
            for run in range(1 if learner == "references" else evaluation.walk_forward.num_seeds):
                seeded = config.model_copy(update={"seed": config.seed + run})
                windows = {name: [window.start, window.stop] for name, window in asdict(fold).items()}
                identity = {
                    "fold": windows,
                    "learner": learner,
                    "run": run,
                    "seed": seeded.seed,
                    "settings": {**common, **settings_of(config, learner)},
                    "bars_per_year": config.data.bars_per_year,
                    "timed_decisions": evaluation.suite.timed_decisions,
                    "data": data_hash,
                    "version": version,
                }
                label = f"fold {number + 1}, {learner}, run {run + 1}"
                tasks.append(FoldTask(label, identity, (seeded, table, fold, learner, number)))
    return tasks


def _refuse_still_prices(table: FeatureTable, fold: Split, number: int) -> None:
    moves = table.values[:, table.index("gap_return")] + table.values[:, table.index("intraday_return")]
    for name, window in asdict(fold).items():
        if np.ptp(moves[window]) == 0.0:
            times = table.timestamps[window]
            raise DataError(
                f"fold {number + 1}, {name} window {times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d}: expected prices that "
                f"move, was the same return on every bar"
            )


def work_on_fold(task: FoldTask) -> dict[str, Any]:
    """Fit one learner on a fold and walk its policies over the test window; see `benchmarks.suite.work_on_cell`."""
    config, table, fold, learner, _ = task.payload
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
        facts[name] = one.facts(seconds)
    return {**output, "facts": facts}


def panel_of(table: FeatureTable) -> FeaturePanel:
    """A table as a panel of one market."""
    times = table.timestamps.tz_convert("UTC").tz_localize(None).to_numpy()
    fields: tuple[Field, ...] = table.fields
    return FeaturePanel(times, fields, table.values[None])


def join_folds(results: Sequence[FoldResult], tasks: Sequence[FoldTask]) -> dict[str, Walked]:
    """Every policy over all folds: returns are joined to one path [S, 1, n], metrics stay apart by fold [S, F]."""
    # In order of run and of time: runs of two policies are compared in pairs.
    return {
        name: gather(name, [_over_folds(by_fold) for _, by_fold in sorted(by_run.items())])
        for name, by_run in _by_policy(results, tasks).items()
    }


def first_runs(results: Sequence[FoldResult], tasks: Sequence[FoldTask]) -> dict[str, Arrays]:
    """What every policy did in its first training run.

    Returns: by policy `position` [closes of all test windows]; `actions` [n] and `rule_states` [n, F] of the newest
        fold alone; where there is a world model, `pit` [N, M] and `coverage` [3] over the validation windows.
    """
    return {
        name: _first_run([arrays for _, (arrays, _) in sorted(by_run[min(by_run)].items())])
        for name, by_run in _by_policy(results, tasks).items()
    }


def _first_run(folds: Sequence[Arrays]) -> Arrays:
    newest = folds[-1]
    first = {
        "position": np.concatenate([arrays["position"] for arrays in folds]),
        "actions": newest["actions"],
        "rule_states": newest["rule_states"],
    }
    if "pit" in newest:
        first["pit"] = np.concatenate([arrays["pit"] for arrays in folds])
        rows = [len(arrays["pit"]) for arrays in folds]
        first["coverage"] = np.average([arrays["coverage"] for arrays in folds], axis=0, weights=rows)
    return first


# Policy -> training run -> fold.
def _by_policy(results: Sequence[FoldResult], tasks: Sequence[FoldTask]) -> dict[str, dict[int, dict[int, Run]]]:
    found: dict[str, dict[int, dict[int, Run]]] = {}
    for result, task in zip(results, tasks, strict=True):
        # Of the task: a stored result may have been computed when the fold had another number.
        fold, run = task.payload[-1], int(task.identity["run"])
        for name, facts in result.values["facts"].items():
            found.setdefault(name, {}).setdefault(run, {})[fold] = (arrays_of(result, name), facts)
    return found


# The folds of one training run, by number, as one path.
def _over_folds(by_fold: Mapping[int, Run]) -> Run:
    folds = [run for _, run in sorted(by_fold.items())]
    joined = {
        key: np.concatenate([arrays[key] for arrays, _ in folds], axis=-1)
        for key in ("returns", "decision_ms", "invalid_actions", *METRICS)
    }
    every = [facts for _, facts in folds]
    score = float(np.mean([facts["notes"].get("validation_score", np.nan) for facts in every]))
    seconds = float(np.mean([facts["fit_seconds"] for facts in every]))
    facts = {"family": every[0]["family"], "train_bars": 0, "fit_seconds": seconds}
    return joined, {**facts, "notes": {"validation_score": score}}
