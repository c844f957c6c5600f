"""Strict validation of action masks: wrong polarity, dtype, shape or content never reaches a distribution."""

from __future__ import annotations

from typing import Any

import array_api_compat

from masking.actions import HOLD
from masking.errors import InvalidMaskError


def validate_action_masks(action_masks: Any, *, num_actions: int, batch: int | None = None) -> Any:
    """Return the masks unchanged, or raise.

    Args: action_masks bool [B, A], True = valid, NumPy array or torch tensor.
    Raises: InvalidMaskError unless dtype is bool, the shape is [B, A] and Hold (column 0) is valid everywhere.
    Integer 0/1, additive 0/-inf and float masks are refused because libraries read them with opposite meanings.
    """
    if not hasattr(action_masks, "dtype") or not hasattr(action_masks, "shape"):
        raise InvalidMaskError(f"action_masks: expected a bool array [B, {num_actions}], was {type(action_masks)}")
    dtype = str(action_masks.dtype).rpartition(".")[2]
    if dtype != "bool":
        raise InvalidMaskError(
            f"action_masks: expected dtype bool with True = valid, was {dtype}; "
            "convert explicitly, e.g. `masks == 1` for 0/1 masks or `masks == 0` for additive 0/-inf masks"
        )
    shape = tuple(action_masks.shape)
    expected = f"[{'B' if batch is None else batch}, {num_actions}]"
    if len(shape) != 2 or shape[1] != num_actions or (batch is not None and shape[0] != batch):
        raise InvalidMaskError(f"action_masks: expected shape {expected}, was {list(shape)}")
    xp = array_api_compat.array_namespace(action_masks)
    if not bool(xp.all(action_masks[:, HOLD])):
        rows = xp.nonzero(~action_masks[:, HOLD])[0]
        raise InvalidMaskError(
            f"action_masks: expected Hold (action {HOLD}) valid in every row, "
            f"was False in {rows.shape[0]} of {shape[0]} rows, first row {int(rows[0])}; "
            "an all-False row would make the policy sample forbidden actions"
        )
    return action_masks
