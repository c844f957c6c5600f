"""The `detent` command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from configs import ConfigError, DetentConfig, json_schema, list_profiles, load_config, resolved_yaml
from data.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from pipeline.errors import ExitCode, exit_code_for
from pipeline.lock import create_workdir

INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 done or promoted, 10 gates kept the champion, 11 already done, 65 bad data, "
    "69 service or storage unavailable, 70 bug, 75 locked by another run, 78 bad config, 130 interrupted."
)

app = typer.Typer(
    name="detent",
    help="Model-based reinforcement learning with hard action masks.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")

Profile = Annotated[
    str, typer.Option("--profile", "-p", help="Shipped profile (default, smoke) or path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting, e.g. mbpo.penalty_coef=0.5."),
]
Workdir = Annotated[Path, typer.Option("--workdir", "-w", help="Everything is written below this folder (created).")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
BundleOption = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle directory.")]

stdout = Console()
stderr = Console(stderr=True)


def main() -> None:
    """Entry point of the console command."""
    # Schedulers end a job with SIGTERM; it leaves as an interrupted one, with its message and exit code.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("detent"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Model-based reinforcement learning with hard action masks."""


@app.command(epilog=EPILOG)
def retrain(
    profile: Profile = "default",
    overrides: Overrides = None,
    workdir: Workdir = Path("var"),
    as_json: Json = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check config and data, show the plan, write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Compute again even if this run is already done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Run the nightly job: bars, world model, masked PPO, ONNX bundle, gates, registry.

    An interrupted run continues after its last finished stage when it is started again.
    """
    with _reported(as_json):
        config = load_config(profile, overrides or ())
        if dry_run:
            _print_plan(config, workdir, as_json)
            return
        create_workdir(workdir)
        _keep_caches_in(workdir)
        from pipeline.progress import Reporter
        from pipeline.report import print_report
        from pipeline.retrain import retrain as run

        result = run(config, workdir, reporter=Reporter(quiet=quiet), force=force)
        if as_json:
            _emit(result.to_dict())
        else:
            print_report(result, stdout)
        raise typer.Exit(int(result.exit_code))


@app.command()
def backtest(
    bundle: BundleOption,
    profile: Profile = "default",
    overrides: Overrides = None,
    window: Annotated[
        str, typer.Option(help="Which bars: train, validation, test (of the profile's latest fold) or all.")
    ] = "test",
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write equity and drawdown as PNG.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the bundle's path bar by bar as CSV.")] = None,
) -> None:
    """Walk an exported policy and the simple baselines over history, under the bundle's own rules.

    Costs, reward and data come from the profile; use `--set data.source.kind=file --set data.source.path=FILE` for your
    own bars.
    """
    with _reported(as_json):
        from pipeline.bundle_backtest import backtest_bundle
        from pipeline.report import policy_table

        results, metrics = backtest_bundle(bundle, load_config(profile, overrides or ()), window)
        if plot is not None:
            from evaluation.plots import equity_and_drawdown, png_bytes

            atomic_write_bytes(plot, png_bytes(equity_and_drawdown(results)))
        if csv is not None:
            atomic_write_text(csv, results["bundle"].to_frame().to_csv())
        if as_json:
            _emit({"bundle": str(bundle), "window": window, "metrics": {k: m.to_dict() for k, m in metrics.items()}})
        else:
            stdout.print(policy_table(metrics, f"{bundle}, {window} window"))


@app.command()
def export(
    destination: Annotated[Path, typer.Argument(help="Directory to create for the bundle.")],
    workdir: Workdir = Path("var"),
    run: Annotated[
        str | None, typer.Option("--run", help="Run folder below WORKDIR/runs; the newest finished one if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a finished run's checkpoint to a fresh bundle, proving parity with torch again."""
    with _reported(as_json):
        from pipeline.bundling import export_run

        info = export_run(workdir, run, destination)
        if as_json:
            _emit({"bundle": str(info.path), "bundle_hash": info.hash, "parity": info.parity.to_dict()})
        else:
            stdout.print(f"bundle {info.path}\nhash   {info.hash}")


@bench_app.command("latency")
def bench_latency(
    bundle: BundleOption,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    decisions: Annotated[int, typer.Option(min=100, help="Single decisions timed, warm-up excluded.")] = 10_000,
    budget_ms: Annotated[float, typer.Option(min=0.001, help="Budget of one decision at p99.")] = 50.0,
    compare: Annotated[Path | None, typer.Option(help="Earlier report to compare with, as a ratio.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the states.")] = 0,
) -> None:
    """Time single decisions of an exported policy; exit code 1 above the budget."""
    with _reported(as_json=False):
        from benchmarks import compare_latency, measure_latency
        from pipeline.report import latency_table

        report = measure_latency(bundle, decisions, budget_ms=budget_ms, seed=seed)
        entries = report.to_dict()
        if compare is not None:
            try:
                entries["comparison"] = compare_latency(report, compare)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--compare: {error}") from error
        if json_file is not None:
            atomic_write_json(json_file, entries)
        stdout.print(latency_table(entries))
        stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))
        if compare is not None:
            stdout.print(entries["comparison"])
        if not report.within_budget:
            stderr.print(f"[red]p99 above the budget of {budget_ms} ms[/]")
            raise typer.Exit(1)


