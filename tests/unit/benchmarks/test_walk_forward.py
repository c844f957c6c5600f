from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from suite_worlds import result_of, same

from benchmarks.contenders import Lesson, fit_references, silent
from benchmarks.folds import FoldResult, FoldTask, run_folds
from benchmarks.walk_forward import first_runs, fold_tasks, join_folds, panel_of, plan_folds, work_on_fold
from configs import ConfigError, DetentConfig, load_config
from data import FEATURE_FIELDS, LOOKBACK, DataError, FeatureTable, HistoryError
from evaluation import backtest, metrics_by_path

BARS_PER_YEAR = 50


def config_of(*overrides: str) -> DetentConfig:
    """Folds of 100 training, 50 validation and 40 test bars, at 50 bars a year."""
    return load_config(
        "suite-smoke",
        (
            f"data.bars_per_year={BARS_PER_YEAR}",
            "data.split.train_years=2",
            "data.split.validation_years=1",
            "data.split.test_years=0.8",
            "data.split.step_years=0.8",
            "mbpo.rollout_length=3",
            "evaluation.walk_forward.embargo_bars=5",
            "evaluation.walk_forward.max_folds=null",
            "evaluation.walk_forward.learners=[linear_signal, masked_dqn, mbpo]",
            *overrides,
        ),
    )


CONFIG = config_of()
GAP = LOOKBACK + 3 + 5
NEEDED = 100 + GAP + 50 + GAP + 40


@cache
def table() -> FeatureTable:
    """Two folds and three bars: quiet features of a random walk."""
    rows = NEEDED + 40 + 3
    rng = np.random.default_rng(0)
    values = np.zeros((rows, len(FEATURE_FIELDS)))
    names = [field.name for field in FEATURE_FIELDS]
    for name in ("gap_return", "intraday_return", "ma_distance_120"):
        values[:, names.index(name)] = 0.005 * rng.standard_normal(rows)
    values[:, names.index("volatility_20")] = 0.1
    index = pd.bdate_range("2001-01-01", periods=rows, tz="UTC", name="timestamp")
    return FeatureTable(index, "made-up", FEATURE_FIELDS, values)


@cache
def tasks() -> tuple[FoldTask, ...]:
    return tuple(fold_tasks(CONFIG, table(), "data"))


@cache
def result(label: str) -> FoldResult:
    task = next(one for one in tasks() if one.label == label)
    return result_of(label, work_on_fold(task))


CHEAP = tuple(
    f"fold {fold}, {learner}, run {run}"
    for fold in (1, 2)
    for learner, run in (("references", 1), ("linear_signal", 1), ("linear_signal", 2))
)


def joined(labels: tuple[str, ...] = CHEAP):
    chosen = [next(one for one in tasks() if one.label == label) for label in labels]
    return join_folds([result(label) for label in labels], chosen)


# --- windows -----------------------------------------------------------------------------------------------------


def test_folds_are_purged_embargoed_and_judge_every_bar_once():
    folds = plan_folds(CONFIG, len(table()))
    assert len(folds) == 2
    for fold in folds:
        assert fold.validation.start - fold.train.stop == fold.test.start - fold.validation.stop == GAP
    assert [(fold.test.start, fold.test.stop) for fold in folds] == [
        (len(table()) - 80, len(table()) - 40),
        (len(table()) - 40, len(table())),
    ]
    wider = plan_folds(config_of("evaluation.walk_forward.embargo_bars=6"), len(table()))
    assert wider[-1].validation.start == folds[-1].validation.start - 1
    longer = plan_folds(config_of("mbpo.rollout_length=4"), len(table()))
    assert longer[-1].train.stop == folds[-1].train.stop - 2


def test_only_the_newest_folds_are_kept_where_so_many_are_asked_for():
    every = plan_folds(CONFIG, len(table()))
    assert plan_folds(config_of("evaluation.walk_forward.max_folds=1"), len(table())) == every[-1:]
    assert plan_folds(config_of("evaluation.walk_forward.max_folds=9"), len(table())) == every


def test_test_windows_that_overlap_are_refused():
    overlapping = ("data.split.step_years=0.78",)
    with pytest.raises(HistoryError, match=r"step_years: expected at least test_years=0\.8, .*was 0\.78"):
        plan_folds(config_of(*overlapping), len(table()))
    alone = plan_folds(config_of(*overlapping, "evaluation.walk_forward.max_folds=1"), len(table()))
    assert len(alone) == 1


def test_a_history_without_room_for_a_fold_is_refused():
    assert len(plan_folds(CONFIG, NEEDED)) == 1
    with pytest.raises(HistoryError, match=f"window needs {NEEDED} bars, {NEEDED - 1} available"):
        plan_folds(CONFIG, NEEDED - 1)


