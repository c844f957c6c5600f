"""What a run of the fault test left behind, and everything that may be wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from stream_processes import Plan

from serving import Bundle
from serving.ledger.base import chain, genesis
from serving.ledger.open import open_ledger
from serving.records import DecisionRecord, Entry, decode_request


@dataclass(frozen=True)
class Outcome:
    """What was sent, what the ledger says, what was published."""

    sent: list[dict[str, str]]
    bodies: dict[str, bytes]
    """Event -> request on the feature stream."""
    entries: list[Entry]
    published: list[tuple[bytes, dict[bytes, bytes]]]
    account: str

    @classmethod
    def of(cls, plan: Plan, client: Any) -> Outcome:
        settings = plan.settings()
        sent = [json.loads(line) for line in plan.sent.read_text().splitlines()]
        ledger = open_ledger(plan.ledger, plan.account, read_only=True)
        entries = list(ledger.read())
        ledger.close()
        messages = client.xrange(settings.features)
        bodies = {line["event"]: fields[b"request"] for line, (_, fields) in zip(sent, messages, strict=True)}
        return cls(sent, bodies, entries, list(client.xrange(settings.decisions)), plan.account)

    @property
    def decisions(self) -> list[tuple[Entry, DecisionRecord]]:
        pairs = ((entry, entry.record) for entry in self.entries)
        return [(entry, record) for entry, record in pairs if isinstance(record, DecisionRecord)]

    def problems(self, bundle: Bundle) -> dict[str, Any]:
        """By kind; empty where all is well."""
        sent = [line["event"] for line in self.sent]
        decided = [record.event_id for _, record in self.decisions]
        published = [fields[b"event_id"].decode() for _, fields in self.published]
        known = set(decided)
        found = {
            "sent twice": _repeated(sent),
            "lost": sorted(set(sent) - known),
            "invented": sorted(known - set(sent)),
            "decided twice": _repeated(decided),
            "published twice": _repeated(published),
            "not published": sorted(known - set(published)),
            "out of order": [] if [name for name in sent if name in known] == decided else ["ledger"],
            "not the ledger's": self._altered(),
            "of another request": self._mistaken(),
            "broken chain": self._broken(),
            "forbidden": self._forbidden(bundle),
            "risk state": self._forgotten(),
        }
        return {name: problem for name, problem in found.items() if problem}

    def _altered(self) -> list[str]:
        wanted = [(f"{entry.seq}-0".encode(), entry.hash.encode(), entry.body) for entry, _ in self.decisions]
        actual = [(key, fields[b"hash"], fields[b"decision"]) for key, fields in self.published]
        return [key.decode() for key, *_ in set(actual).symmetric_difference(wanted)] or (
            [] if wanted == actual else ["order"]
        )

    def _mistaken(self) -> list[str]:
        hashes = {line["event"]: line["sha256"] for line in self.sent}
        return [record.event_id for _, record in self.decisions if record.input_hash != hashes.get(record.event_id)]

    def _broken(self) -> list[int]:
        previous, broken = genesis(self.account), []
        for seq, entry in enumerate(self.entries, start=1):
            if entry.seq != seq or entry.hash != chain(previous, entry.body):
                broken.append(seq)
            previous = entry.hash
        return broken

    # Rules on the recorded state and the caller's masks as they were sent, nothing of what the record claims.
    def _forbidden(self, bundle: Bundle) -> list[str]:
        found = [record.event_id for _, record in self.decisions if not record.state and record.executed != 0]
        live = [record for _, record in self.decisions if record.state]
        rows = np.stack([np.frombuffer(record.state, dtype="<f4") for record in live])
        masks = bundle.rule_set({name: rows[:, index] for name, index in bundle.rule_columns.items()})
        for record, mask in zip(live, masks, strict=True):
            callers = decode_request(self.bodies[record.event_id]).action_masks
            allowed = mask if callers is None else mask & np.array(callers)
            if record.executed != 0 and not allowed[record.executed]:
                found.append(record.event_id)
        return found

    # The running peak takes in every equity that was decided on, across all restarts.
    def _forgotten(self) -> list[str]:
        peak, found = 0.0, []
        for _, record in self.decisions:
            if record.state:
                equity = decode_request(self.bodies[record.event_id]).account.equity
                assert equity is not None
                peak = max(peak, equity)
                if record.drawdown != 1.0 - equity / peak:
                    found.append(record.event_id)
        return found


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
