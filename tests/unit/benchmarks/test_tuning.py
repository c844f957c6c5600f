from __future__ import annotations

import math

import numpy as np
import pytest
from suite_worlds import compute, result_of, small

from benchmarks.contenders import settings_of
from benchmarks.folds import FoldResult
from benchmarks.suite import Cell, lesson_of, suite_tasks
from benchmarks.tuning import GRIDS, TUNING_RUNS, draw_trials, rank_trials, tuning_tasks, with_settings, work_on_trial
from configs import ConfigError

CONFIG = small()


def scored(*scores: float) -> list[FoldResult]:
    return [result_of("trial", {"score": np.array([score])}, seconds=number) for number, score in enumerate(scores)]


# --- drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", GRIDS)
def test_trials_are_distinct_reproducible_and_begin_with_the_settings_in_force(learner):
    drawn = draw_trials(learner, 12, seed=3)
    assert drawn[0] == {}
    assert len(drawn) == 12
    assert all(one not in drawn[:index] for index, one in enumerate(drawn))
    assert drawn == draw_trials(learner, 12, seed=3)
    assert drawn != draw_trials(learner, 12, seed=4)
    assert drawn[:5] == draw_trials(learner, 5, seed=3)
    for trial in drawn[1:]:
        assert trial.keys() == GRIDS[learner].keys()
        assert all(value in GRIDS[learner][name] for name, value in trial.items())


@pytest.mark.parametrize("learner", GRIDS)
def test_every_value_of_a_grid_is_allowed_and_read_by_its_learner_alone(learner):
    for name, values in GRIDS[learner].items():
        for value in values:
            tried = with_settings(CONFIG, {name: value})
            others = {one for one in GRIDS if one != learner}
            assert all(settings_of(tried, one) == settings_of(CONFIG, one) for one in others)
        assert len({str(settings_of(with_settings(CONFIG, {name: value}), learner)) for value in values}) == len(values)


def test_whatever_ours_may_try_of_the_common_settings_the_model_free_policy_may_try_too():
    for name in ("total_steps", "learning_rate", "ent_coef", "gamma"):
        assert set(GRIDS["mbpo"][f"mbpo.ppo.{name}"]) <= set(GRIDS["model_free"][f"model_free.{name}"])


def test_learners_without_a_grid_and_more_trials_than_it_has_are_refused():
    with pytest.raises(ConfigError, match=r"--tune: expected one of model_free, .*, was 'ridge'"):
        draw_trials("ridge", 3, seed=0)
    for count in (0, 109):
        with pytest.raises(ConfigError, match=f"--trials: expected 1 to 108 for sac, was {count}"):
            draw_trials("sac", count, seed=0)
    every = draw_trials("sac", 108, seed=0)
    assert len({str(trial) for trial in every}) == len(every) == 108


# --- settings ----------------------------------------------------------------------------------------------------


def test_settings_are_replaced_by_path_and_nothing_else_changes():
    tried = with_settings(CONFIG, {"model_free.net_arch": (8,), "evaluation.sac.gamma": 0.5})
    assert (tried.model_free.net_arch, tried.evaluation.sac.gamma) == ((8,), 0.5)
    back = with_settings(tried, {"model_free.net_arch": (16, 16), "evaluation.sac.gamma": 0.99})
    assert back == CONFIG
    assert with_settings(CONFIG, {}) == CONFIG


@pytest.mark.parametrize("path", ["model_free.gama", "evaluation.sak.gamma", "nothing", "seed.inner", "a.b.c"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(ConfigError, match=rf"^{path}: expected the path of a setting"):
        with_settings(CONFIG, {path: 1})


def test_a_value_that_is_not_allowed_is_named():
    with pytest.raises(ConfigError, match=r"evaluation\.sac\.gamma: .*was 1\.5"):
        with_settings(CONFIG, {"evaluation.sac.gamma": 1.5})


# --- computing ---------------------------------------------------------------------------------------------------


def test_trials_learn_on_paths_the_suite_never_uses():
    tasks = tuning_tasks(CONFIG, "sac", draw_trials("sac", 2, seed=0), train_bars=300, runs=2)
    assert [task.payload[1].run for task in tasks] == [TUNING_RUNS, TUNING_RUNS + 1] * 2
    seeds = {lesson_of(config, cell).config.seed for config, cell in (task.payload for task in tasks)}
    ours = {lesson_of(CONFIG, Cell("sac", 300, run)).config.seed for run in range(3)}
    assert len(seeds) == 2
    assert not seeds & ours


def test_each_trial_and_run_has_an_identity_of_its_own():
    trials = [{}, {"evaluation.sac.gamma": 0.9}, {"evaluation.sac.gamma": CONFIG.evaluation.sac.gamma}]
    tasks = tuning_tasks(CONFIG, "sac", trials, train_bars=300, runs=2)
    assert len({task.key for task in tasks}) == len({task.label for task in tasks}) == 6
    assert not {task.key for task in tasks} & {task.key for task in suite_tasks(CONFIG)}


@pytest.mark.parametrize(
    ("override", "anew"),
    [
        ("evaluation.suite.trials={sac: 12}", False),
        ("evaluation.suite.num_seeds=3", False),
        ("model_free.gamma=0.5", False),
        ("evaluation.sac.gamma=0.5", True),
        ("evaluation.suite.validation_paths=3", True),
        ("evaluation.market.signal_noise=1", True),
        ("account.commission_bps=2", True),
    ],
)
def test_a_trial_is_computed_anew_where_a_setting_counts(override, anew):
    before, after = (tuning_tasks(one, "sac", [{}], train_bars=300, runs=1)[0] for one in (CONFIG, small(override)))
    assert (before.key != after.key) == anew


def test_a_trial_is_worth_its_best_score_on_validation():
    task = tuning_tasks(CONFIG, "masked_dqn", [{"evaluation.dqn.gamma": 0.5}], train_bars=300, runs=1)[0]
    notes = compute(task.payload[0], Cell("masked_dqn", 300, TUNING_RUNS)).values["facts"]["masked_dqn"]["notes"]
    assert work_on_trial(task)["score"].tolist() == [notes["validation_score"]]


# --- ranking -----------------------------------------------------------------------------------------------------


def test_trials_are_ranked_by_mean_score_and_those_without_come_last():
    trials = [{}, {"a": 1}, {"a": 2}]
    ranked = rank_trials(trials, scored(1.0, 3.0, math.nan, 9.0, 2.0, 2.5))
    assert [trial.settings for trial in ranked] == [{"a": 2}, {}, {"a": 1}]
    assert [trial.scores for trial in ranked[:2]] == [(2.0, 2.5), (1.0, 3.0)]
    assert ranked[0].score == 2.25
    assert ranked[0].seconds == 4.5
    assert math.isnan(ranked[2].score)


def test_equal_trials_keep_the_order_they_were_drawn_in():
    assert [trial.settings for trial in rank_trials([{}, {"a": 1}], scored(1.0, 1.0))] == [{}, {"a": 1}]


def test_results_that_are_not_those_of_the_trials_are_refused():
    for results in ([], scored(1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="expected as many for each of 2 trials"):
            rank_trials([{}, {"a": 1}], results)