def test_windows_that_are_learned_on_never_reach_into_those_judged_later():
    for earlier, later in pairwise(plan_folds(CONFIG, len(table()))):
        assert earlier.train.stop < earlier.validation.start < earlier.test.start < later.test.start
        assert later.train.stop + GAP <= later.validation.start


# --- tasks -------------------------------------------------------------------------------------------------------


def test_every_fold_learner_and_run_is_a_task_and_references_run_once():
    assert len(tasks()) == 2 * (1 + 3 * 2)
    assert len({task.key for task in tasks()}) == len({task.label for task in tasks()}) == len(tasks())
    assert {task.payload[0].seed for task in tasks()} == {0, 1}


def test_learners_that_leave_no_verdict_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.walk_forward\.learners: expected names of"):
        fold_tasks(config_of("evaluation.walk_forward.learners=[ppo]"), table(), "data")
    with pytest.raises(ConfigError, match="to compare with"):
        fold_tasks(config_of("evaluation.walk_forward.learners=[ridge, mbpo]"), table(), "data")


@pytest.mark.parametrize(
    ("override", "data", "changed"),
    [
        ("seed=0", "data", set()),
        ("seed=0", "other bars", {"references", "linear_signal", "masked_dqn", "mbpo"}),
        ("seed=4", "data", {"references", "linear_signal", "masked_dqn", "mbpo"}),
        ("account.commission_bps=2", "data", {"references", "linear_signal", "masked_dqn", "mbpo"}),
        ("evaluation.suite.timed_decisions=31", "data", {"references", "linear_signal", "masked_dqn", "mbpo"}),
        ("evaluation.dqn.gamma=0.5", "data", {"masked_dqn"}),
        ("world_model.batch_size=64", "data", {"mbpo"}),
        ("evaluation.suite.test_paths=5", "data", set()),
    ],
)
def test_a_fold_is_computed_anew_where_something_counts(override, data, changed):
    after = {task.label: task for task in fold_tasks(config_of(override), table(), data)}
    assert {task.identity["learner"] for task in tasks() if task.key != after[task.label].key} == changed


def test_other_windows_are_other_tasks():
    after = fold_tasks(config_of("evaluation.walk_forward.embargo_bars=6"), table(), "data")
    assert not {task.key for task in tasks()} & {task.key for task in after}


# --- work --------------------------------------------------------------------------------------------------------


def test_a_fold_is_walked_over_its_test_window_alone():
    task = next(one for one in tasks() if one.label == "fold 1, references, run 1")
    config, rows, fold, _, _ = task.payload
    assert result(task.label).arrays["buy_and_hold.returns"].shape == (1, 39)
    torn = rows.values.copy()
    torn[fold.test.stop :] = 0.0
    torn[: fold.train.start] = 0.0
    alone = replace(task, payload=(config, replace(rows, values=torn), fold, "references", 0))
    assert same(result_of("torn", work_on_fold(alone)).arrays, result(task.label).arrays)


@pytest.mark.parametrize("learner", ["linear_signal", "masked_dqn"])
def test_what_a_fold_learns_does_not_depend_on_its_test_window(learner):
    task = next(one for one in tasks() if one.label == f"fold 1, {learner}, run 1")
    config, rows, fold, _, number = task.payload
    torn = rows.values.copy()
    torn[fold.test] = np.random.default_rng(5).permutation(torn[fold.test])
    torn[fold.train.stop : fold.validation.start] = 0.0
    torn[fold.validation.stop : fold.test.start] = 0.0
    other = result_of(
        "torn", work_on_fold(replace(task, payload=(config, replace(rows, values=torn), fold, learner, number)))
    )
    notes, torn_notes = (one.values["facts"][learner]["notes"] for one in (result(task.label), other))
    assert notes == torn_notes


def test_policies_of_a_fold_are_chosen_by_reward():
    task = next(one for one in tasks() if one.label == "fold 2, linear_signal, run 1")
    _, rows, fold, _, _ = task.payload
    score = result(task.label).values["facts"]["linear_signal"]["notes"]["validation_score"]
    assert abs(score) < 0.1
    panel = panel_of(rows.rows(fold.validation))
    assert panel.values.shape == (1, 50, len(FEATURE_FIELDS))
    assert panel.timestamps[0] == rows.timestamps[fold.validation.start].tz_localize(None).to_datetime64()


# --- joining -----------------------------------------------------------------------------------------------------


