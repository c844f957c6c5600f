"""The same tree without a look at what masks say: every sequence is walked, and a forbidden one counts as -inf.

`Exhaustive` leaves forbidden branches out, so its shapes depend on what masks say. Here they do not: this search can be
traced over any `PlanningModel`. Both give the same plans and share little code, so each is a check on the other.
`export.planner_graph` leaves branches out in a graph too, but knows one model only, the market.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from planner.objective import Objective
from planner.paths import Imagination, Particles
from planner.plan import Plan
from planner.protocol import PlanningModel


@dataclass(frozen=True, kw_only=True)
class DenseExhaustive:
    """As `Exhaustive`, with shapes that depend on batch, actions and horizon alone.

    Where a sequence is forbidden its particles take an action that is valid, and its numbers are dropped. `non_finite`
    counts whole sequences. There is neither a deadline nor a limit of nodes: a graph takes as long as it takes.
    """

    horizon: int = 3
    """H."""
    objective: Objective = field(default_factory=Objective)
    particles: Particles = "all"

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon: expected >= 1, was {self.horizon}")

    def plan(self, model: PlanningModel[Any], state: Any) -> Plan:
        """Find the best valid sequence of each row; model, state and errors as in `Exhaustive.plan`."""
        imagination = Imagination(model, self.objective, self.particles)
        if imagination.joint:
            raise ValueError("model: expected one action dimension, was a joint model; CEM searches those")
        with torch.no_grad():
            root_masks = masks = imagination.checked(model.action_masks(state), None)
            paths, size, device = imagination.begin(state, masks), masks.shape[2], masks.device
            valid, length = torch.ones_like(paths.broken), torch.zeros_like(paths.broken, dtype=torch.int64)
            nodes = 0
            # Node after node, each with all its actions: a sequence's place is its digits to base A.
            for depth in range(self.horizon):
                if depth:
                    masks = imagination.checked(model.action_masks(paths.state), paths.alive, size)
                valid = (valid[:, None] & imagination.permitted(masks, paths.alive)).flatten()
                length = (length + paths.alive.any(dim=1)).repeat_interleave(size)
                if imagination.branches:
                    paths = imagination.branch(paths, depth, size)
                else:
                    node = torch.arange(masks.shape[0], device=device).repeat_interleave(size)
                    action = torch.arange(size, device=device).repeat(masks.shape[0])
                    paths, masks = imagination.take(paths, node), masks[node]
                    paths = imagination.advance(paths, imagination.executed(masks, action), depth)
                nodes += valid.shape[0]
            score = imagination.score(imagination.end(paths, self.horizon))
            broken = (valid & torch.isneginf(score)).reshape(-1, size**self.horizon)
            # Counted from the safe action on, so that the first of equal sequences holds longest.
            safe = imagination.filler[0]
            order = (torch.arange(size, device=device) + safe) % size
            score = self._rolled(torch.where(valid, score, -torch.inf), size, safe)
            length = self._rolled(length, size, safe)

            by_digit = score.reshape(-1, size, size ** (self.horizon - 1)).amax(dim=2)
            value = by_digit.amax(dim=1)
            fallback = torch.isneginf(value)
            code = score.argmax(dim=1)
            steps = length.gather(1, code[:, None])[:, 0]
            places = torch.tensor([size**place for place in reversed(range(self.horizon))], device=device)
            sequence = order[torch.where(fallback, 0, code)[:, None] // places % size]
            first = torch.where(fallback, imagination.fallback(root_masks)[:, 0], sequence[:, 0])
            return Plan(
                action=first,
                value=value,
                sequence=torch.cat((first[:, None], sequence[:, 1:]), dim=1),
                length=torch.where(fallback, 0, steps),
                action_values=by_digit[:, torch.argsort(order)],
                fallback=fallback,
                non_finite=broken.sum(dim=1),
                nodes=nodes,
                complete=True,
            )

    # Numbers of all sequences, [B * A^H] to [B, A^H], with each digit counted from `safe` on.
    def _rolled(self, numbers: torch.Tensor, size: int, safe: int) -> torch.Tensor:
        if safe:
            tree = numbers.reshape(-1, *[size] * self.horizon)
            numbers = tree.roll([-safe] * self.horizon, [*range(1, self.horizon + 1)])
        return numbers.reshape(-1, size**self.horizon)
