"""Masked double DQN on worlds with a known optimum: masks in exploration, target, replay and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy

from envs.batch import BatchStep, BatchVecEnv
from masking import InvalidMaskError, MaskingError, MissingMaskError
from masking.dqn import MaskedDQN, MaskedReplayBuffer
from masking.wrappers import MaskToInfo

STAY, LEFT, RIGHT = 0, 1, 2
CELLS = 5
OBS = np.eye(CELLS, dtype=np.float32)
# By cell: no wall can be walked into, and the middle cell does not let you stay.
MASKS = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=bool)
MOVE = np.array([0, -1, 1])
GOAL = CELLS - 1
GAMMA = 0.9


class Corridor(gymnasium.Env):
    """One row: walk to the rightmost cell, which pays 1 and ends the episode. A forbidden action raises."""

    observation_space = spaces.Box(0.0, 1.0, (CELLS,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(GOAL))
        return OBS[self.cell], {}

    def step(self, action: Any):
        assert MASKS[self.cell, action]
        self.cell += int(MOVE[action])
        return OBS[self.cell], float(self.cell == GOAL), self.cell == GOAL, False, {}

    def action_masks(self) -> np.ndarray:
        return MASKS[self.cell]


class CorridorRows(BatchVecEnv):
    """Many rows in one call; episodes are cut after four steps, so that most end by truncation."""

    def __init__(self, num_envs: int, seed: int = 0) -> None:
        super().__init__(num_envs, Corridor.observation_space, Corridor.action_space)
        self.rng = np.random.default_rng(seed)
        self.cell, self.age = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=np.int64)

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        return OBS[self.cell if rows is None else self.cell[rows]]

    @property
    def _masks(self) -> np.ndarray:
        return MASKS[self.cell]

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.cell[rows] = self.rng.integers(GOAL, size=len(rows))
        self.age[rows] = 0

    def _advance(self, actions: np.ndarray) -> BatchStep:
        self.cell, self.age = self.cell + MOVE[actions], self.age + 1
        arrived = self.cell == GOAL
        return BatchStep(arrived.astype(np.float64), arrived, (self.age >= 4) & ~arrived)


class Trap(gymnasium.Env):
    """Action 1 pays 1 at once; action 0 leads to a dead end worth 0. Action 2 is never valid."""

    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.dead_end = 0
        return np.eye(2, dtype=np.float32)[0], {}

    def step(self, action: Any):
        assert self.action_masks()[action]
        ends = bool(self.dead_end or action == 1)
        self.dead_end = 1
        return np.eye(2, dtype=np.float32)[1], float(action), ends, False, {}

    def action_masks(self) -> np.ndarray:
        return np.array([True, not self.dead_end, False])


def learner(env: Any, kind: type[MaskedDQN] = MaskedDQN, **kwargs: Any) -> MaskedDQN:
    """A linear network over one-hot observations: a table, with one bias per action."""
    settings = {
        "learning_rate": 0.02, "learning_starts": 64, "batch_size": 64, "buffer_size": 20_000, "gamma": GAMMA,
        "train_freq": 1, "target_update_interval": 64, "exploration_fraction": 0.5, "exploration_final_eps": 0.2,
        "policy_kwargs": {"net_arch": []}, "seed": 3, "device": "cpu", "safe_action": None,
    }  # fmt: skip
    return kind("MlpPolicy", env, **(settings | kwargs))


def values_of(model: MaskedDQN, obs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.q_net(torch.as_tensor(obs)).numpy()


@pytest.fixture(scope="module")
def corridor() -> tuple[MaskedDQN, CorridorRows]:
    env = CorridorRows(8)
    return learner(env).learn(6_000), env


# --- learning ----------------------------------------------------------------------------------------------------


def test_batched_rows_learn_the_known_optimum_without_one_forbidden_action(corridor) -> None:
    model, env = corridor
    cells = np.arange(GOAL)
    actions, _ = model.predict(OBS[cells], deterministic=True, action_masks=MASKS[cells])
    assert actions.tolist() == [RIGHT] * GOAL
    # Right from cell c pays 1 after GOAL - c steps.
    np.testing.assert_allclose(values_of(model, OBS[cells])[:, RIGHT], GAMMA ** (GOAL - 1 - cells), atol=0.03)
    # Staying costs one step, going left costs two.
    assert values_of(model, OBS)[1, STAY] == pytest.approx(GAMMA**3, abs=0.05)
    assert values_of(model, OBS)[2, LEFT] == pytest.approx(GAMMA**3, abs=0.05)
    assert env.audit.executed == 6_000
    assert env.audit.invalid == 0


def test_single_environments_learn_too() -> None:
    model = learner(DummyVecEnv([Corridor, Corridor])).learn(2_000)  # a forbidden action would raise
    cells = np.arange(GOAL)
    actions, _ = model.predict(OBS[cells], deterministic=True, action_masks=MASKS[cells])
    assert actions.tolist() == [RIGHT] * GOAL


class UnmaskedTarget(MaskedDQN):
    """Explores and acts under masks, but bootstraps from every action."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.replay_buffer.next_action_masks[:] = True
        super().train(gradient_steps, batch_size)


