"""A rule set: rules AND-combined over an action table, Hold forced valid last, every denial explained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import array_api_compat

from masking.actions import HOLD, ActionTable
from masking.errors import RuleError
from masking.ladder import DrawdownLadder
from masking.rules import RULES, Rule, State


@dataclasses.dataclass(frozen=True)
class Denial:
    """Why one action is masked."""

    action: int
    action_name: str
    rule: str
    parameters: Mapping[str, Any]
    observed: Mapping[str, float]

    def __str__(self) -> str:
        seen = ", ".join(f"{name}={value:.6g}" for name, value in self.observed.items())
        limits = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.action_name} denied by {self.rule}({limits}): {seen}"


class RuleSet:
    """The one mask function of a project: call it with named state, get `action_masks`.

    Used unchanged by the environment, imagined rollouts, planner, exported graphs and the last check before an
    order. Calling it is pure; it holds no state but its parameters.
    """

    def __init__(self, rules: Sequence[Rule], actions: ActionTable) -> None:
        names = [rule_name(rule) for rule in rules]
        if len(set(names)) != len(names):
            raise RuleError(f"rules: expected each rule once, was {names}")
        self.rules = tuple(rules)
        self.actions = actions

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """State columns the rules read, sorted."""
        return tuple(sorted({"position", *(name for rule in self.rules for name in rule.fields)}))

    def __call__(self, state: State) -> Any:
        """Action masks of a batch.

        Args: state maps each name in `fields` to a float array [B] of one namespace.
        Returns: bool [B, A], True = valid; column 0 (Hold) is always True; a row with a non-finite field
            allows only Hold.
        Raises: RuleError for a missing field, a wrong shape or a rule whose verdict is not bool [B, A].
        """
        columns, xp = self._columns(state)
        allowed = self._finite(columns, xp)
        for rule in self.rules:
            allowed = allowed & _verdict(rule, columns, xp)
        shape = columns["target_position"].shape
        allowed = xp.broadcast_to(allowed, shape)
        hold = xp.ones_like(allowed[:, :1])
        return xp.concat((hold, allowed[:, HOLD + 1 :]), axis=1)

    def blocked(self, state: State) -> dict[str, Any]:
        """Which rule forbids which action: rule name -> bool [B, A], column 0 always False.

        `non_finite` collects rows whose state cannot be judged.
        """
        columns, xp = self._columns(state)
        shape = columns["target_position"].shape
        is_hold = xp.arange(shape[1], device=array_api_compat.device(columns["position"])) == HOLD
        verdicts = {rule_name(rule): _verdict(rule, columns, xp) for rule in self.rules}
        verdicts["non_finite"] = self._finite(columns, xp)
        return {name: ~(xp.broadcast_to(ok, shape) | is_hold[None, :]) for name, ok in verdicts.items()}

    def explain(self, state: State, row: int = 0) -> list[Denial]:
        """Every (action, rule) denial of one row, with the rule's parameters and the values it saw."""
        denials = []
        for name, blocked in self.blocked(state).items():
            rule = next((rule for rule in self.rules if rule_name(rule) == name), None)
            fields = rule.fields if rule is not None else self.fields
            observed = {column: float(state[column][row]) for column in fields}
            for action in range(self.actions.num_actions):
                if bool(blocked[row, action]):
                    parameters = rule_parameters(rule) if rule is not None else {}
                    denials.append(Denial(action, self.actions.names[action], name, parameters, observed))
        return sorted(denials, key=lambda denial: denial.action)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description from which `from_dict` rebuilds an equal rule set."""
        return {
            "factors": list(self.actions.factors),
            "rules": [{"name": rule_name(rule), "parameters": rule_parameters(rule)} for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> RuleSet:
        """Rebuild a rule set. Raises RuleError for a missing key, an unknown rule or an unknown parameter."""
        missing = {"factors", "rules"} - set(description)
        if missing:
            raise RuleError(f"rule set: expected keys ['factors', 'rules'], missing {sorted(missing)}")
        rules = []
        for entry in description["rules"]:
            rule_class = RULES.get(entry["name"])
            if rule_class is None:
                raise RuleError(f"rule: expected one of {sorted(RULES)}, was {entry['name']!r}")
            parameters = dict(entry["parameters"])
            try:
                if isinstance(parameters.get("ladder"), Mapping):
                    parameters["ladder"] = DrawdownLadder(**parameters["ladder"])
                rules.append(rule_class(**parameters))
            except TypeError as error:
                raise RuleError(f"rule {entry['name']!r}: {error}") from error
        return cls(rules, ActionTable(tuple(description["factors"])))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical description: equal hash, equal masks."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _columns(self, state: State) -> tuple[dict[str, Any], Any]:
        missing = [name for name in self.fields if name not in state]
        if missing:
            raise RuleError(f"state: expected columns {list(self.fields)}, missing {missing}")
        position = state["position"]
        if position.ndim != 1:
            raise RuleError(f"state['position']: expected shape [B], was {list(position.shape)}")
        for name in self.fields:
            if state[name].shape != position.shape:
                raise RuleError(
                    f"state[{name!r}]: expected shape {list(position.shape)}, was {list(state[name].shape)}"
                )
        xp = array_api_compat.array_namespace(position)
        columns = {name: state[name][:, None] for name in self.fields}
        columns["target_position"] = self.actions.target_positions(position)
        return columns, xp

    def _finite(self, columns: Mapping[str, Any], xp: Any) -> Any:
        # One reduction over a stacked [B, F] array is three times cheaper than one isfinite per column.
        stacked = xp.concat([columns[name] for name in self.fields], axis=1)
        return xp.all(xp.isfinite(stacked), axis=1, keepdims=True)


def _verdict(rule: Rule, columns: Mapping[str, Any], xp: Any) -> Any:
    # A 0/1 verdict would turn the masks into integers, and a flat [B] one would be read as one verdict per action.
    allowed = rule(columns)
    if allowed.dtype != xp.bool or allowed.ndim != 2:
        raise RuleError(
            f"rule {rule_name(rule)!r}: expected bool [B, 1] or [B, A], was {allowed.dtype} {list(allowed.shape)}"
        )
    return allowed


def rule_name(rule: Rule) -> str:
    """Registered name of a rule instance."""
    name = getattr(type(rule), "name", None)
    if not isinstance(name, str):
        raise RuleError(f"{type(rule).__qualname__}: expected a rule registered with @register_rule")
    return name


def rule_parameters(rule: Rule) -> dict[str, Any]:
    """Parameters of a rule instance as a JSON-able dict."""
    return dataclasses.asdict(rule)  # type: ignore[call-overload,no-any-return]
