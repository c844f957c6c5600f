"""The same tree without a look at what masks say: every sequence is walked, and a forbidden one counts as -inf.

`Exhaustive` leaves forbidden branches out, which a graph cannot: its shapes must not depend on values. This search can
be exported, gives the same plans, and beside that one, which shares little code with it, is a check on both.
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

    `non_finite` counts whole sequences. There is no deadline: a graph takes as long as it takes.
    """

    horizon: int = 3
    """H."""
    objective: Objective = field(default_factory=Objective)
    particles: Particles = "all"

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon: expected >= 1, was {self.horizon}")

    def plan(self, model: PlanningModel[Any], state: Any) -> Plan:
        """Find the best valid sequence of each row; arguments and errors as `Exhaustive.plan`."""
        imagination = Imagination(model, self.objective, self.particles)
        if imagination.joint:
            raise ValueError("model: expected one action dimension, was a joint model; CEM searches those")
        with torch.no_grad():
            masks = imagination.checked(model.action_masks(state), None)
            size = masks.shape[2]
            paths, root = imagination.begin(state, masks), masks.all(dim=1)
            valid, length, nodes = torch.ones_like(root[:, 0]), torch.zeros_like(root[:, 0], dtype=torch.int64), 0
            for depth in range(self.horizon):
                if depth:
                    masks = imagination.checked(model.action_masks(paths.state), paths.alive, size)
                allowed = imagination.permitted(masks, paths.alive)
                # Node after node, each with all its actions: a sequence's place is its digits to base A.
                node = torch.arange(masks.shape[0]).repeat_interleave(size)
                action = torch.arange(size).repeat(masks.shape[0])
                valid, length = (valid[:, None] & allowed).flatten(), length[node]
                paths, masks = imagination.take(paths, node), masks[node]
                length = length + paths.alive.any(dim=1)
                paths = imagination.advance(paths, imagination.executed(masks, action), depth)
                nodes += node.shape[0]
            paths = imagination.end(paths, self.horizon)
            score = imagination.score(paths)
            broken = (valid & torch.isneginf(score)).reshape(-1, size**self.horizon)
            score = torch.where(valid, score, -torch.inf).reshape(-1, size**self.horizon)
            return self._harvest(score, broken, length, root, imagination, nodes)

    def _harvest(
        self,
        score: torch.Tensor,
        broken: torch.Tensor,
        length: torch.Tensor,
        root: torch.Tensor,
        imagination: Imagination,
        nodes: int,
    ) -> Plan:
        size, safe = root.shape[1], imagination.safe_action
        action_values = score.reshape(-1, size, size ** (self.horizon - 1)).amax(dim=2)
        value = action_values.amax(dim=1)
        fallback = torch.isneginf(value)
        code = score.argmax(dim=1)
        places = torch.tensor([size**place for place in reversed(range(self.horizon))])
        steps = length.reshape(score.shape).gather(1, code[:, None])[:, 0]
        sequence = torch.where(fallback[:, None], 0, code[:, None] // places % size)
        instead = root.to(torch.uint8).argmax(dim=1) if safe is None else torch.full_like(code, safe[0])
        first = torch.where(fallback, instead, sequence[:, 0])
        return Plan(
            action=first,
            value=value,
            sequence=torch.cat((first[:, None], sequence[:, 1:]), dim=1),
            length=torch.where(fallback, 0, steps),
            action_values=action_values,
            fallback=fallback,
            non_finite=broken.sum(dim=1),
            nodes=nodes,
            complete=True,
        )
