"""Imagined branches of worlds worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking import InvalidActionError
from mbpo.imagined_env import ImaginedVecEnv
from mbpo.real_rows import RealRows, random_actions
from world_model import Normaliser
from world_model.experience import Experience
from world_model.known import KnownParts
from world_model.world import WorldModel, WorldSizes

SPACE = spaces.Box(-100.0, 100.0, (1,), np.float32)


def masks_at(obs: torch.Tensor) -> torch.Tensor:
    # Action 1 is closed from 3 on; beyond 90 nothing is open.
    x = obs[:, 0]
    return torch.stack((x < 90, x < 3), dim=1)


def counting_world(*, end: float = 1e9, support: float = 50.0, disagree: float = 0.0) -> WorldModel:
    """x grows by the action plus 1, the reward is the new x, the world ends beyond `end`; two members, both elite."""
    sizes = WorldSizes(num_obs=1, num_actions=(2,), num_members=2, hidden=(2,), terminates=False)
    dynamics, _ = sizes.networks(torch.Generator())
    with torch.no_grad():
        for weight in dynamics.weights:
            weight.zero_()
        dynamics.biases[-1][0, 0, 0] = disagree
    one = torch.ones(1)
    return WorldModel(
        sizes,
        KnownParts(
            action_masks=masks_at,
            transition=lambda obs, action, next_obs: obs + 1 + action,
            reward=lambda obs, action, next_obs: next_obs[:, 0],
            terminated=lambda next_obs: next_obs[:, 0] > end,
        ),
        inputs=Normaliser(0 * one, one),
        targets=Normaliser(torch.zeros(2), torch.ones(2)),
        dynamics=dynamics,
        termination=None,
        elites=(0, 1),
        termination_elites=(),
        support=(-support * one, support * one),
        masks=None,
    )


def starts(*episodes: list[float]) -> Experience:
    obs = np.concatenate([np.array(values, np.float32) for values in episodes])[:, None]
    rows = len(obs)
    return Experience(
        obs=obs,
        action=np.zeros((rows, 1), np.int64),
        reward=np.zeros(rows, np.float32),
        next_obs=obs,
        terminated=np.zeros(rows, bool),
        action_masks=np.ones((rows, 2), bool),
        episode=np.repeat(np.arange(len(episodes)), [len(values) for values in episodes]),
        num_actions=(2,),
    )


def imagined(model: WorldModel, experience: Experience, rows: int = 2, **options: object) -> ImaginedVecEnv:
    env = ImaginedVecEnv(SPACE, spaces.Discrete(2), num_envs=rows, seed=0, **options)  # type: ignore[arg-type]
    env.use(model, experience)
    env.rebranch()
    return env


def test_a_branch_follows_the_model_from_a_replayed_state() -> None:
    env = imagined(counting_world(), starts([0.0]))
    obs, reward, done, _ = env.step(np.array([0, 1]))
    assert obs[:, 0].tolist() == [1.0, 2.0]
    assert reward.tolist() == [1.0, 2.0]
    assert not done.any()


def test_a_branch_stops_where_termination_is_modelled_and_earns_nothing_after_it() -> None:
    env = imagined(counting_world(end=1.5), starts([0.0]))
    obs, reward, done, infos = env.step(np.array([0, 1]))
    assert reward.tolist() == [1.0, 2.0]  # what got it there still counts
    assert done.tolist() == [False, True]
    assert infos[1]["terminal_observation"].tolist() == [2.0]
    assert infos[1]["TimeLimit.truncated"] is False
    assert obs[:, 0].tolist() == [1.0, 0.0]  # a fresh branch
    assert env.step(np.array([0, 0]))[1].tolist() == [2.0, 1.0]
    assert env.take_statistics()["imagined_termination_rate"] == 0.5


def test_a_branch_that_leaves_the_support_is_truncated_inside_it_and_counted() -> None:
    env = imagined(counting_world(support=1.5), starts([0.0]))
    _, _, done, infos = env.step(np.array([0, 1]))
    assert done.tolist() == [False, True]
    assert infos[1]["TimeLimit.truncated"] is True
    assert infos[1]["terminal_observation"].tolist() == [1.5]
    statistics = env.take_statistics()
    assert statistics["imagined_out_of_support_rate"] == 0.5
    assert statistics["imagined_refused_rate"] == 0.0
    assert env.take_statistics()["imagined_out_of_support_rate"] == 0.0


def test_a_state_without_a_valid_action_truncates_the_branch() -> None:
    env = imagined(counting_world(support=1000), starts([89.5]))
    _, _, done, infos = env.step(np.array([0, 0]))
    assert done.all()
    assert infos[0]["TimeLimit.truncated"] is True
    assert env.action_masks().all()  # of the fresh branch, as recorded
    assert env.take_statistics()["imagined_refused_rate"] == 1.0


def test_the_mask_of_an_imagined_state_holds() -> None:
    env = imagined(counting_world(), starts([2.0]))
    env.step(np.array([0, 1]))
    assert env.action_masks().tolist() == [[True, False], [True, False]]
    with pytest.raises(InvalidActionError):
        env.step(np.array([0, 1]))
    assert (env.audit.executed, env.audit.invalid) == (2, 0)


def test_the_penalty_is_charged_per_unit_of_disagreement() -> None:
    # One output is left, the reward is declared: both members' columns are off, so make the measure see them.
    model = counting_world(disagree=4.0)
    env = imagined(model, starts([0.0]), penalty_coef=0.5, uncertainty="max_pairwise")
    reward = env.step(np.array([0, 1]))[1]
    assert reward.tolist() == [1.0 - 0.5 * 4.0, 2.0 - 0.5 * 4.0]
    statistics = env.take_statistics()
    assert statistics["imagined_raw_reward"] == 1.5
    assert statistics["imagined_penalised_reward"] == -0.5
    assert statistics["penalty_share"] == pytest.approx(4.0 / 3.0)


def test_the_share_of_the_penalty_is_of_the_size_of_rewards_not_of_their_sum() -> None:
    # Rewards -1 and 3 are of size 4 and sum up to 2.
    model = counting_world(disagree=4.0)
    env = imagined(model, starts([-2.0], [1.0]), rows=64, penalty_coef=0.5, uncertainty="max_pairwise")
    reward = env.step(np.tile([0, 1], 32))[1] + 2.0
    assert reward.min() < 0.0 < reward.max()
    assert env.take_statistics()["penalty_share"] == pytest.approx(2.0 / np.abs(reward).mean())


def test_starts_weigh_episodes_equally_however_short() -> None:
    env = imagined(counting_world(), starts([0.0] * 99, [5.0]), rows=4000)
    assert float((env.rebranch()[:, 0] == 5.0).mean()) == pytest.approx(0.5, abs=0.03)


def test_branches_start_where_episodes_began_when_asked_to() -> None:
    env = imagined(counting_world(), starts([1.0, 5.0, 5.0, 5.0], [2.0, 6.0]), rows=400, first_share=1.0)
    assert set(env.rebranch()[:, 0].tolist()) == {1.0, 2.0}
    env = imagined(counting_world(), starts([1.0, 5.0, 5.0, 5.0]), rows=4000, first_share=0.5)
    assert float((env.rebranch()[:, 0] == 1.0).mean()) == pytest.approx(0.625, abs=0.03)
    with pytest.raises(ValueError, match="first_share: expected between 0 and 1, was 2"):
        imagined(counting_world(), starts([1.0]), first_share=2.0)


def test_leaving_the_support_is_charged_once() -> None:
    env = imagined(counting_world(support=1.5), starts([0.0]), support_penalty=7.0)
    assert env.step(np.array([0, 1]))[1].tolist() == [1.0, 2.0 - 7.0]


def test_the_same_seed_branches_the_same() -> None:
    experience = starts([*range(10)])
    first, again = (imagined(counting_world(), experience, rows=20).rebranch() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_nothing_is_imagined_without_a_model() -> None:
    env = ImaginedVecEnv(SPACE, spaces.Discrete(2), num_envs=2, seed=0)
    with pytest.raises(RuntimeError, match=r"expected use\(model, experience\)"):
        env.reset()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="penalty_coef: expected at least 0, was -1"):
        ImaginedVecEnv(SPACE, spaces.Discrete(2), num_envs=2, seed=0, penalty_coef=-1)
    real = RealRows(Counter(2))
    with pytest.raises(ValueError, match="num_envs: expected more than the 2 real rows, was 2"):
        ImaginedVecEnv(SPACE, spaces.Discrete(2), num_envs=2, seed=0, real=real)


class Counter(BatchVecEnv):
    """The same world for real, a hundred further on: it ends at 103."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, SPACE, spaces.Discrete(2))
        self.x = np.zeros(num_envs)

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        x = self.x if rows is None else self.x[rows]
        return x[:, None].astype(np.float32)

    @property
    def _masks(self) -> np.ndarray:
        return np.ones((self.num_envs, 2), dtype=bool)

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.x[rows] = 100.0

    def _advance(self, actions: np.ndarray) -> BatchStep:
        self.x = self.x + 1 + actions
        ended = self.x >= 103
        return BatchStep(self.x.copy(), ended & (self.x < 104), self.x >= 104)


