"""Planning with the learned market: every valid action sequence, scored on the same imagined scenarios.

The market does not react, so scenarios are drawn once per decision and every sequence is walked through all of them
with the exact account step. Letters: N rows, S scenarios, H bars, M features, A actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.schema import PlannerConfig
from envs import Account, TradingDynamics
from masking import HOLD, refuse_broken_rows, validate_action_masks
from mbpo.control_variate import unforeseen_reward
from mbpo.policy import TorchPolicy
from planner import CEM, Exhaustive, Objective, Plan, RandomShooting, Transition, auto_search
from world_model import MarketModel
from world_model.volatility import BAR_MOVES

CHUNK_PATHS = 500_000
"""Imagined accounts at the last depth that are held at once, masks aside; bounds memory, not results."""


class Scenarios(NamedTuple):
    """Market futures of N rows; float32."""

    features: torch.Tensor
    """[H, N, S, M]: bars 1..H after each row."""
    uncertainty: torch.Tensor
    """[H + 1, N]: ensemble disagreement at the row itself and at the mean of the scenarios after each bar."""
    mean: torch.Tensor
    """[H, N, S, 2]: gap and intraday return that the member a bar was drawn from expected, one bar before."""
    variance: torch.Tensor
    """[H, N, S, 2]: of these log returns."""


class PlannerPolicy:
    """First action of the best sequence over H bars, under masks at every imagined bar.

    A sequence is worth, over scenarios, its discounted rewards plus what `value` expects after the last bar; one
    sequence is walked through all scenarios. Rewards are those of `dynamics` less their unforeseen part (see
    `mbpo.control_variate`), without which sixteen scenarios say more of their noise than of any forecast. The noise is
    drawn once, so that `act` is a pure function of its arguments; in antithetic pairs scaled to unit variance, each
    pair on one elite per bar and all elites equally often.

    Args:
        dynamics, model: of the same feature columns; the reward of `dynamics` should be that `value` was trained on.
        config: search, horizon, scenarios and objective.
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
        self.dynamics, self.model, self.config, self.seed = dynamics, model, config, seed
        self.gamma, self.value = gamma, value
        self.search = make_search(config, dynamics.num_actions, gamma)
        self._generator = torch.Generator().manual_seed(seed)
        self.members = _balanced_members(model.elites, config.horizon, config.scenarios, self._generator)
        self.noise = _antithetic_noise(config.horizon, config.scenarios, len(columns), self._generator)
        self._moves = [columns.index(name) for name in BAR_MOVES]

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        """First action of the best plan.

        Args: state [B, S] float32; action_masks [B, A] bool.
        Returns: [B] int64.
        Raises: MaskingError where no sequence has a finite value, as with NaN in a state; InvalidMaskError.
        """
        self._check(state, action_masks)
        widest = self._widest(action_masks.shape[1])
        rows = max(1, CHUNK_PATHS // (widest * self.config.scenarios))
        chunks = range(0, len(state), rows)
        parts = [self._choose(state[first : first + rows], action_masks[first : first + rows]) for first in chunks]
        return np.concatenate(parts)

    def plan(self, state: np.ndarray, action_masks: np.ndarray) -> Plan:
        """Best valid sequence of each row, arguments as in `act`; the given masks hold at the first bar."""
        self._check(state, action_masks)
        model, root = self.imagined(state, action_masks)
        if isinstance(self.search, Exhaustive):
            return self.search.plan(model, root)
        # The same noise for every row: a decision must not depend on its neighbours in the batch.
        noise = self.search_noise()
        return self.search.plan(model, root, noise=noise.expand(-1, len(state), -1, -1, -1))

    def search_noise(self, table: int = 0) -> torch.Tensor:
        """Noise of a sampling search, [I, 1, C, H, 1]. Args: table: 0 is this planner's own.

        Raises: TypeError of a search that draws nothing.
        """
        if isinstance(self.search, Exhaustive):
            raise TypeError("search: expected one that samples, was an exhaustive one")
        return self.search.noise(1, 1, torch.Generator().manual_seed(self.seed + table))

    def noise_tables(self, count: int) -> torch.Tensor:
        """[count, H, S, M]: the noise of this planner, and others drawn after it; the same whenever asked."""
        generator = self._generator.clone_state()
        horizon, scenarios, features = self.noise.shape
        others = [_antithetic_noise(horizon, scenarios, features, generator) for _ in range(count - 1)]
        return torch.stack([self.noise, *others])

    def imagined(self, state: np.ndarray, action_masks: np.ndarray) -> tuple[ScenarioModel, ScenarioState]:
        """Model and state of a search from these rows, arguments as in `act`; fits `planner.MPC`."""
        rows, masks = (torch.from_numpy(np.ascontiguousarray(part)) for part in (state, action_masks))
        model = ScenarioModel(
            self.dynamics,
            self.imagine(rows[:, : len(self.dynamics.feature_names)]),
            masks,
            None if self.value is None else self.value.values,
            control_variate=self.config.control_variate,
        )
        return model, model.roots(rows)

    def imagine(self, features: torch.Tensor) -> Scenarios:
        """Market futures of feature rows [N, M]; the same noise for every row."""
        horizon, num_scenarios = self.members.shape
        current = features.repeat_interleave(num_scenarios, dim=0)
        shape = (len(features), num_scenarios)
        bars, means, variances = [], [], []
        with torch.no_grad():
            doubts = [self.model.disagreement(features)]
            for depth in range(horizon):
                member = self.members[depth].repeat(len(features))
                noise = self.noise[depth].repeat(len(features), 1)
                current, mean, variance = self.model.draw(current, member, noise)
                bars.append(current.reshape(*shape, -1))
                means.append(mean[:, self._moves].reshape(*shape, -1))
                variances.append(variance[:, self._moves].reshape(*shape, -1))
                doubts.append(self.model.disagreement(bars[-1].mean(dim=1)))
        return Scenarios(*map(torch.stack, (bars, doubts, means, variances)))

    def _check(self, state: np.ndarray, action_masks: np.ndarray) -> None:
        validate_action_masks(action_masks, num_actions=self.dynamics.num_actions, batch=len(state))

    def _widest(self, num_actions: int) -> int:
        if isinstance(self.search, Exhaustive):
            return int(num_actions**self.config.horizon)
        return self.search.candidates

    def _choose(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        plan = self.plan(state, action_masks)
        refuse_broken_rows(
            plan.fallback,
            f"{self.name}: expected a sequence of finite value, was none",
            look_for="NaN in the state or for a diverged world model",
        )
        action: np.ndarray = plan.action.numpy()
        if self.value is None or plan.action_values is None:
            return action
        preferred = self.value.act(state, action_masks)
        ties = (plan.action_values == plan.value[:, None]).numpy()
        return np.where(ties[np.arange(len(state)), preferred], preferred, action)


def make_search(config: PlannerConfig, num_actions: int, gamma: float) -> Exhaustive | CEM | RandomShooting:
    """The search of a config. Args: gamma: discount per bar."""
    objective = Objective(discount=gamma, uncertainty_penalty=config.uncertainty_penalty, tail=config.tail)
    common: dict[str, Any] = {"objective": objective, "particles": config.particles}
    if config.search == "cem":
        return CEM(
            horizon=config.horizon,
            candidates=config.candidates,
            elites=config.elites,
            iterations=config.iterations,
            **common,
        )
    if config.search == "random_shooting":
        return RandomShooting(horizon=config.horizon, candidates=config.candidates, **common)
    if config.search == "auto":
        return auto_search(
            num_actions, config.horizon, max_nodes=config.max_nodes, iterations=config.iterations, **common
        )
    return Exhaustive(horizon=config.horizon, **common)


class ScenarioState(NamedTuple):
    """One node of the search per row: which decision it belongs to, how many bars ahead, its account everywhere."""

    row: torch.Tensor
    """[N], row of the decision."""
    depth: int
    """Bars ahead; that many features of the scenarios have been seen."""
    account: Account
    """[N, S]."""


class ScenarioModel:
    """`planner.PlanningModel` over market scenarios, one particle each: the market does not react, accounts are exact.

    Args:
        dynamics: account, masks and reward.
        scenarios: futures of the rows that are decided.
        root_masks: bool [rows, A], which hold at the first bar: the caller may know more than a state row.
        value: of state rows [B, S] at the end, [B]; None is zero.
        control_variate: share of the unforeseen part of a bar's return taken out of the rewards.
    """

    safe_action: int | None = HOLD

    def __init__(
        self,
        dynamics: TradingDynamics,
        scenarios: Scenarios,
        root_masks: torch.Tensor,
        value: Callable[[torch.Tensor], torch.Tensor] | None,
        *,
        control_variate: float = 0.0,
    ) -> None:
        self._dynamics, self._scenarios, self._root_masks, self._value = dynamics, scenarios, root_masks, value
        self._control_variate = control_variate
        self._moves = [dynamics.feature_names.index(name) for name in BAR_MOVES]

    def roots(self, state: torch.Tensor) -> ScenarioState:
        """State rows [rows, columns], each in all scenarios."""
        num_scenarios = self._scenarios.features.shape[2]
        account = self._dynamics.account_from_state(state, torch.float32)
        spread_out = (column[:, None].expand(-1, num_scenarios) for column in account)
        return ScenarioState(torch.arange(state.shape[0]), 0, Account(*spread_out))

    def action_masks(self, state: ScenarioState) -> torch.Tensor:
        """Masks [N, S, A] of every imagined state."""
        rows, scenarios = state.account.killed.shape
        if state.depth == 0:
            return self._root_masks[state.row][:, None].expand(-1, scenarios, -1)
        masks: torch.Tensor = self._dynamics.action_masks(self._state_rows(state))
        return masks.reshape(rows, scenarios, -1)

    def step(self, state: ScenarioState, action: torch.Tensor) -> Transition[ScenarioState]:
        """One bar; uncertainty is the disagreement before it times the position's size after it, as MBPO charges."""
        shape = state.account.killed.shape
        features = self._scenarios.features[state.depth][state.row].flatten(0, 1)
        flat = Account(*(column.flatten() for column in state.account))
        after, outcome, reward = self._dynamics.step(flat, action.flatten(), features)
        if self._control_variate:
            expected = (part[state.depth][state.row].flatten(0, 1) for part in self._scenarios[2:])
            moves, mean, variance = ((part[:, 0], part[:, 1]) for part in (features[:, self._moves], *expected))
            positions = (flat.position, outcome.target)
            luck = unforeseen_reward(self._dynamics.reward, positions, moves, mean, variance)
            reward = reward - self._control_variate * luck
        account = Account(*(column.reshape(shape) for column in after))
        doubt = self._scenarios.uncertainty[state.depth][state.row, None] * account.position.abs()
        following = ScenarioState(state.row, state.depth + 1, account)
        return Transition(following, reward.reshape(shape), account.killed > 0, doubt)

    def value(self, state: ScenarioState) -> torch.Tensor:
        """What the given function expects of the mean of the living scenarios, the same number in all of them: [N, S].

        A value network asked in every scenario of every sequence would cost more than all the rest.
        """
        alive = (state.account.killed <= 0).to(torch.float32)
        if self._value is None:
            return torch.zeros_like(alive)
        share = alive / alive.sum(dim=1, keepdim=True).clamp(min=1.0)
        # Not by a share of 0 alone: what the dead hold may be no number.
        living = alive > 0
        account = Account(*((torch.where(living, column, 0.0) * share).sum(dim=1) for column in state.account))
        features = self._scenarios.features[state.depth - 1][state.row]
        mean = (torch.where(living[:, :, None], features, 0.0) * share[:, :, None]).sum(dim=1)
        rows = self._dynamics.state_row(mean, account, self._scenarios.uncertainty[state.depth][state.row])
        return self._value(rows)[:, None].expand_as(alive)

    def take(self, state: ScenarioState, index: torch.Tensor) -> ScenarioState:
        """Those rows."""
        return ScenarioState(state.row[index], state.depth, Account(*(column[index] for column in state.account)))

    def _state_rows(self, state: ScenarioState) -> torch.Tensor:
        # [N * S, columns] state rows of imagined bars.
        features = self._scenarios.features[state.depth - 1][state.row].flatten(0, 1)
        scenarios = self._scenarios.features.shape[2]
        uncertainty = self._scenarios.uncertainty[state.depth][state.row].repeat_interleave(scenarios)
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
