"""Whether planning with the learned world is worth more than its policy alone.

MBPO trains as in `benchmarks.sample_efficiency`, and the last world model it fitted is planned in, with the policy's
value function after the last step. Policy and planners then play the same fresh episodes in the real environment, and
each planner is compared with the policy of its own training run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.machine import library_versions, machine
from benchmarks.sample_efficiency import FINAL_SEED, LIBRARIES, Decide, Judge, Progress, most_probable, play
from benchmarks.sample_efficiency_worlds import WORLDS, EfficiencyWorld, smoke_world
from masking.strict_policy import StrictMaskablePolicy
from mbpo.online import OnlineResult, train_online
from mbpo.planning_world import JointWorldPlanning, WorldPlanning
from planner import CEM, Exhaustive, Objective, Plan, RandomShooting
from world_model.world import WorldModel

Search = Exhaustive | CEM | RandomShooting
HOLD = (5, 5, 5)
"""The joint action of the portfolio that trades nothing."""

SEARCHES: dict[str, dict[str, Search]] = {
    "masked-cartpole": {
        f"exhaustive, H={horizon}": Exhaustive(horizon=horizon, max_nodes=2**40) for horizon in (1, 3, 5)
    },
    "portfolio": {
        "random shooting, H=1": RandomShooting(horizon=1, candidates=512),
        "cem, H=1": CEM(horizon=1, candidates=256, elites=16),
        "cem, H=3": CEM(horizon=3, candidates=256, elites=16),
    },
}
"""By world; the discount is that of the value function."""
MAX_EPISODES = 250
"""Episodes that are played at most: CEM takes a hundred times as long as the policy."""
MAX_ROWS = 64
"""Episodes planned for at once; bounds memory, not results."""


@dataclass(frozen=True, kw_only=True)
class QualityRun:
    """One training run: mean score of its policy and of each planner over the same episodes."""

    seed: int
    real_steps: int
    scores: dict[str, float]
    seconds_per_decision: dict[str, float]
    """Processor time, many decisions at once."""


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """Policy and planners in one world."""

    world: str
    episodes: int
    runs: tuple[QualityRun, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]

    def gain(self, planner: str) -> tuple[float, float | None, float | None]:
        """Mean over runs of planner minus policy, and its 95 % t interval; None with one run."""
        gains = np.array([run.scores[planner] - run.scores["policy"] for run in self.runs])
        if len(gains) < 2:
            return float(gains.mean()), None, None
        margin = float(stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains)))
        return float(gains.mean()), float(gains.mean()) - margin, float(gains.mean()) + margin

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        planners = [name for name in self.runs[0].scores if name != "policy"]
        return {**asdict(self), "gains": {name: self.gain(name) for name in planners}}


def measure_planner_quality(
    world: str, *, seeds: int = 5, jobs: int = 1, smoke: bool = False, progress: Progress | None = None
) -> QualityReport:
    """Train on every seed from 0 on and compare.

    Args: world: one of SEARCHES; jobs: processes, each run takes one core; smoke: counts that answer nothing.
    Raises: ValueError on a world without searches or a count below 1.
    """
    if world not in SEARCHES:
        raise ValueError(f"world: expected one of {sorted(SEARCHES)}, was {world!r}")
    for name, count in {"seeds": seeds, "jobs": jobs}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, was {count}")
    tasks = [(world, seed, smoke) for seed in range(seeds)]
    runs: list[QualityRun] = []
    for run in _results(tasks, jobs):
        runs.append(run)
        if progress is not None:
            progress(len(runs), len(tasks), f"seed {run.seed}: policy {run.scores['policy']:.1f}")
    return QualityReport(
        world=world,
        episodes=_episodes(_world(world, smoke)),
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def compare(world: EfficiencyWorld, result: OnlineResult, searches: Mapping[str, Search], seed: int) -> QualityRun:
    """Let the policy and each planner play the same fresh episodes."""
    gamma = world.mbpo.ppo.gamma
    deciders: dict[str, Decide] = {
        "policy": most_probable(result.policy),
    }
    for name, search in searches.items():
        deciders[name] = planning_decider(result.model, result.policy, search, gamma)
    scores, spent = {}, {}
    for name, decide in deciders.items():
        decisions, began = 0, time.process_time()

        def counted(obs: np.ndarray, masks: np.ndarray, decide: Decide = decide) -> np.ndarray:
            nonlocal decisions
            decisions += len(obs)
            return decide(obs, masks)

        scores[name] = world.score(play(world.build, counted, _episodes(world), FINAL_SEED))
        spent[name] = (time.process_time() - began) / max(decisions, 1)
    return QualityRun(seed=seed, real_steps=result.real_steps, scores=scores, seconds_per_decision=spent)


def planning_decider(model: WorldModel, policy: StrictMaskablePolicy, search: Search, gamma: float) -> Decide:
    """First actions of plans whose end is worth what the policy's value network says."""
    policy.set_training_mode(False)

    def value(obs: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = policy.predict_values(obs)
        return values.squeeze(1)

    joint = len(model.sizes.num_actions) > 1
    planning = JointWorldPlanning(model, hold=HOLD, value=value) if joint else WorldPlanning(model, value=value)
    objective = Objective(discount=gamma)
    ready = type(search)(**{**vars(search), "objective": objective})

    def plan(obs: torch.Tensor, masks: torch.Tensor) -> Plan:
        root = planning.roots(obs, masks)
        if isinstance(ready, Exhaustive):
            return ready.plan(planning, root)
        noise = ready.noise(1, len(model.sizes.num_actions), torch.Generator().manual_seed(0))
        return ready.plan(planning, root, noise=noise.expand(-1, len(obs), -1, -1, -1))

    def decide(obs: np.ndarray, masks: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(obs), MAX_ROWS):
            rows = slice(first, first + MAX_ROWS)
            found = plan(torch.as_tensor(obs[rows]), torch.as_tensor(np.asarray(masks)[rows]))
            parts.append(found.action.numpy())
        return np.concatenate(parts)

    return decide


def _episodes(world: EfficiencyWorld) -> int:
    return min(world.episodes, MAX_EPISODES)


def _world(name: str, smoke: bool) -> EfficiencyWorld:
    return smoke_world(WORLDS[name]) if smoke else WORLDS[name]


def _run(task: tuple[str, int, bool]) -> QualityRun:
    name, seed, smoke = task
    torch.set_num_threads(1)
    world = _world(name, smoke)
    judge = Judge(world)
    result = train_online(
        world.build,
        world.mbpo,
        seed=seed,
        evaluate=lambda policy, steps: {"score": judge.look(policy, steps)},
        known=world.known,
    )
    searches: Mapping[str, Search] = SEARCHES[name]
    if smoke:
        searches = dict(list(searches.items())[:1])
    return compare(world, result, searches, seed)


def _results(tasks: Sequence[tuple[str, int, bool]], jobs: int) -> Any:
    if jobs == 1:
        yield from map(_run, tasks)
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_run, task) for task in tasks]):
            yield done.result()
