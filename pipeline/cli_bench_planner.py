"""`detent bench`: how fast planners decide, and what planning is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs import ConfigError
from data.files import atomic_write_json
from pipeline.cli_bench_tables import (
    JsonFile,
    PeerPython,
    Rows,
    Smoke,
    WorkTable,
    check_peer_python,
    show,
    with_interval,
)
from pipeline.cli_output import check_output_file, one_of, reported, stderr, stdout, whole_number
from pipeline.progress import Reporter

QualityWorlds = Literal["masked-cartpole", "portfolio"]

LABELS = {
    "policy": "policy graph",
    "policy, network alone": "  its network alone",
    "policy, sb3-contrib": "  sb3-contrib predict, same network",
    "tree": "world, all {actions}^{horizon} sequences",
    "tree, products alone": "  its matrix products alone",
    "tree, plain torch": "  the same search in plain torch",
    "deep tree": "world, all {actions}^{deep_horizon} sequences",
    "deep tree, products alone": "  its matrix products alone",
    "cem": "world, CEM {candidates} x {iterations}, H={horizon}",
    "cem, products alone": "  its matrix products alone",
    "scenarios": "market, {scenarios} scenarios, H={horizon}",
    "scenarios, all kinds of rows": "  the same, accounts of all kinds",
    "scenarios, default": "market, scenarios of the default config, H={horizon}",
}


def bench_planner(
    json_file: JsonFile = None,
    calls: Annotated[int, typer.Option(help="Hot calls of each series.", **whole_number(at_least=100))] = 2_000,
    paced_calls: Annotated[
        int, typer.Option(help="Calls of each paced series, 20 a second.", **whole_number(at_least=10))
    ] = 100,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time the planners of mbrl-lib, TorchRL and mctx too.")
    ] = False,
    peer_python: PeerPython = None,
    peer_calls: Annotated[int, typer.Option(help="Plans of each peer.", **whole_number(at_least=10))] = 50,
    compare: Annotated[Path | None, typer.Option(help="Earlier report to compare with, as a ratio.")] = None,
    smoke: Smoke = False,
) -> None:
    """Time exported planners, one row at a time, one thread; exit code 1 if a goal is missed; minutes to export."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        check_peer_python(peers, peer_python)
        from benchmarks.peer_planning import PEERS
        from benchmarks.planner_speed import SMOKE, compare_planner_speed, measure_planner_speed

        counts: dict[str, Any] = {"calls": calls, "paced_calls": paced_calls, "peer_calls": peer_calls}
        # Lines and no bar: what draws in the background would be part of the tails.
        report = measure_planner_speed(
            **(SMOKE if smoke else counts),
            peers=tuple(PEERS) if peers else (),
            peer_python=peer_python,
            progress=lambda done, total, note: stderr.print(f"{done} of {total} done, next: {note}", highlight=False),
        )
        entries = report.to_dict()
        if compare is not None:
            try:
                entries["comparison"] = compare_planner_speed(report, compare)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--compare: {error}") from error
        if json_file is not None:
            atomic_write_json(json_file, entries)
        for title, headers, rows in planner_tables(entries):
            show(title, headers, rows)
        for name, reason in report.absent.items():
            stdout.print(f"{name} is absent: {reason}", markup=False, highlight=False)
        stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))
        if report.missed and not smoke:
            for line in report.missed:
                stderr.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1)


def bench_planner_quality(
    world: Annotated[
        str, typer.Option(help="masked-cartpole or portfolio.", **one_of(QualityWorlds))
    ] = "masked-cartpole",
    seeds: Annotated[int, typer.Option(help="Training runs.", **whole_number(at_least=1))] = 5,
    jobs: Annotated[int, typer.Option(help="Processes; a run takes one core.", **whole_number(at_least=1))] = 1,
    json_file: JsonFile = None,
    smoke: Smoke = False,
) -> None:
    """Let MBPO's policy and planners over its learned world play the same real episodes; minutes per seed."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.planner_quality import measure_planner_quality

        reporter = Reporter()
        try:
            with reporter.stage(world) as progress:
                report = measure_planner_quality(world, seeds=seeds, jobs=jobs, smoke=smoke, progress=progress)
        finally:
            reporter.close()
        entries = report.to_dict()
        if json_file is not None:
            atomic_write_json(json_file, entries)
        show(*quality_table(entries))
        stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))


def planner_tables(report: Mapping[str, Any]) -> list[WorkTable]:
    """Tables of a report of planners' speed, and of its comparison where it has one."""
    tables = [_speed_table(report), _plan_table(report)]
    if "comparison" in report:
        tables.append(_comparison_table(report["comparison"]))
    return tables


