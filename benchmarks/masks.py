"""What masks cost today: one state in NumPy, one state as ONNX, thousands in torch, and a denial in words.

The rule set alone, one thread, hot (back to back). Every series judges the same states, and all ways to judge them must
agree before anything is timed. Import it where it is needed: it loads torch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from benchmarks.machine import library_versions, machine
from masking import ActionTable, RowRules, RuleSet, trading_rules
from masking.row_rules import left_by
from masking.rules_graph import rule_set_onnx

LIBRARIES = ("array-api-compat", "numpy", "onnxruntime", "torch")
STATES = 256
"""Distinct state rows that the single-row series cycle through."""
RANGES = {
    "position": (0.0, 1.25),
    "drawdown": (0.0, 0.16),
    "trading_state": (0.0, 2.0),
    "holding_time": (0.0, 6.0),
    "volatility_20": (0.0, 0.8),
    "data_age": (0.0, 1.2),
}
"""Where the columns of the trading rules are drawn from; any other column is drawn from [0, 1)."""
CODES = ("trading_state", "holding_time")
"""Columns that hold whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Distribution of one series of calls, microseconds, with the goal for its median."""

    calls: int
    p50_us: float
    p95_us: float
    p99_us: float
    goal_us: float | None = None
    """What the median may be at most; None where no goal is set."""

    @classmethod
    def of(cls, samples_us: npt.NDArray[np.float64], goal_us: float | None = None) -> Series:
        """Summarise samples [N] in microseconds. Raises: ValueError if empty or not finite."""
        if samples_us.ndim != 1 or samples_us.size == 0 or not np.isfinite(samples_us).all():
            raise ValueError(f"samples_us: expected finite [N >= 1], was {list(samples_us.shape)}")
        p50, p95, p99 = (float(value) for value in np.percentile(samples_us, (50.0, 95.0, 99.0)))
        return cls(calls=samples_us.size, p50_us=p50, p95_us=p95, p99_us=p99, goal_us=goal_us)

    @property
    def within_goal(self) -> bool:
        """Whether the median is at most the goal; True where there is none."""
        return self.goal_us is None or self.p50_us <= self.goal_us


@dataclass(frozen=True, kw_only=True)
class MaskReport:
    """Cost of one rule set with everything needed to read the numbers."""

    rule_set_hash: str
    rules: tuple[str, ...]
    num_actions: int
    numpy_row: Series
    """One state in NumPy, by `RowRules`: what a live decision pays for its last check."""
    batch_row: Series
    """The same state in NumPy as a batch of one."""
    onnx_row: Series
    """One state through the exported rule set."""
    torch_batch: Series
    """`batch` states in torch: what one imagined step pays."""
    explain_row: Series
    """Every denial of one state in words."""
    batch: int
    seed: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    @property
    def series(self) -> tuple[Series, ...]:
        """All of them."""
        return self.numpy_row, self.batch_row, self.onnx_row, self.torch_batch, self.explain_row

    @property
    def within_goals(self) -> bool:
        """Whether every median is at most its goal."""
        return all(series.within_goal for series in self.series)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "rules": list(self.rules), "within_goals": self.within_goals, "threads": 1}


def measure_masks(
    calls: int = 10_000, *, batch: int = 4096, warmup: int = 500, rule_set: RuleSet | None = None, seed: int = 0
) -> MaskReport:
    """Time a rule set.

    Args:
        calls: calls of each single-row series; the batch series takes a tenth of them, at least ten.
        batch: rows of the torch series.
        warmup: calls before each single-row series, not timed; a tenth before the batch series.
        rule_set: all trading rules in paper mode when None.
        seed: of the states.

    Raises: ValueError on a count that is not positive; RuntimeError if the backends disagree on a mask.
    """
    for name, value in {"calls": calls, "batch": batch}.items():
        if not value > 0:
            raise ValueError(f"{name}: expected > 0, was {value}")
    if warmup < 0:
        raise ValueError(f"warmup: expected >= 0, was {warmup}")
    rules = rule_set or RuleSet(trading_rules(paper=True), ActionTable())
    states = _states(rules, max(batch, STATES), np.random.default_rng(seed))
    session = _session(rules)
    _agree(rules, session, states)

    rows = [np.ascontiguousarray(row[None, :]) for row in states[:STATES]]
    columns = [_columns(rules, row) for row in rows]
    numbers = [dict(zip(rules.fields, row[0], strict=True)) for row in rows]
    row_rules = RowRules(rules)
    tensors = {name: torch.from_numpy(states[:batch, index].copy()) for index, name in enumerate(rules.fields)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = _timed(lambda _: rules(tensors), max(10, calls // 10), warmup // 10)
    finally:
        torch.set_num_threads(threads)
    return MaskReport(
        rule_set_hash=rules.hash,
        rules=tuple(rule["name"] for rule in rules.to_dict()["rules"]),
        num_actions=rules.actions.num_actions,
        numpy_row=Series.of(_timed(lambda index: row_rules.denied(numbers[index]), calls, warmup), goal_us=40.0),
        batch_row=Series.of(_timed(lambda index: rules(columns[index]), calls, warmup)),
        onnx_row=Series.of(
            _timed(lambda index: session.run(["action_masks"], {"state": rows[index]}), calls, warmup), goal_us=20.0
        ),
        torch_batch=Series.of(batches, goal_us=1000.0),
        explain_row=Series.of(_timed(lambda index: rules.explain(columns[index]), calls, warmup)),
        batch=batch,
        seed=seed,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def _session(rules: RuleSet) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(rule_set_onnx(rules), options, providers=["CPUExecutionProvider"])


def _states(rules: RuleSet, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    columns = [rng.uniform(*RANGES.get(name, (0.0, 1.0)), count) for name in rules.fields]
    whole = [np.rint(column) if name in CODES else column for name, column in zip(rules.fields, columns, strict=True)]
    return np.stack(whole, axis=1).astype(np.float32)


def _columns(rules: RuleSet, rows: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: rows[:, index] for index, name in enumerate(rules.fields)}


# Numbers about three functions that differ would mean nothing.
def _agree(rules: RuleSet, session: Any, states: npt.NDArray[np.float32]) -> None:
    expected = rules(_columns(rules, states))
    tensors = {name: torch.from_numpy(column.copy()) for name, column in _columns(rules, states).items()}
    found = {"torch": rules(tensors).numpy(), "onnxruntime": session.run(["action_masks"], {"state": states})[0]}
    for backend, masks in found.items():
        differ = int((masks != expected).any(axis=1).sum())
        if differ:
            raise RuntimeError(f"{backend}: expected the masks of NumPy, was others in {differ} of {len(states)} rows")
    row_rules = RowRules(rules)
    for masks, row in zip(expected.tolist(), states, strict=True):
        denied = row_rules.denied(dict(zip(rules.fields, row, strict=True)))
        if masks != left_by(denied, [True] * len(masks)):
            raise RuntimeError(f"RowRules: expected the masks of a batch, was others on {row.tolist()}")


def _timed(call: Callable[[int], object], count: int, warmup: int) -> npt.NDArray[np.float64]:
    for index in range(warmup):
        call(index % STATES)
    nanoseconds = np.empty(count, dtype=np.int64)
    gc.collect()
    for index in range(count):
        start = time.perf_counter_ns()
        call(index % STATES)
        nanoseconds[index] = time.perf_counter_ns() - start
    return nanoseconds / 1e3
