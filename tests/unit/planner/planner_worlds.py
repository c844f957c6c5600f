"""Tiny exact worlds for the planner, and two oracles that share no code with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from masking import ActionTable, RuleSet

DEAD = -1
"""State after termination; asking the world anything about it is an error of the planner."""


@dataclass
class TableWorld:
    """A tabular world of S states; the state is an int64 tensor [N]. Refuses invalid actions and dead states."""

    next_state: torch.Tensor  # [S, A] int64, DEAD where the step terminates
    reward: torch.Tensor  # [S, A]
    masks: torch.Tensor  # [S, A] bool
    values: torch.Tensor  # [S]
    steps: list[int] = field(default_factory=list)  # rows of each call of step

    @property
    def num_actions(self) -> int:
        return self.reward.shape[1]

    def action_masks(self, state: torch.Tensor) -> torch.Tensor:
        assert (state != DEAD).all()
        return self.masks[state]

    def step(self, state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert (state != DEAD).all()
        assert self.masks[state, action].all()
        self.steps.append(len(state))
        after = self.next_state[state, action]
        return after, self.reward[state, action], after == DEAD

    def value(self, state: torch.Tensor) -> torch.Tensor:
        assert (state != DEAD).all()
        return self.values[state]

    def take(self, state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return state[index]


def table_world(
    next_state: list[list[int]],
    reward: list[list[float]],
    masks: list[list[bool]] | None = None,
    values: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> TableWorld:
    """A world from nested lists; everything valid and no terminal value unless given."""
    rewards = torch.tensor(reward, dtype=dtype)
    return TableWorld(
        torch.tensor(next_state),
        rewards,
        torch.ones_like(rewards, dtype=torch.bool) if masks is None else torch.tensor(masks),
        torch.tensor([0.0] * len(reward) if values is None else values, dtype=dtype),
    )


def bandit(reward: list[float], masks: list[bool] | None = None, value: float = 0.0) -> TableWorld:
    """One state that every action returns to."""
    return table_world([[0] * len(reward)], [reward], None if masks is None else [masks], [value])


class LineState(NamedTuple):
    """A point on a line, with an opaque label carried along."""

    position: torch.Tensor  # [N] float64
    label: torch.Tensor  # [N, 2]


class LineWorld:
    """Stay, left, right by one between walls at 0 and 4; every step costs the distance to `target` after it."""

    def __init__(self, target: float) -> None:
        self.target = target

    def action_masks(self, state: LineState) -> torch.Tensor:
        at = state.position
        return torch.stack((torch.ones_like(at, dtype=torch.bool), at > 0, at < 4), dim=1)

    def step(self, state: LineState, action: torch.Tensor) -> tuple[LineState, torch.Tensor, torch.Tensor]:
        move = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)[action]
        after = LineState(state.position + move, state.label)
        return after, -(after.position - self.target).abs(), torch.zeros_like(action, dtype=torch.bool)

    def value(self, state: LineState) -> torch.Tensor:
        return torch.zeros_like(state.position)

    def take(self, state: LineState, index: torch.Tensor) -> LineState:
        return LineState(*(column[index] for column in state))


class PositionWorld:
    """Named state under a real rule set: each bar pays the position it ends with."""

    def __init__(self, rule_set: RuleSet) -> None:
        self.action_masks = rule_set
        self.actions: ActionTable = rule_set.actions

    def step(self, state: dict[str, Any], action: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        position = self.actions.target_of(action, state["position"])
        return {**state, "position": position}, position, torch.zeros_like(action, dtype=torch.bool)

    def value(self, state: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(state["position"])

    def take(self, state: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        return {name: column[index] for name, column in state.items()}


class Outcome(NamedTuple):
    """What brute force says about one start."""

    action_values: list[float]
    value: float
    sequence: list[int]
    length: int
    non_finite: int
    prefixes: int


def brute_force(world: TableWorld, start: int, horizon: int, discount: float) -> Outcome:
    """Walk every sequence of `itertools.product` on its own, in plain Python floats."""
    tables = (world.next_state.tolist(), world.reward.tolist(), world.masks.tolist(), world.values.tolist())
    action_values = [-math.inf] * world.num_actions
    best, best_sequence, best_length = -math.inf, [0] * horizon, 0
    bad: set[Any] = set()
    seen: set[Any] = set()
    for sequence in itertools.product(range(world.num_actions), repeat=horizon):
        walked = _walk(tables, start, sequence, discount, bad, seen)
        if walked is None:
            continue
        value, length = walked
        action_values[sequence[0]] = max(action_values[sequence[0]], value)
        if value > best:
            best, best_sequence, best_length = value, [*sequence[:length], *[0] * (horizon - length)], length
    return Outcome(action_values, best, best_sequence, best_length, len(bad), len(seen))


def _walk(
    tables: tuple[Any, Any, Any, Any],
    start: int,
    sequence: tuple[int, ...],
    discount: float,
    bad: set[Any],
    seen: set[Any],
) -> tuple[float, int] | None:
    # Value and steps taken, None where a mask forbids; `bad` and `seen` collect distinct prefixes.
    next_state, rewards, masks, values = tables
    state, total = start, 0.0
    for t, action in enumerate(sequence):
        if not masks[state][action]:
            return None
        seen.add(sequence[: t + 1])
        reward = rewards[state][action]
        if not math.isfinite(reward):
            bad.add(sequence[: t + 1])
            return -math.inf, t + 1
        total += discount**t * reward
        state = next_state[state][action]
        if state == DEAD:
            return total, t + 1
    if not math.isfinite(values[state]):
        bad.add((*sequence, "value"))
        return -math.inf, len(sequence)
    return total + discount ** len(sequence) * values[state], len(sequence)


def dynamic_programming(world: TableWorld, horizon: int, discount: float) -> list[float]:
    """Optimal value of every state with `horizon` bars to go; finite worlds only."""
    values = world.values.tolist()
    for _ in range(horizon):
        values = [
            max(
                float(world.reward[state, action])
                + (discount * values[after] if (after := int(world.next_state[state, action])) != DEAD else 0.0)
                for action in range(world.num_actions)
                if world.masks[state, action]
            )
            for state in range(len(values))
        ]
    return values
