"""A rule set: rules AND-combined over an action table, Hold forced valid last, every denial explained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from masking.actions import ActionTable, namespace
from masking.errors import InvalidActionError, RuleError
from masking.ladder import TradingState
from masking.parameters import likeliest, parameters_of, typed_parameters
from masking.rules import RULES, TOLERANCE, Rule, State, StateView

NON_FINITE = "non_finite"
"""Stands in `blocked` and in denials for the rows whose state cannot be judged."""


@dataclass(frozen=True)
class Denial:
    """Why one action is masked; `str()` says it in words."""

    action: int
    action_name: str
    rule: str
    parameters: Mapping[str, Any]
    observed: Mapping[str, float]
    """Value of each column the rule reads."""
    target_position: float
    """Position the action would have led to, multiples of equity."""
    reason: str
    """The rule's own words: threshold and observed value."""
    trading_state: str | None = None
    """Name of the trading state, where the state holds one."""

    def __str__(self) -> str:
        source = self.rule if self.trading_state is None else f"{self.rule}; {self.trading_state}"
        return f"{self.action_name} is denied: {self.reason} [{source}]"


class RuleSet:
    """The one mask function of a project: call it with named state, get `action_masks`.

    Used unchanged by the environment, imagined rollouts, planner, exported graphs and the last check before an
    order. Calling it is pure; it holds no state but its parameters.
    """

    def __init__(self, rules: Sequence[Rule], actions: ActionTable) -> None:
        names = [rule_name(rule) for rule in rules]
        for name, rule in zip(names, rules, strict=True):
            fields = getattr(rule, "fields", None)
            if not isinstance(fields, tuple) or not all(isinstance(field, str) for field in fields):
                raise RuleError(f"rule {name!r}: fields: expected a tuple of column names, was {fields!r}")
        if len(set(names)) != len(names):
            raise RuleError(f"rules: expected each rule once, was {names}")
        if NON_FINITE in names:
            raise RuleError(f"rules: expected another name than {NON_FINITE!r}, which stands for broken rows")
        dust = [factor for factor in actions.factors if 0 < abs(factor) <= TOLERANCE]
        if dust:
            raise RuleError(f"factors: expected 0 or more than the tolerance {TOLERANCE:g} from it, was {dust}")
        self.rules = tuple(rules)
        self.actions = actions
        self._named = dict(zip(names, self.rules, strict=True))
        # Read at once, so that a parameter that could be neither hashed nor loaded again is refused here.
        self._parameters = {name: rule_parameters(rule) for name, rule in self._named.items()}

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """State columns the rules read, sorted."""
        return tuple(sorted({"position", *(name for rule in self.rules for name in rule.fields)}))

    def __call__(self, state: State) -> Any:
        """Action masks of a batch.

        Args: state maps each name in `fields` to a float array of one namespace; all [B], or all [B, 1]: a slice of
            a row matrix as it is, two nodes fewer per column in an exported graph.
        Returns: bool [B, A], True = valid; column 0 (Hold) is always True; a row with a non-finite field
            allows only Hold.
        Raises: RuleError for a missing field, a wrong shape or a rule whose verdict is not bool [B, 1] or [B, A].
        """
        view, is_hold, allowed = self._view(state)
        for name, rule in self._named.items():
            allowed = allowed & _verdict(name, rule, view, is_hold)
        return allowed | is_hold

    def by_action(self, state: State) -> Any:
        """The same masks with actions first, for whom rows lie side by side in memory: bool [A, B].

        Rules see columns [1, B] and targets [A, B]. One that names an axis may not like that; whoever calls this makes
        sure once that it gives what a call gives.

        Args: state maps each name in `fields` to a float array [B].
        """
        self._check_columns(state, self.fields)
        columns = {name: state[name][None, :] for name in self.fields}
        xp = namespace(columns["position"])
        finite = xp.all(abs(xp.concat(list(columns.values()), axis=0)) < math.inf, axis=0, keepdims=True)
        columns["target_position"], is_hold = self.actions.above(columns["position"])
        view, allowed = StateView(columns), finite
        for name, rule in self._named.items():
            allowed = allowed & _verdict(name, rule, view, is_hold, axis=0)
        return allowed | is_hold

    def blocked(self, state: State) -> dict[str, Any]:
        """Which rule forbids which action: rule name -> bool [B, A], column 0 always False.

        `non_finite` collects rows whose state cannot be judged.
        """
        view, is_hold, finite = self._view(state)
        verdicts = {name: _verdict(name, rule, view, is_hold) for name, rule in self._named.items()}
        return {name: ~(allowed | is_hold) for name, allowed in {**verdicts, NON_FINITE: finite}.items()}

    def explain(self, state: State, action: int | None = None, *, row: int = 0) -> list[Denial]:
        """Every denial of one row, or of one action in it: none means valid.

        Args: state as for a call; action in [0, A), all when None; row in [0, B).
        Returns: by action, then in the order of the rules; a row that cannot be judged is denied by `non_finite` too.
        Raises: RuleError as a call, or for a row outside the batch; InvalidActionError for an unknown action.
        """
        if action is not None and not 0 <= action < self.actions.num_actions:
            raise InvalidActionError(f"action: expected 0 to {self.actions.num_actions - 1}, was {action}")
        told = "trading_state" in state  # also where no rule reads it
        self._check_columns(state, (*self.fields, *(["trading_state"] if told else [])))
        batch = state["position"].shape[0]
        if not 0 <= row < batch:
            raise RuleError(f"row: expected 0 to {batch - 1}, was {row}")
        alone = {name: state[name][row : row + 1] for name in self.fields}
        blocked = self.blocked(alone)
        seen = {name: _number(column) for name, column in alone.items()}
        trading_state = _state_name(_number(state["trading_state"][row : row + 1])) if told else None
        return [
            self._denial(denied, name, seen, trading_state)
            for denied in (range(self.actions.num_actions) if action is None else [action])
            for name, verdict in blocked.items()
            if bool(verdict[0, denied])
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description from which `from_dict` rebuilds an equal rule set."""
        return {
            "factors": list(self.actions.factors),
            "rules": [{"name": name, "parameters": dict(parameters)} for name, parameters in self._parameters.items()],
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> RuleSet:
        """Rebuild a rule set. Raises RuleError for a missing key, an unknown rule or a parameter that cannot be."""
        missing = {"factors", "rules"} - set(description)
        if missing:
            raise RuleError(f"rule set: expected keys ['factors', 'rules'], missing {sorted(missing)}")
        rules = [make_rule(entry["name"], entry["parameters"]) for entry in description["rules"]]
        return cls(rules, ActionTable(tuple(description["factors"])))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical description: equal hash, equal masks."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_columns(self, state: State, names: tuple[str, ...]) -> None:
        missing = [name for name in self.fields if name not in state]
        if missing:
            raise RuleError(f"state: expected columns {list(self.fields)}, missing {missing}")
        shape = getattr(state["position"], "shape", None)
        if shape is None or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
            raise RuleError(f"state['position']: expected shape [B] or [B, 1], was {_shape(state['position'])}")
        for name in names:
            if getattr(state[name], "shape", None) != shape:
                raise RuleError(f"state[{name!r}]: expected shape {list(shape)}, was {_shape(state[name])}")

    # What rules see, the constant bool row [1, A] of Hold, and which rows can be judged, bool [B, 1].
    def _view(self, state: State) -> tuple[StateView, Any, Any]:
        self._check_columns(state, self.fields)
        flat = state["position"].ndim == 1
        columns = {name: state[name][:, None] if flat else state[name] for name in self.fields}
        xp = namespace(columns["position"])
        # One reduction over a stacked [B, F] array is cheaper than one check per column; |x| < inf is `isfinite` in
        # two graph nodes instead of five.
        stacked = xp.concat(list(columns.values()), axis=1)
        finite = xp.all(abs(stacked) < math.inf, axis=1, keepdims=True)
        columns["target_position"], is_hold = self.actions.beside(columns["position"])
        return StateView(columns), is_hold, finite

    def _denial(self, action: int, name: str, seen: Mapping[str, float], trading_state: str | None) -> Denial:
        rule = self._named.get(name)
        observed = {field: seen[field] for field in (self.fields if rule is None else rule.fields)}
        # Hold is never denied, so every denied action has a factor.
        target = self.actions.factors[action - 1]
        return Denial(
            action=action,
            action_name=self.actions.names[action],
            rule=name,
            parameters=self._parameters.get(name, {}),
            observed=observed,
            target_position=target,
            reason=_reason(rule, self._parameters.get(name, {}), observed, target),
            trading_state=trading_state,
        )


def make_rule(name: str, parameters: Mapping[str, Any]) -> Rule:
    """Build a registered rule from values read from a file.

    Raises: RuleError naming rule, parameter, expected, actual; for an unknown name with the likeliest intention.
    """
    cls = RULES.get(name)
    if cls is None:
        raise RuleError(
            f"rule: expected a registered one, was {name!r}; {likeliest(name, sorted(RULES))}; or import the module "
            "that registers it first (`modules:` in YAML, limits.rule_modules in a config, --rule-module for a command)"
        )
    typed = typed_parameters(cls, parameters)
    try:
        rule: Rule = cls(**typed)
    except RuleError:
        raise
    except (TypeError, ValueError) as error:  # a user's own `__post_init__`
        raise RuleError(f"rule {name!r}: {error}") from error
    return rule


def rule_name(rule: Rule) -> str:
    """Registered name of a rule instance.

    Raises: RuleError unless its very class is registered: a subclass would be written down as its parent.
    """
    if isinstance(rule, type):
        raise RuleError(f"{rule.__qualname__}: expected an instance, {rule.__qualname__}(), was the class")
    cls = type(rule)
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or name not in RULES:
        raise RuleError(f"{cls.__qualname__}: expected a rule registered with @register_rule, was {cls}")
    if "name" not in vars(cls):
        raise RuleError(
            f"{cls.__qualname__}: expected a class registered itself, was a subclass of {name!r}; "
            "decorate it with @register_rule"
        )
    if RULES[name] is not cls:
        raise RuleError(
            f"{cls.__qualname__}: expected the class that is registered as {name!r}, was another, perhaps from before "
            "it was defined again; create the rule anew"
        )
    return name


def rule_parameters(rule: Rule) -> dict[str, Any]:
    """Parameters of a rule instance, each in its one spelling (1 as 1.0 for a float): equal rules, equal JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters_of(rule).items()}


