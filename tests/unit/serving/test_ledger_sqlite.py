"""A ledger in an SQLite file: its format, its log, files that vanish, and no space left."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_parts import body, fill, put_foreign, risk
from services import unavailable

from serving.errors import LedgerError
from serving.ledger.checkpointer import checkpoint
from serving.ledger.sqlite import SqliteLedger
from serving.records import RiskState

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
        unavailable(f"no small file system: {done.stderr.strip()}")
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
