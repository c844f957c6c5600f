"""The line under the mean, fitted to all rows, and how strongly it is shrunk and scaled by rows it was not fitted to.

The penalty of the line comes from the training rows alone. A few years of daily bars say little about it: the evidence
may find no drift at all, or twice too much, and where inputs are noisy copies of each other the least certain
directions spoil the line. How strongly it is shrunk, and one factor on every expected move, are two numbers, and the
validation rows know them better.

Letters: P markets, T rows, N training rows, M features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from world_model.calibration import OUTLIER
from world_model.linear import fit_line
from world_model.model import MarketModel
from world_model.volatility import BAR_MOVES

Floats = NDArray[np.float64]

# Penalties that are tried beside the evidence's own, per training row; the largest leaves the covariances alone.
STRENGTHS = (1.0, 10.0, 1000.0)
# Nats by which another penalty must beat the evidence's own, about a likelihood-ratio test at 5 %.
MARGIN = 2.0


@dataclass(frozen=True, kw_only=True)
class DriftCalibration:
    """What the validation rows said about expected moves."""

    strength: float | None
    """Penalty per training row in force; None is the evidence's own."""
    factor: float
    """Every expected move of that line was multiplied by it; at least 0."""
    size: float
    """Root mean square of an expected move in training, in predicted standard deviations of a bar, afterwards."""
    size_before: float
    """The same by the evidence alone."""
    slope: float
    """Least-squares slope of what happened on what that line expected; 1 where nothing was expected."""
    error: float | None
    """Its standard error; None where nothing was expected."""


@torch.no_grad()
def refit_line(model: MarketModel, current: Floats, following: Floats) -> None:
    """Fit the line once more, given networks and variance, to every row there is, the holdout included.

    Each row counts by the inverse of its predicted variance: a bar of a crash says a hundredth of what a calm one says.
    Args: current, following [N, M], raw units: training rows and holdout.
    """
    coefficients, _ = fit_line(*_line_problem(model, current, following))
    model.line.copy_(torch.from_numpy(coefficients))


@torch.no_grad()
def calibrate_drift(model: MarketModel, training: Floats, validation: Floats) -> DriftCalibration:
    """Settle penalty and size of the expected gap and intraday move on rows the model was not fitted to.

    For each penalty the size is the slope of a regression of the outcome on its forecast, through the origin (Mincer
    and Zarnowitz 1969), each bar weighted by the inverse of its predicted variance, under a normal prior around the
    evidence's own size. The prior is as wide as that size or, where the evidence found less, as one standard error of
    it, `1 / sqrt(N)` standard deviations of a bar: so a year of daily bars hardly moves it, and twenty markets of five
    years decide it. Another penalty than the evidence's has to be likelier by MARGIN nats. Surprises count for OUTLIER
    standard deviations at most.

    Args: training [N + 1, M], rows the line was fitted to, in time order; validation [T, M] of one market or [P, T, M].
    Returns: what was chosen; nothing changes for a model without gap and intraday moves that revert at once.
    Raises: ValueError on a shape.
    """
    size = model.num_features
    panel = validation[None] if validation.ndim == 2 else validation
    if panel.ndim != 3 or panel.shape[1] < 2 or panel.shape[2] != size:
        raise ValueError(f"validation: expected [T >= 2, {size}] or [P, T, {size}], was {[*validation.shape]}")
    if training.ndim != 2 or len(training) < 3 or training.shape[1] != size:
        raise ValueError(f"training: expected [N + 1 >= 3, {size}], was {[*training.shape]}")
    names = [field.name for field in model.fields]
    columns = [names.index(name) for name in BAR_MOVES if name in names]
    if len(columns) < len(BAR_MOVES) or not model.reverting[columns].all():
        return DriftCalibration(strength=None, factor=1.0, size=0.0, size_before=0.0, slope=1.0, error=None)

    rows = len(training) - 1
    expected, _ = _standardised(model, training, columns)
    usual = math.sqrt(float(expected @ expected) / rows)
    reach = max(usual, 1.0 / math.sqrt(rows))
    chosen: tuple[float, DriftCalibration, Tensor] | None = None
    for strength, line in _lines(model, training, columns):
        model.line[columns] = line
        expected, _ = _standardised(model, training, columns)
        unit = math.sqrt(float(expected @ expected) / rows)
        gain, found = _scale(model, panel, columns, strength, usual, reach, unit)
        if chosen is None or gain > chosen[0] + (MARGIN if chosen[1].strength is None else 0.0):
            chosen = gain, found, line
    assert chosen is not None  # noqa: S101 - the evidence's own line comes first
    _, found, line = chosen
    model.line[columns] = found.factor * line
    model.mean_shrinkage[columns] *= found.factor
    return found