@pytest.mark.parametrize(("kind", "action", "value"), [(MaskedDQN, 1, 0.0), (UnmaskedTarget, 0, 4.5)])
def test_without_the_mask_in_the_target_the_trap_is_taken(kind: type[MaskedDQN], action: int, value: float) -> None:
    # The forbidden action is never tried, so its optimistic value of 5 is never corrected: 0.9 * 5 beats 1.
    model = learner(Trap(), kind)
    with torch.no_grad():
        for network in (model.q_net, model.q_net_target):
            network.q_net[0].weight.zero_()
            network.q_net[0].bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    model.learn(900)
    start, masks = np.eye(2, dtype=np.float32)[:1], np.array([[True, True, False]])
    assert model.predict(start, deterministic=True, action_masks=masks)[0].tolist() == [action]
    assert values_of(model, start)[0, 0] == pytest.approx(value, abs=0.1)


def test_equal_seeds_learn_equal_weights() -> None:
    runs = [learner(CorridorRows(4), seed=seed).learn(400).q_net.state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


# --- the target --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "truncated", "target"),
    [(False, False, 16.0), (True, False, 1.0), (True, True, 16.0)],
    ids=["running", "terminated", "truncated"],
)
def test_target_worked_by_hand(done: bool, truncated: bool, target: float) -> None:
    # Online values 1, 3, 2 under mask 1, 0, 1 choose action 2, whose target value is 30: 1 + 0.5 * 30 = 16. The other
    # ways would be 1 + 0.5 * 20 (mask forgotten), * 40 (largest valid target value), * 2 (online value).
    model = learner(Corridor(), gamma=0.5, learning_starts=0).learn(0)
    with torch.no_grad():
        for network, bias in ((model.q_net, [1.0, 3.0, 2.0]), (model.q_net_target, [40.0, 20.0, 30.0])):
            network.q_net[0].weight.zero_()
            network.q_net[0].bias.copy_(torch.tensor(bias))
    info = {"TimeLimit.truncated": truncated, "next_action_mask": np.array([True, False, True])}
    obs = OBS[:1]
    model.replay_buffer.add(obs, obs, np.array([1]), np.array([1.0]), np.array([done]), [info])
    model.train(gradient_steps=1, batch_size=1)
    error = abs(target - 3.0)  # of the taken action's value, 3
    assert model.logger.name_to_value["train/loss"] == pytest.approx(error - 0.5)  # Huber


# --- replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8])
def test_every_stored_mask_belongs_to_its_next_observation(rows: int) -> None:
    env = CorridorRows(rows)
    model = learner(env, learning_starts=10_000).learn(100 * rows)
    buffer = model.replay_buffer
    filled = slice(buffer.size())
    running = (buffer.dones[filled] == 0) | (buffer.timeouts[filled] == 1)
    next_cells = buffer.next_observations[filled].argmax(axis=-1)
    np.testing.assert_array_equal(buffer.next_action_masks[filled][running], MASKS[next_cells[running]])
    assert buffer.timeouts[filled].sum() > 10
    assert buffer.next_action_masks[filled].any(axis=-1).all()
    cells = buffer.observations[filled].argmax(axis=-1)
    assert MASKS[cells, buffer.actions[filled][..., 0]].all()
    batch = buffer.sample(512)
    alive = batch.dones[:, 0] == 0
    next_cells = batch.next_observations.argmax(dim=1)[alive]
    assert torch.equal(batch.next_action_masks[alive], torch.as_tensor(MASKS)[next_cells])
    assert len(np.unique(batch.next_observations.argmax(dim=1))) == CELLS


