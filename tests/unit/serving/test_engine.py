"""The engine: every stage may end in Hold, and nothing raises."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from serving_parts import DAY, FEATURES, START, Hands, decisions, request

from masking import HOLD
from serving import Bundle
from serving.engine import DecisionEngine
from serving.ledger.audit import replay
from serving.limits import ExternalLimits
from serving.records import Mode, Reason, Source, decode_request, encode
from serving.settings import EngineSettings


def test_a_decision_is_the_policys_recorded_and_explained(engine_of: Callable[..., DecisionEngine]) -> None:
    engine = engine_of()
    record = engine.decide(request())
    assert (record.reason, record.detail, record.source, record.mode) == (Reason.OK, "", Source.POLICY, Mode.LIVE)
    assert record.executed == record.proposed
    assert record.action_masks[record.executed]
    actions = engine.bundle.rule_set.actions
    assert record.target_position == (None if record.executed == HOLD else actions.factors[record.executed - 1])
    row = np.frombuffer(record.state, dtype="<f4")
    named = dict(zip(engine.bundle.manifest.state_names, row.tolist(), strict=True))
    assert named["volatility_20"] == np.float32(0.2)
    assert (named["position"], named["holding_time"], named["drawdown"]) == (0.0, 10.0, 0.0)
    assert named["data_age"] == pytest.approx(60.0 / (4 * DAY))
    assert named["model_uncertainty"] == np.float32(record.uncertainty)
    assert record.blocked == {"max_position_change": (4, 5, 6)}
    assert decisions(engine) == [record]
    assert set(record.latency_us) == {"validate", "infer", "check", "total"}


def test_the_same_event_gets_the_same_decision_also_after_a_restart(engine_of: Callable[..., DecisionEngine]) -> None:
    first = engine_of().decide(request("one"))
    engine = engine_of()
    again = engine.decide(request("one", position=1.0, features={}))
    assert again == first
    assert len(decisions(engine)) == 1
    assert engine.refuse("one", b"", "no") == first


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"event": ""}, Reason.INVALID_REQUEST, "event_id"),
        ({"event": "x" * 201}, Reason.INVALID_REQUEST, "event_id"),
        ({"event": "a\0b"}, Reason.INVALID_REQUEST, "printable"),
        ({"features": {**FEATURES, "momentum": None}}, Reason.NON_FINITE, "momentum"),
        ({"features": {**FEATURES, "momentum": 1e300}}, Reason.NON_FINITE, "momentum"),
        ({"features": {"momentum": 0.1}}, Reason.MISSING_FEATURE, "gap_return, intraday_return, volatility_20"),
        ({"features": {**FEATURES, "sentiment": 1.0}}, Reason.UNKNOWN_FEATURE, "sentiment"),
        ({"equity": None}, Reason.NON_FINITE, "account.equity"),
        ({"position": math.nan}, Reason.NON_FINITE, "account.position"),
        ({"open_pnl": None}, Reason.NON_FINITE, "open_pnl"),
        ({"bar_time": math.inf}, Reason.NON_FINITE, "bar_time"),
        ({"bar_time": START + 10.0}, Reason.FUTURE_DATA, "10.000 s after"),
        ({"bar_time": START - 5 * DAY}, Reason.STALE_DATA, "432000 s old"),
        ({"action_masks": (True,)}, Reason.INVALID_REQUEST, "expected 7 values, was 1"),
        ({"action_masks": (False,) * 7}, Reason.NO_VALID_ACTION, "no action"),
        ({"bundle_hash": "0" * 64}, Reason.HASH_MISMATCH, "bundle_hash"),
        ({"rule_set_hash": "0" * 64}, Reason.HASH_MISMATCH, "rule_set_hash"),
    ],
)
def test_what_is_wrong_with_a_request_leads_to_hold_with_its_reason(
    engine_of: Callable[..., DecisionEngine], changes: dict[str, Any], reason: Reason, words: str
) -> None:
    engine = engine_of()
    record = engine.decide(request(**changes))
    assert (record.reason, record.executed, record.target_position) == (reason, HOLD, None)
    assert words in record.detail
    assert decisions(engine)[-1] == record
    assert 0 < len(record.event_id) <= 200
    assert record.event_id.isprintable()


def test_a_request_that_cannot_be_read_is_recorded_as_well(engine_of: Callable[..., DecisionEngine]) -> None:
    engine = engine_of()
    record = engine.refuse("e", b"{", "truncated")
    assert (record.reason, record.detail, record.executed, record.state) == (
        Reason.INVALID_REQUEST,
        "truncated",
        0,
        b"",
    )
    assert decisions(engine) == [record]


def test_time_may_not_run_backwards(engine_of: Callable[..., DecisionEngine], hands: Hands) -> None:
    engine = engine_of()
    engine.decide(request("a"))
    assert engine.decide(request("b", bar_time=START - 61.0)).reason is Reason.OUT_OF_ORDER
    hands.wall = START - 3.0
    assert engine_of().decide(request("c")).reason is Reason.CLOCK_BACKWARDS
    hands.wall = START - 1.0
    assert engine_of().decide(request("d")).reason is Reason.OK
    assert engine_of().risk.decided_at == START


def test_a_loss_is_a_loss_whatever_the_clock_says(engine_of: Callable[..., DecisionEngine], hands: Hands) -> None:
    engine = engine_of()
    engine.decide(request("a", position=0.9))
    hands.wall -= 30.0
    record = engine.decide(request("b", equity=700.0, position=0.9))
    assert (record.reason, record.executed, record.flatten) == (Reason.CLOCK_BACKWARDS, HOLD, True)
    assert (record.trading_state, engine.risk.killed, record.state) == (2, True, b"")


def test_the_drawdown_ladder_halts_closes_and_survives_a_restart(
    engine_of: Callable[..., DecisionEngine], hands: Hands
) -> None:
    engine = engine_of()
    assert engine.decide(request("a", position=0.9)).trading_state == 0
    hands.wall += DAY
    record = engine_of().decide(request("b", bar_time=hands.wall, equity=870.0, position=0.9))
    assert (record.reason, record.flatten, record.executed, record.target_position) == (Reason.HALTED, True, HOLD, 0.0)
    assert record.action_masks == (True, *[False] * 6)
    flat = engine_of().decide(request("c", bar_time=hands.wall, equity=990.0))
    assert (flat.trading_state, flat.flatten, flat.executed, flat.reason) == (2, False, HOLD, Reason.OK)


def test_a_halted_account_is_closed_even_when_the_data_is_stale_but_not_on_a_position_nobody_vouches_for(
    engine_of: Callable[..., DecisionEngine], hands: Hands
) -> None:
    engine = engine_of()
    engine.decide(request("a", position=0.5))
    engine.kill("Ada", "drill")
    hands.wall += 9 * DAY
    stale = engine.decide(request("b", position=0.5))
    assert (stale.reason, stale.flatten, stale.target_position) == (Reason.STALE_DATA, True, 0.0)
    old = engine.decide(request("c", position=0.5, bar_time=START - 70.0))
    assert (old.reason, old.flatten, old.target_position) == (Reason.OUT_OF_ORDER, False, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bar_time": START + 600.0}, Reason.FUTURE_DATA),
        ({"features": {}}, Reason.MISSING_FEATURE),
        ({"features": {**FEATURES, "more": 1.0}}, Reason.UNKNOWN_FEATURE),
        ({"bundle_hash": "0" * 64}, Reason.HASH_MISMATCH),
    ],
)
def test_a_loss_is_seen_in_a_request_that_cannot_be_decided(
    engine_of: Callable[..., DecisionEngine], changes: dict[str, Any], reason: Reason
) -> None:
    engine = engine_of()
    engine.decide(request("a", position=0.9))
    record = engine.decide(request("b", equity=700.0, position=0.9, **changes))
    assert (record.reason, record.executed, record.flatten) == (reason, HOLD, True)
    assert (record.trading_state, record.drawdown, engine.risk.killed) == (2, pytest.approx(0.3), True)
    assert (record.state, record.target_position) == (b"", 0.0)
    assert replay(engine.ledger, {engine.bundle.hash: engine.bundle}.get).ok


def test_the_trading_state_is_the_strictest_of_all(engine_of: Callable[..., DecisionEngine]) -> None:
    limits = Limits()
    engine = engine_of(limits=limits)
    assert engine.trading_state == 0
    limits.now = ExternalLimits(2, math.inf, False, "")
    assert (engine.trading_state, engine.risk.trading_state) == (2, 0)


def test_no_answer_in_time_is_hold_and_a_planner_that_is_late_leaves_it_to_the_policy(
    engine_of: Callable[..., DecisionEngine], planned: Bundle, hands: Hands
) -> None:
    assert engine_of(planned).decide(request("a")).source is Source.PLANNER
    gate = threading.Event()
    engine = engine_of(planned)
    deciders = engine._shop.deciders
    plan = deciders.by_planner
    deciders.by_planner = lambda *row: gate.wait(60.0) and plan(*row)  # type: ignore[method-assign, return-value]
    call = engine._planner_thread.call
    engine._planner_thread.call = lambda function, timeout: call(function, 0.001)  # type: ignore[method-assign]
    late = engine.decide(request("b"))
    assert (late.source, late.reason) == (Source.POLICY, Reason.OK)
    assert engine.decide(request("c")).source is Source.POLICY
    gate.set()
    while engine._planner_thread.busy:
        pass
    del engine._planner_thread.call, deciders.by_planner
    assert engine.decide(request("d")).source is Source.PLANNER
    hands.tick = 70.0
    too_late = engine.decide(request("e"))
    assert (too_late.reason, too_late.executed) == (Reason.INFERENCE_LATE, HOLD)


def test_the_hard_time_out_holds_whatever_was_found(engine_of: Callable[..., DecisionEngine], hands: Hands) -> None:
    engine = engine_of()
    infer = engine._policy_thread.call

    def slow(function: Callable[[], Any], timeout: float) -> Any:
        hands.steady += 61.0
        return infer(function, timeout)

    engine._policy_thread.call = slow  # type: ignore[method-assign]
    record = engine.decide(request(action_masks=(False, True, True, True, False, False, False)))
    assert (record.reason, record.executed, record.target_position) == (Reason.TOO_LATE, HOLD, None)
    assert record.proposed != HOLD


def test_a_graph_that_fails_is_hold(
    engine_of: Callable[..., DecisionEngine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of()

    def broken(*_: Any) -> Any:
        raise RuntimeError("onnxruntime is out of memory")

    monkeypatch.setattr(engine._shop.deciders, "by_policy", broken)
    with caplog.at_level(logging.ERROR):
        record = engine.decide(request())
    assert (record.reason, record.executed) == (Reason.INFERENCE_FAILED, HOLD)
    assert "out of memory" in record.detail


@pytest.mark.parametrize(("action", "words"), [(6, "'target 1.25' is not allowed"), (7, "action 7"), (-1, "action -1")])
@pytest.mark.parametrize("graph", ["by_policy", "by_planner"])
def test_a_graph_that_answers_what_is_forbidden_is_overridden(
    engine_of: Callable[..., DecisionEngine],
    planned: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    action: int,
    words: str,
) -> None:
    engine = engine_of(planned) if graph == "by_planner" else engine_of()
    deciders = engine._shop.deciders
    decide = getattr(deciders, graph)
    monkeypatch.setattr(deciders, graph, lambda *row: decide(*row)._replace(action=action))
    record = engine.decide(request())
    assert (record.reason, record.proposed, record.executed) == (Reason.OVERRIDDEN, action, HOLD)
    assert words in record.detail


def test_a_mistake_of_ours_is_hold_as_well(
    engine_of: Callable[..., DecisionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    monkeypatch.setattr("serving.engine.Draft", lambda *_: 1 // 0)
    record = engine.decide(request())
    assert (record.reason, record.executed) == (Reason.INTERNAL_ERROR, HOLD)
    assert "ZeroDivisionError" in record.detail


class Limits:
    def __init__(self) -> None:
        self.now = ExternalLimits(0, math.inf, False, "")

    def current(self, now: float) -> ExternalLimits:
        return self.now


def test_limits_of_another_system_hold_too_and_stale_ones_stop_trading(
    engine_of: Callable[..., DecisionEngine],
) -> None:
    limits = Limits()
    engine = engine_of(limits=limits)
    assert engine.decide(request("a")).action_masks[:4] == (True,) * 4
    limits.now = ExternalLimits(0, 0.25, False, "")
    assert engine.decide(request("b")).action_masks == (True, True, True, False, False, False, False)
    limits.now = ExternalLimits(1, math.inf, False, "")
    assert engine.decide(request("c", position=0.5)).action_masks == (True, True, True, True, False, False, False)
    limits.now = ExternalLimits(1, math.inf, True, "9 s old, at most 5 allowed")
    stale = engine.decide(request("d"))
    assert (stale.reason, stale.executed, stale.detail) == (Reason.STALE_LIMITS, HOLD, "9 s old, at most 5 allowed")
    limits.now = ExternalLimits(2, math.inf, False, "")
    assert engine.decide(request("e", position=0.5)).flatten
    assert engine.risk.name == "ACTIVE"


def test_another_bundle_comes_into_force_between_decisions(
    engine_of: Callable[..., DecisionEngine], bundle: Bundle, planned: Bundle
) -> None:
    engine = engine_of()
    assert engine.decide(request("a")).bundle_hash == bundle.hash
    engine.use(planned)
    assert engine.decide(request("b")).bundle_hash == planned.hash
    assert engine.bundle is planned


def test_an_observer_that_raises_is_logged(
    engine_of: Callable[..., DecisionEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of()
    engine.subscribe(lambda *_: 1 // 0)
    assert engine.decide(request()).reason is Reason.OK
    assert "observer" in caplog.text


FIRST = """
import sys, tempfile
from serving import open_bundle
from serving.engine import DecisionEngine
from serving.ledger.sqlite import SqliteLedger
from serving.records import decode_request
engine = DecisionEngine(open_bundle(sys.argv[1]), SqliteLedger(tempfile.mkdtemp() + "/ledger.db"))
request = decode_request(sys.argv[2].encode())
before = set(sys.modules)
engine.decide(request)
print(sorted(set(sys.modules) - before))
"""


def test_the_first_decision_waits_for_no_import(bundle: Bundle) -> None:
    asked = encode(request(bar_time=time.time() - 60.0)).decode()
    ended = subprocess.run(
        [sys.executable, "-c", FIRST, str(bundle.path), asked], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inference_ms": 0.0}, "inference_ms"),
        ({"inference_ms": 60.0}, "decision_ms"),
        ({"timeout_ms": math.inf}, "timeout_ms"),
        ({"bar_seconds": 0.0}, "bar_seconds"),
        ({"clock_tolerance_s": -1.0}, "clock_tolerance_s"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineSettings(**changes)


def test_requests_survive_their_json_and_refuse_what_is_unknown() -> None:
    asked = request(features={**FEATURES, "momentum": None}, action_masks=(True,) * 7)
    assert decode_request(encode(asked)) == asked
    with pytest.raises(msgspec.ValidationError, match="sentiment"):
        decode_request(encode(asked)[:-1] + b',"sentiment":1}')
