"""What every test shares: one thread per library, reproducible property tests, a work directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from services import postgres_server, postgres_service, redis_server, redis_service  # noqa: F401

# BLAS and OpenMP read these once, when numpy or torch is first imported: no earlier than the first test module.
# One thread: sums keep their order, and parallel test processes do not fight over cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# No deadline: a first example may import torch or compile a graph, and a busy machine proves nothing.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")


@pytest.fixture(autouse=True)
def own_caches() -> Iterator[None]:
    """Commands move the caches and temporary files of their process, which is this one where a test calls them.

    What came after would inherit a folder deep enough for Chromium to refuse its socket there.
    """
    variables, folder = {name: os.environ.get(name) for name in CACHES}, tempfile.tempdir
    yield
    tempfile.tempdir = folder
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty work directory of one nightly run."""
    path = tmp_path / "var"
    path.mkdir()
    return path
