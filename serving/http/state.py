"""What a service is at this moment, as `/state` tells it and the operator page shows it."""

from __future__ import annotations

import importlib.metadata
import time

import msgspec

from masking import TradingState
from serving.bundle import Bundle
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.http.metrics import ServiceMetrics, newest_entry
from serving.records import RiskState


class BundleView(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle and what it was made from."""

    hash: str
    rule_set_hash: str
    planner: bool
    """Whether it has one."""
    git_commit: str
    data_hash: str


class LedgerView(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the ledger."""

    account: str
    seq: int
    """Number of entries."""
    hash: str
    """Of the newest; empty where there is none."""
    error: str
    """Why it cannot be read; empty where it can."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How often the challenger executed what was executed."""

    equal: int
    compared: int


class LatencyView(msgspec.Struct, frozen=True, kw_only=True):
    """Live decisions by total latency, since the start."""

    upper_ms: list[float]
    """Upper ends of all buckets but the last, which has none."""
    counts: list[int]
    """Decisions per bucket, one more than `upper_ms`."""


class DriftView(msgspec.Struct, frozen=True, kw_only=True):
    """What the drift monitor finds."""

    level: str
    words: str


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator needs at a glance."""

    version: str
    """Of detent."""
    time: float
    """Wall clock of the service, seconds since 1970 UTC."""
    started_at: float
    trading_state: str
    """ACTIVE, REDUCE_ONLY or HALTED."""
    killed: bool
    """The kill switch is latched."""
    drawdown: float
    """1 - equity / running peak."""
    risk: RiskState
    ledger: LedgerView
    bundle: BundleView
    challenger: BundleView | None
    agreement: Agreement
    actions: list[str]
    """Names of the actions, from 0."""
    latency: LatencyView
    drift: DriftView | None
    """None where nobody watches for it."""


def service_state(engine: DecisionEngine, metrics: ServiceMetrics, started_at: float) -> ServiceState:
    """The state now; a ledger that cannot be read is told, not raised."""
    risk, challenger, drift = engine.risk, engine.challenger, metrics.drift
    equal, compared = engine.agreement
    latency = metrics.latency
    return ServiceState(
        version=detent_version(),
        time=time.time(),
        started_at=started_at,
        trading_state=TradingState(engine.trading_state).name,
        killed=risk.killed,
        drawdown=risk.drawdown,
        risk=risk,
        ledger=_ledger(engine),
        bundle=_bundle(engine.bundle),
        challenger=None if challenger is None else _bundle(challenger),
        agreement=Agreement(equal=equal, compared=compared),
        actions=list(engine.bundle.rule_set.actions.names),
        latency=LatencyView(upper_ms=list(latency.upper_ms), counts=list(latency.counts)),
        drift=None if drift is None else DriftView(level=drift.level.value, words=drift.words),
    )


def detent_version() -> str:
    """Version of the installed package; `unknown` where it runs from its source."""
    try:
        return importlib.metadata.version("detent")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _ledger(engine: DecisionEngine) -> LedgerView:
    account = engine.ledger.account
    try:
        newest = newest_entry(engine.ledger)
    except LedgerError as error:
        return LedgerView(account=account, seq=0, hash="", error=str(error))
    if newest is None:
        return LedgerView(account=account, seq=0, hash="", error="")
    return LedgerView(account=account, seq=newest.seq, hash=newest.hash, error="")


def _bundle(bundle: Bundle) -> BundleView:
    manifest = bundle.manifest
    return BundleView(
        hash=bundle.hash,
        rule_set_hash=manifest.rule_set_hash,
        planner=manifest.planner is not None,
        git_commit=manifest.provenance.git_commit,
        data_hash=manifest.provenance.data_hash,
    )
