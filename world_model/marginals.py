"""The shape of each column's distribution around its mean and variance, and whether the model is worth more than none.

Letters: N rows, K elites, M features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from world_model.calibration import LEVELS, MULTIPLIER_BOUNDS
from world_model.density import density_nll, distribution, empirical_quantiles, fit_tails, student_quantiles
from world_model.model import MarketModel


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
def mixture_nll(model: MarketModel, current: Tensor, following: Tensor) -> Tensor:
    """Negative log density of each column under the equal-weight mixture: [N, M], nats per raw unit."""
    mean, var = (part.double() for part in model.predict(current, model.elites))
    nll = density_nll(mean, var, following, model.inverse_dof.double())
    return np.log(len(model.elites)) - torch.logsumexp(-nll, dim=0)


@torch.no_grad()
def calibrate_tails(model: MarketModel, current: Tensor, following: Tensor) -> None:
    """Give every column the degrees of freedom, and the variance that goes with them, that make these rows likeliest.

    Found after the fit on the holdout's standardised residuals: on rows the networks were fitted to, tails look thinner
    than they are. Args: current, following [N, M], raw units.
    """
    mean, var = (part.double() for part in model.mixture(current))
    tails, variance = fit_tails((following - mean) / torch.sqrt(var))
    varying = model.varying
    model.inverse_dof.copy_(torch.where(varying, tails, torch.zeros_like(tails)))
    factor = torch.where(varying, variance, torch.ones_like(variance))
    model.variance_scale.copy_((model.variance_scale * factor).clamp(*MULTIPLIER_BOUNDS))
    model.innovations.copy_(student_quantiles(model.inverse_dof))


@torch.no_grad()
def follow_baselines(model: MarketModel, holdout: NDArray[np.float64], training: NDArray[np.float64]) -> None:
    """Let columns on which the model is no better than `MarketModel.constant_forecast` follow it.

    Such a column is drawn as baseline plus one of the baseline's own residuals in training: what is not understood is
    replayed, not pretended. The driving normal number picks the residual by its level, so that a draw still depends on
    nothing but the noise it is given.

    Args: holdout [N, M]: rows that judge, by mean log-likelihood; training [T, M]: rows whose residuals are drawn.
    """
    current, following = torch.from_numpy(holdout[:-1]), torch.from_numpy(holdout[1:])
    model.follows_baseline.fill_(False)
    ours = mixture_nll(model, current, following).mean(dim=0)
    worse = model.varying & (ours >= constant_nll(model, current, following).mean(dim=0))
    mean, var = (part.double() for part in model.constant_forecast(torch.from_numpy(training[:-1])))
    residuals = (torch.from_numpy(training[1:]) - mean) / torch.sqrt(var)
    model.follows_baseline.copy_(worse)
    model.inverse_dof.masked_fill_(worse, 0.0)
    model.innovations.copy_(torch.where(worse, empirical_quantiles(residuals), model.innovations))


def constant_nll(model: MarketModel, current: Tensor, following: Tensor) -> Tensor:
    """Negative log density under the Gaussian `constant_forecast`: [N, M], nats per raw unit."""
    mean, var = (part.double() for part in model.constant_forecast(current))
    return density_nll(mean, var.expand_as(mean), following, torch.zeros(mean.shape[-1], dtype=torch.float64))
