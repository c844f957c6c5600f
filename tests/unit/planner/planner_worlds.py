"""Tiny exact worlds for the planner, and two oracles that share no code with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from masking import ActionTable, JointLimits, JointWalk, RuleSet, TradeTable
from planner import Transition

DEAD = -1
"""State after termination; asking the world anything about it is an error of the planner."""


@dataclass
class TableWorld:
    """A tabular world of S states in one particle; the state is int64 [N]. Refuses invalid actions and dead states."""

    next_state: torch.Tensor  # [S, A] int64, DEAD where the step terminates
    reward: torch.Tensor  # [S, A]
    masks: torch.Tensor  # [S, A] bool
    values: torch.Tensor  # [S]
    steps: list[int] = field(default_factory=list)  # rows of each call of step
    safe_action: int | None = 0

    @property
    def num_actions(self) -> int:
        return self.reward.shape[1]

    def action_masks(self, state: torch.Tensor) -> torch.Tensor:
        assert (state != DEAD).all()
        return self.masks[state][:, None]

    def step(self, state: torch.Tensor, action: torch.Tensor) -> Transition[torch.Tensor]:
        assert (state != DEAD).all()
        action = action[:, 0]
        assert self.masks[state, action].all()
        self.steps.append(len(state))
        after, reward = self.next_state[state, action], self.reward[state, action][:, None]
        return Transition(after, reward, (after == DEAD)[:, None], torch.zeros_like(reward))

    def value(self, state: torch.Tensor) -> torch.Tensor:
        assert (state != DEAD).all()
        return self.values[state][:, None]

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

    safe_action = 0

    def __init__(self, target: float) -> None:
        self.target = target

    def action_masks(self, state: LineState) -> torch.Tensor:
        at = state.position
        return torch.stack((torch.ones_like(at, dtype=torch.bool), at > 0, at < 4), dim=1)[:, None]

    def step(self, state: LineState, action: torch.Tensor) -> Transition[LineState]:
        move = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)[action[:, 0]]
        after = LineState(state.position + move, state.label)
        reward = -(after.position - self.target).abs()[:, None]
        return Transition(after, reward, torch.zeros_like(action, dtype=torch.bool), torch.zeros_like(reward))

    def value(self, state: LineState) -> torch.Tensor:
        return torch.zeros_like(state.position)[:, None]

    def take(self, state: LineState, index: torch.Tensor) -> LineState:
        return LineState(*(column[index] for column in state))


class PositionWorld:
    """Named state under a real rule set: each bar pays the position it ends with."""

    safe_action = 0

    def __init__(self, rule_set: RuleSet) -> None:
        self.rule_set = rule_set
        self.actions: ActionTable = rule_set.actions

    def action_masks(self, state: dict[str, Any]) -> torch.Tensor:
        masks: torch.Tensor = self.rule_set(state)
        return masks[:, None]

    def step(self, state: dict[str, Any], action: torch.Tensor) -> Transition[dict[str, Any]]:
        position = self.actions.target_of(action[:, 0], state["position"])
        ended = torch.zeros_like(action, dtype=torch.bool)
        return Transition(
            {**state, "position": position}, position[:, None], ended, torch.zeros_like(position)[:, None]
        )

    def value(self, state: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(state["position"])[:, None]

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


class ParticleWorld:
    """One table world per particle, all under the same actions; the state is int64 [N, P].

    Unlike a `TableWorld` it may be stepped on after termination; it then answers with NaN, which must not be heard.
    """

    def __init__(
        self, worlds: list[TableWorld], uncertainty: list[float] | None = None, safe_action: int | None = 0
    ) -> None:
        self.safe_action = safe_action
        self.worlds = worlds
        self.uncertainty = [0.0] * len(worlds) if uncertainty is None else uncertainty
        self.executed: list[tuple[torch.Tensor, torch.Tensor]] = []  # state and action of each step

    def action_masks(self, state: torch.Tensor) -> torch.Tensor:
        masks = torch.stack([world.masks[column] for world, column in self._columns(state)], dim=1)
        return masks & (state != DEAD)[..., None]  # the dead allow nothing, not even Hold

    def step(self, state: torch.Tensor, action: torch.Tensor) -> Transition[torch.Tensor]:
        self.executed.append((state, action))
        after, reward = [], []
        for (world, column), chosen in zip(self._columns(state), action.T, strict=True):
            after.append(world.next_state[column, chosen])
            reward.append(world.reward[column, chosen])
        dead = state == DEAD
        following = torch.where(dead, DEAD, torch.stack(after, dim=1))
        earned = torch.where(dead, math.nan, torch.stack(reward, dim=1))
        doubt = torch.tensor(self.uncertainty, dtype=torch.float64).expand_as(earned)
        return Transition(following, earned, following == DEAD, torch.where(dead, math.nan, doubt))

    def value(self, state: torch.Tensor) -> torch.Tensor:
        values = torch.stack([world.values[column] for world, column in self._columns(state)], dim=1)
        return torch.where(state == DEAD, math.nan, values)

    def take(self, state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return state[index]

    def _columns(self, state: torch.Tensor) -> list[tuple[TableWorld, torch.Tensor]]:
        return [(world, column.clamp(min=0)) for world, column in zip(self.worlds, state.T, strict=True)]


class Watch:
    """A clock that nothing but `spend` moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, time: float) -> None:
        self.now += time


