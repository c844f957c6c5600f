"""Features of several markets on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data import Field


@dataclass(frozen=True, eq=False)
class FeaturePanel:
    """P markets side by side, each with the same M named columns.

    Raises: ValueError on shape, a repeated name, timestamps that do not ascend, NaN or infinity.
    """

    timestamps: NDArray[np.datetime64]
    """[T] UTC closes, ascending."""
    fields: tuple[Field, ...]
    """The M columns."""
    values: NDArray[np.float64]
    """[P, T, M] raw units."""

    def __post_init__(self) -> None:
        expected = (len(self.values), len(self.timestamps), len(self.fields))
        if self.values.shape != expected or not len(self.values):
            raise ValueError(f"values: expected [P >= 1, T, M] = {list(expected)}, was {list(self.values.shape)}")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"fields: expected each name once, repeated {repeated}")
        if not (self.timestamps[1:] > self.timestamps[:-1]).all():
            raise ValueError("timestamps: expected ascending times")
        finite = np.isfinite(self.values).all(axis=(0, 1))
        if not finite.all():
            raise ValueError(f"values: expected finite numbers, column {self.names[int(finite.argmin())]!r} has others")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the M columns."""
        return tuple(field.name for field in self.fields)

    def __len__(self) -> int:
        """P."""
        return len(self.values)

    def first_paths(self, count: int) -> FeaturePanel:
        """The first `count` markets, or all if there are fewer."""
        return FeaturePanel(self.timestamps, self.fields, self.values[:count])

    def widened(self, fields: Sequence[Field], values: NDArray[np.float64]) -> FeaturePanel:
        """The same markets with K more columns [P, T, K], which only a policy built for them reads."""
        return FeaturePanel(self.timestamps, (*self.fields, *fields), np.concatenate((self.values, values), axis=2))
