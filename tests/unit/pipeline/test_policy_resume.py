"""A policy stage that was interrupted goes on in the run directory and leaves what an undisturbed one leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, load_config
from data import DataError
from pipeline import training
from pipeline.inputs import RunInputs, load_inputs
from pipeline.training import model_free_stage

TRAINING = "model_free_training.safetensors"


@pytest.fixture(scope="module")
def inputs() -> RunInputs:
    small = ("total_steps=1536", "n_steps=32", "batch_size=256", "validations=3")
    return load_inputs(load_config("smoke", [f"model_free.{setting}" for setting in small]))


def interrupt(inputs: RunInputs, run_dir: Path) -> None:
    def progress(done: int, total: int, note: str = "") -> None:
        if done > 1200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_free_stage(inputs, run_dir, progress=progress)


def test_a_stage_goes_on_where_it_was_interrupted(inputs: RunInputs, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model_free_stage(inputs, whole)
    interrupt(inputs, parts)
    assert [path.name for path in parts.iterdir()] == [TRAINING]
    notes: list[tuple[int, str]] = []
    model_free_stage(inputs, parts, progress=lambda done, total, note: notes.append((done, note)))
    assert notes[0][0] > 1024
    assert notes[0][1].startswith("best validation reward")
    assert sorted(path.name for path in parts.iterdir()) == ["model_free.json", "model_free.safetensors"]
    for path in whole.iterdir():
        assert (parts / path.name).read_bytes() == path.read_bytes()
    assert len(json.loads((parts / "model_free.json").read_text())["history"]) == 3


def test_a_finished_stage_removes_what_a_kill_left_of_its_training(inputs: RunInputs, tmp_path: Path) -> None:
    model_free_stage(inputs, tmp_path)
    (tmp_path / TRAINING).write_bytes(b"whatever it was")
    model_free_stage(inputs, tmp_path)
    assert not (tmp_path / TRAINING).exists()


def test_a_damaged_checkpoint_is_bad_data_and_says_what_to_do(inputs: RunInputs, tmp_path: Path) -> None:
    (tmp_path / TRAINING).write_bytes(b"nothing of use")
    with pytest.raises(DataError, match=f"{TRAINING}: expected a checkpoint, was damaged .*--force"):
        model_free_stage(inputs, tmp_path)


def test_the_training_of_other_data_is_not_continued(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(inputs, tmp_path)
    monkeypatch.setattr(type(inputs), "run_key", "another")
    with pytest.raises(DataError, match="of another training"):
        model_free_stage(inputs, tmp_path)


def test_a_training_that_diverges_asks_for_a_smaller_learning_rate(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **options: Any) -> None:
        raise FloatingPointError("model_free: expected finite weights; the last good state is in here")

    monkeypatch.setattr(training, "train_policy", diverge)
    with pytest.raises(ConfigError, match="last good state is in here; a smaller learning_rate may help"):
        model_free_stage(inputs, tmp_path)
