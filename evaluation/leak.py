"""Markets that tell a learner too much, or nothing: what a sound pipeline must make of both.

With tomorrow's return among the features a policy must become nearly perfect, or it cannot learn. With the signals
torn from the returns they announce it must be worth no more than one that never saw them, or something leaks.
Letters: P markets, T rows, M columns.
"""

from __future__ import annotations

import math

import numpy as np

from data import Field
from envs.panel import FeaturePanel

TOMORROW = Field("tomorrow_return", "signals", "log return", -math.inf, math.inf, "Return of the next bar: a leak")
"""The column `with_tomorrow` adds."""

PREDICTIVE = ("signal", "signal_5", "signal_20")
"""The columns `shuffled_market` shifts."""

MIN_ROWS = 4
"""A quarter of a path is at least one row."""


def with_tomorrow(panel: FeaturePanel) -> FeaturePanel:
    """The panel with one more column, `tomorrow_return`: gap plus intraday return of row t+1, 0 in the last row.

    Raises: ValueError if a return column is missing, or the leak is already there.
    """
    gap, intraday = (panel.values[:, :, _column(panel, name)] for name in ("gap_return", "intraday_return"))
    tomorrow = np.zeros((*panel.values.shape[:2], 1))
    tomorrow[:, :-1, 0] = gap[:, 1:] + intraday[:, 1:]
    return panel.widened((TOMORROW,), tomorrow)


def shuffled_market(panel: FeaturePanel, seed: int) -> FeaturePanel:
    """The panel with the `PREDICTIVE` columns of each market shifted in time, in a circle.

    The offset is drawn per market, between a quarter and three quarters of the path, and is the same for the three
    columns: their law, their autocorrelation (but at the seam) and their relation to each other stay, and so does
    everything else; only what they say about the next return is gone. Past returns and volatility still tell of the
    regime, and of the signal that moved them, so the yardstick is the same learner without these columns, not zero.

    Raises: ValueError if a column is missing, or on fewer than `MIN_ROWS` rows.
    """
    columns = [_column(panel, name) for name in PREDICTIVE]
    paths, length = panel.values.shape[:2]
    if length < MIN_ROWS:
        raise ValueError(f"panel: expected at least {MIN_ROWS} rows, was {length}")
    quarter = math.ceil(length / 4)
    offsets = np.random.default_rng(seed).integers(quarter, length - quarter, size=paths, endpoint=True)
    # Row t takes what stood `offset` rows before it.
    source = (np.arange(length) - offsets[:, None]) % length
    values = panel.values.copy()
    values[:, :, columns] = np.take_along_axis(panel.values[:, :, columns], source[:, :, None], axis=1)
    return FeaturePanel(panel.timestamps, panel.fields, values)


def without_signal(panel: FeaturePanel) -> FeaturePanel:
    """The panel with its `PREDICTIVE` columns at zero: what is left when nobody hears the signal.

    Raises: ValueError if a column is missing.
    """
    values = panel.values.copy()
    values[:, :, [_column(panel, name) for name in PREDICTIVE]] = 0.0
    return FeaturePanel(panel.timestamps, panel.fields, values)


def _column(panel: FeaturePanel, name: str) -> int:
    if name not in panel.names:
        raise ValueError(f"panel: expected a column {name!r}, was {', '.join(panel.names)}")
    return panel.names.index(name)
