"""The likelihood the ensemble is trained on, in true nats. Letters: E members, B batch, M features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from world_model.errors import TrainingError

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


def mixture_nll(nll: Tensor) -> Tensor:
    """Negative log density of the equal-weight mixture of members, without leaving log space.

    Args: nll: [E, ...], of each member.
    Returns: [...].
    """
    return math.log(nll.shape[0]) - torch.logsumexp(-nll, dim=0)


def refuse_non_finite(losses: Tensor, epoch: int, what: str) -> None:
    """Raise TrainingError, which names the members, unless every loss [E] is a finite number."""
    finite = torch.isfinite(losses)
    if not finite.all():
        members = tuple(torch.nonzero(~finite).squeeze(1).tolist())
        raise TrainingError(
            f"{what}: expected finite numbers, was {losses.tolist()} in epoch {epoch}, members {members}; "
            "a smaller learning_rate may help",
            epoch=epoch,
            members=members,
        )


def gaussian_nll_gradient(
    outputs: Tensor, target: Tensor, logvar_mid: float, logvar_half: float, scratch: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Sum of `gaussian_nll` without its constant, and its gradient by what the last layer gave, in place.

    The last layer gives the mean and, next to it, what `logvar = mid + half*tanh(raw)` bounds. With
    `z = (target - mean)/std` the gradients are `-z/std` by the mean and `half*(1 - tanh(raw)**2)*(1 - z**2)/2` by raw.

    Args:
        outputs: [B, 2*M], mean and raw; overwritten by the gradients.
        target: [B, M].
        logvar_mid, logvar_half: middle and half width of the bounds of the log-variance.
        scratch: three buffers [B, M].

    Returns: [], nats; NaN in, NaN out.
    """
    size = target.shape[1]
    mean, raw = outputs[:, :size], outputs[:, size:]
    squashed, precision, residual = scratch
    torch.tanh(raw, out=squashed)
    torch.mul(squashed, -logvar_half, out=precision).sub_(logvar_mid).exp_()
    torch.sub(mean, target, out=residual)
    torch.mul(residual, precision, out=mean)
    square = torch.mul(residual, mean, out=residual)
    loss = 0.5 * (square.sum() + logvar_half * squashed.sum() + logvar_mid * squashed.numel())
    slope = torch.mul(squashed, squashed, out=precision).neg_().add_(1.0).mul_(0.5 * logvar_half)
    torch.addcmul(slope, slope, square, value=-1.0, out=raw)
    return loss
