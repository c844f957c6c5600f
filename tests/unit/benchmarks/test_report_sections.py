from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from suite_worlds import BARS, YEAR, made_up_suite, returns, small, walked

from benchmarks import report_pictures, report_sections
from benchmarks.comparison import compare
from benchmarks.findings import Findings, size_findings, suite_findings
from benchmarks.report import suite_report, walk_forward_report
from benchmarks.report_pictures import Market, equity, first_market, fold_market, suite_market, world_model
from benchmarks.report_sections import checks, comparisons, not_shown, stress, the_claim, training_lengths
from benchmarks.report_tables import fold_by_fold, more_metrics, results_table, summary_columns, summary_rows
from benchmarks.suite import plan_suite
from configs import DetentConfig
from data import FEATURE_FIELDS, FeatureTable
from evaluation.report import Report, Section, Table
from evaluation.report.display import criterion_name
from evaluation.report.figures import equity_fan, sharpe_by_size
from evaluation.report.policies import POLICIES
from evaluation.report.writer import write_report
from evaluation.statistics import deflated_sharpe, sharpe_by_path
from evaluation.statistics.interval import Interval
from evaluation.statistics.limits import NonInferiority
from evaluation.verdict import Decision

CONFIG = small("evaluation.suite.train_bars=[300, 400]", "evaluation.suite.primary_train_bars=400")
ALTERED = {"leak": 20.0, "shuffled": 9.0, "no_signal": 0.4}


def made_up(config: DetentConfig) -> Findings:
    plan = plan_suite(config)
    return suite_findings(config, made_up_suite(plan, bars=BARS - 1, altered=ALTERED), plan)


@cache
def findings() -> Findings:
    return made_up(CONFIG)


FEW = "mbpo_planner, planner: the first 2 paths only."


@cache
def market() -> Market:
    return suite_market(CONFIG)


def column(table: Table, label: str) -> dict:
    at = [one.label for one in table.columns].index(label)
    return {row[0]: row[at] for row in table.rows}


def shown(section: Section) -> tuple[list[str], list[str]]:
    return [table.name for table in section.tables], [figure.name for figure in section.figures]


# --- tables ------------------------------------------------------------------------------------------------------


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


def test_whoever_walked_few_paths_is_named_wherever_he_stands_beside_others():
    section = training_lengths(findings(), CONFIG)
    assert FEW in section.tables[0].note
    assert FEW in section.figures[0].caption
    assert FEW in more_metrics(findings().main).tables[0].note


def test_a_planner_that_comes_first_does_not_hide_how_many_paths_the_others_walked():
    main = findings().main
    turned = replace(main, policies=dict(sorted(main.policies.items(), key=lambda item: "planner" not in item[0])))
    assert results_table("Results", turned, CONFIG).note == results_table("Results", main, CONFIG).note


def test_training_lengths_show_each_learner_at_each_length_and_each_verdict():
    section = training_lengths(findings(), CONFIG)
    tables, figures = shown(section)
    assert tables == ["Sharpe ratio by training length", "Verdict by training length"]
    assert figures == ["Sharpe ratio by training length"]
    by_policy, verdicts = section.tables
    assert {row[0] for row in by_policy.rows} == {
        *("linear_signal", "ridge", "model_free", "sac", "masked_dqn", "mbpo", "planner", "mbpo_planner")
    }
    expected = findings().sizes[300].policies["ridge"].metrics["sharpe"].mean()
    assert column(by_policy, "300 bars")["ridge"].estimate == pytest.approx(expected)
    assert [row[:2] for row in verdicts.rows] == [(300, "sac"), (400, "sac")]
    assert verdicts.rows[1][2] == findings().main.claim.gain


def test_the_claim_says_its_interval_its_power_and_what_it_would_have_needed():
    section = the_claim(findings().main, CONFIG)
    claim = findings().main.claim
    assert shown(section) == (["Power"], ["Difference of Sharpe ratios"])
    assert "paths needed" in [one.label for one in section.tables[0].columns]
    assert len(section.tables[0].rows) == len(claim.power) > 0
    text = " ".join(section.text)
    assert claim.gain.method in text
    assert "On one path mbpo has the higher Sharpe ratio with probability" in text
    assert "Kill switch: mbpo on 0 of 6 paths, sac on 0; for these 2 training runs on new markets the rate" in text
    assert "exact paired test over runs p = 1.000" in text


