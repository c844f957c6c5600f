"""`detent serve`: decisions over HTTP and Redis Streams, from one engine, for one account."""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from configs import ConfigError
from pipeline.cli_output import RuleModules, import_rules, reported, stderr, whole_number

if TYPE_CHECKING:
    from serving.canary import Canary
    from serving.engine import DecisionEngine
    from serving.http.metrics import ServiceMetrics
    from serving.limits import LimitsSource
    from serving.watch import BundleSource

T = TypeVar("T")

REDIS_URL = "DETENT_REDIS_URL"
LEDGER = "DETENT_LEDGER"
LARGEST_PORT = 65_535


def serve(
    bundle: Annotated[
        str, typer.Option("--bundle", "-b", help="Bundle directory, or models:/NAME@ALIAS of the registry.")
    ] = "models:/detent-policy@champion",
    challenger: Annotated[
        str | None,
        typer.Option(help="A bundle that decides in shadow, e.g. models:/detent-policy@challenger; never executed."),
    ] = None,
    workdir: Annotated[Path, typer.Option("--workdir", "-w", help="Ledger, fetched bundles; created.")] = Path("var"),
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; the database in the work directory if left out.")
    ] = None,
    account: Annotated[str, typer.Option(help="Whose decisions; every account has a ledger of its own.")] = "default",
    ledger: Annotated[
        str | None,
        typer.Option(help=f"File or postgresql://...; else {LEDGER} in the environment, else a file in the workdir."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; any but loopback needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", **whole_number(at_least=0))] = 8470,
    redis: Annotated[
        bool,
        typer.Option("--redis", help=f"Decide on a Redis stream too; its address is {REDIS_URL} in the environment."),
    ] = False,
    redis_cluster: Annotated[bool, typer.Option("--redis-cluster", help="That Redis is a cluster.")] = False,
    limits_max_age: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Obey limits in Redis, which may be this old; older ones stop trading."),
    ] = None,
    planner: Annotated[bool, typer.Option(help="Let the bundle's planner decide, where it has one.")] = True,
    inference_ms: Annotated[float, typer.Option(help="What the policy may take before the answer is Hold.")] = 10.0,
    decision_ms: Annotated[
        float, typer.Option(help="What a decision may take; the rest of it is the planner's.")
    ] = 50.0,
    timeout_ms: Annotated[float, typer.Option(help="After this the answer is Hold, whatever was found.")] = 80.0,
    bar_seconds: Annotated[
        float, typer.Option(help="Longest time between two bars, weekends and holidays included.")
    ] = 4 * 86_400.0,
    watch_seconds: Annotated[float, typer.Option(help="How often to look for another bundle; 0 never looks.")] = 60.0,
    fsync: Annotated[
        bool,
        typer.Option(help="Force every decision to the disk before it is answered, in a ledger that is a file."),
    ] = True,
    reduce_only_on_drift: Annotated[
        bool, typer.Option(help="Move trading to REDUCE_ONLY when the drift monitor alarms.")
    ] = False,
    canary_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The bundle is on trial: no position beyond this share of `account.capital`, and an end by itself.",
        ),
    ] = None,
    canary_drawdown: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Drawdown of the canary's equity that pulls its kill switch; 0.02."),
    ] = None,
    canary_failures: Annotated[
        int | None, typer.Option(help="Failed decisions that pull it; 5.", **whole_number(at_least=1))
    ] = None,
    rule_modules: RuleModules = None,
) -> None:
    """Serve decisions until SIGTERM; reloads the bundle when its alias or link moves on.

    Tokens come from the environment: DETENT_OPERATOR_TOKEN, and with it DETENT_DECIDE_TOKEN and DETENT_READ_TOKEN.
    Without any, only loopback is served: everybody on this machine may decide and halt, nobody may reset.
    """
    with reported(as_json=False):
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        import_rules(rule_modules)
        from serving.engine import DecisionEngine
        from serving.errors import BundleError
        from serving.http.auth import Tokens, check_bind
        from serving.http.metrics import ServiceMetrics
        from serving.http.server import HttpServer
        from serving.ledger.open import open_ledger
        from serving.settings import EngineSettings
        from serving.watch import BundleWatcher, warmed

        tokens = _checked(Tokens.from_environment)
        _checked(lambda: check_bind(host, tokens))
        if port > LARGEST_PORT:
            raise ConfigError(f"--port: expected at most {LARGEST_PORT}, was {port}")
        if not 0.0 <= watch_seconds < math.inf:
            raise ConfigError(f"--watch-seconds: expected a number of seconds, or 0, was {watch_seconds:g}")
        redis_url = _redis_url("--redis") if redis else None
        settings = _checked(
            lambda: EngineSettings(
                planner=planner,
                inference_ms=inference_ms,
                decision_ms=decision_ms,
                timeout_ms=timeout_ms,
                bar_seconds=bar_seconds,
                canary=_canary(canary_fraction, canary_drawdown, canary_failures),
            )
        )
        champion = _source(bundle, workdir, tracking_uri)
        rival = None if challenger is None else _source(challenger, workdir, tracking_uri)
        found = champion()
        if found is None:
            raise BundleError(f"{bundle}: expected a version, was none; `detent retrain` makes and promotes one")
        opened = warmed(found, planner=planner, seed=settings.seed)
        workdir.mkdir(parents=True, exist_ok=True)
        where = ledger or os.environ.get(LEDGER) or str(workdir / f"ledger-{account}.db")
        with ExitStack() as open_parts:
            limits = open_parts.enter_context(_limits(limits_max_age, account, cluster=redis_cluster))
            book = open_ledger(where, account, fsync="always" if fsync else "never", wait=True)
            open_parts.callback(book.close)
            engine = open_parts.enter_context(closing(DecisionEngine(opened, book, settings, limits=limits)))
            metrics = ServiceMetrics(engine)
            server = _checked(lambda: HttpServer(engine, host, port, tokens=tokens, metrics=metrics))
            watcher = BundleWatcher(engine, champion, rival, interval=watch_seconds)
            # A standby may have waited long for its ledger.
            watcher.look()
            open_parts.enter_context(_drift(engine, metrics, reduce_only=reduce_only_on_drift, longest_gap=bar_seconds))
            open_parts.enter_context(_stream(redis_url, engine, metrics, account, cluster=redis_cluster))
            open_parts.callback(watcher.stop)
            if watch_seconds > 0.0:
                watcher.start()
            # What is loaded stays: the collector need not look at it again, which shortens its longest pauses.
            gc.collect()
            gc.freeze()
            server.run(lambda url: stderr.print(f"{opened.hash[:12]} serves at {url}", highlight=False))


