"""Whole reports, of a suite and of a walk-forward."""

from __future__ import annotations

from functools import cache

import pytest
from report_findings import (
    CONFIG,
    TESTS,
    bars,
    column,
    findings,
    fold_findings,
    made_up,
)
from suite_worlds import YEAR, small

from benchmarks.report import suite_report, walk_forward_report
from benchmarks.report_pictures import fold_market
from benchmarks.walk_forward import panel_of
from evaluation.report import Report
from evaluation.report.policies import POLICIES
from evaluation.report.writer import write_report
from evaluation.statistics import sharpe_by_path


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


def test_every_policy_of_a_report_is_explained():
    report = suite_report(CONFIG, findings(), title="Suite", reproduce=(), facts={})
    assert set(report.glossary) == set(findings().main.policies) == set(POLICIES)


@cache
def fold_report() -> Report:
    windows = [{"train": "a", "validation": "b", "test": str(number)} for number in range(3)]
    return walk_forward_report(
        CONFIG,
        fold_findings(),
        fold_market(panel_of(bars()), TESTS),
        windows,
        title="Folds",
        reproduce=("detent",),
        facts={},
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
