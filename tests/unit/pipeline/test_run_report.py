"""What a person reads at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import ExitCode
from pipeline.report import print_report
from pipeline.result import RetrainResult

COVERAGE = {"50": 0.5, "80": 0.81, "95": 0.95}
SLICE = {
    "nll": 0.9,
    "nll_constant": 1.2,
    "nll_tightest": 1.1,
    "r2_by_group": {"market": 0.3, "signals": 0.1},
    "coverage": COVERAGE,
}
AHEAD = {
    "error": {"gap_return": 0.5, "range": 0.7},
    "error_persistence": {"gap_return": 0.9, "range": 1.1},
    "error_constant": {"gap_return": 0.7, "range": 0.9},
    "coverage": COVERAGE,
    "no_better": ["range"],
}
DRIFT = {"strength": None, "factor": 1.2, "size": 0.05, "size_before": 0.042, "slope": 1.43, "error": 1.07}
TIMES = {"p50_ms": 0.1, "p99_ms": 0.2, "p999_ms": 0.3, "max_ms": 0.4, "count": 100}


def printed(drift: dict[str, Any] | None) -> str:
    result = RetrainResult(ExitCode.PROMOTED, "key", "hash", Path("var"))
    result.world_model = dict.fromkeys(("holdout", "validation", "test"), SLICE)
    result.world_model |= {"fit": {"drift": drift}, "horizons": {"1": AHEAD, "2": AHEAD}}
    result.latency = dict.fromkeys(("session_hot", "decide_hot", "decide_paced"), TIMES) | {
        "calls_per_second": 20,
        "p99_ms": TIMES["p99_ms"],
    }
    console = Console(record=True, width=100, file=None, quiet=False)
    with console.capture() as capture:
        print_report(result, console)
    return " ".join(capture.get().split())


def test_the_report_says_how_good_imagined_bars_are_and_how_large_the_drift_is() -> None:
    said = printed(DRIFT)
    assert "2 0.60 1.00 0.80 50 81 95 1 of 2" in said
    assert "0.042 by training, 0.050 calibrated on validation (slope 1.43 ± 1.07)" in said
    assert "± 1.07, with a penalty of 10 per row)" in printed({**DRIFT, "strength": 10.0})


@pytest.mark.parametrize("drift", [None, {**DRIFT, "error": None}])
def test_a_drift_that_was_not_settled_is_not_mentioned(drift: dict[str, Any] | None) -> None:
    assert "Expected moves" not in printed(drift)
