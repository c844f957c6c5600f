"""Runs of the console command as a process of its own, outside the checkout and away from the user's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SmokeRun:
    workdir: Path
    returncode: int
    result: dict[str, Any]
    stderr: str


def isolated_environment(folder: Path) -> dict[str, str]:
    """Home and temporary files in folders that must stay empty; not CI, where libraries keep quiet on their own."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    for name in ("HOME", "TMPDIR"):
        path = folder / name.lower()
        path.mkdir(exist_ok=True)
        environment[name] = str(path)
    for name in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    return environment


def detent(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    environment = isolated_environment(cwd)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=400)


def smoke_run(workdir: Path, *extra: str) -> SmokeRun:
    done = detent("retrain", "--profile", "smoke", "--workdir", workdir, "--json", *extra, cwd=workdir.parent)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    return SmokeRun(workdir, done.returncode, json.loads(lines[0]), done.stderr)
