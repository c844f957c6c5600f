"""The rules on one state at a time, for live decisions: the same functions, on numbers in place of columns.

NumPy takes as long for an array of one number as for a hundred, and several times as long as for the number itself. A
rule of elementwise operations does not see the difference; one that names an axis does, and is asked with arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from masking.actions import HOLD
from masking.errors import RuleError
from masking.probe_states import Columns, broken_rows, probe_states
from masking.rules import StateView
from masking.ruleset import NON_FINITE, RuleSet, rule_name

PROBES = 256
"""States on which both ways are compared when a rule set is taken."""

Denied = dict[str, tuple[int, ...]]
"""Rule -> actions that it forbids, in the order of the rules; those that forbid none are left out."""


class RowRules:
    """What `RuleSet.blocked` says of one state, in half the time."""

    def __init__(self, rule_set: RuleSet) -> None:
        """Try once, on probe states, whether all rules take numbers."""
        self.rule_set = rule_set
        self._named = {rule_name(rule): rule for rule in rule_set.rules}
        self._rest = tuple(range(HOLD + 1, rule_set.actions.num_actions))
        self.objection = self._object_to_numbers()
        """Why the rules are asked with arrays, which takes longer; empty where they take numbers."""

    def denied(self, row: Mapping[str, Any]) -> Denied:
        """Which rule forbids which action; `non_finite` stands for a state that cannot be judged.

        Args: row: NumPy floating numbers of one type for every field that the rules read.
        Raises: RuleError for a missing field, or a verdict that is not bool.
        """
        return self._by_arrays(row) if self.objection else self._by_numbers(row)

    def _by_numbers(self, row: Mapping[str, Any]) -> Denied:
        try:
            columns = {name: row[name] for name in self.rule_set.fields}
        except KeyError as error:
            raise RuleError(f"state: expected {list(self.rule_set.fields)}, missing {error}") from error
        targets = self.rule_set.actions.target_positions(columns["position"][None])[0]
        view, found = StateView({**columns, "target_position": targets}), {}
        for name, rule in self._named.items():
            allowed = rule(view)
            if allowed.dtype != np.bool_ or allowed.shape not in ((), targets.shape):
                raise RuleError(f"rule {name!r}: expected bool [] or [A], was {allowed.dtype} {list(allowed.shape)}")
            verdict = allowed.tolist()
            if verdict is not True:
                actions = self._rest if verdict is False else tuple(one for one in self._rest if not verdict[one])
                if actions:
                    found[name] = actions
        if not all(map(math.isfinite, columns.values())):
            found[NON_FINITE] = self._rest
        return found

    def _by_arrays(self, row: Mapping[str, Any]) -> Denied:
        blocked = self.rule_set.blocked({name: np.asarray(number)[None] for name, number in row.items()})
        found = {name: tuple(np.flatnonzero(verdict[0]).tolist()) for name, verdict in blocked.items()}
        return {name: actions for name, actions in found.items() if actions}

    def _object_to_numbers(self) -> str:
        states = probe_states(self.rule_set, {}, PROBES, np.random.default_rng(0))
        # Broken values are there to be met; a warning about them tells nobody anything.
        with np.errstate(all="ignore"):
            for row in [*_rows(states), *_rows(broken_rows(self.rule_set, states))]:
                expected = self._by_arrays(row)
                try:
                    found = self._by_numbers(row)
                # What rules raise that were promised arrays: an axis, an index, a method or a type is not there.
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    return f"{type(error).__name__}: {error}"
                if found != expected:
                    return f"expected {expected} on {row}, was {found}"
        return ""


def left_by(denied: Denied, asked: Sequence[bool]) -> list[bool]:
    """What rules leave of the actions [A] that are asked for."""
    forbidden = set().union(*denied.values())
    return [wanted and action not in forbidden for action, wanted in enumerate(asked)]


def _rows(states: Columns) -> list[dict[str, Any]]:
    return [{name: column[row] for name, column in states.items()} for row in range(len(states["position"]))]
