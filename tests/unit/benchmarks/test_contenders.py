from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from suite_worlds import BARS, YEAR, small

from benchmarks.contenders import (
    LEARNERS,
    MODEL_BASED,
    MODEL_FREE,
    Fitted,
    Lesson,
    check_learners,
    feature_table,
    learner_of,
    settings_of,
    silent,
    walk_panel,
)
from benchmarks.suite import Cell, lesson_of
from benchmarks.walk_forward import panel_of
from configs import ConfigError
from evaluation import BuyAndHold, RandomValid, backtest, metrics_by_path, sharpe_ratio
from masking import InvalidActionError

CONFIG = small()


@cache
def lesson() -> Lesson:
    return lesson_of(CONFIG, Cell("ridge", 300))


@cache
def fitted(learner: str) -> dict[str, Fitted]:
    return LEARNERS[learner](lesson(), silent)


class Watcher:
    """Holds, and remembers what it was shown."""

    name = "watcher"

    def __init__(self) -> None:
        self.states: list[np.ndarray] = []

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        self.states.append(state)
        return np.zeros(len(action_masks), np.int64)


class Reckless:
    """Buys whatever the masks say."""

    name = "reckless"

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        return np.full(len(state), action_masks.shape[1] - 1)


# --- what everything is chosen by --------------------------------------------------------------------------------


def test_the_score_is_the_mean_sharpe_ratio_of_the_validation_markets():
    one = lesson()
    policy = BuyAndHold(one.dynamics)
    ratios = []
    for market in one.validation.values:
        alone = backtest(one.dynamics, market, one.validation.timestamps, policy)
        ratios.append(sharpe_ratio(np.expm1(alone.log_returns[:, 0]), YEAR))
    said = one.validate(policy)
    assert said["score"] == pytest.approx(np.mean(ratios), rel=1e-12)
    assert said["validation_sharpe"] == said["score"]
    assert len(set(ratios)) == 2


def test_a_lesson_may_choose_by_reward():
    plain = lesson()
    other = Lesson(plain.config, plain.train, plain.validation, YEAR, 20, score="reward_per_bar")
    policy = BuyAndHold(plain.dynamics)
    assert other.validate(policy)["score"] == pytest.approx(float(other.walk(policy).reward.mean()), rel=1e-6)
    assert other.validate(policy)["score"] != plain.validate(policy)["score"]


def test_a_policy_that_is_nearly_flat_scores_no_better_than_flat_and_no_better_than_it_did():
    bought = BuyAndHold(lesson().dynamics)
    exposure, sharpe = (lesson().validate(bought)[f"validation_{name}"] for name in ("exposure", "sharpe"))
    assert sharpe > 0.0
    for least, score in ((exposure * 0.99, sharpe), (exposure * 1.01, 0.0)):
        config = small(f"evaluation.verdict.min_exposure={least}")
        asked = Lesson(config, lesson().train, lesson().validation, YEAR, 20)
        assert asked.validate(bought)["score"] == score
        assert asked.validate(bought)["validation_sharpe"] == sharpe
    dear = small("evaluation.verdict.min_exposure=9", "account.commission_bps=500")
    lost = Lesson(dear, lesson().train, lesson().validation, YEAR, 20).validate(RandomValid(1))
    assert lost["score"] == lost["validation_sharpe"] < 0.0


def test_a_score_that_no_metric_has_is_an_error():
    plain = lesson()
    with pytest.raises(KeyError, match="validation_luck"):
        Lesson(plain.config, plain.train, plain.validation, YEAR, 20, score="luck").validate(BuyAndHold(plain.dynamics))


@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "references"])
def test_the_policy_handed_over_is_the_one_that_was_scored(learner):
    main = fitted(learner)[learner]
    again = lesson().validate(main.policy, main.disagreement)["score"]
    assert main.notes["validation_score"] == pytest.approx(again, abs=1e-12)


# --- walks -------------------------------------------------------------------------------------------------------


def test_a_panel_is_walked_market_by_market_with_the_disagreement_beside_it():
    one, watcher = lesson(), Watcher()
    disagreement = np.arange(2 * BARS, dtype=np.float64).reshape(2, BARS)
    walk_panel(one.dynamics, one.validation, watcher, lambda values: disagreement * (values.shape == (2, BARS, 10)))
    column = one.dynamics.state_names.index("model_uncertainty")
    seen = np.stack(watcher.states, axis=1)
    assert np.array_equal(seen[:, :, column], disagreement[:, :-1])
    assert np.array_equal(seen[:, :, :10], one.validation.values[:, :-1].astype(np.float32))


def test_without_a_model_the_disagreement_is_zero():
    one, watcher = lesson(), Watcher()
    walk_panel(one.dynamics, one.validation, watcher)
    column = one.dynamics.state_names.index("model_uncertainty")
    assert not np.stack(watcher.states)[:, :, column].any()


def test_no_policy_gets_around_the_masks():
    with pytest.raises(InvalidActionError, match="reckless"):
        lesson().validate(Reckless())


