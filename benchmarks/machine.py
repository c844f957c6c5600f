"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, str | int]:
    """Processor, logical cores usable by this process, operating system."""
    return {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}


def cpu_model() -> str:
    """Processor name as the kernel reports it."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name, Python first."""
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
