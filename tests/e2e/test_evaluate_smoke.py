"""`detent evaluate` from the command line to a page in a browser; whatever happens on the way, the numbers stay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from smoke_runs import SmokeRun, detent, isolated_environment

from configs import load_config
from evaluation.verdict import QUESTIONS
from pipeline.evaluate import EXPERIMENT, Evaluated, Job, evaluate_suite, evaluate_walk_forward
from pipeline.tracking import Tracker

FOLDS = (
    "data.split.train_years=2",
    "data.split.validation_years=1",
    "data.split.test_years=0.5",
    "data.split.step_years=0.5",
    "evaluation.walk_forward.learners=[ridge,model_free,mbpo]",
    "evaluation.walk_forward.num_seeds=1",
)
SETTINGS = [part for setting in FOLDS for part in ("--set", setting)]
WALK_FORWARD = ("evaluate", "--profile", "suite-smoke", *SETTINGS, "--jobs", "2", "--json")


def run(folder: Path, *arguments: str) -> SmokeRun:
    done = detent(*arguments, "--workdir", folder / "var", cwd=folder)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    return SmokeRun(folder / "var", done.returncode, json.loads(lines[0]), done.stderr)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The smoke suite, once; tests only read it."""
    return run(tmp_path_factory.mktemp("suite"), "evaluate", "--suite", "smoke", "--jobs", "1", "--json")


