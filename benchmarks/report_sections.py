"""The sections of a report: each a function of the findings, with its tables, pictures and words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison import Comparison, Walked, metric_interval, sharpe_aggregates
from benchmarks.findings import Findings, SizeFindings
from benchmarks.suite import judged_market
from configs import DetentConfig
from envs import TradingDynamics
from evaluation.mask_plot import mask_reasons
from evaluation.plots import holdout_calibration, png_bytes
from evaluation.report import Column, Figure, Section, Table
from evaluation.report.figures import difference_distribution, equity_fan, forest, regime_and_position, sharpe_by_size

Row = tuple[Any, ...]

SHOWN = 7
"""Learning curves in a picture; more cannot be told apart."""
STRIP_BARS = 250
"""Bars of the first path that masks and positions are shown for."""
LEVELS = ("oracle", "belief_filter", "buy_and_hold")
"""Policies that need no training, drawn as levels."""

RESULT_COLUMNS = (
    Column("policy"),
    Column("kind"),
    Column("Sharpe", "per year", "+.2f", interval=True),
    Column("middle half", "per year", "+.2f", interval=True),
    Column("max drawdown", "share", ".1%", interval=True),
    Column("kill switch", "share of paths", ".1%"),
    Column("turnover", "equity per year", ".1f"),
    Column("exposure", "equity", ".2f"),
    Column("costs", "share of final equity", ".1%"),
    Column("decision p99", "ms", ".2f"),
)


# --- tables ------------------------------------------------------------------------------------------------------


def results_table(name: str, main: SizeFindings, config: DetentConfig) -> Table:
    """Every policy with its intervals, best Sharpe ratio first."""
    rules = config.evaluation.verdict
    rows = []
    for one in _ranked(main.policies):
        mean, middle = sharpe_aggregates(one, rules)
        rows.append(
            (
                one.name,
                one.family.replace("_", "-"),
                mean,
                middle,
                metric_interval(one, "max_drawdown", rules.confidence),
                _mean(one, "killed"),
                _mean(one, "turnover_per_year"),
                _mean(one, "exposure"),
                _mean(one, "cost_paid"),
                float(np.quantile(one.decision_ms, 0.99)),
            )
        )
    of = "paths" if main.train_bars else "folds"
    counts = {one.name: one.metrics["sharpe"].shape[1] for one in main.policies.values()}
    most, least = max(counts.values()), min(counts.values())
    note = (
        f"Mean over training runs and {most} {of}, {rules.confidence:.0%} intervals over runs and {of}. "
        f"Decision: one state at a time, in Python; the exported graph is timed by `detent bench latency`."
    )
    few = sorted(name for name, count in counts.items() if count < most)
    if few:
        note += f" {_listed(few)}: the first {least} paths only; comparisons use the paths both have walked."
    return Table(name, RESULT_COLUMNS, tuple(rows), note)


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
        "The rival is the model-free policy with the best validation score at that length.",
    )
    levels = {name: _mean(findings.main.policies[name], "sharpe") for name in LEVELS if name in findings.main.policies}
    pair = (findings.main.claim.challenger, findings.main.claim.baseline)
    drawn = (*pair, *[name for name in names if name not in pair][: SHOWN - len(pair)])
    picture = sharpe_by_size(sizes, {name: intervals[name] for name in names if name in drawn}, levels)
    figure = Figure(
        "Sharpe ratio by training length",
        png_bytes(picture),
        "Sharpe ratio of each learner over the length of its training path, with intervals, between the levels of "
        "oracle, belief filter and buy and hold.",
    )
    return Section("Training length", (), (table, verdicts), (figure,))


def the_claim(main: SizeFindings, config: DetentConfig) -> Section:
    """The claim itself: its interval, its distribution, the sample it would have needed."""
    claim, rules = main.claim, config.evaluation.verdict
    text: list[str] = []
    figures: tuple[Figure, ...] = ()
    of = "path" if main.train_bars else "fold"
    if claim.sharpe is not None:
        text.append(
            f"Interval: {claim.gain.method}; cross-check: {claim.sharpe.hac.method}, "
            f"{claim.sharpe.hac.low:+.3f} to {claim.sharpe.hac.high:+.3f}."
        )
        picture = difference_distribution(
            claim.sharpe.samples, claim.gain, {"no difference": 0.0, "asked for": rules.min_sharpe_gain}
        )
        explained = (
            f"Bootstrap distribution of the annual Sharpe ratio of {claim.challenger} minus that of {claim.baseline}, "
            f"with its interval and the gain that is asked for."
        )
        figures = (Figure("Difference of Sharpe ratios", png_bytes(picture), explained),)
    else:
        text.append(claim.verdict.criterion("sharpe_point").reason + ".")
    power = Table(
        "Power",
        (
            Column("true gain", "Sharpe", ".2f"),
            Column("lower bound above", "Sharpe", ".2f"),
            Column("chance now", "", ".0%"),
            Column("paths needed"),
            Column("years needed", "", ",.0f"),
            Column("seeds needed"),
        ),
        tuple((row.gain, row.threshold, row.chance, row.paths, row.years, row.seeds) for row in claim.power),
        f"Samples that show a true gain with {rules.power:.0%} probability; a dash where more of that alone is never "
        f"enough.",
    )
    if claim.improvement is not None:
        text.append(
            f"On one {of} {claim.challenger} has the higher Sharpe ratio with probability "
            f"{claim.improvement.estimate:.2f} ({claim.improvement.low:.2f} to {claim.improvement.high:.2f})."
        )
    if claim.kill_switch is not None:
        events = claim.kill_switch.paths_with_events
        text.append(
            f"Kill switch: {claim.challenger} on {events[0]} {of}s, {claim.baseline} on {events[1]}; the rate of "
            f"{claim.challenger} is at most {claim.kill_switch.rate_a_bound:.1%} at {rules.confidence:.0%}."
        )
    deflated = main.deflated
    if deflated is not None:
        text.append(
            f"Deflated Sharpe ratio of {claim.challenger}, a middling run and path, {deflated.trials} trials counted: "
            f"{deflated.probability:.3f} (not deflated {deflated.undeflated:.3f})."
        )
    return Section("The claim", tuple(text), (power,), figures)


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
            Column("P(better on a path)", "", ".2f"),
            Column("drawdown difference", "share", "+.1%", interval=True),
            Column("decision"),
        ),
        tuple(_pair(one) for one in pairs),
    )
    text: tuple[str, ...] = ()
    if main.superior is not None:
        better = _listed(main.superior.superior) or "none"
        text = (
            f"Better than buy and hold, all policies tested at once (StepM, {main.superior.level:.0%}): {better}; "
            f"Hansen's SPA p-value {main.superior.p_value:.3f}. Both on a book that spreads its money over all runs "
            f"and paths.",
        )
    decided = {f"{one.challenger} - {one.baseline}": one.gain for one in pairs if one.sharpe is not None}
    figures: tuple[Figure, ...] = ()
    if decided:
        picture = forest(decided, label="difference of annual Sharpe ratios", references={"no difference": 0.0})
        said = "Sharpe differences of all pairs with their intervals."
        figures = (Figure("Differences", png_bytes(picture), said),)
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
    table = Table("More metrics", (Column("policy"), *columns.values()), rows, "Means over runs and paths.")
    costs = Table(
        "What a policy costs",
        (
            Column("policy"),
            Column("validation score", "", "+.3f"),
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


# --- pictures ----------------------------------------------------------------------------------------------------


def equity(main: SizeFindings, timestamps: NDArray[np.datetime64]) -> Section:
    """Equity and drawdown of the policies that matter. Args: timestamps [n + 1]."""
    chosen = _shown(main)
    curves = {name: _equity_of(one.returns[0] if one.paths > 1 else one.returns[:, 0]) for name, one in chosen.items()}
    over = "paths of the first training run" if next(iter(chosen.values())).paths > 1 else "training runs"
    figure = Figure(
        "Equity and drawdown",
        png_bytes(equity_fan(timestamps, curves)),
        f"Median and central 80 % of equity and drawdown over {over}, for {_listed(chosen)}.",
    )
    return Section("Equity and drawdown", (), (), (figure,))


def _equity_of(returns: NDArray[np.float32]) -> NDArray[np.float64]:
    growth = np.pad(1.0 + returns.astype(np.float64), ((0, 0), (1, 0)), constant_values=1.0)
    return np.asarray(np.cumprod(growth, axis=1), dtype=np.float64)


def first_market(config: DetentConfig, findings: Findings) -> Section:
    """One test market: regimes, positions, masks and their reasons."""
    market = judged_market(config)
    names = [name for name in _shown(findings.main) if name in findings.first_path and name != "flat"]
    gap, intraday = (market.features.names.index(name) for name in ("gap_return", "intraday_return"))
    moves = market.features.values[0, :, gap] + market.features.values[0, :, intraday]
    positions = {name: findings.first_path[name]["position"] for name in names}
    regimes = regime_and_position(
        market.features.timestamps, np.exp(np.cumsum(moves)), market.regime[0].astype(np.int64), positions
    )
    figures = [
        Figure(
            "Regimes and positions",
            png_bytes(regimes),
            "Price of the first test market over its hidden regimes, and what each policy held.",
        )
    ]
    challenger = findings.main.claim.challenger
    first = findings.first_path[challenger]
    dynamics = TradingDynamics.from_config(market.features.names, config)
    fields = dynamics.rule_set.fields
    columns = {name: first["rule_states"][:STRIP_BARS, index] for index, name in enumerate(fields)}
    strip = mask_reasons(
        dynamics.rule_set,
        columns,
        first["actions"][:STRIP_BARS].astype(np.int64),
        timestamps=market.features.timestamps[: len(first["actions"][:STRIP_BARS])],
        title=f"Masks, their reasons and choices: {challenger}",
    )
    figures.append(
        Figure(
            "Masks and choices",
            png_bytes(strip),
            f"Which actions were forbidden to {challenger}, by which rule, and what it chose, bar by bar.",
        )
    )
    return Section("One market looked at closely", (), (), tuple(figures))


def world_model(findings: Findings) -> tuple[Section, ...]:
    """Calibration of the world model on validation markets; nothing where no policy has one."""
    first = findings.first_path.get("mbpo", {})
    if "pit" not in first:
        return ()
    coverage = dict(zip(("50", "80", "95"), first["coverage"].tolist(), strict=True))
    figure = Figure(
        "Calibration of the world model",
        png_bytes(holdout_calibration(first["pit"], coverage)),
        "Histogram of probability integral transforms and coverage of central intervals on validation markets.",
    )
    return (Section("World model", (), (), (figure,)),)


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
                {"leak": "tomorrow's return is a feature", "shuffled": "signals of another time"}[one.variant],
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
            Column("max drawdown", "share", ".1%"),
            Column("kill switch", "share of paths", ".1%"),
        ),
        tuple(
            (name, *(float(metrics[key].mean()) for key in ("sharpe", "max_drawdown", "killed")))
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


def _shown(main: SizeFindings) -> dict[str, Walked]:
    first = [main.claim.challenger, main.claim.baseline, "belief_filter", "ridge", "buy_and_hold", "linear_signal"]
    return {name: main.policies[name] for name in first if name in main.policies and name != "flat"}


def not_shown(main: SizeFindings) -> tuple[str, ...]:
    """What the evidence does not say."""
    lines = [
        f"{criterion.name}: {criterion.reason}" for criterion in main.claim.verdict.criteria if not criterion.passed
    ]
    return tuple(lines)


def _mean(one: Walked, metric: str) -> float:
    return float(np.mean(one.metrics[metric]))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
