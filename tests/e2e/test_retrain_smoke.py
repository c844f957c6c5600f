from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from smoke_runs import SmokeRun, detent, smoke_run

from configs import load_config
from data import DataError
from pipeline.bundle_backtest import backtest_bundle
from pipeline.errors import exit_code_for
from pipeline.retrain import retrain
from pipeline.tracking import Tracker
from serving import OnnxPolicy, open_bundle

POLICIES = {"mbpo", "model_free", "buy_and_hold", "flat", "random_valid"}


def test_a_run_ends_promoted_with_everything_a_script_needs(first_run: SmokeRun) -> None:
    result = first_run.result
    assert first_run.returncode == 0, first_run.stderr
    assert (result["status"], result["exit_code"]) == ("promoted", 0)
    assert Path(result["bundle"]).is_dir()
    assert result["mlflow"]["model_name"] == "detent-policy"
    assert result["mlflow"]["model_version"] == 1
    assert all(gate["passed"] and gate["reason"] for gate in result["gates"])
    assert set(result["metrics"]["policies"]) == {"validation", "test"}
    assert set(result["metrics"]["policies"]["test"]) == POLICIES
    assert {"data", "world model", "mbpo", "export", "registry"} <= set(result["timings_s"])


def test_no_forbidden_action_was_executed_anywhere(first_run: SmokeRun) -> None:
    for by_policy in first_run.result["metrics"]["policies"].values():
        assert {name: metrics["invalid_actions"] for name, metrics in by_policy.items()} == dict.fromkeys(by_policy, 0)


def test_the_run_writes_below_its_workdir_only(first_run: SmokeRun) -> None:
    around = first_run.workdir.parent
    assert sorted(path.name for path in around.iterdir()) == ["home", "tmpdir", "var"]
    assert list((around / "home").rglob("*")) == []
    assert list((around / "tmpdir").rglob("*")) == []
    assert not list(first_run.workdir.rglob(".tmp-*"))


def test_tracking_holds_config_metrics_plots_and_bundle(first_run: SmokeRun) -> None:
    result = first_run.result
    tracker = Tracker(None, "detent-smoke", first_run.workdir)
    record = tracker.find_finished(result["run_key"])
    assert record is not None
    assert record.run_id == result["mlflow"]["run_id"]
    assert record.params["mbpo.penalty_coef"] == "0.5"
    assert record.tags["data_hash"] == result["data_hash"]
    assert "policies/validation/mbpo/sharpe" in record.metrics
    assert "mbpo/imagined_raw_reward" in record.metrics
    artifacts = {path.name for path in first_run.workdir.rglob("artifacts/**/*") if path.is_file()}
    plots = {"equity_validation.png", "equity_test.png", "mask_reasons_validation.png", "calibration.png"}
    assert plots | {"rollout_fan.png", "latency.png", "config.yaml", "report.json", "policy.onnx"} <= artifacts
    champion = tracker.champion()
    assert champion is not None
    assert champion.version == result["mlflow"]["model_version"]
    assert champion.tags["bundle_hash"] == result["bundle_hash"]


def test_the_registered_bundle_is_the_one_on_disk_and_decides(first_run: SmokeRun, tmp_path: Path) -> None:
    tracker = Tracker(None, "detent-smoke", first_run.workdir)
    bundle = open_bundle(tracker.fetch_bundle(1, tmp_path / "fetched"), first_run.result["bundle_hash"])
    policy = OnnxPolicy(bundle)
    states = bundle.golden.state
    decisions = policy.decide(states)
    assert decisions.action_masks[np.arange(len(states)), decisions.actions].all()
    assert not decisions.overridden.any()


def test_running_again_is_already_done(first_run: SmokeRun) -> None:
    again = smoke_run(first_run.workdir)
    assert again.returncode == 11
    assert again.result["status"] == "already_done"
    assert again.result["mlflow"] == first_run.result["mlflow"]
    for key in ("bundle", "bundle_hash", "gates", "metrics", "timings_s"):
        assert again.result[key] == first_run.result[key]


