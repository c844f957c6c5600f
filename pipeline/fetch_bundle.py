"""Fetch a bundle from the registry, in a process of its own: MLflow costs seconds and 200 MB; serving pays neither.

`python -m pipeline.fetch_bundle models:/detent-policy@champion DIR` prints one JSON object: the directory, the hash
that the registry names, and the version; null where the alias points at nothing.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import ConfigError
from data.files import sha256_file
from pipeline.errors import ExitCode, exit_code_for
from serving.errors import BundleError, BundleFormatError
from serving.manifest import MANIFEST_FILE, Manifest
from serving.watch import BundleSource, Found

MODEL_URI = re.compile(r"models:/(?P<name>[^/:@']+)@(?P<alias>[^/:@']+)")
TIMEOUT_S = 300.0
FOLDER = "served"
"""Below the work directory: every bundle that was fetched, by its hash."""

_FAILURES: dict[int, type[Exception]] = {
    ExitCode.BAD_DATA: BundleError,
    ExitCode.BAD_CONFIG: ConfigError,
    ExitCode.UNAVAILABLE: ConnectionError,
}


def registry_source(uri: str, workdir: Path, tracking_uri: str | None) -> BundleSource:
    """A bundle of the registry by alias, fetched anew whenever the alias has moved.

    A registry in an SQLite file is asked again once the file has changed, a server at every look.

    Args: uri: `models:/NAME@ALIAS`; workdir: holds the database where `tracking_uri` is None, and what is fetched.
    Returns: raises BundleError for a bundle that is damaged in the registry, ConfigError for a setting that is wrong,
        ConnectionError or TimeoutError while the registry is away.
    Raises: ConfigError for another form of URI.
    """
    _parsed(uri)
    command = [sys.executable, "-m", "pipeline.fetch_bundle", uri, str(workdir), tracking_uri or ""]

    database = _database(workdir, tracking_uri)
    known: tuple[object, Found | None] | None = None

    def source() -> Found | None:
        nonlocal known
        # Asking costs seconds of a core that decides as well.
        content = None if database is None else _state(database)
        if known is None or content is None or known[0] != content:
            known = content, ask()
        return known[1]

    def ask() -> Found | None:
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{uri}: expected an answer of the registry within {TIMEOUT_S:g} s, was none") from error
        if ended.returncode:
            words = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise _FAILURES.get(ended.returncode, OSError)(f"{uri}: {words[0]}")
        found = json.loads(ended.stdout.splitlines()[-1])
        return None if found is None else Found(Path(found["path"]), found["bundle_hash"])

    return source


def fetch(uri: str, workdir: Path, tracking_uri: str | None) -> dict[str, Any] | None:
    """Copy the version that an alias names below `workdir`, unless it is there whole; None without such an alias.

    Raises: BundleError for a version without a hash, or whose files are not those of its hash; as `Tracker` else.
    """
    from pipeline.tracking import Tracker

    match = _parsed(uri)
    tracker = Tracker(tracking_uri, "detent-nightly", workdir, match["name"])
    version = tracker.version(match["alias"])
    if version is None:
        return None
    bundle_hash = version.tags.get("bundle_hash")
    if not bundle_hash:
        raise BundleError(f"version {version.version}: expected a tag bundle_hash, was none")
    destination = workdir / FOLDER / bundle_hash
    with _alone(destination.parent):
        if not _is_whole(destination, bundle_hash):
            # Renamed when it is whole: a process that was killed leaves nothing that looks like a bundle.
            partial = destination.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            path = tracker.fetch_bundle(version.version, partial)
            if not _is_whole(path, bundle_hash):
                raise BundleError(f"version {version.version}: expected the files of bundle {bundle_hash}, was others")
            shutil.rmtree(destination, ignore_errors=True)
            path.rename(destination)
            shutil.rmtree(partial, ignore_errors=True)
    return {"path": str(destination), "bundle_hash": bundle_hash, "version": version.version}


def main(arguments: Sequence[str]) -> int:
    """Fetch and say what was found; what is wrong ends in one line and an exit code."""
    uri, workdir, tracking_uri = arguments
    try:
        found = fetch(uri, Path(workdir), tracking_uri or None)
    except Exception as error:
        code = exit_code_for(error)
        if code is ExitCode.BUG:
            raise
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return code
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _database(workdir: Path, tracking_uri: str | None) -> Path | None:
    if not tracking_uri:
        return workdir / "mlflow.db"
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


# Of the file and of its write-ahead log, where it has one; None where it cannot be told.
def _state(database: Path) -> object:
    found = []
    for file in (database, database.with_name(f"{database.name}-wal")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        except OSError:
            return None
        found.append((file, status.st_ino, status.st_size, status.st_mtime_ns))
    return found or None


def _parsed(uri: str) -> re.Match[str]:
    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise ConfigError(f"bundle: expected a directory or models:/NAME@ALIAS, was {uri!r}")
    return match


# Bytes alone: whether a bundle can be used, of another format too, is for its reader to find out, who knows the rules.
def _is_whole(folder: Path, bundle_hash: str) -> bool:
    try:
        manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes())
        hashes = {name: sha256_file(folder / name) for name in manifest.files}
    except BundleFormatError:
        return True
    except (OSError, BundleError):
        return False
    return manifest.bundle_hash == bundle_hash and hashes == {
        name: entry.sha256 for name, entry in manifest.files.items()
    }


# One process at a time; the kernel ends the lock with the process, however that ends.
@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
