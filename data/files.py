"""Files that are either the old ones or the new ones, and hashes of what is in them.

A write goes to a temporary sibling, is flushed to disk, and is renamed into place. A full disk, a missing
permission or a kill at any point leaves the old destination intact; the temporary is removed unless the
process was killed. Temporaries start with ``TEMP_PREFIX``, so a reader can tell them from finished files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMP_PREFIX = ".tmp-"


def canonical_json(obj: Any) -> str:
    """Return the one JSON text of `obj`: sorted keys, no spaces. Raises ValueError on NaN or infinity."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Replace `path` by `data` as a whole; parent folders are created.

    Raises: OSError (full disk, permission, ...) with the old file intact and no temporary left behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_sibling(target)
    try:
        # Plain open, not tempfile: mkstemp's 0600 would hide the file from a service run by another user.
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, target)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    _fsync_path(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` in UTF-8 as a whole; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Replace `path` by `obj` as indented JSON with sorted keys. Raises ValueError on NaN or infinity."""
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    Every file in it is flushed to disk before the rename; parent folders of `path` are created.

    Raises: FileExistsError if `path` exists, at the start or by the end. Any error of the block or of the
    file system propagates, with nothing at `path` and the temporary folder removed.
    """
    target = Path(path)
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_sibling(target)
    temp.mkdir()
    try:
        yield temp
        for folder, _, files in os.walk(temp):
            for name in files:
                _fsync_path(Path(folder, name))
            _fsync_path(Path(folder))
        # rename(2) would silently replace an empty folder that appeared in the meantime.
        _refuse_existing(target)
        os.rename(temp, target)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    _fsync_path(target.parent)


# A sibling, because a rename is atomic only inside one file system. Not derived from the target's name,
# which may already be as long as the file system allows.
def _temp_sibling(target: Path) -> Path:
    return target.parent / f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: expected no such path yet, but it exists")


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
