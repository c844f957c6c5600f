"""The frozen benchmark: every policy on markets whose truth is known.

A *cell* is one learner, one length of the training path and one training run; it is computed on its own, in any order
and process, and its result holds every policy the learner returned, walked over the test markets. Training, validation
and test markets come from disjoint seeds; the test markets are the same for everybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import (
    LEARNERS,
    Disagreement,
    Fitted,
    Lesson,
    check_learners,
    feature_table,
    settings_of,
    shared_settings,
    silent,
    walk_panel,
)
from benchmarks.folds import FoldTask
from benchmarks.machine import library_versions
from configs import DetentConfig
from configs.evaluation import GarchConfig, SyntheticMarketConfig
from data import canonical_json, sha256_bytes, sha256_file
from envs import TradingDynamics
from envs.garch import simulate_garch_panel
from envs.panel import FeaturePanel
from envs.synthetic import WARMUP, SyntheticPanel, simulate_panel
from evaluation import Policy, metrics_by_path
from evaluation.belief import BeliefPolicy, filtered_signal_std, with_beliefs
from evaluation.leak import shuffled_market, with_tomorrow, without_signal
from evaluation.oracle import OraclePolicy, solve_oracle

Variant = Literal["plain", "leak", "shuffled", "no_signal"]
"""`leak`: tomorrow's return is a feature. `shuffled`: the signal columns are those of another time. `no_signal`: they
are zero, which is what shuffled ones must be worth; past returns still tell of regime and signal."""

ALTERED: tuple[Variant, ...] = ("leak", "shuffled", "no_signal")
"""The checks of the instrument."""

VALIDATION_SEED, TEST_SEED, STRESS_SEED = 100_000, 200_000, 300_000
"""Distances from `base_seed`; training path i has base_seed + 1 + i, so there is room for 99,999 of them."""

NOT_IN_CELLS = ("learners", "check_learners", "trials", "primary_train_bars", "num_seeds", "train_bars")
"""Settings of the suite that say which cells there are, not what one of them computes."""

SOURCES = (
    *(f"{package}/**/*.py" for package in ("masking", "data", "envs", "world_model", "planner", "mbpo")),
    *(f"evaluation/{name}.py" for name in ("backtest", "policy", "metrics", "rules", "forecast", "oracle", "belief")),
    "evaluation/leak.py",
    *(f"configs/{name}.py" for name in ("schema", "section", "evaluation")),
    *(f"benchmarks/{name}.py" for name in ("contenders", "machine", "suite")),
)
"""Source files that decide what a cell computes, with everything of ours that they import."""
LIBRARIES = ("numpy", "torch", "stable-baselines3", "sb3-contrib", "arch")
"""Whose versions do so, too, and that of Python."""


def source_hash(*more: str) -> str:
    """SHA-256 over `SOURCES`, `more`, and versions of `LIBRARIES` and Python.

    A stored cell is that of the code in force, or computed again.
    """
    root = Path(__file__).resolve().parent.parent
    files = sorted({path for pattern in (*SOURCES, *more) for path in root.glob(pattern)})
    code = [[str(path.relative_to(root)), sha256_file(path)] for path in files]
    return sha256_bytes(canonical_json([code, library_versions(LIBRARIES)]).encode())


@dataclass(frozen=True)
class Cell:
    """What is computed at once."""

    learner: str
    """A name of `LEARNERS`, or `truth`: the oracle and the belief filter."""
    train_bars: int = 0
    """Length of the training path; 0 for those who do not learn."""
    run: int = 0
    """Number of the training run, from 0."""
    variant: Variant = "plain"

    @property
    def label(self) -> str:
        """Name for progress and files."""
        size = f"-{self.train_bars}-{self.run}" if self.train_bars else ""
        return f"{self.variant}-{self.learner}{size}"


def plan_suite(config: DetentConfig) -> list[Cell]:
    """Every cell of the suite, the slow ones first.

    Raises: ConfigError on learners that do not exist, or that leave the claim without one of its sides.
    """
    suite = config.evaluation.suite
    check_learners("evaluation.suite.learners", suite.learners, config.evaluation.verdict.challenger)
    check_learners("evaluation.suite.check_learners", suite.check_learners)
    longest = max(suite.train_bars)
    cells = [
        Cell(learner, bars, run)
        for learner in reversed(suite.learners)
        for bars in sorted(suite.train_bars, reverse=True)
        for run in range(suite.num_seeds)
    ]
    checks = [Cell(learner, longest, 0, variant) for variant in ALTERED for learner in suite.check_learners]
    return [*cells, *checks, Cell("truth"), Cell("references")]


def suite_tasks(config: DetentConfig) -> list[FoldTask]:
    """The cells as tasks of `benchmarks.folds`; a task is computed again when what determines it changes."""
    common = shared_settings(config)
    evaluation = config.evaluation.model_dump(mode="json")
    sizes = {name: value for name, value in evaluation["suite"].items() if name not in NOT_IN_CELLS}
    markets = {"market": evaluation["market"], "garch": evaluation["garch"], "suite": sizes}
    code = source_hash()
    return [
        FoldTask(
            cell.label,
            {
                "cell": asdict(cell),
                "stressed": _is_stressed(config, cell),
                "settings": {**common, **markets, **settings_of(config, cell.learner)},
                "version": code,
            },
            (config, cell),
        )
        for cell in plan_suite(config)
    ]


def _is_stressed(config: DetentConfig, cell: Cell) -> bool:
    # Oracle and belief filter solve the market as it is described, which the GARCH one is not.
    suite = config.evaluation.suite
    longest = cell.train_bars in (0, max(suite.train_bars))
    return bool(suite.stress_paths) and cell.variant == "plain" and cell.learner != "truth" and longest


def work_on_cell(task: FoldTask) -> dict[str, Any]:
    """Fit one learner and walk its policies over the test markets.

    Returns: arrays `POLICY.NAME` as `judge` makes them; `facts`, for every policy family, notes and seconds of the fit.
    """
    config, cell = task.payload
    bars_per_year = config.evaluation.market.bars_per_year
    started = time.perf_counter()
    fitted = _truth(config) if cell.learner == "truth" else _fit(config, cell)
    seconds = time.perf_counter() - started
    arrays: dict[str, NDArray[Any]] = {}
    facts: dict[str, Any] = {}
    for name, (one, dynamics, prepare) in fitted.items():
        test = prepare(_altered(judged_market(config), cell))
        walked = judge(config, one, dynamics, test, bars_per_year=bars_per_year)
        arrays |= {f"{name}.{key}": value for key, value in walked.items()}
        facts[name] = {**one.facts(seconds), **asdict(cell)}
        if _is_stressed(config, cell) and one.max_paths is None:
            stress = walk_panel(dynamics, _stress_panel(config).features, one.policy, one.disagreement)
            metrics = metrics_by_path(stress, bars_per_year)
            arrays |= {f"{name}.stress_{key}": metrics[key] for key in ("sharpe", "max_drawdown", "killed")}
    return {**arrays, "facts": facts}


Prepared = tuple[Fitted, TradingDynamics, Callable[[SyntheticPanel], FeaturePanel]]
"""A policy, the dynamics of the columns it reads, and how to get these columns from a market."""


def judge(
    config: DetentConfig, fitted: Fitted, dynamics: TradingDynamics, panel: FeaturePanel, *, bars_per_year: int
) -> dict[str, NDArray[Any]]:
    """Walk a policy over the test markets.

    Returns: `returns` [P, n] float32 simple return per bar; each metric of `metrics_by_path` [P]; `decision_ms` [k]
        processor time of decisions for one row; of the first market `position` [n + 1], `actions` [n], `rule_states`
        [n, F];
        `invalid_actions` [1]; the policy's evidence.
    """
    panel = panel if fitted.max_paths is None else panel.first_paths(fitted.max_paths)
    result = walk_panel(dynamics, panel, fitted.policy, fitted.disagreement)
    first: dict[str, NDArray[Any]] = {
        "position": result.position[:, 0].astype(np.float32),
        "actions": result.actions[:, 0].astype(np.int8),
        "rule_states": result.rule_states[:, 0],
    }
    return {
        "returns": np.expm1(result.log_returns).T.astype(np.float32),
        "invalid_actions": np.array([result.invalid_actions]),
        "decision_ms": time_decisions(dynamics, panel, fitted, config.evaluation.suite.timed_decisions),
        **first,
        **fitted.evidence,
        **metrics_by_path(result, bars_per_year),
    }


def time_decisions(dynamics: TradingDynamics, panel: FeaturePanel, fitted: Fitted, count: int) -> NDArray[np.float64]:
    """Milliseconds of single decisions along the first market, [k] with k at most its bars.

    Processor time of the whole process: other tasks compute at the same time, and waiting for them is none of the
    policy's. A policy that reads the disagreement of a model needs it first, so it is computed within the time, too.
    """
    count = min(count, len(panel.timestamps) - 1)
    short = FeaturePanel(panel.timestamps[: count + 1], panel.fields, panel.values[:1, : count + 1])
    clock = _Stopwatch(fitted, len(dynamics.feature_names))
    walk_panel(dynamics, short, clock, fitted.disagreement)
    return np.array(clock.milliseconds)


class _Stopwatch:
    def __init__(self, fitted: Fitted, num_features: int) -> None:
        self.name, self._policy = fitted.policy.name, fitted.policy
        self._disagreement: Disagreement | None = fitted.disagreement
        self._num_features = num_features
        self.milliseconds: list[float] = []

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        started = time.process_time()
        if self._disagreement is not None:
            self._disagreement(state[:, : self._num_features])
        actions = self._policy.act(state, action_masks)
        self.milliseconds.append((time.process_time() - started) * 1e3)
        return actions


# --- lessons -----------------------------------------------------------------------------------------------------


def lesson_of(config: DetentConfig, cell: Cell) -> Lesson:
    """The training path and the validation markets of a cell."""
    suite, market = config.evaluation.suite, config.evaluation.market
    seed = suite.base_seed + 1 + cell.run
    train = simulate_panel(market, paths=1, bars=max(cell.train_bars, 250), seed=seed)
    return Lesson(
        config=config.model_copy(update={"seed": seed}),
        train=feature_table(_altered(train, cell).features),
        validation=_altered(_validation_panel(config), cell).features,
        bars_per_year=market.bars_per_year,
        lookback=WARMUP,
    )


def _fit(config: DetentConfig, cell: Cell) -> dict[str, Prepared]:
    lesson = lesson_of(config, cell)
    fitted = LEARNERS[cell.learner](lesson, silent)
    return {name: (one, lesson.dynamics, lambda panel: panel.features) for name, one in fitted.items()}


def _truth(config: DetentConfig) -> dict[str, Prepared]:
    # Reference levels: they may read what the market hides, in columns that nobody else has.
    market = config.evaluation.market
    wide: dict[str, Callable[[SyntheticPanel], FeaturePanel]] = {
        "oracle": SyntheticPanel.with_truth,
        "belief_filter": lambda panel: with_beliefs(panel.features, market),
    }
    prepared: dict[str, Prepared] = {}
    for name, prepare in wide.items():
        dynamics = TradingDynamics.from_config(prepare(judged_market(config)).names, config)
        policy = _truth_policy(name, dynamics, market, config)
        prepared[name] = (Fitted(policy, "reference"), dynamics, prepare)
    return prepared


def _truth_policy(name: str, dynamics: TradingDynamics, market: SyntheticMarketConfig, config: DetentConfig) -> Policy:
    # Rewards of the programme come from the columns every policy has.
    solve = partial(solve_oracle, market, TradingDynamics.from_config(judged_market(config).features.names, config))
    if name == "oracle":
        return OraclePolicy(dynamics, solve())
    return BeliefPolicy(dynamics, solve(signal_std=filtered_signal_std(market)))


def _altered(panel: SyntheticPanel, cell: Cell) -> SyntheticPanel:
    if cell.variant == "plain":
        return panel
    changes: dict[Variant, Callable[[FeaturePanel], FeaturePanel]] = {
        "leak": with_tomorrow,
        "shuffled": partial(shuffled_market, seed=len(panel.features)),
        "no_signal": without_signal,
    }
    changed = changes[cell.variant](panel.features)
    return SyntheticPanel(changed, panel.regime, panel.true_signal)


# --- markets, once per process -----------------------------------------------------------------------------------


def _validation_panel(config: DetentConfig) -> SyntheticPanel:
    suite = config.evaluation.suite
    seed = suite.base_seed + VALIDATION_SEED
    return _simulated(config.evaluation.market, suite.validation_paths, suite.validation_bars, seed)


def judged_market(config: DetentConfig) -> SyntheticPanel:
    """The test markets, the same for every policy."""
    suite = config.evaluation.suite
    return _simulated(config.evaluation.market, suite.test_paths, suite.test_bars, suite.base_seed + TEST_SEED)


def _stress_panel(config: DetentConfig) -> SyntheticPanel:
    suite, market = config.evaluation.suite, config.evaluation.market
    seed = suite.base_seed + STRESS_SEED
    return _stressed(market, config.evaluation.garch, suite.stress_paths, suite.test_bars, seed)


@lru_cache(maxsize=2)
def _simulated(market: SyntheticMarketConfig, paths: int, bars: int, seed: int) -> SyntheticPanel:
    return simulate_panel(market, paths=paths, bars=bars, seed=seed)


@lru_cache(maxsize=1)
def _stressed(market: SyntheticMarketConfig, garch: GarchConfig, paths: int, bars: int, seed: int) -> SyntheticPanel:
    return simulate_garch_panel(market, garch, paths=paths, bars=bars, seed=seed)