def test_a_killed_run_continues_and_ends_in_the_same_bundle(first_run: SmokeRun, tmp_path: Path) -> None:
    # Equal seed and config in another workdir, killed in the middle of training: same hash, bit for bit.
    workdir = tmp_path / "var"
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "-p", "smoke", "-w", str(workdir), "-q"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(workdir.glob("runs/*/mbpo_training.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(workdir.glob("runs/*/mbpo.safetensors")), "the policy was finished before the run could be killed"
    finished = [next(workdir.glob(f"runs/*/{name}")) for name in ("world_model", "model_free.safetensors")]
    modified = [path.stat().st_mtime_ns for path in finished]
    resumed = smoke_run(workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert [path.stat().st_mtime_ns for path in finished] == modified
    assert not list(workdir.glob("runs/*/*_training.safetensors"))
    assert resumed.result["bundle_hash"] == first_run.result["bundle_hash"]
    champion = Tracker(None, "detent-smoke", workdir).champion()
    assert champion is not None
    assert champion.version == 1


def test_an_interrupted_force_is_continued_by_the_next_start(first_run: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(first_run.workdir / "runs", workdir / "runs")
    assert int(retrain(load_config("smoke"), workdir).exit_code) == 0
    run = Path(first_run.result["bundle"]).parent.name
    for name in ("report.json", "mbpo.safetensors"):
        (workdir / "runs" / run / name).unlink()
    (workdir / "runs" / run / ".tmp-1-stray").mkdir()
    result = retrain(load_config("smoke"), workdir)
    assert (int(result.exit_code), result.bundle_hash) == (0, first_run.result["bundle_hash"])
    assert not list(workdir.rglob(".tmp-*"))


def test_sigterm_ends_with_one_json_object_and_exit_code_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "-p", "smoke", "-w", str(tmp_path / "var"), "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not list(tmp_path.glob("var/runs/*/replay")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(output)["status"] == "interrupted"


def test_what_ran_before_in_a_workdir_does_not_change_a_bundle(first_run: SmokeRun, tmp_path: Path) -> None:
    small = ["export.planner=true", "planner.horizon=1", "planner.scenarios=4"]
    config = load_config("smoke", ["seed=4", *small])
    alone = retrain(config, tmp_path / "var")
    assert retrain(config, first_run.workdir).bundle_hash == alone.bundle_hash
    # The planner was proved, walked and timed like the policy.
    assert alone.parity["plans"] > 500
    for by_policy in alone.policies.values():
        assert set(by_policy) == POLICIES | {"mbpo_planner"}
        assert by_policy["mbpo_planner"].invalid_actions == 0
    assert alone.latency["planner_hot"]["count"] == config.export.latency_decisions
    assert alone.latency["p99_ms"] >= alone.latency["planner_hot"]["p99_ms"]
    metrics = backtest_bundle(tmp_path / "var" / "runs" / alone.run_key[:16] / "bundle", config, "test")[1]
    assert metrics["bundle_planner"].sharpe == pytest.approx(alone.policies["test"]["mbpo_planner"].sharpe, abs=1e-4)


def test_gates_that_fail_keep_the_champion_with_exit_code_10(first_run: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(first_run.workdir, workdir)
    settings = load_config("smoke", ["gates.min_sharpe=50", "seed=1"])
    # A copied workdir still names the old one in its database, so this run gets a fresh one.
    for path in (workdir / "mlflow.db", workdir / "artifacts"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = retrain(settings, workdir)
    assert int(result.exit_code) == 10
    assert [gate.name for gate in result.gates if not gate.passed] == ["sharpe"]
    tracker = Tracker(None, "detent-smoke", workdir)
    assert tracker.champion() is None
    challenger = tracker.version("challenger")
    assert challenger is not None
    assert "sharpe" in challenger.tags["gate"]


def test_a_disk_that_fills_up_at_the_bundle_leaves_none_and_no_version(
    first_run: SmokeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(first_run.workdir / "runs", workdir / "runs")
    run = workdir / "runs" / Path(first_run.result["bundle"]).parent.name
    shutil.rmtree(run / "bundle")
    (run / "report.json").unlink()
    rename = os.rename

    def full(source: Any, destination: Any) -> None:
        if Path(destination).name == "bundle":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left") as raised:
        retrain(load_config("smoke"), workdir)
    assert int(exit_code_for(raised.value)) == 69
    assert not (run / "bundle").exists()
    assert not list(workdir.rglob(".tmp-*"))
    tracker = Tracker(None, "detent-smoke", workdir)
    assert tracker.version("challenger") is None
    assert tracker.find_finished(first_run.result["run_key"]) is None

    monkeypatch.undo()
    assert retrain(load_config("smoke"), workdir).bundle_hash == first_run.result["bundle_hash"]


def test_another_market_never_replaces_the_champion(first_run: SmokeRun, tmp_path: Path) -> None:
    before = Tracker(None, "detent-smoke", first_run.workdir).champion()
    result = retrain(load_config("smoke", ["data.source.symbol=nasdaq"]), first_run.workdir)
    assert [gate.name for gate in result.gates if not gate.passed] == ["champion"]
    assert "sp500 at 252 bars per year" in next(gate.reason for gate in result.gates if gate.name == "champion")
    after = Tracker(None, "detent-smoke", first_run.workdir).champion()
    assert before is not None
    assert after is not None
    assert after.version == before.version


def test_a_second_challenger_is_compared_with_the_champion(first_run: SmokeRun) -> None:
    champion = Tracker(None, "detent-smoke", first_run.workdir).champion()
    assert champion is not None
    result = retrain(load_config("smoke", ["seed=2"]), first_run.workdir)
    gate = next(gate for gate in result.gates if gate.name == "champion")
    assert "over the champion" in gate.reason
    tracker = Tracker(None, "detent-smoke", first_run.workdir)
    previous = tracker.version("previous")
    assert previous is not None
    assert previous.version == champion.version
    assert not (first_run.workdir / "champion").exists()


def test_a_champion_that_does_not_open_is_named_and_replaced(first_run: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(first_run.workdir / "runs", workdir / "runs")
    assert retrain(load_config("smoke"), workdir).model_version == 1
    for policy in (workdir / "artifacts").rglob("bundle/policy.onnx"):
        policy.write_bytes(policy.read_bytes()[:-1])
    result = retrain(load_config("smoke", ["seed=3"]), workdir)
    gate = next(gate for gate in result.gates if gate.name == "champion")
    assert gate.passed
    assert "version 1 does not open" in gate.reason
    assert (int(result.exit_code), result.model_version) == (0, 2)


def test_a_damaged_checkpoint_is_bad_data_and_force_computes_it_again(first_run: SmokeRun, tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    shutil.copytree(first_run.workdir / "runs", workdir / "runs")
    for weights in workdir.glob("runs/*/mbpo.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"mbpo\.safetensors.*--force") as raised:
        retrain(load_config("smoke"), workdir)
    assert int(exit_code_for(raised.value)) == 65
    assert retrain(load_config("smoke"), workdir, force=True).bundle_hash == first_run.result["bundle_hash"]


def test_bench_latency_writes_its_report_and_judges_the_budget(first_run: SmokeRun, tmp_path: Path) -> None:
    bundle, report = first_run.result["bundle"], tmp_path / "latency.json"
    options = ["--bundle", bundle, "--decisions", "200"]
    done = detent("bench", "latency", *options, "--json", report, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entries = json.loads(report.read_text())
    assert entries["decide_hot"]["count"] == 200
    assert entries["machine"]
    assert detent("bench", "latency", *options, "--budget-ms", "0.001", cwd=tmp_path).returncode == 1


def test_backtest_of_the_bundle_gives_the_metrics_of_the_run(first_run: SmokeRun, tmp_path: Path) -> None:
    plot, path = tmp_path / "equity.png", tmp_path / "path.csv"
    options = ["--bundle", first_run.result["bundle"], "--profile", "smoke", "--plot", plot, "--csv", path, "--json"]
    done = detent("backtest", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    reported = first_run.result["metrics"]["policies"]["test"]
    assert metrics["bundle"]["sharpe"] == pytest.approx(reported["mbpo"]["sharpe"], abs=1e-4)
    assert metrics["buy_and_hold"]["sharpe"] == reported["buy_and_hold"]["sharpe"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert path.read_text().startswith("timestamp,equity")


def test_export_of_a_finished_run_gives_the_same_bundle(first_run: SmokeRun, tmp_path: Path) -> None:
    run = Path(first_run.result["bundle"]).parent.name
    destination = tmp_path / "bundle"
    done = detent("export", destination, "--workdir", first_run.workdir, "--run", run, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle_hash"] == first_run.result["bundle_hash"]
    assert detent("export", destination, "--workdir", first_run.workdir, cwd=tmp_path).returncode == 78