def test_real_rows_record_what_happened_with_terminations_cuts_and_episodes() -> None:
    real = RealRows(Counter(2))
    real.step(np.array([0, 1]))
    step = real.step(np.array([0, 1]))  # rows at 102 and 104
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False, False], [False, True])
    assert real.obs[:, 0].tolist() == [102.0, 104.0]
    with pytest.raises(ValueError, match=r"rows \[1\]: expected a restart, was a step"):
        real.step(np.array([0, 0]))
    real.restart(np.array([1]))
    assert real.obs[:, 0].tolist() == [102.0, 100.0]
    real.cut(np.array([0]))
    assert real.obs[:, 0].tolist() == [100.0, 100.0]
    assert real.returns == [206.0, 203.0]
    real.step(np.array([1, 1]))
    step = real.step(np.array([0, 1]))
    assert step.terminated.tolist() == [True, False]
    rows = real.experience()
    assert rows.episode.tolist() == [0, 1, 0, 1, 3, 2, 3, 2]
    assert rows.obs[:, 0].tolist() == [100, 100, 101, 102, 100, 100, 102, 102]
    assert rows.next_obs[:, 0].tolist() == [101, 102, 102, 104, 102, 102, 103, 104]
    assert rows.terminated.tolist() == [False] * 6 + [True, False]
    assert (real.steps, len(real.experience(3))) == (8, 2)


