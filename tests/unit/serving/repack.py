"""Bundles that are consistent byte for byte but wrong in one respect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data import canonical_json, sha256_bytes


def repack(
    source: Path,
    target: Path,
    files: Mapping[str, bytes | None] | None = None,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Copy a bundle, replace files (None removes one), change manifest entries, and make every hash right again."""
    shutil.copytree(source, target)
    raw = json.loads((target / "manifest.json").read_text())
    for name, data in (files or {}).items():
        if data is None:
            (target / name).unlink()
            del raw["files"][name]
            continue
        (target / name).write_bytes(data)
        raw["files"][name] = {"sha256": sha256_bytes(data), "size": len(data)}
    if change is not None:
        change(raw)
    del raw["bundle_hash"]
    raw["bundle_hash"] = sha256_bytes(canonical_json(raw).encode())
    (target / "manifest.json").write_text(json.dumps(raw, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    return target


def without_drift(source: Path, target: Path) -> Path:
    """Copy a bundle without what drift is watched with."""
    golden = json.loads((source / "golden.json").read_text())
    del golden["nll"]
    files = {"drift.json": None, "likelihood.onnx": None, "golden.json": canonical_json(golden).encode()}
    return repack(source, target, files, lambda raw: raw.update(drift=False))
