"""The audit finds whatever was done to a ledger, and only that; decisions come out again bit for bit."""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from audit_parts import STEPS, chained, find, is_decided, live_through, put, rewrite, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from masking import HOLD
from serving import Bundle, BundleMismatchError
from serving.errors import LedgerError
from serving.ledger.audit import Replay, Verification, replay, verify
from serving.ledger.base import chain, genesis
from serving.ledger.postgres import PostgresLedger
from serving.ledger.sqlite import SqliteLedger
from serving.ledger.words import explain
from serving.records import ControlRecord, DecisionRecord, Entry, Mode, Reason, RiskState, Source, decode_record, encode

Rows = list[tuple[int, bytes, str]]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, planned: Bundle) -> Path:
    path = tmp_path_factory.mktemp("lived") / "ledger.db"
    live_through(path, planned, bundle)
    return path


@pytest.fixture
def path(lived: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copy(lived, tmp_path / "ledger.db"))


def verified(path: Path, head_hash: str | None = None) -> Verification:
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        return verify(ledger, head_hash)


# --- verify -----------------------------------------------------------------------------------------------


def test_a_whole_ledger_is_whole(path: Path) -> None:
    entries = rows(path)
    assert verified(path) == Verification(len(entries), entries[-1][2])
    assert verified(path).ok
    assert verified(path, entries[-1][2]).ok
    # Any former head is in the chain, the empty ledger's too.
    assert verified(path, entries[10][2]).ok
    assert verified(path, genesis("default")).ok


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    SqliteLedger(tmp_path / "ledger.db", "main").close()
    with closing(SqliteLedger(tmp_path / "ledger.db", "main", read_only=True)) as ledger:
        assert verify(ledger) == Verification(0, genesis("main"))


def alter_body(entries: Rows) -> Rows:
    seq, body, digest = entries[4]
    return [*entries[:4], (seq, body.replace(b'"executed":', b'"executed": '), digest), *entries[5:]]


def alter_hash(entries: Rows) -> Rows:
    seq, body, digest = entries[4]
    return [*entries[:4], (seq, body, digest[::-1]), *entries[5:]]


def alter_body_and_hash(entries: Rows) -> Rows:
    _, body, digest = chained([body for _, body, _ in entries[:4]] + [entries[4][1] + b" "])[-1]
    return [*entries[:4], (5, body, digest), *entries[5:]]


def alter_two(entries: Rows) -> Rows:
    return [*alter_hash(entries)[:5], (6, entries[5][1] + b" ", entries[5][2]), *entries[6:]]


def drop_one(entries: Rows) -> Rows:
    return [*entries[:4], *entries[5:]]


def drop_the_first(entries: Rows) -> Rows:
    return entries[2:]


def drop_and_renumber(entries: Rows) -> Rows:
    return [*entries[:4], *((seq - 1, body, digest) for seq, body, digest in entries[5:])]


def insert_and_renumber(entries: Rows) -> Rows:
    added = (5, entries[3][1], chain(entries[3][2], entries[3][1]))
    return [*entries[:4], added, *((seq + 1, body, digest) for seq, body, digest in entries[4:])]


def swap(entries: Rows) -> Rows:
    return [*entries[:4], (5, *entries[8][1:]), *entries[5:8], (9, *entries[4][1:]), *entries[9:]]


@pytest.mark.parametrize(
    ("tamper", "broken", "words"),
    [
        (alter_body, 5, "entry 5 does not follow from entry 4, but the ones after it follow from it: its body was"),
        (alter_hash, 5, "entry 5: hash: expected [0-9a-f]{64}, was [0-9a-f]{64}: it was altered"),
        (alter_body_and_hash, 6, "entry 6 does not follow from entry 5, but .* or an entry before it was .* rewritten"),
        (alter_two, 5, "entry 5 does not follow from entry 4, nor does the rest follow from it"),
        (drop_one, 5, "entry 5 is missing"),
        (drop_the_first, 1, "entries 1 to 2 are missing"),
        (drop_and_renumber, 5, "entry 5 does not follow from entry 4, but .* or an entry before it was dropped"),
        (insert_and_renumber, 6, "entry 6 does not follow from entry 5, but .* or an entry before it was .* inserted"),
        (swap, 5, "entry 5 is not the one that belongs there: entry 9 is; entries changed places"),
    ],
)
def test_what_was_done_is_named(path: Path, tamper: Callable[[Rows], Rows], broken: int, words: str) -> None:
    entries = rows(path)
    put(path, tamper(entries))
    found = verified(path)
    assert not found.ok
    assert (found.entries, found.broken_seq) == (broken - 1, broken)
    assert re.match(words, found.problem), found.problem


