"""What every ledger promises, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ledger_parts import body, execute, fill, put_foreign, risk

from serving.errors import LedgerError
from serving.ledger.audit import verify
from serving.ledger.base import Ledger, chain, genesis
from serving.ledger.open import open_ledger
from serving.records import RiskState

OpenLedger = Callable[..., Ledger]


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of a ledger that is not there yet."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    return str(request.getfixturevalue("postgres_server").new_database())


@pytest.fixture
def opened(where: str) -> Iterator[OpenLedger]:
    """Opens it, with whatever arguments, and closes what was opened."""
    ledgers: list[Ledger] = []

    def open_it(account: str | None = "default", read_only: bool = False) -> Ledger:
        ledgers.append(open_ledger(where, account, read_only=read_only, fsync="never"))
        return ledgers[-1]

    yield open_it
    for ledger in ledgers:
        ledger.close()


def test_an_empty_ledger_ends_at_the_genesis_of_its_account(opened: OpenLedger) -> None:
    ledger = opened("main")
    assert ledger.head() == (0, hashlib.sha256(b"detent ledger 1 main").hexdigest(), None)
    assert ledger.account == "main"
    assert list(ledger.read()) == []
    assert list(ledger.read(-5)) == []
    assert ledger.find("event-1") is None


def test_each_hash_covers_the_one_before_and_the_body(opened: OpenLedger) -> None:
    ledger = opened()
    first = ledger.append(b"one")
    second = ledger.append(b"two", event_id="e")
    start = hashlib.sha256(b"detent ledger 1 default").hexdigest()
    assert first.hash == hashlib.sha256(start.encode() + b"one").hexdigest()
    assert second.hash == hashlib.sha256(first.hash.encode() + b"two").hexdigest()
    assert list(ledger.read()) == [first, second]
    assert [entry.seq for entry in ledger.read()] == [1, 2]


def test_entries_and_risk_state_are_there_after_reopening(opened: OpenLedger) -> None:
    ledger = opened()
    state = RiskState(trading_state=2, killed=True, manual_state=2, peak=0.1 + 0.2, equity=1e-300, bar_time=1.7e9)
    entry = ledger.append(bytes(range(256)), event_id="Ereignis ü/🙂")
    last = ledger.append(body(state, "ü/🙂"))
    ledger.close()
    again = opened()
    assert again.head() == (2, last.hash, state)
    assert list(again.read()) == [entry, last]
    assert again.find("Ereignis ü/🙂") == entry
    assert again.append(b"next").hash == chain(last.hash, b"next")


def test_entries_are_read_by_number(opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 10)

    def numbers(*limits: int) -> list[int]:
        return [entry.seq for entry in ledger.read(*limits)]

    assert numbers(4, 6) == [4, 5, 6]
    assert numbers(9) == [9, 10]
    assert numbers(-3) == [8, 9, 10]
    assert numbers(-3, 9) == [8, 9]
    assert numbers(-30) == list(range(1, 11))
    assert numbers(9, 30) == [9, 10]
    assert numbers(11) == numbers(6, 5) == []


def test_a_long_ledger_is_read_to_its_end(opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 2100)
    assert [entry.seq for entry in ledger.read()] == list(range(1, 2101))
    # What comes while reading is for the next reader.
    reading = ledger.read(2099)
    next(reading)
    fill(ledger, 1, first=2101)
    assert [entry.seq for entry in reading] == [2100]


def test_an_event_is_recorded_once(opened: OpenLedger) -> None:
    ledger = opened()
    first = ledger.append(body(risk(1)), event_id="e")
    ledger.append(body(risk(2), "shadow"))
    ledger.append(body(risk(3), "shadow"))
    assert ledger.append(body(risk(4), "decided otherwise"), event_id="e") == first
    head = ledger.head()
    assert (head.seq, head.risk) == (3, risk(3))
    assert ledger.append(b"next", event_id="f").seq == 4


def test_one_process_writes_and_is_named_to_the_next(opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 1)
    with pytest.raises(LedgerError, match=f"held by .*pid {os.getpid()} on .*one process writes at a time"):
        opened()
    fill(ledger, 1, first=2)
    ledger.close()
    assert opened().head().seq == 2


def test_others_read_while_one_writes(opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 3)
    reader = opened(None, read_only=True)
    assert reader.account == "default"
    assert reader.head() == ledger.head()
    fill(ledger, 2, first=4)
    assert reader.head() == ledger.head()
    assert list(reader.read()) == list(ledger.read())
    assert reader.find("event-5") == ledger.find("event-5")
    with pytest.raises(LedgerError, match="expected to be open for writing"):
        reader.append(b"")
    with pytest.raises(LedgerError, match="expected a name to write under"):
        opened(None)
    ledger.close()
    assert reader.head().seq == 5


def test_a_closed_ledger_says_so(opened: OpenLedger) -> None:
    ledger = opened()
    ledger.close()
    ledger.close()
    uses = (ledger.head, lambda: ledger.append(b""), lambda: ledger.find("e"), lambda: list(ledger.read()))
    for use in uses:
        with pytest.raises(LedgerError, match="closed"):
            use()


def test_threads_share_a_ledger(opened: OpenLedger) -> None:
    ledger = opened()
    together = threading.Barrier(4)

    def work(thread: int) -> None:
        together.wait()
        for number in range(30):
            ledger.append(body(risk(number), f"of {thread}"), event_id=f"event-{number}")
            ledger.append(body(risk(number), f"of {thread}, shadow"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    previous = genesis("default")
    for seq, entry in enumerate(ledger.read(), start=1):
        assert (entry.seq, entry.hash) == (seq, chain(previous, entry.body))
        previous = entry.hash
    assert ledger.head()[:2] == (30 + 4 * 30, previous)


def test_a_writer_does_not_add_to_a_broken_end(where: str, opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 5)
    ledger.close()
    execute(where, "UPDATE entries SET body = ? WHERE seq = 4", b"altered")
    with pytest.raises(LedgerError, match="entry 4 does not follow from entry 3"):
        opened()
    assert len(list(opened(read_only=True).read())) == 5


@pytest.mark.parametrize(
    ("count", "missing", "message"),
    [
        (150, 149, "entry 150 does not follow from entry 148"),
        (150, 51, "entry 52 does not follow from entry 50"),
        (150, 50, "entry 51 does not follow from entry 50"),
        (100, 1, "entry 2 does not follow from entry 0"),
    ],
)
def test_a_missing_entry_near_the_end_is_found_at_opening(
    where: str, opened: OpenLedger, count: int, missing: int, message: str
) -> None:
    ledger = opened()
    fill(ledger, count)
    ledger.close()
    execute(where, "DELETE FROM entries WHERE seq = ?", missing)
    with pytest.raises(LedgerError, match=message):
        opened()


@pytest.mark.parametrize("altered", [body(risk(9), "3"), body(risk(3), "3") + b" ", b"nonsense"])
def test_a_risk_state_that_was_altered_is_refused_and_found(where: str, opened: OpenLedger, altered: bytes) -> None:
    ledger = opened()
    fill(ledger, 3)
    ledger.close()
    execute(where, "UPDATE entries SET body = ? WHERE seq = 3", altered)
    with pytest.raises(LedgerError, match="entry 3 does not follow from entry 2"):
        opened()
    found = verify(opened(read_only=True))
    assert (found.entries, found.broken_seq) == (2, 3)


NO_RECORDS = {
    "another": (b"{}", "missing required field `kind`"),
    "no text": (b"\xff", "JSON is malformed"),
    "half a text": (b'{"kind":"control","person":"\xff"}', "can't decode byte 0xff"),
    "too deep": (b'{"kind":"control","x":' + b"[" * 100_000, "maximum recursion depth"),
    "no risk state": (body(risk(4)).replace(b'"risk"', b'"rusk"'), "missing required field `risk`"),
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_where_the_last_entry_is_no_record_nobody_knows_the_risk_state(opened: OpenLedger, name: str) -> None:
    wrong, why = NO_RECORDS[name]
    message = f"entry 4: expected a record, was none: .*{why}"
    ledger = opened()
    fill(ledger, 3)
    ledger.append(wrong)
    with pytest.raises(LedgerError, match=message):
        ledger.head()
    ledger.close()
    with pytest.raises(LedgerError, match=message):
        opened()
    reader = opened(read_only=True)
    with pytest.raises(LedgerError, match=message):
        reader.head()
    assert [entry.seq for entry in reader.read()] == [1, 2, 3, 4]


def test_a_caller_who_could_not_be_told_the_risk_state_may_not_append(where: str, opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 1)
    put_foreign(where, ledger, b"{}")
    with pytest.raises(LedgerError):
        fill(ledger, 1, first=2)
    for _ in range(2):
        with pytest.raises(LedgerError, match="entry 2: expected a record, was none"):
            ledger.head()
        with pytest.raises(LedgerError, match="knows entry 1 as the last, it is entry 2: ask for the head"):
            fill(ledger, 1, first=2)


def test_an_event_that_cannot_be_stored_leaves_nothing(opened: OpenLedger) -> None:
    ledger = opened()
    fill(ledger, 1)
    before = ledger.head()
    with pytest.raises(LedgerError):
        ledger.append(body(risk(2)), event_id="\ud800")
    with pytest.raises(LedgerError):
        ledger.find("\ud800")
    assert ledger.head() == before
    fill(ledger, 1, first=2)
    assert [entry.body for entry in ledger.read()] == [body(risk(number), str(number)) for number in (1, 2)]