def test_a_truncated_single_environment_tells_its_final_mask_in_info() -> None:
    env = DummyVecEnv([lambda: TimeLimit(MaskToInfo(Corridor()), 3)] * 2)
    buffer = learner(env, learning_starts=10_000).learn(200).replay_buffer
    truncated = buffer.timeouts[: buffer.size()] == 1
    next_cells = buffer.next_observations[: buffer.size()].argmax(axis=-1)
    np.testing.assert_array_equal(buffer.next_action_masks[: buffer.size()][truncated], MASKS[next_cells[truncated]])
    assert truncated.sum() > 20


def test_a_truncated_episode_without_its_final_mask_raises() -> None:
    env = DummyVecEnv([lambda: TimeLimit(Corridor(), 3)] * 2)
    with pytest.raises(MissingMaskError, match=r"infos\[[01]\]: expected 'terminal_action_mask' or 'action_mask'"):
        learner(env).learn(50)


def test_normalised_observations_keep_their_masks() -> None:
    env = CorridorRows(4)
    model = learner(VecNormalize(env)).learn(400)
    buffer = model.replay_buffer
    alive = (buffer.dones[: buffer.size()] == 0) | (buffer.timeouts[: buffer.size()] == 1)
    next_cells = buffer.next_observations[: buffer.size()].argmax(axis=-1)
    np.testing.assert_array_equal(buffer.next_action_masks[: buffer.size()][alive], MASKS[next_cells[alive]])
    # Stored as they are, normalised when sampled.
    assert buffer.next_observations.min() > -1e-6
    assert buffer.sample(64, env=model.get_vec_normalize_env()).next_observations.min() < -0.1


# --- exploration -------------------------------------------------------------------------------------------------


def test_exploration_is_uniform_over_valid_actions_one_coin_per_row(corridor) -> None:
    model, _ = corridor
    n = 30_000
    obs, masks = np.repeat(OBS[:2], n, axis=0), np.repeat(MASKS[:2], n, axis=0)
    model.exploration_rate = 0.3
    actions, _ = model.predict(obs, action_masks=masks)
    frequencies = [np.bincount(part, minlength=3) / n for part in (actions[:n], actions[n:])]
    # The greedy action is right; cell 0 has two valid actions, cell 1 has three.
    np.testing.assert_allclose(frequencies[0], [0.15, 0.0, 0.85], atol=0.01)
    np.testing.assert_allclose(frequencies[1], [0.1, 0.1, 0.8], atol=0.01)
    assert frequencies[0][LEFT] == 0
    greedy, _ = model.predict(obs, deterministic=True, action_masks=masks)
    assert (greedy == RIGHT).all()


# --- prediction --------------------------------------------------------------------------------------------------


def test_one_observation_gives_one_action_and_batched_masks_may_come_stacked(corridor) -> None:
    model, _ = corridor
    action, state = model.predict(OBS[2], deterministic=True, action_masks=MASKS[2])
    assert (action.shape, int(action), state) == ((), RIGHT, None)
    only_left = np.array([False, True, False])
    assert int(model.predict(OBS[2], deterministic=True, action_masks=only_left)[0]) == LEFT
    stacked, _ = model.predict(OBS, deterministic=True, action_masks=MASKS[None])
    assert MASKS[np.arange(CELLS), stacked].all()


def test_masked_evaluation_of_sb3_contrib_runs_and_reaches_the_goal(corridor) -> None:
    mean, _ = evaluate_masked(corridor[0], Monitor(TimeLimit(Corridor(), 5)), n_eval_episodes=10)
    assert mean == 1.0