def quality_table(report: Mapping[str, Any]) -> WorkTable:
    """Table of a report of planners' quality: means over the training runs."""
    runs = report["runs"]
    rows: Rows = []
    for name in runs[0]["scores"]:
        gain = report["gains"].get(name)
        spent = sum(run["seconds_per_decision"][name] for run in runs) / len(runs)
        rows.append(
            (
                name,
                f"{sum(run['scores'][name] for run in runs) / len(runs):,.2f}",
                "-" if gain is None else with_interval(gain[0], gain[1], gain[2], "+,.2f"),
                f"{1e3 * spent:.3f}",
            )
        )
    title = (
        f"{report['world']}: {len(runs)} training runs, {report['episodes']:,} episodes each, 95 % interval over runs"
    )
    return title, ("", "mean score", "gain over the policy", "ms per decision"), rows


def _speed_table(report: Mapping[str, Any]) -> WorkTable:
    missed = {line.split(":")[0] for line in report["missed"]}
    rows: Rows = []
    for name, entry in report["entries"].items():
        hot, paced, goal = entry["hot"]["whole"], entry["paced"]["whole"], report["goals"].get(name)
        floor = report["to_floor"].get(name)
        rows.append(
            (
                LABELS[name].format(**report["sizes"]),
                *(f"{series[key]:.3f}" for series in (hot, paced) for key in ("p50_ms", "p99_ms")),
                "-" if floor is None else f"{floor:.2f}",
                "-" if goal is None else _goal_words(goal),
                "-" if goal is None else "missed" if name in missed else "met",
            )
        )
    pace = f"{report['calls_per_second']:g} calls a second"
    title = f"One decision, milliseconds; paced: {pace}"
    return title, ("", "p50", "p99", "paced p50", "paced p99", "to the part alone", "goal", ""), rows


def _goal_words(goal: Mapping[str, float | None]) -> str:
    words = {"p50_ms": "p50 {:g}", "p99_ms": "p99 {:g}", "to_floor": "{:g} x products", "to_policy": "{:g} x policy"}
    return ", ".join(form.format(goal[key]) for key, form in words.items() if goal[key] is not None)


def _plan_table(report: Mapping[str, Any]) -> WorkTable:
    rows: Rows = []
    for name, plan in report["plans"].items():
        timing, slower = report["peers"].get(name), report["times_slower"].get(name)
        if name in report["entries"]:
            timing = report["entries"][name]["hot"]["whole"]
        rows.append(
            (
                LABELS.get(name, name).format(**report["sizes"]),
                *("-" if timing is None else f"{timing[key]:.2f}" for key in ("p50_ms", "p99_ms")),
                *("-" if slower is None else f"{slower[than]:.1f}" for than in ("tree", "cem")),
                f"{plan['value']:.4f}",
                f"{plan['best_value']:.4f}",
                f"{plan['best_actions']:.0%}",
                f"{plan['rows']:,}",
            )
        )
    title = "Plans in the world: milliseconds, times slower than Detent's, mean value, how often they begin as the best"
    headers = ("", "p50", "p99", "than all", "than CEM", "value", "best possible", "best action", "rows")
    return title, headers, rows


def _comparison_table(comparison: Mapping[str, Any]) -> WorkTable:
    rows: Rows = [
        (
            name,
            f"{change['before']:.3f}",
            f"{change['now']:.3f}",
            f"{change['ratio']:.2f}",
            "yes" if change["beyond_noise"] else "no",
        )
        for name, change in comparison["series"].items()
    ]
    same = {key: "same" if comparison[f"same_{key}"] else "OTHER" for key in ("machine", "sizes")}
    title = f"Against the earlier report, milliseconds; {same['machine']} machine, {same['sizes']} sizes"
    return title, ("", "before", "now", "ratio", "beyond the blocks' spread"), rows