def test_the_deflated_ratio_says_what_was_counted():
    deflated = deflated_sharpe(returns(1e-3)[0, 0], 12, 0.1, YEAR)
    text = " ".join(the_claim(replace(findings().main, deflated=deflated), CONFIG).text)
    assert "a middling run and path" in text
    assert "the 12 settings tried for mbpo; the spread of its training runs stands for that of trials" in text


def test_one_training_run_makes_the_seeds_needed_unknown_not_infinite():
    main = findings().main
    assert "unknown" not in the_claim(main, CONFIG).tables[0].note
    one = {name: walked(name, main.policies[name].family, main.policies[name].returns[:1]) for name in ("mbpo", "sac")}
    alone = compare(one["mbpo"], one["sac"], CONFIG.evaluation.verdict, YEAR)
    (power,) = the_claim(replace(main, claim=alone), CONFIG).tables
    assert set(column(power, "training runs needed").values()) == {None}
    assert "under training runs where it is unknown. One training run" in power.note


def test_comparisons_list_the_claim_first_and_those_who_beat_buy_and_hold():
    section = comparisons(findings())
    (table,) = section.tables
    assert table.rows[0][0] == "mbpo - sac"
    assert len(table.rows) == 1 + len(findings().main.others)
    text = section.text[0]
    tested = "linear_signal, ridge, model_free, sac, masked_dqn, mbpo"
    named = text.partition("belief filter: ")[2].partition(". Sharpe")[0]
    assert set(named.split(", ")) == {*tested.split(", "), "random_valid", "vol_target"}
    assert "for these training runs; the spread between runs is left out, see the intervals above." in text
    assert shown(section)[1] == ["Differences"]


@pytest.mark.parametrize(("p_value", "said"), [(0.0, "p-value < 0.0005."), (0.0125, "p-value 0.013."), (1.0, "1.000.")])
def test_a_p_value_is_never_zero(p_value, said):
    main = findings().main
    superior = replace(main.superior, p_value=p_value, resamples=2000)
    found = replace(findings(), sizes={400: replace(main, superior=superior)})
    assert said in comparisons(found).text[0]


def test_more_metrics_keep_what_is_missing_missing():
    table, costs = more_metrics(findings().main).tables
    assert column(table, "hit rate")["flat"] is None
    assert column(table, "hit rate")["mbpo"] == 0.5
    assert column(costs, "validation Sharpe")["sac"] == pytest.approx(1.3)
    assert column(costs, "validation Sharpe")["flat"] is None
    assert column(costs, "forbidden actions")["mbpo"] == 0


def test_checks_tell_passed_from_failed():
    (section,) = checks(findings())
    (table,) = section.tables
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("tomorrow's return as a feature", "ridge", True),
        ("signals of another time", "ridge", False),
    ]
    assert checks(replace(findings(), checks=())) == ()


def test_stress_is_ranked_and_left_out_where_nobody_walked():
    (section,) = stress(findings(), CONFIG)
    assert column(section.tables[0], "Sharpe")["mbpo"] == 0.5
    wild = {"sac": {key: np.array([[0.0, 1.0, 8.0]]) for key in ("sharpe", "max_drawdown", "killed")}}
    (tails,) = stress(replace(findings(), stress=wild), CONFIG)
    assert (column(tails.tables[0], "Sharpe")["sac"], column(tails.tables[0], "median Sharpe")["sac"]) == (3.0, 1.0)
    assert stress(replace(findings(), stress={}), CONFIG) == ()


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


def test_what_the_evidence_does_not_show_is_what_was_not_passed_and_the_standing_limits():
    lines = [line.partition(":")[0] for line in not_shown(findings())]
    criteria = findings().main.claim.verdict.criteria
    unmet = [criterion_name(one) for one in criteria if not one.passed]
    limits = [
        "Simulated markets are not a market",
        "The kill switch speaks of these training runs",
        "A Sharpe gain does not say where it comes from",
    ]
    assert "Instrument passed its checks" in unmet
    assert lines == [*unmet[:-1], "Failed check of the instrument", *limits]
    (failed,) = [check.failure for check in findings().checks if not check.passed]
    assert f"Failed check of the instrument: {failed}." in not_shown(findings())


