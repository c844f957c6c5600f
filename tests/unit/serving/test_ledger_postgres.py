"""A ledger in a real PostgreSQL: connections lost, servers gone, writers that take over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg
import pytest
from ledger_parts import bodies, body, fill, put_foreign, risk
from services import RealPostgres

from serving.errors import LedgerError
from serving.ledger.postgres import _ACCOUNTS, PostgresLedger


@pytest.fixture
def url(postgres_server: RealPostgres) -> str:
    return postgres_server.new_database()


@pytest.fixture
def ledger(url: str) -> Iterator[PostgresLedger]:
    with closing(PostgresLedger(url)) as ledger:
        yield ledger


def sql(url: str, statement: str, *values: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), values)
        return cursor.fetchall() if cursor.description is not None else []


def in_time(attempt: Callable[[], Any]) -> Any:
    """The result of the first attempt that succeeds."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return attempt()
        except LedgerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def backend(ledger: PostgresLedger) -> int:
    return int(ledger._run("SELECT pg_backend_pid()")[0][0])


def end_session(url: str, ledger: PostgresLedger) -> None:
    sql(url, "SELECT pg_terminate_backend(%s, 60000)", backend(ledger))


def test_accounts_of_a_database_have_chains_of_their_own(url: str, ledger: PostgresLedger) -> None:
    with closing(PostgresLedger(url, "other")) as other:
        assert ledger.append(body(risk(1)), event_id="e").seq == 1
        assert other.append(body(risk(2)), event_id="e").seq == 1
        assert ledger.head().hash != other.head().hash
        assert (ledger.head().risk, other.head().risk) == (risk(1), risk(2))
    with pytest.raises(LedgerError, match="account: expected one of default, other, was none given"):
        PostgresLedger(url, None, read_only=True)
    with closing(PostgresLedger(url, "third", read_only=True)) as third:
        assert third.head().seq == 0


def test_accounts_are_found_without_reading_every_entry(url: str) -> None:
    PostgresLedger(url).close()
    with closing(PostgresLedger(url, None, read_only=True)) as reader:
        assert (reader.account, reader.head().seq) == ("default", 0)
    many = "INSERT INTO detent.entries SELECT %s, number, '', '', NULL FROM generate_series(1, %s) number"
    for account, count in (("a", 1), ("b", 30_000), ("c", 1)):
        sql(url, many, account, count)
    sql(url, "ANALYZE detent.entries")
    with pytest.raises(LedgerError, match="account: expected one of a, b, c, was none given"):
        PostgresLedger(url, None, read_only=True)
    plan = "\n".join(row[0] for row in sql(url, f"EXPLAIN VERBOSE {_ACCOUNTS}"))
    assert "Index Only Scan" in plan
    assert "Seq Scan" not in plan
    sql(url, many.replace("%s", "'b' || number", 1), 10)
    with pytest.raises(LedgerError, match="expected one of a, b, b1, b10, b2, b3, b4, b5, b6, b7, was none given"):
        PostgresLedger(url, None, read_only=True)


def test_reading_creates_nothing(url: str) -> None:
    with pytest.raises(LedgerError, match="expected a ledger, was a database without one"):
        PostgresLedger(url, read_only=True)
    assert sql(url, "SELECT to_regclass('detent.entries')") == [(None,)]


def test_tables_are_created_once_by_whoever_comes_first(url: str) -> None:
    together = threading.Barrier(6)

    def work(number: int) -> int:
        together.wait()
        with closing(PostgresLedger(url, f"account {number}")) as ledger:
            return ledger.append(body(risk(number))).seq

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [1] * 6
    assert sql(url, "SELECT format FROM detent.ledger") == [(2,)]


def test_tables_of_another_version_are_refused(url: str) -> None:
    PostgresLedger(url).close()
    sql(url, "UPDATE detent.ledger SET format = 1")
    with pytest.raises(LedgerError, match=r"format: expected 2, was \[1\], of another version"):
        PostgresLedger(url)


def test_an_acknowledged_entry_is_on_disk_whatever_the_default_is(url: str) -> None:
    sql(url, f'ALTER DATABASE "{url.rpartition("/")[2]}" SET synchronous_commit = off')
    assert sql(url, "SHOW synchronous_commit") == [("off",)]
    with closing(PostgresLedger(url)) as ledger:
        assert ledger._run("SHOW synchronous_commit") == [("on",)]


def test_an_append_that_fails_leaves_record_and_risk_state_as_they_were(url: str, ledger: PostgresLedger) -> None:
    fill(ledger, 1)
    before = ledger.head()
    sql(url, "ALTER TABLE detent.entries ADD CONSTRAINT full_disk CHECK (seq < 2)")
    with pytest.raises(LedgerError, match="full_disk"):
        fill(ledger, 1, first=2)
    assert ledger.find("event-2") is None
    assert ledger.head() == before
    sql(url, "ALTER TABLE detent.entries DROP CONSTRAINT full_disk")
    fill(ledger, 1, first=2)
    assert (ledger.head().seq, ledger.head().risk) == (2, risk(2))


