"""The `detent` command."""

from __future__ import annotations

import importlib.metadata
import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from configs import DetentConfig, json_schema, list_profiles, load_config, resolved_yaml
from data.files import atomic_write_bytes, atomic_write_text
from pipeline.caches import keep_caches_in
from pipeline.cli_audit import audit_app
from pipeline.cli_bench import bench_app
from pipeline.cli_evaluate import evaluate
from pipeline.cli_output import BundleOption, RuleModules, emit, import_rules, reported, stdout
from pipeline.cli_rules import rules_app
from pipeline.cli_serve import serve
from pipeline.lock import create_workdir

EPILOG = (
    "Exit codes: 0 done or promoted, 1 a check or goal was missed, 2 wrong usage, 10 gates kept the champion, "
    "11 already done, 65 bad data, 69 service or storage unavailable, 70 bug, 75 locked by another run, "
    "78 bad config, 130 interrupted."
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
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(rules_app, name="rules")
app.add_typer(audit_app, name="audit")
app.command()(evaluate)
app.command()(serve)

Profile = Annotated[
    str, typer.Option("--profile", "-p", help="Shipped profile (default, smoke) or path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting, e.g. mbpo.penalty_coef=0.5."),
]
Workdir = Annotated[Path, typer.Option("--workdir", "-w", help="Everything is written below this folder (created).")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


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
    with reported(as_json, resumable=not dry_run):
        config = load_config(profile, overrides or ())
        if dry_run:
            _print_plan(config, workdir, as_json)
            return
        create_workdir(workdir)
        keep_caches_in(workdir)
        from pipeline.progress import Reporter
        from pipeline.report import print_report
        from pipeline.retrain import retrain as run

        result = run(config, workdir, reporter=Reporter(quiet=quiet), force=force)
        if as_json:
            emit(result.to_dict())
        else:
            print_report(result, stdout)
        raise typer.Exit(int(result.exit_code))


@app.command()
def backtest(
    bundle: BundleOption,
    profile: Profile = "default",
    overrides: Overrides = None,
    rule_modules: RuleModules = None,
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
    with reported(as_json):
        import_rules(rule_modules)
        from pipeline.bundle_backtest import backtest_bundle
        from pipeline.report import policy_table

        results, metrics = backtest_bundle(bundle, load_config(profile, overrides or ()), window)
        if plot is not None:
            from evaluation.plots import equity_and_drawdown, png_bytes

            atomic_write_bytes(plot, png_bytes(equity_and_drawdown(results)))
        if csv is not None:
            atomic_write_text(csv, results["bundle"].to_frame().to_csv())
        if as_json:
            emit({"bundle": str(bundle), "window": window, "metrics": {k: m.to_dict() for k, m in metrics.items()}})
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
    with reported(as_json):
        from pipeline.bundling import export_run

        info = export_run(workdir, run, destination)
        if as_json:
            emit({"bundle": str(info.path), "bundle_hash": info.hash, "parity": info.parity.to_dict()})
        else:
            stdout.print(f"bundle {info.path}\nhash   {info.hash}")


@app.command()
def doctor(
    workdir: Workdir = Path("var"), profile: Profile = "default", overrides: Overrides = None, as_json: Json = False
) -> None:
    """Check Python, packages, work directory, disk, memory, data and registry; exit code 1 if something is wrong."""
    with reported(as_json):
        from pipeline.doctor import run_checks

        checks = run_checks(workdir, load_config(profile, overrides or ()))
        if as_json:
            emit({"ok": all(check.ok for check in checks), "checks": [vars(check) for check in checks]})
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
    with reported(as_json=False):
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


def _print_plan(config: DetentConfig, workdir: Path, as_json: bool) -> None:
    from pipeline.inputs import check_extra_rules, load_inputs
    from pipeline.last_night import with_warm_start
    from pipeline.result import STAGES, run_directory

    inputs = with_warm_start(load_inputs(config), workdir.resolve())
    check_extra_rules(inputs)
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
        emit(plan)
        return
    stdout.print(f"run {inputs.run_key[:16]} would write below {folder}")
    for name, window in inputs.windows().items():
        stdout.print(f"  {name:<11} {window['first'][:10]} to {window['last'][:10]}  {window['rows']:,} bars")
    stdout.print("  stages      " + ", ".join(STAGES))


if __name__ == "__main__":
    main()
