"""What every test shares: one thread per library, reproducible property tests, a work directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# BLAS and OpenMP read these once, when numpy or torch is first imported: no earlier than the first test module.
# One thread: sums keep their order, and parallel test processes do not fight over cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# No deadline: a first example may import torch or compile a graph, and a busy machine proves nothing.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty work directory of one nightly run."""
    path = tmp_path / "var"
    path.mkdir()
    return path
