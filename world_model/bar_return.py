"""The density of the next bar's whole return, close to close, that the model implies.

The model knows a bar as gap and move from open to close. Given the row and the member, the two are independent, so
their sum is a Gaussian again, or with Student-t columns the convolution of two of them.

Letters: N rows, K elites, Q quadrature nodes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from world_model.density import density_nll
from world_model.model import MarketModel
from world_model.volatility import BAR_MOVES

Floats = NDArray[np.float64]

# Of the normal number that drives the narrower part: beyond 7 lies 1e-12 of the mass.
NODES = np.linspace(-7.0, 7.0, 281)


@torch.no_grad()
def return_log_density(model: MarketModel, features: Floats) -> Floats:
    """Log density of each bar's log return, `gap_return + intraday_return`, given the row before it.

    Args: features [N+1, M], raw units, in time order, the model's columns.
    Returns: [N], nats per unit of log return, of the equal-weight mixture of elites.
    Raises: ValueError if the model has no such columns or the shape is wrong.
    """
    names = [field.name for field in model.fields]
    missing = [name for name in BAR_MOVES if name not in names]
    if missing:
        raise ValueError(f"model: expected the features {', '.join(BAR_MOVES)}, was without {', '.join(missing)}")
    if features.ndim != 2 or features.shape[1] != len(names) or len(features) < 2:
        raise ValueError(f"features: expected [N+1 >= 2, {len(names)}], was {[*features.shape]}")
    columns = [names.index(name) for name in BAR_MOVES]
    values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    mean, var = (part[..., columns].double() for part in model.predict(values[:-1], model.elites))
    tails = model.inverse_dof[columns].double()
    moved = values[1:, columns].sum(dim=-1)
    by_member = sum_log_density(moved.numpy(), mean.sum(dim=-1).numpy(), var.numpy(), tails.numpy())
    result: Floats = special.logsumexp(by_member, axis=0) - math.log(len(by_member))
    return result


def sum_log_density(value: Floats, mean: Floats, var: Floats, inverse_dof: Floats) -> Floats:
    """Log density of the sum of two independent columns, each Gaussian or Student-t.

    Args: value: broadcasts to mean [..., N], the sum's; var [..., N, 2]; inverse_dof [2], 0 for a Gaussian.
    Returns: [..., N].
    """
    if not inverse_dof.any():
        total = var.sum(axis=-1)
        gaussian: Floats = -0.5 * (np.log(2.0 * math.pi * total) + (value - mean) ** 2 / total)
        return gaussian
    # Over the quantiles of the narrower column, where the density of the wider one is smooth.
    first, second = (_convolved(value - mean, var, inverse_dof, narrow) for narrow in (0, 1))
    return np.where(var[..., 0] <= var[..., 1], first, second)


# The integral of wide(x - q(z)) over the standard normal z that drives the narrow column's quantile q.
def _convolved(distance: Floats, var: Floats, inverse_dof: Floats, narrow: int) -> Floats:
    step = NODES[1] - NODES[0]
    inverse = float(inverse_dof[narrow])
    quantiles = NODES
    if inverse > 0.0:
        lower = special.stdtrit(1.0 / inverse, special.ndtr(-np.abs(NODES)))
        quantiles = -np.sign(NODES) * lower * math.sqrt(1.0 - 2.0 * inverse)
    left = distance[..., None] - np.sqrt(var[..., narrow])[..., None] * quantiles
    wide = torch.from_numpy(np.broadcast_to(var[..., 1 - narrow][..., None], left.shape).copy())[..., None]
    tail = torch.from_numpy(inverse_dof[1 - narrow : 2 - narrow or None].copy())
    zero: Tensor = torch.zeros_like(wide)
    nll = density_nll(zero, wide, torch.from_numpy(left)[..., None], tail)[..., 0].numpy()
    weights = np.log(step / math.sqrt(2.0 * math.pi)) - 0.5 * NODES**2
    result: Floats = special.logsumexp(weights - nll, axis=-1)
    return result