def test_only_a_head_noted_elsewhere_shows_a_cut_or_rewritten_end(path: Path) -> None:
    entries = rows(path)
    head = entries[-1][2]
    for end in (entries[:-3], chained([*(body for _, body, _ in entries[:-1]), b"{}"])):
        put(path, end)
        assert verified(path).ok
        found = verified(path, head)
        assert (found.ok, found.entries, found.broken_seq) == (False, len(end), None)
        assert f"expected the hash {head} in the chain, was none of {len(end)} entries" in found.problem


def test_a_kill_switch_opened_in_the_tables_is_found(path: Path) -> None:
    with closing(SqliteLedger(path)) as ledger:
        state = RiskState(killed=True, trading_state=2, manual_state=2)
        record = ControlRecord(time=1.0, command="kill", person="Ada", detail="why", bundle_hash="b", risk=state)
        seq = ledger.append(encode(record)).seq
        assert verify(ledger).ok
        assert ledger.head().risk == state
    with closing(sqlite3.connect(path)) as connection, connection:
        opened = "UPDATE entries SET body = CAST(replace(body, 'true', 'false') AS BLOB) WHERE seq = ?"
        connection.execute(opened, (seq,))
    assert decode_record(rows(path)[-1][1]).risk == RiskState(trading_state=2, manual_state=2)
    found = verified(path)
    assert (found.entries, found.broken_seq) == (seq - 1, seq)
    assert f"entry {seq} does not follow from entry {seq - 1}" in found.problem
    with pytest.raises(LedgerError, match=f"entry {seq} does not follow from entry {seq - 1}; nothing is added to it"):
        SqliteLedger(path)


@given(data=st.data())
@settings(max_examples=60)
def test_any_change_of_one_byte_is_found_where_it_is(data: st.DataObject, lived: Path, tmp_path_factory) -> None:
    path = Path(shutil.copy(lived, tmp_path_factory.mktemp("tampered") / "ledger.db"))
    entries = rows(path)
    seq, body, digest = data.draw(st.sampled_from(entries))
    if data.draw(st.booleans()):
        place, mask = data.draw(st.integers(0, len(body) - 1)), data.draw(st.integers(1, 255))
        body = body[:place] + bytes([body[place] ^ mask]) + body[place + 1 :]
    else:
        place = data.draw(st.integers(0, 63))
        other = data.draw(st.sampled_from([digit for digit in "0123456789abcdef" if digit != digest[place]]))
        digest = digest[:place] + other + digest[place + 1 :]
    put(path, [*entries[: seq - 1], (seq, body, digest), *entries[seq:]])
    assert verified(path).broken_seq == seq


def test_a_ledger_in_postgres_is_audited_the_same(path: Path, postgres_server, planned: Bundle, bundle: Bundle) -> None:
    url = postgres_server.new_database()
    with closing(PostgresLedger(url)) as ledger:
        for _, body, _ in rows(path):
            ledger.append(body)
    with closing(PostgresLedger(url, None, read_only=True)) as ledger:
        assert verify(ledger) == verified(path)
        bundles = {one.hash: one for one in (planned, bundle)}
        with closing(SqliteLedger(path, read_only=True)) as original:
            assert replay(ledger, bundles.get) == replay(original, bundles.get)


# --- replay -----------------------------------------------------------------------------------------------


@pytest.fixture
def replayed(path: Path, bundle: Bundle, planned: Bundle) -> Callable[[], Replay]:
    bundles = {one.hash: one for one in (bundle, planned)}

    def run() -> Replay:
        with closing(SqliteLedger(path, read_only=True)) as ledger:
            return replay(ledger, bundles.get)

    return run


def test_each_decision_comes_out_again(path: Path, replayed: Callable[[], Replay]) -> None:
    records = [Entry(*row).record for row in rows(path)]
    decisions = [record for record in records if isinstance(record, DecisionRecord)]
    found = replayed()
    assert found.ok
    assert found.differences == ()
    assert found.decisions == sum(bool(record.state) for record in decisions)
    assert found.controls == len(records) - len(decisions)
    # What was replayed is not all of one kind.
    kinds = Counter((record.mode, record.source) for record in decisions if record.state)
    assert set(kinds) >= {(Mode.LIVE, Source.PLANNER), (Mode.LIVE, Source.POLICY), (Mode.SHADOW, Source.POLICY)}
    assert {record.reason for record in decisions} >= {Reason.OK, Reason.HALTED, Reason.INVALID_REQUEST}
    assert len({record.executed for record in decisions}) > 2
    assert found.decisions > STEPS * 0.8


