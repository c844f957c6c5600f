"""What every ledger promises, on SQLite and on a real PostgreSQL; and what is SQLite's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_parts import body

from serving.errors import LedgerError
from serving.ledger.audit import verify
from serving.ledger.base import Ledger, chain, genesis
from serving.ledger.checkpointer import checkpoint
from serving.ledger.open import open_ledger
from serving.ledger.sqlite import SqliteLedger
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


def execute(where: str, statement: str, *values: object) -> None:
    """Change the tables behind the ledger's back."""
    if where.startswith("postgresql:"):
        import psycopg

        with psycopg.connect(where) as connection:
            connection.execute("SET search_path = detent")
            connection.execute(statement.replace("?", "%s").encode(), values)
    else:
        with contextlib.closing(sqlite3.connect(where)) as connection, connection:
            connection.execute(statement, values)


def risk(number: int) -> RiskState:
    return RiskState(peak=100.0 + number, equity=100.0, bar_time=float(number))


def fill(ledger: Ledger, count: int, first: int = 1) -> None:
    for number in range(first, first + count):
        ledger.append(body(risk(number), str(number)), event_id=f"event-{number}")


def put_foreign(where: str, ledger: Ledger, text: bytes) -> str:
    """Write the next entry as somebody else would; its hash."""
    head = ledger.head()
    digest = chain(head.hash, text)
    statement = "INSERT INTO entries VALUES (?, ?, ?, 'foreign')"
    if where.startswith("postgresql:"):
        statement = "INSERT INTO entries VALUES ('default', ?, ?, ?, 'foreign')"
    execute(where, statement, head.seq + 1, text, digest)
    return digest


# --- every ledger -----------------------------------------------------------------------------------------


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


# --- SQLite -----------------------------------------------------------------------------------------------

EVENTS = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "a\x00", "", "é"]))