def test_every_unmasked_path_raises(corridor) -> None:
    model, _ = corridor
    for call in (
        lambda: model.predict(OBS),
        lambda: evaluate_policy(model, Monitor(Corridor()), n_eval_episodes=1),
        lambda: evaluate_masked(model, Monitor(Corridor()), n_eval_episodes=1, use_masking=False),
        lambda: model.policy.predict(OBS),
        lambda: model.policy(torch.as_tensor(OBS)),
        lambda: learner(Corridor()).learn(
            50, callback=EvalCallback(Monitor(Corridor()), eval_freq=5, n_eval_episodes=1, verbose=0)
        ),
    ):
        with pytest.raises(MissingMaskError):
            call()


def test_an_environment_without_masks_raises() -> None:
    with pytest.raises(MissingMaskError, match=r"a method action_masks\(\)"):
        learner(gymnasium.make("CartPole-v1")).learn(10)


@pytest.mark.parametrize(
    "masks",
    [MASKS.astype(np.float32), np.where(MASKS, 0.0, -np.inf), MASKS.astype(np.int8), MASKS.T, MASKS[:4], MASKS[0],
     MASKS & False, np.stack([MASKS] * 2)],
    ids=["float", "additive", "int8", "transposed", "short", "one row", "all False", "two batches"],
)  # fmt: skip
def test_wrong_masks_raise(corridor, masks: np.ndarray) -> None:
    for deterministic in (False, True):
        with pytest.raises(InvalidMaskError):
            corridor[0].predict(OBS, deterministic=deterministic, action_masks=masks)


def test_broken_action_values_are_named_not_decided_under(corridor) -> None:
    model, obs = corridor[0], OBS.copy()
    obs[3] = np.nan
    for deterministic in (True, False):
        with pytest.raises(MaskingError, match=r"action values: .* NaN in 1 of 5 rows, first row 3; look for NaN"):
            model.predict(obs, action_masks=MASKS, deterministic=deterministic)


def test_a_broken_value_of_a_forbidden_action_does_not_matter() -> None:
    model = learner(Corridor())
    with torch.no_grad():
        model.q_net.q_net[-1].bias[LEFT] = torch.nan
    model.predict(OBS[:1], action_masks=MASKS[:1])
    with pytest.raises(MaskingError, match="was NaN in 1 of 1 rows"):
        model.predict(OBS[1:2], action_masks=MASKS[1:2])


def test_the_safe_action_is_hold_unless_said_otherwise() -> None:
    # The middle cell forbids action 0.
    strict = MaskedDQN("MlpPolicy", CorridorRows(2), device="cpu")
    with pytest.raises(InvalidMaskError, match="the safe action 0 valid"):
        strict.predict(OBS, deterministic=True, action_masks=MASKS)
    with pytest.raises(InvalidMaskError, match="the safe action 0 valid"):
        strict.learn(40)  # still warming up: told by the environment's masks


# --- building, saving --------------------------------------------------------------------------------------------


def test_what_would_lose_the_masks_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"own replay buffer, which keeps masks, was n_steps=3"):
        learner(Corridor(), n_steps=3)
    with pytest.raises(ValueError, match="own replay buffer"):
        learner(Corridor(), replay_buffer_class=type("Other", (MaskedReplayBuffer,), {}))
    with pytest.raises(ValueError, match="expected optimize_memory_usage=False, was True"):
        learner(Corridor(), optimize_memory_usage=True)
    with pytest.raises(MaskingError, match="safe_action: expected 0 to 2 or None, was 3"):
        learner(Corridor(), safe_action=3)
    with pytest.raises(ValueError, match="expected 'MlpPolicy' or a MaskedDQNPolicy"):
        MaskedDQN(DQNPolicy, Corridor(), device="cpu")


def test_a_saved_model_decides_alike_and_learns_on(corridor, tmp_path: Path) -> None:
    model, _ = corridor
    model.save(tmp_path / "dqn.zip")
    env = CorridorRows(8)
    loaded = MaskedDQN.load(tmp_path / "dqn.zip", env=env, device="cpu")
    np.testing.assert_array_equal(values_of(loaded, OBS), values_of(model, OBS))
    for each in (model, loaded):
        actions, _ = each.predict(OBS, deterministic=True, action_masks=MASKS)
        assert actions[:GOAL].tolist() == [RIGHT] * GOAL
    loaded.learn(400, reset_num_timesteps=False)
    assert env.audit.as_metrics() == {"executed_actions": 400.0, "invalid_actions": 0.0}
