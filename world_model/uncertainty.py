"""How unsure an ensemble is, row by row: named measures with their papers.

All take mean [E, B, M] and var [E, B, M] of the members that count, which are the elites, and return [B]. Units are
those of the arguments; `WorldModel` passes units of the training targets' standard deviation, so that no column rules
by its scale. NaN in a row gives NaN there. Letters: E members, B batch, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]
"""(mean [E, B, M], var [E, B, M]) to [B]."""


def max_aleatoric(mean: Tensor, var: Tensor) -> Tensor:
    """Largest norm of a member's standard deviation: what MOPO charges for (arXiv:2005.13239, sec. 4.3)."""
    _check(mean, var)
    # Distances are roots of sums: norms of torch have another gradient at 0, which nobody needs here.
    return torch.sqrt(var.sum(dim=-1)).amax(dim=0)


def ensemble_std(mean: Tensor, var: Tensor) -> Tensor:
    """Norm of the standard deviation of the members' means: epistemic alone (Lu et al., arXiv:2110.04135, sec. 3)."""
    _check(mean, var)
    return torch.sqrt(variance_of_means(mean).sum(dim=-1))


def max_pairwise(mean: Tensor, var: Tensor) -> Tensor:
    """Largest distance between two members' means: disagreement of MOReL (arXiv:2005.05951, eq. 2)."""
    _check(mean, var)
    worst = torch.zeros(mean.shape[1], dtype=mean.dtype)
    for first in range(len(mean)):
        # Against all later members at once; [E, E, B, M] would hold every pair twice.
        gap = mean[first + 1 :] - mean[first]
        if len(gap):
            worst = torch.maximum(worst, torch.sqrt((gap * gap).sum(dim=-1)).amax(dim=0))
    return worst + 0.0 * mean.sum(dim=(0, 2))  # a single member is never at odds, but NaN stays NaN


def total_std(mean: Tensor, var: Tensor) -> Tensor:
    """Norm of the mixture's standard deviation, `var(means) + mean(vars)` (Lakshminarayanan, arXiv:1612.01474)."""
    _check(mean, var)
    return torch.sqrt(total_variance(mean, var).sum(dim=-1))


def total_variance(mean: Tensor, var: Tensor) -> Tensor:
    """Law of total variance of the equal-weight mixture, [B, M]: `var(means) + mean(vars)`."""
    return variance_of_means(mean) + var.mean(dim=0)


def variance_of_means(mean: Tensor) -> Tensor:
    """Population variance over the members, [B, M]; written out because `torch.var(0)` costs more than the network."""
    gap = mean - mean.mean(dim=0)
    return (gap * gap).mean(dim=0)


MEASURES: dict[str, Measure] = {
    "max_aleatoric": max_aleatoric,
    "ensemble_std": ensemble_std,
    "max_pairwise": max_pairwise,
    "total_std": total_std,
}
"""By name, for configs."""


def measure_named(name: str) -> Measure:
    """One of MEASURES.  Raises: ValueError naming those there are."""
    if name not in MEASURES:
        raise ValueError(f"uncertainty: expected one of {sorted(MEASURES)}, was {name!r}")
    return MEASURES[name]


def _check(mean: Tensor, var: Tensor) -> None:
    if mean.ndim != 3 or mean.shape != var.shape or not len(mean):
        raise ValueError(f"mean, var: expected [E >= 1, B, M] both, was {[*mean.shape]} and {[*var.shape]}")
