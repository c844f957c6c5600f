from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from suite_worlds import YEAR, arrays_of_run, returns, walked

from benchmarks.comparison import METRICS, best_on_validation, compare, gather, metric_interval, sharpe_aggregates
from configs.evaluation import VerdictConfig
from evaluation.statistics import sharpe_by_path
from evaluation.verdict import Decision

RULES = VerdictConfig(resamples=200)


def facts(score: float | None = None, seconds: float = 1.0) -> dict:
    notes = {} if score is None else {"validation_score": score}
    return {"family": "model_free", "train_bars": 300, "notes": notes, "fit_seconds": seconds}


# --- joining runs ------------------------------------------------------------------------------------------------


def test_runs_are_joined_in_order():
    made = returns(0.0, noise=0.01)
    runs = [(arrays_of_run(made[0]), facts(1.0, 3.0)), (arrays_of_run(made[1]), facts(2.0, 5.0))]
    runs[1][0]["invalid_actions"][:] = 2
    one = gather("sac", runs)
    assert np.array_equal(one.returns, made)
    assert np.array_equal(one.metrics["sharpe"], sharpe_by_path(made, YEAR))
    assert set(one.metrics) == set(METRICS)
    assert (one.name, one.family, one.train_bars, one.paths) == ("sac", "model_free", 300, 6)
    assert (one.validation_score, one.fit_seconds, one.invalid_actions) == (1.5, 4.0, 2)
    assert one.decision_ms.shape == (600,)


def test_a_run_without_a_score_leaves_the_policy_without_one():
    made = returns(0.0)
    one = gather("sac", [(arrays_of_run(made[0]), facts(1.0)), (arrays_of_run(made[1]), facts())])
    assert math.isnan(one.validation_score)


@pytest.mark.parametrize("other", [{"paths": 5}, {"bars": 119}])
def test_runs_over_other_paths_or_bars_are_refused(other):
    runs = [(arrays_of_run(returns(0.0, **size)[0]), facts()) for size in ({}, other)]
    with pytest.raises(ValueError, match=r"sac: expected runs over the same paths and bars, was \[\(\d+, \d+\), "):
        gather("sac", runs)


def test_the_first_paths_are_cut_from_returns_and_metrics_alike():
    one = walked("mbpo", "model_based", returns(0.0, noise=0.01))
    few = one.first_paths(2)
    assert few.returns.shape == (2, 2, 120)
    assert all(values.shape == (2, 2) for values in few.metrics.values())
    assert np.array_equal(few.metrics["sharpe"], one.metrics["sharpe"][:, :2])
    assert one.first_paths(6) is one


# --- the claim ---------------------------------------------------------------------------------------------------


def test_a_known_difference_is_found_with_its_sign():
    a, b = (
        walked("mbpo", "model_based", returns(2e-3, noise=1e-3)),
        walked("sac", "model_free", returns(0.0, noise=1e-3)),
    )
    found = compare(a, b, RULES, YEAR)
    expected = (sharpe_by_path(a.returns, YEAR) - sharpe_by_path(b.returns, YEAR)).mean()
    assert found.gain.estimate == pytest.approx(expected, abs=1e-9)
    assert found.gain.estimate > 2.0
    assert found.gain.low > 0.0
    assert found.improvement.estimate == 1.0
    assert (found.challenger, found.baseline, found.train_bars) == ("mbpo", "sac", 300)
    assert compare(b, a, RULES, YEAR).gain.estimate == pytest.approx(-expected, abs=1e-9)


def test_drawdown_kill_switch_and_latency_are_those_of_the_metrics():
    made = returns(0.0, noise=1e-3, paths=400)
    worse = walked("mbpo", "model_based", made, max_drawdown=0.15, killed=np.arange(400) < 40)
    safe = walked("sac", "model_free", made, max_drawdown=0.10, killed=np.arange(400) < 4, decision_ms=np.full(9, 60.0))
    found = compare(worse, safe, RULES, YEAR)
    assert found.drawdown.interval.estimate == pytest.approx(0.05)
    assert found.drawdown.violated
    assert found.kill_switch.difference.interval.estimate == pytest.approx(0.09)
    assert found.kill_switch.paths_with_events == (40, 4)
    assert found.latency_ms == 2.0
    assert found.gain.estimate == 0.0
    assert found.verdict.decision == Decision.NO_GO
    assert not found.verdict.criterion("drawdown").passed
    assert found.verdict.criterion("latency").passed


def test_a_policy_without_training_is_paired_with_every_run_of_the_other():
    trained, rule = walked("mbpo", "model_based", returns(1e-3, noise=1e-3)), returns(0.0, runs=1)
    found = compare(trained, walked("flat", "reference", rule), RULES, YEAR)
    assert found.sharpe.seeds == 2
    expected = (sharpe_by_path(trained.returns, YEAR) - sharpe_by_path(rule, YEAR)).mean()
    assert found.gain.estimate == pytest.approx(expected)


