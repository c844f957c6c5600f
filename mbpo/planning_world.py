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
    """[N, P, D], what each particle has come to."""
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
        alive = masks.any(dim=2) | True
        return WorldState(obs[:, None].expand(-1, particles, -1), masks, alive, 0)

    def action_masks(self, state: WorldState) -> Tensor:
        """Masks of every imagined state."""
        return state.action_masks

    def step(self, state: WorldState, action: Tensor) -> Transition[WorldState]:
        """One step of every particle. Args: action int64 [N, P], or [N, P, K]."""
        shape = state.obs.shape[:2]
        chosen = action.reshape(*shape, -1).transpose(0, 1)
        noise = None
        if self.noise is not None:
            noise = self.noise[state.depth][:, None].expand(-1, shape[0], -1)
        obs, reward, ended = (
            part.transpose(0, 1)
            for part in self.model.step_each(state.obs.transpose(0, 1), chosen, self.members, noise)
        )
        masks, refused = self.model.action_masks(obs.flatten(0, 1))
        lost = (refused | ~torch.isfinite(obs.flatten(0, 1)).all(dim=1)).reshape(shape) & ~ended
        # The safe action is not the model's to refuse; where there is none, what is lost may do anything.
        masks = masks | refused[:, None]
        alive = state.alive & ~ended
        share = (alive / alive.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None]
        seen = torch.where(alive[:, :, None], obs, 0.0)
        apart = torch.where(alive[:, :, None], obs - (seen * share).sum(dim=1, keepdim=True), 0.0)
        apart = apart / self.model.targets.std[:-1]
        doubt = torch.sqrt((apart * apart * share).sum(dim=(1, 2)))
        following = WorldState(obs, masks.reshape(*shape, -1), alive, state.depth + 1)
        return Transition(following, torch.where(lost, -torch.inf, reward), ended, doubt[:, None].expand(shape))

    def value(self, state: WorldState) -> Tensor:
        """What the given function expects of every particle, [N, P]."""
        shape = state.obs.shape[:2]
        return torch.zeros(shape) if self._value is None else self._value(state.obs.flatten(0, 1)).reshape(shape)

    def take(self, state: WorldState, index: Tensor) -> WorldState:
        """Those rows."""
        return WorldState(state.obs[index], state.action_masks[index], state.alive[index], state.depth)


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
