"""The tables of a report with a row per policy, or per fold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.comparison import Walked, metric_interval, sharpe_aggregates
from benchmarks.findings import SizeFindings
from configs import DetentConfig
from evaluation.report import Column, Section, Table
from evaluation.statistics import Interval, sharpe_by_path

Row = tuple[Any, ...]

BEST = 5
"""Policies that the summary shows besides the pair of the claim and the references."""
JOINED = "Sharpe of joined folds"
"""What the verdict of a walk-forward compares."""


def results_table(name: str, main: SizeFindings, config: DetentConfig) -> Table:
    """Every policy with its intervals, best Sharpe ratio first."""
    rules, unit = config.evaluation.verdict, main.unit
    by_fold = unit == "fold"
    columns = (
        Column("policy"),
        Column("kind"),
        *((Column(JOINED, "per year", "+.2f"),) if by_fold else ()),
        Column("mean Sharpe of a fold" if by_fold else "Sharpe", "per year", "+.2f", interval=True),
        Column("middle half", "per year", "+.2f", interval=True),
        Column("max drawdown", "share", ".1%", interval=True),
        Column("kill switch", f"share of {unit}s", ".1%"),
        Column("turnover", "equity per year", ".1f"),
        Column("exposure", "equity", ".2f"),
        Column("costs", "share of final equity", ".1%"),
        Column("decision p99", "ms", ".2f"),
        Column(f"{unit}s"),
    )
    rows = []
    for one in ranked(main):
        mean, middle = sharpe_aggregates(one, rules)
        rows.append(
            (
                one.name,
                one.family.replace("_", "-"),
                *((joined_sharpe(one, config.data.bars_per_year),) if by_fold else ()),
                mean,
                middle,
                _clipped(metric_interval(one, "max_drawdown", rules.confidence), 0.0, 1.0),
                mean_of(one, "killed"),
                mean_of(one, "turnover_per_year"),
                mean_of(one, "exposure"),
                mean_of(one, "cost_paid"),
                float(np.quantile(one.decision_ms, 0.99)),
                _walked(one),
            )
        )
    few = few_paths(main)
    limits = config.limits
    note = [
        f"Mean over training runs and {max(map(_walked, main.policies.values()))} {unit}s, {rules.confidence:.0%} "
        f"intervals over runs and {unit}s.{few}",
        "Comparisons use the paths both have walked." if few else "",
        "The verdict compares the ratios of joined folds, not the mean of the ratios of each." if by_fold else "",
        f"Kill switch and time halted differ: at a drawdown of {100 * limits.hard_drawdown:g} % trading is halted and "
        f"released after {limits.cooldown_bars} bars, at {100 * limits.kill_drawdown:g} % the kill switch latches and "
        f"trading stays halted to the end.",
        "Decision: one state at a time, in Python; the exported graph is timed by `detent bench latency`.",
    ]
    return Table(name, columns, tuple(rows), " ".join(filter(None, note)))


def summary_columns(main: SizeFindings) -> tuple[str, ...]:
    """Columns of the results that fit a page of text."""
    return ("policy", JOINED if main.unit == "fold" else "Sharpe", "max drawdown", "kill switch", "exposure")


def summary_rows(main: SizeFindings) -> tuple[str, ...]:
    """The pair of the claim, the references, and the best five."""
    order = ranked(main)
    best = [one.name for one in order[:BEST]]
    wanted = {main.claim.challenger, main.claim.baseline, *best}
    return tuple(one.name for one in order if one.name in wanted or one.family == "reference")


def more_metrics(main: SizeFindings) -> Section:
    """Ratios, time in each trading state, and what a policy costs to fit and to ask."""
    columns = {
        "sortino": Column("Sortino", "per year", "+.2f"),
        "calmar": Column("Calmar", "", "+.2f"),
        "annual_return": Column("return", "per year", "+.1%"),
        "annual_volatility": Column("volatility", "per root year", ".1%"),
        "hit_rate": Column("hit rate", "", ".1%"),
        "time_active": Column("active", "share of time", ".1%"),
        "time_reduce_only": Column("reduce only", "share of time", ".1%"),
        "time_halted": Column("halted", "share of time", ".1%"),
        "reward_per_bar": Column("reward", "per bar", "+.4f"),
    }
    rows: tuple[Row, ...] = tuple((one.name, *(mean_of(one, key) for key in columns)) for one in ranked(main))
    fits: tuple[Row, ...] = tuple(
        (one.name, one.validation_score, one.fit_seconds, float(np.median(one.decision_ms)), one.invalid_actions)
        for one in ranked(main)
    )
    note = (
        f"Means over training runs and {main.unit}s.{few_paths(main)} A policy that in some run neither wins nor loses "
        f"a bar of a {main.unit}, because it never trades there, has no hit rate."
    )
    table = Table("More metrics", (Column("policy"), *columns.values()), rows, note)
    # What chose snapshots and settings, `benchmarks.contenders.Lesson.score`.
    score = Column("validation Sharpe", "per year", "+.3f")
    if main.unit == "fold":
        score = Column("validation reward", "per bar", "+.4f")
    costs = Table(
        "What a policy costs",
        (
            Column("policy"),
            score,
            Column("fit", "s", ".1f"),
            Column("decision p50", "ms", ".3f"),
            Column("forbidden actions"),
        ),
        fits,
        "The fit of mbpo includes world model and planners, which share it.",
    )
    return Section("More about the policies", (), (table, costs))


def fold_by_fold(main: SizeFindings, folds: Sequence[Mapping[str, str]]) -> Section:
    """Each fold: the pair of the claim, then everybody else. Args: folds: first and last time of its windows."""
    pair = [main.policies[name] for name in (main.claim.challenger, main.claim.baseline)]
    challenger, rival = (one.name for one in pair)
    others = [one for one in ranked(main) if one not in pair]
    columns = (
        Column("fold"),
        Column("test"),
        Column(f"{challenger} - {rival}", "Sharpe per year", "+.2f"),
        *(Column(f"{one.name} Sharpe", "per year", "+.2f") for one in pair),
        *(Column(f"{one.name} drawdown", "share", ".1%") for one in pair),
        *(Column(f"{one.name} killed", "share of runs", ".0%") for one in pair),
        *(Column(f"{one.name} Sharpe", "per year", "+.2f") for one in others),
    )
    rows: list[Row] = []
    spans: list[Row] = []
    for number, fold in enumerate(folds):
        ratios = [_of_fold(one, "sharpe", number) for one in (*pair, *others)]
        limits = [_of_fold(one, key, number) for key in ("max_drawdown", "killed") for one in pair]
        spans.append((number + 1, fold["train"], fold["validation"], fold["test"]))
        rows.append((number + 1, fold["test"], ratios[0] - ratios[1], *ratios[:2], *limits, *ratios[2:]))
    table = Table(
        "Fold by fold",
        columns,
        tuple(rows),
        "Means over training runs. A fold is short: its ratios scatter by about one over the root of its years.",
    )
    windows = Table("Windows", tuple(map(Column, ("fold", "train", "validation", "test"))), tuple(spans))
    return Section("Fold by fold", (), (table, windows))


# --- what the sections share -------------------------------------------------------------------------------------


def ranked(main: SizeFindings) -> list[Walked]:
    """The policies by what the verdict compares: the mean Sharpe ratio, or that of the joined folds."""

    def place(one: Walked) -> float:
        # The number of bars in a year changes no order.
        ratio = joined_sharpe(one, 1) if main.unit == "fold" else mean_of(one, "sharpe")
        return math.inf if math.isnan(ratio) else -ratio

    return sorted(main.policies.values(), key=place)


def joined_sharpe(one: Walked, bars_per_year: int) -> float:
    """Annual Sharpe ratio of the joined folds, mean over training runs."""
    return float(sharpe_by_path(one.returns, bars_per_year).mean())


def mean_of(one: Walked, metric: str) -> float:
    """Mean of a metric over training runs and paths, or folds."""
    return float(np.mean(one.metrics[metric]))


def few_paths(main: SizeFindings) -> str:
    """Who walked the first paths only, as a sentence; empty where everybody walked the same."""
    counts = {name: _walked(one) for name, one in main.policies.items()}
    most, least = max(counts.values()), min(counts.values())
    few = sorted(name for name, count in counts.items() if count < most)
    return f" {', '.join(few)}: the first {least} paths only." if few else ""


def difference_of_shares(interval: Interval) -> Interval:
    """No difference of two shares is beyond 100 %, whatever its t interval says."""
    return _clipped(interval, -1.0, 1.0)


def _clipped(interval: Interval, least: float, most: float) -> Interval:
    return replace(interval, low=max(interval.low, least), high=min(interval.high, most))


# What metrics are counted on: paths, or folds.
def _walked(one: Walked) -> int:
    return int(one.metrics["sharpe"].shape[1])


def _of_fold(one: Walked, metric: str, number: int) -> float:
    return float(one.metrics[metric][:, number].mean())
