"""A planner over a learned world as one graph: ensemble, masks of every imagined state and search, unrolled.

Letters: B batch, D obs, A actions, H horizon, I iterations, C candidates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mbpo.planning_world import WorldPlanning
from planner import CEM, RandomShooting
from planner.dense import DenseExhaustive
from world_model.world import WorldModel

Search = DenseExhaustive | CEM | RandomShooting


class WorldPlannerOutputs(NamedTuple):
    """What the graph returns."""

    action: Any
    """int64 [B]: first action of the best valid sequence; the safe or lowest valid one where there is none."""
    value: Any
    """[B]: of that sequence, 0 where there is none."""
    action_values: Any
    """[B, A]: of the best sequence that begins with each action, -inf where masked, never finite or never tried."""
    sequence: Any
    """int64 [B, H]."""
    fallback: Any
    """bool [B]: no plan."""


class WorldPlannerGraph(nn.Module):
    """`obs` float32 [B, D], `action_masks` bool [B, A] and, of a sampling search, `seed` -> `WorldPlannerOutputs`.

    Each elite follows its own mean. `seed` int64 [B] picks one of the noise tables, modulo their number.
    """

    noise: Tensor

    def __init__(
        self,
        model: WorldModel,
        search: Search,
        *,
        value: Callable[[Tensor], Tensor] | None = None,
        safe_action: int | None = None,
        noise_tables: int = 1,
        seed: int = 0,
    ) -> None:
        """Copy the world. Args as `WorldPlanning`, `value` kept as it is; noise_tables, drawn from `seed`."""
        super().__init__()
        self.model, self.search = copy.deepcopy(model), search
        self.value = value
        # Not in `forward`: which members are elites is a tensor, and a trace cannot read it.
        self.planning = WorldPlanning(self.model, value=value, safe_action=safe_action)
        tables = torch.zeros(1)
        if not isinstance(search, DenseExhaustive):
            generator = torch.Generator().manual_seed(seed)
            tables = torch.stack([search.noise(1, 1, generator)[:, 0] for _ in range(noise_tables)])
        self.register_buffer("noise", tables)

    def forward(self, obs: Tensor, action_masks: Tensor, seed: Tensor | None = None) -> WorldPlannerOutputs:
        """See the class."""
        planning = self.planning
        root = planning.roots(obs, action_masks)
        if isinstance(self.search, DenseExhaustive):
            plan = self.search.plan(planning, root)
        elif seed is None:
            raise ValueError("seed: expected int64 [B] for a sampling search, was None")
        else:
            noise = self.noise[seed.remainder(self.noise.shape[0])]
            plan = self.search.plan(planning, root, noise=noise.transpose(0, 1))
        finite = torch.where(plan.fallback, 0.0, plan.value).to(torch.float32)
        values = plan.action_values
        if values is None:
            raise RuntimeError("plan: expected action values of one dimension, was none")
        return WorldPlannerOutputs(plan.action, finite, values.to(torch.float32), plan.sequence, plan.fallback)
