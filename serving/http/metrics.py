"""What Prometheus may know of a service: counted as records come, or read from the engine when it asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.drift.monitor import DriftLevel, DriftStatus
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.base import Ledger
from serving.records import DecisionRecord, Entry, Mode, Reason, Record
from serving.stream.settings import StreamStatus

MEDIA_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS = tuple(
    upper / 1e3 for upper in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 50.0, 80.0)
)
"""Upper ends in seconds; the last is the hard time-out."""
TOTAL = "total"
"""The stage that is all of them."""


class LatencyHistogram(NamedTuple):
    """Live decisions by total latency, since the start."""

    upper_ms: tuple[float, ...]
    """Upper ends of all buckets but the last, which has none."""
    counts: tuple[int, ...]
    """Decisions per bucket, one more than `upper_ms`."""


class ServiceMetrics:
    """Metrics of one engine in a registry of its own; names begin with `detent_`."""

    def __init__(self, engine: DecisionEngine) -> None:
        """Begin to count."""
        # The time at which each series began would double their number.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        # Looking a counter up by its labels takes longer than counting: those that were looked up are kept.
        decisions = counter(
            "detent_decisions", "Decisions by who chose, why, and live or shadow", ["source", "reason", "mode"]
        )
        self._decisions = cache(decisions.labels)
        self._overridden = counter("detent_overridden", "Live decisions that the risk manager replaced by Hold")
        self._controls = counter("detent_controls", "Commands of persons and of the service", ["command"])
        self._uncertainty = gauge(
            "detent_model_uncertainty", "Disagreement of the ensemble at the newest live decision"
        )
        self._decided_at = gauge("detent_last_decision_timestamp_seconds", "Time of the newest live decision")
        requests = counter("detent_http_requests", "Answered HTTP requests", ["route", "status"])
        self._requests = cache(requests.labels)
        inferred = counter("detent_inferred_rows", "Rows of stateless inference", ["model"])
        self._inferred = cache(inferred.labels)
        replaced = counter(
            "detent_inferred_overridden_rows", "Rows of it whose action failed the last check", ["model"]
        )
        self._replaced = cache(replaced.labels)
        self._latency = _LatencyCollector()
        self.registry.register(self._latency)
        self._collector = _EngineCollector(engine)
        self.registry.register(self._collector)
        # It says nothing on systems without /proc.
        ProcessCollector(registry=self.registry)
        engine.subscribe(self.observe)

    def observe(self, record: Record, shadow: DecisionRecord | None = None) -> None:
        """Count a record, and what the challenger made of it."""
        if isinstance(record, DecisionRecord):
            self._decision(record)
            if shadow is not None:
                self._decision(shadow)
        else:
            self._controls.labels(record.command).inc()

    def watch_drift(self, status: Callable[[], DriftStatus | None]) -> None:
        """Show what a drift monitor finds. Args: status: `DriftWatch.status`, asked whenever somebody looks."""
        self._collector.drift = status

    def watch_stream(self, status: StreamStatus) -> None:
        """Show what a stream worker is doing. Args: status: of `StreamWorker`, looked at whenever somebody asks."""
        self._collector.stream = status

    @property
    def drift(self) -> DriftStatus | None:
        """The newest verdict; None while nobody watches."""
        return None if self._collector.drift is None else self._collector.drift()

    @property
    def latency(self) -> LatencyHistogram:
        """Live decisions by total latency."""
        upper_ms = tuple(round(1e3 * upper, 6) for upper in LATENCY_BUCKETS)
        return LatencyHistogram(upper_ms, tuple(self._latency.counts(TOTAL, Mode.LIVE)))

    def answered(self, route: str, status: int) -> None:
        """Count an answer. Args: route: as it is declared, not as it was called."""
        self._requests(route, str(status)).inc()

    def inferred(self, model: str, rows: int, overridden: int) -> None:
        """Count stateless inference."""
        self._inferred(model).inc(rows)
        self._replaced(model).inc(overridden)

    def text(self) -> bytes:
        """Everything in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _decision(self, record: DecisionRecord) -> None:
        mode = record.mode.value
        self._decisions(record.source.value, record.reason.value, mode).inc()
        for stage, microseconds in record.latency_us.items():
            self._latency.observe(stage, mode, 1e-6 * microseconds)
        if record.mode is not Mode.LIVE:
            return
        self._decided_at.set(record.time)
        self._overridden.inc(record.reason is Reason.OVERRIDDEN)
        if record.uncertainty is not None:
            self._uncertainty.set(record.uncertainty)


