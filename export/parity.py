"""Proof that the written files decide as the trained policy does, through the reader that serving uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import ParityError
from export.plan_parity import check_plans
from export.reference import Reference
from export.states import probe_masks, probe_states
from masking import HOLD
from mbpo.planning import PlannerPolicy
from serving import Bundle, OnnxPolicy, PolicyOutputs
from serving.golden import NLL_TOLERANCE, difference, following_rows, number_apart

MIN_STATES = 1000
"""Fewer probe states prove too little."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How close the files came."""

    states: int
    """Rows compared, probe and real."""
    max_probability_error: float
    """Largest probability difference to the trained policy."""
    max_value_error: float
    """Largest value difference."""
    ties: int
    """Rows with another action of equal probability."""
    fallbacks: int
    """Rows decided by fallback, as expected."""
    valid_actions: tuple[int, ...]
    """Rows in which each action was valid; a zero means that the masks of that action were not put to the test."""
    plans: int = 0
    """Rows whose plans were compared, probe and real, without those of broken or enormous numbers; 0 without a
    planner."""
    plan_ties: int = 0
    """Rows with another planned action of equal value."""
    max_plan_error: float = 0.0
    """Largest difference of a plan's value, relative to 1 + its size."""
    likelihoods: int = 0
    """Pairs of bars whose likelihood was compared; 0 without one, where drift cannot be watched."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "valid_actions": list(self.valid_actions)}


def check_parity(
    bundle: Bundle,
    reference: Reference,
    planner: PlannerPolicy | None = None,
    *,
    count: int,
    tolerance: float,
    seed: int,
    states: npt.NDArray[np.float32] | None = None,
) -> ParityReport:
    """Compare a bundle with the policy it was made from, as one batch and one row at a time.

    Args: planner: the planner of the bundle, if it has one; count: probe states (at least 1,000); tolerance: largest
        probability difference; seed: of the probes; states: real state rows [N, S] to compare as well.
    Raises: ParityError naming output, row, expected and actual; ValueError for too few probe states, or where only one
        of bundle and arguments has a planner.
    """
    if count < MIN_STATES:
        raise ValueError(f"count: expected at least {MIN_STATES} parity states, was {count}")
    if planner is None and bundle.manifest.planner is not None:
        raise ValueError("planner: expected that of the bundle, was None")
    rng = np.random.default_rng(seed)
    state = probe_states(reference.dynamics, reference.scaler, count, rng)
    if states is not None:
        state = np.concatenate([state, np.asarray(states, dtype=np.float32)])
    callers = probe_masks(reference.dynamics.num_actions, len(state), rng)
    expected = reference.decide(state, callers)

    batched = bundle.run_policy(state, callers)
    _refuse(difference(expected, batched, tolerance), "batch")
    _refuse(difference(expected, _one_by_one(bundle, state, callers), tolerance), "single rows")
    _check_no_choice(bundle, state)
    if not np.array_equal(bundle.run_masks(state), reference.rules(state)):
        raise ParityError("mask graph: expected the masks of the rule set, was others")
    likelihoods = _check_market_model(bundle, reference, state)
    plans = {} if planner is None else check_plans(bundle, reference, planner, state, callers, count=count, rng=rng)
    return ParityReport(
        states=len(state),
        max_probability_error=float(np.abs(expected.probabilities - batched.probabilities).max()),
        max_value_error=float(np.abs(expected.value - batched.value).max()),
        ties=int((expected.action != batched.action).sum()),
        fallbacks=int(batched.fallback.sum()),
        valid_actions=tuple(map(int, expected.action_masks.sum(axis=0))),
        likelihoods=likelihoods,
        **plans,
    )


# The way live decisions go: batches of one through `decide`, where the last check must have nothing to do.
def _one_by_one(bundle: Bundle, state: npt.NDArray[np.float32], callers: npt.NDArray[np.bool_]) -> PolicyOutputs:
    policy = OnnxPolicy(bundle)
    decisions = [policy.decide(row, caller) for row, caller in zip(state, callers, strict=True)]
    if policy.overridden_total:
        raise ParityError(f"last check: expected no overridden action, was {policy.overridden_total}")
    columns = ("actions", "probabilities", "action_masks", "value", "fallback")
    return PolicyOutputs(*(np.concatenate([getattr(one, name) for one in decisions]) for name in columns))


def _check_no_choice(bundle: Bundle, state: npt.NDArray[np.float32]) -> None:
    outputs = bundle.run_policy(state, np.zeros((len(state), len(bundle.manifest.actions.names)), dtype=np.bool_))
    hold = np.zeros_like(outputs.action_masks)
    hold[:, HOLD] = True
    exact = np.array_equal(outputs.action_masks, hold) and np.array_equal(outputs.probabilities, hold)
    if outputs.action.any() or not outputs.fallback.all() or not exact:
        raise ParityError("caller_masks: expected Hold with fallback where nothing is allowed, was another decision")


# Returns how many likelihoods were compared.
def _check_market_model(bundle: Bundle, reference: Reference, state: npt.NDArray[np.float32]) -> int:
    features, following = following_rows(state, len(reference.dynamics.feature_names))
    found = number_apart(reference.uncertainty(state), bundle.run_uncertainty(features), tolerance=1e-6)
    if found is not None:
        raise ParityError(f"uncertainty graph: {found}")
    if bundle.drift is None:
        return 0
    found = number_apart(reference.nll(state), bundle.run_likelihood(features, following), tolerance=NLL_TOLERANCE)
    if found is not None:
        raise ParityError(f"likelihood graph: {found}")
    return len(state)


def _refuse(found: str | None, how: str) -> None:
    if found is not None:
        raise ParityError(f"policy graph ({how}): {found}")
