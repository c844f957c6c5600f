"""What a planner asks of its model, as search in mctx asks for `recurrent_fn`.

Letters: N rows, P particles inside each row, A actions, K action dimensions.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

StateT = TypeVar("StateT")
"""One batched imagined state. The planner never looks inside: a tensor, a named tuple or a dict of tensors will do."""


class Transition(NamedTuple, Generic[StateT]):
    """One imagined step of N rows."""

    state: StateT
    reward: torch.Tensor
    """[N, P], floating."""
    terminated: torch.Tensor
    """bool [N, P]. A terminated particle keeps the reward of this step; whatever it does later is ignored."""
    uncertainty: torch.Tensor
    """[N, P], >= 0, floating: what the objective may charge for; zeros where nothing is known of it."""


class PlanningModel(Protocol[StateT]):
    """A model of a batch of independent rows under one discrete action.

    A row is one decision to be imagined in P particles at once: members of an ensemble, scenarios, draws of noise; one
    where the model is exact. All methods are pure: they never write to the state they receive, and row i of a result
    depends on row i of the arguments alone. All randomness is inside, fixed beforehand and equal for all rows of a
    decision, so that sequences are compared on the same futures. All tensors live on one device.
    """

    safe_action: int | None
    """The action that is valid in every state, Hold in trading; None where there is none."""

    def action_masks(self, state: StateT) -> torch.Tensor:
        """Masks of every imagined state: bool [N, P, A], True = valid, one each at least; the same P and A always."""
        ...

    def step(self, state: StateT, action: torch.Tensor) -> Transition[StateT]:
        """Advance each particle by one step.

        Args: state of N rows; action int64 [N, P], valid under `action_masks(state)` where the particle still lives.
        """
        ...

    def value(self, state: StateT) -> torch.Tensor:
        """Value of going on after the last planned step: [N, P] floating, in the unit of the reward."""
        ...

    def take(self, state: StateT, index: torch.Tensor) -> StateT:
        """The rows `index` [n] int64 of the state, in that order; an index may occur several times or never."""
        ...


class BranchingModel(PlanningModel[StateT], Protocol[StateT]):
    """A `PlanningModel` that can do cheaper than `step` where all actions of a state are asked for."""

    def branch(self, state: StateT) -> Transition[StateT]:
        """One step of N rows under each of A actions, masked ones too: N * A rows, all actions of a row side by side.

        What a masked action leads to may be any number; no search looks at it.
        """
        ...


class ActionWalk(Protocol):
    """Decides the K dimensions of a joint action one after another, each under what the earlier ones leave."""

    def action_masks(self, dimension: int) -> torch.Tensor:
        """Valid choices of the dimension: bool [N, P, A], at least one each."""
        ...

    def take(self, dimension: int, action: torch.Tensor) -> None:
        """Commit the choice of the dimension: int64 [N, P]."""
        ...


class JointPlanningModel(Protocol[StateT]):
    """As `PlanningModel`, for K dimensions of A choices under joint limits: `step` takes int64 [N, P, K]."""

    nvec: tuple[int, ...]
    """(A, ..., A), K entries."""
    hold: tuple[int, ...]
    """The joint action that is always valid, K entries."""

    def walk(self, state: StateT) -> ActionWalk:
        """A walk over the dimensions of every imagined state."""
        ...

    def step(self, state: StateT, action: torch.Tensor) -> Transition[StateT]:
        """As in `PlanningModel`, action int64 [N, P, K]."""
        ...

    def value(self, state: StateT) -> torch.Tensor:
        """As in `PlanningModel`."""
        ...

    def take(self, state: StateT, index: torch.Tensor) -> StateT:
        """As in `PlanningModel`."""
        ...
