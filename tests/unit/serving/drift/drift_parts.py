"""Rows that drift and rows that do not."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.drift.monitor import DriftLevel, DriftMonitor, DriftReference, DriftSettings, DriftStatus

WINDOW = 60
FAST = np.array([0.0, 0.0, 0.3, 0.5])
"""Persistence of the features, as returns and ranges have it."""
MIXED = np.array([0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
"""With some that remember longer than a window, as volatilities and momentum do."""


def autoregressions(rng: np.random.Generator, paths: int, bars: int, persistence: np.ndarray) -> np.ndarray:
    """Stationary AR(1) of unit variance, [paths, bars, M]."""
    row = rng.standard_normal((paths, len(persistence)))
    rows = np.empty((paths, bars, len(persistence)))
    scale = np.sqrt(1.0 - persistence**2)
    for bar in range(bars):
        row = persistence * row + scale * rng.standard_normal(row.shape)
        rows[:, bar] = row
    return rows


def nats(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """NLL per bar of a right forecast of five standard normals whose errors are `scale` times too large."""
    errors = scale * rng.standard_normal((*shape, 5))
    return (0.5 * np.log(2.0 * np.pi) + 0.5 * errors**2).mean(axis=-1)


def fitted(rng: np.random.Generator, bars: int, persistence: np.ndarray) -> DriftReference:
    names = [f"feature_{index}" for index in range(len(persistence))]
    return DriftReference.fit(names, autoregressions(rng, 1, bars, persistence)[0], nats(rng, 400))


def verdict(reference: DriftReference, rows: np.ndarray, nll: Any = None, **changes: float) -> DriftStatus:
    monitor = DriftMonitor(reference, DriftSettings(**changes))
    for bar, row in enumerate(rows):
        assert monitor.observe(row, None if nll is None else float(nll[bar]), bar_time=float(bar))
    return monitor.status()


def share(statuses: list[DriftStatus], *levels: DriftLevel) -> float:
    return sum(status.level in levels for status in statuses) / len(statuses)
