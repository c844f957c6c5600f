"""A training that was interrupted goes on from its last validation and ends in the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume_worlds
import torch
from resume_worlds import ENDLESS, SMALL, Weights, train

from mbpo import Checkpoint, CheckpointError, TorchPolicy

KINDS = ("mbpo", "model_free")


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {kind: train(kind) for kind in KINDS}


def same(first: Weights, second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupt(kind: str, path: Path, at: int, **options: Any) -> None:
    def progress(done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(kind, path, progress=progress, **options)
    # Whatever else the next process did with the global generators.
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [100, 272, 768])
def test_an_interrupted_training_ends_in_the_same_weights(
    kind: str, at: int, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    expected, weights = undisturbed[kind]
    path = tmp_path / "training"
    interrupt(kind, path, at)
    assert path.exists() == (at > 128)
    trained, seen = train(kind, path)
    # Only what lay behind the last validation is computed again.
    last = 0 if at <= 128 else max(step for step in weights if step < at)
    assert list(seen) == [step for step in weights if step > last]
    assert all(same(weights[step], seen[step]) for step in seen)
    assert trained.history == expected.history
    assert (trained.best_step, trained.best_score) == (expected.best_step, expected.best_score)
    assert same(expected.policy.network.state_dict(), trained.policy.network.state_dict())


def test_a_training_may_be_interrupted_again_and_again(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    path = tmp_path / "training"
    for at in (150, 420, 640):
        interrupt("mbpo", path, at)
    trained, seen = train("mbpo", path)
    assert same(undisturbed["mbpo"][1][768], seen[768])
    assert trained.history == undisturbed["mbpo"][0].history


def test_a_killed_process_is_continued_by_the_next(tmp_path: Path) -> None:
    path, after = tmp_path / "training", int(np.random.default_rng().integers(2, 6))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, resume_worlds.__file__, "mbpo", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(after):
            reached = int(process.stdout.readline())
        process.kill()
    resumed: dict[int, Weights] = {}
    expected: dict[int, Weights] = {}
    interrupt("mbpo", path, reached + 257, config=ENDLESS, seen=resumed)
    interrupt("mbpo", tmp_path / "other", reached + 257, config=ENDLESS, seen=expected)
    # Killed after the line of a validation: its checkpoint or the one before is there.
    assert reached <= min(resumed) <= reached + 128 * 2
    assert min(expected) == 128
    assert max(resumed) == reached + 256
    assert all(same(expected[step], weights) for step, weights in resumed.items())


def test_early_stopping_ends_at_the_same_snapshot_after_an_interruption(tmp_path: Path) -> None:
    patient = SMALL.model_copy(update={"early_stopping": 2})
    settings: dict[str, Any] = {"config": patient, "score": lambda steps: -abs(steps - 256)}
    expected, _ = train("mbpo", **settings)
    assert (expected.best_step, expected.steps) == (256, 512)
    path = tmp_path / "training"
    interrupt("mbpo", path, 500, **settings)
    trained, seen = train("mbpo", path, **settings)
    assert list(seen) == [512]
    assert (trained.steps, trained.history) == (expected.steps, expected.history)
    assert same(expected.policy.network.state_dict(), trained.policy.network.state_dict())
    # Nothing was kept beyond the stop: whoever starts again stops again.
    again, _ = train("mbpo", path, **settings)
    assert again.steps == 512


def test_what_was_logged_before_is_logged_again_in_the_run_that_goes_on(tmp_path: Path) -> None:
    path, logged = tmp_path / "training", []
    interrupt("mbpo", path, 400)
    trained, _ = train("mbpo", path, log=lambda metrics, step: logged.append((step, dict(metrics))))
    assert [step for step, _ in logged] == [entry["step"] for entry in trained.history]
    assert "steps_per_second" not in logged[0][1]
    assert logged[-1][1]["steps_per_second"] > 0
    assert all("steps_per_second" not in entry for entry in trained.history)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"total_steps": 769}])
def test_the_checkpoint_of_other_settings_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "training"
    interrupt("model_free", path, 400)
    with pytest.raises(CheckpointError, match="of another training"):
        train("model_free", path, SMALL.model_copy(update=change))


def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "training"
    interrupt("model_free", path, 400)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        train("model_free", path)
    assert path.exists()


def test_a_training_that_diverges_names_its_last_good_state(tmp_path: Path) -> None:
    path = tmp_path / "training"

    def progress(done: int, total: int) -> None:
        if done > 400:
            with torch.no_grad():
                spoiled.action_net.weight.fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        real = TorchPolicy.__init__

        def remember(self: TorchPolicy, name: str, network: Any, scaler: Any) -> None:
            nonlocal spoiled
            spoiled = network
            real(self, name, network, scaler)

        spoiled: Any = None
        patch.setattr(TorchPolicy, "__init__", remember)
        with pytest.raises(
            FloatingPointError, match=r"action_net.weight is not after 4\d\d; the last good state, after 384 steps"
        ) as raised:
            train("mbpo", path, progress=progress)
    assert str(path) in str(raised.value)
    key = Checkpoint(path, "").path.read_bytes()
    # It is whole: without the fault, training goes on from it.
    trained, seen = train("mbpo", path)
    assert next(iter(seen)) == 512
    assert path.read_bytes() != key
    assert np.isfinite(trained.best_score)
