"""Do predicted means and variances have the right size? One factor each per feature.

Letters: N rows, M features.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Central intervals that are reported, in percent.
LEVELS = (50, 80, 95)
# In standard deviations. Fat market tails stay below it, so for them the factor is the plain mean of squares.
OUTLIER = 10.0
OUTLIER_ROUNDS = 50
# A multiplier outside these bounds points at a broken column; it must neither silence nor explode it.
MULTIPLIER_BOUNDS = (1e-2, 1e2)


def shrinkage_factor(departure: Tensor, outcome: Tensor, spread: Tensor) -> Tensor:
    """How much of a predicted departure from the baseline surely came true, in [0, 1].

    The least-squares slope of outcome on departure, less one standard error (White 1980, doi:10.2307/1912934): a slope
    of 0.5 give or take 0.6 is no reason to move a mean. Where the network found noise the factor is 0 and the baseline
    speaks; where it found structure it stays close to 1.
    Small errors of a mean matter when branches add them up step by step: a drift that is not there becomes a reason
    never to invest. Both sides are clipped at OUTLIER spreads, so that one bad bar does not decide.

    Args: departure, outcome: [N, M], predicted and actual difference to the baseline; spread: [M], their unit.
    Returns: [M]; 1 where nothing departs.
    """
    predicted, actual = ((part / spread).clamp(-OUTLIER, OUTLIER) for part in (departure, outcome))
    power = (predicted * predicted).sum(dim=0)
    divisor = torch.where(power > 0, power, torch.ones_like(power))
    slope = (predicted * actual).sum(dim=0) / divisor
    error = ((actual - slope * predicted) * predicted).square().sum(dim=0).sqrt() / divisor
    return torch.where(power > 0, (slope - error).clamp(0.0, 1.0), torch.ones_like(power))


def variance_multiplier(residual: Tensor, variance: Tensor, varying: Tensor) -> Tensor:
    """The factor per feature that brings squared standardised residuals to a mean of 1, bounded by MULTIPLIER_BOUNDS.

    Without outliers this is their plain mean, the maximum of the Gaussian likelihood. Residuals beyond OUTLIER times
    the scale count as OUTLIER (Huber's proposal 2, doi:10.1214/aoms/1177703732, sec. 7): one bar with volume 0 would
    otherwise widen that column's noise fivefold for ever.

    Args: residual, variance: [N, M]; varying: [M] bool, other columns keep 1.
    Returns: [M].
    """
    squares = residual * residual / variance
    factor = squares.mean(dim=0)
    # Starting above, each round can only lower the factor; 50 rounds settle it far below sampling error.
    for _ in range(OUTLIER_ROUNDS):
        factor = torch.minimum(squares, OUTLIER**2 * factor).mean(dim=0)
    factor = factor.clamp(*MULTIPLIER_BOUNDS)
    return torch.where(varying, factor, torch.ones_like(factor))
