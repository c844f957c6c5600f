"""The way into MLflow: silent, offline unless told otherwise, quick to give up, and safe to kill.

Importing MLflow costs one to three seconds and about 200 MB, so nothing here imports it at module level. Four
habits of MLflow 3.17 are worked around:

* It prints migrations, progress bars and run links, and reports usage to its makers: switched off by
  environment variables, each only where the user has not set it.
* It retries for minutes: HTTP gets fewer retries, and a database is probed before MLflow sees it, because its
  own ten attempts cannot be configured.
* It builds a new SQLite file table by table. Killed half-way, that file can never be opened again. We build it
  in a temporary directory and rename it into place.
* Its errors for "server away" and for "wrong argument" are one class; `translated` tells them apart.
"""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from configs.errors import ConfigError
from data.files import atomic_write_bytes
from pipeline.errors import TrackingUnavailable
from pipeline.lock import create_workdir

CONNECT_TIMEOUT_S = 5.0

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    # 3 attempts of at most 10 s with pauses of about 2 and 4 s; MLflow's own 7 x 120 s take a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# Codes of an MlflowException that speak of the service, not of the request.
_SERVICE_CODES = frozenset(
    {
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "IO_ERROR",
        "ENDPOINT_NOT_FOUND",
        "REQUEST_LIMIT_EXCEEDED",
        "DEADLINE_EXCEEDED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "CUSTOMER_UNAUTHORIZED",
    }
)


def open_client(uri: str) -> Any:
    """An `MlflowClient` whose tracking and registry are both at `uri`, with a database that is known to answer.

    Raises: ConfigError for a URI that MLflow cannot use at all; TrackingUnavailable where the service is away.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with translated(uri):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        _probe(uri)
        try:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError(
                f"tracking.uri: expected sqlite:///, postgresql:// or http(s)://, was "
                f"{without_password(uri)!r} ({_short(error)})"
            ) from error
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracking.uri: expected an installed driver for {without_password(uri)!r}, "
                f"was missing: pip install the package that provides {error.name!r}"
            ) from error


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn "the service is away" into TrackingUnavailable; let mistakes in the request through unchanged."""
    with warnings.catch_warnings():
        # MLflow's own use of what its dependencies deprecate (SQLAlchemy 2.1: `noload`) is not ours to mend and
        # must not become an error where warnings are errors. Only warnings attributed to these packages.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(mlflow|alembic|sqlalchemy)\b")
        import requests
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import DBAPIError

        try:
            yield
        except MlflowException as error:
            if error.error_code not in _SERVICE_CODES:
                raise
            raise _unavailable(uri, error) from error
        except (requests.RequestException, DBAPIError) as error:
            raise _unavailable(uri, error) from error


def without_password(text: str) -> str:
    """The text with `user:password@` in any URL replaced by `***@`."""
    return re.sub(r"//[^/@\s'\"]*@", "//***@", text)


def local_uri(workdir: Path) -> str:
    """Database that a work directory uses where no URI is configured."""
    return f"sqlite:///{workdir.resolve() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path:
    """File behind a `sqlite:///...` URI. Raises: ConfigError where it names none."""
    from sqlalchemy import make_url

    name = make_url(uri).database
    if not name or name == ":memory:":
        raise ConfigError(f"tracking.uri: expected a SQLite file, was {uri!r}, which forgets every run")
    return Path(name).absolute()


def _unavailable(uri: str, error: Exception) -> TrackingUnavailable:
    return TrackingUnavailable(
        f"tracking.uri: expected a service that answers at {without_password(uri)}, was: {_short(error)}"
    )


def _short(error: Exception) -> str:
    return without_password(" ".join(str(error).split()))[:300]


def _probe(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"tracking.uri: expected a URI, was {without_password(uri)!r} ({error})") from error
    dialect = parts.scheme.partition("+")[0]
    if dialect == "sqlite":
        _probe_sqlite(uri)
    # HTTP is not probed: it may go through a proxy, and its retries obey the environment.
    elif dialect in _DEFAULT_PORTS and parts.hostname:
        address = (parts.hostname, port or _DEFAULT_PORTS[dialect])
        try:
            socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _unavailable(uri, error) from error


def _probe_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if not path.exists():
        _create_sqlite(path)
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise _unavailable(uri, error) from error


def _create_sqlite(path: Path) -> None:
    from mlflow import MlflowClient

    # First, so that a directory that cannot be written is reported as such, before a second is spent.
    create_workdir(path.parent)
    with tempfile.TemporaryDirectory(prefix="detent-mlflow-") as scratch:
        draft = Path(scratch) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{draft}", registry_uri=f"sqlite:///{draft}")
        # A copy, because MLflow keeps its connection to the draft open until the process ends.
        content = draft.read_bytes()
        if not path.exists():
            atomic_write_bytes(path, content)
