from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import files
from mbpo import Checkpoint, CheckpointError

STATE: dict[str, Any] = {
    "weights": {"layer.weight": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(7.0)},
    "rows": np.array([3, 1], np.int64),
    "flags": np.array([True, False]),
    "key": np.arange(4, dtype=np.uint32),
    "rng": {"bit_generator": "PCG64", "state": {"state": 2**127 + 1, "inc": 3}},
    "history": [{"step": 1.0, "score": 0.1}],
    "empty": {},
    "gauss": None,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    kept = Checkpoint(tmp_path / "policy_training.safetensors", "ours")
    kept.write(STATE)
    return kept


def test_a_tree_comes_back_with_its_types_shapes_and_values(checkpoint: Checkpoint) -> None:
    read = checkpoint.read()
    assert read is not None
    np.testing.assert_array_equal(read["weights"]["layer.weight"], [[0, 3], [1, 4], [2, 5]])
    assert read["weights"]["step"].shape == ()
    for name in ("rows", "flags", "key"):
        assert read[name].dtype == STATE[name].dtype
        np.testing.assert_array_equal(read[name], STATE[name])
        assert read[name].flags.writeable
    assert {name: read[name] for name in ("rng", "history", "empty", "gauss")} == {
        name: STATE[name] for name in ("rng", "history", "empty", "gauss")
    }


def test_a_file_that_does_not_exist_is_no_checkpoint(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "none", "ours")
    assert kept.read() is None
    kept.remove()


def test_a_changed_byte_is_found_wherever_it_is(checkpoint: Checkpoint) -> None:
    data = checkpoint.path.read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        checkpoint.path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="policy_training"):
            checkpoint.read()


def test_a_file_that_was_cut_off_is_damaged(checkpoint: Checkpoint) -> None:
    data = checkpoint.path.read_bytes()
    for length in (0, 5, len(data) - 1):
        checkpoint.path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.read()


def test_the_checkpoint_of_another_training_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="key: expected 'theirs', was 'ours'; it is of another training"):
        Checkpoint(checkpoint.path, "theirs").read()


def test_a_write_that_fails_leaves_the_old_checkpoint(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(STATE | {"rows": np.array([9])})
    monkeypatch.undo()
    read = checkpoint.read()
    assert read is not None
    np.testing.assert_array_equal(read["rows"], STATE["rows"])
    assert [path.name for path in checkpoint.path.parent.iterdir()] == [checkpoint.path.name]
