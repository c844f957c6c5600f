"""Three hundred corruptions of a bundle: each is refused before onnxruntime is given a byte, and the old one serves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serving import Bundle, BundleError, open_bundle
from serving.engine import DecisionEngine
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord
from serving.watch import BundleWatcher, directory_source

CORRUPTIONS = 300
PAGE = 4096


def flip_a_bit(data: bytearray, rng: np.random.Generator) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[rng.integers(len(data)) :]


def append(data: bytearray, rng: np.random.Generator) -> None:
    data += rng.bytes(int(rng.integers(1, 100)))


def zero_a_page(data: bytearray, rng: np.random.Generator) -> None:
    first = int(rng.integers(len(data))) // PAGE * PAGE
    page = data[first : first + PAGE]
    data[first : first + len(page)] = bytes(len(page))


def swap_ranges(data: bytearray, rng: np.random.Generator) -> None:
    size = int(rng.integers(1, 1 + min(64, len(data) // 2)))
    first, second = (int(start) for start in rng.integers(len(data) // 2 - size + 1, size=2))
    second += len(data) // 2
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


KINDS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    flip_a_bit,
    truncate,
    append,
    zero_a_page,
    swap_ranges,
)


def corrupted(
    original: bytes, kind: Callable[[bytearray, np.random.Generator], None], rng: np.random.Generator
) -> bytes:
    """Another file, for sure: ranges that are swapped may be equal."""
    while True:
        data = bytearray(original)
        kind(data, rng)
        if data != original:
            return bytes(data)


def test_every_corruption_is_refused_unseen_by_onnxruntime_and_the_old_bundle_serves(
    bundle: Bundle, planned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(planned.path, tmp_path / "copy"))
    files = sorted(copy.iterdir())
    originals = {path: path.read_bytes() for path in files}
    assert {"planner.onnx", "manifest.json"} <= {path.name for path in files}
    given: list[Any] = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **more: (given.append(args), session(*args, **more))[1]
    )
    rng = np.random.default_rng(7)
    accepted = []
    with closing(DecisionEngine(bundle, SqliteLedger(tmp_path / "ledger.db", fsync="never"))) as engine:
        watcher = BundleWatcher(engine, directory_source(copy), None, interval=60.0)
        for number in range(CORRUPTIONS):
            path, kind = files[number % len(files)], KINDS[number // len(files) % len(KINDS)]
            path.write_bytes(corrupted(originals[path], kind, rng))
            # However coarse the clock of the file system is.
            os.utime(path, ns=(number, number))
            try:
                open_bundle(copy)
                accepted.append((number, path.name, kind.__name__))
            except BundleError:
                pass
            watcher.look()
            assert engine.bundle is bundle, (number, path.name, kind.__name__)
            path.write_bytes(originals[path])
        assert (accepted, given) == ([], [])
        records = [entry.record for entry in engine.ledger.read()]
        refused = [one for one in records if isinstance(one, ControlRecord) and one.command == "refused_bundle"]
        assert len(refused) == CORRUPTIONS
        # Each for the file that was corrupted.
        assert all(
            one.detail.startswith(f"{copy}: {files[number % len(files)].name}: ") for number, one in enumerate(refused)
        )
        # Whole, the bundle comes into force.
        watcher.look()
        assert engine.bundle.hash == planned.hash
        assert given
