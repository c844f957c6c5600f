"""The planner as one graph: scenarios, accounts, masks and search, unrolled.

The whole tree of A + A^2 + ... + A^H sequences is laid out densely, every node in every scenario, because a graph
cannot branch on what a mask says: a forbidden action's numbers are computed and count as -inf. Account step, rules and
reward are the functions everything else calls (`envs.account`, `masking`, `envs.reward`), on arrays [B, S, N, A].

Letters: B batch, S scenarios, N nodes of a depth, A actions, H horizon, M features.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data import Scaler
from envs import Account, TradingDynamics
from envs.account import account_step
from envs.reward import reward_function
from export.errors import ExportError
from export.graphs import PolicyGraph
from masking import HOLD
from mbpo.control_variate import unforeseen_reward
from mbpo.planning import PlannerPolicy, Scenarios
from planner import Exhaustive
from world_model.volatility import BAR_MOVES


class PlannerOutputs(NamedTuple):
    """What the graph returns."""

    action: Any
    """int64 [B]: first action of the best valid sequence, Hold where there is none."""
    value: Any
    """[B]: of that sequence, 0 where there is none."""
    action_values: Any
    """[B, A]: of the best sequence that begins with each action, -inf where masked or never finite."""
    sequence: Any
    """int64 [B, H]: Hold from where all scenarios have ended."""
    action_masks: Any
    """bool [B, A]: rules and caller's masks combined; Hold alone where nothing is left."""
    fallback: Any
    """bool [B]: no plan, so it holds."""


