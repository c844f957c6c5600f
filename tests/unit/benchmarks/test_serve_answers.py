"""The benchmark of serving: which answers count as wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from serve_worlds import ask, engine_of, served

from benchmarks.serve_answers import ROWS, Expected
from benchmarks.serve_calls import (
    Requests,
    decide_calls,
    engine_calls,
    infer_calls,
)
from serving import Bundle, open_bundle
from serving.records import DecisionRecord, Reason


@pytest.mark.parametrize("binary", [True, False])
def test_right_inferences_are_right_and_an_impostors_are_wrong(
    bundle: Bundle, impostor: Bundle, tmp_path: Path, binary: bool
) -> None:
    for served_one, folder in ((bundle, tmp_path / "right"), (impostor, tmp_path / "wrong")):
        folder.mkdir()
        with served(served_one, folder) as port:
            tally = ask(infer_calls(port, bundle, binary=binary))
        assert (tally.wrong > 0) == (served_one is impostor)
        assert (tally.failed, tally.held) == (0, 0)


def test_right_decisions_are_right_and_an_impostors_are_wrong(bundle: Bundle, impostor: Bundle, tmp_path: Path) -> None:
    for served_one, folder in ((bundle, tmp_path / "right"), (impostor, tmp_path / "wrong")):
        folder.mkdir()
        with served(served_one, folder) as port:
            tally = ask(decide_calls(port, bundle, "event"))
        assert (tally.wrong > 0) == (served_one is impostor)
        assert (tally.failed, tally.held) == (0, 0)
        (folder / "alone").mkdir()
        alone = ask(engine_calls(engine_of(served_one, folder / "alone"), "event"))
        assert not alone.broken


def test_answers_of_another_bundle_and_errors_are_told_apart(
    bundle: Bundle, variants: list[Path], tmp_path: Path
) -> None:
    with served(open_bundle(variants[1]), tmp_path) as port:
        assert ask(infer_calls(port, bundle), 10).wrong == 11
        assert ask(decide_calls(port, bundle, "event"), 10).wrong == 11
        missing = ask(infer_calls(port, bundle, "nobody"), 10)
    assert (missing.failed, missing.wrong) == (11, 0)
    assert "404" in missing.complaints[0]


@pytest.fixture(scope="module")
def decided(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Expected, int, DecisionRecord]:
    """A decision with several actions to choose from."""
    expected = Expected([bundle])
    engine = engine_of(bundle, tmp_path_factory.mktemp("decided"))
    requests = Requests(expected, "event")
    try:
        for _ in range(ROWS):
            row, request = requests.take()
            record = engine.decide(request)
            if sum(record.action_masks) > 2:
                return expected, row, record
    finally:
        engine.close()
    raise AssertionError("no row with a choice")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "right"),
        ({"reason": Reason.LEDGER_FAILED}, "failed"),
        ({"event_id": "another"}, "wrong"),
        ({"bundle_hash": "0" * 64}, "wrong"),
        ({"value": 0.123}, "wrong"),
        ({"executed": -1}, "wrong"),
        ({"action_masks": (True,)}, "wrong"),
        ({"state": b""}, "wrong"),
        ({"state": b"", "executed": 0, "reason": Reason.STALE_DATA}, "held"),
        ({"state": b"", "executed": 1, "reason": Reason.STALE_DATA}, "wrong"),
    ],
)
def test_whatever_of_a_decision_is_changed_is_noticed(
    decided: tuple[Expected, int, DecisionRecord], change: dict[str, Any], kind: str
) -> None:
    expected, row, record = decided
    changed = msgspec.structs.replace(record, **change)
    assert expected.judge_decision(row, record.event_id, changed).kind == kind


def test_a_decision_on_other_features_is_wrong(decided: tuple[Expected, int, DecisionRecord]) -> None:
    expected, row, record = decided
    found = expected.judge_decision((row + 1) % ROWS, record.event_id, record)
    assert found.kind == "wrong"
    assert "features of row" in found.detail
