"""The shadow report as text for `detent audit shadow`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import typer

from serving.bundle import Bundle
from serving.ledger.shadow import ShadowReport, Side, Trial
from serving.ledger.tally import LEVEL, Agreement, Pnl

LIMITS = """\
P&L is hypothetical: one bar at a time from the position that was really held, not where the challenger's own positions
would have led; trading state and masks are those of the live account. Intervals and errors take decisions as
independent, which those on neighbouring bars seldom are."""


def print_report(found: ShadowReport, cost_bps: float, bundles: Mapping[str, Bundle]) -> None:
    """Write the report to standard output. Args: bundles: by hash; their actions are named."""
    if not found.trials:
        typer.echo(f"no challenger beside {found.decisions} live decisions")
    for trial in found.trials:
        names = _action_names(trial, bundles)
        for line in _lines(trial, cost_bps, names):
            typer.echo(line)
    if found.unpaired:
        typer.echo(f"{found.unpaired} shadow decisions without the live one before them, not compared")
    if found.trials:
        typer.echo(LIMITS)


def _lines(trial: Trial, cost_bps: float, names: tuple[str, ...]) -> Iterator[str]:
    yield f"challenger {trial.challenger}"
    for bundle, pairs in trial.bundles.items():
        yield f"  beside {bundle}: {pairs} decisions"
    if trial.first_time is None or trial.last_time is None:
        yield "  no decision to compare yet"
        return
    yield f"  entries {trial.first_seq} to {trial.last_seq}, {_time(trial.first_time)} to {_time(trial.last_time)}"
    yield f"  equal actions         {_agreement(trial.agreement)}"
    yield f"  where both were free  {_agreement(trial.free)}"
    yield from _table("actions", ("live", "shadow", "decisions"), _actions(trial, names))
    yield from _table("holds by reason", ("", "live", "shadow"), _holds(trial))
    yield f"  overridden            live {trial.live.overridden}, shadow {trial.shadow.overridden}"
    yield f"  trading state         {_counts(trial.states)}"
    yield f"  kill switch latched   {_counts(trial.kills) if trial.kills else 'never'}"
    if trial.commands:
        yield f"  commands              {_counts(trial.commands)}"
    latency = [_latency("live", trial.live), _latency("shadow", trial.shadow)]
    yield from _table("latency, us", ("", "graphs p50", "p99", "total p50", "p99"), latency)
    title = f"P&L, basis points of equity, after {cost_bps:g} bps per traded notional"
    columns = ("", "bars", "sum", "mean", "standard error")
    sides = {"live": trial.live.pnl, "shadow": trial.shadow.pnl, "shadow - live": trial.difference}
    yield from _table(title, columns, [_pnl(name, pnl) for name, pnl in sides.items()])
    for why, pairs in trial.left_out.items():
        yield f"    left out: {pairs} decisions: {why}"


def _agreement(found: Agreement) -> str:
    if found.share is None or found.interval is None:
        return "none to compare"
    low, high = (f"{100.0 * bound:.1f}" for bound in found.interval)
    equal = f"{found.equal} of {found.compared}: {100.0 * found.share:.1f} %"
    return f"{equal}, {100.0 * LEVEL:.0f} % interval {low} to {high} %"


def _actions(trial: Trial, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    def name(action: int) -> str:
        return f"{action} {names[action]}" if 0 <= action < len(names) else str(action)

    return [(name(live), name(shadow), str(pairs)) for (live, shadow), pairs in trial.actions.items()]


def _holds(trial: Trial) -> list[tuple[str, ...]]:
    live, shadow = trial.live.holds, trial.shadow.holds
    return [(why, str(live.get(why, 0)), str(shadow.get(why, 0))) for why in sorted({*live, *shadow})]


def _latency(name: str, side: Side) -> tuple[str, ...]:
    return (name, *("-" if value is None else f"{value:.0f}" for value in (*side.inference, *side.total)))


def _pnl(name: str, pnl: Pnl) -> tuple[str, ...]:
    numbers = (pnl.total, pnl.mean, pnl.standard_error)
    return (name, str(pnl.bars), *("-" if value is None else f"{1e4 * value:.2f}" for value in numbers))


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield f"  {title}"
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for first, *rest in (columns, *rows):
        line = "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))])
        yield f"    {line}"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items())


def _action_names(trial: Trial, bundles: Mapping[str, Bundle]) -> tuple[str, ...]:
    for name in trial.bundles:
        if name in bundles:
            return bundles[name].rule_set.actions.names
    return ()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")
