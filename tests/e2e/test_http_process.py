"""The service as a process: it stops when told to, after what it began, and refuses to start where it must not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from http_processes import Service, bundle_path, environment, running

from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, DecisionRecord

LOADED = """
import sys, serving.http.server
heavy = sorted({"torch", "stable_baselines3", "mlflow", "gymnasium", "pandas", "matplotlib"} & set(sys.modules))
print(heavy)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_path(tmp_path_factory)


def ask(service: Service, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    request = urllib.request.Request(  # noqa: S310 - loopback
        service.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        answer: dict[str, object] = json.load(response)
        return answer


def decision(event: str) -> dict[str, object]:
    features = {"gap_return": 0.001, "intraday_return": 0.002, "volatility_20": 0.2, "momentum": 0.1}
    return {"event_id": event, "bar_time": 1.7e9, "features": features, "account": {"equity": 1e3, "position": 0.0}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_and_closes_the_ledger(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    ledger = tmp_path / "ledger.db"
    answers: list[dict[str, object]] = []
    with running(bundle, ledger, "--slow", "1.0") as service:
        caller = threading.Thread(target=lambda: answers.append(ask(service, "/decide", decision("last"))))
        caller.start()
        assert service.process.stdout is not None
        assert service.process.stdout.readline() == "deciding\n"
        service.process.send_signal(number)
        caller.join(120)
        assert service.process.stdout.readline() == "closed\n"
        assert service.process.wait(60) == 0
    assert answers[0]["event_id"] == "last"
    # Free for the next writer, and nothing is missing.
    book = SqliteLedger(ledger)
    records = [entry.record for entry in book.read()]
    book.close()
    assert [type(record) for record in records] == [ControlRecord, DecisionRecord]


def test_a_restart_keeps_the_kill_switch(bundle: Path, tmp_path: Path) -> None:
    with running(bundle, tmp_path / "ledger.db") as service:
        ask(service, "/kill", {"person": "Ada", "reason": "a test"})
    with running(bundle, tmp_path / "ledger.db") as service:
        assert ask(service, "/state")["killed"] is True
        assert ask(service, "/decide", decision("after"))["executed"] == 0


def test_an_address_that_is_taken_is_an_error_and_leaves_the_ledger_free(bundle: Path, tmp_path: Path) -> None:
    with running(bundle, tmp_path / "first.db") as service:
        port = service.url.rpartition(":")[2]
        command = [sys.executable, str(Path(__file__).with_name("http_processes.py")), str(bundle)]
        second = subprocess.run(
            [*command, str(tmp_path / "second.db"), "--port", port],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert second.returncode == 1
    assert "Address already in use" in second.stderr
    SqliteLedger(tmp_path / "second.db").close()


def test_serving_stays_light() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED], env=environment(), capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "[]\n"