def test_decisions_without_a_state_row_are_named(path: Path, replayed: Callable[[], Replay]) -> None:
    unreadable = find(path, lambda record: getattr(record, "event_id", "") == "unreadable")
    stateless = dict(replayed().stateless)
    assert stateless[unreadable] == "invalid_request"
    assert "missing_feature" in stateless.values()


@pytest.mark.parametrize("name", ["proposed", "executed", "target_position", "action_masks", "value", "probabilities"])
def test_the_smallest_change_is_a_difference(path: Path, replayed: Callable[[], Replay], name: str) -> None:
    def wanted(record: DecisionRecord) -> bool:
        return is_decided(record) and record.executed != HOLD and record.probabilities[1] > 0.0

    seq = find(path, lambda record: isinstance(record, DecisionRecord) and wanted(record))
    record = Entry(*rows(path)[seq - 1]).record
    assert isinstance(record, DecisionRecord)
    assert record.value is not None
    changes = {
        "proposed": record.proposed - 1,
        "executed": HOLD,
        "target_position": 9.0,
        "action_masks": (*record.action_masks[:-1], not record.action_masks[-1]),
        "value": math.nextafter(record.value, math.inf),
        "probabilities": (
            record.probabilities[0],
            math.nextafter(record.probabilities[1], 2.0),
            *record.probabilities[2:],
        ),
    }
    assert rewrite(path, wanted, **{name: changes[name]}) == seq
    assert verified(path).ok
    found = replayed()
    assert [(one.seq, one.event_id, one.what.partition(":")[0]) for one in found.differences] == [
        (seq, record.event_id, name)
    ]
    assert not found.ok
    assert str(found.differences[0]).startswith(f"entry {seq}, event {record.event_id!r}: {name}: recorded ")


def test_zero_and_minus_zero_differ(path: Path, replayed: Callable[[], Replay]) -> None:
    def wanted(record: DecisionRecord) -> bool:
        return is_decided(record) and 0.0 in record.probabilities

    seq = find(path, lambda record: isinstance(record, DecisionRecord) and wanted(record))
    record = Entry(*rows(path)[seq - 1]).record
    assert isinstance(record, DecisionRecord)
    rewrite(path, wanted, probabilities=tuple(value or -0.0 for value in record.probabilities))
    assert [one.seq for one in replayed().differences] == [seq]


def test_an_altered_state_is_a_difference(path: Path, replayed: Callable[[], Replay]) -> None:
    def wanted(record: DecisionRecord) -> bool:
        return is_decided(record) and record.source is Source.POLICY

    seq = find(path, lambda record: isinstance(record, DecisionRecord) and wanted(record))
    record = Entry(*rows(path)[seq - 1]).record
    assert isinstance(record, DecisionRecord)
    state = np.frombuffer(record.state, dtype="<f4").copy()
    state[0] += 0.01
    rewrite(path, wanted, state=state.tobytes())
    assert {one.seq for one in replayed().differences} == {seq}
    rewrite(path, wanted, state=record.state[:-4])
    assert [one.what.partition(":")[0] for one in replayed().differences] == ["cannot be decided again"]


def test_an_action_without_a_state_is_a_difference(path: Path, replayed: Callable[[], Replay]) -> None:
    seq = rewrite(path, lambda record: not record.state, executed=3)
    assert [str(one).partition(", event")[0] for one in replayed().differences] == [f"entry {seq}"]


def test_an_entry_that_is_no_record_is_a_difference(path: Path, replayed: Callable[[], Replay]) -> None:
    put(path, chained([*(body for _, body, _ in rows(path)), b'{"kind":"decision"}', b"\xff"]))
    assert [one.what.partition(":")[0] for one in replayed().differences] == ["expected a record, was none"] * 2


def test_a_bundle_that_is_not_at_hand_is_named(path: Path, bundle: Bundle, planned: Bundle) -> None:
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        found = replay(ledger, {planned.hash: planned}.get)
        assert not found.ok
        assert set(found.missing_bundles) == {bundle.hash}
        complete = replay(ledger, {one.hash: one for one in (bundle, planned)}.get)
        assert found.decisions + len(found.missing_bundles[bundle.hash]) == complete.decisions
        few = replay(ledger, {planned.hash: planned}.get, first=1, last=4)
        assert (few.decisions, few.controls) == (3, 1)


