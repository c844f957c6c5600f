"""`detent bench`: how fast it is on this machine, and whether what is promised holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from configs import ConfigError
from data.files import atomic_write_json
from pipeline.cli_bench_tables import world_model_tables
from pipeline.cli_output import (
    BundleOption,
    RuleModules,
    check_output_file,
    import_rules,
    one_of,
    positive_number,
    reported,
    stderr,
    stdout,
    whole_number,
)
from pipeline.progress import Reporter

EfficiencyWorlds = Literal["cartpole", "masked-cartpole", "acrobot", "portfolio"]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Small counts: does it run at all? The numbers mean nothing.")]

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
            "one state, ONNX": report.onnx_row,
            f"{report.batch:,} states, torch": report.torch_batch,
            "one state explained": report.explain_row,
        }
        rows = [
            (name, *(f"{value:.1f}" for value in (row.p50_us, row.p95_us, row.p99_us)), _goal(row.goal_us))
            for name, row in series.items()
        ]
        _show("Cost of the masks, microseconds", ("", "p50", "p95", "p99", "goal"), rows)
        _finish(report, json_file)
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
        _show("Combinations that break a joint limit", headers, shares)
        costs = [
            (c.task, f"{c.batch:,}", f"{c.joint_ms:.1f}", f"{c.factored_ms:.1f}", f"{c.ratio:.2f}")
            for c in report.costs
        ]
        _show("Cost, milliseconds", ("task", "rows", "joint", "factored", "ratio"), costs)
        values = [
            (v.method, v.variant, "-" if v.seed is None else str(v.seed), f"{v.mean:,.0f} ± {v.standard_error:,.0f}")
            for v in report.values
        ]
        _show("Final value, dollars, held-out prices", ("method", "variant", "seed", "mean ± standard error"), values)
        _finish(report, json_file)


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
        _show("Learned masks", headers, rows)
        if json_file is not None:
            atomic_write_json(json_file, {"worlds": [one.to_dict() for one in found], "refused": refused})
        broken = [f"{one.world}: a false-valid rate above its target" for one in found if not one.kept_promise]
        for line in [*broken, *(f"{name}: {reason}" for name, reason in refused.items())]:
            stderr.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if broken or refused:
            raise typer.Exit(1)


@bench_app.command("likelihood")
def bench_likelihood(
    json_file: JsonFile = None,
    seeds: Annotated[int, typer.Option(help="Training runs of each world model.", **whole_number(at_least=1))] = 1,
    jobs: Annotated[int, typer.Option(help="Processes.", **whole_number(at_least=1))] = 1,
    smoke: Smoke = False,
) -> None:
    """Compare densities of the next return with GARCH on real bars; exit code 1 if a fold's total falls behind."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.likelihood import CONTESTANTS, SMOKE, YARDSTICK, measure_likelihood
        from configs import load_config

        config = load_config("smoke" if smoke else "default")
        reporter = Reporter()
        try:
            with reporter.stage("folds") as advance:
                sizes: dict[str, Any] = SMOKE if smoke else {}
                report = measure_likelihood(config, seeds=seeds, jobs=jobs, progress=advance, **sizes)
        finally:
            reporter.close()
        others = [name for name in CONTESTANTS if name != YARDSTICK]
        rows = [
            (
                f"{fold.market} {fold.first}{' *' if fold.development else ''}",
                f"{fold.totals[YARDSTICK]:,.1f}",
                *(f"{fold.gain(name):+.1f}" for name in others),
            )
            for fold in report.folds
        ]
        title = f"Log-likelihood of the test window, nats: {YARDSTICK}, and what others gain over it (* development)"
        _show(title, ("", YARDSTICK, *others), rows)
        means = []
        for name, parts in report.gains.items():
            won, folds = report.won(name)
            gain = parts["judged"]
            interval = f"[{gain.low:+.4f}, {gain.high:+.4f}]"
            means.append((name, f"{won} of {folds}", f"{gain.estimate:+.4f}", interval))
        headers = ("", "folds at least equal", "mean", "95 % interval")
        _show(f"Gain over {YARDSTICK}, nats per bar, without development folds", headers, means)
        _finish(report, json_file)
        if not smoke and not report.within_goal:
            stderr.print(f"[red]the world model is behind {YARDSTICK} in a fold, or not better on average[/]")
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
        _show(title, ("", "seconds"), [(name, f"{seconds:.2f}") for name, seconds in tasks.items()])
        _finish(report, json_file)
        if not smoke and not report.within_goal:
            stderr.print("[red]simulating is above its goal[/]")
            raise typer.Exit(1)


