"""Real steps that a policy needs with a learned world, and without one.

MBPO (`mbpo.train_online`, nothing declared as known unless asked for) against MaskablePPO, in one run, on the same
environment, masks, observations and rewards. Both are judged the same way: on episodes of an environment that neither
learns from, by their most probable actions, at even intervals of real steps. A learner has *solved* a world at the
first of them at which a first look reaches the goal and 100 fresh episodes confirm it, and stops there; its result is
judged once more on 100 others, so that stopping at a lucky moment shows. Judging costs no real steps for either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from benchmarks.machine import library_versions, machine
from benchmarks.sample_efficiency_worlds import WORLDS, EfficiencyWorld, PPOBaseline, smoke_world
from masking.strict_policy import StrictMaskablePolicy
from mbpo.online import BuildEnv, act, masked_ppo, train_online

LIBRARIES = ("gymnasium", "numpy", "sb3-contrib", "stable-baselines3", "torch")
LOOK_SEED, CONFIRM_SEED, FINAL_SEED = 1_000_001, 2_000_001, 3_000_001
"""Seeds of the episodes policies are judged on; learning seeds are small numbers."""
RESAMPLES = 10_000

Learner = Literal["mbpo", "maskable_ppo"]
LEARNERS: tuple[Learner, ...] = ("mbpo", "maskable_ppo")
Progress = Callable[[int, int, str], None]
Decide = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Actions [B] or [B, K] for obs [B, D] under masks [B, A]."""


@dataclass(frozen=True, kw_only=True)
class LearningRun:
    """One learner, one seed."""

    learner: Learner
    seed: int
    real_steps: tuple[int, ...]
    """When it was judged."""
    returns: tuple[float, ...]
    """Mean return of the first look at each of them."""
    solved_at: int | None
    """Real steps at which the goal was reached and confirmed; None if the budget ran out."""
    final_score: float
    """Mean of the episodes of the last judgement."""
    marks: dict[str, float]
    """Score at the world's marks, by real steps: of the last policy judged within them, on fresh episodes."""
    invalid_actions: int
    """Executed in the real environment against its mask."""
    seconds: float
    """Processor time of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Interquartile mean over seeds with its interval; None where there is one seed."""

    estimate: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class EfficiencyReport:
    """Both learners on one world."""

    world: str
    goal: float
    known: tuple[str, ...]
    """Parts of the world that were declared."""
    marks: tuple[int, ...]
    """Real steps at which scores are compared, beside the goal."""
    budgets: dict[str, int]
    """Real steps a run may take, by learner."""
    runs: tuple[LearningRun, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]

    def of(self, learner: Learner) -> tuple[LearningRun, ...]:
        """Runs of a learner, by seed."""
        return tuple(sorted((run for run in self.runs if run.learner == learner), key=lambda run: run.seed))

    def steps(self, learner: Learner) -> Summary:
        """Real steps to the goal; a run that did not reach it counts with its budget, which flatters it."""
        runs = self.of(learner)
        return summarise([run.solved_at or self.budgets[learner] for run in runs])

    def solved(self, learner: Learner) -> int:
        """How many runs reached the goal."""
        return sum(run.solved_at is not None for run in self.of(learner))

    def final(self, learner: Learner) -> Summary:
        """Mean return of the last judgement."""
        return summarise([run.final_score for run in self.of(learner)])

    def mark(self, learner: Learner, steps: str) -> Summary | None:
        """Mean return at a mark; None if a run was not judged there."""
        found = [run.marks[steps] for run in self.of(learner) if steps in run.marks]
        return summarise(found) if len(found) == len(self.of(learner)) else None

    @property
    def fewer_steps(self) -> float:
        """How many times fewer real steps MBPO takes; a lower bound if MaskablePPO did not reach the goal."""
        return self.steps("maskable_ppo").estimate / self.steps("mbpo").estimate

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        summary = {
            learner: {
                "steps_to_goal": asdict(self.steps(learner)),
                "solved": self.solved(learner),
                "final_score": asdict(self.final(learner)),
                "at_marks": {
                    str(mark): None if (found := self.mark(learner, str(mark))) is None else asdict(found)
                    for mark in self.marks
                },
            }
            for learner in LEARNERS
        }
        return {**asdict(self), "summary": summary, "fewer_steps": self.fewer_steps}


