"""What Prometheus is told: counted from records, or read from the engine when it asks."""

from __future__ import annotations

import msgspec
import pytest
from http_worlds import with_planner
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from serving_parts import START, request

from serving import Bundle
from serving.drift.monitor import DriftLevel, DriftStatus
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.http.metrics import LATENCY_BUCKETS, ServiceMetrics
from serving.records import Mode, Reason
from serving.stream.settings import StreamStatus


@pytest.fixture
def metrics(engine: DecisionEngine) -> ServiceMetrics:
    return ServiceMetrics(engine)


def samples(metrics: ServiceMetrics) -> dict[tuple[str, ...], float]:
    """By name and label values, in the order of the labels' names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_decisions_are_counted_by_who_and_why(engine: DecisionEngine, metrics: ServiceMetrics) -> None:
    engine.decide(request("one"))
    engine.decide(request("one"))  # the same again is no new decision
    engine.decide(request("two"))
    engine.decide(request("odd", features={}))
    engine.kill("Ada", "a test")
    engine.decide(request("halted", position=0.5))
    found = samples(metrics)
    assert found["detent_decisions_total", "live", "ok", "policy"] == 2
    assert found["detent_decisions_total", "live", "missing_feature", "hold"] == 1
    assert sum(value for (name, *_), value in found.items() if name == "detent_decisions_total") == 4
    assert found["detent_controls_total", "kill"] == 1
    assert found["detent_last_decision_timestamp_seconds",] == START


def test_a_shadow_is_counted_apart(engine: DecisionEngine, metrics: ServiceMetrics, bundle: Bundle) -> None:
    engine.decide(request("before"))
    assert ("detent_shadow_agreement_ratio",) not in samples(metrics)
    engine.challenge(with_planner(bundle))
    engine.decide(request("beside"))
    found = samples(metrics)
    assert (
        sum(value for (name, *rest), value in found.items() if name == "detent_decisions_total" and rest[0] == "shadow")
        == 1
    )
    equal, compared = engine.agreement
    assert found["detent_shadow_compared",] == compared == 1
    assert found["detent_shadow_agreement_ratio",] == equal
    bundles = {labels[2]: labels[0] for (name, *labels) in found if name == "detent_bundle_info"}
    assert bundles == {"champion": bundle.hash, "challenger": "1" * 64}
    assert sum(metrics.latency.counts) == 2


def test_replaced_actions_are_counted(engine: DecisionEngine, metrics: ServiceMetrics) -> None:
    record = engine.decide(request())
    before = samples(metrics)["detent_overridden_total",]
    overridden = msgspec.structs.replace(record, reason=Reason.OVERRIDDEN)
    metrics.observe(overridden, msgspec.structs.replace(overridden, mode=Mode.SHADOW))
    assert (before, samples(metrics)["detent_overridden_total",]) == (0.0, 1.0)


def test_latency_is_told_by_stage_in_seconds(engine: DecisionEngine, metrics: ServiceMetrics) -> None:
    record = engine.decide(request())
    for microseconds in (50.0, 51.0, 80_000.0, 80_001.0):
        metrics.observe(msgspec.structs.replace(record, latency_us={"infer": 1.0, "total": microseconds}))
    found = samples(metrics)
    assert found["detent_decision_latency_seconds_count", "live", "total"] == 5
    assert found["detent_decision_latency_seconds_sum", "live", "total"] == pytest.approx(0.160102)
    assert found["detent_decision_latency_seconds_bucket", "5e-05", "live", "total"] == 2
    assert found["detent_decision_latency_seconds_bucket", "0.08", "live", "total"] == 4
    assert set(record.latency_us) <= {labels[1] for (name, *labels) in found if name.endswith("seconds_count")}
    # The page counts as Prometheus does.
    assert metrics.latency.upper_ms[0] == 0.05
    assert (metrics.latency.counts[:2], metrics.latency.counts[-2:]) == ((2, 1), (1, 1))
    assert list(LATENCY_BUCKETS) == sorted(LATENCY_BUCKETS)


def test_the_risk_managers_state_is_that_of_this_moment(engine: DecisionEngine, metrics: ServiceMetrics) -> None:
    engine.decide(request("one", equity=1000.0))
    engine.decide(request("two", equity=900.0, bar_time=START - 30.0))
    found = samples(metrics)
    assert found["detent_drawdown",] == pytest.approx(0.1)
    assert (found["detent_trading_state",], found["detent_killed",]) == (1.0, 0.0)
    assert found["detent_ledger_seq",] == 3
    engine.kill("Ada", "a test")
    found = samples(metrics)
    assert (found["detent_trading_state",], found["detent_killed",], found["detent_ledger_seq",]) == (2.0, 1.0, 4.0)


def test_uncertainty_is_that_of_the_newest_decision(engine: DecisionEngine, metrics: ServiceMetrics) -> None:
    record = engine.decide(request("one"))
    assert record.uncertainty is not None
    assert samples(metrics)["detent_model_uncertainty",] == pytest.approx(record.uncertainty)
    engine.decide(request("unknown", features={}))
    assert samples(metrics)["detent_model_uncertainty",] == pytest.approx(record.uncertainty)


def test_without_a_ledger_the_rest_is_still_told(
    engine: DecisionEngine, metrics: ServiceMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("gone")

    monkeypatch.setattr(engine.ledger, "read", fail)
    found = samples(metrics)
    assert ("detent_ledger_seq",) not in found
    assert found["detent_trading_state",] == 0.0


def test_drift_is_that_of_the_monitor(metrics: ServiceMetrics) -> None:
    assert metrics.drift is None
    assert ("detent_drift_level",) not in samples(metrics)
    status = DriftStatus(
        bars=60, psi={"momentum": 0.4}, ks={"momentum": 0.01}, nll_mean=1.25, nll_z=None, level=DriftLevel.ALARM,
        worst="momentum", words="alarm",
    )  # fmt: skip
    metrics.watch_drift(lambda: status)
    found = samples(metrics)
    assert (found["detent_drift_level",], found["detent_drift_bars",]) == (2.0, 60.0)
    assert (found["detent_drift_psi", "momentum"], found["detent_drift_ks_p", "momentum"]) == (0.4, 0.01)
    assert found["detent_drift_nll",] == 1.25
    assert ("detent_drift_nll_z",) not in found
    assert metrics.drift is status


def test_answers_inferences_and_losses_are_counted(
    metrics: ServiceMetrics, engine: DecisionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics.answered("/state", 200)
    metrics.inferred("policy", 5, 1)
    with monkeypatch.context() as patch:
        patch.setattr("serving.engine.Draft", lambda *_: 1 // 0)
        engine.decide(request())
    found = samples(metrics)
    assert found["detent_http_requests_total", "/state", "200"] == 1
    assert (
        found["detent_inferred_rows_total", "policy"],
        found["detent_inferred_overridden_rows_total", "policy"],
    ) == (5, 1)
    assert found["detent_unrecorded_total", "internal_error"] == 1


def test_names_are_ours_or_the_processes_and_the_registry_is_not_shared(engine: DecisionEngine) -> None:
    first, second = ServiceMetrics(engine), ServiceMetrics(engine)
    engine.decide(request())
    assert samples(first)["detent_decisions_total", "live", "ok", "policy"] == 1
    assert samples(second)["detent_decisions_total", "live", "ok", "policy"] == 1
    names = {name for name, *_ in samples(first)}
    assert all(name.startswith(("detent_", "process_")) for name in names)
    assert not any(name.endswith("_created") for name in names)
    assert "process_resident_memory_bytes" in names
    assert not any(family.name.startswith("detent_") for family in REGISTRY.collect())


def test_a_stream_worker_is_seen_working_and_giving_up(metrics: ServiceMetrics) -> None:
    assert not [name for name, *_ in samples(metrics) if name.startswith("detent_stream")]
    status = StreamStatus(connected=True, decided=5, refused=1, published=4)
    metrics.watch_stream(status)
    found = samples(metrics)
    assert (found["detent_stream_connected",], found["detent_stream_ended",]) == (1, 0)
    assert [found[f"detent_stream_{name}_total",] for name in ("decided", "refused", "published", "failures")] == [
        5, 1, 4, 0,
    ]  # fmt: skip
    status.connected, status.ended = False, True
    found = samples(metrics)
    assert (found["detent_stream_connected",], found["detent_stream_ended",]) == (0, 1)
