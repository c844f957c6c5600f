"""Whether answers are right: each is computed again from the bundle that it names, in the client, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from benchmarks.serve_client import Answer, infer_outputs
from benchmarks.serve_variants import state_rows
from masking import HOLD
from serving import Bundle, OnnxPlanner, OnnxPolicy
from serving.deciders import redecide
from serving.records import DecisionRecord, Reason, decode_record

ROWS = 64
"""Distinct state rows that are asked about."""


@dataclass
class Tally:
    """What became of the calls, warm-up included."""

    asked: int = 0
    held: int = 0
    """Right answers that are Hold because something was late or out of bounds."""
    failed: int = 0
    """No answer, or an error."""
    wrong: int = 0
    """Answers that the bundle does not give."""
    complaints: list[str] = field(default_factory=list)
    """The first few things that went wrong or were held."""

    def count(self, verdict: Verdict) -> None:
        """Count one call."""
        self.asked += 1
        if verdict.kind != "right":
            setattr(self, verdict.kind, getattr(self, verdict.kind) + 1)
            if len(self.complaints) < 3:
                self.complaints.append(f"{verdict.kind}: {verdict.detail}")

    @property
    def broken(self) -> bool:
        """Whether any call failed or was answered wrongly."""
        return self.failed + self.wrong > 0


class Verdict(NamedTuple):
    """Judgement of one answer."""

    kind: str
    """right, held, failed or wrong."""
    detail: str = ""


RIGHT = Verdict("right")


class Expected:
    """What bundles decide on the rows, and whether answers say the same."""

    def __init__(self, bundles: Sequence[Bundle], *, planner: bool = False) -> None:
        self.bundles = {bundle.hash: bundle for bundle in bundles}
        self.rows = state_rows(bundles[0], ROWS)
        self._decisions = {
            bundle.hash: [decider.decide(self.rows[row : row + 1]) for row in range(ROWS)]
            for bundle in bundles
            for decider in [OnnxPlanner(bundle) if planner else OnnxPolicy(bundle)]
        }

    @property
    def telling_rows(self) -> int:
        """Rows on which no two bundles give equal probabilities: answers there say whose they are."""
        found = [[one.probabilities.tobytes() for one in decisions] for decisions in self._decisions.values()]
        return sum(len(set(row)) == len(found) for row in zip(*found, strict=True))

    def judge_inference(self, row: int, answer: Answer) -> Verdict:
        """Judge an answer to `infer_request` about a row, bit for bit."""
        if answer.status != 200:
            return Verdict("failed", f"{answer.status} {answer.body[:200]!r}")
        try:
            version, arrays = infer_outputs(answer)
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            return Verdict("wrong", repr(error))
        if version not in self._decisions:
            return Verdict("wrong", f"version: expected one of {list(self._decisions)}, was {version!r}")
        found = self._decisions[version][row]
        expected = {"action": found.actions} | {
            name: getattr(found, name) for name in ("probabilities", "action_masks", "value", "fallback", "overridden")
        }
        for name, array in expected.items():
            if name not in arrays or not np.array_equal(arrays[name], array):
                return Verdict("wrong", f"row {row}: {name}: expected {array.tolist()}, was {arrays.get(name)}")
        return RIGHT

    def judge_decision(self, row: int, event_id: str, record: DecisionRecord) -> Verdict:
        """Judge a decision on the features of a row: it is about them, and its bundle makes it again."""
        if record.reason in (Reason.LEDGER_FAILED, Reason.INTERNAL_ERROR):
            return Verdict("failed", f"{record.reason.value}: {record.detail}")
        bundle = self.bundles.get(record.bundle_hash)
        if bundle is None or record.event_id != event_id:
            return Verdict("wrong", f"event {event_id!r}, was {record.event_id!r} of bundle {record.bundle_hash!r}")
        held = Verdict("held", f"{record.reason.value}: {record.detail}") if record.reason is not Reason.OK else RIGHT
        if not record.state:
            done = record.executed != HOLD or record.reason is Reason.OK
            return Verdict("wrong", f"event {event_id!r}: {record.executed} is executed on no state") if done else held
        features = np.frombuffer(record.state, dtype="<f4")[: len(bundle.manifest.feature_names)]
        if not np.array_equal(features, self.rows[row, : len(features)]):
            return Verdict("wrong", f"event {event_id!r}: expected the features of row {row}, was {features.tolist()}")
        again = redecide(bundle, record)
        for name, value in again._asdict().items():
            if getattr(record, name) != value:
                return Verdict("wrong", f"event {event_id!r}: {name}: expected {value}, was {getattr(record, name)}")
        return held

    def judge_answer(self, row: int, event_id: str, answer: Answer) -> Verdict:
        """Judge an answer of `/decide`."""
        if answer.status != 200:
            return Verdict("failed", f"{answer.status} {answer.body[:200]!r}")
        try:
            record = decode_record(answer.body)
        except msgspec.MsgspecError as error:
            return Verdict("wrong", repr(error))
        if not isinstance(record, DecisionRecord):
            return Verdict("wrong", f"expected a decision, was {answer.body[:200]!r}")
        return self.judge_decision(row, event_id, record)
