"""The sections of a report: each a function of the findings, with its tables, pictures and words."""

from __future__ import annotations

import numpy as np

from benchmarks.comparison import Comparison, metric_interval
from benchmarks.findings import LABELS, Findings, SizeFindings
from benchmarks.report_pictures import explained
from benchmarks.report_tables import Row, difference_of_shares, few_paths, mean_of, ranked
from configs import DetentConfig
from evaluation.report import Column, Figure, Section, Table
from evaluation.report.display import criterion_name, sentence, unmet
from evaluation.report.figures import difference_distribution, forest, sharpe_by_size

LEVELS = ("oracle", "belief_filter", "buy_and_hold")
"""Policies that need no training, drawn as levels."""


def training_lengths(findings: Findings, config: DetentConfig) -> Section:
    """Learning curves, and the verdict at each training length."""
    sizes = sorted(findings.sizes)
    names = [one.name for one in ranked(findings.main) if one.train_bars]
    level = config.evaluation.verdict.confidence
    intervals = {
        name: [metric_interval(findings.sizes[size].policies[name], "sharpe", level) for size in sizes]
        for name in names
    }
    table = Table(
        "Sharpe ratio by training length",
        (Column("policy"), *(Column(f"{size:,} bars", "per year", "+.2f", interval=True) for size in sizes)),
        tuple((name, *intervals[name]) for name in names),
        f"Means over training runs and paths, {level:.0%} intervals.{few_paths(findings.main)}",
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
    levels = {
        name: mean_of(findings.main.policies[name], "sharpe") for name in LEVELS if name in findings.main.policies
    }
    # The challenger first, which is drawn on top.
    drawn = sorted(names, key=lambda name: name != findings.main.claim.challenger)
    picture = sharpe_by_size(sizes, {name: intervals[name] for name in drawn}, levels)
    figure = explained(
        "Sharpe ratio by training length",
        picture,
        f"Sharpe ratio of each learner over the length of its training path, with intervals, between the levels of "
        f"oracle, belief filter and buy and hold.{few_paths(findings.main)}",
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
        text.append(sentence(claim.verdict.criterion("sharpe_point").reason))
    if claim.improvement is not None:
        text.append(
            f"On one {unit} {claim.challenger} has the higher Sharpe ratio with probability "
            f"{claim.improvement.estimate:.2f} ({claim.improvement.low:.2f} to {claim.improvement.high:.2f})."
        )
    if claim.kill_switch is not None:
        killed = claim.kill_switch
        events = killed.paths_with_events
        markets = "markets" if unit == "path" else "folds"
        text.append(
            f"Kill switch: {claim.challenger} on {events[0]} of {killed.difference.paths} {unit}s, {claim.baseline} on "
            f"{events[1]}; for {_these_runs(killed.seeds)} on new {markets} the rate of {claim.challenger} is at "
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
        "seeds": Column("training runs needed"),
    }
    if sharpe is not None and sharpe.paths == 1:
        # Of a single series there is no other path, only more of it.
        del columns["paths"]
    note = (
        f"Samples that show a true gain with {power:.0%} probability; a dash where more of that alone is never enough"
    )
    if sharpe is not None and sharpe.seeds == 1:
        note += (
            f", and under training runs where it is unknown. One training run does not say how runs differ: chance"
            f"{', paths' if sharpe.paths > 1 else ''} and years leave that out, and no number of them is GO"
        )
    rows = tuple(tuple(getattr(row, name) for name in columns) for row in main.claim.power)
    return Table("Power", tuple(columns.values()), rows, f"{note}.")


def _these_runs(runs: int) -> str:
    return f"these {runs} training runs" if runs > 1 else "this training run"


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
            Column("decided by"),
        ),
        tuple(_pair(one) for one in pairs),
    )
    text: tuple[str, ...] = ()
    if main.superior is not None:
        found = main.superior
        p_value = f"< {1 / found.resamples:g}" if found.p_value == 0.0 else f"{found.p_value:.3f}"
        tested, averaged = "those that walked every path, without flat, oracle and belief filter", "runs and paths"
        if main.unit == "fold":
            tested, averaged = "all but flat on the bars of the joined folds", "runs"
        text = (
            f"Better than buy and hold (StepM, {found.level:.0%}): {', '.join(found.superior) or 'none'}; Hansen's SPA "
            f"p-value {p_value}. Tested at once were {tested}: {', '.join(found.tested)}. Sharpe ratios are averaged "
            f"over {averaged}, for these training runs; the spread between runs is left out, see the intervals above.",
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
        None if one.drawdown is None else difference_of_shares(one.drawdown.interval),
        str(one.verdict.decision),
        unmet(one.verdict),
    )


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


def not_shown(findings: Findings) -> tuple[str, ...]:
    """What the evidence does not say: criteria not met, checks that failed, the limits of every such comparison."""
    criteria = findings.main.claim.verdict.criteria
    missed = [one for one in criteria if not one.passed and one.name != "instrument"]
    return (
        *(f"{criterion_name(one)}: {one.reason}." for one in missed),
        *(f"Failed check of the instrument: {one.failure}." for one in findings.checks if not one.passed),
        "One series is one history: other years, or another market, may say otherwise."
        if findings.main.unit == "fold"
        else "Simulated markets are not a market: what holds on them need not hold on real bars.",
        "The kill switch speaks of these training runs: another one may be killed where none of these was. The "
        "drawdown is a mean: single accounts lose more.",
        "A Sharpe gain does not say where it comes from: a better forecast, other exposure, or more tuning.",
    )
