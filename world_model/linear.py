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


def fit_line(
    inputs: NDArray[np.float64], targets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit `target = coefficients @ [1, inputs]`, one penalty per output by the largest marginal likelihood.

    MacKay 1992 (doi:10.1162/neco.1992.4.3.415, eq. 2.13 ff.) with the noise variance profiled out and the penalty on a
    grid: with N(0, s^2/a) on every coefficient the evidence is
    `-N/2 log s^2 - 1/2 sum_i log(1 + d_i^2 / a)`, `d_i` the singular values of the design. The intercept is shrunk with
    the rest: the mean return of a few years is the least certain number of all.

    Args: inputs [N, M], standardised; targets [N, O], in units in which 0 is what one knows without the data.
    Returns: coefficients [O, 1 + M], intercept first; penalties [O].
    Raises: ValueError on shapes, fewer than two rows or numbers that are not finite.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets) or len(inputs) < 2:
        raise ValueError(f"line: expected [N >= 2, M] and [N, O], was {[*inputs.shape]} and {[*targets.shape]}")
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise ValueError("line: expected finite inputs and targets, found NaN or infinity")
    rows = len(inputs)
    design = np.column_stack((np.ones(rows), inputs))
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    projected = left.T @ targets
    power = singular[:, None] ** 2
    outside = np.maximum((targets**2).sum(axis=0) - (projected**2).sum(axis=0), 0.0)

    evidence = []
    for penalty in PENALTIES:
        missed = outside + (projected**2 * penalty / (power + penalty)).sum(axis=0)
        noise = np.maximum(missed / rows, np.finfo(np.float64).tiny)
        evidence.append(-0.5 * rows * np.log(noise) - 0.5 * np.log1p(power / penalty).sum())
    penalties = PENALTIES[np.argmax(evidence, axis=0)]
    coefficients = right.T @ (singular[:, None] / (power + penalties) * projected)
    return coefficients.T, penalties
