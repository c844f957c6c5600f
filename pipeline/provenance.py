"""What a run was made from: code, data, config, library versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs import ConfigError
from data.files import canonical_json, sha256_bytes, sha256_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "benchmarks",
    "configs",
    "data",
    "envs",
    "evaluation",
    "export",
    "masking",
    "mbpo",
    "pipeline",
    "planner",
    "serving",
    "world_model",
)
LIBRARIES = ("numpy", "torch", "stable-baselines3", "sb3-contrib", "onnx", "onnxscript", "onnxruntime", "mlflow")


def code_hash() -> str:
    """SHA-256 over the source files of every package: equal hash, equal code, with or without a git checkout."""
    files = sorted(
        path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".yaml")
    )
    return sha256_bytes(canonical_json([[str(path.relative_to(ROOT)), sha256_file(path)] for path in files]).encode())


def git_commit() -> str:
    """Commit of the checkout the code runs from, or `unknown` for an installed wheel."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def rule_sources(rules: Iterable[Any], modules: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of the source behind rules of the user's own, by module name.

    Args: rules: of the set in force; the modules of their classes and of the classes they inherit from count.
        modules: imported by name; a package stands for every `.py` file below it.
    What these modules import in turn is not looked at. Raises: ConfigError for a module without source files.
    """
    homes = {cls.__module__ for rule in rules for cls in type(rule).__mro__}
    foreign = {home for home in homes if home.partition(".")[0] not in (*PACKAGES, *sys.stdlib_module_names)}
    return {name: _source_hash(name) for name in sorted({*foreign, *modules})}


def _source_hash(module_name: str) -> str:
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    listed = [(str(path.relative_to(folder)), path) for folder in folders for path in folder.rglob("*.py")]
    if file and not folders:
        listed = [(Path(file).name, Path(file))]
    if not listed:
        raise ConfigError(
            f"limits.rule_modules: expected modules with source files, was {module_name!r}, which has none; "
            f"write the rules in a file of their own"
        )
    try:
        hashes = sorted((name, sha256_file(path)) for name, path in listed)
    except OSError as error:
        raise ConfigError(f"limits.rule_modules: expected readable source of {module_name!r}, was: {error}") from error
    return sha256_bytes(canonical_json(hashes).encode())


def run_key(config_hash: str, data_hash: str, rule_sources: Mapping[str, str], warm_start: str | None = None) -> str:
    """Name of what a run computes: equal key, equal bundle.

    Args: rule_sources: as `rule_sources` returns them; warm_start: hash of the world model the fit begins with.
    """
    parts = {
        "code": code_hash(),
        "rule_sources": dict(rule_sources),
        "commit": git_commit(),
        "config": config_hash,
        "data": data_hash,
        "libraries": library_versions(),
    }
    if warm_start is not None:
        parts["warm_start"] = warm_start
    return sha256_bytes(canonical_json(parts).encode())
