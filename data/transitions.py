"""Decisions and what followed them, as arrays that are checked when they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import ReplayError
from data.files import canonical_json, sha256_bytes


@dataclass(frozen=True)
class ReplaySchema:
    """What the columns mean: names of the obs and state columns, and the number of actions."""

    obs_names: tuple[str, ...]
    state_names: tuple[str, ...]
    num_actions: int

    def __post_init__(self) -> None:
        for label, names in (("obs_names", self.obs_names), ("state_names", self.state_names)):
            if not names or len(set(names)) != len(names):
                raise ReplayError(f"schema.{label}: expected at least one name, each once, was {names}")
        if self.num_actions < 1:
            raise ReplayError(f"schema.num_actions: expected at least 1, was {self.num_actions}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "obs_names": list(self.obs_names),
            "state_names": list(self.state_names),
            "num_actions": self.num_actions,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ReplaySchema:
        """Inverse of `to_dict`. Raises: ReplayError on anything else."""
        try:
            return cls(tuple(raw["obs_names"]), tuple(raw["state_names"]), int(raw["num_actions"]))
        except (KeyError, TypeError) as error:
            raise ReplayError(f"schema: expected obs_names, state_names and num_actions, was {raw}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of names and sizes."""
        return sha256_bytes(canonical_json(self.to_dict()).encode("utf-8"))

    def width(self, column: str) -> int:
        """Return the elements per row of a list column, 0 for a scalar column."""
        return {
            "obs": len(self.obs_names),
            "next_obs": len(self.obs_names),
            "state": len(self.state_names),
            "next_state": len(self.state_names),
            "action_masks": self.num_actions,
            "next_action_masks": self.num_actions,
        }.get(column, 0)


DTYPES: Mapping[str, str] = {
    "obs": "float32",
    "state": "float32",
    "action": "int64",
    "action_masks": "bool",
    "reward": "float32",
    "next_obs": "float32",
    "next_state": "float32",
    "next_action_masks": "bool",
    "terminated": "bool",
    "truncated": "bool",
    "behaviour_log_prob": "float32",
    "timestamp": "datetime64[us]",
    "symbol": "str",
}
"""Columns in order with their NumPy dtype; any width of NumPy text counts as str."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """B transitions with S state columns, D obs columns and A actions.

    Attributes:
        schema: names and sizes.
        obs, next_obs: [B, D]; scaled features before and after.
        state, next_state: [B, S]; raw state row the masks were computed from.
        action: [B]; index of the executed action.
        action_masks, next_action_masks: [B, A]; True = valid. Hold (0) is always valid.
        reward: [B]; of the executed action, without imagination penalty.
        terminated, truncated: [B]; never merged.
        behaviour_log_prob: [B]; natural log of the probability with which the action was chosen.
        timestamp: [B]; close of the bar decided on, UTC.
        symbol: [B]; instrument.

    Raises: ReplayError naming column, row, expected and actual: shape, dtype (see `DTYPES`), NaN or infinity,
        an executed action its mask forbids, a mask that forbids Hold, a positive log-probability, NaT.
    """

    schema: ReplaySchema
    obs: npt.NDArray[np.float32]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.int64]
    action_masks: npt.NDArray[np.bool_]
    reward: npt.NDArray[np.float32]
    next_obs: npt.NDArray[np.float32]
    next_state: npt.NDArray[np.float32]
    next_action_masks: npt.NDArray[np.bool_]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    behaviour_log_prob: npt.NDArray[np.float32]
    timestamp: npt.NDArray[np.datetime64]
    symbol: npt.NDArray[np.str_]

    def __post_init__(self) -> None:
        rows = len(self.action)
        for name, column in self.columns():
            width = self.schema.width(name)
            shape = (rows, width) if width else (rows,)
            if column.shape != shape:
                raise ReplayError(f"{name}: expected shape {list(shape)}, was {list(column.shape)}")
            if column.dtype != DTYPES[name] and not (name == "symbol" and column.dtype.kind == "U"):
                raise ReplayError(f"{name}: expected {DTYPES[name]}, was {column.dtype}")
            if column.dtype.kind == "f":
                _refuse_rows(name, ~np.isfinite(column), "finite numbers", column)
        for name, masks in (("action_masks", self.action_masks), ("next_action_masks", self.next_action_masks)):
            _refuse_rows(name, ~masks[:, 0], "Hold (action 0) valid", masks)
        outside = (self.action < 0) | (self.action >= self.schema.num_actions)
        _refuse_rows("action", outside, f"0 to {self.schema.num_actions - 1}", self.action)
        executed = np.take_along_axis(self.action_masks, self.action[:, None], axis=1)[:, 0]
        _refuse_rows("action", ~executed, "an action that action_masks allows", self.action)
        # Rounding may leave log(1) a hair above 0.
        _refuse_rows("behaviour_log_prob", self.behaviour_log_prob > 1e-5, "at most 0", self.behaviour_log_prob)
        _refuse_rows("timestamp", np.isnat(self.timestamp), "a time", self.timestamp)

    def __len__(self) -> int:
        return len(self.action)

    def rows(self, index: npt.NDArray[Any]) -> Transitions:
        """Return the transitions that an index or a bool array [B] picks."""
        return Transitions(schema=self.schema, **{name: column[index] for name, column in self.columns()})

    def columns(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield name and array of every column, in schema order."""
        for name in DTYPES:
            yield name, getattr(self, name)


def _refuse_rows(name: str, bad: npt.NDArray[np.bool_], expected: str, column: npt.NDArray[Any]) -> None:
    if bad.any():
        row = int(np.argwhere(bad)[0, 0])
        raise ReplayError(f"{name}: row {row}: expected {expected}, was {column[row]}")
