"""The exhaustive planner as one graph: scenarios, accounts, masks and search, unrolled.

At each depth the paths that masks leave to some row of the batch are gathered; the others are never walked, so how
long a plan takes depends on its masks. Account step, rules and reward are the functions everything else calls
(`envs.account`, `masking`, `envs.reward`), on arrays [B, P, S]: scenarios lie side by side in memory.

Letters: B batch, P paths of a depth, A actions, S scenarios, H horizon, M features, E elites.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from envs import DATA_AGE, UNCERTAINTY_FIELD, Account, TradingDynamics
from envs.account import account_step
from envs.reward import reward_function
from export.errors import ExportError
from export.graphs import PolicyGraph
from export.scenario_graph import Bar, ScenarioGraph
from masking import HOLD, RuleError
from masking.probe_states import probe_states
from mbpo.control_variate import unforeseen_reward
from mbpo.planning import PlannerPolicy
from planner import Exhaustive
from serving import PlannerOutputs

PROBES = 500
"""States on which rules are compared in both of their layouts."""


class PlannerGraph(ScenarioGraph):
    """`state` float32 [B, S] raw, `caller_masks` bool [B, A], `seed` int64 [B] -> `PlannerOutputs`.

    `seed` picks one of the noise tables in the file, modulo their number: equal inputs, equal plans.
    """

    def __init__(self, policy: PlannerPolicy, *, noise_tables: int = 1) -> None:
        """Copy what plans.

        Args: policy: an exhaustive planner, with or without a value policy; noise_tables: how many the file has.
        Raises: ExportError if the policy searches otherwise, or a rule gives other masks where rows lie side by side.
        """
        search = policy.search
        if not isinstance(search, Exhaustive) or search.particles != "all" or search.objective.tail < 1.0:
            raise ExportError(f"search: expected an exhaustive one of the mean over particles 'all', was {search}")
        _refuse_row_rules(policy.dynamics)
        super().__init__(policy, noise_tables)
        self.discount, self.penalty = search.objective.discount, search.objective.uncertainty_penalty

    def forward(self, state: Tensor, caller_masks: Tensor, seed: Tensor) -> PlannerOutputs:
        """See the class."""
        dynamics, size = self.dynamics, self.dynamics.num_actions
        masks, sane = self.begin(state, caller_masks)
        doubt, bars = self.imagine(state[:, : len(dynamics.feature_names)], seed)

        account = Account(*(column[:, None, None] for column in dynamics.account_from_state(state, torch.float32)))
        alive = account.equity < torch.inf
        allowed, permitted, worth = masks[:, None], sane | True, 0.0 * account.equity[:, :, 0]
        digits: list[Tensor] = []
        for depth, bar in enumerate(bars):
            if depth:
                allowed = self.masks(account, alive, bars[depth - 1])
            choices = (permitted[:, :, None] & allowed).flatten(1)
            # What no row of the batch may do is not walked at all.
            kept = choices.any(dim=0).nonzero()[:, 0]
            parent, action = kept // size, kept % size
            permitted = choices.index_select(1, kept)
            account, alive, worth = (
                Account(*(column.index_select(1, parent) for column in account)),
                alive.index_select(1, parent),
                worth.index_select(1, parent),
            )
            digits = [*(column[parent] for column in digits), action]
            account, reward = self.step(account, action[:, None], bar)
            earned = torch.where(alive, self.charged(reward, account, doubt), 0.0)
            worth = worth + self.discount**depth * earned.mean(dim=2)
            alive, doubt = alive & (account.killed <= 0), bar.uncertainty
        if self.value is not None:
            worth = worth + self.discount**self.horizon * self.future(self.value, account, alive, bars[-1])

        worth = torch.where(permitted & (worth.abs() < torch.inf), worth, -torch.inf)
        actions = torch.arange(size)
        begun = digits[0][:, None] == actions
        action_values, place = torch.where(begun, worth[:, :, None], -torch.inf).max(dim=1)
        value = action_values.amax(dim=1, keepdim=True)
        decided = sane & (value > -torch.inf)
        tied = (action_values == value) & decided
        first = tied.to(torch.float32)
        if self.value is not None:
            preferred = self.value(state, caller_masks)[0][:, None] == actions
            first = first + (tied & preferred).to(torch.float32)
        action = first.argmax(dim=1)
        best = place.gather(1, action[:, None])[:, 0]
        return PlannerOutputs(
            torch.where(decided[:, 0], action, HOLD),
            torch.where(decided, value, 0.0)[:, 0],
            action_values,
            torch.where(decided, torch.stack(digits, dim=1).index_select(0, best), HOLD),
            masks,
            ~decided[:, 0],
        )

    def step(self, account: Account, action: Tensor, bar: Bar) -> tuple[Account, Tensor]:
        """One bar: account [B, P, S] and action [P, 1] to account and reward [B, P, S]."""
        dynamics = self.dynamics
        gap, move = (bar.features[:, place, None] for place in self.moves)
        spread = None
        if dynamics.account_rules.spread_share:
            spread = bar.features[:, dynamics.feature_names.index("spread"), None]
        after, outcome = account_step(account, action, gap, move, dynamics.account_rules, spread)
        reward: Tensor = reward_function(dynamics.reward.name)(outcome, dynamics.reward)
        if self.control_variate:
            mean, variance = ((part[:, 0, None], part[:, 1, None]) for part in (bar.mean, bar.variance))
            positions = (account.position, outcome.target)
            luck = unforeseen_reward(dynamics.reward, positions, (gap, move), mean, variance)
            reward = reward - self.control_variate * luck
        return after, reward

    def charged(self, reward: Tensor, account: Account, doubt: Tensor) -> Tensor:
        """Reward less the charge for uncertainty. Args: doubt [B], disagreement before the bar."""
        if not self.penalty:
            return reward
        size: Tensor = account.position.abs()
        return reward - self.penalty * doubt[:, None, None] * size

    def masks(self, account: Account, alive: Tensor, bar: Bar) -> Tensor:
        """What every living scenario allows after a bar: bool [B, P, A]. Args: account, alive [B, P, S]."""
        dynamics = self.dynamics
        columns = dynamics.account_columns(account)
        for place, name in enumerate(dynamics.feature_names):
            if name in dynamics.rule_set.fields:
                columns[name] = bar.features[:, place, None]
        columns[UNCERTAINTY_FIELD.name] = bar.uncertainty[:, None, None]
        ones = torch.ones_like(account.equity)
        columns[DATA_AGE] = 0.0 * ones
        flat = {name: (columns[name] * ones).reshape(-1) for name in dynamics.rule_set.fields}
        masks: Tensor = dynamics.rule_set.by_action(flat).reshape(dynamics.num_actions, *alive.shape)
        common: Tensor = (masks | ~alive).all(dim=3)
        return common.permute(1, 2, 0)

    def future(self, value: PolicyGraph, account: Account, alive: Tensor, bar: Bar) -> Tensor:
        """Value of the mean of the living scenarios after the last bar, times their share: [B, P]."""
        living = alive.to(torch.float32)
        share = living / living.sum(dim=2, keepdim=True).clamp(min=1.0)
        mean = Account(*((torch.where(alive, column, 0.0) * share).sum(dim=2).reshape(-1) for column in account))
        # What the dead see may be no number either; where somebody lives who sees that, nothing is worth anything.
        known = bar.features.abs() < torch.inf
        features = torch.matmul(share, torch.where(known, bar.features, 0.0).transpose(1, 2)).flatten(0, 1)
        blind = torch.matmul(living, (~known).any(dim=1).to(torch.float32)[:, :, None])[:, :, 0] > 0
        left = living.mean(dim=2)
        doubt = (bar.uncertainty[:, None] * torch.ones_like(left)).reshape(-1)
        worth = value.values(self.dynamics.state_row(features, mean, doubt)).reshape(left.shape)
        # The mean of nobody is no account; what it would be worth is no number.
        future: Tensor = torch.where(blind, torch.inf, torch.where(left > 0, worth * left, 0.0))
        return future


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
