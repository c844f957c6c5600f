"""Can a year of minutes be learned overnight? A fit to early stop on as many rows, with the time and memory it took."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import library_versions, machine
from configs.schema import WorldModelConfig
from data.fields import Field
from world_model import fit_market_model
from world_model.volatility import BAR_MOVES

LIBRARIES = ("numpy", "torch")
YEAR_OF_MINUTES = 525_600
GOAL_S, GOAL_GIB = 300.0, 3.0
FEATURES = 18
"""About as many as `data.features` computes; none is a volatility, so the fit has no volatility line."""


@dataclass(frozen=True, kw_only=True)
class YearReport:
    """One fit, with everything needed to read it."""

    transitions: int
    features: int
    epochs: int
    best_epochs: tuple[int, ...]
    seconds: float
    """Wall time of the whole fit: statistics, training, calibration, metrics."""
    processor_seconds: float
    peak_gib: float
    """Largest resident size of the process so far, the table included."""
    threads: int
    holdout_nll_gain: float
    """Nats per feature better than the constant Gaussian, so that a fast fit is seen to have learned something."""
    seed: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    @property
    def within_goals(self) -> bool:
        """Whether a year of minutes took at most the goals in time and memory."""
        return self.seconds <= GOAL_S and self.peak_gib <= GOAL_GIB

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "goal_s": GOAL_S, "goal_gib": GOAL_GIB, "within_goals": self.within_goals}


def measure_year(
    *,
    transitions: int = YEAR_OF_MINUTES,
    config: WorldModelConfig | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> YearReport:
    """Fit the market model to `synthetic_minutes` until it stops by itself.

    Args: transitions >= 1,000; config None takes the defaults; threads of torch; progress(epoch, most epochs).
    Raises: ValueError on fewer transitions.
    """
    if transitions < 1000:
        raise ValueError(f"transitions: expected >= 1000, was {transitions}")
    table = synthetic_minutes(transitions + 1, seed)
    names = (*BAR_MOVES, *(f"feature_{index}" for index in range(FEATURES - len(BAR_MOVES))))
    fields = [Field(name, "market", "1", -math.inf, math.inf, "synthetic") for name in names]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wall, processor = time.perf_counter(), time.process_time()
        _, fit = fit_market_model(
            table,
            fields,
            config or WorldModelConfig(),
            seed,
            None if progress is None else lambda epoch, total, _: progress(epoch, total),
        )
        seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
    finally:
        torch.set_num_threads(before)
    return YearReport(
        transitions=transitions,
        features=FEATURES,
        epochs=fit.epochs,
        best_epochs=fit.best_epochs,
        seconds=seconds,
        processor_seconds=processor_seconds,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        threads=threads,
        holdout_nll_gain=fit.holdout.nll_gain,
        seed=seed,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def synthetic_minutes(rows: int, seed: int) -> npt.NDArray[np.float64]:
    """A table [rows, 18] with what minutes have: returns nearly unpredictable, volatility that clusters, slow signals.

    Two returns whose volatility is a mean-reverting process they can be read off from, and sixteen signals that
    forget at rates between a minute and a day and lean on each other.
    """
    rng = np.random.default_rng(seed)
    memory = 1.0 - np.geomspace(1.0, 1.0 / 1440, FEATURES - len(BAR_MOVES))
    noise = rng.standard_normal((rows, FEATURES))
    table = np.empty((rows, FEATURES))
    signals, spread = np.zeros(len(memory)), np.sqrt(1.0 - memory**2)
    for row in range(rows):
        signals = memory * signals + spread * noise[row, len(BAR_MOVES) :]
        table[row, len(BAR_MOVES) :] = signals
    volatility = 5e-4 * np.exp(0.5 * table[:, -1])
    table[:, : len(BAR_MOVES)] = noise[:, : len(BAR_MOVES)] * volatility[:, None]
    table[1:, 1] += 0.1 * volatility[1:] * table[:-1, 4]
    return table
