"""The audit of executed actions: counted where they are executed, apart from the check that refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class ActionAudit:
    """How many actions an environment executed, and how many of them their mask forbade.

    `invalid` must read 0. It shares no code with `check_actions`, so that a hole in one shows in the other.
    """

    executed: int = 0
    invalid: int = 0

    def record(
        self,
        actions: npt.NDArray[np.integer],
        action_masks: npt.NDArray[np.bool_],
        num_actions: Sequence[int] | None = None,
    ) -> None:
        """Count executed actions.

        Args: actions [B] and the masks [B, A] they were chosen under; or [B, K] under flat masks [B, A_1 + ... + A_K]
            with `num_actions` (A_1, ..., A_K). A row counts once, however many of its dimensions are wrong.
        """
        sizes = [action_masks.shape[1]] if num_actions is None else list(num_actions)
        wrong = np.zeros(len(action_masks), dtype=bool)
        first = 0
        for chosen, size in zip(actions.reshape(len(action_masks), -1).T, sizes, strict=True):
            is_chosen = chosen[:, None] == np.arange(size)
            wrong |= ~(is_chosen & action_masks[:, first : first + size]).any(axis=1)
            first += size
        self.executed += len(wrong)
        self.invalid += int(wrong.sum())

    def as_metrics(self) -> dict[str, float]:
        """For logging: `executed_actions` and `invalid_actions`."""
        return {"executed_actions": float(self.executed), "invalid_actions": float(self.invalid)}