@bench_app.command("training")
def bench_training(
    json_file: JsonFile = None,
    truncated: Annotated[
        float, typer.Option(help="Share of imagined bars that end their branch out of range.", min=0.0, max=1.0)
    ] = 0.0,
    smoke: Smoke = False,
) -> None:
    """Time MBPO's policy training and its own part of it, one thread; exit code 1 if it misses its goals."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.training_loop import SMOKE, measure_training_loop

        counts: dict[str, Any] = SMOKE if smoke else {}
        report = measure_training_loop(truncated=truncated, **counts)
        rows = [
            ("steps a second", f"{report.steps_per_second:,.0f}", f"{report.min_steps_per_second:,.0f}"),
            ("while collecting", f"{report.collected_per_second:,.0f}", f"{report.min_collected_per_second:,.0f}"),
            ("own time over PPO's", f"{report.own_share:.1%}", f"{report.max_own_share:.0%}"),
        ]
        _show(f"Training, {report.num_envs:,} rows, {report.steps:,} steps", ("", "measured", "goal"), rows)
        _finish(report, json_file)
        if not smoke and not report.within_goals:
            stderr.print("[red]training misses a goal[/]")
            raise typer.Exit(1)


@bench_app.command("world-model")
def bench_world_model(
    json_file: JsonFile = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time mbrl-lib, OfflineRL-Kit, rl-blox and TorchRL too.")
    ] = False,
    peer_python: Annotated[
        Path | None, typer.Option(help="Interpreter that has the peers, e.g. of an environment of their own.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of every contender.", **whole_number(at_least=1))] = 7,
    year: Annotated[bool, typer.Option("--year", help="Fit a year of minutes too: minutes, 3 GiB.")] = False,
    smoke: Smoke = False,
) -> None:
    """Time world model and imagination on one thread; exit code 1 if a goal is missed."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        if peer_python is not None and not peers:
            raise ConfigError("--peer-python: expected --peers beside it, was alone")
        if peer_python is not None and not peer_python.is_file():
            raise ConfigError(f"--peer-python: expected an interpreter, was {peer_python}")
        from benchmarks import year_fit
        from benchmarks.peer_speed import PEERS
        from benchmarks.world_model_speed import measure_world_model
        from benchmarks.world_model_tasks import SMOKE
        from configs import load_config
        from configs.schema import WorldModelConfig

        reporter = Reporter()
        fit = None
        try:
            with reporter.stage("contenders") as stage:
                speed = measure_world_model(
                    SMOKE if smoke else None,
                    repeats=1 if smoke else repeats,
                    peers=tuple(PEERS) if peers else (),
                    peer_python=peer_python,
                    progress=stage,
                )
            if year:
                small: dict[str, Any] = {"transitions": 1000, "config": WorldModelConfig(max_epochs=2)} if smoke else {}
                with reporter.stage("year") as stage:
                    fit = year_fit.measure_year(**small, progress=stage)
        finally:
            reporter.close()
        tables = world_model_tables(
            speed.to_dict(), load_config().mbpo.branch_reuse, None if fit is None else fit.to_dict()
        )
        for title, headers, rows in tables:
            _show(title, headers, rows)
        for name, reason in speed.absent.items():
            stdout.print(f"{name} is absent: {reason}", markup=False, highlight=False)
        stdout.print(", ".join(f"{key}: {value}" for key, value in {**speed.machine, **speed.versions}.items()))
        if json_file is not None:
            parts = {"world_model": speed.to_dict()}
            atomic_write_json(json_file, parts if fit is None else {**parts, "year": fit.to_dict()})
        missed = [*speed.missed, *([] if fit is None or fit.within_goals else ["year"])]
        if missed and not smoke:
            stderr.print(f"[red]goals missed: {', '.join(missed)}[/]")
            raise typer.Exit(1)


@bench_app.command("sample-efficiency")
def bench_sample_efficiency(
    env: Annotated[
        str, typer.Option(help="cartpole, masked-cartpole, acrobot or portfolio.", **one_of(EfficiencyWorlds))
    ] = "masked-cartpole",
    seeds: Annotated[int, typer.Option(help="Training runs of each learner.", **whole_number(at_least=1))] = 10,
    jobs: Annotated[int, typer.Option(help="Processes; a run takes one core.", **whole_number(at_least=1))] = 1,
    known: Annotated[bool, typer.Option("--known", help="Declare what is known instead of learning it all.")] = False,
    json_file: JsonFile = None,
    smoke: Smoke = False,
) -> None:
    """Count the real steps that MBPO, with a learned world, and MaskablePPO take to the same goal; minutes per seed."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        from benchmarks.sample_efficiency import LEARNERS, measure_sample_efficiency

        reporter = Reporter()
        try:
            with reporter.stage(env) as progress:
                report = measure_sample_efficiency(
                    env, seeds=seeds, jobs=jobs, known=known, smoke=smoke, progress=progress
                )
        finally:
            reporter.close()
        rows = []
        for learner in LEARNERS:
            found, final = report.steps(learner), report.final(learner)
            marks = [report.mark(learner, str(mark)) for mark in report.marks]
            rows.append(
                (
                    learner,
                    f"{report.solved(learner)} of {len(report.of(learner))}",
                    _with_interval(found.estimate, found.low, found.high, ",.0f"),
                    _with_interval(final.estimate, final.low, final.high, ",.1f"),
                    *("-" if one is None else _with_interval(one.estimate, one.low, one.high, ",.0f") for one in marks),
                )
            )
        headers = (
            "",
            f"reached {report.goal:g}",
            "real steps to it",
            "last judgement",
            *(f"at {mark:,} steps" for mark in report.marks),
        )
        _show(f"{env}: interquartile mean over seeds (95 % interval)", headers, rows)
        stdout.print(f"fewer real steps than MaskablePPO: {report.fewer_steps:.1f} times")
        _finish(report, json_file)


def _with_interval(estimate: float, low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return format(estimate, form)
    return f"{estimate:{form}} ({low:{form}} to {high:{form}})"


def _goal(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:g}"


def _show(title: str, headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def _finish(report: Any, json_file: Path | None) -> None:
    stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))
    if json_file is not None:
        atomic_write_json(json_file, report.to_dict())
