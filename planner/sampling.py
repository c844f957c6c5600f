"""Sampling planners: random shooting, and the cross-entropy method over factored categorical distributions.

Every candidate is drawn step by step under the masks of the states it imagines, so that none is ever invalid. Noise is
an argument, and no step depends on a value of a tensor: both searches can be exported.

Letters: N rows, C candidates, I iterations, H horizon, K action dimensions, A actions of each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from planner.exhaustive import Clock
from planner.objective import Objective
from planner.paths import Imagination, Particles
from planner.plan import Plan
from planner.protocol import JointPlanningModel, PlanningModel

NO_PROPOSAL = -1
TINY = 1e-6
"""Weight that keeps every valid action possible where the distribution has forgotten all of them."""


@dataclass(frozen=True, kw_only=True)
class CEM:
    """The cross-entropy method on categorical distributions (Rubinstein 1999; in PETS, arXiv:1805.12114, on Gaussians).

    Each step and dimension has a distribution of its own, renormalised on the mask of the state a candidate has reached
    before a choice is drawn. After each iteration the distributions move to the frequencies of the best candidates,
    among which the best ever seen always is. Candidate 0 takes the safe action throughout, where there is one, and
    candidate 1 is the rest of an earlier plan.
    """

    horizon: int = 3
    """H."""
    candidates: int = 512
    """C."""
    elites: int = 32
    """Best candidates of an iteration that the distributions are fitted to."""
    iterations: int = 3
    """I."""
    smoothing: float = 0.1
    """Weight of the old distribution."""
    trust: float = 0.5
    """Weight of an earlier plan in the first distribution; the rest is uniform."""
    objective: Objective = field(default_factory=Objective)
    particles: Particles = "all"

    def __post_init__(self) -> None:
        for name in ("horizon", "iterations", "elites"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, was {getattr(self, name)}")
        if self.candidates < max(2, self.elites):
            raise ValueError(
                f"candidates: expected at least elites={self.elites} and at least 2, was {self.candidates}"
            )
        for name in ("smoothing", "trust"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1), was {getattr(self, name)}")

    def noise(self, num_rows: int, dimensions: int, generator: torch.Generator) -> torch.Tensor:
        """All the chance of a call: uniform in [0, 1), [I, N, C, H, K] float32."""
        return torch.rand((self.iterations, num_rows, self.candidates, self.horizon, dimensions), generator=generator)

    def plan(
        self,
        model: PlanningModel[Any] | JointPlanningModel[Any],
        state: Any,
        *,
        noise: torch.Tensor,
        previous: torch.Tensor | None = None,
        deadline: float | None = None,
        clock: Clock = time.perf_counter,
    ) -> Plan:
        """Search a good valid sequence of each row.

        Args: model; state of N rows, none terminated; noise as `noise` draws it; previous: int64 [N, H] or [N, H, K], a
            plan for these rows from now on, `shifted` from an earlier one; deadline: of `clock`, seconds: an iteration
            begins only if it should be done by then, supposing that it takes as long as the one before; the first
            always runs.
        Raises: ValueError for a wrong shape or dtype; InvalidMaskError (a ValueError).
        """
        imagination = Imagination(model, self.objective, self.particles)
        with torch.no_grad():
            masks = imagination.checked(imagination.walk(state).action_masks(0), None)
            sampler = _Sampler(imagination, state, masks, self.horizon, self.candidates)
            expected = (self.iterations, sampler.num_rows, self.candidates, self.horizon, sampler.dimensions)
            if tuple(noise.shape) != expected:
                raise ValueError(f"noise: expected {list(expected)}, was {list(noise.shape)}")
            weights, proposals = sampler.begin(previous, self.trust)
            first, *later = noise.unbind(0)
            begun = 0.0 if deadline is None else clock()
            found = sampler.draw(weights, first, proposals)
            earlier, best = None, sampler.better(None, found)
            for draws in later:
                if deadline is not None:
                    now = clock()
                    if now + (now - begun) > deadline:
                        return sampler.harvest(best, complete=False)
                    begun = now
                frequencies = self._frequencies(found, earlier, sampler)
                weights = self.smoothing * weights + (1.0 - self.smoothing) * frequencies
                found = sampler.draw(weights, draws, None)
                earlier, best = best, sampler.better(best, found)
            return sampler.harvest(best, complete=True)

    # Of the candidates and the best of the iterations before them.
    def _frequencies(self, found: _Candidates, earlier: _Best | None, sampler: _Sampler) -> torch.Tensor:
        score, sequence = found.score, found.sequence
        if earlier is not None:
            score = torch.cat((earlier.score[:, None], score), dim=1)
            sequence = torch.cat((earlier.sequence[:, None], sequence), dim=1)
        top = torch.topk(score, self.elites, dim=1)
        counts = ~torch.isneginf(top.values)
        elite = sequence.gather(1, top.indices[:, :, None, None].expand(-1, -1, *sequence.shape[2:]))
        share = counts.to(torch.float32) / counts.sum(dim=1, keepdim=True).clamp(min=1)
        chosen = elite[..., None] == torch.arange(sampler.num_actions, device=elite.device)
        return (chosen * share[:, :, None, None, None]).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class RandomShooting:
    """The best of C candidates whose every action is drawn uniformly from its mask (PETS, arXiv:1805.12114, sec. 5)."""

    horizon: int = 3
    candidates: int = 512
    objective: Objective = field(default_factory=Objective)
    particles: Particles = "all"

    def __post_init__(self) -> None:
        _ = self._search

    def noise(self, num_rows: int, dimensions: int, generator: torch.Generator) -> torch.Tensor:
        """All the chance of a call: uniform in [0, 1), [1, N, C, H, K] float32."""
        return self._search.noise(num_rows, dimensions, generator)

    def plan(
        self,
        model: PlanningModel[Any] | JointPlanningModel[Any],
        state: Any,
        *,
        noise: torch.Tensor,
        previous: torch.Tensor | None = None,
        deadline: float | None = None,
        clock: Clock = time.perf_counter,
    ) -> Plan:
        """As `CEM.plan`; an earlier plan is one of the candidates. There is nothing to stop early."""
        return self._search.plan(model, state, noise=noise, previous=previous, deadline=deadline, clock=clock)

    @property
    def _search(self) -> CEM:
        return CEM(
            horizon=self.horizon,
            candidates=self.candidates,
            elites=1,
            iterations=1,
            trust=0.0,
            objective=self.objective,
            particles=self.particles,
        )


def shifted(sequence: torch.Tensor, hold: torch.Tensor | int) -> torch.Tensor:
    """The rest of a plan one step later, with Hold at its end: what to pass as `previous` to the next search.

    Args: sequence: of a `Plan`; hold: the action that is always valid, an index or int64 [K].
    """
    last = torch.as_tensor(hold).expand_as(sequence[:, -1])[:, None]
    return torch.cat((sequence[:, 1:], last), dim=1)


class _Candidates(NamedTuple):
    sequence: torch.Tensor  # int64 [N, C, H, K]
    length: torch.Tensor  # int64 [N, C]
    score: torch.Tensor  # float64 [N, C]
    broken: torch.Tensor  # bool [N, C], worth -inf for a number that is none


class _Best(NamedTuple):
    sequence: torch.Tensor  # int64 [N, H, K]
    length: torch.Tensor  # int64 [N]
    score: torch.Tensor  # float64 [N]
    action_values: torch.Tensor  # float64 [N, A], of the first dimension
    broken: torch.Tensor  # int64 [N], broken candidates so far


class _Sampler:
    def __init__(
        self, imagination: Imagination, state: Any, masks: torch.Tensor, horizon: int, candidates: int
    ) -> None:
        self.imagination, self.horizon, self.candidates = imagination, horizon, candidates
        self.num_rows, self.num_actions = masks.shape[0], masks.shape[2]
        self.filler = torch.tensor(imagination.filler, device=masks.device)
        self.dimensions = len(imagination.filler)
        self.fallback = imagination.fallback(masks)
        # Every row C times, candidate after candidate.
        self.index = torch.arange(self.num_rows, device=masks.device).repeat_interleave(candidates)
        roots = imagination.begin(state, masks)
        self.roots = imagination.take(roots, self.index)
        # All candidates begin in the same states: their first steps are a handful of different ones.
        self.first = imagination.branch(roots, 0, self.num_actions) if imagination.branches else None
        self.nodes = 0

    def begin(self, previous: torch.Tensor | None, trust: float) -> tuple[torch.Tensor, torch.Tensor]:
        """First weights [N, H, K, A] and proposals [N, C, H, K]."""
        shape = (self.num_rows, self.horizon, self.dimensions)
        weights = torch.full((*shape, self.num_actions), 1.0 / self.num_actions, device=self.index.device)
        proposals = torch.full((self.num_rows, self.candidates, *shape[1:]), NO_PROPOSAL, device=self.index.device)
        if self.imagination.safe_action is not None:
            proposals[:, 0] = self.filler
        if previous is not None:
            earlier = previous if self.imagination.joint else previous[..., None]
            if tuple(earlier.shape) != shape or earlier.dtype != torch.int64:
                raise ValueError(
                    f"previous: expected int64 {list(shape[: 3 if self.imagination.joint else 2])}, "
                    f"was {previous.dtype} {list(previous.shape)}"
                )
            proposals[:, 1] = earlier
            if not torch.compiler.is_exporting() and ((earlier < 0) | (earlier >= self.num_actions)).any():
                raise ValueError(f"previous: expected actions from 0 to {self.num_actions - 1}, was {earlier.tolist()}")
            chosen = earlier[..., None] == torch.arange(self.num_actions, device=earlier.device)
            weights = (1.0 - trust) * weights + trust * chosen
        return weights, proposals

    def draw(self, weights: torch.Tensor, noise: torch.Tensor, proposals: torch.Tensor | None) -> _Candidates:
        """C valid candidates of each row. Args: weights [N, H, K, A]; noise [N, C, H, K]; proposals [N, C, H, K]."""
        imagination, paths = self.imagination, self.roots
        steps, living = [], []
        for depth in range(self.horizon):
            walk, choices, executed = imagination.walk(paths.state), [], []
            running = paths.alive.any(dim=1)
            for dimension in range(self.dimensions):
                masks = imagination.checked(walk.action_masks(dimension), paths.alive, self.num_actions)
                allowed = imagination.permitted(masks, paths.alive)
                paths = paths._replace(stuck=paths.stuck | ~allowed.any(dim=1))
                likely = (weights[:, depth, dimension] + TINY).repeat_interleave(self.candidates, dim=0)
                choice = _drawn(likely * allowed, noise[:, :, depth, dimension].reshape(-1))
                if proposals is not None:
                    wish = proposals[:, :, depth, dimension].reshape(-1)
                    valid = allowed.gather(1, wish.clamp(min=0)[:, None])[:, 0] & (wish != NO_PROPOSAL)
                    choice = torch.where(valid, wish, choice)
                taken = imagination.executed(masks, choice, dimension)
                walk.take(dimension, taken)
                choices.append(choice)
                executed.append(taken)
            action = torch.stack(executed, dim=2) if imagination.joint else executed[0]
            if depth == 0 and self.first is not None:
                reached = imagination.take(self.first, self.index * self.num_actions + executed[0][:, 0])
                paths = reached._replace(stuck=paths.stuck)
            else:
                paths = imagination.advance(paths, action, depth)
            steps.append(torch.where(running[:, None], torch.stack(choices, dim=1), self.filler))
            living.append(running)
        paths = imagination.end(paths, self.horizon)
        score = imagination.score(paths)
        self.nodes += self.index.shape[0] * self.horizon
        shape = (self.num_rows, self.candidates)
        return _Candidates(
            torch.stack(steps, dim=1).reshape(*shape, self.horizon, self.dimensions),
            torch.stack(living, dim=1).sum(dim=1).reshape(shape),
            score.reshape(shape),
            (torch.isneginf(score) & ~paths.stuck).reshape(shape),
        )

    def better(self, best: _Best | None, found: _Candidates) -> _Best:
        """The best of all candidates so far; of equal ones that of the lowest actions."""
        rows = torch.arange(self.num_rows, device=self.index.device)
        first = found.sequence[:, :, 0, 0, None] == torch.arange(self.num_actions, device=self.index.device)
        by_action = torch.where(first, found.score[:, :, None], -torch.inf).amax(dim=1)
        score = found.score.amax(dim=1)
        leading = found.score == score[:, None]
        place = torch.where(leading, self._order(found.sequence), torch.iinfo(torch.int64).max).argmin(dim=1)
        sequence, length = found.sequence[rows, place], found.length[rows, place]
        broken = found.broken.sum(dim=1)
        if best is None:
            return _Best(sequence, length, score, by_action, broken)
        earlier = self._order(best.sequence[:, None])[:, 0]
        lower = self._order(sequence[:, None])[:, 0] < earlier
        ahead = (score > best.score) | ((score == best.score) & lower)
        return _Best(
            torch.where(ahead[:, None, None], sequence, best.sequence),
            torch.where(ahead, length, best.length),
            torch.where(ahead, score, best.score),
            torch.maximum(by_action, best.action_values),
            broken + best.broken,
        )

    def harvest(self, best: _Best, *, complete: bool) -> Plan:
        """The plan of each row."""
        fallback = torch.isneginf(best.score)
        sequence = torch.where(fallback[:, None, None], self.filler, best.sequence)
        sequence[:, 0] = torch.where(fallback[:, None], self.fallback, sequence[:, 0])
        if not self.imagination.joint:
            sequence = sequence[:, :, 0]
        return Plan(
            action=sequence[:, 0].clone(),
            value=best.score,
            sequence=sequence,
            length=torch.where(fallback, 0, best.length),
            action_values=None if self.imagination.joint else best.action_values,
            fallback=fallback,
            non_finite=best.broken,
            nodes=self.nodes,
            complete=complete,
        )

    # A number that grows with the first action, then with the next, counted from the safe ones on: how Hold wins a tie.
    # Beyond 63 bits only the beginning counts.
    def _order(self, sequence: torch.Tensor) -> torch.Tensor:
        flat = ((sequence - self.filler) % self.num_actions).flatten(2)
        code = torch.zeros_like(flat[:, :, 0])
        limit = torch.iinfo(torch.int64).max // self.num_actions
        largest = 1
        for column in flat.unbind(2):
            if largest > limit:
                break
            code, largest = code * self.num_actions + column, largest * self.num_actions
        return code


# Choice of each row by inverting its cumulative weights: weights [R, A], zero where forbidden; uniform [R].
def _drawn(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = torch.cumsum(weights, dim=1)
    beyond = cumulative > (uniform * cumulative[:, -1])[:, None]
    # The first place that is beyond has a weight. Rounding may leave none beyond: then the first allowed one.
    return torch.where(beyond.any(dim=1), beyond.to(torch.uint8).argmax(dim=1), (weights > 0).to(torch.uint8).argmax(1))
