"""How often does a learned mask let an invalid action through? A bound that holds with stated confidence.

The false-valid rate of a threshold t is `P(score >= t | the action is truly invalid)`. What makes the bound honest:

- *Trials are groups.* Pairs (state, action) of one episode stand or fall together, so each group gives one trial: one
  of its invalid pairs, drawn uniformly. Errors are then binomial, and their rate is that of a random invalid pair of a
  random group that has one. Groups must be drawn independently of each other and of the scores.
- *Choosing costs nothing.* Thresholds are fixed before the trials are seen and tested from the strictest to the
  loosest until the first failure (fixed-sequence testing, Learn then Test, arXiv:2110.01052), so all that passed hold
  together with the stated confidence. Errors can only grow along the way: the loosest that passes is taken.
- *The exact binomial bound.* Clopper and Pearson, Biometrika 26(4), 1934, one-sided: no normal approximation, which
  would put the bound of zero errors at zero.

The claim is about the distribution the groups were drawn from. Another behaviour, another market or an imagined state
that no real episode reaches is another distribution: drift voids the claim. It is also an average: a rare kind of
invalid action may fare worse than the rate over all of them.

Letters: N rows, A actions, G groups with an invalid pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from world_model.errors import WorldModelError


class MaskBoundError(WorldModelError, ValueError):
    """No threshold meets the target; the attributes say what was seen at the strictest one."""

    def __init__(self, *, target: float, confidence: float, trials: int, errors: int) -> None:
        self.target, self.confidence, self.trials, self.errors = target, confidence, trials, errors
        self.upper_bound = false_valid_upper_bound(errors, trials, confidence)
        self.needed = trials_needed(target, confidence, errors)
        super().__init__(
            f"learned masks: expected a false-valid rate of at most {target:g} at {confidence:.0%} confidence, best "
            f"bound was {self.upper_bound:.3g}: {errors} errors in {trials:,} held-out groups with an invalid action, "
            f"but {errors} errors need {self.needed:,} groups; collect more episodes, improve the fit, or allow more"
        )


@dataclass(frozen=True, kw_only=True)
class MaskBound:
    """A threshold and what is known about its false-valid rate."""

    target: float
    """Highest false-valid rate that was allowed."""
    confidence: float
    """Probability, over the draw of the groups, that `target` really holds."""
    threshold: float
    """Lowest score, a calibrated logit, that counts as valid."""
    trials: int
    """Groups that had an invalid pair; one trial each."""
    errors: int
    """Trials in which the invalid action scored at least `threshold`."""
    upper_bound: float
    """Clopper-Pearson bound of (errors, trials); at most `target`."""
    candidates: int
    """Thresholds in the sequence."""
    passed: int
    """How many of them met the target before the first failure."""

    @property
    def probability(self) -> float:
        """The threshold as a probability of being valid."""
        return 0.5 * (1.0 + math.tanh(0.5 * self.threshold))


@dataclass(frozen=True, kw_only=True)
class MaskErrors:
    """Predicted against true masks, without the safe action, which is never predicted."""

    rows: int
    groups: int
    false_valid: float
    """The rate that is bounded: share of invalid pairs called valid, averaged over groups that have an invalid pair."""
    false_valid_pairs: float
    """The same over all pairs, so that long groups weigh more."""
    false_valid_by_action: tuple[float, ...]
    """The same for each action [A]; 0 where the action was never invalid."""
    false_invalid: float
    """Share of valid pairs that are lost."""
    refused: float
    """Share of rows with no valid action left; 0 with a safe action."""
    invalid_choices: float
    """Chance that a uniform choice among the predicted actions is truly invalid, over rows that are not refused."""


def false_valid_upper_bound(errors: int, trials: int, confidence: float) -> float:
    """Highest error rate under which at most `errors` in `trials` still has probability `1 - confidence`.

    Raises: ValueError unless 0 <= errors <= trials and 0 < confidence < 1.
    """
    if not 0 <= errors <= trials:
        raise ValueError(f"errors: expected 0 <= errors <= trials, was {errors} and {trials}")
    _refuse_no_fraction("confidence", confidence)
    return 1.0 if errors == trials else float(betaincinv(errors + 1, trials - errors, confidence))


def trials_needed(target: float, confidence: float, errors: int = 0) -> int:
    """Fewest trials in which `errors` errors still bound the rate by `target`.

    Without errors `(1 - target)**n <= 1 - confidence`, so `n >= log(1 - confidence) / log(1 - target)`: 2,995 trials
    for 1e-3 at 95 %; one error asks for 4,742, two for 6,294.

    Raises: ValueError unless errors >= 0 and both fractions lie strictly between 0 and 1.
    """
    if errors < 0:
        raise ValueError(f"errors: expected at least 0, was {errors}")
    _refuse_no_fraction("target", target)
    _refuse_no_fraction("confidence", confidence)
    enough = max(errors, 1)
    while false_valid_upper_bound(errors, enough, confidence) > target:
        enough *= 2
    too_few = enough // 2 if enough > max(errors, 1) else errors
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if false_valid_upper_bound(errors, middle, confidence) > target:
            too_few = middle
        else:
            enough = middle
    return enough


def one_invalid_pair_per_group(
    action_masks: NDArray[np.bool_], groups: NDArray[np.integer], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the trials: from each group one of its invalid pairs, uniformly.

    Args: action_masks [N, A], True = valid; groups [N], any integers.
    Returns: row [G] and action [G]; a group without an invalid pair is no trial.
    """
    row, action = np.nonzero(~action_masks)
    group = groups[row]
    # The pair with the smallest random key within its group: uniform without a loop.
    order = np.lexsort((rng.random(len(row)), group))
    first = np.unique(group[order], return_index=True)[1]
    drawn = order[first]
    return row[drawn], action[drawn]


