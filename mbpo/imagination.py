"""Imagined market branches: short continuations of every historical bar, drawn from the world model.

The market does not react to the agent, so branches are independent of actions: they are generated once per fit and
reused by every policy update. Accounts, masks and rewards on them are exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from world_model import MarketModel
from world_model.volatility import BAR_MOVES

CHUNK_ROWS = 8192
"""Starting rows imagined at once; bounds memory, not results."""


class Forecast(NamedTuple):
    """What the elites expect of the two moves of a bar, one bar before; arrays [..., 2] in the order of `BAR_MOVES`."""

    mean: np.ndarray
    """Log returns."""
    variance: np.ndarray
    """Of these log returns."""


@dataclass(frozen=True)
class MarketBranches:
    """K branches of H bars from each of T historical rows."""

    features: np.ndarray
    """[T, K, H, M] float32: imagined feature rows 1..H after row t."""
    uncertainty: np.ndarray
    """[T, K, H] float32: ensemble disagreement at those rows."""
    supported: np.ndarray
    """[T, K, H] bool: the row was drawn inside the support of the data; one drawn outside was moved to its edge."""
    forecast: Forecast
    """[T, K, H, 2] float32: what the elites expected of gap and intraday return of those rows one bar before."""

    def __post_init__(self) -> None:
        shape = self.features.shape[:3]
        forecast = [part.shape for part in self.forecast]
        if (
            self.features.ndim != 4
            or self.uncertainty.shape != shape
            or self.supported.shape != shape
            or {*forecast} != {(*shape, len(BAR_MOVES))}
        ):
            raise ValueError(
                f"branches: expected features [T, K, H, M], uncertainty and supported [T, K, H], forecast "
                f"[T, K, H, {len(BAR_MOVES)}], was {list(self.features.shape)}, {list(self.uncertainty.shape)}, "
                f"{list(self.supported.shape)} and {[*map(list, forecast)]}"
            )

    @property
    def branches_per_row(self) -> int:
        """K."""
        return int(self.features.shape[1])

    @property
    def horizon(self) -> int:
        """H."""
        return int(self.features.shape[2])


def imagine_market(
    model: MarketModel,
    features: np.ndarray,
    *,
    horizon: int,
    branches_per_row: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> MarketBranches:
    """Roll the ensemble forward from every row (TS1 of PETS: a fresh elite per row and step).

    Args: features [T, M] raw historical rows; horizon H >= 1; branches_per_row K >= 1.
    Returns: branches, float32.
    """
    if horizon < 1 or branches_per_row < 1:
        raise ValueError(f"horizon, branches_per_row: expected >= 1, was {horizon}, {branches_per_row}")
    starts = torch.as_tensor(features, dtype=torch.float32).repeat_interleave(branches_per_row, dim=0)
    elites = torch.tensor(model.elites, dtype=torch.int64)
    moves = _moves(model)
    rows = torch.empty((len(starts), horizon, starts.shape[1]))
    uncertainty = torch.empty((len(starts), horizon))
    mean, variance = (torch.empty((len(starts), horizon, len(moves))) for _ in range(2))
    supported = torch.empty((len(starts), horizon), dtype=torch.bool)
    with torch.no_grad():
        for first in range(0, len(starts), CHUNK_ROWS):
            current = starts[first : first + CHUNK_ROWS]
            chunk = slice(first, first + CHUNK_ROWS)
            for step in range(horizon):
                pick = torch.randint(len(elites), (len(current),), generator=generator)
                noise = torch.randn(current.shape, generator=generator)
                current, outlook = model.advance(current, elites[pick], noise, moves)
                if step > 0:
                    uncertainty[chunk, step - 1] = outlook.disagreement
                rows[chunk, step] = current
                mean[chunk, step], variance[chunk, step] = outlook.mean, outlook.variance
                supported[chunk, step] = ~model.at_edge(current)
            uncertainty[chunk, -1] = model.disagreement(current)
            if progress is not None:
                progress(min(first + CHUNK_ROWS, len(starts)), len(starts))
    if not torch.isfinite(rows).all():
        raise FloatingPointError("imagined market: expected finite features, the world model produced NaN or infinity")
    shape = (len(features), branches_per_row, horizon)
    forecast = Forecast(*(part.reshape(*shape, -1).numpy() for part in (mean, variance)))
    return MarketBranches(
        rows.reshape(*shape, -1).numpy(),
        uncertainty.reshape(shape).numpy(),
        supported.reshape(shape).numpy(),
        forecast,
    )


def branch_summary(
    branches: MarketBranches, features: np.ndarray, names: Sequence[str], bars_per_year: int
) -> dict[str, dict[str, float]]:
    """Drift and volatility of imagined bars beside those of the history they start from.

    Args: features [T, M] historical rows; names of the M columns.
    Returns: `history` and `depth_1` .. `depth_H`, each with `drift` (mean log return per year) and `volatility` (per
        square root of a year).
    """
    moves = [names.index(name) for name in BAR_MOVES]
    series = {"history": features[:, moves].sum(axis=1)}
    for depth in range(branches.horizon):
        series[f"depth_{depth + 1}"] = branches.features[:, :, depth, moves].sum(axis=-1, dtype=np.float64)
    return {
        name: {
            "drift": float(returns.mean() * bars_per_year),
            "volatility": float(returns.std() * math.sqrt(bars_per_year)),
        }
        for name, returns in series.items()
    }


def historical_forecast(model: MarketModel, features: np.ndarray) -> Forecast:
    """What the elites expect of the bar after each row.

    Args: features [T, M] raw historical rows. Returns: [T, 2] float64; that of the last row is of a bar to come.
    """
    moves = _moves(model)
    with torch.no_grad():
        outlook = model.outlook(torch.as_tensor(features, dtype=torch.float32))
    return Forecast(*(part[:, moves].double().numpy() for part in (outlook.mean, outlook.variance)))


def _moves(model: MarketModel) -> list[int]:
    names = [field.name for field in model.fields]
    return [names.index(name) for name in BAR_MOVES]


def historical_uncertainty(model: MarketModel, features: np.ndarray) -> np.ndarray:
    """Ensemble disagreement at each row: [T, M] -> [T] float64."""
    with torch.no_grad():
        return model.disagreement(torch.as_tensor(features, dtype=torch.float32)).double().numpy()
