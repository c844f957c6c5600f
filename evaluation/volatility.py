"""What the next return's density is without a world model: constant Gaussian, RiskMetrics, GARCH(1,1) with Student-t.

The yardsticks of a market model. Each is fitted to training returns and then run forward: the density of a bar uses the
bars before it, parameters stay as they were fitted. Not imported by `evaluation`, since arch is slow to load.

Letters: N training bars, T test bars.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from arch import arch_model
from arch.utility.exceptions import ConvergenceWarning
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

EWMA_DECAY = 0.94
"""Of RiskMetrics for daily data (J.P. Morgan/Reuters, RiskMetrics Technical Document, 4th ed. 1996, sec. 5.3)."""
MIN_BARS = 100
"""Fewer training bars do not identify a GARCH."""

# arch asks for percent: its optimiser is scaled for numbers near 1.
PERCENT = 100.0


def constant_log_density(training: Floats, between: Floats, test: Floats) -> Floats:
    """Gaussian with mean and standard deviation of the training returns: log density [T] of each test bar.

    Args: training [N]; between: bars that follow it and belong to neither window; test [T]; log returns in time order.
    """
    _check(training, between, test)
    result: Floats = stats.norm.logpdf(test, training.mean(), training.std())
    return result


def ewma_log_density(training: Floats, between: Floats, test: Floats) -> Floats:
    """Gaussian with mean 0 whose variance is RiskMetrics' average `0.94 v + 0.06 r^2`; see `constant_log_density`.

    The average starts at the training variance.
    """
    _check(training, between, test)
    history = np.concatenate((training, between, test))
    variance = np.empty(len(history))
    variance[0] = training.var()
    for bar in range(1, len(history)):
        variance[bar] = EWMA_DECAY * variance[bar - 1] + (1.0 - EWMA_DECAY) * history[bar - 1] ** 2
    result: Floats = stats.norm.logpdf(test, 0.0, np.sqrt(variance[-len(test) :]))
    return result


def garch_log_density(training: Floats, between: Floats, test: Floats, *, asymmetric: bool = False) -> Floats:
    """GARCH(1,1) with constant mean and Student-t innovations (Bollerslev 1987); see `constant_log_density`.

    Fitted by arch to the training returns alone, then filtered through the bars between and the test bars.

    Args: asymmetric: a fall raises variance more than a rise (Glosten, Jagannathan and Runkle 1993).
    Raises: RuntimeError if the likelihood has no maximum that arch finds.
    """
    _check(training, between, test)
    history = PERCENT * np.concatenate((training, between, test))
    model = arch_model(history, mean="Constant", vol="GARCH", p=1, o=int(asymmetric), q=1, dist="t", rescale=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = model.fit(last_obs=len(training), disp="off")
    if fitted.convergence_flag != 0:
        raise RuntimeError(
            f"garch: expected a fit that converges on {len(training)} bars, was flag {fitted.convergence_flag}"
        )
    mean, dof = float(fitted.params["mu"]), float(fitted.params["nu"])
    deviation = np.asarray(model.fix(fitted.params.to_numpy()).conditional_volatility)
    scale = deviation * math.sqrt((dof - 2.0) / dof)
    result: Floats = stats.t.logpdf((history - mean) / scale, dof) - np.log(scale) + math.log(PERCENT)
    return result[-len(test) :]


def _check(training: Floats, between: Floats, test: Floats) -> None:
    for name, returns, least in (("training", training, MIN_BARS), ("between", between, 0), ("test", test, 1)):
        if returns.ndim != 1 or len(returns) < least:
            raise ValueError(f"{name}: expected at least {least} returns [n], was {[*returns.shape]}")
        if not np.isfinite(returns).all():
            raise ValueError(f"{name}: expected finite returns, found NaN or infinity")
    if not training.std() > 0.0:
        raise ValueError("training: expected returns that move, all are equal")
