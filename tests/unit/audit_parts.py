"""A ledger that a real engine wrote, and ways to tamper with it."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bundle_parts import FIELDS

from masking import TradingState
from serving import Bundle
from serving.engine import DecisionEngine
from serving.ledger.base import chain, genesis
from serving.ledger.sqlite import SqliteLedger
from serving.records import AccountSnapshot, ControlRecord, DecisionRecord, DecisionRequest, decode_record, encode
from serving.settings import Clock, EngineSettings

STEPS = 60
START = 1_700_000_000.0


def live_through(path: Path, bundle: Bundle, second: Bundle) -> None:
    """Decisions of all kinds: allowed and denied, refused, shadowed, halted, reset, and under another bundle."""
    now = START
    rng = np.random.default_rng(7)
    # However busy the machine is.
    budgets = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)
    engine = DecisionEngine(bundle, SqliteLedger(path, fsync="never"), budgets, clock=Clock(wall=lambda: now))
    with closing(engine):
        for step in range(STEPS):
            now += 86_400.0
            features: dict[str, float | None] = {field.name: float(rng.normal(0.0, 0.2)) for field in FIELDS}
            account = AccountSnapshot(
                equity=1000.0 - 2.0 * step,
                position=float(rng.choice([0.0, 0.25, 0.5, 1.0])),
                holding_time=float(step),
            )
            masks = (True, *(bool(allowed) for allowed in rng.random(6) < 0.5)) if step % 5 == 1 else None
            if step % 7 == 2:
                features["momentum"] = None
            if step % 11 == 3:
                features.pop("momentum")
            engine.decide(
                DecisionRequest(
                    event_id=f"bar-{step}", bar_time=now - 60.0, features=features, account=account, action_masks=masks
                )
            )
            if step == 20:
                engine.challenge(second)
            if step == 30:
                engine.challenge(None)
                engine.refuse("unreadable", b"{", "no JSON")
                engine.kill("Ada", "exchange is down")
            if step == 33:
                engine.reset("Ada", "exchange is back")
            if step == 40:
                engine.use(second)


def rows(path: Path) -> list[tuple[int, bytes, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.execute("SELECT seq, body, hash FROM entries ORDER BY seq"))


def put(path: Path, entries: Iterable[tuple[int, bytes, str]]) -> None:
    """Replace all entries."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM entries")
        connection.executemany("INSERT INTO entries (seq, body, hash) VALUES (?, ?, ?)", entries)


def chained(bodies: Iterable[bytes], account: str = "default") -> list[tuple[int, bytes, str]]:
    """Entries as an honest writer of these bodies would have written them."""
    bodies = list(bodies)
    hashes = itertools.accumulate(bodies, chain, initial=genesis(account))
    next(hashes)
    return [(seq, body, digest) for seq, (body, digest) in enumerate(zip(bodies, hashes, strict=True), start=1)]


def rewrite(path: Path, wanted: Callable[[DecisionRecord], bool], **changes: Any) -> int:
    """Alter the first decision that is `wanted`, and the whole chain after it; its number."""
    bodies = [body for _, body, _ in rows(path)]
    for index, body in enumerate(bodies):
        record = decode_record(body)
        if isinstance(record, DecisionRecord) and wanted(record):
            bodies[index] = encode(msgspec.structs.replace(record, **changes))
            put(path, chained(bodies))
            return index + 1
    raise AssertionError("no such decision")


def find(path: Path, wanted: Callable[[DecisionRecord | ControlRecord], bool]) -> int:
    """Number of the first record that is `wanted`."""
    return next(seq for seq, body, _ in rows(path) if wanted(decode_record(body)))


def is_decided(record: DecisionRecord) -> bool:
    """Whether somebody proposed an action, under no restriction."""
    return bool(record.probabilities) and record.trading_state == TradingState.ACTIVE and record.time > START