def test_folds_are_joined_in_time_order_and_metrics_stay_apart():
    policies = joined()
    first, second = (result(f"fold {fold}, references, run 1").arrays for fold in (1, 2))
    one = policies["buy_and_hold"]
    assert one.returns.shape == (1, 1, 78)
    assert np.array_equal(
        one.returns[0, 0], np.concatenate((first["buy_and_hold.returns"], second["buy_and_hold.returns"]), 1)[0]
    )
    assert one.metrics["sharpe"].tolist() == [[first["buy_and_hold.sharpe"][0], second["buy_and_hold.sharpe"][0]]]
    assert (one.paths, one.train_bars) == (1, 0)
    assert policies["linear_signal"].returns.shape == (2, 1, 78)
    assert policies["linear_signal"].metrics["max_drawdown"].shape == (2, 2)


def test_the_first_runs_are_joined_over_folds_and_the_newest_shows_its_masks():
    labels = [f"fold {fold}, linear_signal, run {run}" for fold, run in ((2, 2), (2, 1), (1, 2), (1, 1))]
    chosen = [next(one for one in tasks() if one.label == label) for label in labels]
    results = [result(label) for label in labels]
    for one, values in zip(results, (0.1, 0.2, 0.3, 0.4), strict=True):
        rows = 10 if "fold 2" in one.label else 30
        one.arrays["linear_signal.pit"] = np.full((rows, 3), values, np.float32)
        one.arrays["linear_signal.coverage"] = np.full(3, values)
    try:
        found = first_runs(results, chosen)["linear_signal"]
    finally:
        for one in results:
            del one.arrays["linear_signal.pit"], one.arrays["linear_signal.coverage"]
    first, second = (result(f"fold {fold}, linear_signal, run 1").arrays for fold in (1, 2))
    positions = [arrays["linear_signal.position"] for arrays in (first, second)]
    assert np.array_equal(found["position"], np.concatenate(positions))
    assert found["position"].shape == (80,)
    assert np.array_equal(found["actions"], second["linear_signal.actions"])
    assert np.array_equal(found["rule_states"], second["linear_signal.rule_states"])
    assert np.array_equal(found["pit"][:, 0], np.repeat(np.float32([0.4, 0.2]), (30, 10)))
    assert found["coverage"] == pytest.approx([0.35] * 3)  # by rows, 30 and 10
    assert "pit" not in first_runs(results, chosen)["linear_signal"]


def test_the_order_in_which_tasks_are_listed_does_not_matter():
    forward, backward = joined(), joined(CHEAP[::-1])
    for name, one in forward.items():
        assert np.array_equal(one.returns, backward[name].returns)
        assert all(np.array_equal(one.metrics[key], backward[name].metrics[key], equal_nan=True) for key in one.metrics)


def test_a_fold_that_was_stored_under_another_number_takes_its_new_place(tmp_path):
    """With one fold the newest was number 0; with both it is the last."""
    newest = fold_tasks(config_of("evaluation.walk_forward.max_folds=1"), table(), "data")[0]
    run_folds([newest], work_on_fold, tmp_path, engine="serial")
    both = [task for task in tasks() if task.identity["learner"] == "references"]
    results = run_folds(both, work_on_fold, tmp_path, engine="serial")
    assert [one.resumed for one in results] == [False, True]
    one = join_folds(results, both)["buy_and_hold"]
    assert np.array_equal(one.returns, joined()["buy_and_hold"].returns)


def test_metrics_of_a_fold_are_those_of_its_own_account():
    task = next(one for one in tasks() if one.label == "fold 2, references, run 1")
    config, rows, fold, _, _ = task.payload
    panel = panel_of(rows.rows(fold.test))
    lesson = Lesson(config, rows.rows(fold.train), panel, BARS_PER_YEAR, LOOKBACK)
    policy = fit_references(lesson, silent)["vol_target"].policy
    direct = metrics_by_path(backtest(lesson.dynamics, panel.values, panel.timestamps, policy), BARS_PER_YEAR)
    kept = joined()["vol_target"].metrics
    assert all(kept[key][0, 1] == direct[key][0] or np.isnan(direct[key][0]) for key in kept)
    assert json.loads(json.dumps(result(task.label).values))["facts"]["vol_target"]["family"] == "rule"


@pytest.mark.parametrize("window", ["train", "validation", "test"])
def test_prices_that_do_not_move_in_a_window_are_refused_by_name(window: str) -> None:
    whole = table()
    values = whole.values.copy()
    fold = plan_folds(CONFIG, len(whole))[1]
    moves = [whole.index("gap_return"), whole.index("intraday_return")]
    values[getattr(fold, window), moves[0]] = 0.0
    values[getattr(fold, window), moves[1]] = 0.0
    still = replace(whole, values=values)
    with pytest.raises(DataError, match=rf"fold \d, {window} window .*: expected prices that move"):
        fold_tasks(CONFIG, still, "hash")
