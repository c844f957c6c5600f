"""Exhaustive search: every valid action sequence up to a horizon, walked once per shared prefix.

With A actions and horizon H the tree of prefixes has A + A^2 + ... + A^H nodes, where walking each of the A^H sequences
alone takes H * A^H steps. At 7 actions and 3 bars that is 399 steps and exact; a sampling planner with 512 candidates
(CEM in PETS, arXiv:1805.12114) takes 1,536 per iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.objective import Objective
from planner.paths import Imagination, Particles, Paths
from planner.plan import Plan
from planner.protocol import PlanningModel, StateT

Clock = Callable[[], float]
UNSEEN = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class Exhaustive:
    """Walks the whole tree of valid sequences; exact, without chance.

    A sequence that terminates in all its particles ends there. Equal values go to the safe action first, then to the
    lowest. A NaN or infinite number makes every sequence through it worth -inf, at any discount; a row with nothing
    else sets `fallback`.
    """

    horizon: int = 3
    """H."""
    objective: Objective = field(default_factory=Objective)
    particles: Particles = "all"
    max_nodes: int = 1_000_000
    """Most imagined steps of one row. It is held against the tree without masks, A + ... + A^H, so that whether a call
    is refused depends on shapes and never on the market."""

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon: expected >= 1, was {self.horizon}")

    def plan(
        self,
        model: PlanningModel[StateT],
        state: StateT,
        *,
        deadline: float | None = None,
        clock: Clock = time.perf_counter,
    ) -> Plan:
        """Find the best valid sequence of each row.

        Args: model; state of N rows, none terminated; deadline: of `clock`, seconds: a depth begins only if it and the
            values after it should be done by then, supposing that a node takes as long as at the depth before, and a
            value as long as when values were last asked for; otherwise the depth that was reached counts as the
            horizon. One step is always looked ahead.
        Raises: ValueError for a tensor of wrong shape or dtype, a joint model, or a tree beyond `max_nodes`;
            InvalidMaskError (a ValueError) for masks that are not bool [N, P, A] with the safe action valid.
        """
        imagination = Imagination(model, self.objective, self.particles)
        if imagination.joint:
            raise ValueError("model: expected one action dimension, was a joint model; CEM searches those")
        with torch.no_grad():
            masks = imagination.checked(model.action_masks(state), None)
            paths = imagination.begin(state, masks)
            num_actions = masks.shape[2]
            beyond = beyond_budget(num_actions, self.horizon, self.max_nodes)
            if beyond is not None:
                raise ValueError(
                    f"max_nodes: expected >= {beyond[1]} for {num_actions} actions and {beyond[0]} of {self.horizon} "
                    f"steps, was {self.max_nodes}"
                )
            tree = _Tree(imagination, self.horizon, masks)
            complete = tree.grow(paths, deadline, clock)
            return tree.harvest(complete=complete)


def beyond_budget(num_actions: int, horizon: int, max_nodes: int) -> tuple[int, int] | None:
    """The first depth at which the tree without masks has more than `max_nodes` nodes, and how many up to there.

    None where the whole tree fits.
    """
    nodes, width = 0, 1
    for depth in range(1, horizon + 1):
        width *= num_actions
        nodes += width
        # No further than the first depth over the limit: A^H itself may have millions of digits.
        if nodes > max_nodes:
            return depth, nodes
    return None


class _Tree:
    # Leaves are collected with the row they belong to, their score, their length, and their sequence as one number: the
    # digits to base A, counted from the safe action on and filled up with it, so that the smallest number wins a tie.
    def __init__(self, imagination: Imagination, horizon: int, root_masks: torch.Tensor) -> None:
        self.imagination, self.horizon, self.root_masks = imagination, horizon, root_masks
        self.num_rows, _, self.num_actions = root_masks.shape
        self.first = imagination.filler[0]
        self.leaves: list[tuple[Any, ...]] = []
        self.non_finite = torch.zeros(self.num_rows, dtype=torch.int64, device=root_masks.device)
        self.nodes = 0

    def grow(self, paths: Paths, deadline: float | None, clock: Clock) -> bool:
        """Walk depth by depth; return whether every sequence was walked to its end."""
        row = torch.arange(self.num_rows, device=self.non_finite.device)
        code, masks, imagination = torch.zeros_like(row), self.root_masks, self.imagination
        node, action = imagination.permitted(masks, paths.alive).nonzero(as_tuple=True)
        score, per_value = None, math.inf  # seconds; nobody knows before the first value
        for depth in range(self.horizon):
            if len(node) == 0:
                return True
            begun, steps = 0.0 if deadline is None else clock(), len(node)
            self.nodes += steps
            row, code = row[node], code[node] * self.num_actions + (action - self.first) % self.num_actions
            executed = imagination.executed(masks[node], action)
            paths = imagination.advance(imagination.take(paths, node), executed, depth)
            # Below a broken number every sequence is worth -inf already, and its state is not to be trusted.
            self._count(row, paths.broken)
            ended = ~paths.alive.any(dim=1) & ~paths.broken
            self._collect(row[ended], code[ended], depth + 1, imagination.score(imagination.take(paths, _where(ended))))
            going_on = _where(paths.alive.any(dim=1) & ~paths.broken)
            if len(going_on) == 0:
                return True
            paths, row, code = imagination.take(paths, going_on), row[going_on], code[going_on]
            if depth + 1 == self.horizon:
                break
            raw = imagination.model.action_masks(paths.state)  # type: ignore[union-attr]
            masks = imagination.checked(raw, paths.alive, self.num_actions)
            node, action = imagination.permitted(masks, paths.alive).nonzero(as_tuple=True)
            if deadline is not None and len(node) > 0:
                now = clock()
                per_step = (now - begun) / steps
                if now + (per_step + per_value) * len(node) > deadline:
                    # Before giving up: this depth has to be valued then anyway, and says what a value takes now.
                    score = self._worth(paths, depth + 1)
                    valued = clock()
                    per_value = (valued - now) / len(row)
                    if valued + (per_step + per_value) * len(node) > deadline:
                        break
                    score = None
        self._collect(row, code, depth + 1, self._worth(paths, depth + 1) if score is None else score)
        return depth + 1 == self.horizon

    def harvest(self, *, complete: bool) -> Plan:
        """The best leaf of each row."""
        rows, actions = self.num_rows, self.num_actions
        nothing = torch.zeros(0, dtype=torch.int64, device=self.non_finite.device)
        leaves = [*self.leaves, (nothing, nothing, nothing.to(torch.float64), 0)]
        row, code, score = (torch.cat([leaf[part] for leaf in leaves]) for part in range(3))
        length = torch.cat([torch.full_like(leaf[0], leaf[3]) for leaf in leaves])
        first = (code // actions ** (self.horizon - 1) + self.first) % actions
        table = score.new_full((rows * actions,), -torch.inf)
        table = table.scatter_reduce(0, row * actions + first, score, "amax").reshape(rows, actions)
        value = table.amax(dim=1)
        fallback = torch.isneginf(value)
        tied = (score == value[row]) & ~fallback[row]
        best = torch.full_like(value, UNSEEN, dtype=torch.int64)
        best = best.scatter_reduce(0, row[tied], code[tied], "amin")
        steps = torch.zeros_like(best)
        chosen = tied & (code == best[row])
        steps[row[chosen]] = length[chosen]
        places = torch.tensor([actions**place for place in reversed(range(self.horizon))], device=code.device)
        sequence = (torch.where(fallback, 0, best)[:, None] // places + self.first) % actions
        action = torch.where(fallback, self.imagination.fallback(self.root_masks)[:, 0], sequence[:, 0])
        return Plan(
            action=action,
            value=value,
            sequence=torch.cat((action[:, None], sequence[:, 1:]), dim=1),
            length=steps,
            action_values=table,
            fallback=fallback,
            non_finite=self.non_finite,
            nodes=self.nodes,
            complete=complete,
        )

    def _worth(self, paths: Paths, depth: int) -> torch.Tensor:
        return self.imagination.score(self.imagination.end(paths, depth))

    def _count(self, row: torch.Tensor, broken: torch.Tensor) -> None:
        self.non_finite += torch.bincount(row[broken], minlength=self.num_rows)

    def _collect(self, row: torch.Tensor, code: torch.Tensor, depth: int, score: torch.Tensor) -> None:
        self._count(row, torch.isneginf(score))
        full = code * self.num_actions ** (self.horizon - depth)
        self.leaves.append((row, full, score, depth))


def _where(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.nonzero(as_tuple=True)[0]