def measure_sample_efficiency(
    world: str,
    *,
    seeds: int = 10,
    jobs: int = 1,
    known: bool = False,
    smoke: bool = False,
    progress: Progress | None = None,
) -> EfficiencyReport:
    """Train both learners on every seed from 0 on.

    Args:
        world: one of WORLDS.
        jobs: processes; each run is one job of one thread.
        known: declare what is known of the world, where there is something to declare.
        smoke: counts that answer nothing but run everything.

    Raises: ValueError on a world that does not exist or a count below 1; RuntimeError if a forbidden action was
        executed.
    """
    if world not in WORLDS:
        raise ValueError(f"world: expected one of {sorted(WORLDS)}, was {world!r}")
    for name, count in {"seeds": seeds, "jobs": jobs}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, was {count}")
    # The longer jobs first, so that none is left alone at the end.
    tasks = [(world, learner, seed, known, smoke) for learner in reversed(LEARNERS) for seed in range(seeds)]
    runs = []
    for run in _results(tasks, jobs):
        runs.append(run)
        if progress is not None:
            progress(len(runs), len(tasks), f"{run.learner}, seed {run.seed}: {run.final_score:.1f}")
    chosen = _world(world, smoke)
    broken = [run for run in runs if run.invalid_actions]
    if broken:
        raise RuntimeError(f"expected 0 executed actions that their mask forbids, was {broken}")
    return EfficiencyReport(
        world=world,
        goal=chosen.goal,
        known=chosen.known.names if known else (),
        marks=chosen.marks,
        budgets={"mbpo": chosen.mbpo.max_real_steps, "maskable_ppo": chosen.baseline.max_real_steps},
        runs=tuple(sorted(runs, key=lambda run: (run.learner, run.seed))),
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """Interquartile mean of one value per seed, with the percentile bootstrap over seeds (arXiv:2108.13264).

    Args: values [S]. Returns: no interval for one seed. With few seeds percentile intervals are too narrow.
    """
    table = np.sort(np.asarray(values, dtype=np.float64))
    if len(table) < 2:
        return Summary(estimate=float(table[0]), low=None, high=None)
    drawn = np.random.default_rng(0).choice(table, size=(RESAMPLES, len(table)))
    low, high = np.quantile(_middle(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Summary(estimate=float(_middle(table[None])[0]), low=float(low), high=float(high))


def play(build: BuildEnv, decide: Decide, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes] of one episode each."""
    env = build(episodes, seed)
    obs: Any = env.reset()
    total, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        obs, reward, done, _ = env.step(decide(obs, env.action_masks()))
        total += reward * running
        running &= ~done
    return total


def most_probable(policy: StrictMaskablePolicy) -> Decide:
    """The policy's most probable valid actions."""
    return lambda obs, action_masks: act(policy, obs, action_masks, deterministic=True)


class Judge:
    """Looks at a policy at even intervals, with the same episodes for every learner."""

    def __init__(self, world: EfficiencyWorld) -> None:
        self._world = world
        self.steps: list[int] = []
        self.returns: list[float] = []
        self.marks: dict[str, float] = {}
        self.solved_at: int | None = None

    def look(self, policy: StrictMaskablePolicy, real_steps: int) -> float:
        """Mean return of a look; the confirmed one where the first reaches the goal."""
        world = self._world
        score = world.score(play(world.build, most_probable(policy), world.look_episodes, LOOK_SEED))
        self.steps.append(real_steps)
        self.returns.append(score)
        ahead = [mark for mark in world.marks if real_steps <= mark]
        if ahead:
            fresh = world.score(play(world.build, most_probable(policy), world.episodes, FINAL_SEED))
            self.marks |= {str(mark): fresh for mark in ahead}
        if score >= world.goal:
            confirmed = world.score(play(world.build, most_probable(policy), world.episodes, CONFIRM_SEED))
            if confirmed >= world.goal:
                self.solved_at = self.solved_at or real_steps
            return min(score, confirmed)
        return score

    @property
    def stop(self) -> bool:
        """Whether there is nothing left to find out."""
        return self._world.stop_when_solved and self.solved_at is not None

    def finish(
        self, learner: Learner, seed: int, policy: StrictMaskablePolicy, invalid: int, began: float
    ) -> LearningRun:
        """The run, with the last judgement of its policy."""
        final = play(self._world.build, most_probable(policy), self._world.episodes, FINAL_SEED)
        return LearningRun(
            learner=learner,
            seed=seed,
            real_steps=tuple(self.steps),
            returns=tuple(self.returns),
            solved_at=self.solved_at,
            final_score=self._world.score(final),
            marks=self.marks,
            invalid_actions=invalid,
            seconds=time.process_time() - began,
        )


def run_mbpo(world: EfficiencyWorld, seed: int, *, known: bool = False) -> LearningRun:
    """Learn with a learned world."""
    began, judge = time.process_time(), Judge(world)

    def evaluate(policy: StrictMaskablePolicy, real_steps: int) -> Mapping[str, float]:
        return {"score": judge.look(policy, real_steps)}

    result = train_online(
        world.build,
        world.mbpo,
        seed=seed,
        evaluate=evaluate,
        known=world.known if known else None,
    )
    return judge.finish("mbpo", seed, result.policy, int(result.history[-1]["invalid_actions"]), began)


def run_baseline(world: EfficiencyWorld, seed: int) -> LearningRun:
    """Learn from real steps alone."""
    began, judge, settings = time.process_time(), Judge(world), world.baseline
    env = world.build(settings.num_envs, seed)
    ppo = masked_ppo(
        env,
        settings.ppo,
        n_steps=settings.n_steps,
        seed=seed,
        safe_action=None,
        learning_rate=LinearSchedule(settings.ppo.learning_rate, 0.0, 1.0) if settings.anneal else None,
    )
    watch = _Watch(judge, settings)
    ppo.learn(settings.max_real_steps, callback=watch)
    if not judge.stop:
        watch.look()
    # The best of its looks, as the other learner keeps the best of its epochs.
    ppo.policy.load_state_dict(watch.best)
    return judge.finish("maskable_ppo", seed, ppo.policy, env.audit.invalid, began)


class _Watch(BaseCallback):
    # Judges at even intervals and stops the learner once it has solved the world.

    def __init__(self, judge: Judge, settings: PPOBaseline) -> None:
        super().__init__()
        self._judge, self._interval, self._next = judge, settings.look_interval, settings.look_interval
        self.best: dict[str, torch.Tensor] = {}
        self._best_score, self._seen = -math.inf, 0

    def look(self) -> None:
        if self._seen == self.num_timesteps:
            return
        self._seen = self.num_timesteps
        policy = self.model.policy
        assert isinstance(policy, StrictMaskablePolicy)  # noqa: S101 - built in this module
        score = self._judge.look(policy, self.num_timesteps)
        if not self.best or score > self._best_score:
            self._best_score = score
            self.best = {key: value.detach().clone() for key, value in self.model.policy.state_dict().items()}

    def _on_rollout_start(self) -> None:
        # The previous update is complete here, so this is where the policy is what its steps have made it.
        if self.num_timesteps >= self._next:
            self.look()
            self._next += self._interval

    def _on_step(self) -> bool:
        return not self._judge.stop


def _world(name: str, smoke: bool) -> EfficiencyWorld:
    return smoke_world(WORLDS[name]) if smoke else WORLDS[name]


def _run(task: tuple[str, Learner, int, bool, bool]) -> LearningRun:
    name, learner, seed, known, smoke = task
    torch.set_num_threads(1)
    world = _world(name, smoke)
    return run_mbpo(world, seed, known=known) if learner == "mbpo" else run_baseline(world, seed)


# Processes of the standard library: runs are few and long, and nothing has to be shared.
def _results(tasks: Sequence[tuple[str, Learner, int, bool, bool]], jobs: int) -> Any:
    if jobs == 1:
        yield from map(_run, tasks)
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_run, task) for task in tasks]):
            yield done.result()


# Mean of the middle half, with the weights of a fractional trim: with 10 seeds 2.5 are cut on either side.
def _middle(rows: np.ndarray) -> np.ndarray:
    ordered = np.sort(rows, axis=1)
    count = rows.shape[1]
    edges = np.arange(count + 1, dtype=np.float64)
    inside = np.minimum(edges[1:], 0.75 * count) - np.maximum(edges[:-1], 0.25 * count)
    weights = np.maximum(inside, 0.0)
    return np.asarray((ordered * weights).sum(axis=1) / weights.sum())