def _verdict(name: str, rule: Rule, view: StateView, is_hold: Any, axis: int = 1) -> Any:
    # A 0/1 verdict would turn the masks into integers, and a flat [B] one would be read as one verdict per action.
    allowed, full = rule(view), view["target_position"].shape
    every = (full[0], 1) if axis == 1 else (1, full[1])
    if allowed.dtype != is_hold.dtype or allowed.shape not in (full, every):
        raise RuleError(f"rule {name!r}: expected bool [B, 1] or [B, A], was {allowed.dtype} {list(allowed.shape)}")
    return allowed


# A rule's own words, unless it saw what it could not compare.
def _reason(
    rule: Rule | None, parameters: Mapping[str, Any], observed: Mapping[str, float], target_position: float
) -> str:
    broken = [f"{field} {value:g}" for field, value in observed.items() if not math.isfinite(value)]
    if broken:
        return f"{', '.join(broken)} cannot be judged"
    words = getattr(rule, "reason", None)
    if words is not None:
        # An explanation may be poor, but must come: `masking.conformance` tells the author what is wrong with it.
        with suppress(Exception):
            return str(words({**observed, "target_position": target_position}))
    limits = f" under {_listed(parameters)}" if parameters else ""
    return f"forbidden at {_listed(observed)}{limits}"


def _number(column: Any) -> float:
    return float(column[0] if column.ndim == 1 else column[0, 0])


def _shape(column: Any) -> str:
    return str(list(column.shape)) if hasattr(column, "shape") else f"{type(column).__name__}, no array"


def _state_name(code: float) -> str | None:
    return TradingState(int(code)).name if code in list(TradingState) else None


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