# The evidence's own line of the columns, and one for each of STRENGTHS.
def _lines(model: MarketModel, training: Floats, columns: list[int]) -> Iterator[tuple[float | None, Tensor]]:
    own = model.line[columns].clone()
    inputs, targets, weights = _line_problem(model, training[:-1], training[1:])
    yield None, own
    for strength in STRENGTHS:
        penalties = np.array([strength * len(inputs)])
        coefficients, _ = fit_line(inputs, targets[:, columns], weights[:, columns], penalties)
        yield strength, torch.from_numpy(coefficients).to(model.line.dtype)


# Gain in log-likelihood over no drift, prior included, and the size of the line in force.
def _scale(
    model: MarketModel,
    panel: Floats,
    columns: list[int],
    strength: float | None,
    usual: float,
    reach: float,
    unit: float,
) -> tuple[float, DriftCalibration]:
    if unit == 0.0:
        return 0.0, DriftCalibration(strength=strength, factor=1.0, size=0.0, size_before=usual, slope=1.0, error=None)
    products, squares = 0.0, 0.0
    for market in panel:
        expected, happened = _standardised(model, market, columns)
        products += float(expected @ happened)
        squares += float(expected @ expected)
    # Of the factor: normal around the evidence's own size, both in units of what this line expects of a usual bar.
    centre, certainty = usual / unit, (unit / reach) ** 2
    factor = max((products + certainty * centre) / (squares + certainty), 0.0)
    gain = factor * products - 0.5 * factor**2 * squares - 0.5 * certainty * (factor - centre) ** 2
    error = squares**-0.5 if squares else None
    slope = products / squares if squares else 1.0
    return gain, DriftCalibration(
        strength=strength, factor=factor, size=factor * unit, size_before=usual, slope=slope, error=error
    )


# Expected moves [T-1] of the columns together and what happened, in predicted standard deviations.
def _standardised(model: MarketModel, features: Floats, columns: list[int]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    mean, variance = (part[:, columns].double().sum(dim=1) for part in model.mixture(rows[:-1]))
    spread = variance.sqrt()
    surprise = (rows[1:, columns].sum(dim=1) - mean) / spread
    expected = mean / spread
    return expected, expected + surprise.clamp(-OUTLIER, OUTLIER)


# What `fit_line` takes: standardised inputs [N, M], targets [N, M] in delta standard deviations, weights [N, M].
def _line_problem(model: MarketModel, current: Floats, following: Floats) -> tuple[Floats, Floats, Floats]:
    rows, outcome = torch.from_numpy(current), torch.from_numpy(following)
    mean, variance = (part.double() for part in model.mixture(rows))
    learned = mean - model.baseline(rows).double()
    inputs = model.input_normaliser.standardise(model.clamp(rows).numpy())
    spread = model.delta_normaliser.std.double()
    start = torch.where(model.reverting, torch.zeros_like(rows), rows)
    targets = (outcome - learned - start) / spread
    return inputs.double().numpy(), targets.numpy(), (spread * spread / variance).numpy()