def test_every_picture_explains_itself_to_those_who_see_it():
    sections = [
        *(training_lengths(findings(), CONFIG), the_claim(findings().main, CONFIG), comparisons(findings())),
        *(equity(findings().main, market()), first_market(CONFIG, findings(), market()), *world_model(findings())),
    ]
    pictures = [figure for section in sections for figure in section.figures]
    assert len(pictures) == 7
    assert all(figure.caption == figure.alt for figure in pictures)


# --- pictures ----------------------------------------------------------------------------------------------------


def test_equity_and_one_market_are_drawn_for_the_pair_of_the_claim():
    assert shown(equity(findings().main, market()))[1] == ["Equity and drawdown"]
    section = first_market(CONFIG, findings(), market())
    assert shown(section)[1] == ["Regimes and positions", "Masks and choices"]
    assert "mbpo" in section.figures[1].alt


def test_calibration_is_drawn_where_there_is_a_world_model():
    (section,) = world_model(findings())
    assert shown(section)[1] == ["Calibration of the world model"]
    assert "on the first validation market, by the world model of the first training run" in section.figures[0].caption
    assert world_model(replace(findings(), first_path={})) == ()


# --- little data -------------------------------------------------------------------------------------------------


def test_a_report_of_one_run_and_one_length_builds_and_is_written(tmp_path):
    config = small("evaluation.suite.num_seeds=1")
    found = made_up(config)
    assert found.main.policies["mbpo"].returns.shape[0] == 1
    report = suite_report(config, found, title="Small", reproduce=("detent",), facts={"machine": "none"})
    files = write_report(report, tmp_path)
    assert files.html.stat().st_size > 10_000
    assert report.verdict is found.main.claim.verdict
    assert "6 paths" in report.results.note
    assert [section.title for section in report.sections][:3] == ["Training length", "Equity and drawdown", "The claim"]


def test_a_metric_that_is_nan_everywhere_breaks_no_table():
    main = findings().main
    nan = replace(main.policies["ridge"], metrics={k: v * math.nan for k, v in main.policies["ridge"].metrics.items()})
    broken = replace(main, policies=main.policies | {"ridge": nan})
    found = replace(findings(), sizes={300: findings().sizes[300], 400: broken})
    assert results_table("Results", broken, CONFIG).rows[-1][0] == "ridge"
    assert column(more_metrics(broken).tables[0], "Sortino")["ridge"] is None
    assert isinstance(column(training_lengths(found, CONFIG).tables[0], "400 bars")["ridge"], Interval)


def test_a_claim_that_cannot_be_decided_says_so_instead_of_failing():
    main = findings().main
    short = {name: walked(name, "model_free", returns(mean, bars=29)) for name, mean in (("mbpo", 1e-3), ("sac", 0.0))}
    undecided = compare(short["mbpo"], short["sac"], CONFIG.evaluation.verdict, YEAR)
    section = the_claim(replace(main, claim=undecided), CONFIG)
    assert "needs 1 more bars" in section.text[0]
    assert section.figures == ()
    assert section.tables[0].rows == ()
    alone = replace(findings(), sizes={400: replace(main, claim=undecided, others=())})
    assert comparisons(alone).figures == ()
    assert comparisons(alone).tables[0].rows[0][0] == "mbpo - sac"
    assert training_lengths(alone, CONFIG).tables[1].rows[0][0] == 400
    both = replace(findings(), sizes={400: replace(main, claim=undecided)})
    assert shown(comparisons(both))[1] == ["Differences"]


# --- walk-forward ------------------------------------------------------------------------------------------------


TESTS = (slice(10, 41), slice(100, 131), slice(131, 162))
"""Test windows of 31 closes: time between the first two, none between the others."""
FOLD_NAMES = {"flat": "reference", "buy_and_hold": "reference", "sac": "model_free", "mbpo": "model_based"}


