"""Benchmarks of planners on the command line: all of it runs, peers that are absent say so, and missed goals count."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from planner_reports import entry, speed_report
from typer.testing import CliRunner, Result

from benchmarks import planner_quality, planner_speed
from benchmarks.peer_planning import PEERS
from benchmarks.planner_plans import PlanQuality
from benchmarks.planner_tasks import TREE
from data import atomic_write_json
from pipeline.cli import app
from pipeline.cli_output import stdout


def bench(*arguments: str | Path) -> Result:
    # Whatever the width was when the console was made.
    with mock.patch.object(stdout, "_width", 200):
        return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("planner")
    python = folder / "python"
    # -I: no PYTHONPATH, which may hold a checkout of a peer
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$@"\n')
    python.chmod(0o755)
    report = folder / "report.json"
    result = bench("planner", "--smoke", "--peers", "--peer-python", python, "--json", report)
    return result, json.loads(report.read_text()) if report.exists() else {}


def test_every_planner_is_exported_and_timed_in_smoke(smoke: tuple[Result, dict[str, Any]]) -> None:
    result, written = smoke
    assert result.exit_code == 0, result.output
    assert set(written["entries"]) == {
        "policy",
        "policy, network alone",
        "policy, sb3-contrib",
        "tree",
        "tree, products alone",
        "tree, plain torch",
        "deep tree",
        "deep tree, products alone",
        "cem",
        "cem, products alone",
        "scenarios",
        "scenarios, all kinds of rows",
        "scenarios, default",
    }
    for one in written["entries"].values():
        assert (one["hot"]["whole"]["count"], one["paced"]["whole"]["count"]) == (20, 10)
        assert len(one["hot"]["block_p50_ms"]) == len(one["paced"]["block_p99_ms"]) == written["blocks"] == 10
        assert 0 < one["hot"]["whole"]["p50_ms"] <= one["hot"]["whole"]["p99_ms"]
    for shown in ("world, all 3^1 sequences", "sb3-contrib predict", "its matrix products alone", "15 x policy"):
        assert shown in result.stdout
    plans = written["plans"]
    assert plans["tree"]["value"] >= plans["cem"]["value"] > plans["random sequences"]["value"]


def test_a_peer_that_is_absent_is_named_with_the_reason(smoke: tuple[Result, dict[str, Any]]) -> None:
    result, written = smoke
    assert "mbrl-lib" in written["absent"]
    # Others may be installed here.
    assert {name.split(", ")[0] for name in written["peers"]} | set(written["absent"]) == set(PEERS)
    assert "mbrl-lib is absent: ModuleNotFoundError: No module named" in result.stdout


def test_missed_goals_are_named_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measured(**options: Any) -> planner_speed.PlannerSpeedReport:
        asked.update(options)
        return speed_report(entries={TREE: entry(0.9)})

    monkeypatch.setattr(planner_speed, "measure_planner_speed", measured)
    result = bench("planner", "--calls", "300", "--paced-calls", "20", "--peer-calls", "30")
    assert result.exit_code == 1
    assert "tree: p50, ms: expected at most 0.8, was 0.9" in result.stderr
    asked.pop("progress")
    assert asked == {"calls": 300, "paced_calls": 20, "peer_calls": 30, "peers": (), "peer_python": None}
    # The numbers of a smoke run mean nothing.
    assert bench("planner", "--smoke").exit_code == 0
    monkeypatch.setattr(planner_speed, "measure_planner_speed", lambda **options: speed_report())
    assert bench("planner").exit_code == 0


def test_peers_stand_beside_ours_with_what_their_plans_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"mctx, 50 simulations": PlanQuality(rows=30, value=-0.25, best_value=0.125, best_actions=0.5)}
    report = speed_report(peers={"mctx, 50 simulations": 7.0}, plans=plans)
    monkeypatch.setattr(planner_speed, "measure_planner_speed", lambda **options: report)
    (line,) = [line for line in bench("planner").stdout.splitlines() if "mctx" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "mctx, 50 simulations",
        *("7.00", "7.00", "10.0", "0.9"),
        *("-0.2500", "0.1250", "50%", "30"),
    ]


def test_an_earlier_report_is_compared_and_something_else_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    atomic_write_json(before, speed_report(entries={TREE: entry(0.35)}).to_dict())
    monkeypatch.setattr(planner_speed, "measure_planner_speed", lambda **options: speed_report())
    result = bench("planner", "--compare", before, "--json", after)
    assert result.exit_code == 0, result.output
    assert "same machine, same sizes" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "tree, hot, p50_ms" in line and "deep" not in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["0.350", "0.700", "2.00", "yes"]
    assert json.loads(after.read_text())["comparison"]["series"]["tree, hot, p50_ms"]["ratio"] == 2.0
    (tmp_path / "other.json").write_text("{}")
    for path, message in ((tmp_path / "other.json", "a report of planners"), (tmp_path / "none.json", "No such file")):
        result = bench("planner", "--compare", path)
        assert result.exit_code == 78
        assert "ConfigError: --compare:" in result.stderr
        assert message in result.stderr


def test_policy_and_planners_play_in_smoke_and_every_run_is_kept(tmp_path: Path) -> None:
    result = bench("planner-quality", "--world", "portfolio", "--seeds", "2", "--smoke", "--json", tmp_path / "q.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "q.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [0, 1]
    planner = next(iter(planner_quality.SEARCHES["portfolio"]))
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert set(lines) == {"policy", planner}
    policy, gain, spent = (cell.strip() for cell in lines["policy"].split("│")[2:-1])
    mean = sum(run["scores"]["policy"] for run in written["runs"]) / 2
    assert (policy, gain) == (f"{mean:,.2f}", "-")
    assert float(spent) > 0
    estimate, low, high = written["gains"][planner]
    assert f"{estimate:+,.2f} ({low:+,.2f} to {high:+,.2f})" in lines[planner]
