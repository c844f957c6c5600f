from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from configs import load_config
from data import open_source
from pipeline.cli import app
from pipeline.lock import WorkdirLock

RUNNER = CliRunner()


def detent(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return open_source(load_config("default").data.source).load()


def retrain_on(frame: pd.DataFrame, tmp_path: Path, *extra: str) -> tuple[Result, Path]:
    path, workdir = tmp_path / "bars.csv", tmp_path / "var"
    frame.to_csv(path, index=frame.index.name == "timestamp")
    source = ["--set", "data.source.kind=file", "--set", f"data.source.path={path}"]
    return detent("retrain", "-p", "smoke", "-w", workdir, "-q", *source, *extra), workdir


def written(workdir: Path) -> list[str]:
    allowed = {".lock", "cache"}
    return [path.name for path in workdir.glob("*") if path.name not in allowed] if workdir.exists() else []


@pytest.mark.parametrize("command", [[], ["retrain"], ["backtest"], ["export"], ["bench", "latency"], ["doctor"]])
def test_help_is_there(command: list[str]) -> None:
    result = detent(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = detent("retrain", "--profile", "smoke", "--workdir", tmp_path / "var", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert result.exit_code == 0
    assert plan["windows"]["train"]["rows"] == 1008
    assert plan["stages"][-1] == "registry"
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_is_exit_code_78_with_a_suggestion(tmp_path: Path) -> None:
    result = detent("retrain", "-w", tmp_path / "var", "--set", "mbpo.penalty_coeff=1")
    assert result.exit_code == 78
    assert "penalty_coef" in result.stderr
    assert written(tmp_path / "var") == []


def test_errors_are_json_too_when_asked_for(tmp_path: Path) -> None:
    result = detent("retrain", "-w", tmp_path / "var", "--set", "seed=-1", "--json")
    error = json.loads(result.stdout)
    assert (error["status"], error["exit_code"]) == ("error", 78)
    assert "seed" in error["error"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: frame.drop(columns="high"), "high"),
        (lambda frame: frame.assign(close=frame["close"].where(frame["close"] != frame["close"].iloc[50])), "close"),
        (lambda frame: frame.sample(frac=1.0, random_state=0), "expected a time after"),
        (lambda frame: frame.assign(low=-frame["low"]), "low"),
        (lambda frame: frame.iloc[:0], "empty|at least one|no rows"),
        (lambda frame: frame.iloc[:300], "window needs"),
    ],
    ids=["missing column", "NaN price", "shuffled time", "negative price", "no rows", "too short"],
)
def test_bad_bars_are_exit_code_65_and_leave_nothing_behind(
    bars: pd.DataFrame, tmp_path: Path, spoil: object, message: str
) -> None:
    result, workdir = retrain_on(spoil(bars), tmp_path)  # type: ignore[operator]
    assert result.exit_code == 65, result.output
    assert re.search(message, result.stderr), result.stderr
    assert written(workdir) == []


def test_corrupt_parquet_is_exit_code_65(tmp_path: Path) -> None:
    (tmp_path / "bars.parquet").write_bytes(b"PAR1 not a table PAR1")
    source = ["--set", "data.source.kind=file", "--set", f"data.source.path={tmp_path / 'bars.parquet'}"]
    result = detent("retrain", "-p", "smoke", "-w", tmp_path / "var", "-q", *source)
    assert result.exit_code == 65
    assert "bars.parquet" in result.stderr


def test_a_workdir_below_a_file_is_exit_code_78(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = detent("retrain", "-p", "smoke", "-w", tmp_path / "file" / "var", "-q")
    assert result.exit_code == 78
    assert "file" in result.stderr


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("reward.name=unknown", "reward.name"),
        ("mbpo.ppo.net_arch=[0]", "net_arch"),
        ("tracking.experiment=''", "tracking.experiment"),
        ("tracking.uri=postgresql://me:secret@127.0.0.1/db", "PGPASSWORD"),
    ],
)
def test_settings_that_cannot_work_are_exit_code_78_before_anything_is_trained(
    tmp_path: Path, setting: str, field: str
) -> None:
    result = detent("retrain", "-p", "smoke", "-w", tmp_path / "var", "-q", "--set", setting)
    assert result.exit_code == 78, result.output
    assert field in result.stderr
    assert "secret" not in result.stderr


def test_a_workdir_that_is_a_file_is_exit_code_78(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert detent("retrain", "-p", "smoke", "-w", tmp_path / "file", "-q").exit_code == 78


def test_version_is_printed() -> None:
    assert detent("--version").stdout.strip() == importlib.metadata.version("detent")


def test_a_second_run_in_the_same_workdir_is_exit_code_75(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    with WorkdirLock(tmp_path / "var"):
        result = detent("retrain", "-p", "smoke", "-w", tmp_path / "var", "-q")
    assert result.exit_code == 75


def test_an_unreachable_registry_is_exit_code_69(tmp_path: Path) -> None:
    uri = "tracking.uri=http://127.0.0.1:9"
    result = detent("retrain", "-p", "smoke", "-w", tmp_path / "var", "-q", "--set", uri)
    assert result.exit_code == 69


def test_config_show_schema_and_profiles(tmp_path: Path) -> None:
    shown = detent("config", "show", "--set", "seed=7").stdout
    assert "seed: 7" in shown
    (tmp_path / "own.yaml").write_text(shown)
    assert detent("config", "show", "-p", tmp_path / "own.yaml").stdout == shown
    schema = json.loads(detent("config", "schema").stdout)
    assert schema["properties"]["mbpo"]
    assert detent("config", "profiles").stdout.split() == ["default", "smoke", "suite", "suite-smoke"]


def test_doctor_reports_each_check(tmp_path: Path) -> None:
    report = json.loads(detent("doctor", "-w", tmp_path / "var", "--json").stdout)
    assert {check["name"] for check in report["checks"]} >= {"python", "packages", "workdir", "registry", "data"}


def test_a_bundle_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    result = detent("bench", "latency", "--bundle", tmp_path)
    assert result.exit_code == 65
    assert "manifest.json" in result.stderr
