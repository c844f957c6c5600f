"""`detent bench`: what learning costs and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data.files import atomic_write_json
from pipeline.cli_bench_tables import (
    JsonFile,
    PeerPython,
    Smoke,
    check_peer_python,
    finish,
    show,
    with_interval,
    world_model_tables,
)
from pipeline.cli_output import check_output_file, one_of, reported, stderr, stdout, whole_number
from pipeline.lock import WorkdirLock, create_workdir
from pipeline.progress import Reporter

EfficiencyWorlds = Literal["cartpole", "masked-cartpole", "acrobot", "portfolio"]


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
        show(title, ("", YARDSTICK, *others), rows)
        means = []
        for name, parts in report.gains.items():
            won, folds = report.won(name)
            gain = parts["judged"]
            interval = f"[{gain.low:+.4f}, {gain.high:+.4f}]"
            means.append((name, f"{won} of {folds}", f"{gain.estimate:+.4f}", interval))
        headers = ("", "folds at least equal", "mean", "95 % interval")
        show(f"Gain over {YARDSTICK}, nats per bar, without development folds", headers, means)
        finish(report, json_file)
        if not smoke and not report.within_goal:
            stderr.print(f"[red]the world model is behind {YARDSTICK} in a fold, or not better on average[/]")
            raise typer.Exit(1)


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
        show(f"Training, {report.num_envs:,} rows, {report.steps:,} steps", ("", "measured", "goal"), rows)
        finish(report, json_file)
        if not smoke and not report.within_goals:
            stderr.print("[red]training misses a goal[/]")
            raise typer.Exit(1)


def bench_world_model(
    json_file: JsonFile = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time mbrl-lib, OfflineRL-Kit, rl-blox and TorchRL too.")
    ] = False,
    peer_python: PeerPython = None,
    repeats: Annotated[int, typer.Option(help="Rounds of every contender.", **whole_number(at_least=1))] = 7,
    year: Annotated[bool, typer.Option("--year", help="Fit a year of minutes too: minutes, 3 GiB.")] = False,
    smoke: Smoke = False,
) -> None:
    """Time world model and imagination on one thread; exit code 1 if a goal is missed."""
    with reported(as_json=False):
        check_output_file("--json", json_file)
        check_peer_python(peers, peer_python)
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
            show(title, headers, rows)
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
                    with_interval(found.estimate, found.low, found.high, ",.0f"),
                    with_interval(final.estimate, final.low, final.high, ",.1f"),
                    *("-" if one is None else with_interval(one.estimate, one.low, one.high, ",.0f") for one in marks),
                )
            )
        headers = (
            "",
            f"reached {report.goal:g}",
            "real steps to it",
            "last judgement",
            *(f"at {mark:,} steps" for mark in report.marks),
        )
        show(f"{env}: interquartile mean over seeds (95 % interval)", headers, rows)
        stdout.print(f"fewer real steps than MaskablePPO: {report.fewer_steps:.1f} times")
        finish(report, json_file)


def bench_ablation(
    workdir: Annotated[
        Path, typer.Option("--workdir", "-w", help="Finished fits are kept below this folder (created).")
    ] = Path("var"),
    runs: Annotated[int, typer.Option(help="Training runs of each variant.", **whole_number(at_least=1))] = 5,
    jobs: Annotated[int, typer.Option(help="Processes; a fit takes one core.", **whole_number(at_least=1))] = 1,
    json_file: JsonFile = None,
    smoke: Smoke = False,
) -> None:
    """Change one thing of MBPO at a time and judge it on markets whose truth is known; about a minute per fit.

    An interrupted ablation goes on where it stopped.
    """
    with reported(as_json=False, resumable=True):
        check_output_file("--json", json_file)
        create_workdir(workdir)
        from benchmarks.ablation import PATHS, SMOKE_PATHS, measure_ablation
        from configs import load_config

        reporter = Reporter()
        try:
            with WorkdirLock(workdir.resolve()), reporter.stage("variants") as progress:
                report = measure_ablation(
                    load_config("suite-smoke" if smoke else "suite"),
                    workdir / "ablation",
                    runs=1 if smoke else runs,
                    jobs=jobs,
                    progress=progress,
                    paths=SMOKE_PATHS if smoke else PATHS,
                )
        finally:
            reporter.close()
        rows = [
            (
                row.variant,
                f"{row.mean:.2f}",
                f"{min(row.sharpe):.2f} to {max(row.sharpe):.2f}",
                "-"
                if row.difference is None
                else with_interval(row.difference.estimate, row.difference.low, row.difference.high, "+.2f"),
                f"{row.turnover:.0f}",
                "-" if row.forbidden_share is None else f"{row.forbidden_share:.1%}",
            )
            for row in report.rows
        ]
        headers = ("", "Sharpe", "runs", "to those in force", "turnover", "forbidden")
        title = f"{report.train_bars:,} bars, {report.runs} runs, {report.paths} test markets, 95 % interval over runs"
        show(title, headers, rows)
        finish(report, json_file)
