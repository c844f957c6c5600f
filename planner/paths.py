"""Imagined paths: what a sequence has earned so far in each particle, and which action may come next.

Letters: N paths, P particles of each, A actions, K action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from masking import InvalidMaskError, validate_action_masks
from planner.objective import Objective
from planner.protocol import ActionWalk, JointPlanningModel, PlanningModel, Transition

Particles = Literal["all", "each"]
"""When an action of a sequence is valid. "all": where every living particle allows it. "each": where one does; the
particles that forbid it take the safe action, so that a sequence is a plan with a way out instead of blind steps."""
PARTICLES: tuple[Particles, ...] = ("all", "each")

AnyModel = PlanningModel[Any] | JointPlanningModel[Any]


class Paths(NamedTuple):
    """N paths on their way."""

    state: Any
    total: torch.Tensor
    """[N, P] float64: earned so far."""
    alive: torch.Tensor
    """bool [N, P]: not terminated."""
    broken: torch.Tensor
    """bool [N]: a number on the way was NaN or infinite; the path is worth -inf."""
    stuck: torch.Tensor
    """bool [N]: its particles had no action in common; the path is worth -inf."""


@dataclass(frozen=True)
class Imagination:
    """A model under an objective: how paths begin, go on and end."""

    model: AnyModel
    objective: Objective
    particles: Particles = "all"

    def __post_init__(self) -> None:
        if self.particles not in PARTICLES:
            raise ValueError(f"particles: expected one of {list(PARTICLES)}, was {self.particles!r}")
        if self.particles == "each" and self.joint:
            raise ValueError("particles: expected 'all' for joint actions, was 'each'")
        if self.particles == "each" and self.safe_action is None:
            raise ValueError("particles: expected 'all' for a model without a safe action, was 'each'")

    @property
    def joint(self) -> bool:
        """Whether actions have several dimensions."""
        return hasattr(self.model, "walk")

    @property
    def branches(self) -> bool:
        """Whether the model steps under all actions at once, and a path's particles all take the same."""
        return hasattr(self.model, "branch") and self.particles == "all" and not self.joint

    @property
    def safe_action(self) -> tuple[int, ...] | None:
        """The action that is always valid, one number per dimension."""
        if self.joint:
            return tuple(self.model.hold)  # type: ignore[union-attr]
        safe = self.model.safe_action  # type: ignore[union-attr]
        return None if safe is None else (safe,)

    @property
    def filler(self) -> tuple[int, ...]:
        """What stands where nothing is planned, and wins ties: the safe action, or 0 where there is none."""
        return (0,) if self.safe_action is None else self.safe_action

    def begin(self, state: Any, masks: torch.Tensor) -> Paths:
        """Paths of no step yet.

        Args: masks: any `checked` ones [N, P, A] of the state, for their size.
        Raises: ValueError without a row.
        """
        if masks.shape[0] == 0:
            raise ValueError("state: expected at least one row, was 0")
        alive = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
        nothing = ~alive[:, 0]
        return Paths(state, torch.zeros(alive.shape, dtype=torch.float64, device=masks.device), alive, nothing, nothing)

    def walk(self, state: Any) -> ActionWalk:
        """The choices of every state, dimension by dimension."""
        if self.joint:
            return self.model.walk(state)  # type: ignore[union-attr]
        return _OneChoice(self.model.action_masks(state))  # type: ignore[union-attr]

    def checked(self, masks: torch.Tensor, alive: torch.Tensor | None, num_actions: int | None = None) -> torch.Tensor:
        """Masks [N, P, A] of states, True where the particle no longer lives; validated outside of traces.

        Raises: InvalidMaskError.
        """
        if masks.ndim != 3:
            raise InvalidMaskError(f"action_masks: expected bool [N, P, A], was {masks.dtype} {list(masks.shape)}")
        size = num_actions or max(1, masks.shape[2])
        if torch.compiler.is_exporting():
            return masks if alive is None else masks | ~alive[:, :, None]
        # Shape and dtype first: `|` with a float mask would be an error of its own kind.
        validate_action_masks(masks.flatten(0, 1)[:0], num_actions=size, safe_action=None)
        if alive is not None:
            if alive.shape != masks.shape[:2]:
                raise InvalidMaskError(f"action_masks: expected {[*alive.shape, size]}, was {[*masks.shape]}")
            masks = masks | ~alive[:, :, None]
        safe = None if self.joint or self.safe_action is None else self.safe_action[0]
        validate_action_masks(masks.flatten(0, 1), num_actions=size, safe_action=safe)
        return masks

    def permitted(self, masks: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Which actions a path may take next, none where its particles agree on none.

        Args: masks: `checked`, [N, P, A].
        Returns: bool [N, A].
        """
        if self.particles == "all":
            return masks.all(dim=1)
        ended = ~alive.any(dim=1, keepdim=True)
        return (masks & alive[:, :, None]).any(dim=1) | ended

    def executed(self, masks: torch.Tensor, action: torch.Tensor, dimension: int = 0) -> torch.Tensor:
        """What each particle does when the path takes an action: `checked` masks, int64 [N] to [N, P].

        A particle that forbids the action takes the safe one or, where that is not known to be valid, the lowest valid
        one; unless the path is one of "each", it is worth -inf then.
        """
        wish = action[:, None].expand(masks.shape[:2])
        if self.joint or self.safe_action is None:
            instead = masks.to(torch.uint8).argmax(dim=2)
        else:
            instead = torch.full_like(wish, self.safe_action[dimension])
        return torch.where(masks.gather(2, wish[:, :, None])[:, :, 0], wish, instead)

    def advance(self, paths: Paths, action: torch.Tensor, depth: int) -> Paths:
        """One step of every particle.

        Args: action int64 [N, P] or [N, P, K]; depth: steps taken before.
        Raises: ValueError where the model answers with another shape or dtype.
        """
        return self._arrived(paths, self.model.step(paths.state, action), depth)

    def branch(self, paths: Paths, depth: int, num_actions: int) -> Paths:
        """One step of every particle under every action, all actions of a path side by side; the model is a
        `BranchingModel`. Args and errors as in `advance`.
        """
        step = self.model.branch(paths.state)  # type: ignore[union-attr]
        each = (part.repeat_interleave(num_actions, dim=0) for part in paths[1:])
        return self._arrived(Paths(paths.state, *each), step, depth)

    def _arrived(self, paths: Paths, step: Transition[Any], depth: int) -> Paths:
        for name, floating in (("reward", True), ("terminated", False), ("uncertainty", True)):
            check_matrix(name, getattr(step, name), paths.alive.shape, floating=floating)
        earned = self.objective.earned(step)
        finite = torch.isfinite(earned)
        total = paths.total + self.objective.discount**depth * torch.where(paths.alive & finite, earned, 0.0)
        return paths._replace(
            state=step.state,
            total=total,
            alive=paths.alive & ~step.terminated,
            broken=paths.broken | (paths.alive & ~finite).any(dim=1),
        )

    def end(self, paths: Paths, depth: int) -> Paths:
        """Paths with the value of going on after `depth` steps added, where a particle still lives."""
        values = self.model.value(paths.state)
        check_matrix("value", values, paths.alive.shape, floating=True)
        values = values.to(torch.float64)
        finite = torch.isfinite(values)
        total = paths.total + self.objective.discount**depth * torch.where(paths.alive & finite, values, 0.0)
        return paths._replace(total=total, broken=paths.broken | (paths.alive & ~finite).any(dim=1))

    def score(self, paths: Paths) -> torch.Tensor:
        """Worth of paths at their end, float64 [N]; -inf where one is broken or stuck, or its sum overflowed."""
        score = self.objective.score(paths.total)
        return torch.where(paths.broken | paths.stuck | ~torch.isfinite(score), -torch.inf, score)

    def take(self, paths: Paths, index: torch.Tensor) -> Paths:
        """The paths `index` [n]."""
        return Paths(self.model.take(paths.state, index), *(part[index] for part in paths[1:]))

    def fallback(self, root_masks: torch.Tensor) -> torch.Tensor:
        """What a row does that has no plan: the safe action, or the lowest that all particles allow; int64 [N, K].

        Args: root_masks: `checked` masks [N, P, A] of the rows.
        """
        if self.safe_action is None:
            return root_masks.all(dim=1).to(torch.uint8).argmax(dim=1)[:, None]
        safe = torch.tensor(self.safe_action, device=root_masks.device)
        return safe.expand(root_masks.shape[0], -1)


class _OneChoice:
    def __init__(self, masks: torch.Tensor) -> None:
        self._masks = masks

    def action_masks(self, dimension: int) -> torch.Tensor:  # noqa: ARG002
        return self._masks

    def take(self, dimension: int, action: torch.Tensor) -> None:
        pass


def check_matrix(name: str, matrix: torch.Tensor, shape: Sequence[int], *, floating: bool) -> None:
    """Raise ValueError unless the model's answer has the shape and dtype of the protocol."""
    if tuple(matrix.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, was {list(matrix.shape)}")
    if not (matrix.is_floating_point() if floating else matrix.dtype == torch.bool):
        raise ValueError(f"{name}: expected dtype {'floating' if floating else 'bool'}, was {matrix.dtype}")
