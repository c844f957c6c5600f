"""A decision service in a process of its own on loopback, as `serve` runs it.

`python http_processes.py BUNDLE LEDGER` serves until SIGTERM and prints its address first; with `--slow SECONDS` each
decision takes that long.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving import open_bundle
from serving.engine import DecisionEngine
from serving.http.server import HttpServer
from serving.ledger.sqlite import SqliteLedger
from serving.records import DecisionRecord, DecisionRequest
from serving.settings import EngineSettings

WRITE_BUNDLE = """
import sys, pathlib, bundle_parts
bundle_parts.write_planned(pathlib.Path(sys.argv[1]))
"""
OPERATOR = "operator-token-0123456789"
OPERATOR_HEADERS = {"content-type": "application/json", "authorization": f"Bearer {OPERATOR}"}
# A busy machine is no reason to hold.
PATIENT = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)


class SlowEngine(DecisionEngine):
    """Takes its time."""

    seconds = 0.0

    def decide(self, request: DecisionRequest, *, body: bytes | None = None) -> DecisionRecord:
        say("deciding")
        time.sleep(self.seconds)
        return super().decide(request, body=body)


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")


def bundle_path(factory: pytest.TempPathFactory) -> Path:
    """A bundle with a planner, written once per test process."""
    path = factory.getbasetemp() / "http-bundle"
    if not path.exists():
        parts = str(Path(__file__).parents[1] / "unit")
        subprocess.run([sys.executable, "-c", WRITE_BUNDLE, str(path)], check=True, env=environment(parts))
    return path


def environment(*paths: str) -> dict[str, str]:
    """Of a process that finds the packages that this one finds."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("DETENT_")}
    return {**own, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, sys.path)])}


@contextmanager
def running(bundle: Path, ledger: Path, *more: str, tokens: Mapping[str, str] | None = None) -> Iterator[Service]:
    """A service until the end of the block; whoever ended it before is fine too."""
    command = [sys.executable, __file__, str(bundle), str(ledger), *more]
    env = {**environment(), **(tokens or {})}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), "the service did not start"
            yield Service(url, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    SlowEngine.seconds = arguments.slow
    kind = SlowEngine if arguments.slow else DecisionEngine
    engine = kind(open_bundle(arguments.bundle), SqliteLedger(arguments.ledger), PATIENT)
    with closing(engine):
        HttpServer(engine, port=arguments.port).run(say)
    # Whoever has it open for writing keeps others out.
    SqliteLedger(arguments.ledger).close()
    say("closed")


if __name__ == "__main__":
    main()
