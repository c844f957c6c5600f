"""How good imagined futures are several bars ahead: error and coverage at every step, beside what needs no model.

Letters: T rows of a slice, N starts, P paths, H horizon, M features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError
from data.fields import Field
from world_model.marginals import central_coverage
from world_model.model import MarketModel, refuse_other_fields

Floats = NDArray[np.float64]

# Paths imagined at once; a chunk of starts is as large as this allows.
MAX_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What holds h bars ahead; errors are root mean squares in units of the training deltas' standard deviation."""

    step: int
    """h, counted from 1."""
    rows: int
    """Starts scored."""
    error: dict[str, float]
    """Of the mean of the imagined paths, by field."""
    error_persistence: dict[str, float]
    """Of today's row."""
    error_constant: dict[str, float]
    """Of the training level for columns that revert within a bar, else of h times the mean training delta."""
    coverage: dict[str, float]
    """Share of outcomes inside the central 50/80/95 % of the imagined paths, over all fields."""
    coverage_by_group: dict[str, dict[str, float]]
    """The same by field group."""

    @property
    def no_better(self) -> tuple[str, ...]:
        """Fields on which persistence or the constant is at least as close."""
        return tuple(
            name
            for name, error in self.error.items()
            if error >= min(self.error_persistence[name], self.error_constant[name])
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**vars(self), "no_better": [*self.no_better]}


@torch.no_grad()
def evaluate_horizons(
    model: MarketModel,
    features: Floats,
    fields: Sequence[Field],
    *,
    generator: torch.Generator,
    horizon: int = 5,
    num_paths: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[StepMetrics, ...]:
    """Imagine paths from every row and compare them with what happened 1 to H bars later.

    Each step of each path asks a freshly drawn elite (TS1 of PETS, arXiv:1805.12114, sec. 5.2), as imagination does.
    Outcomes h bars apart overlap, so their errors are dependent: N starts are worth fewer than N independent ones.

    Args:
        features: [T, M], raw units, in time order, unseen by the fit.
        fields: its columns, which must be the model's.
        generator: the only source of randomness.
        horizon: H. num_paths: P; their quantiles are the intervals.
        progress: called with (starts done, N = T - H).

    Returns: one entry per step, first step first. Columns that never moved in training are left out.
    Raises: ModelFileError for other fields; ValueError on shape, H or P < 1; DataError on NaN or fewer than H + 1 rows.
    """
    refuse_other_fields("model", model.fields, fields)
    if horizon < 1 or num_paths < 1:
        raise ValueError(f"horizon and num_paths: expected at least 1, was {horizon} and {num_paths}")
    if features.ndim != 2 or features.shape[1] != len(fields):
        raise ValueError(f"features: expected [T, {len(fields)}], was {[*features.shape]}")
    if len(features) < horizon + 1 or not np.isfinite(features).all():
        raise DataError(f"features: expected at least {horizon + 1} rows of finite numbers, was {[*features.shape]}")
    starts = len(features) - horizon
    values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    mean = torch.empty(horizon, starts, len(fields), dtype=torch.float64)
    level = torch.empty_like(mean)
    chunk = max(1, MAX_ROWS // num_paths)
    for first in range(0, starts, chunk):
        last = min(first + chunk, starts)
        paths = values[first:last].to(torch.float32).repeat_interleave(num_paths, dim=0)
        for step in range(horizon):
            drawn = torch.randint(len(model.elites), (len(paths),), generator=generator)
            noise = torch.randn(paths.shape, generator=generator)
            paths = model.sample_next(paths, model.elite_index[drawn], noise)
            fan = paths.reshape(last - first, num_paths, -1).double()
            outcome = values[first + step + 1 : last + step + 1]
            mean[step, first:last] = fan.mean(dim=1)
            level[step, first:last] = _rank(fan, outcome)
        if progress is not None:
            progress(last, starts)
    return tuple(_score(model, values, mean[step], level[step], fields, step + 1, starts) for step in range(horizon))


# Where the outcome lies among the paths, in (0, 1); ties, as at the edge of the support, count half.
def _rank(fan: Tensor, outcome: Tensor) -> Tensor:
    actual = outcome[:, None, :]
    below = (fan < actual).double().sum(dim=1) + 0.5 * (fan == actual).double().sum(dim=1)
    return (below + 0.5) / (fan.shape[1] + 1)


def _score(
    model: MarketModel, values: Tensor, mean: Tensor, level: Tensor, fields: Sequence[Field], step: int, starts: int
) -> StepMetrics:
    current, outcome = values[:starts], values[step : step + starts]
    unit = model.delta_normaliser.std.double()
    drift = current + step * model.delta_normaliser.mean.double()
    constant = torch.where(model.reverting, model.input_normaliser.mean.double().expand_as(drift), drift)
    kept = [j for j, moves in enumerate(model.varying.tolist()) if moves]

    def error(forecast: Tensor) -> dict[str, float]:
        rms = ((outcome - forecast) / unit).square().mean(dim=0).sqrt()
        return {fields[j].name: float(rms[j]) for j in kept}

    groups: dict[str, list[int]] = {}
    for j in kept:
        groups.setdefault(fields[j].group, []).append(j)
    ranks = level.numpy()
    return StepMetrics(
        step=step,
        rows=starts,
        error=error(mean),
        error_persistence=error(current),
        error_constant=error(constant),
        coverage=central_coverage(ranks[:, kept]),
        coverage_by_group={group: central_coverage(ranks[:, columns]) for group, columns in sorted(groups.items())},
    )
