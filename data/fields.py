"""Names, units and ranges of the columns of a state row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, get_args

from data.errors import DataError

Group = Literal["market", "signals", "account", "uncertainty"]


@dataclass(frozen=True)
class Field:
    """One named column.

    `low` and `high` bound the raw value; infinite where the quantity has no bound. JSON cannot hold infinity,
    so an infinite bound is null there.

    Raises: ValueError on an empty name, an unknown group, a NaN bound or low >= high.
    """

    name: str
    group: Group
    unit: str
    low: float
    high: float
    description: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("field.name: expected a name, was empty")
        if self.group not in get_args(Group):
            raise ValueError(f"field {self.name!r}: group: expected one of {get_args(Group)}, was {self.group!r}")
        if not self.low < self.high:
            raise ValueError(f"field {self.name!r}: expected low < high, was low={self.low}, high={self.high}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; infinite bounds become None."""
        raw = asdict(self)
        for bound in ("low", "high"):
            raw[bound] = raw[bound] if math.isfinite(raw[bound]) else None
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Field:
        """Inverse of `to_dict`. Raises DataError on missing or unknown keys or a value of the wrong type."""
        expected = {field.name for field in dataclass_fields(cls)}
        if set(raw) != expected:
            raise DataError(f"field: expected keys {sorted(expected)}, were {sorted(map(str, raw))}")
        for key in ("name", "group", "unit", "description"):
            if not isinstance(raw[key], str):
                raise DataError(f"field.{key}: expected text, was {raw[key]!r}")
        try:
            return cls(
                name=raw["name"],
                group=raw["group"],
                unit=raw["unit"],
                low=-math.inf if raw["low"] is None else float(raw["low"]),
                high=math.inf if raw["high"] is None else float(raw["high"]),
                description=raw["description"],
            )
        except (TypeError, ValueError) as error:
            raise DataError(str(error)) from error
