"""The linear part of the market's mean: Bayesian ridge regression whose penalty comes from the evidence.

A daily return follows its predictors with an R^2 of a percent or less. At this signal-to-noise a network fits noise,
while a straight line whose prior is sized by the data keeps what is there; the network learns what the line leaves.

Letters: N rows, M inputs, O outputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Prior precision over noise precision, per output. From no shrinkage to none left of the largest market signal.
PENALTIES = np.logspace(-1.0, 7.0, 33)
# Share of the largest eigenvalue below which a direction of the design is rounding noise.
RANK = 1e-12


def fit_line(
    inputs: NDArray[np.float64],
    targets: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    penalties: NDArray[np.float64] = PENALTIES,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit `target = coefficients @ [1, inputs]`, one penalty per output by the largest marginal likelihood.

    MacKay 1992 (doi:10.1162/neco.1992.4.3.415, eq. 2.13 ff.) with the noise variance profiled out and the penalty on a
    grid: with N(0, s^2/a) on every coefficient the evidence is
    `-N/2 log s^2 - 1/2 sum_i log(1 + d_i^2 / a)`, `d_i` the singular values of the design. The intercept is shrunk with
    the rest: the mean return of a few years is the least certain number of all.

    Args: inputs [N, M], standardised; targets [N, O], in units in which 0 is what one knows without the data; weights
        [N, O] > 0, one over the noise variance of each target up to a factor, None for equal ones; penalties: to choose
        from.
    Returns: coefficients [O, 1 + M], intercept first; penalties [O].
    Raises: ValueError on shapes, fewer than two rows or numbers that are not finite.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets) or len(inputs) < 2:
        raise ValueError(f"line: expected [N >= 2, M] and [N, O], was {[*inputs.shape]} and {[*targets.shape]}")
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise ValueError("line: expected finite inputs and targets, found NaN or infinity")
    design = np.column_stack((np.ones(len(inputs)), inputs))
    if weights is None:
        fitted = [_fit_column(design, target, penalties) for target in targets.T]
    else:
        roots = np.sqrt(weights / weights.mean(axis=0))
        fitted = [
            _fit_column(design * root[:, None], target * root, penalties)
            for target, root in zip(targets.T, roots.T, strict=True)
        ]
    coefficients, chosen = zip(*fitted, strict=True)
    return np.stack(coefficients), np.array(chosen)


# Coefficients [P] and penalty of one target [N] on a design [N, P], rows already weighted.
def _fit_column(
    design: NDArray[np.float64], target: NDArray[np.float64], penalties: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    rows = len(target)
    power, axes = np.linalg.eigh(design.T @ design)
    power = np.maximum(power, 0.0)
    moment = axes.T @ (design.T @ target)
    # Squared lengths of the target along the principal axes; a direction in which nothing varies explains nothing.
    seen = power > RANK * max(power[-1], 1.0)
    explained = np.where(seen, moment**2 / np.where(seen, power, 1.0), 0.0)
    outside = max(float(target @ target) - float(explained.sum()), 0.0)
    missed = outside + (explained * penalties[:, None] / (power + penalties[:, None])).sum(axis=1)
    noise = np.maximum(missed / rows, np.finfo(np.float64).tiny)
    evidence = -0.5 * rows * np.log(noise) - 0.5 * np.log1p(power / penalties[:, None]).sum(axis=1)
    penalty = float(penalties[np.argmax(evidence)])
    return axes @ (moment / (power + penalty)), penalty