class PlannerGraph(nn.Module):
    """`state` float32 [B, S] raw, `caller_masks` bool [B, A], `seed` int64 [B] -> `PlannerOutputs`.

    `seed` picks one of the noise tables in the file, modulo their number: equal inputs, equal plans.
    """

    def __init__(self, policy: PlannerPolicy, value: PolicyGraph | None, *, noise_tables: int = 1) -> None:
        """Copy what plans.

        Args: policy: an exhaustive planner; value: graph of its value policy, None where it has none; noise_tables.
        Raises: ExportError if the policy searches otherwise or has another value policy.
        """
        super().__init__()
        if not isinstance(policy.search, Exhaustive) or policy.search.particles != "all":
            raise ExportError(f"search: expected an exhaustive one over particles 'all', was {policy.search}")
        if (policy.value is None) != (value is None):
            raise ExportError("value: expected the graph of the planner's value policy, was one without the other")
        self.dynamics, self.search, self.control_variate = policy.dynamics, policy.search, policy.config.control_variate
        self.model = copy.deepcopy(policy.model)
        self.value = value
        tables = policy.noise_tables(noise_tables)
        self.register_buffer("noise", self.model._innovation(tables.flatten(0, 2)).reshape(tables.shape))
        # Which scenarios each elite is asked about at each depth, filled up to equally many, and the way back.
        elites = torch.tensor(self.model.elites)
        most = int((policy.members[:, :, None] == elites).sum(dim=1).max())
        self.deal = (len(elites), most)
        self.places, self.back = [], []
        for depth, members in enumerate(policy.members):
            groups = [(members == elite).nonzero()[:, 0].tolist() for elite in elites]
            self.places.append(torch.tensor([[*group, *[0] * (most - len(group))] for group in groups]).flatten())
            place = {scenario: row * most + rank for row, group in enumerate(groups) for rank, scenario in enumerate(group)}
            asked = [place[scenario] if depth else place[scenario] // most for scenario in range(len(members))]
            self.back.append(torch.tensor(asked))
        self.moves = [self.dynamics.feature_names.index(name) for name in BAR_MOVES]

    def forward(self, state: Tensor, caller_masks: Tensor, seed: Tensor) -> PlannerOutputs:
        """See the class."""
        dynamics, size, horizon = self.dynamics, self.dynamics.num_actions, self.search.horizon
        scenarios = self.imagine(state[:, : len(dynamics.feature_names)], seed)
        allowed = dynamics.action_masks(state) & caller_masks
        some = allowed.any(dim=1, keepdim=True)
        actions = torch.arange(size)
        masks = allowed | (~some & (actions == HOLD))

        account = Account(*(column[:, None, None, None] for column in dynamics.account_from_state(state, torch.float32)))
        alive: Tensor | None = None
        permitted, worth = masks, torch.zeros(())
        for depth in range(horizon):
            if depth:
                permitted = (permitted[:, :, None] & self.masks(account, alive, scenarios, depth)).flatten(1)
                worth = worth[:, :, None]
            account, reward = self.step(account, actions[:, None], scenarios, depth)
            earned = reward if alive is None else torch.where(alive, reward, 0.0)
            worth = worth + self.search.objective.discount**depth * earned.mean(dim=3)
            living = account.killed <= 0
            alive = living if alive is None else alive & living
            # Nodes and actions of this depth are the nodes of the next: [B, N, A, S] to [B, N * A, 1, S].
            worth = worth.flatten(1)
            account, alive = Account(*map(_unfold, account)), _unfold(alive)
        if self.value is not None:
            worth = worth + self.search.objective.discount**horizon * self.leaf_value(account, alive, scenarios)
        usable = permitted & (worth.abs() < torch.inf)
        worth = torch.where(usable, worth, -torch.inf).reshape(-1, size, size ** (horizon - 1))
        action_values, rest = worth.max(dim=2)
        value = action_values.amax(dim=1, keepdim=True)
        finite = (state.abs() < torch.inf).all(dim=1, keepdim=True)
        decided = some & finite & (value > -torch.inf)
        tied = (action_values == value) & decided
        first = tied.to(torch.float32)
        if self.value is not None:
            preferred = self.value(state, caller_masks)[0][:, None] == actions
            first = first + (tied & preferred).to(torch.float32)
        action = torch.where(decided[:, 0], first.argmax(dim=1), HOLD)
        code = action[:, None] * size ** (horizon - 1) + rest.gather(1, action[:, None])
        places = torch.tensor([size**place for place in reversed(range(horizon))])
        sequence = torch.where(decided, code // places % size, HOLD)
        sure = torch.where(decided, value, 0.0)[:, 0]
        return PlannerOutputs(action, sure, action_values, sequence, masks, ~decided[:, 0])

    def step(self, account: Account, actions: Tensor, scenarios: Scenarios, depth: int) -> tuple[Account, Tensor]:
        """One bar of every node, action and scenario. Args: account [B, N, 1, S]; actions [A, 1]."""
        dynamics, bar = self.dynamics, scenarios.features[depth]
        gap, move = (bar[:, place, None, None] for place in self.moves)
        spread = None
        if dynamics.account_rules.spread_share:
            spread = bar[:, dynamics.feature_names.index("spread"), None, None]
        after, outcome = account_step(account, actions, gap, move, dynamics.account_rules, spread)
        reward = reward_function(dynamics.reward.name)(outcome, dynamics.reward)
        if self.control_variate:
            mean, variance = (
                (part[depth][:, 0, None, None], part[depth][:, 1, None, None])
                for part in (scenarios.mean, scenarios.variance)
            )
            positions = (account.position, outcome.target)
            luck = unforeseen_reward(dynamics.reward, positions, (gap, move), mean, variance)
            reward = reward - self.control_variate * luck
        return after, reward

    def masks(self, account: Account, alive: Tensor, scenarios: Scenarios, depth: int) -> Tensor:
        """What every living scenario allows: bool [B, N, A]. Args: account, alive [B, N, 1, S], after `depth` bars."""
        dynamics, (nodes, size) = self.dynamics, (alive.shape[1], alive.shape[3])
        columns, names = dynamics.account_columns(account), dynamics.feature_names
        for name in dynamics.rule_set.fields:
            if name in names:
                columns[name] = scenarios.features[depth - 1][:, names.index(name), None, None]
        columns["model_uncertainty"] = scenarios.uncertainty[depth][:, None, None, None]
        columns["data_age"] = 0.0 * account.position  # of the batch without asking for its size
        ones = torch.ones(1, nodes, 1, size)
        flat = {name: (columns[name] * ones).reshape(-1) for name in dynamics.rule_set.fields}
        masks = dynamics.rule_set.by_action(flat).reshape(dynamics.num_actions, -1, nodes, size)
        return (masks | ~alive[:, :, 0]).all(dim=3).permute(1, 2, 0)

    def leaf_value(self, account: Account, alive: Tensor, scenarios: Scenarios) -> Tensor:
        """Value of the mean of the living scenarios after the last bar: [B, N]."""
        assert self.value is not None
        living = alive[:, :, 0].to(torch.float32)
        share = living / living.sum(dim=2, keepdim=True).clamp(min=1.0)
        mean = Account(*((column[:, :, 0] * share).sum(dim=2).reshape(-1) for column in account))
        features = torch.matmul(share, scenarios.features[-1].transpose(1, 2)).flatten(0, 1)
        doubt = (scenarios.uncertainty[-1][:, None] * torch.ones(1, share.shape[1])).reshape(-1)
        value = self.value.values(self.dynamics.state_row(features, mean, doubt)).reshape(-1, share.shape[1])
        # Where nobody lives there is no future.
        return torch.where(alive.any(dim=3)[:, :, 0], value, 0.0)

    def imagine(self, features: Tensor, seed: Tensor) -> Scenarios:
        """Market futures as `PlannerPolicy.imagine` draws them, with the noise of the seeds.

        Returns: lists instead of a leading H: features [B, M, S]; uncertainty [B], of the row itself first; mean and
            variance [B, 2, S].
        """
        model, size = self.model, len(self.dynamics.feature_names)
        noise = self.noise[seed.remainder(self.noise.shape[0])]
        bars, means, variances, rows = [], [], [], [features]
        current = features
        for depth, (places, back) in enumerate(zip(self.places, self.back, strict=True)):
            if depth == 0:
                # All scenarios still stand on one row: each elite is asked once.
                asked = [part.transpose(0, 1)[:, back] for part in model.predict(current, model.elites)]
            else:
                # [B, S, M] to [E, B * n, M]: every elite its own scenarios.
                own = current[:, places].reshape(-1, *self.deal, size).transpose(0, 1).flatten(1, 2)
                answers = (part.reshape(self.deal[0], -1, self.deal[1], size) for part in model.predict(own, model.elites))
                asked = [part.transpose(0, 1).flatten(1, 2)[:, back] for part in answers]
            mean, var = asked
            current = model.clamp(mean + var.sqrt() * noise[:, depth])
            bars.append(current.transpose(1, 2))
            means.append(mean[:, :, self.moves].transpose(1, 2))
            variances.append(var[:, :, self.moves].transpose(1, 2))
            rows.append(current.mean(dim=1))
        doubt = model.disagreement(torch.stack(rows, dim=1).flatten(0, 1)).reshape(-1, len(rows))
        return Scenarios(bars, doubt.unbind(1), means, variances)  # type: ignore[arg-type]


def _unfold(column: Tensor) -> Tensor:
    return column.flatten(1, 2)[:, :, None]
