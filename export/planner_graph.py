"""The planner as one graph: scenarios, accounts, masks and search, unrolled.

The whole tree of A + A^2 + ... + A^H sequences is laid out densely, every node in every scenario, because a graph
cannot branch on what a mask says: a forbidden action's numbers are computed and count as -inf. Account step, rules and
reward are the functions everything else calls (`envs.account`, `masking`, `envs.reward`), on arrays [B, N, A, S]:
scenarios lie side by side in memory, and what does not depend on the action is computed once for all of them.

Letters: B batch, N nodes of a depth, A actions, S scenarios, H horizon, M features, E elites.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from envs import DATA_AGE, UNCERTAINTY_FIELD, Account, TradingDynamics
from envs.account import account_step
from envs.reward import reward_function
from export.errors import ExportError
from export.graphs import PolicyGraph
from masking import HOLD, RuleError
from masking.probe_states import probe_states
from mbpo.control_variate import unforeseen_reward
from mbpo.planning import PlannerPolicy
from planner import Exhaustive
from serving import PlannerOutputs
from world_model.volatility import BAR_MOVES

PROBES = 500
"""States on which rules are compared in both of their layouts."""


class _Bar(NamedTuple):
    # One imagined bar of every scenario.
    features: Tensor  # [B, M, S]
    uncertainty: Tensor  # [B], at the mean of the scenarios
    mean: Tensor  # [B, 2, S], expected gap and intraday return
    variance: Tensor  # [B, 2, S]


class PlannerGraph(nn.Module):
    """`state` float32 [B, S] raw, `caller_masks` bool [B, A], `seed` int64 [B] -> `PlannerOutputs`.

    `seed` picks one of the noise tables in the file, modulo their number: equal inputs, equal plans.
    """

    innovations: Tensor

    def __init__(self, policy: PlannerPolicy, *, noise_tables: int = 1) -> None:
        """Copy what plans.

        Args: policy: an exhaustive planner, with or without a value policy; noise_tables: how many the file has.
        Raises: ExportError if the policy searches otherwise, or a rule gives other masks where rows lie side by side.
        """
        super().__init__()
        search = policy.search
        if not isinstance(search, Exhaustive) or search.particles != "all" or search.objective.tail < 1.0:
            raise ExportError(f"search: expected an exhaustive one of the mean over particles 'all', was {search}")
        self.dynamics, self.horizon = policy.dynamics, search.horizon
        _refuse_row_rules(self.dynamics)
        value = policy.value
        self.discount, self.penalty = search.objective.discount, search.objective.uncertainty_penalty
        self.control_variate = policy.config.control_variate
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

    def forward(self, state: Tensor, caller_masks: Tensor, seed: Tensor) -> PlannerOutputs:
        """See the class."""
        dynamics, size, horizon = self.dynamics, self.dynamics.num_actions, self.horizon
        actions = torch.arange(size)
        allowed = dynamics.action_masks(state) & caller_masks
        some = allowed.any(dim=1, keepdim=True)
        masks = allowed | (~some & (actions == HOLD))
        root_doubt, bars = self.imagine(state[:, : len(dynamics.feature_names)], seed)

        start = dynamics.account_from_state(state, torch.float32)
        account, reward = self.step(Account(*(column[:, None, None, None] for column in start)), actions, bars[0])
        worth = self.charged(reward, account, root_doubt).mean(dim=3).flatten(1)
        permitted, alive = masks, _unfold(account.killed <= 0)
        account = Account(*map(_unfold, account))
        for depth in range(1, horizon):
            before = bars[depth - 1]
            permitted = (permitted[:, :, None] & self.masks(account, alive, before)).flatten(1)
            account, reward = self.step(account, actions, bars[depth])
            earned = torch.where(alive, self.charged(reward, account, before.uncertainty), 0.0)
            worth = (worth[:, :, None] + self.discount**depth * earned.mean(dim=3)).flatten(1)
            # Nodes and actions of this depth are the nodes of the next.
            alive = _unfold(alive & (account.killed <= 0))
            account = Account(*map(_unfold, account))
        if self.value is not None:
            worth = worth + self.discount**horizon * self.future(self.value, account, alive, bars[-1])

        worth = torch.where(permitted & (worth.abs() < torch.inf), worth, -torch.inf)
        action_values, rest = worth.reshape(-1, size, size ** (horizon - 1)).max(dim=2)
        value = action_values.amax(dim=1, keepdim=True)
        finite = (state.abs() < torch.inf).all(dim=1, keepdim=True)
        decided = some & finite & (value > -torch.inf)
        tied = (action_values == value) & decided
        first = tied.to(torch.float32)
        if self.value is not None:
            preferred = self.value(state, caller_masks)[0][:, None] == actions
            first = first + (tied & preferred).to(torch.float32)
        action = first.argmax(dim=1)
        code = action[:, None] * size ** (horizon - 1) + rest.gather(1, action[:, None])
        places = torch.tensor([size**place for place in reversed(range(horizon))])
        return PlannerOutputs(
            torch.where(decided[:, 0], action, HOLD),
            torch.where(decided, value, 0.0)[:, 0],
            action_values,
            torch.where(decided, code // places % size, HOLD),
            masks,
            ~decided[:, 0],
        )

    def step(self, account: Account, actions: Tensor, bar: _Bar) -> tuple[Account, Tensor]:
        """One bar: account [B, N, 1, S] and actions [A] to account and reward [B, N, A, S]."""
        dynamics = self.dynamics
        gap, move = (bar.features[:, place, None, None] for place in self.moves)
        spread = None
        if dynamics.account_rules.spread_share:
            spread = bar.features[:, dynamics.feature_names.index("spread"), None, None]
        after, outcome = account_step(account, actions[:, None], gap, move, dynamics.account_rules, spread)
        reward: Tensor = reward_function(dynamics.reward.name)(outcome, dynamics.reward)
        if self.control_variate:
            mean, variance = ((part[:, 0, None, None], part[:, 1, None, None]) for part in (bar.mean, bar.variance))
            positions = (account.position, outcome.target)
            luck = unforeseen_reward(dynamics.reward, positions, (gap, move), mean, variance)
            reward = reward - self.control_variate * luck
        return after, reward

    def charged(self, reward: Tensor, account: Account, doubt: Tensor) -> Tensor:
        """Reward less the charge for uncertainty. Args: doubt [B], disagreement before the bar."""
        if not self.penalty:
            return reward
        size: Tensor = account.position.abs()
        return reward - self.penalty * doubt[:, None, None, None] * size

    def masks(self, account: Account, alive: Tensor, bar: _Bar) -> Tensor:
        """What every living scenario allows after a bar: bool [B, N, A]. Args: account, alive [B, N, 1, S]."""
        dynamics, (nodes, scenarios) = self.dynamics, (alive.shape[1], alive.shape[3])
        columns = dynamics.account_columns(account)
        for place, name in enumerate(dynamics.feature_names):
            if name in dynamics.rule_set.fields:
                columns[name] = bar.features[:, place, None, None]
        columns[UNCERTAINTY_FIELD.name] = bar.uncertainty[:, None, None, None]
        columns[DATA_AGE] = 0.0 * account.position  # of the batch, without asking for its size
        ones = torch.ones(1, nodes, 1, scenarios)
        flat = {name: (columns[name] * ones).reshape(-1) for name in dynamics.rule_set.fields}
        masks: Tensor = dynamics.rule_set.by_action(flat).reshape(dynamics.num_actions, -1, nodes, scenarios)
        common: Tensor = (masks | ~alive[:, :, 0]).all(dim=3)
        return common.permute(1, 2, 0)

    def future(self, value: PolicyGraph, account: Account, alive: Tensor, bar: _Bar) -> Tensor:
        """Value of the mean of the living scenarios after the last bar, times their share: [B, N]."""
        living = alive[:, :, 0].to(torch.float32)
        share = living / living.sum(dim=2, keepdim=True).clamp(min=1.0)
        mean = Account(
            *((torch.where(alive, column, 0.0)[:, :, 0] * share).sum(dim=2).reshape(-1) for column in account)
        )
        # What the dead see may be no number either; where somebody lives who sees that, nothing is worth anything.
        known = bar.features.abs() < torch.inf
        features = torch.matmul(share, torch.where(known, bar.features, 0.0).transpose(1, 2)).flatten(0, 1)
        blind = torch.matmul(living, (~known).any(dim=1).to(torch.float32)[:, :, None])[:, :, 0] > 0
        doubt = (bar.uncertainty[:, None] * torch.ones(1, share.shape[1])).reshape(-1)
        worth = value.values(self.dynamics.state_row(features, mean, doubt)).reshape(-1, share.shape[1])
        left = living.mean(dim=2)
        # The mean of nobody is no account; what it would be worth is no number.
        future: Tensor = torch.where(blind, torch.inf, torch.where(left > 0, worth * left, 0.0))
        return future

    def imagine(self, features: Tensor, seed: Tensor) -> tuple[Tensor, list[_Bar]]:
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
        bars = [_Bar(bar, doubts[:, depth], mean, var) for depth, (bar, mean, var) in enumerate(found, start=1)]
        return doubts[:, 0], bars


# Once and for all rules, also a user's own: `by_action` shows them other shapes than a call does.
def _refuse_row_rules(dynamics: TradingDynamics) -> None:
    probes = probe_states(dynamics.rule_set, {}, PROBES, np.random.default_rng(0))
    columns = {name: torch.from_numpy(column) for name, column in probes.items()}
    try:
        same = torch.equal(dynamics.rule_set.by_action(columns).T, dynamics.rule_set(columns))
    except (RuleError, RuntimeError, IndexError) as error:
        raise ExportError(f"rule set: expected rules of elementwise operations, which name no axis: {error}") from error
    if not same:
        raise ExportError("rule set: expected the same masks with actions first; use elementwise operations only")


def _unfold(column: Tensor) -> Tensor:
    return column.flatten(1, 2)[:, :, None]
