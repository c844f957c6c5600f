"""Portfolios of three assets with eleven trades each, shared by the tests of joint limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from masking import JointLimits, TradeTable

TABLE = TradeTable(buy_cost=(0.03, 0.045, 0.035), sell_cost=(0.025, 0.035, 0.03))
LIMITS = JointLimits(table=TABLE, max_share=(1.0, 2 / 3, 1 / 3))
HALF_INVESTED = replace(LIMITS, max_gross=0.5)
HOLD = TABLE.hold


def states(batch: int, seed: int) -> np.ndarray:
    """Portfolios of every kind: poor and rich, empty and full, float32 as an environment shows them."""
    rng = np.random.default_rng(seed)
    cash = rng.choice([1.0, 50.0, 400.0, 1000.0, 3000.0], batch) * rng.random(batch)
    units = rng.integers(0, 8, (batch, 3)) * 10.0
    prices = rng.normal((44.0, 36.0, 50.0), (4.0, 2.0, 7.0), (batch, 3))
    return np.concatenate((cash[:, None], units, prices), axis=1).astype(np.float32)