def bound_threshold(
    scores: NDArray[np.floating], thresholds: NDArray[np.floating], *, target: float, confidence: float
) -> MaskBound:
    """The loosest threshold whose false-valid rate is at most `target`, with `confidence`.

    Args:
        scores: [G], of truly invalid pairs, one per group; they took no part in the fit or in choosing `thresholds`.
        thresholds: candidates, strictly descending, finite.

    Raises: MaskBoundError if even the strictest fails; ValueError on NaN scores, bad candidates or fractions.
    """
    _refuse_no_fraction("target", target)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"scores: expected [G] without NaN, was {[*scores.shape]}")
    if thresholds.ndim != 1 or not thresholds.size or not np.isfinite(thresholds).all():
        raise ValueError(f"thresholds: expected finite [1 or more], was {thresholds.tolist()}")
    if (np.diff(thresholds) >= 0).any():
        raise ValueError(f"thresholds: expected strictly descending, strictest first, was {thresholds.tolist()}")
    trials, chosen = len(scores), None
    for passed, threshold in enumerate(thresholds.tolist(), start=1):
        errors = int((scores >= threshold).sum())
        upper_bound = false_valid_upper_bound(errors, trials, confidence)
        if upper_bound > target:
            break
        chosen = MaskBound(
            target=target,
            confidence=confidence,
            threshold=threshold,
            trials=trials,
            errors=errors,
            upper_bound=upper_bound,
            candidates=len(thresholds),
            passed=passed,
        )
    if chosen is None:
        raise MaskBoundError(target=target, confidence=confidence, trials=trials, errors=errors)
    return chosen


def mask_errors(
    predicted: NDArray[np.bool_],
    action_masks: NDArray[np.bool_],
    groups: NDArray[np.integer],
    *,
    safe_action: int | None,
) -> MaskErrors:
    """Compare predicted with true masks, both [N, A], of rows in groups [N]."""
    judged = np.arange(action_masks.shape[1]) != safe_action
    wrong = predicted & ~action_masks
    invalid, valid = ~action_masks & judged, action_masks & judged
    ids = np.unique(groups, return_inverse=True)[1]
    per_group = np.bincount(ids, invalid.sum(axis=1))
    wrong_per_group = np.bincount(ids, wrong.sum(axis=1))
    has_trial = per_group > 0
    offered = predicted.sum(axis=1)
    return MaskErrors(
        rows=len(groups),
        groups=len(per_group),
        false_valid=_mean(wrong_per_group[has_trial] / per_group[has_trial]),
        false_valid_pairs=_mean(predicted[invalid]),
        false_valid_by_action=tuple(_mean(predicted[invalid[:, a], a]) for a in range(len(judged))),
        false_invalid=_mean(~predicted[valid]),
        refused=_mean(offered == 0),
        invalid_choices=_mean(wrong.sum(axis=1)[offered > 0] / offered[offered > 0]),
    )


def _mean(values: NDArray[np.generic]) -> float:
    return float(values.mean()) if values.size else 0.0


def _refuse_no_fraction(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}: expected a fraction strictly between 0 and 1, was {value}")
