"""A model on disk: `weights.safetensors` and `model.json`, written as one folder, verified before use, no pickle.

`model.json` holds the SHA-256 of the weights and one of its own content, so a changed byte in either is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from data.files import atomic_directory, atomic_write_bytes, atomic_write_json, canonical_json, sha256_bytes
from world_model.errors import ModelFileError

FORMAT = 1
WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_FILE = "model.json"


def write_model(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> str:
    """Write tensors and description to a new folder; nothing appears if the write fails.

    Returns: SHA-256 of description and weights together, 64 hex digits.
    Raises: FileExistsError if the folder exists; ValueError if the description is not finite JSON; OSError.
    """
    blob = tensors_to_bytes({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    content = {**description, "format": FORMAT, "weights_sha256": sha256_bytes(blob)}
    digest = sha256_bytes(canonical_json(content).encode())
    with atomic_directory(directory) as folder:
        atomic_write_bytes(folder / WEIGHTS_FILE, blob)
        atomic_write_json(folder / DESCRIPTION_FILE, {**content, "sha256": digest})
    return digest


def read_model(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify what `write_model` wrote.

    Returns: tensors by name, description.
    Raises: ModelFileError if a file is missing, changed, or of another format.
    """
    folder = Path(directory)
    content, _ = _description(folder)
    blob = _read(folder / WEIGHTS_FILE)
    _compare(folder / WEIGHTS_FILE, content.get("weights_sha256"), blob)
    try:
        return tensors_from_bytes(blob), content
    except SafetensorError as error:
        raise ModelFileError(f"{folder / WEIGHTS_FILE}: expected safetensors ({error})") from error


def model_hash(directory: str | os.PathLike[str]) -> str:
    """SHA-256 of description and weights together, as `write_model` gave it. Raises: ModelFileError."""
    return _description(Path(directory))[1]


# Content without its hash, and the hash.
def _description(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / DESCRIPTION_FILE
    text = _read(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ModelFileError(f"{path}: expected JSON, was damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        was = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ModelFileError(f"{path}: format: expected {FORMAT}, was {was!r}")
    digest = content.pop("sha256", None)
    _compare(path, digest, canonical_json(content).encode())
    return content, str(digest)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ModelFileError(f"{path}: expected a file, found none") from error


def _compare(path: Path, expected: object, data: bytes) -> None:
    actual = sha256_bytes(data)
    if actual != expected:
        raise ModelFileError(f"{path}: sha256: expected {expected}, was {actual}; the file was changed")