class TimedWorld(ParticleWorld):
    """One world whose answers take time: so much for each row stepped, masked or valued, and for each call of value."""

    def __init__(
        self, world: TableWorld, *, step: float = 1.0, mask: float = 0.0, value: float = 0.0, value_call: float = 0.0
    ) -> None:
        super().__init__([world])
        self.watch, self.times = Watch(), (step, mask, value, value_call)

    def action_masks(self, state: torch.Tensor) -> torch.Tensor:
        self.watch.spend(self.times[1] * len(state))
        return super().action_masks(state)

    def step(self, state: torch.Tensor, action: torch.Tensor) -> Transition[torch.Tensor]:
        self.watch.spend(self.times[0] * len(state))
        return super().step(state, action)

    def value(self, state: torch.Tensor) -> torch.Tensor:
        self.watch.spend(self.times[2] * len(state) + self.times[3])
        return super().value(state)


def random_world(seed: int, num_states: int = 3, num_actions: int = 3) -> TableWorld:
    """A world drawn at random: rewards and values normal, half of the actions beside Hold masked, no end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_states, num_actions)
    masks = torch.rand(shape, generator=generator) < 0.5
    masks[:, 0] = True
    return TableWorld(
        torch.randint(num_states, shape, generator=generator),
        torch.randn(shape, generator=generator, dtype=torch.float64),
        masks,
        torch.randn(num_states, generator=generator, dtype=torch.float64),
    )


class JointWorld:
    """A portfolio of three assets whose prices rise by known factors; a row is cash, units, prices."""

    GROWTH = (1.0, 1.02, 0.99)

    def __init__(self) -> None:
        table = TradeTable(buy_cost=(0.5, 0.5, 0.5), sell_cost=(0.5, 0.5, 0.5))
        self.limits = JointLimits(table=table, max_gross=0.8, max_share=(0.5, 0.5, 0.5))
        self.nvec, self.hold = table.nvec, (table.hold,) * 3
        self.executed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self, rows: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        cash = 2000.0 + 2000.0 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
        units = 10.0 * torch.randint(4, (rows, 3), generator=generator)
        prices = 30.0 + 20.0 * torch.rand(rows, 3, generator=generator, dtype=torch.float64)
        return torch.cat((cash, units, prices), dim=1)

    def walk(self, state: torch.Tensor) -> JointChoices:
        return JointChoices(JointWalk(self.limits, state))

    def step(self, state: torch.Tensor, action: torch.Tensor) -> Transition[torch.Tensor]:
        self.executed.append((state, action[:, 0]))
        lots = torch.tensor(self.limits.table.lots, dtype=torch.float64)[action[:, 0]]
        cash, units, prices = state[:, :1], state[:, 1:4], state[:, 4:]
        cash = cash - (lots * prices + 0.5 * lots.abs()).sum(dim=1, keepdim=True)
        after = torch.cat((cash, units + lots, prices * torch.tensor(self.GROWTH, dtype=torch.float64)), dim=1)
        reward = (self.worth(after) - self.worth(state))[:, None]
        return Transition(after, reward, torch.zeros_like(reward, dtype=torch.bool), torch.zeros_like(reward))

    def value(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(state), 1)

    def take(self, state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return state[index]

    @staticmethod
    def worth(state: torch.Tensor) -> torch.Tensor:
        return state[:, 0] + (state[:, 1:4] * state[:, 4:]).sum(dim=1)

    def hold_value(self, state: torch.Tensor, horizon: int, discount: float) -> torch.Tensor:
        total = torch.zeros(len(state), dtype=torch.float64)
        for depth in range(horizon):
            step = JointWorld().step(state, torch.tensor(self.hold).expand(len(state), 1, 3))
            total, state = total + discount**depth * step.reward[:, 0], step.state
        return total


class JointChoices:
    """A `JointWalk` over rows of one particle."""

    def __init__(self, walk: JointWalk) -> None:
        self._walk = walk

    def action_masks(self, dimension: int) -> torch.Tensor:
        masks: torch.Tensor = self._walk.action_masks(dimension)
        return masks[:, None]

    def take(self, dimension: int, action: torch.Tensor) -> None:
        self._walk.take(dimension, action[:, 0])
