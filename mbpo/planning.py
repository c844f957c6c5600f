"""Planning with the learned market: every valid action sequence, scored on the same imagined scenarios.

The market does not react, so scenarios are drawn once per decision and every sequence is walked through all of them
with the exact account step. Letters: N rows, S scenarios, H bars, M features, A actions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from configs.evaluation import PlannerConfig
from envs import Account, TradingDynamics
from masking import refuse_broken_rows, validate_action_masks
from mbpo.policy import TorchPolicy
from planner import Plan, exhaustive_search
from world_model import MarketModel

CHUNK_LEAVES = 500_000
"""Imagined accounts at the last depth that are held at once, masks aside; bounds memory, not results."""


class Scenarios(NamedTuple):
    """Market futures of N rows."""

    features: torch.Tensor
    """[H, N, S, M] float32: bars 1..H after each row."""
    uncertainty: torch.Tensor
    """[H, N, S] float32: ensemble disagreement at those bars."""


class PlannerPolicy:
    """First action of the best sequence over H bars, under masks at every imagined bar.

    A sequence is worth the mean over scenarios of its discounted rewards, plus what `value` expects after the last bar.
    One sequence is walked through all scenarios: an action is valid where the masks of all of them allow it. The noise
    is drawn once, so that `act` is a pure function of its arguments; in antithetic pairs scaled to unit variance, each
    pair on one elite per bar and all elites equally often: sixteen independent draws would be off by a quarter of a
    day's move, more than any forecast.

    Args:
        dynamics, model: of the same feature columns.
        config: horizon and number of scenarios.
        seed: of noise and elites.
        gamma: discount per bar, that of `value`.
        value: trained policy whose value network ends each sequence and whose action decides between equal ones; None
            counts nothing after the last bar.

    Raises: ValueError if `dynamics` and `model` name different columns.
    """

    def __init__(
        self,
        dynamics: TradingDynamics,
        model: MarketModel,
        config: PlannerConfig,
        *,
        seed: int,
        gamma: float,
        value: TorchPolicy | None = None,
        name: str = "planner",
    ) -> None:
        columns = tuple(field.name for field in model.fields)
        if columns != dynamics.feature_names:
            raise ValueError(f"model: expected the columns of the dynamics {dynamics.feature_names}, was {columns}")
        self.name = name
        self.dynamics, self.model, self.config = dynamics, model, config
        self.gamma, self.value = gamma, value
        generator = torch.Generator().manual_seed(seed)
        self.members = _balanced_members(model.elites, config.horizon, config.scenarios, generator)
        self.noise = _antithetic_noise(config.horizon, config.scenarios, len(columns), generator)

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        """First action of the best plan.

        Args: state [B, S] float32; action_masks [B, A] bool.
        Returns: [B] int64.
        Raises: MaskingError where no sequence has a finite value, as with NaN in a state; InvalidMaskError.
        """
        self._check(state, action_masks)
        rows = max(1, CHUNK_LEAVES // (action_masks.shape[1] ** self.config.horizon * self.config.scenarios))
        chunks = range(0, len(state), rows)
        parts = [self._choose(state[first : first + rows], action_masks[first : first + rows]) for first in chunks]
        return np.concatenate(parts)

    def plan(self, state: np.ndarray, action_masks: np.ndarray) -> Plan:
        """Best valid sequence of each row, arguments as in `act`; the given masks hold at the first bar."""
        self._check(state, action_masks)
        rows, masks = (torch.from_numpy(np.ascontiguousarray(part)) for part in (state, action_masks))
        num_features = len(self.dynamics.feature_names)
        scenarios = self.imagine(rows[:, :num_features])
        tree = _ScenarioTree(self.dynamics, scenarios, masks, self.value)
        return exhaustive_search(tree, tree.roots(rows), self.config.horizon, self.gamma)

    def imagine(self, features: torch.Tensor) -> Scenarios:
        """Market futures of feature rows [N, M]; the same noise for every row."""
        horizon, num_scenarios = self.members.shape
        current = features.repeat_interleave(num_scenarios, dim=0)
        bars, disagreements = [], []
        with torch.no_grad():
            for depth in range(horizon):
                member = self.members[depth].repeat(len(features))
                current = self.model.sample_next(current, member, self.noise[depth].repeat(len(features), 1))
                bars.append(current)
                disagreements.append(self.model.disagreement(current))
        shape = (horizon, len(features), num_scenarios)
        return Scenarios(torch.stack(bars).reshape(*shape, -1), torch.stack(disagreements).reshape(shape))

    def _check(self, state: np.ndarray, action_masks: np.ndarray) -> None:
        validate_action_masks(action_masks, num_actions=self.dynamics.num_actions, batch=len(state))

    def _choose(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        plan = self.plan(state, action_masks)
        refuse_broken_rows(
            plan.fallback,
            f"{self.name}: expected a sequence of finite value, was none",
            look_for="NaN in the state or for a diverged world model",
        )
        action: np.ndarray = plan.action.numpy()
        if self.value is None:
            return action
        preferred = self.value.act(state, action_masks)
        ties = (plan.action_values == plan.value[:, None]).numpy()
        return np.where(ties[np.arange(len(state)), preferred], preferred, action)


class _Node(NamedTuple):
    # One node per row: which market it is in, how many bars ahead, and its account in every scenario.
    row: torch.Tensor  # [N], row of the decision
    depth: int
    account: Account  # [N, S]


class _ScenarioTree:
    # `planner.PlanningModel` over scenarios: mean rewards, masks that hold in every scenario.

    def __init__(
        self, dynamics: TradingDynamics, scenarios: Scenarios, root_masks: torch.Tensor, value: TorchPolicy | None
    ) -> None:
        self._dynamics, self._scenarios, self._root_masks, self._value = dynamics, scenarios, root_masks, value

    def roots(self, state: torch.Tensor) -> _Node:
        num_scenarios = self._scenarios.uncertainty.shape[2]
        account = self._dynamics.account_from_state(state, torch.float32)
        spread_out = (column[:, None].expand(-1, num_scenarios) for column in account)
        return _Node(torch.arange(len(state)), 0, Account(*spread_out))

    def action_masks(self, state: _Node) -> torch.Tensor:
        # The first masks are the caller's, which may know more than a state row.
        if state.depth == 0:
            return self._root_masks[state.row]
        masks: torch.Tensor = self._dynamics.action_masks(self._state_rows(state)).reshape(
            *state.account.killed.shape, -1
        )
        # Where the kill switch latched the episode is over; that must not forbid the other scenarios anything.
        killed: torch.Tensor = state.account.killed > 0
        return (masks | killed[:, :, None]).all(dim=1)

    def step(self, state: _Node, action: torch.Tensor) -> tuple[_Node, torch.Tensor, torch.Tensor]:
        shape = state.account.killed.shape
        features = self._scenarios.features[state.depth][state.row].flatten(0, 1)
        flat = Account(*(column.flatten() for column in state.account))
        after, _, reward = self._dynamics.step(flat, action.repeat_interleave(shape[1]), features)
        # The episode of a killed scenario ended one bar earlier, its rewards too.
        earned = torch.where(flat.killed > 0, torch.zeros_like(reward), reward)
        account = Account(*(column.reshape(shape) for column in after))
        following = _Node(state.row, state.depth + 1, account)
        return following, earned.reshape(shape).mean(dim=1), (account.killed > 0).all(dim=1)

    def value(self, state: _Node) -> torch.Tensor:
        killed = state.account.killed > 0
        if self._value is None:
            return torch.zeros(len(killed))
        values = self._value.values(self._state_rows(state)).reshape(killed.shape)
        return torch.where(killed, torch.zeros_like(values), values).mean(dim=1)

    def take(self, state: _Node, index: torch.Tensor) -> _Node:
        return _Node(state.row[index], state.depth, Account(*(column[index] for column in state.account)))

    def _state_rows(self, state: _Node) -> torch.Tensor:
        # [N * S, columns] state rows of imagined bars.
        bar = state.depth - 1
        features = self._scenarios.features[bar][state.row].flatten(0, 1)
        uncertainty = self._scenarios.uncertainty[bar][state.row].flatten()
        rows: torch.Tensor = self._dynamics.state_row(
            features, Account(*(column.flatten() for column in state.account)), uncertainty
        )
        return rows


def _balanced_members(
    elites: tuple[int, ...], horizon: int, num_scenarios: int, generator: torch.Generator
) -> torch.Tensor:
    # [H, S] int64. Both halves of an antithetic pair follow the same elite; a new deal each bar (TS1 of PETS).
    num_pairs = (num_scenarios + 1) // 2
    deal = torch.tensor(elites)[torch.arange(num_pairs) % len(elites)]
    shuffled = torch.stack([deal[torch.randperm(num_pairs, generator=generator)] for _ in range(horizon)])
    return torch.cat((shuffled, shuffled), dim=1)[:, :num_scenarios]


def _antithetic_noise(horizon: int, num_scenarios: int, num_features: int, generator: torch.Generator) -> torch.Tensor:
    # [H, S, M] with mean 0 and variance 1 over scenarios; an odd scenario goes without noise.
    half = torch.randn((horizon, num_scenarios // 2, num_features), generator=generator)
    lone = torch.zeros((horizon, num_scenarios % 2, num_features))
    noise = torch.cat((half, lone, -half), dim=1)
    scale = noise.square().mean(dim=1, keepdim=True).sqrt()
    return noise / torch.where(scale > 0, scale, torch.ones_like(scale))