def test_a_table_and_a_panel_of_one_market_are_the_same_rows():
    panel = lesson().validation
    table = feature_table(panel, market=1)
    back = panel_of(table)
    assert np.array_equal(back.values, panel.values[1:2])
    assert np.array_equal(back.timestamps, panel.timestamps)
    assert back.names == panel.names == table.names


# --- learners ----------------------------------------------------------------------------------------------------


def test_every_learner_returns_the_policies_it_is_known_for():
    families = {name: one.family for learner in LEARNERS for name, one in fitted(learner).items()}
    assert {name for name, family in families.items() if family == "model_free"} == set(MODEL_FREE)
    assert {name for name, family in families.items() if family == "model_based"} == set(MODEL_BASED["mbpo"])
    assert set(families) == {
        *("flat", "buy_and_hold", "random_valid", "vol_target", "linear_signal", "ridge"),
        *MODEL_FREE,
        *MODEL_BASED["mbpo"],
    }
    for learner in LEARNERS:
        for name, one in fitted(learner).items():
            assert one.policy.name == name
            assert learner_of(name) in {learner, name}


def test_only_policies_with_a_model_are_shown_its_disagreement_and_only_planners_walk_fewer_paths():
    by_name = {name: one for learner in LEARNERS for name, one in fitted(learner).items()}
    assert {name for name, one in by_name.items() if one.disagreement is not None} == set(MODEL_BASED["mbpo"])
    assert {name: one.max_paths for name, one in by_name.items() if one.max_paths is not None} == {
        "planner": CONFIG.evaluation.planner.max_paths,
        "mbpo_planner": CONFIG.evaluation.planner.max_paths,
    }


def test_the_evidence_of_the_world_model_is_about_validation():
    evidence = fitted("mbpo")["mbpo"].evidence
    assert evidence["pit"].shape == (BARS - 1, 10)
    assert evidence["coverage"].shape == (3,)
    assert (np.diff(evidence["coverage"]) >= 0).all()


def test_a_learner_cannot_reach_the_markets_it_is_judged_on():
    """All it gets is the lesson: the training path, and markets of other seeds."""
    one = lesson()
    assert set(vars(one)) - {"dynamics", "scaler"} == {
        *("config", "train", "validation", "bars_per_year", "lookback", "score")
    }


def test_a_random_policy_repeats_itself_with_its_seed():
    one = lesson()
    first, second = (metrics_by_path(one.walk(RandomValid(7)), YEAR)["sharpe"] for _ in range(2))
    assert np.array_equal(first, second)
    other = fitted("references")["random_valid"].policy
    assert not np.array_equal(metrics_by_path(one.walk(other), YEAR)["sharpe"], first)


def test_facts_are_json_without_the_notes_that_are_no_number():
    one = Fitted(Watcher(), "rule", notes={"steps": 3, "validation_score": math.nan, "limit": math.inf})
    assert one.facts(1.5) == {"family": "rule", "notes": {"steps": 3.0}, "fit_seconds": 1.5}


# --- settings ----------------------------------------------------------------------------------------------------


def test_settings_of_a_learner_are_its_sections_alone():
    assert set(settings_of(CONFIG, "mbpo")) == {"world_model", "mbpo", "planner", "evaluation.planner"}
    assert settings_of(CONFIG, "model_free") == {"model_free": CONFIG.model_free.model_dump(mode="json")}
    assert settings_of(CONFIG, "linear_signal") == settings_of(CONFIG, "truth") == {}


def test_learners_that_do_not_exist_or_come_twice_are_refused():
    with pytest.raises(ConfigError, match=r"a\.b: expected names of \['linear_signal', .*was 'ppo'"):
        check_learners("a.b", ["ridge", "ppo"])
    with pytest.raises(ConfigError, match="was 'references'"):
        check_learners("a.b", ["references"])
    with pytest.raises(ConfigError, match="expected each learner once, was 'ridge' 2 times"):
        check_learners("a.b", ["ridge", "ridge"])


def test_a_claim_needs_both_of_its_sides():
    check_learners("a.b", ["sac", "mbpo"], "mbpo_planner")
    with pytest.raises(ConfigError, match=r"expected one of \['model_free', 'sac', 'masked_dqn'\] to compare with"):
        check_learners("a.b", ["ridge", "mbpo"], "mbpo")
    with pytest.raises(ConfigError, match=r"verdict\.challenger: expected a model-based policy .* was 'mbpo'"):
        check_learners("a.b", ["ridge", "sac"], "mbpo")
    with pytest.raises(ConfigError, match="was 'ridge'"):
        check_learners("a.b", ["ridge", "sac", "mbpo"], "ridge")
    check_learners("a.b", ["ridge"])


def test_policies_come_from_learners():
    assert [learner_of(name) for name in ("mbpo_planner", "planner", "mbpo", "sac")] == ["mbpo", "mbpo", "mbpo", "sac"]
