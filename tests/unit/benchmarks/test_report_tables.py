"""Tables of a report: a row per policy, or per fold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from report_findings import (
    CONFIG,
    FEW,
    column,
    findings,
)
from suite_worlds import returns, walked

from benchmarks.report_tables import fold_by_fold, more_metrics, results_table, summary_columns, summary_rows


def test_the_results_rank_every_policy_and_show_what_was_measured():
    main = findings().main
    table = results_table("Results", main, CONFIG)
    ratios = [row[2].estimate for row in table.rows]
    assert len(ratios) == 14
    assert ratios == sorted(ratios, reverse=True)
    sharpe = column(table, "Sharpe")
    for name, one in main.policies.items():
        assert sharpe[name].estimate == pytest.approx(one.metrics["sharpe"].mean())
        assert column(table, "decision p99")[name] == 2.0
    assert column(table, "kind")["sac"] == "model-free"
    assert "6 paths" in table.note
    assert FEW in table.note
    assert column(table, "paths") == {name: 2 if "planner" in name else 6 for name in main.policies}


def test_a_drawdown_is_shown_as_a_share():
    main = findings().main
    # Of two paths the t interval reaches far below 0 and above 1.
    wild = walked("ridge", "forecast", returns(0.0, paths=2), max_drawdown=np.array([0.1, 0.9]))
    rows = results_table("Results", replace(main, policies=main.policies | {"ridge": wild}), CONFIG)
    shown = column(rows, "max drawdown")["ridge"]
    assert (shown.low, shown.estimate, shown.high) == (0.0, 0.5, 1.0)


def test_a_planner_that_comes_first_does_not_hide_how_many_paths_the_others_walked():
    main = findings().main
    turned = replace(main, policies=dict(sorted(main.policies.items(), key=lambda item: "planner" not in item[0])))
    assert results_table("Results", turned, CONFIG).note == results_table("Results", main, CONFIG).note


def test_more_metrics_keep_what_is_missing_missing():
    table, costs = more_metrics(findings().main).tables
    assert column(table, "hit rate")["flat"] is None
    assert column(table, "hit rate")["mbpo"] == 0.5
    assert column(costs, "validation Sharpe")["sac"] == pytest.approx(1.3)
    assert column(costs, "validation Sharpe")["flat"] is None
    assert column(costs, "forbidden actions")["mbpo"] == 0


def test_a_fold_shows_the_difference_first_then_the_pair_then_the_others():
    made = {"mbpo": "model_based", "sac": "model_free", "ridge": "forecast"}
    policies = {name: walked(name, family, returns(0.0, paths=1)) for name, family in made.items()}
    ratios = {"mbpo": [[1.0, 2.0], [3.0, math.nan]], "sac": [[0.5, 1.0], [0.5, 3.0]], "ridge": [[7.0, 8.0]] * 2}
    drawdowns = {"mbpo": [[0.1, 0.3], [0.2, 0.3]], "sac": [[0.4, 0.5]] * 2, "ridge": [[0.9, 0.9]] * 2}
    for name, one in policies.items():
        metrics = {"sharpe": ratios[name], "max_drawdown": drawdowns[name], "killed": [[0.0, 1.0], [0.0, 0.0]]}
        arrays = {key: np.array(values) for key, values in metrics.items()}
        policies[name] = replace(one, metrics={**one.metrics, **arrays})
    windows = [
        {"train": "a to b", "validation": "b to c", "test": "c to d"},
        {"train": "a to c", "validation": "c to e", "test": "e to f"},
    ]
    folds, spans = fold_by_fold(replace(findings().main, policies=policies), windows).tables
    assert [one.label for one in folds.columns] == [
        *("fold", "test", "mbpo - sac", "mbpo Sharpe", "sac Sharpe", "mbpo drawdown", "sac drawdown"),
        *("mbpo killed", "sac killed", "ridge Sharpe"),
    ]
    assert folds.rows[0] == (1, "c to d", 1.5, 2.0, 0.5, pytest.approx(0.15), 0.4, 0.0, 0.0, 7.0)
    assert folds.rows[1] == (2, "e to f", None, None, 2.0, 0.3, 0.5, 0.5, 0.5, 8.0)
    assert spans.rows == ((1, "a to b", "b to c", "c to d"), (2, "a to c", "c to e", "e to f"))


def test_the_summary_keeps_the_pair_the_references_and_the_best_five():
    main = findings().main
    rows = summary_rows(main)
    ratios = {name: one.metrics["sharpe"].mean() for name, one in main.policies.items()}
    best = sorted(ratios, key=ratios.__getitem__, reverse=True)
    assert set(rows) == {"mbpo", "sac", "flat", "buy_and_hold", "random_valid", "oracle", "belief_filter", *best[:5]}
    assert list(rows) == [name for name in best if name in rows]
    assert summary_columns(main) == ("policy", "Sharpe", "max drawdown", "kill switch", "exposure")


def test_the_results_tell_a_halt_from_the_kill_switch():
    note = results_table("Results", findings().main, CONFIG).note
    assert "at a drawdown of 12 % trading is halted and released after 20 bars, at 15 % the kill switch latches" in note
    assert "has no hit rate" in more_metrics(findings().main).tables[0].note
