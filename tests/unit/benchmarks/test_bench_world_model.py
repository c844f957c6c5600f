"""The comparison itself: every contender does the work it is timed for, and a peer that cannot run says why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peer_speed, world_model_speed
from benchmarks.world_model_speed import Peer, Timing, WorldModelReport, measure_world_model
from benchmarks.world_model_tasks import SMOKE, Shapes
from benchmarks.year_fit import YearReport, measure_year, synthetic_minutes
from configs.schema import WorldModelConfig


def report(**medians: float) -> WorldModelReport:
    """Keys are contender__task."""
    names = {"detent": "Detent", "plain": "plain torch", "floor": "matrix products", "peer": "a peer"}
    timings = []
    for key, seconds in medians.items():
        contender, task = key.split("__")
        timings.append(Timing.of(names[contender], task, [(2 * seconds, seconds)]))
    return WorldModelReport(
        shapes=Shapes(), timings=tuple(timings), absent={}, peer_versions={}, machine={}, versions={}
    )


@pytest.fixture
def toy_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A peer script of the same protocol, with one task that prints as peers do."""
    script = tmp_path / "toy.py"
    body = Path(peer_speed.__file__).read_text(encoding="utf-8")
    tasks = '{"epoch": lambda: print("tqdm and other noise"), "sample": lambda: print(shapes["rows"])}'
    body = body.replace(
        'if __name__ == "__main__":', f'PEERS["toy"] = (lambda shapes: {tasks}, ())\nif __name__ == "__main__":'
    )
    script.write_text(body, encoding="utf-8")
    monkeypatch.setattr(peer_speed, "__file__", str(script))
    monkeypatch.setitem(peer_speed.PEERS, "toy", (lambda shapes: {}, ()))
    return script


def test_every_contender_is_timed_at_every_task_and_threads_are_put_back() -> None:
    threads = torch.get_num_threads()
    rounds: list[tuple[int, int]] = []
    found = measure_world_model(SMOKE, repeats=2, progress=lambda done, total: rounds.append((done, total)))
    assert torch.get_num_threads() == threads
    assert rounds == [(0, 2), (1, 2), (2, 2)]
    assert {(one.contender, one.task) for one in found.timings} == {
        (name, task) for name in world_model_speed.CONTENDERS for task in world_model_speed.TASKS
    }
    for one in found.timings:
        assert one.repeats == 2
        assert 0.0 < one.lowest <= one.median <= one.highest
    json.dumps(found.to_dict(), allow_nan=False)


def test_ratios_and_missed_goals_by_hand() -> None:
    good = report(detent__epoch=0.8, plain__epoch=1.0, floor__epoch=0.5, peer__epoch=0.9)
    assert good.ratio("Detent", "epoch", "matrix products") == pytest.approx(1.6)
    assert good.ratio("Detent", "epoch", "nobody") is None
    assert good.missed == ()
    assert report(detent__epoch=0.9, plain__epoch=1.0).missed == ("epoch",)  # more than 1.6 of 1.86
    assert report(detent__epoch=0.8, plain__epoch=1.0, peer__epoch=0.7).missed == ("epoch",)  # a peer is ahead
    assert report(detent__epoch=0.8, plain__epoch=1.0, floor__epoch=0.5).missed == ()  # products are no peer
    written = good.to_dict()
    assert written["ratios"]["epoch"]["a peer"] == {
        "to_floor": pytest.approx(1.8),
        "detent_to_it": pytest.approx(8 / 9),
    }


def test_a_peer_that_is_not_installed_is_absent_with_the_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # -I: no PYTHONPATH, which may hold a checkout of it
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$@"\n')
    python.chmod(0o755)
    found = measure_world_model(SMOKE, repeats=1, peers=("OfflineRL-Kit",), peer_python=python)
    assert found.absent == {"OfflineRL-Kit": "ModuleNotFoundError: No module named 'offlinerlkit'"}
    assert found.peer_versions == {}
    assert {one.contender for one in found.timings} == set(world_model_speed.CONTENDERS)


def test_a_peer_answers_beside_what_it_prints(toy_peer: Path) -> None:
    found = measure_world_model(SMOKE, repeats=1, peers=("toy",))
    assert {(one.contender, one.task) for one in found.timings if one.contender == "toy"} == {
        ("toy", "epoch"),
        ("toy", "sample"),
    }
    assert found.absent == {}
    assert "python" in found.peer_versions["toy"]


def test_a_peer_that_dies_in_the_middle_is_an_error(toy_peer: Path) -> None:
    peer = Peer("toy", SMOKE, Path(sys.executable))
    with pytest.raises(RuntimeError, match="toy: expected an answer, the process ended with code 1"):
        peer.timed("imagine")()
    peer.close()


def test_unknown_peers_and_no_repeat_are_refused() -> None:
    with pytest.raises(ValueError, match=r"was \['dreamer'\]"):
        measure_world_model(SMOKE, peers=("dreamer",))
    with pytest.raises(ValueError, match=">= 1, was 0"):
        measure_world_model(SMOKE, repeats=0)


def test_minutes_are_reproducible_and_can_be_learned() -> None:
    table = synthetic_minutes(4001, seed=0)
    assert np.array_equal(table, synthetic_minutes(4001, seed=0))
    assert not np.array_equal(table, synthetic_minutes(4001, seed=1))
    assert np.isfinite(table).all()
    threads = torch.get_num_threads()
    found = measure_year(transitions=4000, config=WorldModelConfig(hidden=(16,), max_epochs=12, learning_rate=1e-2))
    assert torch.get_num_threads() == threads
    assert found.holdout_nll_gain > 0.05
    assert (found.transitions, found.threads) == (4000, 1)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match=">= 1000, was 999"):
        measure_year(transitions=999)


@pytest.mark.parametrize(("seconds", "peak", "kept"), [(300.0, 3.0, True), (301.0, 3.0, False), (1.0, 3.1, False)])
def test_a_year_is_judged_by_time_and_memory(seconds: float, peak: float, kept: bool) -> None:
    fields = dict.fromkeys(YearReport.__dataclass_fields__, 0) | {"seconds": seconds, "peak_gib": peak}
    assert YearReport(**fields).within_goals is kept
    assert asdict(YearReport(**fields))["peak_gib"] == peak
