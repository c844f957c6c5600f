"""A suite smaller than the smoke profile, and policies, cells and findings that are made up with known differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison import METRICS, Walked
from benchmarks.folds import FoldResult, FoldTask
from benchmarks.suite import Cell, work_on_cell
from configs import DetentConfig, load_config
from evaluation.statistics import sharpe_by_path

YEAR = 252
BARS, PATHS = 80, 3

SMALLER = (
    "evaluation.suite.train_bars=[300]",
    "evaluation.suite.primary_train_bars=300",
    f"evaluation.suite.validation_bars={BARS}",
    f"evaluation.suite.test_bars={BARS}",
    f"evaluation.suite.test_paths={PATHS}",
    "evaluation.suite.timed_decisions=20",
    "planner.horizon=1",
    "model_free.total_steps=512",
    "model_free.num_envs=8",
    "model_free.n_steps=32",
    "mbpo.branch_pool=256",
    "mbpo.ppo.total_steps=384",
    "mbpo.ppo.num_envs=32",
    "mbpo.ppo.batch_size=96",
    "world_model.max_epochs=1",
    "world_model.hidden=[8, 8]",
)


def small(*overrides: str) -> DetentConfig:
    return load_config("suite-smoke", (*SMALLER, *overrides))


def compute(config: DetentConfig, cell: Cell) -> FoldResult:
    """A cell as the runner hands it over, but without files."""
    output = work_on_cell(FoldTask(cell.label, {}, (config, cell)))
    return result_of(cell.label, output)


def result_of(label: str, output: Mapping[str, Any], seconds: float = 1.0) -> FoldResult:
    arrays = {name: value for name, value in output.items() if isinstance(value, np.ndarray)}
    values = json.loads(json.dumps({name: output[name] for name in output if name not in arrays}, allow_nan=False))
    return FoldResult(label, arrays, values, seconds, resumed=False)


def returns(mean: float, *, runs: int = 2, paths: int = 6, bars: int = 120, noise: float = 0.0) -> np.ndarray:
    """[S, P, n] around one market that everybody shares, with so much more return per bar, and noise of their own."""
    market = 0.01 * np.random.default_rng(0).standard_normal((1, paths, bars))
    own = noise * np.random.default_rng(1).standard_normal((runs, paths, bars))
    return (market + mean + own).astype(np.float32)


def arrays_of_run(one: np.ndarray, **metrics: float | np.ndarray) -> dict[str, np.ndarray]:
    """What `judge` keeps of returns [P, n]; metrics that are not given are zero."""
    paths, bars = one.shape
    numbers = {key: np.zeros(paths) for key in METRICS} | {"sharpe": sharpe_by_path(one, YEAR)}
    return {
        "returns": one,
        "decision_ms": np.full(300, 2.0),
        "invalid_actions": np.zeros(1, np.int64),
        "position": np.zeros(bars + 1, np.float32),
        "actions": np.zeros(bars, np.int8),
        "rule_states": np.zeros((bars, 6), np.float32),
        **numbers,
        **{key: np.broadcast_to(np.asarray(value, np.float64), paths).copy() for key, value in metrics.items()},
    }


def walked(name: str, family: str, made: np.ndarray, *, score: float = np.nan, **changes: Any) -> Walked:
    """A policy with given returns [S, P, n]; `changes` are fields of `Walked` or metrics."""
    runs = [arrays_of_run(one) for one in made]
    metrics = {key: np.stack([run[key] for run in runs]) for key in METRICS}
    for key in set(changes) & set(METRICS):
        metrics[key] = np.broadcast_to(np.asarray(changes.pop(key), np.float64), metrics[key].shape).copy()
    fields: dict[str, Any] = {
        "train_bars": 300,
        "decision_ms": np.full(300 * len(made), 2.0),
        "invalid_actions": 0,
        "fit_seconds": 1.0,
    }
    return Walked(name=name, family=family, returns=made, metrics=metrics, validation_score=score, **(fields | changes))


def made_up_cell(
    cell: Cell, policies: Mapping[str, tuple[str, Mapping[str, np.ndarray]]], **notes: float
) -> FoldResult:
    """A stored cell. Args: policies: name -> family and arrays of the run."""
    output: dict[str, Any] = {}
    facts = {}
    for name, (family, arrays) in policies.items():
        output |= {f"{name}.{key}": value for key, value in arrays.items()}
        facts[name] = {"family": family, "notes": notes, "fit_seconds": 1.0, "train_bars": cell.train_bars}
    return result_of(cell.label, {**output, "facts": facts})


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], but: Sequence[str] = ("decision_ms",)) -> bool:
    """Whether two sets of arrays are equal to the last bit, times of decisions aside."""
    keys = [key for key in one if not key.endswith(tuple(but))]
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in keys)


GAINS = {
    **{"flat": None, "buy_and_hold": 4e-4, "random_valid": 0.0, "vol_target": 3e-4},
    **{"oracle": 1.2e-3, "belief_filter": 1e-3, "linear_signal": 5e-4, "ridge": 8e-4},
    **{"model_free": 6e-4, "sac": 7e-4, "masked_dqn": 6e-4, "mbpo": 9e-4, "planner": 5e-4, "mbpo_planner": 9e-4},
}
"""Mean return per bar of the policies of a made-up suite; None never trades."""

FAMILIES = {
    "references": {"flat": "reference", "buy_and_hold": "reference", "random_valid": "reference", "vol_target": "rule"},
    "truth": {"oracle": "reference", "belief_filter": "reference"},
    "linear_signal": {"linear_signal": "rule"},
    "ridge": {"ridge": "forecast"},
    **{name: {name: "model_free"} for name in ("model_free", "sac", "masked_dqn")},
    "mbpo": dict.fromkeys(("mbpo", "planner", "mbpo_planner"), "model_based"),
}


def made_up_suite(
    cells: Sequence[Cell], *, bars: int = 120, paths: int = 6, altered: Mapping[str, float] | None = None
) -> list[FoldResult]:
    """One result per cell, the planners on two paths. Args: altered: variant -> Sharpe ratio of its learner."""
    results = []
    for number, cell in enumerate(cells):
        noise = 1e-3 * np.random.default_rng(number).standard_normal((paths, bars)).astype(np.float32)
        policies = {}
        for name, family in FAMILIES[cell.learner].items():
            gain = GAINS[name]
            made = returns(gain or 0.0, runs=1, paths=paths, bars=bars)[0] + noise if gain is not None else 0.0 * noise
            few = made[:2] if "planner" in name else made
            arrays = arrays_of_run(few, hit_rate=np.nan if gain is None else 0.5)
            if cell.variant != "plain":
                arrays["sharpe"] = np.full(paths, (altered or {})[cell.variant])
            elif cell.train_bars in (0, 400) and cell.learner != "truth" and "planner" not in name:
                arrays |= {f"stress_{key}": np.full(2, float(cell.run)) for key in ("sharpe", "max_drawdown", "killed")}
            if name == "mbpo":
                arrays |= {"pit": np.full((50, 10), 0.5, np.float32), "coverage": np.array([0.5, 0.8, 0.95])}
            policies[name] = (family, arrays)
        score = {"validation_score": {"sac": 1.3, "masked_dqn": 1.1}.get(cell.learner, 1.2)}
        results.append(made_up_cell(cell, policies, **({} if cell.learner in ("truth", "references") else score)))
    return results
