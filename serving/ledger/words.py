"""An entry of a ledger in words, for a person: what was known, what was allowed, what was done, and why."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import numpy as np

from masking import HOLD, TradingState
from serving.bundle import Bundle
from serving.deciders import rule_columns
from serving.errors import BundleMismatchError, LedgerError
from serving.records import ControlRecord, DecisionRecord, Entry, RiskState, Source


def explain(entry: Entry, bundle: Bundle | None = None) -> str:
    """Lines of text on a decision or a command.

    Args: bundle: the one that decided; without it columns and actions have numbers, and rules names only.
    Raises: BundleMismatchError for another bundle; LedgerError where the entry holds no record.
    """
    try:
        record = entry.record
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise LedgerError(f"entry {entry.seq}: expected a record, was none: {error}") from error
    if isinstance(record, ControlRecord):
        return "\n".join([f"entry {entry.seq}, hash {entry.hash}", *_command(record)])
    if bundle is not None and bundle.hash != record.bundle_hash:
        raise BundleMismatchError(f"entry {entry.seq}: bundle: expected {record.bundle_hash}, was {bundle.hash}")
    parts = (
        _heading(record),
        _state(record, bundle),
        _actions(record, bundle),
        _outcome(record, bundle),
        _latency(record),
    )
    return "\n".join([f"entry {entry.seq}, hash {entry.hash}", *(line for part in parts for line in part)])


def _command(record: ControlRecord) -> Iterator[str]:
    yield f"{_time(record.time)}  command {record.command} by {record.person}"
    if record.detail:
        yield f"why       {record.detail}"
    yield f"bundle    {record.bundle_hash}"
    yield f"afterwards {_risk(record.risk)}"


def _risk(risk: RiskState) -> str:
    latched = ", kill switch latched" if risk.killed else ""
    return f"trading is {risk.name}{latched}, drawdown {100.0 * risk.drawdown:.2f} %"


def _heading(record: DecisionRecord) -> Iterator[str]:
    yield f"{_time(record.time)}  {record.mode.value} decision on event {record.event_id!r}"
    if record.bar_time is not None:
        yield f"bar       {_time(record.bar_time)}, {record.time - record.bar_time:.3f} s before"
    yield f"bundle    {record.bundle_hash}"
    yield f"rules     {record.rule_set_hash}"
    yield f"request   {record.input_hash}"
    yield f"trading   {TradingState(record.trading_state).name}, drawdown {100.0 * record.drawdown:.2f} %"


def _state(record: DecisionRecord, bundle: Bundle | None) -> Iterator[str]:
    if not record.state:
        yield "state     none: the request was refused before there was one"
        return
    values = np.frombuffer(record.state, dtype="<f4").tolist()
    names = [f"column {index}" for index in range(len(values))]
    if bundle is not None and len(bundle.manifest.state_names) == len(values):
        names = list(bundle.manifest.state_names)
    yield "state"
    width = max(map(len, names))
    for name, value in zip(names, values, strict=True):
        yield f"  {name:<{width}}  {value:g}"


def _actions(record: DecisionRecord, bundle: Bundle | None) -> Iterator[str]:
    yield "actions"
    why = _denials(record, bundle)
    for action, allowed in enumerate(record.action_masks):
        chance = f", probability {record.probabilities[action]:.4f}" if record.probabilities else ""
        yield f"  {_name(action, bundle)}: {'allowed' if allowed else 'denied'}{chance}"
        for reason in why.get(action, [] if allowed else [_tightened(record)]):
            yield f"      {reason}"


# By action: of the rules in their own words where the bundle is at hand, and of the caller.
def _denials(record: DecisionRecord, bundle: Bundle | None) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    if bundle is not None and len(record.state) == 4 * len(bundle.manifest.state_names):
        row = np.frombuffer(record.state, dtype="<f4").astype(np.float32)[None, :]
        for denial in bundle.rule_set.explain(rule_columns(bundle, row)):
            found.setdefault(denial.action, []).append(f"{denial.reason} [{denial.rule}]")
    else:
        for rule, actions in sorted(record.blocked.items()):
            for action in actions:
                found.setdefault(action, []).append(f"rule {rule}")
    for action, allowed in enumerate(record.caller_masks or ()):
        if not allowed:
            found.setdefault(action, []).append("the caller's mask or limits forbid it [caller]")
    return found


def _tightened(record: DecisionRecord) -> str:
    if not record.state:
        return "nothing but Hold without a state"
    return f"trading was {TradingState(record.trading_state).name} by then"


def _outcome(record: DecisionRecord, bundle: Bundle | None) -> Iterator[str]:
    if record.source is Source.HOLD:
        yield "proposed  nothing"
    else:
        value = "" if record.value is None else f", value {record.value:g}"
        noise = f", noise table {record.seed}" if record.source is Source.PLANNER else ""
        yield f"proposed  {_name(record.proposed, bundle)} by the {record.source.value}{value}{noise}"
    if record.uncertainty is not None:
        yield f"disagreement of the ensemble {record.uncertainty:g}"
    target = "the position stays as it is"
    if record.flatten:
        target = "the risk manager closes the position"
    elif record.target_position is not None:
        target = f"the position goes to {record.target_position:g} of equity"
    yield f"executed  {_name(record.executed, bundle)}: {target}"
    yield f"reason    {record.reason.value}{': ' if record.detail else ''}{record.detail}"


def _latency(record: DecisionRecord) -> Iterator[str]:
    stages = [f"{name} {value:.0f}" for name, value in record.latency_us.items() if name != "total"]
    total = record.latency_us.get("total")
    whole = "" if total is None else f"{total:.0f} us in all{': ' if stages else ''}"
    yield f"latency   {whole}{', '.join(stages)}"


def _name(action: int, bundle: Bundle | None) -> str:
    names = () if bundle is None else bundle.rule_set.actions.names
    if action < len(names):
        return f"{action} {names[action]}"
    return f"{action} hold" if action == HOLD else f"{action}"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s since 1970"
