"""What a planner asks of its model, as search in mctx asks for `recurrent_fn`."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

StateT = TypeVar("StateT")
"""One batched imagined state. The planner never looks inside: a tensor, a named tuple or a dict of tensors will do."""


class PlanningModel(Protocol[StateT]):
    """A deterministic model of a batch of independent states.

    Letters: N rows of the given state, A actions (Hold first), K selected rows. All methods are pure: they never write
    to the state they receive, and row i of a result depends on row i of the arguments alone. A model of uncertain
    markets keeps its scenarios inside a row and returns their mean. All tensors live on one device.
    """

    def action_masks(self, state: StateT) -> torch.Tensor:
        """Masks of the imagined state: bool [N, A], True = valid, Hold (column 0) always True, the same A always."""
        ...

    def step(self, state: StateT, action: torch.Tensor) -> tuple[StateT, torch.Tensor, torch.Tensor]:
        """Advance each row by one bar.

        Args: state of N rows, none terminated; action [N] int64, valid under `action_masks(state)`.
        Returns: next state of N rows; reward [N] floating; terminated [N] bool. A terminated row still has its reward,
            its next state is never used.
        """
        ...

    def value(self, state: StateT) -> torch.Tensor:
        """Value of going on after the last planned step: [N] floating, in the unit of the reward."""
        ...

    def take(self, state: StateT, index: torch.Tensor) -> StateT:
        """The rows `index` [K] int64 of the state, in that order; an index may occur several times or never."""
        ...
