"""Scenarios of the market inside a graph, drawn with the noise of a seed: what every planner's graph begins with.

Letters: B batch, S scenarios, H horizon, M features, E elites, A actions.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.graphs import PolicyGraph
from masking import HOLD
from mbpo.planning import PlannerPolicy
from world_model.volatility import BAR_MOVES


class Bar(NamedTuple):
    """One imagined bar of every scenario."""

    features: Tensor
    """[B, M, S]."""
    uncertainty: Tensor
    """[B], at the mean of the scenarios."""
    mean: Tensor
    """[B, 2, S], expected gap and intraday return."""
    variance: Tensor
    """[B, 2, S]."""


class ScenarioGraph(nn.Module):
    """Copies what a planner needs and imagines as it does; `forward` is that of a search."""

    innovations: Tensor

    def __init__(self, policy: PlannerPolicy, noise_tables: int) -> None:
        super().__init__()
        self.dynamics, self.horizon = policy.dynamics, policy.config.horizon
        self.control_variate = policy.config.control_variate
        value = policy.value
        self.value = None if value is None else PolicyGraph(policy.dynamics, value.scaler, value.network)
        self.model = copy.deepcopy(policy.model)
        self.register_buffer("innovations", self.model.innovation(policy.noise_tables(noise_tables)))
        # Which scenarios each elite is asked about at each depth, filled up to equally many, and the way back.
        elites = torch.tensor(self.model.elites)
        self.most = int((policy.members[:, :, None] == elites).sum(dim=1).max())
        self.places: list[Tensor] = []
        self.back: list[Tensor] = []
        for depth, members in enumerate(policy.members):
            groups = [(members == elite).nonzero()[:, 0] for elite in elites]
            self.places.append(torch.cat([torch.cat((one, one.new_zeros(self.most - len(one)))) for one in groups]))
            place = torch.empty_like(members)
            for row, group in enumerate(groups):
                place[group] = row * self.most + torch.arange(len(group))
            self.back.append(place if depth else place // self.most)
        self.moves = [self.dynamics.feature_names.index(name) for name in BAR_MOVES]

    def begin(self, state: Tensor, caller_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Masks bool [B, A], Hold where none is left, and bool [B, 1]: one is left and the state is finite."""
        allowed = self.dynamics.action_masks(state) & caller_masks
        some = allowed.any(dim=1, keepdim=True)
        masks = allowed | (~some & (torch.arange(self.dynamics.num_actions) == HOLD))
        return masks, some & (state.abs() < torch.inf).all(dim=1, keepdim=True)

    def imagine(self, features: Tensor, seed: Tensor) -> tuple[Tensor, list[Bar]]:
        """Market futures as `PlannerPolicy.imagine` draws them, with the noise of the seeds.

        Returns: disagreement [B] at the rows themselves, and the bars.
        """
        model, elites, size = self.model, len(self.model.elites), len(self.dynamics.feature_names)
        innovations = self.innovations[seed.remainder(self.innovations.shape[0])]
        found, rows, current = [], [features], features
        for depth, (places, back) in enumerate(zip(self.places, self.back, strict=True)):
            if depth == 0:
                # All scenarios still stand on one row: each elite is asked once.
                answers = [part.transpose(0, 1) for part in model.predict(current, model.elites)]
            else:
                # [B, S, M] to [E, B * most, M]: every elite its own scenarios.
                own = current[:, places].reshape(-1, elites, self.most, size).transpose(0, 1).flatten(1, 2)
                shaped = (part.reshape(elites, -1, self.most, size) for part in model.predict(own, model.elites))
                answers = [part.transpose(0, 1).flatten(1, 2) for part in shaped]
            mean, var = (part[:, back] for part in answers)
            current = model.clamp(mean + var.sqrt() * innovations[:, depth])
            found.append((current.transpose(1, 2), *(part[:, :, self.moves].transpose(1, 2) for part in (mean, var))))
            rows.append(current.mean(dim=1))
        doubts = model.disagreement(torch.stack(rows, dim=1).flatten(0, 1)).reshape(-1, len(rows))
        bars = [Bar(bar, doubts[:, depth], mean, var) for depth, (bar, mean, var) in enumerate(found, start=1)]
        return doubts[:, 0], bars
