"""What a person reads at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from evaluation import PolicyMetrics
from pipeline.result import RetrainResult


def print_report(result: RetrainResult, console: Console) -> None:
    """Print windows, world model, policies, latency, gates and where everything is."""
    if result.status == "already_done":
        console.print(
            f"Nothing to do: MLflow run {result.run_id} already computed this config, data and code "
            f"(model version {result.model_version}). Use --force to compute it again."
        )
        return
    parts: list[RenderableType] = [
        _windows(result.windows),
        _world_model(result.world_model),
        _ahead(result.world_model["horizons"]),
        _imagination(result.imagination),
    ]
    parts += [
        policy_table(metrics, f"Policies under the same limits and costs, {window} window")
        for window, metrics in result.policies.items()
    ]
    parts += [latency_table(result.latency), _gates(result), _where(result)]
    console.print(Group(*parts))
    # Below the panel and unwrapped, so that it can be copied.
    console.print(f"mlflow ui --backend-store-uri {result.tracking_uri}", soft_wrap=True, highlight=False)


def policy_table(policies: Mapping[str, PolicyMetrics], title: str) -> Table:
    """One row per policy: annual Sharpe and return, drawdown from the all-time peak, turnover per year."""
    table = _table(title)
    table.add_column("policy", no_wrap=True)
    for header in ("Sharpe", "return", "max DD", "killed", "turnover", "exposure", "invalid"):
        table.add_column(header, justify="right")
    for name, metrics in policies.items():
        table.add_row(
            name if metrics.paths == 1 else f"{name} x{metrics.paths}",
            _number(metrics.sharpe, "{:.2f}"),
            _number(metrics.annual_return, "{:.1%}"),
            _number(metrics.max_drawdown, "{:.1%}"),
            _number(metrics.kill_switch_rate, "{:.0%}"),
            _number(metrics.turnover_per_year, "{:.1f}"),
            _number(metrics.exposure, "{:.2f}"),
            str(metrics.invalid_actions),
        )
    return table


def _windows(windows: Mapping[str, Any]) -> Table:
    table = _table("Data windows")
    for header in ("window", "first bar", "last bar"):
        table.add_column(header)
    table.add_column("bars", justify="right")
    for name, window in windows.items():
        table.add_row(name, window["first"][:10], window["last"][:10], f"{window['rows']:,}")
    return table


def _world_model(metrics: Mapping[str, Any]) -> Table:
    table = _table("World model, one bar ahead (NLL in nats per feature, R² of the change)")
    table.add_column("slice", no_wrap=True)
    for header in ("NLL", "constant", "tightest"):
        table.add_column(header, justify="right")
    groups = sorted(metrics["holdout"]["r2_by_group"])
    for group in groups:
        table.add_column(f"R² {group}", justify="right")
    table.add_column("in 50/80/95%", justify="right")
    for name in ("holdout", "validation", "test"):
        row = metrics[name]
        table.add_row(
            name,
            f"{row['nll']:.3f}",
            f"{row['nll_constant']:.3f}",
            f"{row['nll_tightest']:.3f}",
            *(f"{row['r2_by_group'][group]:.3f}" for group in groups),
            " ".join(f"{100 * row['coverage'][level]:.0f}" for level in ("50", "80", "95")),
        )
    table.caption, table.caption_justify = _drift(metrics["fit"]["drift"]), "left"
    return table


def _drift(drift: Mapping[str, float | None] | None) -> str | None:
    if drift is None or drift["error"] is None:
        return None
    penalty = "" if drift["strength"] is None else f", with a penalty of {drift['strength']:g} per row"
    # The line break keeps the caption apart from the next table's title.
    return (
        f"Expected moves, in standard deviations of a bar: {drift['size_before']:.3f} by training, {drift['size']:.3f} "
        f"calibrated on validation (slope {drift['slope']:.2f} ± {drift['error']:.2f}{penalty})\n"
    )


# Errors are means over fields, in standard deviations of a bar's change.
def _ahead(horizons: Mapping[str, Any]) -> Table:
    table = _table("Imagined paths on the validation window (error in standard deviations of a bar's change)")
    table.add_column("bars ahead", no_wrap=True)
    for header in ("error", "unchanged", "constant", "in 50/80/95%", "fields no better"):
        table.add_column(header, justify="right")
    for step, row in horizons.items():
        errors = (row[name].values() for name in ("error", "error_persistence", "error_constant"))
        table.add_row(
            step,
            *(f"{sum(error) / len(error):.2f}" for error in errors),
            " ".join(f"{100 * row['coverage'][level]:.0f}" for level in ("50", "80", "95")),
            f"{len(row['no_better'])} of {len(row['error'])}",
        )
    return table


def _imagination(summary: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("Imagined bars")
    for header in ("bars", "drift per year", "volatility"):
        table.add_column(header, justify="left" if header == "bars" else "right")
    for name, row in summary.items():
        table.add_row(name.replace("_", " "), f"{row['drift']:.1%}", f"{row['volatility']:.1%}")
    return table


def latency_table(latency: Mapping[str, Any]) -> Table:
    """Percentiles of each series of a latency report."""
    table = _table("Decision latency, milliseconds")
    table.add_column("series")
    for header in ("p50", "p99", "p99.9", "max", "calls"):
        table.add_column(header, justify="right")
    series = {
        "session_hot": "policy graph alone",
        "decide_hot": "decision with last check",
        "decide_paced": f"decision, {latency['calls_per_second']:g} per second",
        "planner_hot": "planned decision",
        "planner_paced": f"planned decision, {latency['calls_per_second']:g} per second",
    }
    for name, label in series.items():
        if name not in latency:
            continue
        row = latency[name]
        times = (f"{row[key]:.3f}" for key in ("p50_ms", "p99_ms", "p999_ms", "max_ms"))
        table.add_row(label, *times, f"{row['count']:,}")
    return table


def _gates(result: RetrainResult) -> Table:
    table = _table("Gates (validation window)")
    for header in ("gate", "", "reason"):
        table.add_column(header)
    for gate in result.gates:
        table.add_row(gate.name, "[green]pass[/]" if gate.passed else "[red]FAIL[/]", gate.reason)
    return table


def _where(result: RetrainResult) -> Panel:
    verdict = {
        "promoted": f"version {result.model_version} is the new champion",
        "champion_kept": f"version {result.model_version} stays challenger, no champion was changed",
    }[result.status]
    lines = [
        f"{result.model_name}: {verdict}",
        f"bundle      {result.bundle}",
        f"hash        {result.bundle_hash}",
        f"MLflow run  {result.run_id}",
        f"time        {sum(result.timings.values()):.0f} s",
    ]
    return Panel(Text("\n".join(lines), overflow="fold"), title="Result", title_align="left")


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "n/a"
