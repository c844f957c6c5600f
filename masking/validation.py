"""Strict validation of action masks and of actions: what is wrong never reaches a distribution or an environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from masking.actions import HOLD
from masking.errors import InvalidActionError, InvalidMaskError, MaskingError


def validate_action_masks(
    action_masks: Any,
    *,
    num_actions: int | Sequence[int],
    batch: int | None = None,
    safe_action: int | Sequence[int] | None = HOLD,
) -> Any:
    """Return the masks unchanged, or raise.

    Args:
        action_masks: bool [B, A], True = valid, NumPy array or torch tensor; flat [B, A_1 + ... + A_K] for
            MultiDiscrete.
        num_actions: A, or (A_1, ..., A_K) for MultiDiscrete.
        batch: B, if known.
        safe_action: the action that must be valid in every row, one for all dimensions or one each; None asks only
            for one valid action per row and dimension.

    Raises: InvalidMaskError. Integer 0/1, additive 0/-inf and float masks are refused because libraries read them
        with opposite meanings; `masking.adapters` converts them explicitly. MaskingError for a safe action that does
        not exist.
    """
    if not hasattr(action_masks, "dtype") or not hasattr(action_masks, "shape"):
        raise InvalidMaskError(
            f"action_masks: expected a bool array [B, {_width(num_actions)}], was {type(action_masks)}"
        )
    dtype = str(action_masks.dtype).rpartition(".")[2]
    if dtype != "bool":
        raise InvalidMaskError(
            f"action_masks: expected dtype bool with True = valid, was {dtype}; "
            "convert explicitly with masking.MaskAdapter: `from_binary` for 0/1, `from_additive` for 0/-inf masks"
        )
    shape = tuple(action_masks.shape)
    if len(shape) != 2 or shape[1] != _width(num_actions) or (batch is not None and shape[0] != batch):
        expected = f"[{'B' if batch is None else batch}, {_width(num_actions)}]"
        transposed = len(shape) == 2 and shape[0] == _width(num_actions)
        hint = "; it looks transposed, rows are states" if transposed else ""
        raise InvalidMaskError(f"action_masks: expected shape {expected}, was {list(shape)}{hint}")
    xp = array_api_compat.array_namespace(action_masks)
    for dimension, (columns, safe) in enumerate(_dimensions(num_actions, safe_action)):
        segment = action_masks[:, columns]
        ok = xp.any(segment, axis=1) if safe is None else segment[:, safe]
        if not bool(xp.all(ok)):
            rows = xp.nonzero(~ok)[0]
            wanted = "at least one valid action" if safe is None else f"the safe action {safe} valid"
            where = "" if isinstance(num_actions, int) else f" of dimension {dimension}"
            advice = "are they inverted? An environment without Hold declares a safe_action of its own, or None"
            raise InvalidMaskError(
                f"action_masks: expected {wanted} in every row{where}, not so in {rows.shape[0]} of {shape[0]} "
                f"rows, first row {int(rows[0])}" + ("" if safe is None else f"; {advice}")
            )
    return action_masks


def check_safe_action(num_actions: int | Sequence[int], safe_action: int | Sequence[int] | None) -> None:
    """Refuse a safe action that does not exist; arguments as in `validate_action_masks`. Raises: MaskingError."""
    list(_dimensions(num_actions, safe_action))


def refuse_broken_rows(broken: Any, problem: str, *, look_for: str) -> None:
    """Raise MaskingError if any row is broken, naming how many and the first.

    Args: broken: bool [B], array or tensor; problem: "field: expected .., was ..", before the count; look_for: causes.
    """
    xp = array_api_compat.array_namespace(broken)
    if bool(xp.any(broken)):
        rows = xp.nonzero(broken)[0]
        raise MaskingError(
            f"{problem} in {rows.shape[0]} of {broken.shape[0]} rows, first row {int(rows[0])}; look for {look_for}"
        )


def check_actions(
    actions: npt.NDArray[Any], action_masks: npt.NDArray[np.bool_], num_actions: Sequence[int] | None = None
) -> None:
    """Raise InvalidActionError unless every action is valid under its mask row.

    Args: actions integer [B] under masks [B, A]; or [B, K] under flat masks, with `num_actions` (A_1, ..., A_K).
    """
    valid = valid_actions(actions, action_masks, num_actions)
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise InvalidActionError(
            f"actions: expected only valid actions, row {row} chose {actions[row].tolist()} "
            f"but its mask is {action_masks[row].tolist()}; choose under action_masks()"
        )


def valid_actions(
    actions: npt.NDArray[Any], action_masks: npt.NDArray[np.bool_], num_actions: Sequence[int] | None = None
) -> npt.NDArray[np.bool_]:
    """Which rows hold only actions that exist and that their masks allow, bool [B].

    Args: as in `check_actions`.  Raises: InvalidActionError on shape or dtype.
    """
    batch, width = action_masks.shape
    shape = (batch,) if num_actions is None else (batch, len(num_actions))
    if actions.shape != shape or not np.issubdtype(actions.dtype, np.integer):
        raise InvalidActionError(f"actions: expected integers {list(shape)}, was {actions.dtype} {list(actions.shape)}")
    sizes = np.array([width] if num_actions is None else num_actions)
    if sizes.sum() != width:
        raise InvalidActionError(f"action_masks: expected [B, {sizes.sum()}], was {list(action_masks.shape)}")
    chosen = actions.astype(np.int64).reshape(batch, len(sizes))
    inside = (chosen >= 0) & (chosen < sizes)
    column = np.where(inside, chosen, 0) + np.cumsum(sizes) - sizes
    valid: npt.NDArray[np.bool_] = (inside & action_masks[np.arange(batch)[:, None], column]).all(axis=1)
    return valid


def _width(num_actions: int | Sequence[int]) -> int:
    return num_actions if isinstance(num_actions, int) else sum(num_actions)


def _dimensions(
    num_actions: int | Sequence[int], safe_action: int | Sequence[int] | None
) -> Iterator[tuple[slice, int | None]]:
    sizes = [num_actions] if isinstance(num_actions, int) else list(num_actions)
    each = isinstance(safe_action, Sequence | np.ndarray)
    safe: list[Any] = list(safe_action) if each else [safe_action] * len(sizes)  # type: ignore[arg-type]
    if len(safe) != len(sizes):
        raise MaskingError(f"safe_action: expected one action or {len(sizes)} of them, was {safe_action!r}")
    first = 0
    for size, action in zip(sizes, safe, strict=True):
        if action is not None and not (isinstance(action, int | np.integer) and 0 <= action < size):
            raise MaskingError(f"safe_action: expected 0 to {size - 1} or None, was {safe_action!r}")
        yield slice(first, first + size), None if action is None else int(action)
        first += size
