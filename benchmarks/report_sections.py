"""The sections of a report: each a function of the findings, with its tables, pictures and words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.comparison import Comparison, Walked, metric_interval, sharpe_aggregates
from benchmarks.findings import LABELS, Findings, SizeFindings
from benchmarks.report_pictures import explained
from configs import DetentConfig
from evaluation.report import Column, Figure, Section, Table
from evaluation.report.display import criterion_name
from evaluation.report.figures import difference_distribution, forest, sharpe_by_size
from evaluation.statistics import Interval, sharpe_by_path

Row = tuple[Any, ...]

SHOWN = 7
"""Learning curves in a picture; more cannot be told apart."""
LEVELS = ("oracle", "belief_filter", "buy_and_hold")
"""Policies that need no training, drawn as levels."""


# --- tables ------------------------------------------------------------------------------------------------------


def results_table(name: str, main: SizeFindings, config: DetentConfig) -> Table:
    """Every policy with its intervals, best Sharpe ratio first."""
    rules, unit = config.evaluation.verdict, main.unit
    by_fold = unit == "fold"
    columns = (
        Column("policy"),
        Column("kind"),
        Column("Sharpe", "per year", "+.2f", interval=True),
        *((Column("Sharpe of joined folds", "per year", "+.2f"),) if by_fold else ()),
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
    for one in _ranked(main.policies):
        mean, middle = sharpe_aggregates(one, rules)
        joined = (float(sharpe_by_path(one.returns, config.data.bars_per_year).mean()),) if by_fold else ()
        rows.append(
            (
                one.name,
                one.family.replace("_", "-"),
                mean,
                *joined,
                middle,
                _share(metric_interval(one, "max_drawdown", rules.confidence)),
                _mean(one, "killed"),
                _mean(one, "turnover_per_year"),
                _mean(one, "exposure"),
                _mean(one, "cost_paid"),
                float(np.quantile(one.decision_ms, 0.99)),
                _walked(one),
            )
        )
    most = max(_walked(one) for one in main.policies.values())
    note = (
        f"Mean over training runs and {most} {unit}s, {rules.confidence:.0%} intervals over runs and {unit}s. "
        f"Decision: one state at a time, in Python; the exported graph is timed by `detent bench latency`."
    )
    if by_fold:
        note += " The verdict compares ratios of joined folds, not means of the ratios of each."
    few = _few_paths(main)
    return Table(name, columns, tuple(rows), note + few + " Comparisons use the paths both have walked." * bool(few))


def training_lengths(findings: Findings, config: DetentConfig) -> Section:
    """Learning curves, and the verdict at each training length."""
    sizes = sorted(findings.sizes)
    names = [one.name for one in _ranked(findings.main.policies) if one.train_bars]
    level = config.evaluation.verdict.confidence
    intervals = {
        name: [metric_interval(findings.sizes[size].policies[name], "sharpe", level) for size in sizes]
        for name in names
    }
    table = Table(
        "Sharpe ratio by training length",
        (Column("policy"), *(Column(f"{size:,} bars", "per year", "+.2f", interval=True) for size in sizes)),
        tuple((name, *intervals[name]) for name in names),
        f"Means over training runs and paths, {level:.0%} intervals.{_few_paths(findings.main)}",
    )
    verdicts = Table(
        "Verdict by training length",
        (
            Column("training bars", "", ","),
            Column("rival"),
            Column("Sharpe gain", "per year", "+.3f", interval=True),
            Column("verdict"),
            Column("next step"),
        ),
        tuple(
            (
                size,
                one.claim.baseline,
                one.claim.gain,
                str(one.claim.verdict.decision),
                one.claim.verdict.next_step,
            )
            for size, one in sorted(findings.sizes.items())
        ),
        "The rival is the model-free policy with the highest Sharpe ratio on the validation markets at that length.",
    )
    levels = {name: _mean(findings.main.policies[name], "sharpe") for name in LEVELS if name in findings.main.policies}
    pair = (findings.main.claim.challenger, findings.main.claim.baseline)
    drawn = (*pair, *[name for name in names if name not in pair][: SHOWN - len(pair)])
    picture = sharpe_by_size(sizes, {name: intervals[name] for name in names if name in drawn}, levels)
    figure = explained(
        "Sharpe ratio by training length",
        picture,
        f"Sharpe ratio of each learner over the length of its training path, with intervals, between the levels of "
        f"oracle, belief filter and buy and hold.{_few_paths(findings.main)}",
    )
    return Section("Training length", (), (table, verdicts), (figure,))


def the_claim(main: SizeFindings, config: DetentConfig) -> Section:
    """The claim itself: its interval, its distribution, the sample it would have needed."""
    claim, rules = main.claim, config.evaluation.verdict
    text: list[str] = []
    figures: tuple[Figure, ...] = ()
    unit = main.unit
    if claim.sharpe is not None:
        text.append(
            f"Interval: {claim.gain.method}; cross-check: {claim.sharpe.hac.method}, "
            f"{claim.sharpe.hac.low:+.3f} to {claim.sharpe.hac.high:+.3f}."
        )
        gains = ", ".join(f"{gain:+.3f}" for gain in claim.sharpe.by_seed)
        if claim.sharpe.seeds > 1:
            unseen = 1.0 - 0.05 ** (1.0 / claim.sharpe.seeds)
            text.append(
                f"Gain of each training run: {gains}. The interval supposes roughly normal training luck: a failure "
                f"that hits up to {unseen:.0%} of the runs may go unseen in {claim.sharpe.seeds}."
            )
        picture = difference_distribution(
            claim.sharpe.samples, claim.gain, {"no difference": 0.0, "asked for": rules.min_sharpe_gain}
        )
        said = (
            f"Bootstrap distribution of the annual Sharpe ratio of {claim.challenger} minus that of {claim.baseline}, "
            f"widened to its interval, and the gain that is asked for."
        )
        figures = (explained("Difference of Sharpe ratios", picture, said),)
    else:
        text.append(claim.verdict.criterion("sharpe_point").reason + ".")
    if claim.improvement is not None:
        text.append(
            f"On one {unit} {claim.challenger} has the higher Sharpe ratio with probability "
            f"{claim.improvement.estimate:.2f} ({claim.improvement.low:.2f} to {claim.improvement.high:.2f})."
        )
    if claim.kill_switch is not None:
        killed = claim.kill_switch
        events = killed.paths_with_events
        text.append(
            f"Kill switch: {claim.challenger} on {events[0]} of {killed.difference.paths} {unit}s, {claim.baseline} on "
            f"{events[1]}; for these {killed.seeds} training runs on new markets the rate of {claim.challenger} is at "
            f"most {killed.rate_a_bound:.1%} at {rules.confidence:.0%}; exact paired test over "
            f"runs p = {killed.p_value:.3f}."
        )
    deflated = main.deflated
    if deflated is not None:
        text.append(
            f"Deflated Sharpe ratio of {claim.challenger}, a middling run{' and path' * (unit == 'path')}: "
            f"{deflated.probability:.3f} (not deflated {deflated.undeflated:.3f}). Counted are the {deflated.trials} "
            f"settings tried for {claim.challenger}; the spread of its training runs stands for that of trials."
        )
    return Section("The claim", tuple(text), (_power(main, rules.power),), figures)


def _power(main: SizeFindings, power: float) -> Table:
    sharpe = main.claim.sharpe
    columns = {
        "gain": Column("true gain", "Sharpe", ".2f"),
        "threshold": Column("lower bound above", "Sharpe", ".2f"),
        "chance": Column("chance now", "", ".0%"),
        "paths": Column("paths needed"),
        "years": Column("years needed", "", ",.0f"),
        "seeds": Column("seeds needed"),
    }
    if sharpe is not None and sharpe.paths == 1:
        # Of a single series there is no other path, only more of it.
        del columns["paths"]
    note = (
        f"Samples that show a true gain with {power:.0%} probability; a dash where more of that alone is never enough"
    )
    if sharpe is not None and sharpe.seeds == 1:
        note += (
            ", and under seeds where it is unknown. One training run does not say how runs differ: chance, paths and "
            "years leave that out, and no number of paths is GO"
        )
    rows = tuple(tuple(getattr(row, name) for name in columns) for row in main.claim.power)
    return Table("Power", tuple(columns.values()), rows, f"{note}.")


def comparisons(findings: Findings) -> Section:
    """The challenger against everybody, and who beats buy and hold."""
    main = findings.main
    pairs = (main.claim, *main.others)
    table = Table(
        "Comparisons",
        (
            Column("pair"),
            Column("Sharpe difference", "per year", "+.3f", interval=True),
            Column("HAC cross-check", "per year", "+.3f", interval=True),
            Column(f"P(better on a {main.unit})", "", ".2f"),
            Column("drawdown difference", "share", "+.1%", interval=True),
            Column("decision"),
        ),
        tuple(_pair(one) for one in pairs),
    )
    text: tuple[str, ...] = ()
    if main.superior is not None:
        found = main.superior
        p_value = f"< {1 / found.resamples:g}" if found.p_value == 0.0 else f"{found.p_value:.3f}"
        text = (
            f"Better than buy and hold (StepM, {found.level:.0%}): {_listed(found.superior) or 'none'}; Hansen's SPA "
            f"p-value {p_value}. Tested at once were those that walked every path, without flat, oracle and belief "
            f"filter: {_listed(found.tested)}. Sharpe ratios are averaged over runs and paths, for these training "
            f"runs; the spread between runs is left out, see the intervals above.",
        )
    decided = {f"{one.challenger} - {one.baseline}": one.gain for one in pairs if one.sharpe is not None}
    figures: tuple[Figure, ...] = ()
    if decided:
        picture = forest(decided, label="difference of annual Sharpe ratios", references={"no difference": 0.0})
        said = "Sharpe differences of all pairs with their intervals."
        figures = (explained("Differences", picture, said),)
    return Section("Who is better than whom", text, (table,), figures)


def _pair(one: Comparison) -> Row:
    return (
        f"{one.challenger} - {one.baseline}",
        one.gain,
        None if one.sharpe is None else one.sharpe.hac,
        None if one.improvement is None else one.improvement.estimate,
        None if one.drawdown is None else one.drawdown.interval,
        str(one.verdict.decision),
    )


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
    rows: tuple[Row, ...] = tuple((one.name, *(_mean(one, key) for key in columns)) for one in _ranked(main.policies))
    fits: tuple[Row, ...] = tuple(
        (one.name, one.validation_score, one.fit_seconds, float(np.median(one.decision_ms)), one.invalid_actions)
        for one in _ranked(main.policies)
    )
    note = f"Means over training runs and {main.unit}s.{_few_paths(main)}"
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
    """Sharpe ratios of each fold. Args: folds: first and last time of its windows."""
    names = [one.name for one in _ranked(main.policies)]
    table = Table(
        "Sharpe ratio by fold",
        (Column("fold"), Column("train"), Column("test"), *(Column(name, "per year", "+.2f") for name in names)),
        tuple(
            (
                number + 1,
                fold["train"],
                fold["test"],
                *(float(main.policies[name].metrics["sharpe"][:, number].mean()) for name in names),
            )
            for number, fold in enumerate(folds)
        ),
        "Means over training runs. A fold is short: its ratios scatter by about one over the root of its years.",
    )
    return Section("Fold by fold", (), (table,))


def checks(findings: Findings) -> tuple[Section, ...]:
    """Whether the instrument can learn, and whether it leaks."""
    if not findings.checks:
        return ()
    table = Table(
        "Can it learn, does it leak",
        (
            Column("labels"),
            Column("policy"),
            Column("Sharpe", "per year", "+.2f"),
            Column("threshold", "per year", "+.2f"),
            Column("what it is"),
            Column("passed"),
        ),
        tuple(
            (
                LABELS[one.variant],
                one.policy,
                one.sharpe,
                one.threshold,
                one.yardstick,
                one.passed,
            )
            for one in findings.checks
        ),
        "With tomorrow's return a policy must reach the threshold; where signals mean nothing it must stay below.",
    )
    return (Section("Checks of the instrument", (), (table,)),)


def stress(findings: Findings, config: DetentConfig) -> tuple[Section, ...]:
    """The same policies on GARCH-t markets."""
    if not findings.stress:
        return ()
    rows = sorted(findings.stress.items(), key=lambda item: -float(item[1]["sharpe"].mean()))
    table = Table(
        "GARCH-t markets",
        (
            Column("policy"),
            Column("Sharpe", "per year", "+.2f"),
            Column("median Sharpe", "per year", "+.2f"),
            Column("max drawdown", "share", ".1%"),
            Column("kill switch", "share of paths", ".1%"),
        ),
        tuple(
            (
                name,
                float(metrics["sharpe"].mean()),
                float(np.median(metrics["sharpe"])),
                *(float(metrics[key].mean()) for key in ("max_drawdown", "killed")),
            )
            for name, metrics in rows
        ),
        f"{config.evaluation.suite.stress_paths} paths with heavy tails and clustered volatility, which no policy was "
        f"trained on; policies of the longest training length.",
    )
    return (Section("Stress", (), (table,)),)


# --- small things ------------------------------------------------------------------------------------------------


def _ranked(policies: Mapping[str, Walked]) -> list[Walked]:
    def place(one: Walked) -> float:
        ratio = _mean(one, "sharpe")
        return math.inf if math.isnan(ratio) else -ratio

    return sorted(policies.values(), key=place)


def not_shown(findings: Findings) -> tuple[str, ...]:
    """What the evidence does not say: criteria not met, checks that failed, the limits of every such comparison."""
    criteria = findings.main.claim.verdict.criteria
    unmet = [one for one in criteria if not one.passed and one.name != "instrument"]
    return (
        *(f"{criterion_name(one)}: {one.reason}." for one in unmet),
        *(f"Failed check of the instrument: {one.failure}." for one in findings.checks if not one.passed),
        "One series is one history: other years, or another market, may say otherwise."
        if findings.main.unit == "fold"
        else "Simulated markets are not a market: what holds on them need not hold on real bars.",
        "The kill switch speaks of these training runs: another one may be killed where none of these was. The "
        "drawdown is a mean: single accounts lose more.",
        "A Sharpe gain does not say where it comes from: a better forecast, other exposure, or more tuning.",
    )


# What metrics are counted on: paths, or folds.
def _walked(one: Walked) -> int:
    return int(one.metrics["sharpe"].shape[1])


def _few_paths(main: SizeFindings) -> str:
    counts = {name: _walked(one) for name, one in main.policies.items()}
    most, least = max(counts.values()), min(counts.values())
    few = sorted(name for name, count in counts.items() if count < most)
    return f" {_listed(few)}: the first {least} paths only." if few else ""


# No drawdown is below nothing or above everything, whatever its t interval says.
def _share(interval: Interval) -> Interval:
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _mean(one: Walked, metric: str) -> float:
    return float(np.mean(one.metrics[metric]))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
