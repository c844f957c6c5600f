"""How well the world model knows the rows a policy is on."""

from __future__ import annotations

import numpy as np
import torch

from world_model import MarketModel


@torch.no_grad()
def model_error(model: MarketModel, features: np.ndarray) -> np.ndarray:
    """Squared standardised error of the one-step prediction at each row that has a successor.

    Args: features [T, M] rows in time order.
    Returns: [T-1] float64, mean over varying features of `(next - mean)^2 / variance` under the mixture of elites: 1
        where the model is as wrong as it says.
    """
    rows = torch.as_tensor(features, dtype=torch.float32)
    mean, variance = model.mixture(rows[:-1])
    error = (rows[1:] - mean).square() / variance
    return error[:, model.varying].double().mean(dim=1).numpy()
