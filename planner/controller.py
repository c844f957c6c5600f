"""Model predictive control: plan at every decision, within a time budget, and never leave the mask."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from masking import MaskingError, valid_actions, validate_action_masks
from planner.exhaustive import Clock, Exhaustive, beyond_budget
from planner.paths import Imagination
from planner.plan import Plan
from planner.protocol import PlanningModel
from planner.sampling import CEM, RandomShooting, shifted

Search = Exhaustive | CEM | RandomShooting
Source = Literal["plan", "policy", "hold"]
"""Who decided a row; "hold" is the model's safe action or, without one, the lowest valid action."""

State = npt.NDArray[np.floating[Any]]
Masks = npt.NDArray[np.bool_]
Imagine = Callable[[State, Masks], tuple[PlanningModel[Any], Any]]
"""From rows [B, S] and their masks [B, A] to a model and its state of B rows; the masks hold at the first step."""


class Fallback(Protocol):
    """What decides where there is no plan."""

    def act(self, state: State, action_masks: Masks) -> npt.NDArray[np.int64]:
        """Valid actions [B] for rows [B, S] under masks [B, A]."""
        ...


class MPC:
    """First action of a fresh plan at every decision; without one the policy decides, and where it cannot, Hold.

    A row has no plan where no sequence has a finite value, as with NaN in the state. No row of a call has one where
    time was over before the search could begin, or where the model's masks are wrong. A search stops with the best it
    has where going on would not fit the budget; its first depth or iteration always runs, so choose one that fits
    (`warm_up` says whether it does). Whatever decides, the action is held against the masks once more. The noise is
    drawn once and is the same for every row: without `warm_start`, with time enough and under a model that keeps its
    protocol, equal arguments give equal actions in any company.

    Hold is the safe action of the model, whatever its number. Without one, and before the first model, no action is
    known to be harmless: a row that the policy cannot decide takes the lowest one its mask allows, as a `Plan` without
    a sequence does.

    Args:
        imagine: makes the model of given rows, with one action dimension: no mask could be asked once more about joint
            limits.
        search: how plans are found.
        fallback: policy for rows without a plan; None is Hold for them all.
        budget_ms: of one call of `act`.
        seed: of the noise.
        warm_start: begin each search with the rest of the last plan; for one series of decisions, `reset` at its start.
        rows_of: from what `predict` is given to rows of `act`; None takes it as it is.
        name: for reports.
    """

    def __init__(
        self,
        imagine: Imagine,
        search: Search,
        *,
        fallback: Fallback | None = None,
        budget_ms: float = 50.0,
        seed: int = 0,
        warm_start: bool = False,
        rows_of: Callable[[Any], State] | None = None,
        name: str = "mpc",
        clock: Clock = time.perf_counter,
    ) -> None:
        if not budget_ms > 0:
            raise ValueError(f"budget_ms: expected > 0, was {budget_ms}")
        if warm_start and isinstance(search, Exhaustive):
            raise ValueError("warm_start: expected a sampling search, was Exhaustive, which needs no hint")
        self.imagine, self.search, self.fallback = imagine, search, fallback
        self.budget_ms, self.warm_start, self.name = budget_ms, warm_start, name
        self.decided: Counter[Source] = Counter()
        """Rows by who decided them."""
        self.overridden = 0
        """Rows whose plan or policy chose what its mask forbids; anything but 0 is a fault of model or policy."""
        self.refused = 0
        """Rows without a plan because imagining raised MaskingError; anything but 0 is a fault of the model."""
        self._rows_of, self._clock = rows_of, clock
        self._safe_action: int | None = None  # of the last model
        if not isinstance(search, Exhaustive):
            self._noise = search.noise(1, 1, torch.Generator().manual_seed(seed))
        self._previous: torch.Tensor | None = None

    def reset(self) -> None:
        """Forget the last plan: another series of decisions begins."""
        self._previous = None

    def warm_up(self, state: State, action_masks: Masks) -> float:
        """Plan twice and say how many milliseconds the least that a search can do takes; arguments as `act`.

        Raises: ValueError where that does not fit the budget; InvalidMaskError where masks of the model are wrong.
        """
        for _ in range(2):
            begun = self._clock()
            self._search(*self._imagined(state, action_masks), rows=len(state), deadline=begun)
            spent = 1000.0 * (self._clock() - begun)
        self.reset()
        if spent > self.budget_ms:
            raise ValueError(
                f"budget_ms: expected at least the {spent:.3g} of one depth or iteration, was {self.budget_ms:g}; "
                "plan with a shorter horizon, fewer candidates or fewer particles"
            )
        return spent

    def act(self, state: State, action_masks: Masks) -> npt.NDArray[np.int64]:
        """Valid actions of rows.

        Args: state [B, S]; action_masks bool [B, A], the model's safe action valid, or any where it has none.
        Returns: int64 [B].
        Raises: InvalidMaskError for `action_masks`; ValueError for a joint model, or one that breaks its protocol in
            anything but masks.
        """
        deadline = self._clock() + self.budget_ms / 1000.0
        self._check(state, action_masks)
        plan = None if self._clock() >= deadline else self._planned(state, action_masks, deadline)
        if plan is None:
            if self._previous is not None:
                # A decision passes without a plan, so the last one is a step further back.
                self._previous = shifted(self._previous, self._safe_action or 0)
            return self._without(state, action_masks)
        action: npt.NDArray[np.int64] = plan.action.numpy().copy()
        forbidden = ~valid_actions(action, action_masks)
        lost = plan.fallback.numpy() | forbidden
        self.overridden += int(forbidden.sum())
        if not lost.all():
            self.decided["plan"] += int((~lost).sum())
        if lost.any():
            action[lost] = self._without(state[lost], action_masks[lost])
        return action

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
        deterministic: bool = True,  # noqa: ARG002 - stable-baselines3's signature
        action_masks: Masks | None = None,
    ) -> tuple[npt.NDArray[np.int64], Any]:
        """The interface of stable-baselines3's models, so that its evaluation tools can run a planner.

        Raises: MaskingError without masks: a planner never assumes that everything is allowed.
        """
        if action_masks is None:
            raise MaskingError("action_masks: expected bool [B, A], was None; evaluate with masks")
        if episode_start is not None and np.any(episode_start):
            self.reset()
        rows = np.asarray(observation) if self._rows_of is None else self._rows_of(observation)
        masks = np.asarray(action_masks)
        single = rows.ndim == 1
        if single:
            rows, masks = rows[None], masks.reshape(1, -1)
        action = self.act(rows, masks)
        return (action[0] if single else action), state

    # Caller's masks; which action must be valid is known from the first model on.
    def _check(self, state: State, action_masks: Masks) -> None:
        width = action_masks.shape[-1]
        validate_action_masks(action_masks, num_actions=width, batch=len(state), safe_action=self._safe_action)

    # None where imagining took all the time, or masks of the model are wrong.
    def _planned(self, state: State, action_masks: Masks, deadline: float) -> Plan | None:
        plan, refused = None, 0
        try:
            model, root = self._imagined(state, action_masks)
            if self._clock() < deadline:
                plan = self._search(model, root, len(state), deadline)
        except MaskingError:
            refused = len(state)
        # Again: a caller who masks the safe action is told so, not taken for a wrong model.
        self._check(state, action_masks)
        self.refused += refused
        return plan

    def _imagined(self, state: State, action_masks: Masks) -> tuple[PlanningModel[Any], Any]:
        model, root = self.imagine(state, action_masks)
        imagination = Imagination(model, self.search.objective, self.search.particles)
        if imagination.joint:
            raise ValueError(
                "imagine: expected a model of one action dimension, was a joint model; CEM.plan takes those"
            )
        self._safe_action = None if imagination.safe_action is None else imagination.safe_action[0]
        return model, root

    def _search(self, model: PlanningModel[Any], root: Any, rows: int, deadline: float) -> Plan:
        if isinstance(self.search, Exhaustive):
            return self.search.plan(model, root, deadline=deadline, clock=self._clock)
        previous = self._previous if self._previous is not None and len(self._previous) == rows else None
        noise = self._noise.expand(-1, rows, -1, -1, -1)
        plan = self.search.plan(model, root, noise=noise, previous=previous, deadline=deadline, clock=self._clock)
        if self.warm_start:
            self._previous = shifted(plan.sequence, self._safe_action or 0)
        return plan

    def _without(self, state: State, action_masks: Masks) -> npt.NDArray[np.int64]:
        hold: npt.NDArray[np.int64] = np.full(len(state), self._safe_action or 0, dtype=np.int64)
        if self._safe_action is None:
            hold[:] = action_masks.argmax(axis=1)
        if self.fallback is None:
            self.decided["hold"] += len(state)
            return hold
        # Row by row: a policy that refuses one state must not take the others' decisions with it.
        for row in range(len(state)):
            one = slice(row, row + 1)
            try:
                action = np.asarray(self.fallback.act(state[one], action_masks[one]))
            except MaskingError:
                self.decided["hold"] += 1
                continue
            if valid_actions(action, action_masks[one])[0]:
                hold[row] = action[0]
                self.decided["policy"] += 1
            else:
                self.overridden += 1
                self.decided["hold"] += 1
        return hold


def auto_search(
    num_actions: int, horizon: int, *, max_nodes: int = 2_000, iterations: int = 3, **options: Any
) -> Exhaustive | CEM:
    """The exact search while its tree fits the budget, else CEM with as many candidates as fit.

    Args: num_actions; horizon; max_nodes: imagined steps of one decision; iterations of CEM; options: `objective` and
        `particles` of either.
    Raises: ValueError where not even one iteration of two candidates fits.
    """
    if beyond_budget(num_actions, horizon, max_nodes) is None:
        return Exhaustive(horizon=horizon, max_nodes=max_nodes, **options)
    candidates = max_nodes // (iterations * horizon)
    if candidates < 2:
        raise ValueError(
            f"max_nodes: expected >= {2 * iterations * horizon} for {iterations} iterations of two candidates over "
            f"{horizon} steps, was {max_nodes}"
        )
    return CEM(
        horizon=horizon, candidates=candidates, elites=max(1, candidates // 16), iterations=iterations, **options
    )
