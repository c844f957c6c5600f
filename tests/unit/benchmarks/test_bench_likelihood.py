"""One small fold for real, and the report's own arithmetic on made-up numbers."""

import json

import numpy as np
import pytest

from benchmarks.likelihood import CONTESTANTS, FoldLikelihood, LikelihoodReport, _gains, measure_likelihood
from configs import load_config


def fold(number, gain, market="sp500"):
    totals = dict.fromkeys(CONTESTANTS, 100.0) | {"student_t": 100.0 + gain}
    return FoldLikelihood(
        market=market, fold=number, development=number < 3, first="2000-01-03", train_bars=1, test_bars=50,
        totals=totals, coverage={}, no_better={}, follows_baseline={},
    )  # fmt: skip


def report(*gains):
    noise = np.random.default_rng(0).normal(0.0, 1e-3, 50)
    results = []
    for number, gain in enumerate(gains):
        one = fold(number, gain)
        results.append(
            (one, {n: one.totals[n] / 50 + (noise if n == "student_t" else 0.0) * np.ones(50) for n in CONTESTANTS})
        )
    gains_by_name = {name: _gains(results, name) for name in CONTESTANTS if name != "garch_t"}
    return LikelihoodReport(
        folds=tuple(one for one, _ in results), gains=gains_by_name, seeds=1, machine={}, versions={}
    )


def test_a_single_lost_fold_misses_the_goal_and_development_folds_do_not_count():
    good = report(-5.0, -5.0, -5.0, 1.0, 3.0)
    assert good.won("student_t") == (2, 2)
    assert good.within_goal
    assert good.gains["student_t"]["judged"].estimate == pytest.approx(0.04, abs=1e-3)
    assert good.gains["student_t"]["development"].estimate == pytest.approx(-0.1, abs=1e-3)
    lost = report(1.0, 1.0, 1.0, 9.0, -0.1)
    assert lost.won("student_t") == (1, 2)
    assert not lost.within_goal
    assert not report(5.0).within_goal  # nothing was judged


def test_markets_of_one_day_are_one_observation():
    noise = np.random.default_rng(0).normal(0.0, 1.0, 400)
    one = [(fold(3, 0.0), {"student_t": noise, "garch_t": np.zeros(400)})]
    twice = [*one, (fold(3, 0.0, market="nasdaq"), one[0][1])]
    alone, both = (_gains(results, "student_t")["judged"] for results in (one, twice))
    assert both.estimate == pytest.approx(alone.estimate)
    assert both.high - both.low == pytest.approx(alone.high - alone.low)


def test_one_fold_is_measured_on_its_test_rows(tmp_path):
    calls = []
    found = measure_likelihood(
        load_config("smoke"), markets=("sp500",), max_folds=1, progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 1)]
    (only,) = found.folds
    assert set(only.totals) == set(CONTESTANTS)
    assert (only.test_bars, only.development) == (126, False)
    # a bar's density of a return is e^3 or so, whoever says it
    assert all(1.0 < total / only.test_bars < 5.0 for total in only.totals.values())
    assert only.totals["garch_t"] > only.totals["constant"]
    assert set(only.coverage["student_t"]) == {"all", "market", "signals"}
    written = json.loads(json.dumps(found.to_dict()))
    assert written["folds_won"]["constant"] == [0, 1]
    with pytest.raises(ValueError, match="seeds and jobs: expected at least 1, was 0 and 1"):
        measure_likelihood(load_config("smoke"), seeds=0)