def test_real_and_imagined_rows_step_side_by_side() -> None:
    real = RealRows(Counter(1))
    env = imagined(counting_world(), starts([0.0]), rows=3, real=real)
    assert env.reset()[:, 0].tolist() == [100.0, 0.0, 0.0]
    for _ in range(2):
        obs, _, done, _ = env.step(np.array([0, 0, 1]) * (env.action_masks()[:, 1]))
    assert obs[:, 0].tolist() == [102.0, 2.0, 3.0 if env.model is None else obs[2, 0]]
    obs, reward, done, infos = env.step(np.zeros(3, dtype=np.int64))
    assert done.tolist() == [True, False, False]
    assert infos[0]["terminal_observation"].tolist() == [103.0]
    assert obs[0, 0] == 100.0
    assert reward[0] == 103.0
    assert env.rebranch()[:, 0].tolist() == [100.0, 0.0, 0.0]  # real rows go on
    assert real.steps == 3


def test_random_actions_are_valid_and_uniform_in_every_dimension() -> None:
    masks = np.tile(np.array([True, False, True, False, True, True]), (6000, 1))
    chosen = random_actions(masks, (3, 3), np.random.default_rng(0))
    assert chosen.shape == (6000, 2)
    assert np.bincount(chosen[:, 0], minlength=3)[1] == 0
    assert np.bincount(chosen[:, 0])[0] == pytest.approx(3000, abs=150)
    assert np.bincount(chosen[:, 1], minlength=3)[0] == 0
    assert random_actions(masks[:, :3], (3,), np.random.default_rng(0)).shape == (6000,)