@cache
def bars() -> FeatureTable:
    values = np.zeros((170, len(FEATURE_FIELDS)))
    names = [field.name for field in FEATURE_FIELDS]
    values[:, names.index("intraday_return")] = 0.01
    return FeatureTable(pd.bdate_range("2001-01-01", periods=170, tz="UTC"), "made-up", FEATURE_FIELDS, values)


@cache
def fold_findings() -> Findings:
    policies = {}
    for index, (name, family) in enumerate(FOLD_NAMES.items()):
        made = returns(2e-4 * index, runs=1 if family == "reference" else 2, paths=1, bars=90, noise=1e-3)
        one = walked(name, family, made * (name != "flat"), train_bars=0, score=1.0)
        metrics = {key: np.repeat(values, 3, axis=1) for key, values in one.metrics.items()}
        # Turned around: the means of the folds rank otherwise than the joined ones.
        policies[name] = replace(one, metrics={**metrics, "sharpe": -metrics["sharpe"]})
    first = {name: {"position": np.full(93, 0.5, np.float32)} for name in FOLD_NAMES}
    first["mbpo"] |= {"actions": np.zeros(30, np.int8), "rule_states": np.zeros((30, 6), np.float32)}
    first["mbpo"] |= {"pit": np.full((50, 10), 0.5, np.float32), "coverage": np.array([0.5, 0.8, 0.95])}
    return Findings(sizes={0: size_findings(CONFIG, policies, 0, YEAR)}, primary=0, first_path=first)


@cache
def fold_report() -> Report:
    windows = [{"train": "a", "validation": "b", "test": str(number)} for number in range(3)]
    return walk_forward_report(
        CONFIG, fold_findings(), fold_market(bars(), TESTS), windows, title="Folds", reproduce=("detent",), facts={}
    )


def test_a_walk_forward_is_reported_by_fold(tmp_path):
    report, main = fold_report(), fold_findings().main
    assert "3 folds" in report.results.note
    assert "paths" not in report.results.note
    said = [text for section in report.sections for text in section.text]
    said += [table.note for table in report.tables]
    said += [figure.caption for section in report.sections for figure in section.figures]
    said += [report.subtitle, report.verdict.next_step, *(one.reason for one in report.verdict.criteria)]
    assert "On one fold" in " ".join(said)
    assert "path" not in " ".join(said)
    assert "all but flat on the bars of the joined folds" in " ".join(said)
    joined = {name: sharpe_by_path(one.returns, YEAR).mean() for name, one in main.policies.items()}
    shown = column(report.results, "Sharpe of joined folds")
    assert shown == pytest.approx(joined)
    assert list(shown) == sorted(joined, key=joined.__getitem__, reverse=True)
    assert report.results.columns[2].label == "Sharpe of joined folds"
    assert report.summary_columns[1] == "Sharpe of joined folds"
    assert "ratios of joined folds" in report.results.note
    assert column(report.results, "folds") == dict.fromkeys(shown, 3)
    labels = {one.label for table in report.tables for one in table.columns}
    assert {"P(better on a fold)", "validation reward", "years needed"} <= labels
    assert not {"P(better on a path)", "validation Sharpe", "paths needed", "Sharpe"} & labels
    assert "One series is one history" in report.not_shown[-3]
    assert write_report(report, tmp_path).html.exists()


def test_a_walk_forward_looks_closely_at_its_first_training_runs():
    figures = {figure.name: figure.caption for section in fold_report().sections for figure in section.figures}
    assert {"Price and positions", "Masks and choices", "Calibration of the world model"} <= figures.keys()
    assert "newest fold" in figures["Masks and choices"]
    assert "validation windows of all folds" in figures["Calibration of the world model"]
    assert "Test windows only" in figures["Equity and drawdown"]
    without = replace(fold_findings(), first_path={})
    windows = [{"train": "a", "validation": "b", "test": "c"}] * 3
    bare = walk_forward_report(CONFIG, without, fold_market(bars(), TESTS), windows, title="F", reproduce=(), facts={})
    assert "One market looked at closely" not in [section.title for section in bare.sections]


