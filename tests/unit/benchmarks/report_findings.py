"""Made-up findings that reports are written from: a suite, and a walk-forward of three folds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from suite_worlds import BARS, YEAR, made_up_suite, returns, small, walked

from benchmarks.findings import Findings, size_findings, suite_findings
from benchmarks.report_pictures import Market, suite_market
from benchmarks.suite import plan_suite
from configs import DetentConfig
from data import FEATURE_FIELDS, FeatureTable
from evaluation.report import Section, Table

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
