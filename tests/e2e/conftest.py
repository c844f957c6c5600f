from __future__ import annotations

import pytest
from smoke_runs import SmokeRun, smoke_run


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One complete smoke run, shared by the tests that only read it."""
    return smoke_run(tmp_path_factory.mktemp("first") / "var")
