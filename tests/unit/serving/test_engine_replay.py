"""Challengers in shadow, records decided again bit for bit, and whatever may be asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundle_parts import make_dynamics, make_policy, write
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_parts import DAY, FEATURES, START, Hands, assert_again, decisions, request

from masking import HOLD
from serving import Bundle, PolicyOutputs, open_bundle
from serving.deciders import redecide
from serving.engine import DecisionEngine
from serving.ledger.sqlite import SqliteLedger
from serving.records import Mode, Reason, Source
from serving.settings import EngineSettings


def test_a_challenger_decides_in_shadow_on_the_same_state_and_cannot_disturb(
    engine_of: Callable[..., DecisionEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_bundle(write(tmp_path / "other", policy=make_policy(make_dynamics(), seed=9)).path)
    engine, told = engine_of(), []
    engine.challenge(other)
    engine.subscribe(lambda record, shadow: told.append((record, shadow)))
    close = (False, True, *[False] * 5)
    live = [
        engine.decide(request(str(number), position=0.5, action_masks=close if number % 2 else None))
        for number in range(20)
    ]
    shadows = [record for record in decisions(engine) if record.mode is Mode.SHADOW]
    assert [shadow.event_id for shadow in shadows] == [record.event_id for record in live]
    assert {shadow.bundle_hash for shadow in shadows} == {other.hash}
    assert all(shadow.state == record.state for shadow, record in zip(shadows, live, strict=True))
    same = sum(shadow.executed == record.executed for shadow, record in zip(shadows, live, strict=True))
    assert engine.agreement == (same, 20)
    assert 10 <= same < 20
    assert told == [*zip(live, shadows, strict=True)]
    for shadow in shadows:
        assert_again(other, shadow)
    assert engine._challenger is not None
    monkeypatch.setattr(engine._challenger, "by_policy", lambda *_: 1 // 0)
    assert engine.decide(request("on")).reason is Reason.OK
    engine.challenge(None)
    assert engine.challenger is None


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["probabilities", "value"])
def test_an_answer_that_is_not_finite_holds_and_its_records_can_be_read(
    engine_of: Callable[..., DecisionEngine],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    number: float,
) -> None:
    run_policy = Bundle.run_policy

    def answer(self: Bundle, state: Any, masks: Any) -> PolicyOutputs:
        found = run_policy(self, state, masks)
        return found._replace(**{output: np.full_like(getattr(found, output), number)})

    engine = engine_of()
    engine.challenge(bundle)
    monkeypatch.setattr(Bundle, "run_policy", answer)
    record = engine.decide(request("live"))
    live, shadow = decisions(engine)
    assert (record.reason, record.executed) == (Reason.NON_FINITE, HOLD)
    assert engine.ledger.head().risk == engine.risk
    for found in (live, shadow):
        assert (found.reason, found.probabilities, found.value) == (Reason.NON_FINITE, (), None)
        assert_again(bundle, found)


def test_a_challenger_that_hangs_delays_nobody(
    engine_of: Callable[..., DecisionEngine], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = engine_of(timeout_ms=60_000.0), threading.Event()
    engine.challenge(bundle)
    assert engine._challenger is not None
    call = engine._shadow_thread.call
    monkeypatch.setattr(engine._shadow_thread, "call", lambda function, _: call(function, 0.01))
    monkeypatch.setattr(engine._challenger, "by_policy", lambda *_: gate.wait(60.0))
    assert [engine.decide(request(name)).reason for name in ("a", "b")] == [Reason.OK] * 2
    assert engine.agreement == (0, 0)
    gate.set()


def test_every_record_with_a_state_is_decided_again_bit_for_bit(
    engine_of: Callable[..., DecisionEngine], planned: Bundle, hands: Hands
) -> None:
    rng = np.random.default_rng(0)
    engine = engine_of(planned)
    for number in range(150):
        hands.wall += DAY / 2
        features = {name: float(value) for name, value in zip(FEATURES, rng.normal(0.0, 0.2, 4), strict=True)}
        if number % 10 == 0:
            features["momentum"] = None  # type: ignore[assignment]
        masks = tuple((rng.random(7) < 0.7).tolist()) if number % 3 == 0 else None
        changes = {"features": features, "action_masks": masks, "bar_time": hands.wall - DAY * 5 * (number % 17 == 0)}
        account = {
            "equity": 1000.0 - number,
            "position": float(rng.uniform(-1.25, 1.25)),
            "holding_time": float(number % 7),
        }
        engine.decide(request(str(number), **changes, **account))
        if number == 100:
            engine.reset("Ada", "test")
    records = [record for record in decisions(engine) if record.state]
    assert len(records) > 100
    assert {record.source for record in records} >= {Source.PLANNER, Source.HOLD}
    for record in records:
        assert_again(planned, record)
    with pytest.raises(ValueError, match="expected a state row"):
        redecide(planned, msgspec.structs.replace(records[0], state=b""))
    with pytest.raises(ValueError, match="bundle: expected"):
        redecide(planned, msgspec.structs.replace(records[0], bundle_hash="0" * 64))


NUMBERS = st.none() | st.floats() | st.floats(-2.0, 2.0)


@settings(max_examples=300)
@given(
    features=st.fixed_dictionaries(dict.fromkeys(FEATURES, NUMBERS)),
    equity=NUMBERS | st.floats(500.0, 1500.0),
    position=NUMBERS,
    holding=NUMBERS,
    bar=st.floats(START - 9 * DAY, START + 100.0) | st.floats(),
    masks=st.none() | st.tuples(*[st.booleans()] * 7),
)
def test_whatever_is_asked_nothing_forbidden_is_executed(
    fuzzed: DecisionEngine, features: Any, equity: Any, position: Any, holding: Any, bar: float, masks: Any
) -> None:
    number = len(fuzzed._known)
    if number % 5 == 0:
        fuzzed.reset("test", "test")
    asked = request(
        f"{number} {bar}", features=features, equity=equity, position=position, holding_time=holding, bar_time=bar,
        action_masks=masks,
    )  # fmt: skip
    record = fuzzed.decide(asked)
    assert record.reason is not Reason.INTERNAL_ERROR
    assert record.action_masks[record.executed]
    if record.executed != HOLD:
        assert masks is None or masks[record.executed]
        state = np.frombuffer(record.state, dtype="<f4")[None, :]
        assert make_dynamics().action_masks(state)[0, record.executed]
        assert record.reason is Reason.OK
    assert not record.flatten or record.executed == HOLD
    assert fuzzed.ledger.head().risk == fuzzed.risk


@pytest.fixture(scope="module")
def fuzzed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionEngine]:
    ledger = SqliteLedger(tmp_path_factory.mktemp("fuzz") / "ledger.db", fsync="never")
    budgets = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)
    engine = DecisionEngine(bundle, ledger, budgets, clock=Hands().clock())
    yield engine
    engine.close()
