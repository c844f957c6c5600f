"""Planning in a learned world: every elite is a particle that imagines the same actions for itself.

Letters: N rows, P particles, D obs, K action dimensions, A choices of each, E elites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from planner import Transition
from world_model.world import WorldModel


class WorldState(NamedTuple):
    """One node of the search per row."""

    obs: Tensor
    """[P, N, D], what each particle has come to: particles first, as members of an ensemble are."""
    action_masks: Tensor
    """bool [N, P, K * A], flat as MultiDiscrete masks are; of the given rows the real environment's own."""
    alive: Tensor
    """bool [N, P]: the particle has not terminated."""
    depth: int
    """Steps taken."""


class WorldPlanning:
    """`planner.PlanningModel` of a `WorldModel`.

    Particle p follows elite `p % E`. Without noise each follows its elite's mean, so that particles differ by what the
    elites disagree on; with noise, the same for all rows and drawn beforehand, they differ by chance as well.
    Uncertainty is how far apart the living particles of a row have come: the norm of their standard deviation, in units
    of the training targets' (`ensemble_std` of arXiv:2110.04135, along the whole path). Where no action can be called
    valid, or an obs is not finite, nothing can be planned: the reward of getting there is -inf.

    Args:
        model: the world.
        value: of obs [B, D] after the last step, [B]; None is zero.
        noise: standard normal [H, P, D + 1] for as many steps as are planned; None follows means.
        safe_action: valid in every state by the environment's own word, or None.

    Raises: ValueError where a joint world is given, or noise of another shape.
    """

    _joint = False

    def __init__(
        self,
        model: WorldModel,
        *,
        value: Callable[[Tensor], Tensor] | None = None,
        noise: Tensor | None = None,
        safe_action: int | None = None,
    ) -> None:
        if (len(model.sizes.num_actions) > 1) != self._joint:
            raise ValueError(f"model: expected {'several' if self._joint else 'one'} action dimensions, "
                             f"was {model.sizes.num_actions}")  # fmt: skip
        elites, size = model.elites, model.sizes.num_obs + 1
        if noise is not None and (noise.ndim != 3 or noise.shape[1] % len(elites) or noise.shape[2] != size):
            raise ValueError(f"noise: expected [H, a multiple of {len(elites)}, {size}], was {list(noise.shape)}")
        self.model, self.noise, self.safe_action = model, noise, safe_action
        self.members = elites if noise is None else elites * (noise.shape[1] // len(elites))
        self._value = value

    def roots(self, obs: Tensor, action_masks: Tensor) -> WorldState:
        """Rows obs [N, D] under masks [N, K * A], the same in all particles."""
        particles = len(self.members)
        masks = action_masks[:, None].expand(-1, particles, -1)
        return WorldState(obs.expand(particles, -1, -1), masks, torch.ones_like(masks[:, :, 0]), 0)

    def action_masks(self, state: WorldState) -> Tensor:
        """Masks of every imagined state."""
        return state.action_masks

    def step(self, state: WorldState, action: Tensor) -> Transition[WorldState]:
        """One step of every particle. Args: action int64 [N, P], or [N, P, K]."""
        particles, num_rows, _ = state.obs.shape
        chosen = action.reshape(num_rows, particles, -1).transpose(0, 1)
        noise = self._noise(state, num_rows)
        return self._transition(state, state.alive, *self.model.step_each(state.obs, chosen, self.members, noise))

    def branch(self, state: WorldState) -> Transition[WorldState]:
        """One step of every particle under every action: N * A rows, all actions of a row side by side."""
        width = self.model.sizes.width
        noise = self._noise(state, state.obs.shape[1] * width)
        alive = state.alive.repeat_interleave(width, dim=0)
        return self._transition(state, alive, *self.model.branch_each(state.obs, self.members, noise))

    def value(self, state: WorldState) -> Tensor:
        """What the given function expects of every particle, [N, P]."""
        particles, num_rows, _ = state.obs.shape
        if self._value is None:
            return torch.zeros(num_rows, particles)
        return self._value(state.obs.flatten(0, 1)).reshape(particles, num_rows).T

    def take(self, state: WorldState, index: Tensor) -> WorldState:
        """Those rows."""
        return WorldState(state.obs[:, index], state.action_masks[index], state.alive[index], state.depth)

    def _noise(self, state: WorldState, num_rows: int) -> Tensor | None:
        return None if self.noise is None else self.noise[state.depth][:, None].expand(-1, num_rows, -1)

    # Args: alive [N, P] before the step; what a step came to, particles first.
    def _transition(
        self, state: WorldState, alive: Tensor, obs: Tensor, reward: Tensor, ended: Tensor
    ) -> Transition[WorldState]:
        shape, ended = alive.shape, ended.T
        masks, refused = (
            part.reshape(shape[1], shape[0], -1).transpose(0, 1) for part in self.model.action_masks(obs.flatten(0, 1))
        )
        # No number times 0 is 0 but a finite one.
        finite = ((obs * 0.0).sum(dim=2) == 0.0).T
        lost = (refused[:, :, 0] | ~finite) & ~ended
        # The safe action is not the model's to refuse; where there is none, what is lost may do anything.
        following = WorldState(obs, masks | refused, alive & ~ended, state.depth + 1)
        doubt = self._apart(obs, following.alive)[:, None].expand(shape)
        return Transition(following, torch.where(lost, -torch.inf, reward.T), ended, doubt)

    # How far living particles have come apart, [N].
    def _apart(self, obs: Tensor, alive: Tensor) -> Tensor:
        living = alive.T[:, :, None]
        share = living / living.sum(dim=0).clamp(min=1)
        mean = (torch.where(living, obs, 0.0) * share).sum(dim=0)
        apart = torch.where(living, obs - mean, 0.0) / self.model.targets.std[:-1]
        return torch.sqrt((apart * apart * share).sum(dim=(0, 2)))


class JointWorldPlanning(WorldPlanning):
    """`planner.JointPlanningModel` of a `WorldModel` whose masks say for each dimension alone what is valid.

    Args: as `WorldPlanning`; hold: the joint action that is always valid.
    """

    _joint = True

    def __init__(
        self,
        model: WorldModel,
        *,
        hold: tuple[int, ...],
        value: Callable[[Tensor], Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> None:
        super().__init__(model, value=value, noise=noise)
        if len({*model.sizes.num_actions}) > 1 or len(hold) != len(model.sizes.num_actions):
            raise ValueError(
                f"hold: expected one action for each of equally many choices {model.sizes.num_actions}, was {hold}"
            )
        self.nvec, self.hold = model.sizes.num_actions, hold

    def walk(self, state: WorldState) -> _Separate:
        """Each dimension for itself."""
        return _Separate(state.action_masks.unflatten(2, (len(self.nvec), self.nvec[0])))  # type: ignore[no-untyped-call]


class _Separate:
    # Choices that do not depend on each other: masks [N, P, K, A].
    def __init__(self, masks: Tensor) -> None:
        self._masks = masks

    def action_masks(self, dimension: int) -> Tensor:
        return self._masks[:, :, dimension]

    def take(self, dimension: int, action: Tensor) -> None:
        pass
