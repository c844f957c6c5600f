"""A training in progress on disk: one safetensors file, verified before use, no pickle.

What is kept is a tree: dictionaries whose leaves are arrays, tensors or JSON values. Arrays become tensors of the file;
the rest is one JSON text in its header, beside the key of the training and the SHA-256 of everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.files import atomic_write_bytes, canonical_json, sha256_bytes

FORMAT = 1
_SEPARATOR = "/"


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another format, or of another training."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a training in progress is kept, and what it is a training of."""

    path: Path
    """The file; it need not exist."""
    key: str
    """Names everything that determines the training and is not an argument of it: config, data, code."""

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file by `state` as a whole. Raises: OSError with the old file intact."""
        arrays, values = {}, {}
        for name, leaf in _leaves(state, ()):
            if isinstance(leaf, np.ndarray | torch.Tensor):
                arrays[name] = np.array(leaf.numpy(force=True) if isinstance(leaf, torch.Tensor) else leaf, order="C")
            else:
                values[name] = leaf
        content = canonical_json({"format": FORMAT, "key": self.key, "values": values})
        header = {"content": content, "sha256": _digest(arrays, content)}
        atomic_write_bytes(self.path, save(arrays, metadata=header))

    def read(self) -> dict[str, Any] | None:
        """What `write` was given, arrays for tensors; None where there is no file.

        Raises: CheckpointError naming what is damaged or different.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                header = file.metadata() or {}
                # Copies: what the library hands out may be read-only memory of the file.
                arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: expected a checkpoint, was damaged ({error})") from error
        content = header.get("content", "")
        actual = _digest(arrays, content)
        if actual != header.get("sha256"):
            raise CheckpointError(
                f"{self.path}: sha256: expected {header.get('sha256')}, was {actual}; the file was changed"
            )
        described = json.loads(content)
        for name, expected in (("format", FORMAT), ("key", self.key)):
            if described[name] != expected:
                raise CheckpointError(
                    f"{self.path}: {name}: expected {expected!r}, was {described[name]!r}; it is of another training"
                )
        return _tree(described["values"] | arrays)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _leaves(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, child in node.items():
        here = (*path, str(name))
        if isinstance(child, Mapping) and child:
            yield from _leaves(child, here)
        else:
            yield _SEPARATOR.join(here), child


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(_SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _digest(arrays: Mapping[str, np.ndarray], content: str) -> str:
    return sha256_bytes(save(dict(arrays)) + content.encode())
