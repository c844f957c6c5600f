"""Columnwise standardisation whose statistics are buffers, so that they travel with the weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.errors import DataError

# A spread below this, absolutely or relative to the mean, is rounding noise.
SPREAD_FLOOR = 1e-12


class Normaliser(nn.Module):
    """`(x - mean) / std` per column, shapes [..., M]; `varying` [M] marks the columns that moved when it was fitted."""

    mean: Tensor
    std: Tensor
    varying: Tensor

    def __init__(self, mean: Tensor, std: Tensor, varying: Tensor | None = None) -> None:
        super().__init__()
        varying = torch.ones(mean.shape, dtype=torch.bool) if varying is None else varying
        if mean.ndim != 1 or mean.shape != std.shape or mean.shape != varying.shape:
            raise ValueError(
                "normaliser: expected mean[M], std[M], varying[M], "
                f"was {[*mean.shape]}, {[*std.shape]}, {[*varying.shape]}"
            )
        # Copies: a buffer that shares memory with an argument would change with it when weights are loaded.
        self.register_buffer("mean", mean.to(torch.float32, copy=True))
        self.register_buffer("std", std.to(torch.float32, copy=True))
        self.register_buffer("varying", varying.to(torch.bool, copy=True))

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Normaliser:
        """Mean and population standard deviation of values [N, M]; constant columns get std 1.

        Raises: DataError on NaN, infinity or fewer than two rows.
        """
        if values.ndim != 2 or values.shape[0] < 2:
            raise DataError(f"normaliser: expected values [N >= 2, M], was {[*values.shape]}")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise DataError(
                f"normaliser: expected finite values, was {values[row, column]} at row {row}, column {column}"
            )
        mean = values.mean(axis=0, dtype=np.float64)
        std = values.std(axis=0, dtype=np.float64)
        varying = std > SPREAD_FLOOR * np.maximum(np.abs(mean), 1.0)
        return cls(torch.from_numpy(mean), torch.from_numpy(np.where(varying, std, 1.0)), torch.from_numpy(varying))

    def forward(self, values: Tensor) -> Tensor:
        """Raw units to standard units."""
        return (values - self.mean) / self.std

    def standardise(self, values: NDArray[np.float64]) -> Tensor:
        """As `forward`, computed in float64 and returned in float32.

        Columns whose level is large against their spread would lose digits in float32.
        """
        return ((torch.from_numpy(values) - self.mean.double()) / self.std.double()).to(torch.float32)

    def inverse(self, values: Tensor) -> Tensor:
        """Standard units to raw units."""
        return values * self.std + self.mean
