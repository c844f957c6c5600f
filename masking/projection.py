"""Projection of a wanted position onto the valid actions: how a continuous wish obeys discrete limits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from masking.actions import ActionTable
from masking.rules import TOLERANCE
from masking.validation import validate_action_masks


def nearest_valid(
    target: float | NDArray[np.floating],
    positions: NDArray[np.floating],
    action_masks: NDArray[np.bool_],
    actions: ActionTable,
) -> NDArray[np.int64]:
    """Return the valid action whose position after the trade is nearest the wanted one.

    Ties go to the lowest index, so Hold beats an equally good trade. Distances within `masking.TOLERANCE` of each
    other tie: the rounding of a float32 position must not cause a trade. A NaN target or position yields Hold.

    Args: target scalar or [B] and positions [B], multiples of equity; action_masks [B, A].
    Returns: [B].
    Raises: InvalidMaskError on a malformed mask; ValueError on shape.
    """
    if positions.ndim != 1:
        raise ValueError(f"positions: expected [B], was {list(positions.shape)}")
    validate_action_masks(action_masks, num_actions=actions.num_actions, batch=len(positions))
    wanted = np.asarray(target, dtype=np.float64)
    if wanted.shape not in ((), positions.shape):
        raise ValueError(f"target: expected a number or {list(positions.shape)}, was {list(wanted.shape)}")
    after = actions.target_positions(positions.astype(np.float64))
    distance = np.where(action_masks, np.abs(after - wanted.reshape(-1, 1)), np.inf)
    # Comparisons with NaN are all False, and argmax of all False is 0: Hold.
    nearest: NDArray[np.int64] = np.argmax(distance <= distance.min(axis=1, keepdims=True) + TOLERANCE, axis=1)
    return nearest
