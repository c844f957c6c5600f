"""`detent bench serve`: how fast the decision service answers, and what is lost when its bundle changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from configs import ConfigError
from data.files import atomic_write_json
from pipeline.cli_bench_tables import JsonFile, Rows, Smoke, WorkTable, goal_of, show
from pipeline.cli_output import (
    RuleModules,
    check_output_file,
    import_rules,
    positive_number,
    reported,
    stderr,
    stdout,
    whole_number,
)

LABELS = {
    "echo": "echo server, the same bytes",
    "fsync": "4 KiB written and forced to the disk",
    "engine": "engine alone, in process",
    "infer": "policy, /v2/.../infer, binary",
    "infer, JSON": "policy, /v2/.../infer, JSON",
    "decide": "policy, /decide",
    "decide, no fsync": "policy, /decide, --no-fsync",
    "stream": "policy, Redis Streams, --no-fsync",
    "infer, planner": "planner, /v2/.../infer, binary",
    "decide, planner": "planner, /decide, --no-fsync",
}


def bench_serve(
    bundles: Annotated[
        list[Path] | None,
        typer.Option("--bundle", "-b", help="Measure this bundle; more of them take part in the swaps. Else made."),
    ] = None,
    rule_modules: RuleModules = None,
    json_file: JsonFile = None,
    calls: Annotated[int, typer.Option(help="Hot requests of each kind.", **whole_number(at_least=10))] = 5_000,
    seconds: Annotated[
        float, typer.Option(help="Length of each paced series, 200 requests a second.", **positive_number())
    ] = 60.0,
    swaps: Annotated[int, typer.Option(help="Hot swaps at least.", **whole_number(at_least=1))] = 100,
    swap_requests: Annotated[
        int, typer.Option(help="Requests meanwhile at least.", **whole_number(at_least=1))
    ] = 10_000,
    planner: Annotated[
        bool, typer.Option("--planner", help="Give the bundle that is made an exact planner: minutes more.")
    ] = False,
    workdir: Annotated[
        Path | None,
        typer.Option("--workdir", "-w", help="Folder whose disk holds the ledgers; else the temporary one."),
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Start services on loopback and ask them; exit code 1 if a goal is missed or an answer is wrong; ten minutes."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        if bundles and planner:
            raise ConfigError("--planner: expected no --bundle beside it, was one: it has a planner or has none")
        if workdir is not None and not workdir.is_dir():
            raise ConfigError(f"--workdir: expected a folder, was {workdir}")
        import_rules(rule_modules)
        from benchmarks.serve_speed import SMOKE, measure_serving

        counts: dict[str, Any] = {"calls": calls, "seconds": seconds, "swaps": swaps, "swap_requests": swap_requests}
        # Lines and no bar: what draws in the background would be part of the tails.
        report = measure_serving(
            bundles or (),
            **(SMOKE if smoke else counts),
            planner=planner,
            rule_modules=rule_modules or (),
            workdir=workdir,
            progress=lambda done, total, note: stderr.print(f"{done} of {total} done, next: {note}", highlight=False),
        )
        entries = report.to_dict()
        if json_file is not None:
            atomic_write_json(json_file, entries)
        for title, headers, rows in serve_tables(entries):
            show(title, headers, rows)
        for name, reason in report.absent.items():
            stdout.print(f"{LABELS[name]} is absent: {reason}", markup=False, highlight=False, soft_wrap=True)
        stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))
        wrong = report.broken if smoke else report.missed
        for line in wrong:
            stderr.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if wrong:
            raise typer.Exit(1)


def serve_tables(report: Mapping[str, Any]) -> list[WorkTable]:
    """Tables of a report of serving: latency, correctness, footprint, hot swaps."""
    return [_latency_table(report), _answer_table(report), _footprint_table(report), _swap_table(report)]


def _latency_table(report: Mapping[str, Any]) -> WorkTable:
    rows: Rows = []
    for name, entry in report["entries"].items():
        goal, missed = report["goals"].get(name), _missed(report, name)
        rows.append(
            (
                LABELS[name],
                *(f"{entry[kind][key]:.3f}" for kind in ("hot", "paced") for key in ("p50_ms", "p99_ms", "p999_ms")),
                f"{report['to_floor'][name]['hot']:.1f}",
                "-" if goal is None else _goal_words(goal),
                "-" if goal is None else "missed" if missed else "met",
            )
        )
    headers = ("", "p50", "p99", "p99.9", "paced p50", "p99", "p99.9", "to echo", "goal", "")
    return f"One request, milliseconds; paced: {report['rate']:g} a second, open loop", headers, rows


def _answer_table(report: Mapping[str, Any]) -> WorkTable:
    rows: Rows = []
    for name, entry in report["entries"].items():
        tally = entry["tally"]
        counts = (f"{tally[key]:,}" for key in ("asked", "failed", "wrong", "held"))
        rows.append((LABELS[name], f"{entry['per_second']:,.0f}", *counts))
    return "Requests, warm-up included", ("", "hot, a second", "asked", "failed", "wrong", "held"), rows


def _footprint_table(report: Mapping[str, Any]) -> WorkTable:
    goals = report["footprint_goals"]
    rows: Rows = []
    for name, one in report["footprints"].items():
        rows.append(
            (
                name,
                f"{one['start_s']:.2f}",
                f"{one['ready_mib']:.0f}",
                f"{one['samples'][-1][1]:.0f}",
                f"{one['samples'][-1][0]:,}",
                f"{report['growth_mib'][name]:+.1f}",
                "missed" if _missed(report, f"service {name}") else "met",
            )
        )
    rows.append(
        ("goal", *(goal_of(goals[key]) for key in ("start_s", "ready_mib")), "-", "-", goal_of(goals["growth_mib"]), "")
    )
    headers = ("service", "seconds to start", "MiB ready", "MiB after", "requests", "MiB more in an hour", "")
    return "Services: start and resident memory", headers, rows


def _swap_table(report: Mapping[str, Any]) -> WorkTable:
    swaps, goals = report["swaps"], report["swap_goals"]
    tally = swaps["tally"]
    found = {"swaps": swaps["swaps"], "requests": tally["asked"], "failed": tally["failed"], "wrong": tally["wrong"]}
    rows: Rows = [(name, f"{count:,}", f"{goals[name]:,}") for name, count in found.items()]
    rows += [
        ("held", f"{tally['held']:,}", "-"),
        ("bundles", f"{swaps['bundles']}", "-"),
        ("rows that tell them apart", f"{swaps['telling_rows']} of {swaps['rows']}", "-"),
        ("milliseconds, p99", f"{swaps['latency']['p99_ms']:.2f}", "-"),
    ]
    return "Hot swaps while requests come back to back", ("", "found", "goal"), rows


def _missed(report: Mapping[str, Any], name: str) -> bool:
    return any(line.startswith(f"{name}: ") for line in report["missed"])


def _goal_words(goal: Mapping[str, float | None]) -> str:
    words = {"p50_ms": "p50 {:g}", "p99_ms": "p99 {:g}", "paced_p99_ms": "paced p99 {:g}"}
    return ", ".join(form.format(goal[key]) for key, form in words.items() if goal[key] is not None)
