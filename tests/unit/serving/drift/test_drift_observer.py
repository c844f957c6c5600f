"""Drift, live: what the watch makes of the decisions of a real engine, and that it never stands in their way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundle_parts import FIELDS, make_drift, usual_rows
from repack import repack, without_drift
from serving_parts import START, Hands, request

from serving import Bundle, open_bundle
from serving.drift import observer
from serving.drift.monitor import DriftLevel, DriftMonitor, DriftStatus
from serving.drift.observer import DriftWatch
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, DecisionRecord, Reason, encode
from serving.settings import EngineSettings

DAY = 86_400.0
WINDOW = 12
JUMP = np.float32(10.0) * np.array([0.001, 0.001, 0.02, 0.01], dtype=np.float32)
"""Ten standard deviations of the usual rows."""


def features(row: np.ndarray) -> dict[str, float | None]:
    return {field.name: float(value) for field, value in zip(FIELDS, row, strict=True)}


class Service:
    """An engine with a watch, which can be restarted on its ledger."""

    def __init__(self, bundle: Bundle, path: Path) -> None:
        self.bundle, self.path, self.hands, self.count = bundle, path, Hands(), 0
        self.opened: list[Any] = []
        self.start()

    def start(self, bundle: Bundle | None = None, **changes: Any) -> None:
        self.stop()
        self.bundle = bundle or self.bundle
        ledger = SqliteLedger(self.path, fsync="never")
        budgets: dict[str, Any] = dict.fromkeys(("inference_ms", "decision_ms", "timeout_ms"), 60000.0)
        self.watch = DriftWatch(self.bundle, **changes)
        self.watch.refill(ledger)
        self.engine = DecisionEngine(self.bundle, ledger, EngineSettings(**budgets), clock=self.hands.clock())
        self.watch.attach(self.engine)
        self.opened = [self.watch, self.engine]

    def stop(self) -> None:
        for part in self.opened:
            part.close()

    def decide(self, row: np.ndarray, *, days: float = 1.0) -> DecisionRecord:
        self.hands.wall += days * DAY
        self.count += 1
        return self.engine.decide(
            request(f"event {self.count}", bar_time=self.hands.wall - 60.0, features=features(row))
        )

    def live(self, rows: np.ndarray) -> DriftStatus | None:
        """Decide on bars, one a day."""
        for row in rows:
            self.decide(row)
        self.watch.flush()
        return self.watch.status()

    def controls(self, *commands: str) -> list[ControlRecord]:
        records = [entry.record for entry in self.engine.ledger.read()]
        return [one for one in records if isinstance(one, ControlRecord) and one.command in commands]


@pytest.fixture
def service(bundle: Bundle, tmp_path: Path) -> Iterator[Service]:
    made = Service(bundle, tmp_path / "ledger.db")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def other(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the same layout, trained where the jump is usual; its window is longer."""
    raw = make_drift(window=15).to_dict()
    raw["edges"] = (np.array(raw["edges"], dtype=np.float32) + JUMP[:, None]).tolist()
    folder = tmp_path_factory.mktemp("other") / "bundle"
    return open_bundle(repack(bundle_path, folder, {"drift.json": json.dumps(raw).encode()}))


