"""How well the world model knows the rows a policy is on."""

from __future__ import annotations

import numpy as np
import torch

from world_model import MarketModel

CHUNK_ROWS = 8192


@torch.no_grad()
def model_error(model: MarketModel, features: np.ndarray) -> np.ndarray:
    """Squared standardised error of the one-step prediction at each row that has a successor.

    Args: features [T, M] rows in time order.
    Returns: [T-1] float64, mean over varying features of `(next - mean)^2 / variance` under the mixture of elites: 1
        where the model is as wrong as it says.
    """
    rows = torch.as_tensor(features, dtype=torch.float32)
    parts = []
    for first in range(0, len(rows) - 1, CHUNK_ROWS):
        current, following = (rows[first + lag : min(first + CHUNK_ROWS, len(rows) - 1) + lag] for lag in (0, 1))
        mean, variance = model.mixture(current)
        parts.append(((following - mean).square() / variance)[:, model.varying].double().mean(dim=1))
    return torch.cat(parts).numpy()
