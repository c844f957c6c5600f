"""`detent bench`: how fast it is on this machine, and whether what is promised holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from configs import ConfigError
from data.files import atomic_write_json
from pipeline.cli_bench_learning import (
    bench_ablation,
    bench_likelihood,
    bench_sample_efficiency,
    bench_training,
    bench_world_model,
)
from pipeline.cli_bench_planner import bench_planner, bench_planner_quality
from pipeline.cli_bench_serve import bench_serve
from pipeline.cli_bench_tables import JsonFile, Smoke, finish, goal_of, show
from pipeline.cli_output import (
    BundleOption,
    RuleModules,
    check_output_file,
    import_rules,
    positive_number,
    reported,
    stderr,
    stdout,
    whole_number,
)

bench_app = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@bench_app.command("latency")
def bench_latency(
    bundle: BundleOption,
    rule_modules: RuleModules = None,
    json_file: JsonFile = None,
    decisions: Annotated[
        int, typer.Option(help="Single decisions timed, warm-up excluded.", **whole_number(at_least=100))
    ] = 10_000,
    budget_ms: Annotated[float, typer.Option(help="Budget of one decision at p99.", **positive_number())] = 50.0,
    compare: Annotated[Path | None, typer.Option(help="Earlier report to compare with, as a ratio.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the states.", **whole_number(at_least=0))] = 0,
) -> None:
    """Time single decisions of an exported policy; exit code 1 above the budget."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        import_rules(rule_modules)
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


@bench_app.command("masks")
def bench_masks(
    json_file: JsonFile = None,
    calls: Annotated[int, typer.Option(help="Calls of each single-row series.", **whole_number(at_least=100))] = 10_000,
) -> None:
    """Time the trading rules: one state in NumPy and ONNX, 4,096 in torch; exit code 1 if a median misses its goal."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.masks import measure_masks

        report = measure_masks(calls)
        series = {
            "one state, NumPy": report.numpy_row,
            "one state as a batch, NumPy": report.batch_row,
            "one state, ONNX": report.onnx_row,
            f"{report.batch:,} states, torch": report.torch_batch,
            "one state explained": report.explain_row,
        }
        rows = [
            (name, *(f"{value:.1f}" for value in (row.p50_us, row.p95_us, row.p99_us)), goal_of(row.goal_us))
            for name, row in series.items()
        ]
        show("Cost of the masks, microseconds", ("", "p50", "p95", "p99", "goal"), rows)
        finish(report, json_file)
        if not report.within_goals:
            stderr.print("[red]a median is above its goal[/]")
            raise typer.Exit(1)


@bench_app.command("joint-limits")
def bench_joint_limits(json_file: JsonFile = None, smoke: Smoke = False) -> None:
    """Count how many combinations break joint limits, time the joint policy, train it; half an hour or less."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.joint_limits import SMOKE, measure_joint_limits

        report = measure_joint_limits(**SMOKE) if smoke else measure_joint_limits()
        shares = [
            (
                rate.chooser,
                f"{rate.first_breaches / rate.first_actions:.2%}",
                f"{rate.first_beyond_cash / rate.first_actions:.2%}",
                f"{rate.share:.2%}",
                f"{rate.breaches:,} of {rate.actions:,}",
            )
            for rate in report.breaches
        ]
        headers = ("chosen by", "first state", "of it cash", "random play", "combinations")
        show("Combinations that break a joint limit", headers, shares)
        costs = [
            (c.task, f"{c.batch:,}", f"{c.joint_ms:.1f}", f"{c.factored_ms:.1f}", f"{c.ratio:.2f}")
            for c in report.costs
        ]
        show("Cost, milliseconds", ("task", "rows", "joint", "factored", "ratio"), costs)
        values = [
            (v.method, v.variant, "-" if v.seed is None else str(v.seed), f"{v.mean:,.0f} ± {v.standard_error:,.0f}")
            for v in report.values
        ]
        show("Final value, dollars, held-out prices", ("method", "variant", "seed", "mean ± standard error"), values)
        finish(report, json_file)


@bench_app.command("learned-masks")
def bench_learned_masks(
    json_file: JsonFile = None,
    seed: Annotated[int, typer.Option(help="Seed of episodes, splits and weights.", **whole_number(at_least=0))] = 0,
    smoke: Smoke = False,
) -> None:
    """Learn the masks of CartPole and trading; exit code 1 if a false-valid rate cannot be promised or is broken."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.learned_masks import (
            SMOKE,
            SMOKE_BUTTONS,
            masked_cartpole_world,
            measure_learned_masks,
            trading_world,
        )
        from world_model.mask_bound import MaskBoundError

        counts: dict[str, Any] = SMOKE if smoke else {}
        found, refused = [], {}
        for world in (trading_world(), masked_cartpole_world(SMOKE_BUTTONS) if smoke else masked_cartpole_world()):
            try:
                found.append(measure_learned_masks(world, seed=seed, **counts)[1])
            except MaskBoundError as error:
                refused[world.name] = str(error)
        rows = [
            (
                one.world,
                f"{one.config.target:g}",
                f"{one.learned.bound.upper_bound:.2g}",
                f"{one.fresh.false_valid:.2g}",
                f"{one.fresh.false_invalid:.2g}",
                f"{one.episodes:,}",
            )
            for one in found
        ]
        headers = ("world", "target", "bound", "fresh false-valid", "fresh false-invalid", "episodes")
        show("Learned masks", headers, rows)
        if json_file is not None:
            atomic_write_json(json_file, {"worlds": [one.to_dict() for one in found], "refused": refused})
        broken = [f"{one.world}: a false-valid rate above its target" for one in found if not one.kept_promise]
        for line in [*broken, *(f"{name}: {reason}" for name, reason in refused.items())]:
            stderr.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if broken or refused:
            raise typer.Exit(1)


@bench_app.command("market")
def bench_market(json_file: JsonFile = None, smoke: Smoke = False) -> None:
    """Time the simulated markets of the suite, one thread; exit code 1 if simulating them misses its goal."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.market import measure_market
        from configs import load_config

        config = load_config("suite")
        report = measure_market(config, paths=2, bars=60, repeats=1) if smoke else measure_market(config)
        tasks = {
            "simulate, with features": report.simulate_s,
            "filter beliefs": report.beliefs_s,
            "solve the oracle": report.oracle_s,
            "walk, buy and hold": report.walk_s,
        }
        title = f"{report.paths} markets of {report.bars:,} bars, seconds, best of {report.repeats}"
        show(title, ("", "seconds"), [(name, f"{seconds:.2f}") for name, seconds in tasks.items()])
        finish(report, json_file)
        if not smoke and not report.within_goal:
            stderr.print("[red]simulating is above its goal[/]")
            raise typer.Exit(1)


bench_app.command("likelihood")(bench_likelihood)
bench_app.command("training")(bench_training)
bench_app.command("world-model")(bench_world_model)
bench_app.command("sample-efficiency")(bench_sample_efficiency)
bench_app.command("ablation")(bench_ablation)
bench_app.command("planner")(bench_planner)
bench_app.command("planner-quality")(bench_planner_quality)
bench_app.command("serve")(bench_serve)
