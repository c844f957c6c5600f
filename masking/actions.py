"""The action table: what each discrete action asks of the position."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import array_api_compat
import numpy as np

from masking.errors import RuleError

HOLD = 0
"""Index of Hold in every action table. Argmax ties and fallbacks land here; it is never masked."""


LARGEST_FACTOR = float(np.finfo(np.float32).max)


def namespace(array: Any) -> Any:
    """Array-API namespace of an array; NumPy, the live path, at a tenth of the cost of the general lookup."""
    return np if type(array) is np.ndarray else array_api_compat.array_namespace(array)


@dataclass(frozen=True)
class ActionTable:
    """Action 0 keeps the position (Hold); action i >= 1 trades to `factors[i - 1]`.

    Factors are target positions in multiples of equity (1.0 is fully invested), kept as floats.
    """

    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

    def __post_init__(self) -> None:
        numeric = all(isinstance(factor, numbers.Real) and not isinstance(factor, bool) for factor in self.factors)
        # Positions are float32 in graphs and on devices: beyond its range a target would be infinite there.
        finite = numeric and all(abs(factor) <= LARGEST_FACTOR for factor in self.factors)
        if not self.factors or not finite or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(
                f"factors: expected strictly ascending finite numbers in float32's range, was {self.factors}"
            )
        # One spelling of each number, or equal tables would have unequal hashes: 1 is 1.0, and -0.0 + 0.0 is 0.0.
        object.__setattr__(self, "factors", tuple(float(factor) + 0.0 for factor in self.factors))

    @property
    def num_actions(self) -> int:
        """A: number of actions, Hold included."""
        return len(self.factors) + 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One label per action, `hold` first."""
        return ("hold", *(f"target {factor:g}" for factor in self.factors))

    def target_positions(self, position: Any) -> Any:
        """Position each action leads to.

        Args: position [B], multiples of equity.
        Returns: [B, A], same namespace and dtype; column 0 is the position itself.
        """
        return self.beside(position[:, None])[0]

    def beside(self, position: Any) -> tuple[Any, Any]:
        """Position each action leads to, and which action is Hold.

        Args: position [B, 1], multiples of equity.
        Returns: targets [B, A], same namespace and dtype; is_hold bool [1, A].
        Raises: RuleError for a position that is no floating number: it would round 1.25 to 1 and judge another trade.
        """
        xp = namespace(position)
        _check_floating(xp, position)
        device = array_api_compat.device(position)
        is_hold = xp.asarray(self._is_hold, device=device)
        targets = xp.asarray(self._targets, dtype=position.dtype, device=device)
        # One selection between a column and a row of constants: a single node in an exported graph.
        return xp.where(is_hold, position, targets), is_hold

    def above(self, position: Any) -> tuple[Any, Any]:
        """As `beside` with actions first. Args: position [1, B]. Returns: targets [A, B]; is_hold bool [A, 1]."""
        xp = namespace(position)
        _check_floating(xp, position)
        device = array_api_compat.device(position)
        is_hold = xp.asarray(self._is_hold[0], device=device)[:, None]
        targets = xp.asarray(self._targets[0], dtype=position.dtype, device=device)[:, None]
        return xp.where(is_hold, position, targets), is_hold

    def target_of(self, action: Any, position: Any) -> Any:
        """Position that the chosen action leads to.

        Args: action integer in [0, A) and position, of any shapes that broadcast.
        Returns: of their common shape, dtype of `position`.
        """
        xp = array_api_compat.array_namespace(action, position)
        _check_floating(xp, position)
        targets = xp.asarray(self._targets[0], dtype=position.dtype, device=array_api_compat.device(position))
        chosen = xp.reshape(xp.take(targets, xp.reshape(action, (-1,)), axis=0), action.shape)
        return xp.where(action == HOLD, position, chosen)

    @cached_property
    def _is_hold(self) -> tuple[tuple[bool, ...]]:
        return (tuple(action == HOLD for action in range(self.num_actions)),)

    @cached_property
    def _targets(self) -> tuple[tuple[float, ...]]:
        return ((0.0, *self.factors),)  # any number in the place of Hold


def _check_floating(xp: Any, position: Any) -> None:
    kind = getattr(position.dtype, "kind", None)  # NumPy's, on every live decision
    if not (kind == "f" if kind is not None else xp.isdtype(position.dtype, "real floating")):
        raise RuleError(f"position: expected floating numbers, was {position.dtype}")