@given(st.lists(st.tuples(st.binary(max_size=20), EVENTS), max_size=30))
def test_any_sequence_of_appends_is_what_a_list_and_a_dictionary_say(
    tmp_path_factory: pytest.TempPathFactory, appends: list[tuple[bytes, str | None]]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    bodies: list[bytes] = []
    seen: dict[str, int] = {}
    for part in (appends[: len(appends) // 2], appends[len(appends) // 2 :]):
        with contextlib.closing(SqliteLedger(path, fsync="never")) as ledger:
            # Opened once more, a ledger must end with a record.
            for new, event in (*part, (body(risk(len(part))), None)):
                if event in seen:
                    assert ledger.append(new, event_id=event).seq == seen[event]
                    continue
                bodies.append(new)
                assert ledger.append(new, event_id=event).seq == len(bodies)
                if event is not None:
                    seen[event] = len(bodies)
            assert [entry.body for entry in ledger.read()] == bodies
            assert (ledger.head().seq, ledger.head().risk) == (len(bodies), risk(len(part)))


@pytest.mark.parametrize(("fsync", "level"), [("always", 2), ("never", 1)])
def test_the_log_is_synced_as_asked(tmp_path: Path, fsync: str, level: int) -> None:
    with contextlib.closing(SqliteLedger(tmp_path / "ledger.db", fsync=fsync)) as ledger:  # type: ignore[arg-type]
        assert ledger._run("PRAGMA synchronous") == [(level,)]
        assert ledger._run("PRAGMA journal_mode") == [("wal",)]


def test_a_ledger_belongs_to_one_account(tmp_path: Path) -> None:
    SqliteLedger(tmp_path / "ledger.db", "main").close()
    with pytest.raises(LedgerError, match="account: expected 'default', was 'main'"):
        SqliteLedger(tmp_path / "ledger.db")


def test_what_is_no_ledger_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE prices (x)")
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(LedgerError, match="expected a ledger, was a database of something else"):
            SqliteLedger(path, read_only=read_only)
    assert path.read_bytes() == before
    path.write_text("no database at all, " * 100)
    with pytest.raises(LedgerError, match="cannot use the ledger: file is not a database"):
        SqliteLedger(path)
    with pytest.raises(LedgerError, match="cannot open the ledger"):
        SqliteLedger(tmp_path)
    with pytest.raises(LedgerError, match="expected a ledger, was none: No such file"):
        SqliteLedger(tmp_path / "missing.db", read_only=True)
    with pytest.raises(LedgerError, match="cannot lock the ledger for writing: Not a directory"):
        SqliteLedger(path / "below" / "ledger.db")


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    SqliteLedger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1")
    with pytest.raises(LedgerError, match="format: expected 2, was 1, of another version"):
        SqliteLedger(path)


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal"])
def test_a_file_that_was_removed_under_it_is_noticed(tmp_path: Path, name: str) -> None:
    with contextlib.closing(SqliteLedger(tmp_path / "ledger.db")) as ledger:
        fill(ledger, 2)
        hidden = (tmp_path / name).rename(tmp_path / "hidden")
        with pytest.raises(LedgerError, match=f"{name}: expected to stay while the ledger is open, was removed"):
            fill(ledger, 1, first=3)
        (tmp_path / name).write_bytes(hidden.read_bytes())
        with pytest.raises(LedgerError, match="was replaced: restart"):
            fill(ledger, 1, first=3)
        hidden.rename(tmp_path / name)
        fill(ledger, 1, first=3)
        assert ledger.head().seq == 3


def test_an_entry_of_somebody_else_stops_the_writer_until_it_asks_for_the_head(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with contextlib.closing(SqliteLedger(path)) as ledger:
        fill(ledger, 1)
        digest = put_foreign(str(path), ledger, body(risk(7)))
        for message in ("UNIQUE constraint failed", "knows entry 1 as the last, it is entry 2: ask for the head"):
            with pytest.raises(LedgerError, match=message):
                fill(ledger, 1, first=2)
        assert ledger.append(body(risk(2)), event_id="foreign").body == body(risk(7))
        assert ledger.head() == (2, digest, risk(7))
        fill(ledger, 1, first=3)
        assert [entry.seq for entry in ledger.read()] == [1, 2, 3]


def test_the_log_is_emptied_beside_the_appends(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    lock = threading.RLock()
    with (
        contextlib.closing(SqliteLedger(path, fsync="never")) as ledger,
        contextlib.closing(sqlite3.connect(path)) as connection,
    ):
        fill(ledger, 50)
        assert path.stat().st_size < 20_000
        checkpoint(connection, lock)
        assert path.stat().st_size > 20_000
        reader = sqlite3.connect(path)
        with contextlib.closing(reader):
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM entries").fetchone()
            fill(ledger, 50, first=51)
            # Held back by a reader: the next attempt with appends waiting is for a longer log.
            assert checkpoint(connection, lock, limit=10) > 8192
        log = Path(f"{path}-wal")
        size = log.stat().st_size
        assert checkpoint(connection, lock, limit=10) == 8192
        fill(ledger, 10, first=101)
        assert log.stat().st_size == size
        assert len(list(ledger.read())) == 110


# --- no space, no rights ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_nothing_is_half_written_and_the_next_append_works_once_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    with contextlib.closing(SqliteLedger(small_disk / "ledger.db", fsync="never")) as ledger:
        long = "x" * 3000
        written = 0
        with contextlib.suppress(LedgerError):
            while written < 10_000:
                ledger.append(body(risk(written), long), event_id=f"event-{written}")
                written += 1
        assert 10 < written < 10_000
        with pytest.raises(LedgerError, match="disk is full"):
            ledger.append(body(risk(written), long), event_id=f"event-{written}")
        assert (ledger.head().seq, ledger.head().risk) == (written, risk(written - 1))
        assert ledger.find(f"event-{written}") is None
        ballast.unlink()
        assert ledger.append(body(risk(written), long), event_id=f"event-{written}").seq == written + 1
    with contextlib.closing(SqliteLedger(small_disk / "ledger.db")) as again:
        assert len(list(again.read())) == again.head().seq == written + 1
        assert again.head().risk == risk(written)


def test_no_room_even_to_create_one(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes((2 << 20) - 4096))
    with pytest.raises(LedgerError, match=r"full|unable to open"):
        SqliteLedger(small_disk / "ledger.db")
    (small_disk / "ballast").unlink()
    with contextlib.closing(SqliteLedger(small_disk / "ledger.db")) as ledger:
        fill(ledger, 1)


LIMITED = """
import json, resource, sys
from ledger_parts import body
from serving.errors import LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import RiskState
ledger = SqliteLedger(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
acknowledged, errors = 0, []
while len(errors) < 3:
    try:
        ledger.append(body(RiskState(peak=float(acknowledged)), "x" * 2000), event_id=f"event-{acknowledged}")
        acknowledged += 1
    except LedgerError as error:
        errors.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.append(body(RiskState(peak=float(acknowledged)), "after"), event_id=f"event-{acknowledged}")
print(json.dumps({"acknowledged": acknowledged + 1, "errors": errors}))
"""


def test_a_file_that_may_not_grow_fails_like_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert len(report["errors"]) == 3
    assert all("cannot append to the ledger: disk I/O error" in error for error in report["errors"])
    with contextlib.closing(SqliteLedger(path)) as ledger:
        count = report["acknowledged"]
        before, last = RiskState(peak=float(count - 2)), RiskState(peak=float(count - 1))
        assert (ledger.head().seq, ledger.head().risk) == (count, last)
        assert count > 5
        assert [entry.body for entry in ledger.read(-2)] == [body(before, "x" * 2000), body(last, "after")]


def test_an_archived_ledger_is_read_where_nothing_can_be_written(small_disk: Path, tmp_path: Path) -> None:
    with contextlib.closing(SqliteLedger(small_disk / "ledger.db")) as ledger:
        fill(ledger, 3)
        log = (small_disk / "ledger.db-wal").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with contextlib.closing(SqliteLedger(small_disk / "ledger.db", read_only=True)) as reader:
        assert reader.head().seq == 3
    with pytest.raises(LedgerError, match="cannot lock the ledger for writing: Read-only file system"):
        SqliteLedger(small_disk / "ledger.db")
    # With a log beside it the file alone is not the whole ledger.
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "ledger.db-wal").write_bytes(log)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LedgerError, match=r"has a log to be read first: copy it and ledger\.db-wal"):
        SqliteLedger(small_disk / "ledger.db", read_only=True)
