"""What a trading environment declares as known: state row, masks, account step, reward, termination.

History and imagination differ only in where the next feature row comes from; both call this class.

The state row `[B, S]` is float32 and named. Columns in order: the market and signal features, the account columns
below, `model_uncertainty`, `data_age`. The observation is the state without `data_age`, scaled to [-1, 1].

| column | unit | min | max |
| --- | --- | --- | --- |
| position | multiples of equity | -1.25 | 1.25 |
| exposure | notional over running peak equity | 0 | 1.25 |
| drawdown | fraction of running peak | 0 | 0.2 |
| open_pnl | return on equity since flat | -0.25 | 0.25 |
| holding_time | bars | 0 | 60 |
| trading_state | code 0-2 | 0 | 2 |
| flat_bars | bars | 0 | 20 |
| last_risk_event | code 0-3 | 0 | 3 |
| model_uncertainty | ensemble disagreement, delta std | 0 | 1 |
| data_age | bars | 0 | - |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from configs.schema import DetentConfig, RewardConfig
from data import Field, Scaler
from envs.account import Account, AccountRules, StepOutcome, account_step
from envs.reward import reward_function
from masking import ActionTable, DrawdownLadder, DrawdownRule, RuleError, RuleSet, trading_rules
from masking.declare import import_rule_modules, parse_rule_set
from masking.parameters import likeliest
from masking.ruleset import rule_name

if TYPE_CHECKING:
    from data import FeatureTable  # loads pandas

ACCOUNT_FIELDS: tuple[Field, ...] = (
    Field("position", "account", "multiples of equity", -1.25, 1.25, "Notional over equity"),
    Field("exposure", "account", "multiples of peak equity", 0.0, 1.25, "Notional over running peak equity"),
    Field("drawdown", "account", "fraction", 0.0, 0.2, "Running drawdown"),
    Field("open_pnl", "account", "fraction", -0.25, 0.25, "Return on equity since the account was last flat"),
    Field("holding_time", "account", "bars", 0.0, 60.0, "Bars since the last trade"),
    Field("trading_state", "account", "code", 0.0, 2.0, "0 ACTIVE, 1 REDUCE_ONLY, 2 HALTED"),
    Field("flat_bars", "account", "bars", 0.0, 20.0, "Consecutive flat bars while not ACTIVE"),
    Field("last_risk_event", "account", "code", 0.0, 3.0, "0 none, 1 soft, 2 hard, 3 kill, since the last release"),
)
UNCERTAINTY_FIELD = Field("model_uncertainty", "uncertainty", "delta std", 0.0, 1.0, "Ensemble disagreement")
AGE_FIELD = Field("data_age", "market", "bars", 0.0, math.inf, "Age of the newest bar; masks see it, policies do not")
DATA_AGE = AGE_FIELD.name


@dataclass(frozen=True)
class TradingDynamics:
    """The known part of trading, on any array namespace."""

    feature_names: tuple[str, ...]
    account_rules: AccountRules
    rule_set: RuleSet
    reward: RewardConfig

    def __post_init__(self) -> None:
        # Columns are found by name: a repeated name would let a feature stand in for an account column.
        names = self.state_names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"feature_names: expected names that occur once in the state row, repeated {repeated}")
        needed = {"gap_return", "intraday_return"} | ({"spread"} if self.account_rules.spread_share else set())
        missing = sorted(needed - set(self.feature_names))
        if missing:
            raise ValueError(f"feature_names: expected {', '.join(sorted(needed))}, missing {missing}")
        for rule in self.rule_set.rules:
            for name in rule.fields:
                if name not in names:
                    raise RuleError(
                        f"rule {rule_name(rule)!r}: fields: expected columns of the state row, was {name!r}; "
                        f"{likeliest(name, names)}"
                    )
        if self.rule_set.actions != self.account_rules.actions:
            raise ValueError(
                f"actions: expected the same table for masks and trades, "
                f"was {self.rule_set.actions.factors} and {self.account_rules.actions.factors}"
            )

    @classmethod
    def from_config(cls, feature_names: Sequence[str], config: DetentConfig) -> TradingDynamics:
        """Wire limits, costs and reward of a config.

        Raises: RuleError for a rule module that cannot be imported, or an extra rule that does not exist, cannot be
            built, is built in, or reads a column that is not in the state row.
        """
        limits = config.limits
        ladder = DrawdownLadder(
            soft=limits.soft_drawdown,
            hard=limits.hard_drawdown,
            kill=limits.kill_drawdown,
            cooldown_bars=limits.cooldown_bars,
        )
        actions = ActionTable()
        rules = trading_rules(
            max_exposure=limits.max_exposure,
            paper=limits.paper,
            ladder=ladder,
            min_holding_bars=limits.min_holding_bars,
            max_position_change=limits.max_position_change,
            max_volatility=limits.max_volatility,
            max_data_age_bars=limits.max_data_age_bars,
        )
        reward_function(config.reward.name)
        account_rules = AccountRules(
            cost_rate=config.account.cost_rate,
            spread_share=config.account.spread_share,
            ladder=ladder,
            actions=actions,
        )
        dynamics = cls(tuple(feature_names), account_rules, RuleSet(rules, actions), config.reward)
        import_rule_modules(limits.rule_modules, origin="limits.rule_modules")
        extra = parse_rule_set({"rules": limits.extra_rules}, origin="limits.extra_rules").rules
        built_in = {rule_name(rule) for rule in rules}
        try:
            for name in map(rule_name, extra):
                if name in built_in:
                    raise RuleError(f"{name!r} is built in; its limits are set under limits")
            return dynamics.with_rule_set(RuleSet((*rules, *extra), actions))
        except RuleError as error:
            raise RuleError(f"limits.extra_rules: {error}") from error

    def with_rule_set(self, rule_set: RuleSet) -> TradingDynamics:
        """Same features, costs and reward under other limits; the account follows their drawdown ladder."""
        ladders = [rule.ladder for rule in rule_set.rules if isinstance(rule, DrawdownRule)]
        ladder = ladders[0] if ladders else self.account_rules.ladder
        account_rules = replace(self.account_rules, ladder=ladder, actions=rule_set.actions)
        return replace(self, rule_set=rule_set, account_rules=account_rules)

    def with_risk_aversion(self, risk_aversion: float) -> TradingDynamics:
        """Same features, limits and costs under a reward that charges variance otherwise."""
        return replace(self, reward=self.reward.model_copy(update={"risk_aversion": risk_aversion}))

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """Names of the S columns of a state row."""
        account = (spec.name for spec in ACCOUNT_FIELDS)
        return (*self.feature_names, *account, UNCERTAINTY_FIELD.name, DATA_AGE)

    @property
    def obs_names(self) -> tuple[str, ...]:
        """Names of the D columns of an observation: the state row without `data_age`."""
        return self.state_names[:-1]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.rule_set.actions.num_actions

    def state_row(self, features: Any, account: Account, uncertainty: Any, data_age: Any = None) -> Any:
        """Assemble state rows.

        Args: features [B, M] raw units; account [B]; uncertainty [B]; data_age [B] bars, zero when None.
        Returns: [B, S] float32.
        """
        _check_width("features", features, len(self.feature_names))
        xp = array_api_compat.array_namespace(features)
        age = xp.zeros_like(account.equity) if data_age is None else data_age
        columns = (*self.account_columns(account).values(), uncertainty, age)
        tail = xp.stack([xp.astype(column, xp.float32) for column in columns], axis=1)
        return xp.concat((xp.astype(features, xp.float32), tail), axis=1)

    def account_columns(self, account: Account) -> dict[str, Any]:
        """Columns of ACCOUNT_FIELDS, in their order, of an account of arrays of any shape."""
        return {
            "position": account.position,
            "exposure": abs(account.position) * account.equity / account.peak,
            "drawdown": account.drawdown,
            "open_pnl": account.open_pnl,
            "holding_time": account.holding_time,
            "trading_state": account.trading_state,
            "flat_bars": account.flat_bars,
            "last_risk_event": account.last_risk_event,
        }

    def action_masks(self, state: Any) -> Any:
        """The one mask: bool [B, A] from state rows [B, S]."""
        return self.rule_set(self.named_columns(state))

    def named_columns(self, state: Any) -> dict[str, Any]:
        """Columns [B, 1] of the fields the rules read."""
        _check_width("state", state, len(self.state_names))
        xp = array_api_compat.array_namespace(state)
        # One gather, then slices: ten nodes fewer in an exported graph than a selection per column.
        columns = xp.take(state, xp.asarray(self._rule_columns, device=array_api_compat.device(state)), axis=1)
        return {name: columns[:, index : index + 1] for index, name in enumerate(self.rule_set.fields)}

    @cached_property
    def _rule_columns(self) -> tuple[int, ...]:
        return tuple(self.state_names.index(name) for name in self.rule_set.fields)

    def account_from_state(self, state: Any, dtype: Any) -> Account:
        """Rebuild an account from state rows [B, S], with equity set to 1.

        Everything the dynamics depend on is in the row, so an imagined branch can start from any stored state
        that is not terminal.
        """
        _check_width("state", state, len(self.state_names))
        xp = array_api_compat.array_namespace(state)
        column = {spec.name: xp.astype(state[:, self.state_names.index(spec.name)], dtype) for spec in ACCOUNT_FIELDS}
        one = xp.ones_like(column["position"])
        return Account(
            equity=one,
            peak=one / (1 - column["drawdown"]),
            position=column["position"],
            open_pnl=column["open_pnl"],
            holding_time=column["holding_time"],
            trading_state=column["trading_state"],
            killed=xp.zeros_like(one),
            flat_bars=column["flat_bars"],
            last_risk_event=column["last_risk_event"],
        )

    def step(self, account: Account, action: Any, next_features: Any) -> tuple[Account, StepOutcome, Any]:
        """Advance by one bar.

        Args: account [B]; action [B] integer, valid under the masks of the current state; next_features [B, M].
        Returns: next account, outcome, reward [B]. Termination is `account.killed > 0`.
        """
        _check_width("next_features", next_features, len(self.feature_names))
        gap = next_features[:, self.feature_names.index("gap_return")]
        intraday = next_features[:, self.feature_names.index("intraday_return")]
        spread = next_features[:, self.feature_names.index("spread")] if self.account_rules.spread_share else None
        account, outcome = account_step(account, action, gap, intraday, self.account_rules, spread)
        return account, outcome, reward_function(self.reward.name)(outcome, self.reward)


def observation_scaler(train: FeatureTable, uncertainty: np.ndarray | None = None) -> Scaler:
    """Features and model uncertainty by training quantiles, account columns by their fixed ranges.

    Args: uncertainty [T] of the training rows; None where there is no world model and the column is zero.
    """
    parts = [Scaler.fit(train.values, train.names), Scaler.with_fixed(ACCOUNT_FIELDS)]
    if uncertainty is None:
        parts.append(Scaler.with_fixed((UNCERTAINTY_FIELD,)))
    else:
        parts.append(Scaler.fit(uncertainty[:, None], (UNCERTAINTY_FIELD.name,)))
    return Scaler.concat(parts)


def _check_width(name: str, rows: Any, width: int) -> None:
    # Columns are taken by position: one column too few would shift every account column.
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name}: expected [B, {width}], was {list(rows.shape)}")
