"""Proof that the planner graph plans as the planner does in Python, with every table of noise.

Letters: B rows, S state columns, A actions, H horizon.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from export.errors import ParityError
from export.reference import Reference
from export.states import probe_masks, probe_states
from masking import HOLD
from masking.strict_policy import StrictMaskablePolicy
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy
from planner import Exhaustive
from planner.paths import Imagination
from serving import Bundle, PlannerOutputs
from serving.golden import PLAN_TOLERANCE, GoldenPlan, plan_difference, spared, within_spare

MAX_PLANNED = 1e6
"""Of states with a larger number no value is compared: sums overflow in one order of operations and not in another."""
PATHS_AT_ONCE = 500_000
"""Rows x paths x scenarios walked at once, in the graph and in Python; bounds memory."""
SINGLE = 100
"""Rows planned one by one as well."""

States = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]


def check_plans(
    bundle: Bundle,
    reference: Reference,
    planner: PlannerPolicy,
    state: States,
    callers: Masks,
    *,
    count: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Compare plans in batches and, of the first rows, one by one.

    In Python the planner runs over rules, market model and policy of the reference. Rows take the tables of noise in
    turn. Each sequence of the graph is walked once more in Python: where plans tie it may be another one, but each of
    its steps must be valid and its value as told. Few rows may be a little apart (`serving.golden.spared`): where a
    scenario stands at a threshold, rounding decides which way it goes. Rows of broken or enormous numbers are compared
    for what they do.

    Args: planner: of the bundle; state [B, S]; callers: masks [B, A]; count: of probe states, with which `state`
        begins; others are drawn for the broken and enormous ones, so that as many are planned; rng.
    Returns: entries of the report.
    Raises: ParityError; ValueError where the bundle has no planner.
    """
    entry = bundle.manifest.planner
    if entry is None:
        raise ValueError(f"planner: expected None for a bundle without one, was {planner.name!r}")
    at_once = rows_at_once(planner)

    def refuse(expected: GoldenPlan, found: PlannerOutputs, masks: Masks, how: str) -> None:
        difference = plan_difference(
            expected,
            found,
            action_masks=masks,
            horizon=entry.horizon,
            tolerance=PLAN_TOLERANCE,
            spare=spared(len(masks)),
        )
        if difference is not None:
            raise ParityError(f"planner graph ({how}): {difference}")

    usual = _usual(state)
    rest, nothing = state[~usual], np.zeros_like(callers[:SINGLE])
    rest, allowed = np.concatenate([rest, state[:SINGLE]]), np.concatenate([callers[~usual], nothing])
    found = bundle.run_planner(rest, allowed, np.zeros(len(rest), dtype=np.int64), at_once=at_once)
    refuse(*_held(reference, rest, allowed, found), "rows without a plan")

    more = _more(reference, count - int(usual[:count].sum()), rng)
    state = np.concatenate([state[usual], more])
    callers = np.concatenate([callers[usual], probe_masks(callers.shape[1], len(more), rng)])
    masks, seeds = reference.rules(state) & callers, np.arange(len(state), dtype=np.int64)
    planners = _over_reference(reference, planner, entry.noise_tables)
    expected = _planned(planners, state, masks, at_once)
    found = bundle.run_planner(state, callers, seeds, at_once=at_once)
    refuse(expected, found, masks, "batch")
    first = slice(0, SINGLE)
    singles = bundle.run_planner(state[first], callers[first], seeds[first], at_once=1)
    wanted = GoldenPlan(expected.action[first], expected.value[first], expected.fallback[first])
    refuse(wanted, singles, masks[first], "single rows")
    _check_sequences(planners, state, masks, found, at_once)
    error = np.abs(expected.value - found.value) / (1.0 + np.abs(expected.value))
    return {
        "plans": len(state),
        "plan_ties": int((expected.action != found.action).sum()),
        "max_plan_error": float(error.max()),
    }


