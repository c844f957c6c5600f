"""Each section of a report says what was found, and what is missing is missing."""

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
    market,
    shown,
)
from suite_worlds import YEAR, returns, walked

from benchmarks import report_sections
from benchmarks.comparison import compare
from benchmarks.report_pictures import equity, first_market, world_model
from benchmarks.report_sections import checks, comparisons, not_shown, stress, the_claim, training_lengths
from benchmarks.report_tables import more_metrics, results_table
from evaluation.report.display import criterion_name
from evaluation.report.figures import sharpe_by_size
from evaluation.statistics import deflated_sharpe
from evaluation.statistics.interval import Interval
from evaluation.statistics.limits import NonInferiority
from evaluation.verdict import Decision


def test_whoever_walked_few_paths_is_named_wherever_he_stands_beside_others():
    section = training_lengths(findings(), CONFIG)
    assert FEW in section.tables[0].note
    assert FEW in section.figures[0].caption
    assert FEW in more_metrics(findings().main).tables[0].note


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
            assert (criterion.question.label.partition(" (")[0] in said) == named
        assert "full gain" not in said
    assert set(decisions.values()) <= {"GO", "CONDITIONAL", "NO-GO"}


def test_a_difference_of_drawdowns_is_within_100_percent():
    main = findings().main
    wild = NonInferiority(Interval(0.1, -7.0, 7.2, 0.95, "t"), 0.02, 6, None)
    found = replace(findings(), sizes={400: replace(main, claim=replace(main.claim, drawdown=wild))})
    shown = column(comparisons(found).tables[0], "drawdown difference")["mbpo - sac"]
    assert (shown.low, shown.estimate, shown.high) == (-1.0, 0.1, 1.0)


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
