"""MLflow stays silent and offline, gives up quickly, and its errors say whose fault it is."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from configs.errors import ConfigError
from pipeline.errors import TrackingUnavailable, exit_code_for
from pipeline.mlflow_access import without_password
from pipeline.tracking import Tracker

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections: bound, so that nobody else gets it, but not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that knows of no CI, test or MLflow variable."""
    hidden = ("MLFLOW", "PYTEST", "CI", "GITHUB", "DO_NOT_TRACK", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        cwd=args[0],
    )


# --- silence ----------------------------------------------------------------------------------------------


def test_importing_the_package_loads_neither_mlflow_nor_torch(tmp_path) -> None:
    code = "import sys, pipeline; print(sorted({'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules)))"
    assert python(code, str(tmp_path)).stdout == "[]\n"


def test_a_whole_run_prints_nothing_and_never_opens_a_connection(tmp_path) -> None:
    code = """
import sys, time
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        sys.stderr.write(f"{event} {args[-2:]}\\n")
sys.addaudithook(watch)
from pipeline.tracking import Tracker
tracker = Tracker(None, "quiet", sys.argv[1] + "/var")
run_id = tracker.start("nightly", "key")
tracker.log_params({"seed": 1})
tracker.log_metrics({"sharpe": 0.5})
(bundle := __import__("pathlib").Path("bundle")).mkdir()
(bundle / "manifest.json").write_text("{}")
version = tracker.register(bundle, run_id, "key")
tracker.promote(version)
tracker.fetch_bundle(version, "copy")
tracker.finish()
"""
    done = python(code, str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path)) == ["bundle", "copy", "var"]


# --- creation ---------------------------------------------------------------------------------------------


def test_the_database_is_whole_before_mlflow_opens_it(tmp_path) -> None:
    code = """
import os, sys
path = sys.argv[1] + "/mlflow.db"
def die(event, args):
    # Ends like a kill at the moment at which the file in the work directory is first opened.
    if event == "sqlite3.connect" and path in str(args[0]):
        os._exit(9)
sys.addaudithook(die)
from pipeline.tracking import Tracker
Tracker(None, "killed", sys.argv[1])
"""
    assert python(code, str(tmp_path)).returncode == 9
    assert os.listdir(tmp_path) == ["mlflow.db"]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert len(connection.execute("select version_num from alembic_version").fetchall()) == 1
    connection.close()
    assert Tracker(None, "killed", tmp_path).find_finished("key") is None


# --- errors -----------------------------------------------------------------------------------------------


def test_a_server_that_is_away_is_unavailable_and_its_password_stays_secret(closed_port, workdir, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailable) as caught:
        Tracker(f"http://ann:s3cret@127.0.0.1:{closed_port}", "tests", workdir)
    message = str(caught.value)
    assert message.startswith(f"tracking.uri: expected a service that answers at http://***@127.0.0.1:{closed_port}")
    assert "s3cret" not in message
    assert exit_code_for(caught.value) == 69
    # The user's own setting is stronger than ours.
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_web_server_that_is_not_mlflow_is_unavailable(workdir, monkeypatch) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(TrackingUnavailable, match="404"):
                Tracker(f"http://127.0.0.1:{server.server_port}", "tests", workdir)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc"])
def test_a_database_that_is_away_is_found_out_before_mlflow_retries(scheme, closed_port, workdir) -> None:
    with pytest.raises(TrackingUnavailable, match=r"refused") as caught:
        Tracker(f"{scheme}://ann:s3cret@127.0.0.1:{closed_port}/mlflow", "tests", workdir)
    assert "s3cret" not in str(caught.value)


def test_a_missing_database_driver_is_a_config_error(workdir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"mssql+pyodbc://ann:s3cret@127.0.0.1:{server.getsockname()[1]}/mlflow"
        with pytest.raises(ConfigError, match=r"tracking.uri: expected an installed driver.*'pyodbc'") as caught:
            Tracker(uri, "tests", workdir)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("mongodb://host/x", "expected sqlite:///, postgresql:// or http"),
        ("file:///tmp/mlruns", "expected sqlite:///, postgresql:// or http"),
        ("sqlite://", "expected a SQLite file"),
        ("sqlite:///:memory:", "expected a SQLite file"),
        ("postgresql://host:port/x", "expected a URI"),
    ],
)
def test_a_uri_that_can_never_work_is_a_config_error(uri: str, expected: str, workdir) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        Tracker(uri, "tests", workdir)
    assert exit_code_for(caught.value) == 78


def test_a_file_that_is_no_database_is_unavailable(workdir) -> None:
    (workdir / "mlflow.db").write_bytes(b"not a database, long enough to be looked at" * 10)
    with pytest.raises(TrackingUnavailable, match="file is not a database"):
        Tracker(None, "tests", workdir)


def test_a_file_in_place_of_the_work_directory_is_a_config_problem(tmp_path) -> None:
    (tmp_path / "var").write_text("")
    with pytest.raises(NotADirectoryError, match="was a file") as caught:
        Tracker(None, "tests", tmp_path / "var")
    assert exit_code_for(caught.value) == 78


def test_passwords_are_cut_out_of_any_text() -> None:
    assert without_password("at http://a:b@h:1/x and postgresql://c:d@i/y") == (
        "at http://***@h:1/x and postgresql://***@i/y"
    )
    assert without_password("http://host/path@2") == "http://host/path@2"