# Settings say themselves what is wrong with them.
def _checked(make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _canary(fraction: float | None, drawdown: float | None, failures: int | None) -> Canary | None:
    from serving.canary import Canary

    given: dict[str, Any] = {"max_drawdown": drawdown, "max_failures": failures}
    given = {name: value for name, value in given.items() if value is not None}
    if fraction is not None:
        return Canary(capital_fraction=fraction, **given)
    if given:
        raise ConfigError("--canary-drawdown, --canary-failures: expected --canary-fraction beside them, was none")
    return None


def _source(where: str, workdir: Path, tracking_uri: str | None) -> BundleSource:
    from pipeline.fetch_bundle import registry_source
    from serving.watch import directory_source

    if where.startswith("models:"):
        return registry_source(where, workdir.resolve(), tracking_uri)
    return directory_source(Path(where))


@contextmanager
def _limits(max_age: float | None, account: str, *, cluster: bool) -> Iterator[LimitsSource | None]:
    if max_age is None:
        yield None
        return
    from serving.stream.limits import RedisLimits

    url = _redis_url("--limits-max-age")
    with _checked(lambda: RedisLimits(url, f"detent:{{{account}}}:limits", max_age, cluster=cluster)) as limits:
        yield limits


@contextmanager
def _drift(engine: DecisionEngine, metrics: ServiceMetrics, *, reduce_only: bool, longest_gap: float) -> Iterator[None]:
    from serving.drift.observer import DriftWatch

    watch = DriftWatch(engine.bundle, reduce_only_on_alarm=reduce_only, longest_gap=longest_gap)
    watch.refill(engine.ledger)
    watch.attach(engine)
    metrics.watch_drift(watch.status)
    try:
        yield
    finally:
        watch.close()


@contextmanager
def _stream(
    url: str | None, engine: DecisionEngine, metrics: ServiceMetrics, account: str, *, cluster: bool
) -> Iterator[None]:
    if url is None:
        yield
        return
    from serving.stream.settings import StreamSettings
    from serving.stream.worker import StreamWorker

    settings = _checked(lambda: StreamSettings.for_account(account, cluster=cluster))
    worker, stop = StreamWorker(engine, url, settings), threading.Event()
    metrics.watch_stream(worker.status)
    thread = threading.Thread(target=worker.run, args=(stop,), name="stream")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _redis_url(option: str) -> str:
    url = os.environ.get(REDIS_URL)
    if not url:
        raise ConfigError(f"{option}: expected {REDIS_URL} in the environment, was none")
    from redis.connection import parse_url

    try:
        parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"{REDIS_URL}: {error}") from error
    return url
