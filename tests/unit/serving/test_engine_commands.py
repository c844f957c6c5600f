"""Commands and a ledger that fails: no order is lost, and what is not recorded is not executed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any, get_args

import pytest
from serving_parts import Hands, decisions, request

from masking import HOLD
from serving import Bundle
from serving.canary import Canary
from serving.engine import DecisionEngine
from serving.errors import ControlError, LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import Command, ControlRecord, DecisionRecord, Mode, Reason


def test_commands_name_a_person_and_a_reason_and_are_recorded(engine_of: Callable[..., DecisionEngine]) -> None:
    engine = engine_of()
    for command in (engine.kill, engine.reduce_only, engine.reset):
        with pytest.raises(ControlError, match="person"):
            command("", "why")
    assert engine.risk.name == "ACTIVE"
    assert engine.reduce_only("Ada", "news").risk.name == "REDUCE_ONLY"
    assert not any(engine.decide(request("a", position=0.5)).action_masks[4:])
    assert engine.kill("Ada", "drill").risk.name == "HALTED"
    assert engine_of().risk.killed
    engine = engine_of()
    record = engine.reset("Grace", "drill is over")
    assert (record.risk.name, record.person, record.detail) == ("ACTIVE", "Grace", "drill is over")
    commands = [entry.record.command for entry in engine.ledger.read() if isinstance(entry.record, ControlRecord)]
    assert [name for name in commands if name != "start"] == ["reduce_only", "kill", "reset"]


def test_after_each_kind_of_entry_the_ledger_tells_the_risk_state_in_force(
    engine_of: Callable[..., DecisionEngine], bundle: Bundle, hands: Hands
) -> None:
    engine = engine_of(canary=Canary(capital_fraction=0.1, max_drawdown=0.03, max_failures=3))

    def decide(event: str, **changes: Any) -> DecisionRecord:
        hands.wall += 60.0
        return engine.decide(request(event, position=0.5, capital=1e5, bar_time=hands.wall - 1.0, **changes))

    def refuse() -> DecisionRecord:
        return engine.refuse("unreadable", b"{", "no JSON")

    steps: list[tuple[Callable[[], Any], list[str]]] = [
        (lambda: None, ["start"]),
        (lambda: decide("a", equity=1000.0), ["live"]),
        (lambda: decide("b", equity=999.0, features={}), ["live"]),
        (refuse, ["live"]),
        (lambda: engine.note("drift", "new prices"), ["drift"]),
        (lambda: engine.note("refused_bundle", "other columns"), ["refused_bundle"]),
        (lambda: engine.challenge(bundle), ["shadow"]),
        (lambda: decide("c", equity=998.0), ["live", "shadow decision"]),
        (lambda: engine.use(bundle), ["bundle"]),
        (lambda: engine.reduce_only("Ada", "news"), ["reduce_only"]),
        (lambda: engine.kill("Ada", "drill"), ["kill"]),
        (lambda: decide("d", equity=997.0), ["live", "shadow decision"]),
        (lambda: engine.reset("Ada", "drill is over"), ["reset"]),
        (lambda: decide("e", equity=900.0), ["live", "shadow decision", "canary_stop"]),
    ]
    seen, states = 0, []
    for step, kinds in steps:
        step()
        with closing(SqliteLedger(engine.ledger.path, read_only=True)) as reader:  # type: ignore[attr-defined]
            assert engine.ledger.head() == reader.head()
            assert reader.head().risk == engine.risk
            records = [entry.record for entry in reader.read(seen + 1)]
        assert [kind_of(record) for record in records] == kinds
        # A decision beside it changes nothing.
        assert all(record.risk == engine.risk for record in records)
        seen += len(records)
        states.append(engine.risk)
    told = {kind for _, kinds in steps for kind in kinds}
    assert told == {*get_args(Command), "live", "shadow decision"}
    assert len(set(states)) == 9
    assert engine_of().risk == states[-1]


def kind_of(record: DecisionRecord | ControlRecord) -> str:
    if isinstance(record, ControlRecord):
        return record.command
    return "shadow decision" if record.mode is Mode.SHADOW else "live"


def test_a_kill_switch_pulled_while_a_decision_is_made_stops_it(engine_of: Callable[..., DecisionEngine]) -> None:
    engine = engine_of()
    # An action that only an active account may take.
    masks = (False, False, True, True, False, False, False)
    assert engine.decide(request("before", action_masks=masks)).executed in (2, 3)
    infer, pulls = engine._policy_thread.call, []

    def pull(function: Callable[[], Any], timeout: float) -> Any:
        found = infer(function, timeout)
        pulls.append(threading.Thread(target=engine.kill, args=("Ada", "now")))
        pulls[0].start()
        while not engine._ordered:
            pass
        return found

    engine._policy_thread.call = pull  # type: ignore[method-assign]
    record = engine.decide(request("during", action_masks=masks))
    pulls[0].join()
    assert (record.reason, record.executed, record.trading_state) == (Reason.OVERRIDDEN, HOLD, 2)
    assert record.proposed in (2, 3)
    assert engine.risk.killed


def test_a_kill_that_waits_for_a_reset_is_not_forgotten_by_it(
    engine_of: Callable[..., DecisionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    append, kills = engine.ledger.append, []

    def order() -> None:
        with pytest.raises(LedgerError):
            engine.kill("Ada", "now")

    def slow(body: bytes, **event: Any) -> Any:
        if b'"reset"' in body:
            kills.append(threading.Thread(target=order))
            kills[0].start()
            while not engine._ordered:
                pass
        elif b'"kill"' in body:
            raise LedgerError("disk is full")
        return append(body, **event)

    monkeypatch.setattr(engine.ledger, "append", slow)
    engine.reset("Ada", "go on")
    kills[0].join()
    monkeypatch.undo()
    assert engine.decide(request()).trading_state == 2
    assert engine.risk.killed
    assert engine.ledger.head().risk == engine.risk


def test_what_could_not_be_written_is_written_at_the_end(
    engine_of: Callable[..., DecisionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    engine.decide(request("a", position=0.5))

    def full(*_: Any, **__: Any) -> Any:
        raise LedgerError("disk is full")

    monkeypatch.setattr(engine.ledger, "append", full)
    lost = engine.decide(request("b", equity=500.0, position=0.5))
    assert (lost.reason, lost.flatten) == (Reason.LEDGER_FAILED, False)
    # The loss was seen, and its kill switch holds although the equity is back.
    assert engine.risk.killed
    monkeypatch.undo()
    again = engine_of()
    assert again.risk.killed
    assert dict(engine.unrecorded) == {Reason.LEDGER_FAILED: 1}
    assert "drawdown 50.00% while the ledger failed" in [
        entry.record.detail for entry in again.ledger.read() if isinstance(entry.record, ControlRecord)
    ]


def test_what_is_not_recorded_is_not_executed_and_is_decided_again(
    engine_of: Callable[..., DecisionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    masks = (False, False, True, True, False, False, False)

    def full(*_: Any, **__: Any) -> Any:
        raise LedgerError("disk is full")

    monkeypatch.setattr(engine.ledger, "append", full)
    record = engine.decide(request(action_masks=masks))
    assert (record.reason, record.executed, record.target_position) == (Reason.LEDGER_FAILED, HOLD, None)
    with pytest.raises(LedgerError):
        engine.kill("Ada", "drill")
    assert engine.risk.killed
    with pytest.raises(LedgerError):
        engine.reset("Ada", "drill")
    assert engine.risk.killed
    monkeypatch.undo()
    # What the ledger says holds from here on, and the kill switch that it never heard of.
    assert not engine.ledger.head().risk.killed
    assert engine.decide(request("meanwhile")).trading_state == 2
    engine.reset("Ada", "drill")
    assert engine.decide(request(action_masks=masks)).executed in (2, 3)
    assert len(decisions(engine)) == 2
    kills = [entry.record for entry in engine.ledger.read() if getattr(entry.record, "command", "") == "kill"]
    assert [(one.person, one.detail, one.risk.killed) for one in kills] == [("Ada", "drill", True)]
    monkeypatch.setattr(engine.ledger, "find", full)
    assert engine.decide(request("other")).reason is Reason.LEDGER_FAILED
    assert engine.refuse("third", b"", "x").reason is Reason.LEDGER_FAILED