# --- in words ---------------------------------------------------------------------------------------------


def entry_of(path: Path, wanted: Callable[[DecisionRecord], bool]) -> tuple[Entry, DecisionRecord]:
    seq = find(path, lambda record: isinstance(record, DecisionRecord) and wanted(record))
    entry = Entry(*rows(path)[seq - 1])
    record = entry.record
    assert isinstance(record, DecisionRecord)
    return entry, record


def test_a_decision_in_words(path: Path, planned: Bundle) -> None:
    entry, record = entry_of(path, lambda one: is_decided(one) and one.source is Source.PLANNER and one.executed > 1)
    text = explain(entry, planned)
    lines = text.splitlines()
    names = planned.rule_set.actions.names
    assert lines[0] == f"entry {entry.seq}, hash {entry.hash}"
    assert lines[1].endswith(f"live decision on event {record.event_id!r}")
    assert lines[2].startswith("bar       2023-11-")
    assert lines[2].endswith(" UTC, 60.000 s before")
    assert "trading   ACTIVE, drawdown" in text
    momentum = np.frombuffer(record.state, dtype="<f4")[3]
    assert [line.split() for line in lines if "momentum" in line] == [["momentum", f"{momentum:g}"]]
    assert f"proposed  {record.proposed} {names[record.proposed]} by the planner, value" in text
    position = planned.rule_set.actions.factors[record.executed - 1]
    assert f"executed  {record.executed} {names[record.executed]}: the position goes to {position:g} of equity" in text
    assert "reason    ok" in lines
    assert lines[-1].startswith("latency   ")
    assert f"rules     {planned.manifest.rule_set_hash}" in lines


def test_each_denial_is_in_the_words_of_its_rule(path: Path, planned: Bundle) -> None:
    entry, record = entry_of(
        path,
        lambda one: (
            bool(one.state) and bool(one.blocked) and one.caller_masks is not None and one.bundle_hash == planned.hash
        ),
    )
    lines = explain(entry, planned).splitlines()
    for action, allowed in enumerate(record.action_masks):
        start = next(
            n
            for n, line in enumerate(lines)
            if line.startswith(f"  {action} {planned.rule_set.actions.names[action]}:")
        )
        assert ("allowed" if allowed else "denied") in lines[start]
        reasons = []
        for line in lines[start + 1 :]:
            if not line.startswith("      "):
                break
            reasons.append(line.strip())
        blocking = {rule for rule, actions in record.blocked.items() if action in actions}
        assert {reason.rpartition("[")[2].rstrip("]") for reason in reasons} - {"caller"} == blocking
        assert record.caller_masks is not None
        assert any("caller" in reason for reason in reasons) == (not record.caller_masks[action])
    rule = next(iter(record.blocked))
    assert f"      rule {rule}" in explain(entry).splitlines()


def test_without_its_bundle_there_are_numbers_for_names(path: Path, bundle: Bundle, planned: Bundle) -> None:
    entry, record = entry_of(path, lambda one: is_decided(one) and one.bundle_hash == planned.hash)
    text = explain(entry)
    assert "  column 3" in text
    assert "  0 hold: allowed" in text
    with pytest.raises(BundleMismatchError, match=f"bundle: expected {record.bundle_hash}, was {bundle.hash}"):
        explain(entry, bundle)


def test_refused_and_halted_decisions_say_why(path: Path, planned: Bundle) -> None:
    entry, _ = entry_of(path, lambda one: one.event_id == "unreadable")
    text = explain(entry, planned)
    assert "state     none: the request was refused before there was one" in text
    assert "proposed  nothing" in text
    assert "executed  0 hold: the position stays as it is" in text
    assert "reason    invalid_request: no JSON" in text
    entry, _ = entry_of(path, lambda one: one.flatten)
    text = explain(entry, planned)
    assert "executed  0 hold: the risk manager closes the position" in text
    assert "trading   HALTED" in text


def test_a_command_in_words(path: Path) -> None:
    seq = find(path, lambda record: isinstance(record, ControlRecord) and record.command == "kill")
    text = explain(Entry(*rows(path)[seq - 1]))
    assert "command kill by Ada" in text
    assert "why       exchange is down" in text
    assert "trading is HALTED, kill switch latched" in text


def test_what_is_no_record_cannot_be_told() -> None:
    with pytest.raises(LedgerError, match="entry 3: expected a record, was none"):
        explain(Entry(3, b"{}", "0" * 64))
