"""How far the next bar will move, as far as a straight line knows: log-variance from volatilities and recent moves.

A network trained on a few thousand bars finds the size of the next move less well than GARCH with its three
parameters. What makes GARCH good is known: log-volatility persists, a fall raises it more than a rise, and it may be
extrapolated. Here that is a line under the network, which learns what the line leaves. Because log-volatility is linear
in it, a crash beyond everything in the training rows is met by a variance beyond everything in them.

Letters: T rows, N training rows, M features, P covariates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.fields import Field

VOLATILITY_UNIT = "per sqrt(year)"
MOVE_UNIT = "log return"
BAR_MOVES = ("gap_return", "intraday_return")
"""The two parts of a bar's own move; their sum's size enters as well."""

# A window in which nothing moved has log 0; a tenth of the usual size is as quiet as it counts.
FLOOR_SHARE = 0.1
# Standard deviations of a covariate beyond which a row counts as bad data, not as news.
COVARIATE_LIMIT = 8.0
# How far the line may leave what it said on the training rows: four times the standard deviation.
REACH = 2.0 * math.log(4.0)
# Student-t with these degrees of freedom judges the line: a single bar must not set it.
ROBUST_DOF = 8.0
# Prior precision of each slope, in rows: N(0, 0.3^2) per standard deviation of its covariate.
SLOPE_PRECISION = 10.0
# Nothing is quieter than a hundredth of its standard deviation: a column may stand still for years.
MIN_SQUARE = 1e-4
# Each round removes a third of what is left or more.
ROUNDS = 60


class VolatilityLine(nn.Module):
    """Log-variance of the next row's deviations as a line in P covariates of this row; zero without volatilities.

    Covariates: the logarithm of every field that is a size (no upper bound, never negative), every field of unit
    "log return" in units of current volatility (the geometric mean of the volatility fields), and the size of the bar's
    own move in the same units. `fields` decide by their units, so that a table without volatilities has no line.
    """

    floor: Tensor
    centre: Tensor
    spread: Tensor
    weights: Tensor
    intercept: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__()
        names = [field.name for field in fields]
        self.sizes = [j for j, field in enumerate(fields) if field.low == 0.0 and math.isinf(field.high)]
        # Positions among the sizes.
        self.volatilities = [i for i, j in enumerate(self.sizes) if fields[j].unit == VOLATILITY_UNIT]
        self.moves = [j for j, field in enumerate(fields) if field.unit == MOVE_UNIT]
        self.bar = [names.index(name) for name in BAR_MOVES if name in names]
        self.active = bool(self.volatilities and len(self.bar) == len(BAR_MOVES))
        covariates, size = len(self.sizes) + len(self.moves) + 1 if self.active else 0, len(fields)
        self.register_buffer("floor", torch.ones(len(self.sizes)))
        self.register_buffer("centre", torch.zeros(covariates))
        self.register_buffer("spread", torch.ones(covariates))
        self.register_buffer("weights", torch.zeros(covariates, size))
        self.register_buffer("intercept", torch.zeros(size))
        self.register_buffer("low", torch.zeros(size))
        self.register_buffer("high", torch.zeros(size))

    def forward(self, features: Tensor) -> Tensor:
        """Log-variance to add to the network's. features [..., M], raw units -> [..., M]."""
        inputs = (self._covariates(features) - self.centre) / self.spread
        line = self.intercept + inputs.clamp(-COVARIATE_LIMIT, COVARIATE_LIMIT) @ self.weights
        return torch.minimum(torch.maximum(line, self.low), self.high)

    @torch.no_grad()
    def fit(self, values: NDArray[np.float64], deviations: Tensor, varying: Tensor) -> None:
        """Fit the line by penalised Student-t likelihood, all columns at once.

        Args:
            values: [N, M], raw units: rows to predict from.
            deviations: [N, M], what the mean left of each following row, in units of the training deltas' deviation.
            varying: [M] bool; other columns keep zero.
        """
        if not self.active:
            return
        rows = torch.from_numpy(np.ascontiguousarray(values))
        self.floor.copy_((FLOOR_SHARE * rows[:, self.sizes].mean(dim=0)).clamp(min=1e-12))
        raw = self._covariates(rows)
        self.centre.copy_(raw.mean(dim=0))
        spread = raw.std(dim=0, correction=0)
        self.spread.copy_(torch.where(spread > 1e-9, spread, torch.ones_like(spread)))
        inputs = ((raw - self.centre) / self.spread).clamp(-COVARIATE_LIMIT, COVARIATE_LIMIT)
        squares = (deviations.double() - deviations.double().mean(dim=0)).square().clamp(min=MIN_SQUARE)
        coefficients = fit_log_variance(inputs, squares)
        coefficients = torch.where(varying, coefficients, torch.zeros_like(coefficients))
        self.intercept.copy_(coefficients[0])
        self.weights.copy_(coefficients[1:])
        said = coefficients[0] + inputs @ coefficients[1:]
        reach = torch.where(varying, REACH, 0.0)
        self.low.copy_(said.min(dim=0).values - reach)
        self.high.copy_(said.max(dim=0).values + reach)

    # Divided by volatility, so that a fall of one per cent is news in a calm market and none in a crash.
    def _covariates(self, features: Tensor) -> Tensor:
        logs = torch.log(features[..., self.sizes].clamp(min=0.0) + self.floor)
        unit = torch.exp(logs[..., self.volatilities].mean(dim=-1, keepdim=True))
        own = features[..., self.bar].sum(dim=-1, keepdim=True).abs()
        return torch.cat((logs, features[..., self.moves] / unit, own / unit), dim=-1)


def fit_log_variance(inputs: Tensor, squares: Tensor) -> Tensor:
    """Coefficients of `log variance = [1, inputs] @ coefficients` by penalised Student-t likelihood.

    The negative log-likelihood `h/2 + (nu+1)/2 * log(1 + y^2 e^-h / (nu-2))` is convex in h with a second derivative of
    at most (nu+1)/8, so that one matrix, inverted once, makes every step a descent (Boehning and Lindsay 1988,
    doi:10.1007/BF00049423).

    Args: inputs [N, P], standardised; squares [N, M], squared deviations > 0.
    Returns: [1 + P, M], intercept first, float64.
    """
    design = torch.cat((torch.ones(len(inputs), 1, dtype=torch.float64), inputs.double()), dim=1)
    squares = squares.double()
    prior = torch.full((design.shape[1], 1), SLOPE_PRECISION, dtype=torch.float64)
    prior[0] = 0.0
    factor = torch.linalg.cholesky(design.T @ design * ((ROBUST_DOF + 1.0) / 8.0) + torch.diag(prior[:, 0] + 1e-9))
    coefficients = torch.zeros(design.shape[1], squares.shape[1], dtype=torch.float64)
    coefficients[0] = torch.log(squares.mean(dim=0))
    for _ in range(ROUNDS):
        ratio = squares * torch.exp(-(design @ coefficients))
        slope = 0.5 - 0.5 * (ROBUST_DOF + 1.0) * ratio / (ROBUST_DOF - 2.0 + ratio)
        coefficients -= torch.cholesky_solve(design.T @ slope + prior * coefficients, factor)
    return coefficients
