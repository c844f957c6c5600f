"""Masked choice over action values, written once against the array API: NumPy, torch, no torch import here.

NaN counts as -inf: an unknown value never wins against a known one, and the result is always a valid action.
(mbrl-lib turns NaN into -1e-10, which outranks every negative return.)
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

from masking.errors import MaskingError
from masking.validation import validate_action_masks


def masked_argmax(values: Any, action_masks: Any) -> Any:
    """Best valid action of each row.

    Args: values [B, A], floating point; action_masks bool [B, A], same namespace.
    Returns: integer [B]. Ties go to the lowest index, so do rows whose valid values are all NaN or -inf: with Hold
        as action 0 that is Hold.
    Raises: InvalidMaskError for wrong masks or a row without a valid action; MaskingError on shape or dtype.
    """
    xp, ranked = _ranked(values, action_masks)
    best = xp.max(ranked, axis=1, keepdims=True)
    # argmax alone would land on a masked action where every valid value is -inf.
    return xp.argmax(xp.astype(action_masks & (ranked == best), xp.uint8), axis=1)


def masked_max(values: Any, action_masks: Any) -> Any:
    """Best valid value of each row, the max-backup of value iteration and Q-learning.

    Args and Raises: as `masked_argmax`.
    Returns: [B], dtype of `values`; -inf where all valid values are NaN, so that a broken state is avoided, not
        sought; in torch, masked values receive gradient 0.
    """
    xp, ranked = _ranked(values, action_masks)
    return xp.max(ranked, axis=1)


def _ranked(values: Any, action_masks: Any) -> tuple[Any, Any]:
    xp = array_api_compat.array_namespace(values)
    if values.ndim != 2 or not xp.isdtype(values.dtype, "real floating"):
        raise MaskingError(f"values: expected floating point [B, A], was {values.dtype} {list(values.shape)}")
    batch, num_actions = values.shape
    validate_action_masks(action_masks, num_actions=num_actions, batch=batch, safe_action=None)
    return xp, xp.where(action_masks & ~xp.isnan(values), values, -math.inf)
