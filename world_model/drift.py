"""How large the expected move of a bar is, settled on rows that had no part in the fit.

The line's penalty comes from the training rows alone. A few years of daily bars say little about it: the evidence may
find no drift at all, or twice too much, while its direction is sound. One factor on every expected move is a single
number, and the validation rows know it better.

Letters: P markets, T rows, M features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from world_model.calibration import OUTLIER
from world_model.model import MarketModel
from world_model.volatility import BAR_MOVES

# What a factor is believed to be before the validation rows are seen: 1, give or take this much.
PRIOR_STD = 1.0


@dataclass(frozen=True, kw_only=True)
class DriftScale:
    """What the validation rows said about the size of expected moves."""

    factor: float
    """Every expected move was multiplied by it; at least 0."""
    slope: float
    """Least-squares slope of what happened on what was expected; 1 where nothing was expected."""
    error: float | None
    """Its standard error; None where nothing was expected."""


@torch.no_grad()
def rescale_drift(model: MarketModel, features: NDArray[np.float64]) -> DriftScale:
    """Multiply the expected gap and intraday move by one factor, found on rows the model was not fitted to.

    The slope of a regression of the outcome on its forecast, through the origin (Mincer and Zarnowitz 1969), each bar
    weighted by the inverse of its predicted variance, and shrunk towards 1 by a normal prior of one standard deviation
    of PRIOR_STD: a year of daily bars hardly moves it, twenty markets of five years decide it. Surprises count for
    OUTLIER standard deviations at most.

    Args: features [T, M] of one market or [P, T, M], raw units, in time order, T >= 2.
    Returns: the factor and what it comes from; 1 for a model without gap and intraday moves that revert at once.
    Raises: ValueError on a shape.
    """
    panel = features[None] if features.ndim == 2 else features
    if panel.ndim != 3 or panel.shape[1] < 2 or panel.shape[2] != model.num_features:
        raise ValueError(
            f"features: expected [T >= 2, {model.num_features}] or [P, T, {model.num_features}], "
            f"was {[*features.shape]}"
        )
    names = [field.name for field in model.fields]
    columns = [names.index(name) for name in BAR_MOVES if name in names]
    if len(columns) < len(BAR_MOVES) or not model.reverting[columns].all():
        return DriftScale(factor=1.0, slope=1.0, error=None)
    products, squares = 0.0, 0.0
    for rows in torch.from_numpy(np.ascontiguousarray(panel, dtype=np.float64)):
        mean, variance = (part[:, columns].double().sum(dim=1) for part in model.mixture(rows[:-1]))
        spread = variance.sqrt()
        expected, surprise = mean / spread, (rows[1:, columns].sum(dim=1) - mean) / spread
        happened = expected + surprise.clamp(-OUTLIER, OUTLIER)
        products += float(expected @ happened)
        squares += float(expected @ expected)
    certainty = PRIOR_STD**-2
    factor = max((products + certainty) / (squares + certainty), 0.0)
    model.line[columns] *= factor
    model.mean_shrinkage[columns] *= factor
    if squares == 0.0:
        return DriftScale(factor=factor, slope=1.0, error=None)
    return DriftScale(factor=factor, slope=products / squares, error=squares**-0.5)