def test_no_message_holds_the_password(url: str, postgres_server: RealPostgres) -> None:
    postgres_server.require_own("it may let anybody in")
    wrong = url.replace(postgres_server.password, "open-sesame")
    unreachable = url.replace(f":{postgres_server.port}/", ":1/")
    for bad in (wrong, unreachable, url + "?nonsense=1", "postgresql://detent:open-sesame@[::1"):
        with pytest.raises(LedgerError) as caught:
            PostgresLedger(bad)
        error: BaseException | None = caught.value
        assert "postgresql://" in str(error)
        while error is not None:
            assert "open-sesame" not in str(error)
            assert postgres_server.password not in str(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_password_may_come_from_the_environment(
    url: str, postgres_server: RealPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_server.require_own("it may have no password")
    bare = url.replace(f":{postgres_server.password}@", "@")
    with pytest.raises(LedgerError, match="no password supplied"):
        PostgresLedger(bare)
    monkeypatch.setenv("PGPASSWORD", postgres_server.password)
    PostgresLedger(bare).close()


def test_a_lost_session_fails_one_append_and_comes_back_with_its_lock(url: str, ledger: PostgresLedger) -> None:
    fill(ledger, 2)
    end_session(url, ledger)
    with pytest.raises(LedgerError, match=r"terminat|closed"):
        fill(ledger, 1, first=3)
    in_time(lambda: fill(ledger, 1, first=3))
    assert [entry.body for entry in ledger.read()] == bodies(1, 2, 3)
    with pytest.raises(LedgerError, match=f"held by detent pid {os.getpid()} on "):
        PostgresLedger(url)


def test_without_a_server_each_call_says_so_and_all_is_there_when_it_is_back(
    url: str, ledger: PostgresLedger, postgres_server: RealPostgres
) -> None:
    fill(ledger, 2)
    postgres_server.kill()
    uses = (lambda: fill(ledger, 1, first=3), lambda: ledger.find("event-1"), ledger.head, lambda: list(ledger.read()))
    for use in uses:
        with pytest.raises(LedgerError, match=r"postgresql://127\.0\.0\.1"):
            use()
    with pytest.raises(LedgerError, match="not connected"):
        fill(ledger, 1, first=3)
    postgres_server.restart()
    in_time(lambda: fill(ledger, 1, first=3))
    assert (ledger.head().seq, ledger.head().risk) == (3, risk(3))
    assert [entry.body for entry in ledger.read()] == bodies(1, 2, 3)


def test_a_server_that_does_not_answer_is_given_up(url: str, postgres_server: RealPostgres) -> None:
    postgres_server.require_own()
    with closing(PostgresLedger(url, timeout_s=0.5)) as ledger:
        fill(ledger, 1)
        frozen = backend(ledger)
        os.kill(frozen, signal.SIGSTOP)
        try:
            with pytest.raises(LedgerError):
                fill(ledger, 1, first=2)
            # Its session still holds the lock: nobody else writes meanwhile.
            with pytest.raises(LedgerError, match=r"held by|not connected"):
                fill(ledger, 1, first=2)
        finally:
            os.kill(frozen, signal.SIGCONT)

        def again() -> None:
            # The frozen server may yet have written what it was sent.
            ledger.head()
            fill(ledger, 1, first=2)

        in_time(again)
        assert [entry.body for entry in ledger.read()] == bodies(1, 2)


def test_what_another_process_wrote_meanwhile_is_not_written_over(url: str, ledger: PostgresLedger) -> None:
    fill(ledger, 1)
    end_session(url, ledger)
    with pytest.raises(LedgerError):
        fill(ledger, 1, first=2)
    digest = put_foreign(url, in_time(lambda: ledger.head() and ledger), body(risk(7)))

    def moved() -> bool:
        with pytest.raises(LedgerError) as caught:
            fill(ledger, 1, first=2)
        return "knows entry 1 as the last, it is entry 2" in str(caught.value)

    assert not moved(), "the first try meets the other's entry"
    assert moved()
    assert moved()
    assert ledger.append(body(risk(9)), event_id="foreign").body == body(risk(7))
    assert ledger.head() == (2, digest, risk(7))
    fill(ledger, 1, first=3)
    assert [entry.seq for entry in ledger.read()] == [1, 2, 3]


def test_a_standby_takes_over_when_the_writer_goes(url: str, ledger: PostgresLedger) -> None:
    fill(ledger, 2)
    with ThreadPoolExecutor(1) as pool:
        standby = pool.submit(PostgresLedger, url, wait=True)
        time.sleep(0.7)  # long enough to be refused once; right whether it was or not
        assert not standby.done()
        fill(ledger, 1, first=3)
        ledger.close()
        with closing(standby.result(60.0)) as taken:
            assert (taken.head().seq, taken.head().risk) == (3, risk(3))
            fill(taken, 1, first=4)
            with pytest.raises(LedgerError, match="closed"):
                fill(ledger, 1, first=5)


def test_an_event_that_postgres_cannot_store_is_an_error_of_that_append_only(ledger: PostgresLedger) -> None:
    with pytest.raises(LedgerError, match="NUL"):
        ledger.append(body(risk(1)), event_id="a\x00b")
    fill(ledger, 1)
    assert ledger.head().seq == 1
