"""The likelihood the ensemble is trained on, in true nats. Letters: E members, B batch, M features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def gaussian_nll(mean: Tensor, logvar: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of a diagonal Gaussian, element by element (PETS, arXiv:1805.12114, eq. 1).

    Unlike the paper the constant `0.5*log(2*pi)` is kept, so that numbers are nats and can be compared with
    any other density.

    Args: mean, logvar, target: [E, B, M], or shapes that broadcast to it.
    Returns: [E, B, M], nats. NaN in, NaN out.
    """
    residual = target - mean
    return HALF_LOG_TWO_PI + 0.5 * (logvar + residual * residual * torch.exp(-logvar))


def member_nll(mean: Tensor, logvar: Tensor, target: Tensor) -> Tensor:
    """Mean `gaussian_nll` of each member over its rows and features.

    Args: mean, logvar, target: [E, B, M].
    Returns: [E], nats per feature.
    """
    return gaussian_nll(mean, logvar, target).mean(dim=(1, 2))
