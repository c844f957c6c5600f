"""A canary: its capital is limited, and its trial ends by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_parts import DAY, START, Hands, request

from masking import HOLD
from serving import Bundle
from serving.canary import Canary
from serving.deciders import redecide
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, Reason
from serving.settings import EngineSettings

PATIENT = {"inference_ms": 60_000.0, "decision_ms": 60_000.0, "timeout_ms": 60_000.0}


@pytest.fixture
def engine(tmp_path: Path, bundle: Bundle, hands: Hands) -> Iterator[DecisionEngine]:
    made = engine_on(tmp_path, bundle, hands)
    yield made
    made.close()


def engine_on(folder: Path, bundle: Bundle, hands: Hands) -> DecisionEngine:
    settings = EngineSettings(canary=Canary(capital_fraction=0.1, max_drawdown=0.03, max_failures=3), **PATIENT)
    return DecisionEngine(bundle, SqliteLedger(folder / "ledger.db", fsync="never"), settings, clock=hands.clock())


def stops(engine: DecisionEngine) -> list[str]:
    records = [entry.record for entry in engine.ledger.read()]
    return [one.detail for one in records if isinstance(one, ControlRecord) and one.command == "canary_stop"]


@pytest.mark.parametrize(
    ("capital", "largest"), [(100_000.0, 1.25), (5_000.0, 0.5), (2_500.0, 0.25), (1_000.0, 0.0), (-5.0, 0.0)]
)
def test_no_position_beyond_its_share_of_the_capital(engine: DecisionEngine, capital: float, largest: float) -> None:
    record = engine.decide(request(equity=1_000.0, position=0.3, capital=capital))
    assert record.caller_masks == (True, *(factor <= largest for factor in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)))
    assert record.action_masks[record.executed]
    assert record.target_position is None or record.target_position <= largest
    assert not [
        wanted for wanted, asked in zip(record.action_masks, record.caller_masks, strict=True) if wanted > asked
    ]


@pytest.mark.parametrize("capital", [None, math.nan, math.inf])
def test_without_the_capital_it_holds(engine: DecisionEngine, capital: float | None) -> None:
    record = engine.decide(request(capital=capital))
    assert (record.reason, record.executed) == (Reason.NON_FINITE, HOLD)
    assert "account.capital" in record.detail


def test_a_drawdown_ends_the_trial_with_the_decision_that_sees_it(
    engine: DecisionEngine, bundle: Bundle, hands: Hands, tmp_path: Path
) -> None:
    for number, equity in enumerate((1_000.0, 1_100.0, 1_068.0)):
        assert not engine.decide(at(hands, number, equity)).flatten
    assert not stops(engine)
    last = engine.decide(at(hands, 3, 1_066.0))
    assert (last.reason, last.flatten, last.trading_state) == (Reason.HALTED, True, 2)
    assert redecide(bundle, last).action_masks == last.action_masks
    assert stops(engine) == ["drawdown 3.09% reached 3.00%"]
    engine.decide(at(hands, 4, 1_200.0))
    assert len(stops(engine)) == 1
    engine.close()
    again = engine_on(tmp_path, bundle, hands)
    assert again.decide(at(hands, 5, 1_200.0)).flatten
    again.reset("Ada", "another trial")
    assert not again.decide(at(hands, 6, 1_200.0)).flatten
    again.close()


def test_failures_end_it_also_across_a_restart(
    engine: DecisionEngine, bundle: Bundle, hands: Hands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_next(of: DecisionEngine, number: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(of._shop.deciders, "by_policy", lambda *_: 1 // 0)
            return of.decide(at(hands, number, 1_000.0))

    fail_next(engine, 0)
    engine.decide(at(hands, 1, 1_000.0))
    fail_next(engine, 2)
    assert (engine.risk.failures, engine.risk.killed) == (2, False)
    engine.close()
    again = engine_on(tmp_path, bundle, hands)
    last = fail_next(again, 3)
    assert (last.reason, last.flatten, last.trading_state) == (Reason.INFERENCE_FAILED, True, 2)
    assert redecide(bundle, last).action_masks == last.action_masks
    assert stops(again) == ["3 decisions failed, at most 2 may"]
    again.reset("Ada", "mended")
    assert again.risk.failures == 0
    again.close()


def test_it_is_over_also_where_nobody_can_write_why(
    engine: DecisionEngine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.decide(at(hands, 0, 1_000.0))
    append: Callable[..., Any] = engine.ledger.append

    def only_decisions(body: bytes, *, event_id: str | None = None) -> Any:
        if event_id is None:
            raise LedgerError("disk is full")
        return append(body, event_id=event_id)

    monkeypatch.setattr(engine.ledger, "append", only_decisions)
    assert engine.decide(at(hands, 1, 900.0)).flatten
    assert engine.risk.killed
    monkeypatch.undo()
    assert engine.decide(at(hands, 2, 1_000.0)).flatten


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capital_fraction": 0.0}, "capital_fraction: expected more than 0 and less than 1, was 0"),
        ({"capital_fraction": 1.0}, "capital_fraction"),
        ({"max_drawdown": math.nan}, "max_drawdown"),
        ({"max_failures": 0}, "max_failures: expected at least 1, was 0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Canary(**{"capital_fraction": 0.1, **changes})


def at(hands: Hands, day: int, equity: float) -> Any:
    hands.wall = START + day * DAY
    return request(
        f"day {day}", bar_time=hands.wall - 60.0, equity=equity, position=0.25, holding_time=10.0, capital=100_000.0
    )
