"""`detent serve` as a process: it answers, follows links to other bundles, and ends in order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from http_processes import environment
from serve_processes import Server, detent_serve, running

from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, DecisionRecord, Mode

WRITE = """
import sys, pathlib, bundle_parts
for seed in (1, 9):
    policy = bundle_parts.make_policy(bundle_parts.make_dynamics(), seed=seed)
    bundle_parts.write(pathlib.Path(sys.argv[1], str(seed)), policy=policy)
"""
FEATURES = {"gap_return": 0.001, "intraday_return": 0.002, "volatility_20": 0.2, "momentum": 0.1}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of one layout."""
    folder = tmp_path_factory.mktemp("bundles")
    parts = str(Path(__file__).parents[1] / "unit")
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, env=environment(parts))
    return folder / "1", folder / "9"


def point(link: Path, target: Path) -> None:
    """Move a link on, as a deployment does: at once."""
    moved = link.with_suffix(".next")
    moved.symlink_to(target)
    os.replace(moved, link)


def hash_of(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text())["bundle_hash"])


def state(server: Server) -> dict[str, Any]:
    status, body = server.ask("GET", "/state")
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def decide(server: Server, event: str) -> dict[str, Any]:
    account = {"equity": 1000.0, "position": 0.0, "holding_time": 10.0}
    body = {"event_id": event, "bar_time": time.time() - 60.0, "features": FEATURES, "account": account}
    status, answer = server.ask("POST", "/decide", body)
    assert status == 200, answer
    record: dict[str, Any] = json.loads(answer)
    return record


def test_it_serves_reloads_refuses_and_ends_in_order(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = bundles
    champion, challenger = tmp_path / "champion", tmp_path / "challenger"
    point(champion, first)
    point(challenger, second)
    bad = Path(shutil.copytree(first, tmp_path / "bad"))
    (bad / "policy.onnx").write_bytes((bad / "policy.onnx").read_bytes()[:-1])
    # Another name of the manifest, or it would be taken for the bundle it was copied from.
    (bad / "manifest.json").write_bytes((bad / "manifest.json").read_bytes() + b"\n")
    ledger = tmp_path / "ledger.db"
    options = ("--challenger", str(challenger), "--watch-seconds", "0.1")
    with running(detent_serve(champion, str(ledger), tmp_path, *options)) as server:
        assert state(server)["challenger"]["hash"] == hash_of(second)
        assert decide(server, "a")["bundle_hash"] == hash_of(first)
        point(champion, second)
        server.wait(lambda: state(server)["bundle"]["hash"] == hash_of(second), "the link is not followed")
        server.wait(lambda: state(server)["challenger"] is None, "the shadow does not end")
        assert decide(server, "b")["bundle_hash"] == hash_of(second)
        point(champion, bad)
        server.wait(lambda: "bundle refused" in server.output(), "the bad bundle is not refused")
        assert decide(server, "c")["bundle_hash"] == hash_of(second)
        server.stop()
    # Free for the next writer, and nothing is missing.
    with closing(SqliteLedger(ledger)) as book:
        records = [entry.record for entry in book.read()]
    live = [one.event_id for one in records if isinstance(one, DecisionRecord) and one.mode is Mode.LIVE]
    shadows = [one.event_id for one in records if isinstance(one, DecisionRecord) and one.mode is Mode.SHADOW]
    assert (live, shadows) == (["a", "b", "c"], ["a"])
    commands = [(one.command, one.detail) for one in records if isinstance(one, ControlRecord)]
    assert [command for command, _ in commands] == ["start", "shadow", "bundle", "shadow", "refused_bundle"]
    assert commands[1][1] == hash_of(second)
    assert commands[4][1].startswith(f"{bad}: manifest.json: expected")


def test_a_second_service_on_one_ledger_is_told_so(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    with running(detent_serve(bundles[0], str(ledger), tmp_path)):
        other = tmp_path / "other"
        other.mkdir()
        second = detent_serve(bundles[0], str(ledger), other)
        second.start()
        assert second.process is not None
        try:
            assert second.process.wait(240) == 69, second.output()
        finally:
            second.close()
    assert "LedgerError" in second.output()
    assert "Traceback" not in second.output()