def test_a_policy_on_fewer_paths_is_compared_on_these_alone():
    made = returns(0.0, noise=1e-3)
    lucky = made.copy()
    lucky[:, 2:] += 0.01
    few, many = walked("planner", "model_based", made[:, :2]), walked("sac", "model_free", lucky)
    assert compare(few, many, RULES, YEAR).gain.estimate == 0.0
    assert compare(many, few, RULES, YEAR).sharpe.paths == 2


def test_forbidden_actions_of_the_challenger_count_and_those_of_the_rival_do_not():
    made = returns(0.0, noise=1e-3)
    clean, wild = (walked(name, "model_based", made, invalid_actions=count) for name, count in (("a", 0), ("b", 3)))
    assert compare(clean, wild, RULES, YEAR).verdict.criterion("valid_actions").passed
    assert not compare(wild, clean, RULES, YEAR).verdict.criterion("valid_actions").passed


def test_the_same_comparison_twice_is_the_same():
    a, b = (walked(name, "model_based", returns(mean, noise=0.01)) for name, mean in (("a", 1e-3), ("b", 0.0)))
    first, second = compare(a, b, RULES, YEAR), compare(a, b, RULES, YEAR)
    assert first.gain == second.gain
    assert np.array_equal(first.sharpe.samples, second.sharpe.samples)


# --- too little data, bad data -----------------------------------------------------------------------------------


def test_one_path_leaves_drawdown_and_improvement_undecided():
    a, b = (walked(name, "model_based", returns(mean, paths=1, noise=1e-3)) for name, mean in (("a", 1e-3), ("b", 0.0)))
    found = compare(a, b, RULES, YEAR)
    assert found.drawdown is None
    assert found.improvement is None
    assert found.sharpe is not None
    assert found.verdict.criterion("drawdown").passed is None


def test_too_few_bars_are_undecided_not_a_crash():
    a, b = (walked(name, "model_based", returns(mean, bars=29)) for name, mean in (("a", 1e-3), ("b", 0.0)))
    found = compare(a, b, RULES, YEAR)
    assert found.sharpe is None
    assert math.isnan(found.gain.estimate)
    assert found.power == ()
    assert found.verdict.decision != Decision.GO
    point = found.verdict.criterion("sharpe_point")
    assert point.passed is None
    assert "needs 1 more bars" in point.reason


def test_too_few_timed_decisions_leave_the_latency_undecided():
    made = returns(0.0, noise=1e-3)
    quick = walked("a", "model_based", made, decision_ms=np.full(298, 2.0))
    found = compare(quick, walked("b", "model_free", made), RULES, YEAR)
    assert found.latency_ms is None
    assert found.verdict.criterion("latency").passed is None


def test_other_bars_other_runs_and_nan_are_errors():
    a = walked("a", "model_based", returns(0.0, noise=1e-3))
    with pytest.raises(ValueError, match="expected the same paths and bars"):
        compare(a, walked("b", "model_free", returns(0.0, bars=119)), RULES, YEAR)
    with pytest.raises(ValueError, match="expected the same seeds, or one on a side"):
        compare(a, walked("b", "model_free", returns(0.0, runs=3)), RULES, YEAR)
    broken = a.returns.copy()
    broken[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"a: expected finite .* at \[1, 2, 3\]"):
        compare(replace(a, returns=broken), a, RULES, YEAR)


# --- the rival ---------------------------------------------------------------------------------------------------


def test_the_rival_is_the_best_on_validation_not_on_test():
    good, lucky = (
        walked("good", "model_free", returns(0.0), score=1.2),
        walked("lucky", "model_free", returns(1e-2), score=1.1),
    )
    assert best_on_validation([lucky, good]) is good


def test_a_missing_score_never_beats_one_that_exists():
    made = returns(0.0)
    nan, bad = walked("nan", "model_free", made), walked("bad", "model_free", made, score=-5.0)
    assert best_on_validation([nan, bad]) is bad
    assert best_on_validation(iter([bad, nan])) is bad
    assert best_on_validation([nan]) is nan
    with pytest.raises(ValueError, match="expected at least one policy"):
        best_on_validation([])


# --- summaries ---------------------------------------------------------------------------------------------------


def test_a_metric_is_its_mean_with_an_interval_where_there_is_one():
    one = walked("a", "rule", returns(0.0), exposure=np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]] * 2))
    found = metric_interval(one, "exposure", 0.95)
    assert found.estimate == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    single = metric_interval(walked("a", "rule", returns(0.0, paths=1), exposure=0.4), "exposure", 0.95)
    assert single.estimate == pytest.approx(0.4)
    assert math.isnan(single.low)


def test_nan_metrics_stay_nan_without_breaking_a_table():
    one = walked("flat", "reference", returns(0.0), sharpe=math.nan)
    mean, middle = sharpe_aggregates(one, RULES)
    assert math.isnan(mean.estimate)
    assert middle is None


def test_the_middle_half_ignores_outliers():
    one = walked("a", "rule", returns(0.0, paths=8), sharpe=np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 90.0]))
    mean, middle = sharpe_aggregates(one, RULES)
    assert mean.estimate == pytest.approx(97 / 8)
    assert middle.estimate == pytest.approx(1.0)
