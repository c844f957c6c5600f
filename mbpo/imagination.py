"""Imagined market branches: short continuations of every historical bar, drawn from the world model.

The market does not react to the agent, so branches are independent of actions: they are generated once per fit and
reused by every policy update. Accounts, masks and rewards on them are exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from world_model import MarketModel

CHUNK_ROWS = 8192
"""Starting rows imagined at once; bounds memory, not results."""


@dataclass(frozen=True)
class MarketBranches:
    """K branches of H bars from each of T historical rows."""

    features: np.ndarray
    """[T, K, H, M] float32: imagined feature rows 1..H after row t."""
    uncertainty: np.ndarray
    """[T, K, H] float32: ensemble disagreement at those rows."""
    supported: np.ndarray
    """[T, K, H] bool: the row was drawn inside the support of the data; one drawn outside was moved to its edge."""

    def __post_init__(self) -> None:
        shape = self.features.shape[:3]
        if self.features.ndim != 4 or self.uncertainty.shape != shape or self.supported.shape != shape:
            raise ValueError(
                f"branches: expected features [T, K, H, M], uncertainty and supported [T, K, H], was "
                f"{list(self.features.shape)}, {list(self.uncertainty.shape)} and {list(self.supported.shape)}"
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
    rows = torch.empty((len(starts), horizon, starts.shape[1]))
    uncertainty = torch.empty((len(starts), horizon))
    supported = torch.empty((len(starts), horizon), dtype=torch.bool)
    with torch.no_grad():
        for first in range(0, len(starts), CHUNK_ROWS):
            current = starts[first : first + CHUNK_ROWS]
            for step in range(horizon):
                pick = torch.randint(len(elites), (len(current),), generator=generator)
                noise = torch.randn(current.shape, generator=generator)
                current = model.sample_next(current, elites[pick], noise)
                rows[first : first + CHUNK_ROWS, step] = current
                uncertainty[first : first + CHUNK_ROWS, step] = model.disagreement(current)
                supported[first : first + CHUNK_ROWS, step] = ~model.at_edge(current)
            if progress is not None:
                progress(min(first + CHUNK_ROWS, len(starts)), len(starts))
    if not torch.isfinite(rows).all():
        raise FloatingPointError("imagined market: expected finite features, the world model produced NaN or infinity")
    shape = (len(features), branches_per_row, horizon)
    return MarketBranches(
        rows.reshape(*shape, -1).numpy(), uncertainty.reshape(shape).numpy(), supported.reshape(shape).numpy()
    )


def branch_summary(
    branches: MarketBranches, features: np.ndarray, names: Sequence[str], bars_per_year: int
) -> dict[str, dict[str, float]]:
    """Drift and volatility of imagined bars beside those of the history they start from.

    Args: features [T, M] historical rows; names of the M columns.
    Returns: `history` and `depth_1` .. `depth_H`, each with `drift` (mean log return per year) and `volatility` (per
        square root of a year).
    """
    moves = [names.index("gap_return"), names.index("intraday_return")]
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


def historical_uncertainty(model: MarketModel, features: np.ndarray) -> np.ndarray:
    """Ensemble disagreement at each row: [T, M] -> [T] float64."""
    with torch.no_grad():
        return model.disagreement(torch.as_tensor(features, dtype=torch.float32)).double().numpy()
