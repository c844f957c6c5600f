"""`detent evaluate` before and after the work: what cannot work is said at once, by field and exit code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from report_worlds import interval, report, verdict
from typer.testing import CliRunner, Result

from benchmarks import folds
from benchmarks.suite import suite_tasks
from benchmarks.tuning import GRIDS
from configs import list_profiles, load_config
from evaluation.report import Column, Table, write_report
from evaluation.report.display import MINUS, MISSING
from pipeline import cli_evaluate
from pipeline.caches import keep_caches_in, no_caches
from pipeline.cli import app
from pipeline.cli_output import emit
from pipeline.evaluate import Evaluated, Job, Tuning, _metrics, departures, evaluate_suite, planned, tune
from pipeline.lock import WorkdirLock

TINY = (
    "evaluation.suite.validation_paths=1",
    "evaluation.suite.validation_bars=60",
    "evaluation.suite.train_bars=[250]",
    "evaluation.suite.primary_train_bars=250",
)
SMOKE = "Smoke run: its numbers mean nothing."
FEW = (
    "evaluation.suite.learners=[ridge,model_free,mbpo]",
    "evaluation.suite.check_learners=[]",
    "evaluation.suite.num_seeds=1",
)


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


# --- usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "huge"), "'standard', 'smoke'"),
        (("--tune", "mbpo"), "expected --suite beside it"),
        (("--suite", "smoke", "--tune", "ridge"), "'model_free', 'sac', 'masked_dqn', 'mbpo'"),
        (("--suite", "smoke", "--profile", "smoke"), "expected none beside --suite"),
        (("--engine", "threads"), "'serial', 'joblib', 'ray'"),
        (("--tune", "nonsense"), "'--tune': expected one of 'model_free', 'sac', 'masked_dqn', 'mbpo', was 'nonsense'"),
        (("--jobs", "0"), "'--jobs': expected a whole number of at least 1, was '0'"),
        (("--jobs", "two"), "'--jobs': expected a whole number of at least 1, was 'two'"),
        (("--suite", "smoke", "--tune", "sac", "--trials", "0"), "'--trials': expected a whole number of at least 1"),
        (("--suite", "smoke", "--tune", "sac", "--runs", "-1"), "of at least 1, was '-1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_exit_code_2_and_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = evaluate(*arguments, "-w", tmp_path / "var")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Value error" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_command_line_are_those_of_the_packages_behind_it() -> None:
    assert get_args(cli_evaluate.Engine) == get_args(folds.Engine)
    assert get_args(cli_evaluate.Learner) == tuple(GRIDS)
    assert get_args(cli_evaluate.Suite) == tuple(cli_evaluate.PROFILES)
    assert set(cli_evaluate.PROFILES.values()) | {cli_evaluate.DEFAULT_PROFILE} <= set(list_profiles())


# --- settings and data that cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("--dry-run",), ()], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("arguments", "overrides", "field"),
    [
        ((), ["evaluation.walk_forward.learners=[model_free,nobody]"], "evaluation.walk_forward.learners"),
        ((), ["evaluation.walk_forward.learners=[mbpo]"], "evaluation.walk_forward.learners"),
        ((), ["evaluation.verdict.challenger=sac"], "evaluation.verdict.challenger"),
        ((), ["reward.name=unknown"], "reward.name"),
        (("--suite", "smoke"), ["evaluation.suite.learners=[nobody]"], "evaluation.suite.learners"),
        (("--suite", "smoke"), ["evaluation.suite.check_learners=[nobody]"], "evaluation.suite.check_learners"),
        (("--suite", "smoke"), ["evaluation.market.duration_days=[0.5,9,9]"], "evaluation.market.duration_days"),
        (("--suite", "smoke"), ["reward.name=unknown"], "reward.name"),
        (("--suite", "smoke"), ["limits.extra_rules=[{rule: nothing}]"], "limits.extra_rules"),
        (("--suite", "smoke", "--tune", "sac"), ["reward.name=unknown"], "reward.name"),
        (("--suite", "smoke", "--tune", "sac", "--trials", "9999"), [], "--trials"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_exit_code_78_before_anything_is_computed(
    tmp_path: Path, arguments: tuple[str, ...], overrides: list[str], field: str, more: tuple[str, ...]
) -> None:
    result = evaluate(*arguments, *settings(*overrides), "-q", "-w", tmp_path / "var", *more)
    assert result.exit_code == 78, result.output
    assert field in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("var/evaluations"))


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["data.split.step_years=0.5"], "data.split.step_years: expected at least test_years=1.5"),
        (["data.split.test_years=30", "data.split.step_years=30"], "window needs"),
    ],
    ids=["overlapping", "too long"],
)
def test_windows_that_overlap_or_do_not_fit_are_exit_code_65(tmp_path: Path, overrides: list[str], field: str) -> None:
    result = evaluate(*settings(*overrides), "-q", "-w", tmp_path / "var", "--json")
    assert result.exit_code == 65, result.output
    assert json.loads(result.stdout)["exit_code"] == 65
    assert field in result.stderr
    assert not list(tmp_path.glob("var/evaluations"))


def test_a_registry_that_is_away_is_exit_code_69_before_anything_is_computed(tmp_path: Path) -> None:
    away = settings("tracking.uri=http://127.0.0.1:9")
    result = evaluate("--suite", "smoke", *away, "-q", "-w", tmp_path / "var")
    assert result.exit_code == 69, result.output
    assert not list(tmp_path.glob("var/evaluations"))


@pytest.mark.parametrize("more", [(), ("--tune", "sac")], ids=["evaluate", "tune"])
def test_a_workdir_that_is_held_is_exit_code_75(tmp_path: Path, more: tuple[str, ...]) -> None:
    with WorkdirLock(tmp_path / "var"):
        assert evaluate("--suite", "smoke", "-q", "-w", tmp_path / "var", *more).exit_code == 75


def test_a_workdir_below_a_file_is_exit_code_78(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert evaluate("--suite", "smoke", "-q", "-w", tmp_path / "file" / "var").exit_code == 78


def test_a_task_that_fails_is_a_bug_with_its_name_and_the_others_are_kept(tmp_path: Path) -> None:
    # A forecast further ahead than the training path is long; nothing else is wrong with these settings.
    config = load_config("suite-smoke", [*TINY, *FEW, "evaluation.ridge.horizons=[5000]"])
    with (
        pytest.warns(RuntimeWarning, match="plain-ridge-250-0 failed, the others go on"),
        pytest.raises(folds.FoldError, match="plain-ridge-250-0") as failed,
    ):
        evaluate_suite(config, tmp_path, Job(engine="serial", track=False), "detent evaluate")
    assert "others are stored" in str(failed.value)
    assert any(planned(config, tmp_path, is_suite=True).values())


def test_an_interrupted_evaluation_says_that_it_can_go_on(tmp_path: Path) -> None:
    # A job started in the background of a shell inherits a SIGINT that is ignored.
    module = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "interrupting.py").write_text(module + "os.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "evaluate", "-w", "var", "--json"]
    done = subprocess.run(
        [*command, *settings("limits.rule_modules=[interrupting]")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert json.loads(done.stdout) == {"status": "interrupted", "exit_code": 130}
    assert done.stderr.splitlines()[-1].startswith("interrupted; start again to continue")


# --- the plan ----------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_every_task_and_which_are_stored_and_writes_nothing(tmp_path: Path) -> None:
    workdir = tmp_path / "var"
    plan = json.loads(evaluate("--suite", "smoke", "-w", workdir, "--dry-run", "--json").stdout)
    tasks = suite_tasks(load_config("suite-smoke"))
    assert (plan["status"], plan["exit_code"]) == ("dry_run", 0)
    assert plan["tasks"] == [{"label": task.label, "stored": False} for task in tasks]
    assert list(tmp_path.iterdir()) == []

    (workdir / "evaluations" / "cells" / tasks[2].key).mkdir(parents=True)
    shown = evaluate("--suite", "smoke", "-w", workdir, "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in shown if line.endswith("(stored)")] == [tasks[2].label]
    assert shown[-1] == f"{len(tasks)} tasks, 1 of them stored"


@pytest.mark.parametrize("more", [("--dry-run",), ()], ids=["dry run", "run"])
def test_a_cluster_without_ray_is_exit_code_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    # None in the table of modules: an import fails as if it were not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    result = evaluate("--suite", "smoke", "--engine", "ray", "-q", "-w", tmp_path / "var", *more)
    assert result.exit_code == 78, result.output
    assert "expected ray to be installed, was absent: pip install 'detent[ray]'" in result.stderr


def test_a_dry_run_of_a_walk_forward_lists_folds_learners_and_runs(tmp_path: Path) -> None:
    fewer = settings("evaluation.walk_forward.max_folds=1", "evaluation.walk_forward.learners=[sac,mbpo]")
    plan = json.loads(evaluate("-p", "suite-smoke", *fewer, "-w", tmp_path / "var", "--dry-run", "--json").stdout)
    assert [task["label"] for task in plan["tasks"]] == [
        "fold 1, references, run 1",
        *(f"fold 1, {learner}, run {run}" for learner in ("sac", "mbpo") for run in (1, 2)),
    ]


def test_a_dry_run_of_a_tuning_lists_its_trials_not_the_suite(tmp_path: Path) -> None:
    options = ("--tune", "sac", "--trials", "3", "--runs", "2")
    plan = json.loads(evaluate("--suite", "smoke", *options, "-w", tmp_path / "var", "--dry-run", "--json").stdout)
    expected = [f"sac, trial {trial}, run {run}" for trial in (1, 2, 3) for run in (1, 2)]
    assert [task["label"] for task in plan["tasks"]] == expected
    assert list(tmp_path.iterdir()) == []


# --- tuning ------------------------------------------------------------------------------------------------------


def test_a_tuning_ends_with_its_trials_and_reads_them_back(tmp_path: Path) -> None:
    options = ("--tune", "sac", "--trials", "1", "--runs", "2", "--engine", "serial", "-q", "--json")
    result = evaluate("--suite", "smoke", *settings(*TINY), *options, "-w", tmp_path / "var")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["status"], found["learner"]) == ("tuned", "sac")
    (trial,) = found["trials"]
    assert trial["settings"] == {}
    assert len(trial["scores"]) == 2
    config = load_config("suite-smoke", TINY)
    assert all(planned(config, tmp_path / "var", is_suite=True, tuning=Tuning("sac", 1, 2)).values())
    (again,) = tune(config, tmp_path / "var", Job(engine="serial"), Tuning("sac", 1, 2))
    assert list(again.scores) == trial["scores"]
    assert again.seconds == trial["seconds"]


# --- what is printed ---------------------------------------------------------------------------------------------


def found(tmp_path: Path, **changes: object) -> Evaluated:
    wide = interval(-0.123, -11.05, 9.64)
    table = Table(
        "Results",
        (
            Column("policy"),
            Column("kind"),
            Column("Sharpe", "per year", "+.2f", interval=True),
            Column("max drawdown", "share", ".1%", interval=True),
            Column("kill switch", "share of paths", ".1%"),
            Column("exposure", "equity", ".2f"),
            Column("decision p99", "ms", ".2f"),
        ),
        (
            ("linear_signal", "rule", wide, interval(0.0891, -1.0, 2.0), 1.0, 0.5, 123.456),
            ("flat", "reference", interval(0.0, math.nan, math.nan), None, math.nan, 0.0, 0.01),
        ),
    )
    changes = {"summary_columns": ("policy", "Sharpe", "max drawdown", "kill switch", "exposure"), **changes}
    shown = report(title="Walk-forward over [bold]mine[/bold]", results=table, verdict=verdict(), **changes)
    claim = SimpleNamespace(verdict=shown.verdict)
    findings = SimpleNamespace(sizes={0: SimpleNamespace(claim=claim)}, main=SimpleNamespace(claim=claim))
    return Evaluated(shown, write_report(shown, tmp_path), findings, "key", 3, 1, None)  # type: ignore[arg-type]


def test_the_verdict_fits_a_terminal_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli_evaluate._print_verdict(found(tmp_path, caveats=("Smoke run: its numbers mean nothing.",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip() == "Walk-forward over [bold]mine[/bold]"
    assert lines[-1] == f"report {tmp_path / 'report.html'}"
    assert max(map(len, lines[:-1])) <= 80
    rows = [line.split() for line in lines]
    assert ["policy", "Sharpe", "max", "drawdown", "kill", "switch"] in rows
    assert ["linear_signal", f"{MINUS}0.12", f"({MINUS}11.05", "to", "+9.64)", "8.9%", "100.0%"] in rows
    assert ["flat", "+0.00", MISSING, MISSING] in rows
    text = " ".join(" ".join(lines).split())
    assert "! Smoke run: its numbers mean nothing. CONDITIONAL b replaces a; Sharpe higher by 0.12." in text
    assert f"✗ Full gain established not met Not established, short by {MINUS}3 (reported, decides nothing) %." in text
    assert "? Decides in time cannot be decided Decision time was not measured." in text


def test_a_walk_forward_shows_the_ratio_that_the_verdict_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = (
        Column("policy"),
        Column("Sharpe of joined folds", "per year", "+.2f"),
        Column("mean Sharpe of a fold", "per year", "+.2f", interval=True),
        Column("max drawdown", "share", ".1%", interval=True),
        Column("kill switch", "share of folds", ".1%"),
    )
    rows = (("linear_signal", 0.77, interval(1.5, 0.1, 2.0), interval(0.05, 0.0, 0.3), 0.0),)
    one = found(tmp_path)
    picked = ("policy", "Sharpe of joined folds", "max drawdown", "kill switch")
    folds = replace(one, report=replace(one.report, results=Table("Results", columns, rows), summary_columns=picked))
    cli_evaluate._print_verdict(folds)
    lines = capsys.readouterr().out.splitlines()
    assert ["policy", "Sharpe", "of", "joined", "folds", "max", "drawdown", "kill", "switch"] in map(str.split, lines)
    assert ["linear_signal", "+0.77", "5.0%", "0.0%"] in map(str.split, lines)


def test_a_verdict_without_a_number_is_still_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit(found(tmp_path).to_dict())
    written = json.loads(capsys.readouterr().out)
    assert written["verdict"]["criteria"][-1]["observed"] is None
    assert written["tasks"] == {"computed": 3, "resumed": 1}
    assert written["by_train_bars"] == {}  # a walk-forward has no training lengths
    assert written["run_id"] is None
    assert written["caveats"] == []


def test_metrics_are_logged_by_training_length_and_only_where_there_is_a_value() -> None:
    def policy(sharpe: float) -> SimpleNamespace:
        values = {"sharpe": sharpe, "max_drawdown": 0.1, "killed": 0.0}
        return SimpleNamespace(metrics={name: np.full((2, 3), value) for name, value in values.items()})

    def size(sharpe: SimpleNamespace | None) -> SimpleNamespace:
        claim = SimpleNamespace(sharpe=sharpe)
        return SimpleNamespace(claim=claim, policies={"mbpo": policy(1.5), "flat": policy(math.nan)})

    decided = SimpleNamespace(interval=interval(0.2, math.nan, 0.5))
    logged = _metrics(SimpleNamespace(sizes={500: size(decided), 1250: size(None)}))  # type: ignore[arg-type]
    policies = {"sharpe/mbpo": 1.5, "max_drawdown/mbpo": 0.1, "killed/mbpo": 0.0}
    policies |= {"max_drawdown/flat": 0.1, "killed/flat": 0.0}
    assert logged == {
        500: pytest.approx({"gain": 0.2, "gain_high": 0.5, **policies}),
        1250: pytest.approx(policies),
    }


def test_the_command_to_reproduce_names_what_changes_the_numbers() -> None:
    command = cli_evaluate._command(None, "my profile.yaml", ["data.source.symbol=nasdaq", "reward.name=n1"])
    assert command == (
        "detent evaluate --profile 'my profile.yaml' --set data.source.symbol=nasdaq --set reward.name=n1"
    )
    assert cli_evaluate._command("smoke", "suite-smoke", []) == "detent evaluate --suite smoke"


# --- caches ------------------------------------------------------------------------------------------------------


def test_caches_and_scratch_files_stay_below_the_workdir(tmp_path: Path) -> None:
    keep_caches_in(tmp_path)
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).is_relative_to(tmp_path)
    code = "import tempfile, matplotlib; print(tempfile.gettempdir(), matplotlib.get_configdir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(Path(place).is_relative_to(tmp_path) for place in done.stdout.split())


def cache_settings() -> list[str | None]:
    return [os.environ.get(name) for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")]


# A fixture that lives longer than a test may have set some; the module finds them as they are.
@pytest.fixture(scope="module")
def before() -> list[str | None]:
    return cache_settings()


@pytest.mark.parametrize("turn", [1, 2])
def test_no_test_inherits_the_caches_of_the_one_before(tmp_path: Path, turn: int, before: list[str | None]) -> None:
    assert (turn, cache_settings()) == (turn, before)
    assert not Path(tempfile.gettempdir()).is_relative_to(tmp_path.parent)
    keep_caches_in(tmp_path)
    assert None not in cache_settings()
    assert Path(tempfile.gettempdir()).is_relative_to(tmp_path)


def test_without_caches_a_setting_of_the_users_own_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    with no_caches():
        scratch = Path(os.environ["MPLCONFIGDIR"])
        assert scratch.is_dir()
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert not scratch.exists()
    monkeypatch.delenv("MPLCONFIGDIR")
    with no_caches():
        pass
    assert "MPLCONFIGDIR" not in os.environ


# --- what is frozen and what is registered -------------------------------------------------------------------------


def test_a_frozen_suite_and_a_walk_forward_under_registered_rules_need_no_caveat() -> None:
    assert departures(load_config("suite"), is_suite=True) == ()
    assert departures(load_config("suite", ["tracking.experiment=mine", "torch_threads=2"]), is_suite=True) == ()
    assert departures(load_config("default", ["data.source.symbol=nasdaq"]), is_suite=False) == ()


def test_a_smoke_run_says_that_its_numbers_mean_nothing() -> None:
    assert departures(load_config("suite-smoke"), is_suite=True) == (SMOKE,)
    assert departures(load_config("smoke"), is_suite=False) == (SMOKE,)
    fewer = ["evaluation.walk_forward.max_folds=2", "data.source.symbol=nasdaq", "seed=3"]
    assert departures(load_config("smoke", fewer), is_suite=False) == (SMOKE,)
    assert departures(load_config("suite-smoke", fewer), is_suite=False) == (SMOKE,)
    assert departures(load_config("suite", fewer), is_suite=False) == ()


def test_a_changed_setting_makes_no_smoke_run_a_real_one() -> None:
    assert departures(load_config("suite-smoke", ["seed=3"]), is_suite=True) == (
        SMOKE,
        "Not the smoke suite: seed 3 instead of 0.",
    )
    registered = ["evaluation.verdict.drawdown_margin=0.99"]
    assert departures(load_config("smoke", registered), is_suite=False) == (
        SMOKE,
        "Not the registered verdict: drawdown_margin 0.99 instead of 0.02.",
    )


def test_changed_settings_and_thresholds_are_named() -> None:
    changed = ("evaluation.verdict.drawdown_margin=0.99", "account.slippage_bps=0")
    assert departures(load_config("suite", changed), is_suite=True) == (
        "Not the frozen suite: account.slippage_bps 0.0 instead of 0.5.",
        "Not the registered verdict: drawdown_margin 0.99 instead of 0.02.",
    )
    assert departures(load_config("default", changed), is_suite=False) == (
        "Not the registered verdict: drawdown_margin 0.99 instead of 0.02.",
    )
    many = [f"mbpo.ppo.{name}" for name in ("n_epochs=7", "gamma=0.5", "ent_coef=0.5", "learning_rate=0.5")]
    (said,) = departures(load_config("suite", ["seed=1", "mbpo.penalty_coef=0.5", *many]), is_suite=True)
    assert said.startswith("Not the frozen suite: seed 1 instead of 0, ")
    assert said.endswith(" and 1 more.")


def test_help_names_the_extra_for_a_cluster() -> None:
    assert "detent[ray]" in "".join(evaluate("--help").output.split()).replace("│", "")


def test_trials_and_runs_without_tune_are_wrong_usage() -> None:
    for option in ("--trials", "--runs"):
        assert evaluate("--suite", "smoke", option, "3").exit_code == 2
