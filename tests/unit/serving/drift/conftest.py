"""A reference of features without memory longer than a window."""

from __future__ import annotations

import numpy as np
import pytest
from drift_parts import FAST, fitted

from serving.drift.monitor import DriftReference


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return fitted(np.random.default_rng(1), 2000, FAST)
