"""From raw state columns to obs in [-1, 1], as one function for NumPy, torch and the exported graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.fields import Field


@dataclass(frozen=True, eq=False)
class Scaler:
    """obs = clip((state - centre) / scale, -1, 1), column by column.

    Attributes: names [D]; centre, scale [D], float32, raw units.
    Raises: DataError naming the column on a repeated name, NaN, infinity or scale <= 0; ValueError on shape
        or dtype.
    """

    names: tuple[str, ...]
    centre: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        for label, array in (("centre", self.centre), ("scale", self.scale)):
            if array.shape != (len(self.names),) or array.dtype != np.float32:
                raise ValueError(
                    f"scaler.{label}: expected float32 [{len(self.names)}], was {array.dtype} {list(array.shape)}"
                )
        for name, centre, scale in zip(self.names, self.centre, self.scale, strict=True):
            if self.names.count(name) > 1:
                raise DataError(f"scaler: column {name!r}: expected once, was {self.names.count(name)} times")
            if not (np.isfinite(centre) and np.isfinite(scale) and scale > 0.0):
                raise DataError(
                    f"scaler: column {name!r}: expected finite centre and scale > 0, was {centre} and {scale}"
                )

    @classmethod
    def fit(cls, values: npt.NDArray[Any], names: Sequence[str], low_q: float = 0.01, high_q: float = 0.99) -> Scaler:
        """Map each column's [low_q, high_q] quantile range to [-1, 1]; what lies outside is clipped.

        Args: values [T, D], the training window only; names [D].
        A column whose quantile range is zero keeps its unit (scale 1).
        Raises: DataError if there is no row, or naming the column that has NaN or infinity.
        """
        if values.ndim != 2 or values.shape[1] != len(names):
            raise ValueError(f"scaler.fit: expected values [T, {len(names)}], was {list(values.shape)}")
        if not 0.0 <= low_q < high_q <= 1.0:
            raise ValueError(f"scaler.fit: expected 0 <= low_q < high_q <= 1, was {low_q}, {high_q}")
        if len(values) == 0:
            raise DataError("scaler.fit: expected at least one row, was 0")
        finite = np.isfinite(values).all(axis=0)
        if not finite.all():
            raise DataError(f"scaler.fit: column {names[int(finite.argmin())]!r}: expected finite values only")
        low, high = np.quantile(values.astype(np.float64), [low_q, high_q], axis=0)
        return cls._from_range(tuple(names), low, high)

    @classmethod
    def with_fixed(cls, fields: Sequence[Field]) -> Scaler:
        """Map each field's [low, high] to [-1, 1]. Raises: DataError naming a field without finite bounds."""
        for field in fields:
            if not (np.isfinite(field.low) and np.isfinite(field.high)):
                raise DataError(
                    f"scaler: field {field.name!r}: expected finite bounds, was [{field.low}, {field.high}]"
                )
        low = np.array([field.low for field in fields], dtype=np.float64)
        high = np.array([field.high for field in fields], dtype=np.float64)
        return cls._from_range(tuple(field.name for field in fields), low, high)

    @classmethod
    def concat(cls, scalers: Sequence[Scaler]) -> Scaler:
        """Join scalers column-wise, in order. Raises: DataError if two share a name."""
        if not scalers:
            raise ValueError("scaler.concat: expected at least one scaler, was none")
        return cls(
            tuple(name for scaler in scalers for name in scaler.names),
            np.concatenate([scaler.centre for scaler in scalers]),
            np.concatenate([scaler.scale for scaler in scalers]),
        )

    @classmethod
    def _from_range(cls, names: tuple[str, ...], low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> Scaler:
        scale = ((high - low) / 2.0).astype(np.float32)
        # A subnormal scale would overflow to infinity in the division; treat it as no range at all.
        scale[scale < np.finfo(np.float32).tiny] = 1.0
        return cls(names, ((low + high) / 2.0).astype(np.float32), scale)

    def __call__(self, state: Any) -> Any:
        """Return obs. state [..., D], float32, of any array-API library -> obs [..., D] of the same library.

        Pure and traceable by torch.export; NaN stays NaN, so that whoever decides on obs can see it.
        Raises: ValueError on shape or dtype.
        """
        xp = array_api_compat.array_namespace(state)
        if state.dtype != xp.float32 or state.ndim < 1 or state.shape[-1] != len(self.names):
            raise ValueError(
                f"scaler: expected float32 [..., {len(self.names)}], was {state.dtype} {list(state.shape)}"
            )
        device = array_api_compat.device(state)
        centre = xp.asarray(self.centre, device=device)
        scale = xp.asarray(self.scale, device=device)
        one = xp.asarray(1.0, dtype=xp.float32, device=device)
        # Not xp.clip: array-api-compat may write in place through boolean masks, which cannot be traced.
        return xp.minimum(xp.maximum((state - centre) / scale, -one), one)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; float32 survives the round trip exactly."""
        return {"names": list(self.names), "centre": self.centre.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Scaler:
        """Inverse of `to_dict`. Raises: DataError on anything else."""
        if set(raw) != {"names", "centre", "scale"}:
            raise DataError(f"scaler: expected keys centre, names, scale, were {sorted(map(str, raw))}")
        try:
            return cls(
                tuple(str(name) for name in raw["names"]),
                np.array(raw["centre"], dtype=np.float32),
                np.array(raw["scale"], dtype=np.float32),
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"scaler: not a stored scaler: {error}") from error
