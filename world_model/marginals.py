"""The shape of each column's distribution around its mean and variance, and whether the model is worth more than none.

Letters: N rows, K elites, M features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from world_model.calibration import LEVELS, MULTIPLIER_BOUNDS, variance_multiplier
from world_model.density import density_nll, distribution, empirical_quantiles, fit_tails, student_quantiles
from world_model.losses import mixture_nll
from world_model.model import MarketModel

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the networks' log-variance that `shrink_logvar` chooses from."""


@torch.no_grad()
def mixture_pit(model: MarketModel, current: Tensor, following: Tensor) -> NDArray[np.float64]:
    """The mixture's distribution function at what happened: [N, M] -> [N, M], uniform on [0, 1] if calibrated."""
    mean, var = (part.double() for part in model.predict(current, model.elites))
    shares = distribution((following - mean) / torch.sqrt(var), model.inverse_dof)
    result: NDArray[np.float64] = shares.mean(axis=0)
    return result


def central_coverage(pit: NDArray[np.float64], levels: Sequence[int] = LEVELS) -> dict[str, float]:
    """Share of PIT values inside the central intervals, whatever the distribution they belong to.

    Args: pit: any shape; levels: percent.
    Returns: level in percent (as text, for JSON) to share in [0, 1]; a calibrated model gives level/100.
    """
    reach = np.abs(2.0 * pit - 1.0)
    return {str(level): float((reach <= level / 100.0).mean()) for level in levels}


@torch.no_grad()
def next_row_nll(model: MarketModel, current: Tensor, following: Tensor) -> Tensor:
    """Negative log density of each column under the equal-weight mixture: [N, M], nats per raw unit."""
    mean, var = (part.double() for part in model.predict(current, model.elites))
    return mixture_nll(density_nll(mean, var, following, model.inverse_dof.double()))


@torch.no_grad()
def calibrate_variance(model: MarketModel, current: Tensor, following: Tensor) -> None:
    """Set `variance_scale` and, for the Student-t likelihood, the tails that make these rows likeliest.

    Tails are found on the standardised residuals of the fitted model, column by column. Columns that follow the
    baseline stay as they are. Args: current, following [N, M], raw units.
    """
    own = model.varying & ~model.follows_baseline
    model.variance_scale.fill_(1.0)
    mean, var = (part.double() for part in model.mixture(current))
    tails, factor = _tails_and_factor(model, following - mean, var)
    model.variance_scale.copy_(torch.where(own, factor, torch.ones_like(factor)))
    model.inverse_dof.copy_(torch.where(own, tails, torch.zeros_like(tails)))
    draws = student_quantiles(model.inverse_dof).to(torch.float32)
    model.innovations.copy_(torch.where(model.follows_baseline, model.innovations, draws))


@torch.no_grad()
def shrink_logvar(model: MarketModel, current: Tensor, following: Tensor) -> None:
    """Set how much of the networks' log-variance is believed, column by column: one of SHARES.

    The smallest whose mean log-likelihood is within one standard error of the best (Breiman et al. 1984, sec. 3.4.3,
    with paired rows): far from what it was trained on, as in a crash, a network's variance is wrong by more than the
    holdout can show. At 0 the volatility line speaks alone. Each share is judged with the variance and tails that suit
    it best, since a common factor is settled later.

    Args: current, following [N, M], raw units: rows no gradient has seen.
    """
    model.variance_scale.fill_(1.0)
    zero = torch.zeros(following.shape, dtype=torch.float64)
    scores = []
    for share in SHARES:
        model.logvar_shrinkage.fill_(share)
        mean, var = (part.double() for part in model.mixture(current))
        tails, factor = _tails_and_factor(model, following - mean, var)
        scores.append(density_nll(zero, var * factor, following - mean, tails))
    nll = torch.stack(scores)
    best = nll.mean(dim=1).argmin(dim=0)
    behind = nll - nll.gather(0, best.expand(1, *nll.shape[1:]))
    close = behind.mean(dim=1) <= behind.std(dim=1) / math.sqrt(len(following))
    # The first that is close; the best is close to itself.
    model.logvar_shrinkage.copy_(torch.tensor(SHARES)[close.to(torch.int8).argmax(dim=0)])


def _tails_and_factor(model: MarketModel, residual: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    if model.config.likelihood == "gaussian":
        return torch.zeros(residual.shape[1], dtype=torch.float64), variance_multiplier(residual, var, model.varying)
    tails, factor = fit_tails(residual / torch.sqrt(var))
    return tails, factor.clamp(*MULTIPLIER_BOUNDS)


@torch.no_grad()
def refit_volatility(model: MarketModel, features: NDArray[np.float64]) -> None:
    """Fit the volatility line once more, given mean and networks, to every row there is, the holdout included.

    Early stopping needs rows no gradient has seen; a dozen coefficients do not, and the newest rows know most about
    today's market. Args: features [T, M], raw units: training rows and holdout in one piece.
    """
    current, following = torch.from_numpy(features[:-1]), torch.from_numpy(features[1:])
    mean, var = (part.double() for part in model.mixture(current))
    # Columns that follow the baseline have a variance without the line.
    line = model.volatility(current.to(torch.float32)).double().masked_fill_(model.follows_baseline, 0.0)
    model.volatility.fit(features[:-1], (following - mean) * torch.exp(0.5 * line) / torch.sqrt(var), model.varying)


@torch.no_grad()
def follow_baselines(model: MarketModel, holdout: NDArray[np.float64], training: NDArray[np.float64]) -> None:
    """Let columns on which the model is no better than `MarketModel.constant_forecast` follow their straight line.

    Such a column is drawn as baseline plus one of the baseline's own residuals in training: what is not understood is
    replayed, not pretended. The driving normal number picks the residual by its level, so that a draw still depends on
    nothing but the noise it is given.

    Args: holdout [N, M]: rows that judge, by mean log-likelihood; training [T, M]: rows whose residuals are drawn.
    """
    current, following = torch.from_numpy(holdout[:-1]), torch.from_numpy(holdout[1:])
    model.follows_baseline.fill_(False)
    ours = next_row_nll(model, current, following).mean(dim=0)
    worse = model.varying & (ours >= constant_nll(model, current, following).mean(dim=0))
    mean = model.baseline(torch.from_numpy(training[:-1])).double()
    residuals = (torch.from_numpy(training[1:]) - mean) / torch.sqrt(model.constant_variance.double())
    model.follows_baseline.copy_(worse)
    model.mean_shrinkage.masked_fill_(worse, 0.0)
    model.inverse_dof.masked_fill_(worse, 0.0)
    model.innovations.copy_(torch.where(worse, empirical_quantiles(residuals), model.innovations))


def constant_nll(model: MarketModel, current: Tensor, following: Tensor) -> Tensor:
    """Negative log density under the Gaussian `constant_forecast`: [N, M], nats per raw unit."""
    mean, var = (part.double() for part in model.constant_forecast(current))
    return density_nll(mean, var.expand_as(mean), following, torch.zeros(mean.shape[-1], dtype=torch.float64))
