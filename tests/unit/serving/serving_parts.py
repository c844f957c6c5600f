"""An engine on a small real bundle with a clock that tests move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving import Bundle
from serving.deciders import redecide
from serving.engine import DecisionEngine
from serving.records import AccountSnapshot, DecisionRecord, DecisionRequest
from serving.settings import Clock

START = 1_700_000_000.0
DAY = 86_400.0
FEATURES: dict[str, float | None] = {
    "gap_return": 0.001,
    "intraday_return": 0.002,
    "volatility_20": 0.2,
    "momentum": 0.1,
}


@dataclass
class Hands:
    """A clock whose hands are moved: wall time, and steady time that each look advances by `tick`."""

    wall: float = START
    steady: float = 0.0
    tick: float = 0.0
    looks: list[float] = field(default_factory=list)

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.wall, steady=self._look)

    def _look(self) -> float:
        self.steady += self.tick
        return self.steady


def request(event: str = "event", *, bar_time: float = START - 60.0, **changes: Any) -> DecisionRequest:
    """A request that is fine, with changes to the account, or `features`, `action_masks` and hashes."""
    own = {
        name: changes.pop(name)
        for name in ("features", "action_masks", "bundle_hash", "rule_set_hash")
        if name in changes
    }
    account = {"equity": 1000.0, "position": 0.0, "holding_time": 10.0} | changes
    return DecisionRequest(
        event_id=event, bar_time=bar_time, account=AccountSnapshot(**account), **{"features": FEATURES, **own}
    )


def decisions(engine: DecisionEngine) -> list[DecisionRecord]:
    return [entry.record for entry in engine.ledger.read() if isinstance(entry.record, DecisionRecord)]


def assert_again(bundle: Bundle, record: DecisionRecord) -> None:
    found = redecide(bundle, record)
    assert (found.proposed, found.executed) == (record.proposed, record.executed)
    assert found.target_position == record.target_position
    assert (found.action_masks, found.value, found.probabilities) == (
        record.action_masks,
        record.value,
        record.probabilities,
    )
