"""The distribution of one feature: a Gaussian or a Student-t of the same mean and variance.

Tails are given by `inverse_dof`, one over the degrees of freedom: 0 is the Gaussian, and because the variance must
exist it stays below 1/2. Letters: N rows, K elites, M features, Q knots.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from world_model.losses import gaussian_nll

MAX_INVERSE_DOF = 0.4
"""2.5 degrees of freedom: a column with heavier tails is bad data rather than a market."""
INVERSE_DOFS = (0.0, *np.round(np.linspace(0.01, MAX_INVERSE_DOF, 40), 2).tolist())

# The driving normal number is cut here; beyond it lies one draw in 1.7 million.
KNOT_LIMIT = 5.0
NUM_KNOTS = 201
SCALE_ROUNDS = 60


def density_nll(
    mean: Tensor, var: Tensor, target: Tensor, inverse_dof: Tensor, constant: Tensor | None = None
) -> Tensor:
    """Negative log density, element by element, in nats.

    Args: mean, var: [..., M], the variance of the distribution itself, not its scale; target: broadcasts to them;
        inverse_dof: [M], 0 for Gaussian columns; constant: its `student_constant`, None computes it.
    Returns: [..., M].
    """
    dof = _safe_dof(inverse_dof.to(var.dtype))
    if constant is None:
        constant = student_constant(inverse_dof.to(var.dtype))
    square = (target - mean).square() / var
    student = 0.5 * torch.log(var) - constant + 0.5 * (dof + 1.0) * torch.log1p(square / (dof - 2.0))
    return torch.where(inverse_dof > 0.0, student, gaussian_nll(mean, torch.log(var), target))


def student_constant(inverse_dof: Tensor) -> Tensor:
    """Log of the Student-t density of variance 1 at its mean: [M], of inverse_dof [M]; no meaning where that is 0.

    It depends on nothing but the tails, and ONNX has no log-gamma.
    """
    dof = _safe_dof(inverse_dof)
    return torch.lgamma(0.5 * (dof + 1.0)) - torch.lgamma(0.5 * dof) - 0.5 * torch.log(math.pi * (dof - 2.0))


# Gaussian columns get degrees of freedom that nobody looks at.
def _safe_dof(inverse_dof: Tensor) -> Tensor:
    return 1.0 / torch.where(inverse_dof > 0.0, inverse_dof, torch.full_like(inverse_dof, 0.25))


def distribution(standard: Tensor, inverse_dof: Tensor) -> NDArray[np.float64]:
    """Distribution function at standardised values [..., M] (mean 0, variance 1), in [0, 1]."""
    values, inverse = standard.double().numpy(), inverse_dof.double().numpy()
    safe = np.where(inverse > 0.0, inverse, 0.25)
    student = special.stdtr(1.0 / safe, values / np.sqrt(1.0 - 2.0 * safe))
    result: NDArray[np.float64] = np.where(inverse > 0.0, student, special.ndtr(values))
    return result


def fit_tails(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Degrees of freedom and variance of standardised residuals, by maximum likelihood, column by column.

    For each of INVERSE_DOFS the scale solves its likelihood equation `s^2 = mean((nu+1) z^2 / (nu + z^2/s^2))` (Lange,
    Little and Taylor 1989, doi:10.2307/2290063); the likeliest pair is kept.

    Args: standard: [N, M], mean 0.
    Returns: inverse_dof [M], variance [M].
    """
    values = standard.double()
    squares = values.square()
    zero = torch.zeros_like(values)
    size = values.shape[1]
    best = torch.full((size,), math.inf, dtype=torch.float64)
    tail, variance = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for inverse in INVERSE_DOFS:
        scale = squares.mean(dim=0).clamp(min=1e-12)
        if inverse > 0.0:
            dof = 1.0 / inverse
            for _ in range(SCALE_ROUNDS):
                scale = ((dof + 1.0) * squares / (dof + squares / scale)).mean(dim=0).clamp(min=1e-12)
            scale = scale * dof / (dof - 2.0)
        column = torch.full((size,), inverse, dtype=torch.float64)
        score = density_nll(zero, scale.expand_as(values), values, column).mean(dim=0)
        better = score < best
        best = torch.where(better, score, best)
        tail, variance = torch.where(better, column, tail), torch.where(better, scale, variance)
    return tail, variance


def knots() -> Tensor:
    """[Q] evenly spaced values of the driving standard normal number."""
    return torch.linspace(-KNOT_LIMIT, KNOT_LIMIT, NUM_KNOTS, dtype=torch.float64)


def student_quantiles(inverse_dof: Tensor) -> Tensor:
    """Standardised quantiles [Q, M] at the levels of `knots`, variance 1: they make normal numbers heavy-tailed."""
    driving, inverse = knots().numpy()[:, None], inverse_dof.double().numpy()
    safe = np.where(inverse > 0.0, inverse, 0.25)
    # By symmetry from the lower tail, where levels keep their digits.
    lower = special.stdtrit(1.0 / safe, special.ndtr(-np.abs(driving))) * np.sqrt(1.0 - 2.0 * safe)
    return torch.from_numpy(np.where(inverse > 0.0, -np.sign(driving) * lower, driving))


def empirical_quantiles(standard: Tensor) -> Tensor:
    """Quantiles [Q, M] of what happened, standardised residuals [N, M], at the levels of `knots`."""
    levels = special.ndtr(knots().numpy())
    return torch.from_numpy(np.quantile(standard.double().numpy(), levels, axis=0))


def transform(noise: Tensor, quantiles: Tensor) -> Tensor:
    """Turn standard normal noise [B, M] into draws with the given quantiles [Q, M], linear between knots."""
    place = (noise.clamp(-KNOT_LIMIT, KNOT_LIMIT) + KNOT_LIMIT) * ((NUM_KNOTS - 1) / (2.0 * KNOT_LIMIT))
    # NaN has no place in the table; it must come out as NaN.
    below = torch.nan_to_num(place).floor().clamp(max=NUM_KNOTS - 2)
    index = below.to(torch.int64)
    left, right = torch.gather(quantiles, 0, index), torch.gather(quantiles, 0, index + 1)
    return left + (place - below) * (right - left)