def rows_at_once(planner: PlannerPolicy) -> int:
    """Rows whose paths fit `PATHS_AT_ONCE`, one at least."""
    search, size = planner.search, planner.dynamics.num_actions
    paths = int(size**search.horizon) if isinstance(search, Exhaustive) else search.candidates
    return max(1, PATHS_AT_ONCE // (paths * planner.config.scenarios))


def _usual(state: States) -> npt.NDArray[np.bool_]:
    return np.asarray((np.abs(state) < MAX_PLANNED).all(axis=1))


# Further probe states to plan for.
def _more(reference: Reference, count: int, rng: np.random.Generator) -> States:
    pool = probe_states(reference.dynamics, reference.scaler, 4 * count, rng)
    pool = pool[_usual(pool)][:count]
    if len(pool) < count:
        raise ParityError(f"probe states: expected {count} of numbers below {MAX_PLANNED:g}, was {len(pool)}")
    return pool


# What is not finite, or may do nothing, holds; the rest may have a plan, if it is a valid one.
def _held(
    reference: Reference, state: States, callers: Masks, found: PlannerOutputs
) -> tuple[GoldenPlan, PlannerOutputs, Masks]:
    masks = reference.rules(state) & callers
    lost = ~np.isfinite(state).all(axis=1) | ~masks.any(axis=1)
    masks[:, HOLD] |= ~masks.any(axis=1)
    value = np.where(lost, np.float32(0.0), found.value)
    return GoldenPlan(np.where(lost, HOLD, found.action), value, found.fallback | lost), found, masks


# One planner per table of noise.
def _over_reference(reference: Reference, planner: PlannerPolicy, noise_tables: int) -> list[PlannerPolicy]:
    planners = []
    for table, noise in enumerate(planner.noise_tables(noise_tables)):
        ours = copy.copy(planner)
        ours.noise, ours.seed = noise, planner.seed + table
        ours.dynamics = replace(reference.dynamics, reward=planner.dynamics.reward)
        ours.model = reference.market_model
        if planner.value is not None:
            network = cast(StrictMaskablePolicy, reference.policy)
            ours.value = TorchPolicy(planner.value.name, network, reference.scaler)
        planners.append(ours)
    return planners


# Row i has the noise of seed i.
def _pieces(
    planners: Sequence[PlannerPolicy], count: int, at_once: int
) -> Iterator[tuple[PlannerPolicy, npt.NDArray[np.int64]]]:
    for table, planner in enumerate(planners):
        rows = np.arange(table, count, len(planners))
        for first in range(0, len(rows), at_once):
            yield planner, rows[first : first + at_once]


def _planned(planners: Sequence[PlannerPolicy], state: States, masks: Masks, at_once: int) -> GoldenPlan:
    action = np.zeros(len(state), dtype=np.int64)
    value = np.zeros(len(state), dtype=np.float32)
    fallback = np.zeros(len(state), dtype=np.bool_)
    for planner, rows in _pieces(planners, len(state), at_once):
        plan = planner.plan(state[rows], masks[rows])
        action[rows], fallback[rows] = plan.action.numpy(), plan.fallback.numpy()
        value[rows] = torch.where(plan.fallback, 0.0, plan.value).numpy()
    return GoldenPlan(action, value, fallback)


def _check_sequences(
    planners: Sequence[PlannerPolicy], state: States, masks: Masks, found: PlannerOutputs, at_once: int
) -> None:
    worth = np.zeros(len(state))
    for planner, rows in _pieces(planners, len(state), at_once):
        worth[rows] = _walked(planner, state[rows], masks[rows], torch.from_numpy(found.sequence[rows]))
    slack = PLAN_TOLERANCE * (1.0 + np.abs(found.value))
    wrong = ~(np.abs(worth - found.value) <= slack) & ~found.fallback
    if not within_spare(wrong, worth, found.value, spared(len(wrong))):
        row = int(np.flatnonzero(wrong)[0])
        raise ParityError(
            f"planner graph (sequences): row {row}: expected a valid one worth {found.value[row]}, "
            f"was {found.sequence[row].tolist()} worth {worth[row]} ({int(wrong.sum())} of {len(state)} rows differ)"
        )


# What sequences [B, H] are worth, -inf where a step is not valid.
@torch.no_grad()
def _walked(planner: PlannerPolicy, state: States, masks: Masks, sequence: torch.Tensor) -> npt.NDArray[np.float64]:
    model, root = planner.imagined(state, masks)
    imagination = Imagination(model, planner.search.objective, planner.search.particles)
    allowed = imagination.checked(model.action_masks(root), None)
    paths = imagination.begin(root, allowed)
    valid = ~paths.broken
    for depth, action in enumerate(sequence.unbind(1)):
        if depth:
            allowed = imagination.checked(model.action_masks(paths.state), paths.alive)
        valid &= imagination.permitted(allowed, paths.alive).gather(1, action[:, None])[:, 0]
        paths = imagination.advance(paths, imagination.executed(allowed, action), depth)
    score = imagination.score(imagination.end(paths, sequence.shape[1]))
    return np.asarray(torch.where(valid, score, -torch.inf).numpy())
