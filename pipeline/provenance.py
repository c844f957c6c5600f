"""What a run was made from: code, data, config, library versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

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


def run_key(config_hash: str, data_hash: str) -> str:
    """Name of what a run computes: equal key, equal bundle."""
    parts = {
        "code": code_hash(),
        "commit": git_commit(),
        "config": config_hash,
        "data": data_hash,
        "libraries": library_versions(),
    }
    return sha256_bytes(canonical_json(parts).encode())
