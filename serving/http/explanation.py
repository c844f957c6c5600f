"""A decision in words: what was done and why, and for every action that was not allowed, who forbade it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from masking import HOLD, TradingState
from serving.bundle import Bundle
from serving.deciders import rule_columns
from serving.records import DecisionRecord, Source


def explain(record: DecisionRecord, bundles: Iterable[Bundle]) -> list[str]:
    """Sentences on a decision.

    Args: bundles: those at hand; without the one that decided, rules are named but not quoted.
    """
    bundle = next((one for one in bundles if one.hash == record.bundle_hash), None)
    names = None if bundle is None else bundle.rule_set.actions.names
    return [_outcome(record, names), *_rules(record, bundle), *_caller(record, names)]


def _outcome(record: DecisionRecord, names: tuple[str, ...] | None) -> str:
    state = TradingState(record.trading_state).name
    done = f"{_name(record.executed, names)} is executed"
    if record.flatten:
        done = "The position is closed by the risk manager"
    elif record.source is not Source.HOLD:
        done = f"{done}, as the {record.source.value} chose"
    why = f": {record.detail}" if record.detail else ""
    return f"{done} [{record.reason.value}; {state}]{why}"


def _rules(record: DecisionRecord, bundle: Bundle | None) -> Iterator[str]:
    if bundle is not None and len(record.state) == 4 * len(bundle.manifest.state_names):
        row = np.frombuffer(record.state, dtype="<f4").astype(np.float32)[None, :]
        for denial in bundle.rule_set.explain(rule_columns(bundle, row)):
            yield str(denial)
        return
    for rule, actions in sorted(record.blocked.items()):
        for action in actions:
            yield f"{_name(action, None)} is denied [{rule}]"


def _caller(record: DecisionRecord, names: tuple[str, ...] | None) -> Iterator[str]:
    for action, allowed in enumerate(record.caller_masks or ()):
        if not allowed and action != HOLD:
            yield f"{_name(action, names)} is denied: the caller's mask or limits forbid it [caller]"


def _name(action: int, names: tuple[str, ...] | None) -> str:
    if names is not None:
        return names[action]
    return "Hold" if action == HOLD else f"Action {action}"
