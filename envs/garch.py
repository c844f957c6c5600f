"""The synthetic market with GARCH-t returns in place of its regimes: heavy tails and clusters nobody trained for.

Shapes: P paths, T bars.
"""

from __future__ import annotations

import math

import numpy as np
from arch.univariate import GARCH, StudentsT

from configs.evaluation import GarchConfig, SyntheticMarketConfig
from envs.synthetic import WARMUP, SyntheticPanel, assemble_market, check_size, observe_market


def simulate_garch_panel(
    market: SyntheticMarketConfig, garch: GarchConfig, *, paths: int, bars: int, seed: int
) -> SyntheticPanel:
    """Simulate P = `paths` panels of T = `bars` rows, as `envs.synthetic.simulate_panel` does.

    Returns follow GARCH(1,1) (Bollerslev 1986) with Student-t innovations; signal, spread, volume and the split at the
    open are those of `market` in regime 0, which every bar reports. There are no jumps: the innovations' tails take
    their place, and `annual_volatility` stays the unconditional one.

    Raises: ValueError on paths < 1 or bars < 60.
    """
    check_size(paths, bars)
    total_bars = bars + WARMUP
    generator = np.random.default_rng(seed)
    (shocks,) = generator.spawn(1)
    # Variance 1 in the long run; the scale follows below.
    parameters = np.array((1.0 - garch.alpha - garch.beta, garch.alpha, garch.beta))
    innovations = StudentsT(seed=shocks).simulate(np.array((garch.degrees_of_freedom,)))
    process = GARCH(p=1, q=1)
    series = [process.simulate(parameters, total_bars, innovations) for _ in range(paths)]
    unit_returns, unit_variances = np.moveaxis(np.array(series), 1, 0)
    scale = garch.annual_volatility / math.sqrt(market.bars_per_year)
    simulated = assemble_market(
        market,
        generator,
        regime=np.zeros((paths, total_bars), dtype=np.int8),
        drift=np.full((paths, total_bars), garch.drift),
        scale=scale * np.sqrt(unit_variances),
        diffusion=scale * unit_returns,
        jump=np.zeros((paths, total_bars)),
    )
    return observe_market(simulated, market)