def test_test_windows_are_one_market_that_keeps_its_price_and_says_where_folds_start():
    market = fold_market(bars(), TESTS)
    assert market.starts == (31, 62)
    assert (len(market.timestamps), market.regime, market.names) == (93, None, bars().names)
    np.testing.assert_allclose(market.price[[0, 30, 31, 92]], np.exp(0.01 * np.array([0, 30, 90, 151])))
    assert market.timestamps[31] == bars().timestamps[100].tz_localize(None).to_datetime64()


def test_an_account_of_a_fold_starts_with_what_the_last_one_left(monkeypatch):
    drawn = {}

    def draw(timestamps, curves, *, unit, starts):
        drawn.update(curves)
        assert (len(timestamps), unit, starts) == (93, "training run", (31, 62))
        return equity_fan(timestamps, curves, unit=unit, starts=starts)

    monkeypatch.setattr(report_pictures, "equity_fan", draw)
    equity(fold_findings().main, fold_market(bars(), TESTS))
    made = fold_findings().main.policies["mbpo"].returns[:, 0].astype(np.float64)
    grown = np.cumprod(1.0 + made, axis=1)
    np.testing.assert_allclose(
        drawn["mbpo"][:, [0, 30, 31, 32, 61, 62, 92]].T,
        np.stack([np.ones(2), grown[:, 29], grown[:, 29], grown[:, 30], grown[:, 59], grown[:, 59], grown[:, 89]]),
    )


# --- for people in a hurry ---------------------------------------------------------------------------------------


def test_the_summary_keeps_the_pair_the_references_and_the_best_five():
    main = findings().main
    rows = summary_rows(main)
    ratios = {name: one.metrics["sharpe"].mean() for name, one in main.policies.items()}
    best = sorted(ratios, key=ratios.__getitem__, reverse=True)
    assert set(rows) == {"mbpo", "sac", "flat", "buy_and_hold", "random_valid", "oracle", "belief_filter", *best[:5]}
    assert list(rows) == [name for name in best if name in rows]
    assert summary_columns(main) == ("policy", "Sharpe", "max drawdown", "kill switch", "exposure")


def test_every_policy_of_a_report_is_explained():
    report = suite_report(CONFIG, findings(), title="Suite", reproduce=(), facts={})
    assert set(report.glossary) == set(findings().main.policies) == set(POLICIES)


def test_a_comparison_says_what_decided_it():
    (table,) = comparisons(findings()).tables
    reasons, decisions = column(table, "decided by"), column(table, "decision")
    for one in (findings().main.claim, *findings().main.others):
        said = reasons[f"{one.challenger} - {one.baseline}"]
        counted = [c for c in one.verdict.criteria if c.name != "sharpe_full_margin"]
        refused = one.verdict.decision == Decision.NO_GO
        assert ("not met:" in said) == any(c.passed is False for c in counted)
        assert ("open:" in said) == (not refused and any(c.passed is None for c in counted))
        for criterion in counted:
            named = criterion.passed is False or (criterion.passed is None and not refused)
            assert (criterion.label.partition(" (")[0] in said) == named
        assert "full gain" not in said
    assert set(decisions.values()) <= {"GO", "CONDITIONAL", "NO-GO"}


def test_a_difference_of_drawdowns_is_within_100_percent():
    main = findings().main
    wild = NonInferiority(Interval(0.1, -7.0, 7.2, 0.95, "t"), 0.02, 6, None)
    found = replace(findings(), sizes={400: replace(main, claim=replace(main.claim, drawdown=wild))})
    shown = column(comparisons(found).tables[0], "drawdown difference")["mbpo - sac"]
    assert (shown.low, shown.estimate, shown.high) == (-1.0, 0.1, 1.0)


def test_the_results_tell_a_halt_from_the_kill_switch():
    note = results_table("Results", findings().main, CONFIG).note
    assert "at a drawdown of 12 % trading is halted and released after 20 bars, at 15 % the kill switch latches" in note
    assert "has no hit rate" in more_metrics(findings().main).tables[0].note


def test_every_learner_has_its_curve(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report_sections,
        "sharpe_by_size",
        lambda sizes, curves, levels: drawn.extend(curves) or sharpe_by_size(sizes, curves, levels),
    )
    training_lengths(findings(), CONFIG)
    assert drawn[0] == "mbpo"
    assert set(drawn) == {name for name, one in findings().main.policies.items() if one.train_bars}
