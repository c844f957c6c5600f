"""The sample-efficiency benchmark: what counts as solved, and that both learners run on every world."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import sample_efficiency as benchmark
from benchmarks.sample_efficiency import (
    EfficiencyReport,
    Judge,
    LearningRun,
    Summary,
    measure_sample_efficiency,
    summarise,
)
from benchmarks.sample_efficiency_worlds import BUTTONS, WORLDS, OneHotCartPole, TimelessPortfolio
from envs.portfolio import INITIAL_CASH


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_both_learners_run_on_every_world_in_smoke(world):
    done = []
    report = measure_sample_efficiency(world, seeds=1, smoke=True, progress=lambda *given: done.append(given[:2]))
    written = json.loads(json.dumps(report.to_dict()))
    assert [run["learner"] for run in written["runs"]] == ["maskable_ppo", "mbpo"]
    assert all(run["invalid_actions"] == 0 for run in written["runs"])
    assert all(np.isfinite([*run["returns"], run["final_score"]]).all() for run in written["runs"])
    assert report.of("mbpo")[0].real_steps == (100, 160)
    assert done == [(1, 2), (2, 2)]
    assert report.known == ()


def test_known_parts_are_declared_when_asked_for():
    report = measure_sample_efficiency("masked-cartpole", seeds=1, smoke=True, known=True)
    assert report.known == ("action_masks", "reward", "terminated")


def test_the_same_seed_gives_the_same_run():
    first, again = (measure_sample_efficiency("cartpole", seeds=1, smoke=True) for _ in range(2))
    for one, other in zip(first.runs, again.runs, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


@pytest.mark.parametrize("world", ["cartpole", "acrobot"])
def test_what_could_be_declared_is_what_the_environment_does(world):
    env, known = WORLDS[world].build(20, 0), WORLDS[world].known
    obs, rng = env.reset(), np.random.default_rng(0)
    ended = 0
    for _ in range(120):
        if world == "acrobot" and rng.random() < 0.3:
            # Random play never swings up; put some arms there.
            for inner in env._envs:
                inner.unwrapped.state = np.array([*rng.uniform(-3, 3, 2), *rng.uniform(-4, 4, 2)])
        actions = rng.integers(0, env.action_space.n, 20)
        following, reward, done, infos = env.step(actions)
        reached = following.copy()
        for row in np.flatnonzero(done):
            reached[row] = infos[row]["terminal_observation"]
        tensors = torch.from_numpy(obs), torch.from_numpy(actions[:, None]), torch.from_numpy(reached)
        terminated = done & ~np.array([info.get("TimeLimit.truncated", False) for info in infos])
        np.testing.assert_array_equal(known.terminated(tensors[2]).numpy(), terminated)
        np.testing.assert_array_equal(known.reward(*tensors).numpy(), reward)
        ended += int(terminated.sum())
        obs = following
    assert ended > 10


def test_one_hot_buttons_are_the_mask():
    env = OneHotCartPole(50, seed=0)
    obs = env.reset()
    assert obs.shape == (50, 4 + 2 * BUTTONS)
    assert env.observation_space.contains(obs[0])
    masks = env.action_masks()
    np.testing.assert_array_equal((obs[:, 4 : 4 + BUTTONS] + obs[:, 4 + BUTTONS :]) > 0, masks)
    np.testing.assert_array_equal(WORLDS["masked-cartpole"].known.action_masks(torch.from_numpy(obs)).numpy(), masks)


def test_portfolio_rewards_add_up_to_what_the_published_reward_pays_and_time_is_not_seen():
    env, rng = TimelessPortfolio(30, seed=0), np.random.default_rng(0)
    obs, total = env.reset(), np.zeros(30)
    assert obs.shape == (30, 7)
    for _ in range(19):
        scores = np.where(env.action_masks(), rng.random((30, 33)), -1.0).reshape(30, 3, 11)
        step = env._advance(scores.argmax(axis=2))
        total += step.reward
    assert step.terminated.all()
    np.testing.assert_allclose(INITIAL_CASH * (1 + total), env.portfolio.value, rtol=1e-6)


def world_of(scores, **options):
    """A judged world whose looks return the given scores one after another."""
    remaining = iter(scores)

    class Scripted:
        def __init__(self, episodes, seed):
            self.num_envs = episodes

    world = dataclasses.replace(WORLDS["cartpole"], build=Scripted, goal=10.0, look_episodes=1, episodes=2, **options)
    return world, lambda build, policy, episodes, seed: np.full(episodes, next(remaining))


def test_a_goal_counts_when_fresh_episodes_confirm_it(monkeypatch):
    world, play = world_of([9.0, 11.0, 9.5, 12.0, 10.5])
    monkeypatch.setattr(benchmark, "play", play)
    judge = Judge(world)
    assert judge.look(None, 100) == 9.0
    assert judge.look(None, 200) == 9.5  # a lucky look is not confirmed, and worth what the fresh episodes say
    assert (judge.solved_at, judge.stop) == (None, False)
    assert judge.look(None, 300) == 10.5
    assert (judge.solved_at, judge.stop) == (300, True)
    assert (judge.steps, judge.returns) == ([100, 200, 300], [9.0, 11.0, 12.0])


def test_a_mark_holds_the_last_policy_within_it(monkeypatch):
    world, play = world_of([1.0, 5.0, 2.0, 6.0, 3.0], marks=(200,))
    monkeypatch.setattr(benchmark, "play", play)
    judge = Judge(world)
    for steps in (100, 200, 300):
        judge.look(None, steps)
    assert judge.marks == {"200": 6.0}


def run_of(learner, seed, solved_at, final=500.0):
    return LearningRun(
        learner=learner,
        seed=seed,
        real_steps=(100,),
        returns=(1.0,),
        solved_at=solved_at,
        final_score=final,
        marks={},
        invalid_actions=0,
        seconds=1.0,
    )


def test_a_run_that_never_gets_there_counts_with_its_budget():
    runs = [
        run_of("mbpo", 0, 400),
        run_of("mbpo", 1, 600),
        run_of("maskable_ppo", 0, None),
        run_of("maskable_ppo", 1, 4000),
    ]
    budgets = {"mbpo": 2000, "maskable_ppo": 6000}
    report = EfficiencyReport(
        world="cartpole", goal=475.0, known=(), marks=(), budgets=budgets, runs=tuple(runs), machine={}, versions={}
    )
    assert report.steps("maskable_ppo").estimate == 5000.0
    assert (report.solved("maskable_ppo"), report.solved("mbpo")) == (1, 2)
    assert report.fewer_steps == 10.0


def test_interquartile_mean_cuts_a_quarter_at_either_end():
    # of 8, the middle 4; of 10, half of the third and of the eighth and all between
    assert summarise([0, 0, 1, 2, 3, 4, 100, 200]).estimate == pytest.approx(2.5)
    ten = [-1000, 0, 1, 2, 3, 4, 5, 6, 7, 9999]
    assert summarise(ten).estimate == pytest.approx((0.5 * 1 + 2 + 3 + 4 + 5 + 0.5 * 6) / 5)
    found = summarise(ten)
    assert found.low < found.estimate < found.high
    assert summarise([7.0]) == Summary(estimate=7.0, low=None, high=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": "pong"}, "world: expected one of .*'acrobot'.*, was 'pong'"),
        ({"world": "cartpole", "seeds": 0}, "seeds: expected at least 1, was 0"),
        ({"world": "cartpole", "jobs": 0}, "jobs: expected at least 1, was 0"),
    ],
)
def test_bad_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure_sample_efficiency(**options)