@app.command()
def doctor(
    workdir: Workdir = Path("var"), profile: Profile = "default", overrides: Overrides = None, as_json: Json = False
) -> None:
    """Check Python, packages, work directory, disk, memory, data and registry; exit code 1 if something is wrong."""
    with _reported(as_json):
        from pipeline.doctor import run_checks

        checks = run_checks(workdir, load_config(profile, overrides or ()))
        if as_json:
            _emit({"ok": all(check.ok for check in checks), "checks": [vars(check) for check in checks]})
        else:
            table = Table("", "check", "found", "what to do")
            for check in checks:
                table.add_row("[green]ok[/]" if check.ok else "[red]no[/]", check.name, check.detail, check.hint)
            stdout.print(table)
        if not all(check.ok for check in checks):
            raise typer.Exit(1)


@config_app.command("show")
def config_show(profile: Profile = "default", overrides: Overrides = None) -> None:
    """Print every setting in force as YAML."""
    with _reported(as_json=False):
        typer.echo(resolved_yaml(load_config(profile, overrides or ())), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors and checks."""
    typer.echo(json.dumps(json_schema(), indent=2))


@config_app.command("profiles")
def config_profiles() -> None:
    """List the shipped profiles."""
    for name in list_profiles():
        typer.echo(name)


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    # Every failure becomes one readable line, its exit code, and with --json an object on standard output.
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if as_json:
            _emit({"status": "interrupted", "exit_code": INTERRUPTED})
        stderr.print("interrupted; start again to continue after the last finished stage")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        code = exit_code_for(error)
        if as_json:
            _emit({"status": "error", "exit_code": int(code), "error": str(error), "kind": type(error).__name__})
        stderr.print(f"[red]{type(error).__name__}[/]:", end=" ")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        if code == ExitCode.BUG:
            stderr.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(int(code)) from error


def _emit(entries: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(entries, allow_nan=False, sort_keys=True) + "\n")
    sys.stdout.flush()


def _keep_caches_in(workdir: Path) -> None:
    # Libraries would otherwise write font caches, compiled kernels and scratch files to the home directory and /tmp.
    cache = workdir.resolve() / "cache"
    temporary = cache / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["MPLCONFIGDIR"] = str(cache / "matplotlib")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "torchinductor")
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)


def _print_plan(config: DetentConfig, workdir: Path, as_json: bool) -> None:
    from pipeline.inputs import load_inputs
    from pipeline.result import STAGES, run_directory

    inputs = load_inputs(config)
    folder = run_directory(workdir.resolve(), inputs.run_key)
    plan = {
        "status": "dry_run",
        "exit_code": 0,
        "run_key": inputs.run_key,
        "run_directory": str(folder),
        "windows": inputs.windows(),
        "stages": list(STAGES),
    }
    if as_json:
        _emit(plan)
        return
    stdout.print(f"run {inputs.run_key[:16]} would write below {folder}")
    for name, window in inputs.windows().items():
        stdout.print(f"  {name:<11} {window['first'][:10]} to {window['last'][:10]}  {window['rows']:,} bars")
    stdout.print("  stages      " + ", ".join(STAGES))


if __name__ == "__main__":
    main()
