"""What goes into a decision service and what comes out: requests, records, the state of the risk manager.

A record is the answer to a request and, byte for byte, its line in the ledger. Letters: S state columns, A actions.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Literal

import msgspec

from masking import TradingState

MAX_EVENT_ID = 200
"""Characters of an event's name."""


class Mode(StrEnum):
    """Whether anything may come of a decision."""

    LIVE = "live"
    SHADOW = "shadow"


class Source(StrEnum):
    """Who proposed the action; Hold where nobody could."""

    PLANNER = "planner"
    POLICY = "policy"
    HOLD = "hold"


class Reason(StrEnum):
    """Why a decision is as it is; all but `OK` lead to Hold or to a position closed by the risk manager."""

    OK = "ok"
    INVALID_REQUEST = "invalid_request"
    """A field is missing, unknown or of another type."""
    MISSING_FEATURE = "missing_feature"
    UNKNOWN_FEATURE = "unknown_feature"
    NON_FINITE = "non_finite"
    """NaN or infinity where a number is needed, in the request or out of a graph."""
    HASH_MISMATCH = "hash_mismatch"
    """The caller expects another bundle or rule set."""
    STALE_DATA = "stale_data"
    FUTURE_DATA = "future_data"
    OUT_OF_ORDER = "out_of_order"
    """The bar is older than one that was decided on."""
    CLOCK_BACKWARDS = "clock_backwards"
    STALE_LIMITS = "stale_limits"
    """The limits that another system keeps are older than they may be."""
    NO_VALID_ACTION = "no_valid_action"
    """Rules and caller together leave nothing."""
    INFERENCE_FAILED = "inference_failed"
    INFERENCE_LATE = "inference_late"
    """The policy did not answer within its budget."""
    TOO_LATE = "too_late"
    """The hard time-out passed before there was an answer."""
    OVERRIDDEN = "overridden"
    """The risk manager does not allow what was proposed."""
    HALTED = "halted"
    """Trading is halted; an open position is closed."""
    LEDGER_FAILED = "ledger_failed"
    """The decision could not be recorded; what is not recorded is not executed."""
    INTERNAL_ERROR = "internal_error"


FAILURES = frozenset({Reason.INFERENCE_FAILED, Reason.INFERENCE_LATE, Reason.TOO_LATE, Reason.OVERRIDDEN})
"""Reasons that speak against the bundle or the machine, not against the request."""


class AccountSnapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The account as the broker sees it. None stands for NaN."""

    equity: float | None
    """In money; positive."""
    position: float | None
    """Notional over equity."""
    open_pnl: float | None = 0.0
    """Return on equity since the account was last flat."""
    holding_time: float | None = 0.0
    """Bars since the last trade."""
    capital: float | None = None
    """Equity of all accounts together, money; a canary needs it."""


class DecisionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decision that is asked for."""

    event_id: str
    """Names the event; the same name gets the same decision again, not a second one."""
    bar_time: float
    """Close of the newest bar, seconds since 1970 UTC."""
    features: dict[str, float | None]
    """Every feature of the bundle by name, raw units; None stands for NaN."""
    account: AccountSnapshot
    action_masks: tuple[bool, ...] | None = None
    """[A], True = valid; AND-ed with the rules. None forbids nothing."""
    bundle_hash: str | None = None
    """Refuse to decide with any other bundle."""
    rule_set_hash: str | None = None
    """Refuse to decide under any other rules."""


class RiskState(msgspec.Struct, frozen=True, kw_only=True):
    """What the risk manager carries from bar to bar; survives a restart in the ledger."""

    trading_state: int = 0
    """Code of `masking.TradingState`, the ladder's and a person's together."""
    ladder_state: int = 0
    """Code of the drawdown ladder alone."""
    manual_state: int = 0
    """Code that a person set."""
    killed: bool = False
    """The kill switch is latched, by the ladder or by a person; only `reset` opens it."""
    flat_bars: float = 0.0
    last_risk_event: int = 0
    """Index into none, soft, hard, kill: highest rung since the last release."""
    peak: float = 0.0
    """Running peak of equity, money; 0 before the first decision."""
    equity: float = 0.0
    """Equity of the newest bar, money."""
    position: float = 0.0
    """Position at the newest look, multiples of equity."""
    bar_time: float = 0.0
    """Newest bar that was decided on."""
    decided_at: float = 0.0
    """Wall clock of the newest decision, seconds since 1970 UTC."""
    failures: int = 0
    """Decisions that failed since the last reset: no graph's answer in time, or one that was overridden."""

    @property
    def drawdown(self) -> float:
        """1 - equity / running peak, from 0 to 1; an account without money is as deep as it gets."""
        if self.equity <= 0.0:
            return 1.0 if self.bar_time else 0.0
        return 1.0 - self.equity / self.peak

    @property
    def name(self) -> str:
        """Name of the trading state."""
        return TradingState(self.trading_state).name


class DecisionRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="decision"):
    """One decision with everything needed to make it again."""

    event_id: str
    mode: Mode
    time: float
    """When it was made, seconds since 1970 UTC."""
    bar_time: float | None
    """None where the request had no finite one."""
    input_hash: str
    """SHA-256 of the request."""
    state: bytes
    """float32 [S], little-endian: the raw state row that was decided on. Empty if none could be made."""
    caller_masks: tuple[bool, ...] | None
    action_masks: tuple[bool, ...]
    """[A], rules and caller combined."""
    blocked: dict[str, tuple[int, ...]]
    """Rule -> actions it forbids."""
    proposed: int
    """What policy or planner chose."""
    executed: int
    """What is to be done: `proposed`, or Hold (0)."""
    flatten: bool
    """The risk manager closes the position; `executed` is Hold then."""
    target_position: float | None
    """Position to trade to, multiples of equity; None leaves it as it is."""
    source: Source
    reason: Reason
    detail: str
    """The reason in words; empty where all went well."""
    value: float | None
    probabilities: tuple[float, ...]
    uncertainty: float | None
    """Disagreement of the ensemble."""
    seed: int
    """Noise table of the planner."""
    trading_state: int
    """At the last check: of the risk manager, of a person at this moment, and of another system's limits."""
    drawdown: float
    risk: RiskState
    """The risk manager's state afterwards."""
    bundle_hash: str
    rule_set_hash: str
    latency_us: dict[str, float]
    """Microseconds by stage."""


Command = Literal["start", "kill", "reduce_only", "reset", "bundle", "refused_bundle", "shadow", "drift", "canary_stop"]


class ControlRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="control"):
    """What a person or the service did to the trading state or to the bundle in force."""

    time: float
    command: Command
    person: str
    """Who; `detent` where the service did it itself."""
    detail: str
    """Why, or which bundle."""
    bundle_hash: str
    risk: RiskState
    """Afterwards."""


Record = DecisionRecord | ControlRecord


def safe_event_id(event_id: str) -> str:
    """The name under which an event is recorded: itself, or a printable one of its own where it is none to be kept."""
    if is_event_id(event_id):
        return event_id
    digest = hashlib.sha256(event_id.encode("utf-8", "replace")).hexdigest()[:16]
    return "".join(letter if letter.isprintable() else "?" for letter in event_id[:100]) + f"#{digest}"


def is_event_id(event_id: str) -> bool:
    """Whether a text may name an event: 1 to `MAX_EVENT_ID` printable characters."""
    return 0 < len(event_id) <= MAX_EVENT_ID and event_id.isprintable()


class Entry(msgspec.Struct, frozen=True):
    """One line of a ledger."""

    seq: int
    """From 1, without gaps."""
    body: bytes
    """JSON of a record, as it was hashed."""
    hash: str
    """SHA-256 over the hash before and the body."""

    @property
    def record(self) -> Record:
        """The record in it. Raises: msgspec.ValidationError where the body is none."""
        return decode_record(self.body)


_RECORDS = msgspec.json.Decoder(Record)
_REQUESTS = msgspec.json.Decoder(DecisionRequest)
_ENCODER = msgspec.json.Encoder(order="deterministic")


def encode(record: Record | DecisionRequest) -> bytes:
    """JSON with sorted keys: equal records, equal bytes. Numbers come back bit for bit."""
    return _ENCODER.encode(record)


def decode_record(body: bytes) -> Record:
    """Raises: msgspec.ValidationError where the body is no record."""
    record: Record = _RECORDS.decode(body)
    return record


def decode_request(body: bytes) -> DecisionRequest:
    """Raises: msgspec.ValidationError or msgspec.DecodeError with the field in words."""
    request: DecisionRequest = _REQUESTS.decode(body)
    return request