@pytest.fixture(scope="module")
def walk_forward(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """Two short folds over the bundled S&P 500, on joblib; tests only read it."""
    return run(tmp_path_factory.mktemp("folds"), *WALK_FORWARD)


def walk_again(workdir: Path, *more: str) -> Evaluated:
    """The same walk-forward in this process, one task after the other."""
    config = load_config("suite-smoke", [*FOLDS, *more])
    return evaluate_walk_forward(config, workdir, Job(engine="serial", track=False), "detent evaluate")


def numbers(path: str | Path, *, clock: bool) -> dict[str, Any]:
    """What a report says; without `clock` whatever was measured in seconds is left out."""
    report = json.loads(Path(path).read_text())
    for section in [report, *report["sections"]]:
        for table in [section["results"]] if "results" in section else section["tables"]:
            timed = {
                field for column in table["columns"] if column["unit"] in ("s", "ms") for field in column["fields"]
            }
            if not clock:
                table["rows"] = [{k: v for k, v in row.items() if k not in timed} for row in table["rows"]]
    return {key: value for key, value in report.items() if key not in ("facts", "reproduce")}


def stored(workdir: Path) -> dict[str, int]:
    """When each result was stored."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("evaluations/cells/[0-9a-f]*/result.json")
    }


# --- the suite ---------------------------------------------------------------------------------------------------


def test_a_suite_ends_with_a_verdict_and_everything_a_script_needs(suite: SmokeRun) -> None:
    result = suite.result
    assert suite.returncode == 0, suite.stderr
    assert (result["status"], result["exit_code"]) == ("evaluated", 0)
    assert result["verdict"]["decision"] in ("GO", "CONDITIONAL", "NO-GO")
    assert [one["name"] for one in result["verdict"]["criteria"]] == [*QUESTIONS]
    assert result["verdict"]["criteria"][-2]["passed"] is True
    assert result["caveats"] == ["Smoke run: its numbers mean nothing."]
    config = load_config("suite-smoke").evaluation.suite
    assert result["by_train_bars"].keys() == {str(bars) for bars in config.train_bars}
    assert result["by_train_bars"][str(config.primary_train_bars)] == result["verdict"]["decision"]
    assert result["tasks"] == {"computed": len(stored(suite.workdir)), "resumed": 0}
    report = json.loads(Path(result["numbers"]).read_text())
    assert report["verdict"] == result["verdict"]
    assert report["reproduce"] == ["detent evaluate --suite smoke"]
    assert result["verdict"]["decision"] in Path(result["summary"]).read_text()
    assert (Path(result["report"]).parent / "config.yaml").is_file()


def test_every_policy_is_in_the_result(suite: SmokeRun) -> None:
    rows = json.loads(Path(suite.result["numbers"]).read_text())["results"]["rows"]
    assert {row["policy"] for row in rows} == {
        *("flat", "buy_and_hold", "random_valid", "vol_target", "linear_signal", "ridge", "oracle", "belief_filter"),
        *("model_free", "sac", "masked_dqn", "mbpo", "mbpo_planner", "planner"),
    }


def test_an_evaluation_writes_below_its_workdir_only(suite: SmokeRun) -> None:
    around = suite.workdir.parent
    assert sorted(path.name for path in around.iterdir()) == ["home", "tmpdir", "var"]
    assert list((around / "home").rglob("*")) == []
    assert list((around / "tmpdir").rglob("*")) == []
    assert not list(suite.workdir.rglob(".tmp-*"))


def test_tracking_holds_settings_decision_metrics_and_the_report(suite: SmokeRun) -> None:
    result = suite.result
    record = Tracker(None, EXPERIMENT, suite.workdir).find_finished(result["run_key"])
    assert record is not None
    assert record.run_id == result["run_id"]
    assert record.tags["decision"] == result["verdict"]["decision"]
    assert record.params["evaluation.verdict.min_sharpe_gain"] == "0.1"
    assert {"gain", "gain_low", "sharpe/mbpo", "max_drawdown/ridge", "killed/flat"} <= record.metrics.keys()
    logged = {path.name for path in suite.workdir.glob(f"artifacts/{result['run_id']}/artifacts/report/**/*")}
    assert {"report.html", "report.json", "summary.md", "config.yaml", "results.csv"} <= logged


def test_the_page_opens_in_a_browser_and_fits_a_phone(suite: SmokeRun, browser: Browser) -> None:
    address = Path(suite.result["report"]).as_uri()
    trouble: list[str] = []
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.on("console", lambda message: trouble.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url[:80]}"))
    page.goto(address, wait_until="load")
    widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    across = page.evaluate("document.documentElement.scrollWidth")
    text = page.inner_text("body")
    page.close()
    report = json.loads(Path(suite.result["numbers"]).read_text())
    assert trouble == []
    assert len(widths) == sum(len(section["figures"]) for section in report["sections"])
    assert min(widths) > 0
    assert across <= 400
    assert suite.result["verdict"]["decision"] in text
    assert text.index("Smoke run: its numbers mean nothing.") < text.index("Next step.")


def test_running_again_reads_everything_back(suite: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(suite.workdir / "evaluations" / "cells", workdir / "evaluations" / "cells")
    before = stored(workdir)
    again = evaluate_suite(load_config("suite-smoke"), workdir, Job(engine="serial", track=False), "detent evaluate")
    assert (again.computed, again.resumed) == (0, len(before))
    assert stored(workdir) == before
    assert again.run_key == suite.result["run_key"]
    assert numbers(again.files.json, clock=True) == numbers(suite.result["numbers"], clock=True)


def test_a_dry_run_writes_nothing_anywhere(tmp_path: Path) -> None:
    done = detent("evaluate", "--suite", "smoke", "--workdir", "var", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "dry_run"
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["home", "tmpdir"]


# --- walk-forward ------------------------------------------------------------------------------------------------


def test_a_walk_forward_over_real_bars_gives_the_same_numbers_on_every_engine(
    walk_forward: SmokeRun, tmp_path: Path
) -> None:
    result = walk_forward.result
    assert walk_forward.returncode == 0, walk_forward.stderr
    assert result["by_train_bars"] == {}
    assert result["caveats"] == ["Smoke run: its numbers mean nothing."]
    sections = {one["title"]: one for one in json.loads(Path(result["numbers"]).read_text())["sections"]}
    assert [figure["name"] for figure in sections["One market looked at closely"]["figures"]] == [
        *("Price and positions", "Masks and choices")
    ]
    assert "World model" in sections
    serial = walk_again(tmp_path / "var")
    assert (serial.computed, serial.resumed) == (result["tasks"]["computed"], 0)
    assert numbers(serial.files.json, clock=False) == numbers(result["numbers"], clock=False)


def test_a_stopped_run_leaves_no_worker_behind_and_goes_on_where_it_was(walk_forward: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    command = [sys.executable, "-m", "pipeline.cli", *WALK_FORWARD, "--workdir", str(workdir)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=isolated_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(stored(workdir)) < 2:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)
    process.terminate()
    # Returns once every holder of the pipes has ended, workers included.
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert json.loads(output) == {"status": "interrupted", "exit_code": 130}
    assert errors.splitlines()[-1].startswith("interrupted; start again to continue")

    before = stored(workdir)
    resumed = walk_again(workdir)
    assert resumed.resumed == len(before)
    assert resumed.computed == walk_forward.result["tasks"]["computed"] - len(before) > 0
    assert {name: stored(workdir)[name] for name in before} == before
    assert numbers(resumed.files.json, clock=False) == numbers(walk_forward.result["numbers"], clock=False)
    assert not list(workdir.rglob(".tmp-*"))


def test_a_damaged_result_is_computed_again_and_changes_no_number(walk_forward: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(walk_forward.workdir / "evaluations" / "cells", workdir / "evaluations" / "cells")
    damaged = next(
        path
        for path in sorted(workdir.glob("evaluations/cells/*"))
        if "ridge" in json.loads((path / "result.json").read_text())["record"]["label"]
    )
    arrays = damaged / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match=f"{damaged.name}: damaged, computing .* again"):
        repaired = walk_again(workdir)
    assert repaired.computed == 1
    assert numbers(repaired.files.json, clock=False) == numbers(walk_forward.result["numbers"], clock=False)


def test_another_market_has_results_of_its_own(walk_forward: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(walk_forward.workdir / "evaluations" / "cells", workdir / "evaluations" / "cells")
    other = walk_again(workdir, "data.source.symbol=nasdaq", "evaluation.walk_forward.max_folds=1")
    assert other.resumed == 0
    assert other.report.title == "Detent: walk-forward over nasdaq"
    assert other.run_key != walk_forward.result["run_key"]


def test_a_changed_threshold_reads_results_back_and_writes_another_report(
    walk_forward: SmokeRun, tmp_path: Path
) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(walk_forward.workdir / "evaluations", workdir / "evaluations")
    changed = walk_again(workdir, "evaluation.verdict.min_sharpe_gain=0.5")
    assert changed.computed == 0
    assert changed.findings.main.claim.verdict.criterion("sharpe_point").threshold == 0.5
    assert len(list(workdir.glob("evaluations/walk-forward-*/report.html"))) == 2
