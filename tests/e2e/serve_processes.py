"""Decision services that tests kill and start again on one port: `detent serve`, or one with faults to order.

`python serve_processes.py BUNDLE LEDGER PORT FOLDER [--answers-first]` serves with faults: each lasts as long as a
file of its name lies in FOLDER.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from http_processes import OPERATOR, OPERATOR_HEADERS, environment
from services import free_port

from serving import open_bundle
from serving.engine import DecisionEngine
from serving.http.server import HttpServer
from serving.ledger.base import Head, chain
from serving.ledger.sqlite import SqliteLedger
from serving.records import Entry
from serving.settings import Clock, EngineSettings

PATIENCE_S = 120.0
"""Without any progress."""
SLOW_PLANNER, SLOW_POLICY, CLOCK = "slow-planner", "slow-policy", "clock"
"""Faults: graphs that do not come to an end, and a clock that is ahead by the seconds that its file holds."""
LATE_MS = 1500.0
"""Of policy and planner where faults are to order; a busy machine is faster."""


class Server:
    """A service with a port and a log that it keeps over restarts."""

    def __init__(self, command: list[str], folder: Path, port: int, **variables: str) -> None:
        self.port, self._command, self._variables = port, command, variables
        self._log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers some time later."""
        with self._log.open("ab") as log:
            variables = {**environment(), "DETENT_OPERATOR_TOKEN": OPERATOR, **self._variables}
            self.process = subprocess.Popen(self._command, env=variables, stdout=log, stderr=log, cwd=self._log.parent)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM. Returns once it has ended in order."""
        assert self._end(signal.SIGTERM) == 0, self.output()

    def close(self) -> None:
        """Leave no process behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait(self, condition: Callable[[], Any], complaint: str) -> None:
        """Until something is true, as long as the process runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, f"the service ended by itself:\n{self.output()}"
            assert time.monotonic() < deadline, f"{complaint}:\n{self.output()}"
            time.sleep(0.01)

    def wait_until_ready(self) -> None:
        """Until it answers."""

        def ready() -> bool:
            try:
                return self.ask("GET", "/v2/health/ready")[0] == 200
            except OSError:
                return False

        self.wait(ready, "it does not answer")

    def ask(self, method: str, path: str, body: bytes | dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of one answer. Raises: OSError where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            text = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, text, OPERATOR_HEADERS)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(repr(error)) from error
        finally:
            connection.close()

    def output(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        assert self.process.poll() is None, f"the service ended by itself:\n{self.output()}"
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, ready, and gone afterwards."""
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def detent_serve(bundle: Path, ledger: str, folder: Path, *more: str) -> Server:
    """`detent serve`, which holds for no reason but the rules: a busy machine is none."""
    port = free_port()
    patient = [word for name in ("inference", "decision", "timeout") for word in (f"--{name}-ms", "60000")]
    options = ["--bundle", str(bundle), "--workdir", str(folder), "--port", str(port), *patient, *more]
    command = [sys.executable, "-m", "pipeline.cli", "serve", *options]
    return Server(command, folder, port, DETENT_LEDGER=ledger)


def faulty_server(bundle: Path, ledger: Path, folder: Path, *more: str) -> Server:
    """One with faults to order."""
    port = free_port()
    return Server([sys.executable, __file__, str(bundle), str(ledger), str(port), str(folder), *more], folder, port)


# --- faults -----------------------------------------------------------------------------------------------


class WritesLater(SqliteLedger):
    """Wrong: an entry is acknowledged before it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._end = super().head()
        self._waiting: SimpleQueue[tuple[bytes, str | None] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_waiting, daemon=True)
        self._writer.start()

    def head(self) -> Head:
        return self._end

    def append(self, body: bytes, *, event_id: str | None = None) -> Entry:
        entry = Entry(self._end.seq + 1, body, chain(self._end.hash, body))
        self._end = Head(entry.seq, entry.hash, entry.record.risk)
        self._waiting.put((body, event_id))
        return entry

    def close(self) -> None:
        """In order: what waits is written."""
        self._waiting.put(None)
        self._writer.join()
        super().close()

    def _write_waiting(self) -> None:
        while (entry := self._waiting.get()) is not None:
            body, event_id = entry
            time.sleep(0.02)
            super().append(body, event_id=event_id)


class Hanging:
    """A graph that does not come to an end while a file is there."""

    def __init__(self, session: Any, fault: Path) -> None:
        self._session, self._fault = session, fault

    def run(self, *arguments: Any) -> Any:
        while self._fault.exists():
            time.sleep(0.005)
        return self._session.run(*arguments)


def shifted_clock(fault: Path) -> Clock:
    """The clock of this machine, and what a file says it is ahead."""

    def wall() -> float:
        return time.time() + (float(fault.read_text()) if fault.exists() else 0.0)

    return Clock(wall=wall)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers-first", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    bundle = open_bundle(arguments.bundle)
    bundle = dataclasses.replace(
        bundle,
        policy_session=Hanging(bundle.policy_session, folder / SLOW_POLICY),
        planner_session=Hanging(bundle.planner_session, folder / SLOW_PLANNER),
    )
    ledger = (WritesLater if arguments.answers_first else SqliteLedger)(arguments.ledger)
    settings = EngineSettings(inference_ms=LATE_MS, decision_ms=LATE_MS, timeout_ms=60_000.0)
    engine = DecisionEngine(bundle, ledger, settings, clock=shifted_clock(folder / CLOCK))
    with closing(engine):
        HttpServer(engine, port=arguments.port).run()


if __name__ == "__main__":
    main()
