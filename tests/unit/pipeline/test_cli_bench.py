"""Benchmarks on the command line: what is asked for is checked first, and what was measured is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks import ablation, learned_masks, market, training_loop
from configs import load_config
from pipeline.cli import app

BENCHMARKS = (
    ("latency", "--bundle", "none"),
    ("masks",),
    ("joint-limits",),
    ("learned-masks",),
    ("likelihood",),
    ("market",),
    ("training",),
    ("world-model",),
    ("sample-efficiency",),
    ("ablation",),
    ("planner",),
    ("planner-quality",),
    ("serve",),
)


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_learned_masks_in_smoke_keep_their_promise_on_any_seed(tmp_path: Path, seed: int) -> None:
    report = tmp_path / "reports" / "masks.json"
    result = bench("learned-masks", "--smoke", "--seed", str(seed), "--json", report)
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert [world["world"] for world in written["worlds"]] == ["trading sp500", "masked_cartpole"]
    assert written["refused"] == {}


def test_a_promise_that_cannot_be_made_is_a_missed_goal_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_masks, "SMOKE_BUTTONS", 10)  # more than so few episodes can vouch for
    result = bench("learned-masks", "--smoke", "--seed", "0", "--json", tmp_path / "masks.json")
    assert result.exit_code == 1, result.output
    assert "masked_cartpole: learned masks: expected a false-valid rate of at most 0.02" in result.stderr
    assert "Traceback" not in result.output
    assert "trading sp500" in result.stdout
    written = json.loads((tmp_path / "masks.json").read_text())
    assert [world["world"] for world in written["worlds"]] == ["trading sp500"]
    assert list(written["refused"]) == ["masked_cartpole"]


def test_markets_are_timed_in_smoke_and_a_missed_goal_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bench("market", "--smoke", "--json", tmp_path / "market.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "market.json").read_text())
    assert (written["paths"], written["bars"], written["threads"], written["goal_s"]) == (2, 60, 1, 2.0)
    assert all(written[f"{task}_s"] > 0 for task in ("simulate", "beliefs", "oracle", "walk"))
    monkeypatch.setattr(market, "GOAL_S", 0.0)
    measured = market.measure_market(load_config("suite"), paths=1, bars=60, repeats=1)
    assert not measured.within_goal
    monkeypatch.setattr(market, "measure_market", lambda config: measured)
    assert bench("market").exit_code == 1


def test_training_is_timed_in_smoke_and_a_missed_goal_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bench("training", "--smoke", "--truncated", "0.1", "--json", tmp_path / "training.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "training.json").read_text())
    assert (written["num_envs"], written["truncated"], written["threads"]) == (64, 0.1, 1)
    missed = replace(training_loop.measure_training_loop(**training_loop.SMOKE), own_share=0.5)
    monkeypatch.setattr(training_loop, "measure_training_loop", lambda **settings: missed)
    assert bench("training").exit_code == 1


def test_world_models_are_compared_in_smoke_and_every_part_is_kept(tmp_path: Path) -> None:
    result = bench("world-model", "--smoke", "--year", "--json", tmp_path / "speed.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "speed.json").read_text())
    assert set(written) == {"world_model", "year"}
    assert written["world_model"]["shapes"]["transitions"] == 64
    assert written["year"]["epochs"] == 2
    for shown in ("plain torch", "matrix products", "each imagined bar used"):
        assert shown in result.stdout


@pytest.mark.parametrize("command", ["world-model", "planner"])
def test_an_interpreter_for_peers_has_to_exist_and_to_be_used(tmp_path: Path, command: str) -> None:
    for options, message in (
        (("--peer-python", tmp_path / "python"), "--peer-python: expected --peers beside it"),
        (("--peers", "--peer-python", tmp_path / "python"), "--peer-python: expected an interpreter"),
    ):
        result = bench(command, "--smoke", *options)
        assert result.exit_code == 78, result.output
        assert message in result.stderr


def test_real_steps_of_both_learners_are_counted_in_smoke(tmp_path: Path) -> None:
    result = bench(
        "sample-efficiency", "--env", "portfolio", "--smoke", "--seeds", "2", "--known", "--json", tmp_path / "e.json"
    )
    assert result.exit_code == 0, result.output
    assert "fewer real steps than MaskablePPO" in result.stdout
    written = json.loads((tmp_path / "e.json").read_text())
    assert [(run["learner"], run["seed"]) for run in written["runs"]] == [
        ("maskable_ppo", 0),
        ("maskable_ppo", 1),
        ("mbpo", 0),
        ("mbpo", 1),
    ]
    assert written["known"] == ["action_masks", "exogenous", "reward", "transition"]
    assert written["summary"]["mbpo"]["at_marks"]["160"]["estimate"] > 500


def test_parts_of_mbpo_are_judged_in_smoke_and_finished_fits_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("in force", "rewards with luck")
    monkeypatch.setattr(ablation, "VARIANTS", {name: ablation.VARIANTS[name] for name in kept})
    for _ in range(2):
        result = bench("ablation", "--smoke", "--workdir", tmp_path, "--json", tmp_path / "ablation.json")
        assert result.exit_code == 0, result.output
        assert "400 bars, 1 runs, 2 test markets" in result.stdout
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["variant"] for row in written["rows"]] == list(kept)
    assert (written["runs"], written["paths"]) == (1, 2)
    assert len(list((tmp_path / "ablation").iterdir())) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("sample-efficiency", "--env", "pong"), "expected one of 'cartpole'"),
        (("sample-efficiency", "--seeds", "0"), "'--seeds': expected a whole number of at least 1, was '0'"),
        (("planner-quality", "--world", "acrobot"), "expected one of 'masked-cartpole', 'portfolio', was 'acrobot'"),
        (("planner", "--calls", "99"), "'--calls': expected a whole number of at least 100, was '99'"),
        (("learned-masks", "--smoke", "--seed", "-1"), "'--seed': expected a whole number of at least 0, was '-1'"),
        (("masks", "--calls", "99"), "'--calls': expected a whole number of at least 100, was '99'"),
        (("masks", "--calls", "1e3"), "'--calls': expected a whole number of at least 100, was '1e3'"),
        (("latency", "--bundle", "b", "--budget-ms", "0"), "'--budget-ms': expected a number above 0, was '0'"),
        (("latency", "--bundle", "b", "--budget-ms", "inf"), "'--budget-ms': expected a number above 0, was 'inf'"),
        (("latency", "--bundle", "b", "--budget-ms", "fast"), "'--budget-ms': expected a number above 0, was 'fast'"),
    ],
)
def test_an_option_out_of_bounds_is_wrong_usage_and_says_what_it_was(command: tuple[str, ...], message: str) -> None:
    result = bench(*command)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize("command", BENCHMARKS, ids=lambda command: command[0])
def test_a_report_that_could_not_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "was the directory"), (tmp_path / "file" / "report.json", "Not a directory")):
        result = bench(*command, "--json", path)
        assert result.exit_code == 78, result.output
        assert result.stderr.startswith("ConfigError: --json: expected a file")
        assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
