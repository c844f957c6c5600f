"""What a run left behind, held against what was asked and answered, and everything that may be wrong with it."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from rule_oracle import RuleOracle
from serve_load import Load

from serving.ledger.audit import verify
from serving.ledger.open import open_ledger
from serving.records import ControlRecord, DecisionRecord, DecisionRequest, Entry, Reason, RiskState, decode_request

ORACLE = RuleOracle()
UNDECIDED = {
    Reason.CLOCK_BACKWARDS,
    Reason.FUTURE_DATA,
    Reason.HASH_MISMATCH,
    Reason.MISSING_FEATURE,
    Reason.UNKNOWN_FEATURE,
}
"""Reasons for which nothing is decided, but the account is looked at."""
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class Outcome:
    """A ledger beside what its service said."""

    load: Load
    commands: list[bytes]
    """Answers to commands."""
    entries: list[Entry]
    head_risk: RiskState | None
    chain: str
    """What is wrong with it, in words."""

    @classmethod
    def of(cls, load: Load, ledger: str, commands: list[bytes]) -> Outcome:
        with closing(open_ledger(ledger, read_only=True)) as book:
            return cls(load, commands, list(book.read()), book.head().risk, verify(book).problem)

    @cached_property
    def decisions(self) -> list[tuple[Entry, DecisionRecord]]:
        pairs = ((entry, entry.record) for entry in self.entries)
        return [(entry, record) for entry, record in pairs if isinstance(record, DecisionRecord)]

    @cached_property
    def requests(self) -> dict[str, DecisionRequest]:
        return {event: decode_request(body) for event, body in self.load.bodies.items()}

    def problems(self) -> dict[str, Any]:
        """By kind; empty where all is well."""
        asked, answers = self.load.bodies, self.load.answers
        decided = {record.event_id: entry.body for entry, record in self.decisions}
        hashes = {event: sha256(body).hexdigest() for event, body in asked.items()}
        written = {entry.body for entry in self.entries}
        counts = Counter(record.event_id for _, record in self.decisions)
        risk = _Replay()
        for entry in self.entries:
            risk.take(entry, self.requests)
        found = {
            "refused": self.load.refused,
            "not answered": sorted(set(asked) - set(answers)),
            "lost": sorted(set(answers) - set(decided)),
            "altered": [event for event, texts in answers.items() if set(texts) - {decided.get(event, texts[0])}],
            "decided twice": [event for event, count in counts.items() if count > 1],
            "not asked": sorted(set(decided) - set(asked)),
            "of another request": [
                record.event_id for _, record in self.decisions if record.input_hash != hashes.get(record.event_id)
            ],
            "commands lost": [answer for answer in self.commands if answer not in written],
            "broken chain": self.chain,
            "executed unrecorded": [
                record.event_id
                for record in self.load.unrecorded
                if record.executed or record.flatten or record.target_position is not None
            ],
            "forbidden": risk.forbidden,
            "risk state": [*risk.forgotten, *([] if self.head_risk == risk.last else ["head"])],
        }
        return {name: problem for name, problem in found.items() if problem}


@dataclass
class _Replay:
    """The account once more, in the order of the ledger, from what was asked and from what persons ordered."""

    peak: float = 0.0
    equity: float = 0.0
    bar_time: float = 0.0
    code: int = 0
    killed: bool = False
    last: RiskState | None = None
    forbidden: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def take(self, entry: Entry, requests: dict[str, DecisionRequest]) -> None:
        record = entry.record
        if isinstance(record, ControlRecord):
            self._command(record)
        elif record.event_id in requests:
            self._decision(record, requests[record.event_id])
        self.last = record.risk

    def _command(self, record: ControlRecord) -> None:
        if record.command == "start" and self.last not in (None, record.risk):
            self.forgotten.append(f"start at {record.time}")
        self.killed = record.command == "kill" or (self.killed and record.command != "reset")
        if record.command == "reset":
            self.peak, self.code = self.equity, 0

    def _decision(self, record: DecisionRecord, request: DecisionRequest) -> None:
        account = request.account
        assert account.equity is not None
        assert account.position is not None
        if record.state or record.reason in UNDECIDED:
            self._observe(account.equity, request.bar_time if record.state else self.bar_time)
        drawdown = 1.0 - self.equity / self.peak if self.peak else 0.0
        state = 2 if self.killed else self.code
        if record.drawdown != drawdown or record.trading_state < state:
            self.forgotten.append(record.event_id)
        if record.executed == 0:
            return
        numbers = {
            "position": account.position,
            "drawdown": drawdown,
            "trading_state": float(state),
            "holding_time": account.holding_time,
            "volatility_20": request.features["volatility_20"],
            "data_age": 0.0,
        }
        # As state rows hold them.
        broken = ORACLE.broken(
            FACTORS[record.executed - 1], **{name: float(np.float32(n)) for name, n in numbers.items()}
        )
        masked = request.action_masks is not None and not request.action_masks[record.executed]
        if broken or masked or not record.state or record.target_position != FACTORS[record.executed - 1]:
            self.forbidden.append(record.event_id)

    def _observe(self, equity: float, bar_time: float) -> None:
        self.equity, self.peak = equity, max(self.peak, equity)
        reduce = int(1.0 - equity / self.peak >= ORACLE.soft)
        # Between two bars nothing is released.
        self.code = reduce if bar_time > self.bar_time else max(self.code, reduce)
        self.bar_time = bar_time