# A histogram for each stage and mode. Those of prometheus_client lock each number for itself, which takes ten times as
# long; here one thread at a time counts, as the engine decides.
class _LatencyCollector(Collector):
    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = {}

    def counts(self, stage: str, mode: str) -> list[int]:
        return self._counts.get((stage, mode), [0] * (len(LATENCY_BUCKETS) + 1))

    def observe(self, stage: str, mode: str, seconds: float) -> None:
        key = stage, mode
        counts = self._counts.get(key)
        if counts is None:
            self._sums[key] = 0.0
            counts = self._counts[key] = self.counts(stage, mode)
        counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self._sums[key] += seconds

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "detent_decision_latency_seconds", "Time of a decision by stage", labels=["stage", "mode"]
        )
        ends = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
        for key, counts in [*self._counts.items()]:
            family.add_metric(list(key), list(zip(ends, accumulate(counts), strict=True)), self._sums[key])
        yield family


# Read when asked, so that it is never older than the answer.
class _EngineCollector(Collector):
    def __init__(self, engine: DecisionEngine) -> None:
        self._engine = engine
        self.drift: Callable[[], DriftStatus | None] | None = None
        self.stream: StreamStatus | None = None

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engine, risk = self._engine, self._engine.risk
        yield GaugeMetricFamily("detent_trading_state", "0 ACTIVE, 1 REDUCE_ONLY, 2 HALTED", value=engine.trading_state)
        yield GaugeMetricFamily("detent_killed", "1 while the kill switch is latched", value=float(risk.killed))
        yield GaugeMetricFamily("detent_drawdown", "1 - equity / running peak", value=risk.drawdown)
        # Whatever else is known must not be lost with the ledger.
        with suppress(LedgerError):
            newest = newest_entry(engine.ledger)
            seq = 0 if newest is None else newest.seq
            yield GaugeMetricFamily("detent_ledger_seq", "Entries of the ledger", value=seq)
        info = GaugeMetricFamily(
            "detent_bundle_info", "Bundles by part", labels=["part", "bundle_hash", "rule_set_hash", "git_commit"]
        )
        for part, bundle in (("champion", engine.bundle), ("challenger", engine.challenger)):
            if bundle is not None:
                manifest = bundle.manifest
                info.add_metric([part, bundle.hash, manifest.rule_set_hash, manifest.provenance.git_commit], 1.0)
        yield info
        unrecorded = CounterMetricFamily("detent_unrecorded", "Decisions that could not be recorded", labels=["reason"])
        for reason, count in dict(engine.unrecorded).items():
            unrecorded.add_metric([reason.value], count)
        yield unrecorded
        equal, compared = engine.agreement
        yield GaugeMetricFamily("detent_shadow_compared", "Decisions of the challenger", value=compared)
        if compared:
            yield GaugeMetricFamily(
                "detent_shadow_agreement_ratio", "Share of equal executed actions", value=equal / compared
            )
        drift = None if self.drift is None else self.drift()
        if drift is not None:
            yield from _drift(drift)
        if self.stream is not None:
            yield from _stream(self.stream)


def newest_entry(ledger: Ledger) -> Entry | None:
    """The end of a ledger, without `head`: that tells the ledger what its writer knows. Raises: LedgerError."""
    return next(iter(ledger.read(-1)), None)


def _drift(status: DriftStatus) -> Iterator[Metric]:
    levels = [level.value for level in DriftLevel]
    yield GaugeMetricFamily("detent_drift_level", "0 ok, 1 warning, 2 alarm", value=levels.index(status.level.value))
    yield GaugeMetricFamily("detent_drift_bars", "Bars in the window of the drift monitor", value=status.bars)
    psi = GaugeMetricFamily("detent_drift_psi", "PSI above its expectation without drift", labels=["feature"])
    ks = GaugeMetricFamily("detent_drift_ks_p", "p-value of the Kolmogorov-Smirnov distance", labels=["feature"])
    for family, values in ((psi, status.psi), (ks, status.ks)):
        for name, value in values.items():
            family.add_metric([name], value)
        yield family
    for name, words, number in (
        ("detent_drift_nll", "Mean one-step NLL, nats per feature", status.nll_mean),
        ("detent_drift_nll_z", "Its rank above a half, standard deviations of windows", status.nll_z),
    ):
        if number is not None:
            yield GaugeMetricFamily(name, words, value=number)


def _stream(status: StreamStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("detent_stream_connected", "1 while Redis and the ledger answer", value=status.connected)
    yield GaugeMetricFamily(
        "detent_stream_ended", "1 once the stream was no copy of the ledger and the worker gave up", value=status.ended
    )
    for name, words, number in (
        ("decided", "Answers of the engine to messages, repeated ones too", status.decided),
        ("refused", "Messages that could not be read", status.refused),
        ("published", "Decisions published", status.published),
        ("acknowledged", "Messages acknowledged", status.acknowledged),
        ("deleted", "Messages that were removed before they were acknowledged", status.deleted),
        ("failures", "Times that Redis or the ledger failed", status.failures),
    ):
        yield CounterMetricFamily(f"detent_stream_{name}", words, value=number)
