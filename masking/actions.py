"""The action table: what each discrete action asks of the position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import array_api_compat

HOLD = 0
"""Index of Hold in every action table. Argmax ties and fallbacks land here; it is never masked."""


@dataclass(frozen=True)
class ActionTable:
    """Action 0 keeps the position (Hold); action i >= 1 trades to `factors[i - 1]`.

    Factors are target positions in multiples of equity (1.0 is fully invested).
    """

    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

    def __post_init__(self) -> None:
        finite = all(math.isfinite(factor) for factor in self.factors)
        if not self.factors or not finite or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(f"factors: expected strictly ascending finite numbers, was {self.factors}")

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
        xp = array_api_compat.array_namespace(position)
        factors = xp.asarray(self.factors, dtype=position.dtype, device=array_api_compat.device(position))
        rows = xp.broadcast_to(factors[None, :], (position.shape[0], len(self.factors)))
        return xp.concat((position[:, None], rows), axis=1)

    def target_of(self, action: Any, position: Any) -> Any:
        """Position that the chosen action leads to.

        Args: action [B] integer in [0, A); position [B].
        Returns: [B], dtype of `position`.
        """
        xp = array_api_compat.array_namespace(action, position)
        factors = xp.asarray((0.0, *self.factors), dtype=position.dtype, device=array_api_compat.device(position))
        return xp.where(action == HOLD, position, xp.take(factors, action, axis=0))
