"""Processes that write a ledger, and servers that keep one, killed at random moments: nothing acknowledged is lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from http_processes import environment
from ledger_parts import body
from services import RealPostgres

from serving.ledger.audit import verify
from serving.ledger.base import Ledger
from serving.ledger.open import open_ledger
from serving.records import RiskState

SQLITE_KILLS = 25
CLIENT_KILLS = 10
SERVER_KILLS = 2

# Event n is entry n. Acknowledges an entry by a line with its number, and asks for the newest ones again at its start.
# With LATE it does so before it writes, many at a time.
WRITER = """
import os, time
from ledger_parts import body
from serving.ledger import checkpointer
from serving.errors import LedgerError
from serving.ledger.open import open_ledger
from serving.records import RiskState

def write(number):
    while True:
        try:
            ledger.head()
            entry = ledger.append(body(RiskState(peak=float(number))), event_id=f"event-{number}")
        except LedgerError:
            time.sleep(0.005)
            continue
        assert entry.seq == number, (entry, number)
        return

def acknowledge(number):
    os.write(1, b"%d\\n" % number)

checkpointer.INTERVAL_S = 0.01
ledger = open_ledger(os.environ["LEDGER"], fsync=os.environ["FSYNC"], wait=True)
number = max(1, ledger.head().seq - 3)
while True:
    batch = range(number, number + (20 if "LATE" in os.environ else 1))
    if "LATE" in os.environ:
        for number in batch:
            acknowledge(number)
        time.sleep(0.1)
    for number in batch:
        write(number)
        if "LATE" not in os.environ:
            acknowledge(number)
    number += 1
"""


class Writer:
    """A writing process, and what it has acknowledged."""

    def __init__(self, where: str, *, fsync: str = "always", late: bool = False) -> None:
        settings = {"LEDGER": where, "FSYNC": fsync, **({"LATE": "1"} if late else {})}
        # Into a file: nobody reads a pipe of complaints while numbers are waited for.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environment(), **settings},
        )
        self.acknowledged = 0

    def wait_for(self, count: int) -> None:
        """Until so many more are acknowledged."""
        assert self.process.stdout is not None
        for _ in range(count):
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(f"the writer ended: {self._complaints()}")
            self.acknowledged = int(line)

    def kill(self) -> int:
        """SIGKILL. Returns: the last number that was acknowledged, 0 if none was."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGKILL)
        # Not `communicate`, which does not see what `readline` has buffered. A last line may be cut short by the kill.
        lines = self.process.stdout.read().split(b"\n")[:-1]
        assert self.process.wait() == -signal.SIGKILL, self._complaints()
        return int(lines[-1]) if lines else self.acknowledged

    def close(self) -> None:
        """Leave nothing behind."""
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self._errors.close()

    def _complaints(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()


@contextmanager
def writing(where: str, **settings: object) -> Iterator[Writer]:
    writer = Writer(where, **settings)  # type: ignore[arg-type]
    try:
        yield writer
    finally:
        writer.close()


def entries_after(ledger: Ledger, acknowledged: int) -> int:
    """Check a ledger whose writer was killed; the number of its entries."""
    assert verify(ledger).ok
    head = ledger.head()
    bodies = [entry.body for entry in ledger.read()]
    # Event n is entry n: none is missing, none is there twice.
    assert bodies == [body(RiskState(peak=float(number))) for number in range(1, head.seq + 1)]
    assert head.risk == (RiskState(peak=float(head.seq)) if head.seq else None)
    # One may have been written and not acknowledged yet.
    assert head.seq in (acknowledged, acknowledged + 1)
    return head.seq


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "ledger.db"
    acknowledged = 0
    for kill in range(SQLITE_KILLS):
        with writing(str(path), fsync=("always", "never")[kill % 2]) as writer:
            if kill % 5 == 4:
                # While it starts and opens, or shortly after.
                time.sleep(rng.uniform(0.0, 1.0))
            else:
                writer.wait_for(rng.randrange(1, 400))
                time.sleep(rng.uniform(0.0, 0.01))
            acknowledged = max(acknowledged, writer.kill())
        with closing(open_ledger(str(path))) as ledger:
            # What was written and not acknowledged is there to stay.
            acknowledged = entries_after(ledger, acknowledged)
    assert acknowledged > 1000


def test_a_writer_that_acknowledges_before_it_writes_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with writing(str(path), late=True) as writer:
        writer.wait_for(100)
        acknowledged = writer.kill()
    with closing(open_ledger(str(path))) as ledger, pytest.raises(AssertionError, match="assert"):
        entries_after(ledger, acknowledged)


def test_killed_clients_and_servers_lose_nothing_that_was_acknowledged(postgres_server: RealPostgres) -> None:
    rng = random.Random(8)
    where = postgres_server.new_database()
    acknowledged = 0

    def run(crash: Callable[[Writer], None]) -> None:
        nonlocal acknowledged
        with writing(where) as writer:
            writer.wait_for(rng.randrange(1, 300))
            time.sleep(rng.uniform(0.0, 0.01))
            crash(writer)
            acknowledged = max(acknowledged, writer.kill())
        with closing(open_ledger(where, wait=True)) as ledger:
            acknowledged = entries_after(ledger, acknowledged)

    for kill in range(CLIENT_KILLS):
        run(lambda _: None)
        if kill % (CLIENT_KILLS // SERVER_KILLS) == 2:

            def crash(writer: Writer) -> None:
                before = writer.acknowledged
                postgres_server.kill()
                postgres_server.restart()
                # The same process goes on once it is connected again.
                while writer.acknowledged <= before + 50:
                    writer.wait_for(100)

            run(crash)
    assert acknowledged > 1000
