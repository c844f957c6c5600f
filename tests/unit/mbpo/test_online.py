"""The online loop on a point that is to stay in the middle of a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking.strict_policy import StrictMaskablePolicy
from mbpo import online
from mbpo.online import OnlineConfig, PPOSettings, act, prediction_error, train_online
from mbpo.ramp import Ramp
from world_model.known import KnownParts
from world_model.world_fit import WorldFitConfig


class Line(BatchVecEnv):
    """x in [-1, 1]; actions: 0 left, 1 right, by 0.1, 2 never valid; the reward is 1 - |x|, beyond the ends it is over.

    20 steps at most. Uniform play earns about half of what going to the middle earns.
    """

    def __init__(self, num_envs: int, seed: int) -> None:
        super().__init__(num_envs, spaces.Box(-2.0, 2.0, (1,), np.float32), spaces.Discrete(3))
        self.x, self.steps = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self._rng = np.random.default_rng(seed)

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        return (self.x if rows is None else self.x[rows])[:, None].astype(np.float32)

    @property
    def _masks(self) -> np.ndarray:
        return np.tile([True, True, False], (self.num_envs, 1))

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.x[rows], self.steps[rows] = self._rng.uniform(-0.9, 0.9, len(rows)), 0

    def _advance(self, actions: np.ndarray) -> BatchStep:
        self.x = self.x + 0.1 * (2 * actions - 1)
        self.steps = self.steps + 1
        ended = np.abs(self.x) > 1.0
        return BatchStep(1.0 - np.abs(self.x), ended, (self.steps >= 20) & ~ended)


def mean_return(policy: StrictMaskablePolicy, episodes: int = 200) -> float:
    env = Line(episodes, seed=10_000)
    obs: Any = env.reset()
    total, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        obs, reward, done, _ = env.step(act(policy, obs, env.action_masks(), deterministic=True))
        total += reward * running
        running &= ~done
    return float(total.mean())


def score(policy: StrictMaskablePolicy, real_steps: int) -> Mapping[str, float]:
    return {"score": mean_return(policy)}


SMALL = OnlineConfig(
    max_real_steps=200,
    initial_steps=120,
    steps_per_epoch=80,
    imagined_steps=8_000,
    num_envs=80,
    horizon=Ramp(10, 10),
    world=WorldFitConfig(num_members=3, num_elites=2, hidden=(16,), max_epochs=25, batch_size=32, learning_rate=1e-2),
    ppo=PPOSettings(learning_rate=5e-3, batch_size=400, n_epochs=4, net_arch=(16,), gamma=0.9),
)
TINY = dataclasses.replace(SMALL, imagined_steps=800, world=dataclasses.replace(SMALL.world, max_epochs=2, hidden=(8,)))


def run(config: OnlineConfig, evaluate: online.Evaluate = score, **options: Any) -> online.OnlineResult:
    return train_online(Line, config, seed=0, evaluate=evaluate, **options)


def scripted(scores: list[float]) -> online.Evaluate:
    remaining = iter(scores)
    return lambda *_: {"score": next(remaining)}


def test_200_real_steps_suffice_with_the_model_and_not_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = run(SMALL).best_score
    # The same loop, imagining a world in which nothing moves and nothing pays.
    still = KnownParts(
        transition=lambda obs, action, next_obs: obs,
        exact=(0,),
        reward=lambda obs, action, next_obs: 0 * obs[:, 0],
        terminated=lambda next_obs: next_obs[:, 0] > 9,
    )
    blind = run(SMALL, known=still).best_score
    assert learned > 15.0
    assert blind < 13.0


def test_the_history_tells_steps_errors_and_that_no_forbidden_action_was_executed() -> None:
    seen: list[Mapping[str, float]] = []
    steps: list[tuple[int, int]] = []
    result = run(TINY, log=seen.append, progress=lambda done, total: steps.append((done, total)))
    assert [entry["real_steps"] for entry in result.history] == [120, 200]
    assert "model_error" not in seen[0]  # nothing was predicted before the first fit
    assert seen[1]["model_error"] > 0
    assert all(entry["invalid_actions"] == 0 for entry in seen)
    assert seen[1]["executed_actions"] == 200 + 2 * 800
    assert steps == [(120, 200), (200, 200)]
    assert {"imagined_raw_reward", "penalty_share", "real_return", "horizon"} <= set(seen[0])
    assert len(result.experience) == result.real_steps == 200


def test_the_best_epoch_is_kept_not_the_last() -> None:
    weights: list[dict[str, torch.Tensor]] = []
    scores = iter([1.0, 3.0, 2.0])

    def evaluate(policy: StrictMaskablePolicy, real_steps: int) -> Mapping[str, float]:
        weights.append({key: value.clone() for key, value in policy.state_dict().items()})
        return {"score": next(scores)}

    result = run(dataclasses.replace(TINY, max_real_steps=280), evaluate)
    assert (result.best_score, result.best_real_steps, result.real_steps) == (3.0, 200, 280)
    for key, value in result.policy.state_dict().items():
        assert torch.equal(value, weights[1][key])
    assert any(not torch.equal(weights[1][key], weights[2][key]) for key in weights[1])


def test_it_stops_when_solved_or_when_nothing_gets_better() -> None:
    endless = dataclasses.replace(TINY, max_real_steps=10_000)
    assert run(dataclasses.replace(endless, stop_score=2.0), scripted([1.0, 2.0])).real_steps == 200
    assert run(dataclasses.replace(endless, patience=2), scripted([5.0, 1.0, 4.0])).best_score == 5.0


def test_the_same_seed_learns_the_same_weights() -> None:
    first, again = (run(TINY, scripted([1.0, 2.0])) for _ in range(2))
    for key, value in first.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[key])
    np.testing.assert_array_equal(first.experience.obs, again.experience.obs)


def test_real_rows_of_the_mix_collect_while_they_learn() -> None:
    config = dataclasses.replace(TINY, real_ratio=0.05, max_real_steps=200)  # 4 of 80 rows
    result = run(config, scripted([1.0, 2.0, 3.0]))
    # 120 random steps, then 4 rows for 10 steps in one rollout of 800
    assert [entry["real_steps"] for entry in result.history] == [160.0, 200.0]
    assert result.history[0]["invalid_actions"] == 0


def test_collecting_explores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(*arguments: Any, deterministic: bool) -> np.ndarray:
        asked.append(deterministic)
        return act(*arguments, deterministic=deterministic)

    monkeypatch.setattr(online, "act", recorded)
    run(TINY, scripted([1.0, 2.0]))
    assert asked == [False] * 80


def test_episodes_are_cut_where_it_is_asked_for() -> None:
    config = dataclasses.replace(TINY, initial_episode_steps=3, episode_steps=5)
    rows = run(config, scripted([1.0, 2.0])).experience
    lengths = np.unique(rows.episode, return_counts=True)[1]
    assert lengths[:10].max() == 3
    assert lengths.max() == 5


def test_the_horizon_follows_its_schedule() -> None:
    result = run(
        dataclasses.replace(TINY, horizon=Ramp(5, 10, 120, 200)),
        scripted([1.0, 2.0]),
    )
    assert [entry["horizon"] for entry in result.history] == [5, 10]


def test_a_forbidden_action_in_the_audit_stops_the_loop() -> None:
    def build(num_envs: int, seed: int) -> BatchVecEnv:
        env = Line(num_envs, seed)
        env.audit.invalid = 1
        return env

    with pytest.raises(RuntimeError, match="expected 0 executed actions that their mask forbids, was 1"):
        train_online(build, TINY, seed=0, evaluate=score)


def test_prediction_error_of_a_world_that_is_known_is_nothing() -> None:
    result = run(TINY, scripted([1.0, 2.0]))
    assert 0 < prediction_error(result.model, result.experience) < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real_ratio": 1.0}, "real_ratio: expected at least 0 and below 1, was 1.0"),
        ({"imagined_steps": 0}, "imagined_steps: expected at least 1, was 0"),
        ({"horizon": Ramp(0, 3)}, "horizon: expected at least 1 step at both ends, was Ramp"),
        ({"patience": 0}, "patience: expected at least 1 or None, was 0"),
    ],
)
def test_contradictory_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="activation: expected one of"):
        PPOSettings(activation="sine")