@pytest.fixture(scope="module")
def unwatched(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(without_drift(bundle_path, tmp_path_factory.mktemp("unwatched") / "bundle"))


def by_hand(bundle: Bundle, rows: np.ndarray, unknown: tuple[int, ...] = (0,)) -> DriftStatus:
    """What a monitor says of consecutive bars; those at `unknown` have no likelihood."""
    assert bundle.drift is not None
    monitor = DriftMonitor(bundle.drift)
    for index, row in enumerate(rows):
        nll = None if index in unknown else float(bundle.run_likelihood(rows[index - 1 : index], row[None])[0])
        monitor.observe(row, nll, bar_time=float(index))
    return monitor.status()


def test_live_bars_are_judged_as_the_monitor_does_with_the_likelihood_of_each_after_the_one_before(
    service: Service,
) -> None:
    rows = usual_rows(30, seed=5)
    early = service.live(rows[: WINDOW - 1])
    assert early is not None
    assert (early.bars, early.nll_mean) == (WINDOW - 1, None)
    status = service.live(rows[WINDOW - 1 :])
    assert status == by_hand(service.bundle, rows)
    assert status.level is DriftLevel.OK
    assert status.nll_mean is not None
    assert service.controls("drift", "reduce_only") == []


def test_a_bar_counts_once_by_its_first_row_however_often_it_is_decided_on(service: Service) -> None:
    rows = usual_rows(20, seed=5)
    for row in rows:
        service.decide(row)
        # Another event on the same bar, and one that cannot be read.
        service.decide(row + JUMP, days=0.0)
        service.engine.refuse(f"bad {service.count}", b"{", "truncated")
    service.watch.flush()
    assert service.watch.status() == by_hand(service.bundle, rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bar_that_is_not_finite_is_left_out_and_the_next_has_no_likelihood(service: Service, value: float) -> None:
    rows = usual_rows(20, seed=5)
    broken = rows[0].copy()
    broken[2] = value
    service.live(rows[:10])
    assert service.decide(broken).reason is Reason.NON_FINITE
    service.live(rows[10:])
    assert service.watch.status() == by_hand(service.bundle, rows, unknown=(0, 10))


def test_a_bar_that_is_sent_again_without_its_nan_counts(service: Service) -> None:
    rows = usual_rows(20, seed=5)
    service.live(rows[:10])
    service.decide(np.full(4, np.nan, dtype=np.float32))
    service.decide(rows[10], days=0.0)
    service.live(rows[11:])
    assert service.watch.status() == by_hand(service.bundle, rows)


def test_after_a_gap_there_is_no_likelihood(service: Service) -> None:
    service.start(longest_gap=4 * DAY)
    rows = usual_rows(20, seed=5)
    service.live(rows[:10])
    service.decide(rows[10], days=4.0)
    service.decide(rows[11], days=5.0)
    status = service.live(rows[12:])
    assert status == by_hand(service.bundle, rows, unknown=(0, 11))
    assert status != by_hand(service.bundle, rows)


# --- what an alarm leads to -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduces", [False, True])
def test_a_rising_level_is_noted_and_an_alarm_moves_to_reduce_only_where_that_is_wanted(
    service: Service, reduces: bool
) -> None:
    service.start(reduce_only_on_alarm=reduces)
    service.live(usual_rows(WINDOW, seed=5))
    status = service.live(usual_rows(WINDOW, seed=6) + JUMP)
    assert status is not None
    assert status.level is DriftLevel.ALARM
    notes = service.controls("drift")
    assert [note.person for note in notes] == ["detent"] * len(notes)
    # At most a warning before it, and nothing while it lasts.
    levels = [note.detail.split()[0] for note in notes]
    assert levels in (["alarm"], ["warning", "alarm"])
    assert service.engine.risk.name == ("REDUCE_ONLY" if reduces else "ACTIVE")
    orders = service.controls("reduce_only")
    assert [(one.person, one.detail) for one in orders] == ([("detent", f"drift: {notes[-1].detail}")] * reduces)


def test_a_reset_holds_until_there_is_a_new_alarm(service: Service) -> None:
    service.start(reduce_only_on_alarm=True)
    service.live(np.concatenate((usual_rows(WINDOW, seed=5), usual_rows(WINDOW, seed=6) + JUMP)))
    assert service.engine.risk.name == "REDUCE_ONLY"
    service.engine.reset("Ada", "known")
    service.live(usual_rows(WINDOW, seed=7) + JUMP)
    # Nor does a restart know better than a person.
    service.start(reduce_only_on_alarm=True)
    status = service.live(usual_rows(WINDOW, seed=8) + JUMP)
    assert status is not None
    assert status.level is DriftLevel.ALARM
    assert service.engine.risk.name == "ACTIVE"
    assert len(service.controls("reduce_only")) == 1
    assert service.live(usual_rows(3 * WINDOW, seed=5)).level is DriftLevel.OK  # type: ignore[union-attr]
    service.live(usual_rows(WINDOW, seed=6) + JUMP)
    assert service.engine.risk.name == "REDUCE_ONLY"
    assert len(service.controls("reduce_only")) == 2
    # That it is over is no news.
    assert {note.detail.split()[0] for note in service.controls("drift")} <= {"warning", "alarm"}


def test_no_decision_waits_for_the_watch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    run = Bundle.run_likelihood
    monkeypatch.setattr(Bundle, "run_likelihood", lambda *args: gate.wait(60.0) and run(*args))
    rows = usual_rows(20, seed=5)
    for row in rows:
        service.decide(row)
    # The second bar is still being looked at.
    assert not gate.is_set()
    assert service.watch.status().bars <= 1  # type: ignore[union-attr]
    gate.set()
    service.watch.flush()
    assert service.watch.status() == by_hand(service.bundle, rows)


def test_closing_takes_in_what_is_left_and_may_be_done_twice(service: Service) -> None:
    service.start(reduce_only_on_alarm=True)
    for row in np.concatenate((usual_rows(WINDOW, seed=5), usual_rows(WINDOW, seed=6) + JUMP)):
        service.decide(row)
    service.watch.close()
    service.watch.close()
    assert service.engine.risk.name == "REDUCE_ONLY"


def test_a_failure_is_logged_and_the_next_bars_are_watched(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise LedgerError("disk is full")

    monkeypatch.setattr(service.engine, "note", full)
    service.live(np.concatenate((usual_rows(WINDOW, seed=5), usual_rows(WINDOW, seed=6) + JUMP)))
    assert "disk is full" in caplog.text
    monkeypatch.undo()
    assert service.live(usual_rows(3 * WINDOW, seed=5)).level is DriftLevel.OK  # type: ignore[union-attr]
    service.live(usual_rows(WINDOW, seed=6) + JUMP)
    assert service.controls("drift")


# --- after a restart --------------------------------------------------------------------------------------


def restarted(service: Service) -> DriftStatus | None:
    before = len(list(service.engine.ledger.read()))
    service.start()
    service.watch.flush()
    # Nothing but the start.
    assert len(list(service.engine.ledger.read())) == before + 1
    return service.watch.status()


def test_an_alarm_that_a_crash_kept_from_being_noted_is_noted_after_it_and_only_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.concatenate((usual_rows(WINDOW, seed=5), usual_rows(WINDOW, seed=6) + JUMP))
    service.start(reduce_only_on_alarm=True)
    monkeypatch.setattr(DriftWatch, "_speak_up", lambda _: None)
    alarmed = next(index for index, row in enumerate(rows) if service.live(row[None]).level is DriftLevel.ALARM)  # type: ignore[union-attr]
    assert alarmed >= WINDOW
    service.stop()
    monkeypatch.undo()
    for _ in range(2):
        service.start(reduce_only_on_alarm=True)
        service.watch.flush()
        assert [len(service.controls(command)) for command in ("reduce_only", "drift")] == [1, 1]
        assert service.engine.risk.name == "REDUCE_ONLY"
    service.engine.reset("Ada", "known")
    service.decide(rows[alarmed], days=0.0)
    service.start(reduce_only_on_alarm=True)
    service.watch.flush()
    assert service.engine.risk.name == "ACTIVE"


@pytest.mark.parametrize(("bars", "page"), [(1, 500), (WINDOW, 1), (WINDOW + 1, 7), (WINDOW + 2, 500), (40, 7)])
def test_a_restart_makes_no_difference(service: Service, monkeypatch: pytest.MonkeyPatch, bars: int, page: int) -> None:
    monkeypatch.setattr(observer, "PAGE", page)
    rows = usual_rows(bars + 5, seed=5)
    rows[bars // 2 :: 9, 1] = np.nan
    rows[bars // 3 :] += JUMP
    for row in rows[:bars]:
        service.decide(row)
        service.decide(row - JUMP, days=0.0)
        service.engine.refuse(f"bad {service.count}", b"{", "truncated")
    service.watch.flush()
    through = service.watch.status()
    assert restarted(service) == through
    level = service.watch._level
    assert level is through.level  # type: ignore[union-attr]
    after = service.live(rows[bars:])
    assert after is not None
    assert restarted(service) == after


def test_decisions_in_shadow_and_on_another_layout_and_entries_that_are_no_record_are_no_bars(
    service: Service,
) -> None:
    rows = usual_rows(20, seed=5)
    service.engine.challenge(service.bundle)
    through = service.live(rows)
    record = service.decide(rows[0])
    service.watch.flush()
    foreign = msgspec.structs.replace(record, event_id="foreign", state=record.state[4:], bar_time=START + 90 * DAY)
    service.engine.ledger.append(b"{}")
    service.engine.ledger.append(encode(foreign))
    assert through == by_hand(service.bundle, rows)
    assert restarted(service) == by_hand(service.bundle, np.concatenate((rows, rows[:1])))


@pytest.mark.parametrize("page", [1, 3, 7, 500])
def test_a_ledger_is_read_backwards_without_gaps(service: Service, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    service.live(usual_rows(10, seed=5))
    monkeypatch.setattr(observer, "PAGE", page)
    entries = list(service.engine.ledger.read())
    assert len(entries) == 11
    assert list(observer._backwards(service.engine.ledger)) == entries[::-1]


def test_no_more_of_a_ledger_is_read_than_is_allowed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.live(usual_rows(20, seed=5))
    monkeypatch.setattr(observer, "MAX_ENTRIES", 6)
    monkeypatch.setattr(observer, "PAGE", 3)
    assert restarted(service).bars == 6  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="before `attach`"):
        service.watch.refill(service.engine.ledger)


# --- another bundle ---------------------------------------------------------------------------------------


def test_another_bundle_judges_the_same_bars_anew(service: Service, other: Bundle) -> None:
    rows = usual_rows(40, seed=5) + JUMP
    alarmed = service.live(rows[:20])
    assert alarmed is not None
    assert alarmed.level is DriftLevel.ALARM
    service.engine.use(other)
    service.watch.flush()
    assert service.watch.status() == by_hand(other, rows[:20])
    assert service.watch.status().level is DriftLevel.OK  # type: ignore[union-attr]
    assert service.live(rows[20:]) == by_hand(other, rows)
    notes = len(service.controls("drift"))
    # The old one is as alarmed as it was, and that is new.
    service.engine.use(service.bundle)
    service.watch.flush()
    assert service.watch.status() == by_hand(service.bundle, rows)
    assert len(service.controls("drift")) == notes + 1


def test_a_bundle_without_drift_is_not_watched_and_the_next_one_gets_the_bars(
    service: Service, bundle: Bundle, unwatched: Bundle
) -> None:
    rows = usual_rows(30, seed=5)
    service.start(unwatched)
    assert service.live(rows[:10]) is None
    service.engine.use(bundle)
    service.watch.flush()
    assert service.live(rows[10:20]) == by_hand(bundle, rows[:20])
    service.engine.use(unwatched)
    assert service.live(rows[20:]) is None
    service.start(unwatched)
    service.engine.use(bundle)
    service.watch.flush()
    assert service.watch.status() == by_hand(bundle, rows)


def test_rows_of_another_layout_are_forgotten(service: Service, bundle_path: Path, tmp_path: Path) -> None:
    service.live(usual_rows(20, seed=5))
    other = open_bundle(bundle_path)
    object.__setattr__(other.manifest, "feature_fields", other.manifest.feature_fields[::-1])
    service.engine.use(other)
    service.watch.flush()
    assert service.watch.status().bars == 0  # type: ignore[union-attr]
