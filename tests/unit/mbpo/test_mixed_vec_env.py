from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from mbpo_worlds import SteppingMarket, make_dynamics, make_features, make_scaler

from configs.schema import RewardConfig
from envs import TradingDynamics
from masking import InvalidActionError
from mbpo import MixedVecEnv, RolloutStatistics, StartBuffer, historical_forecast, imagine_market
from mbpo.ramp import Ramp


def start_buffer(dynamics: TradingDynamics, features: np.ndarray) -> StartBuffer:
    row = np.array([3, 7])
    accounts = np.zeros((2, len(dynamics.state_names)), np.float32)
    accounts[:, :4] = features[row]
    accounts[:, dynamics.state_names.index("position")] = [0.5, 1.0]
    accounts[:, dynamics.state_names.index("holding_time")] = [5, 1]
    accounts[:, dynamics.state_names.index("drawdown")] = [0.09, 0.0]
    accounts[:, dynamics.state_names.index("trading_state")] = [1, 0]
    return StartBuffer(row, accounts, capacity=1000)


def make_env(num_envs: int = 8, real_ratio: float = 0.5, penalty_coef: float = 0.25, **options: Any) -> MixedVecEnv:
    features = options.pop("features", make_features(40))
    dynamics = options.pop("dynamics", make_dynamics())
    branches = imagine_market(
        SteppingMarket(),  # type: ignore[arg-type]
        features,
        horizon=3,
        branches_per_row=5,
        generator=torch.Generator().manual_seed(0),
    )
    return MixedVecEnv(
        dynamics,
        make_scaler(features),
        features,
        np.linspace(0.1, 0.5, len(features)),
        historical_forecast(SteppingMarket(), features),  # type: ignore[arg-type]
        branches,
        start_buffer(dynamics, features),
        num_envs=num_envs,
        real_ratio=real_ratio,
        penalty_coef=penalty_coef,
        control_variate=options.pop("control_variate", 0.0),
        episode_bars=10,
        seed=0,
        **options,
    )


def imagined(env: MixedVecEnv) -> Any:
    assert env._imagined is not None
    return env._imagined


def random_valid(env: MixedVecEnv, rng: np.random.Generator) -> np.ndarray:
    masks = env.action_masks()
    return np.where(masks, rng.random(masks.shape), -1).argmax(axis=1)


@pytest.mark.parametrize(("ratio", "real"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_rows_are_split_by_real_ratio(ratio: float, real: int) -> None:
    env = make_env(real_ratio=ratio)
    assert env.reset().shape == (8, len(env.dynamics.obs_names))
    assert (env.num_real, env.num_imagined) == (real, 8 - real)
    env.step(random_valid(env, np.random.default_rng(0)))


def test_imagined_rows_start_from_visited_states_with_their_masks() -> None:
    env = make_env(num_envs=200, real_ratio=0.0)
    env.reset()
    state = env._state
    position = state[:, env.dynamics.state_names.index("position")]
    assert set(position.tolist()) == {0.5, 1.0}
    masks = env.action_masks()
    # Row 3 is REDUCE_ONLY at 0.5: Hold and targets up to 0.5. Row 7 is in its holding period: Hold only.
    assert masks[position == 0.5].tolist() == [[True, True, True, True, False, False, False]] * int(
        (position == 0.5).sum()
    )
    assert masks[position == 1.0].tolist() == [[True] + [False] * 6] * int((position == 1.0).sum())


def test_masks_hold_at_every_imagined_depth_and_equal_the_rule_set() -> None:
    env, rng = make_env(num_envs=64, real_ratio=0.5), np.random.default_rng(1)
    env.reset()
    for _ in range(20):
        env.rebranch()
        for _ in range(3):
            masks = env.action_masks()
            np.testing.assert_array_equal(masks, env.dynamics.action_masks(env._state))
            env.step(random_valid(env, rng))


def test_a_forbidden_action_in_an_imagined_row_raises_and_names_the_row() -> None:
    env = make_env(real_ratio=0.0)
    env.reset()
    actions = np.zeros(8, dtype=np.int64)
    actions[5] = 6
    with pytest.raises(InvalidActionError, match="row 5 chose 6"):
        env.step(actions)


def test_penalty_is_disagreement_at_the_state_times_the_position_after_the_action() -> None:
    features = make_features(40)
    rewards, positions = {}, []
    for coef in (0.0, 0.25):
        env = make_env(num_envs=6, real_ratio=0.0, penalty_coef=coef, features=features)
        env.reset()
        env.start_rollout(0.0, 3)
        rewards[coef] = []
        for _ in range(3):
            rewards[coef].append(env.step(np.zeros(6, np.int64))[1])
            positions.append(imagined(env).account.position)
        rows = imagined(env).row
    history = np.linspace(0.1, 0.5, 40)[rows]
    signal = features[rows, 3]
    for depth, disagreement in enumerate((history, signal + 1, signal + 2)):
        expected = 0.25 * positions[depth] * disagreement
        np.testing.assert_allclose(rewards[0.0][depth] - rewards[0.25][depth], expected, atol=1e-6)


def test_leaving_the_market_is_charged_less_than_staying_in_it() -> None:
    charged = []
    for action in (0, 1):
        rewards = []
        for coef in (0.0, 10.0):
            env = make_env(num_envs=1, real_ratio=0.0, penalty_coef=coef, dynamics=make_dynamics(min_holding_bars=0))
            while imagined(env).row[0] != 3 if env._imagined is not None else True:
                env.reset()
            rewards.append(env.step(np.array([action]))[1][0])
        charged.append(rewards[0] - rewards[1])
    assert charged[0] > 0.5
    assert charged[1] == pytest.approx(0.0, abs=1e-6)


def test_statistics_separate_real_raw_and_penalised_rewards() -> None:
    env = make_env(num_envs=6, real_ratio=0.5)
    env.reset()
    disagreement = np.linspace(0.1, 0.5, 40)[imagined(env).row]
    _, rewards, _, _ = env.step(np.zeros(6, np.int64))
    statistics = env.take_statistics()
    assert statistics["real_reward"] == pytest.approx(rewards[:3].mean(), abs=1e-6)
    assert statistics["imagined_penalised_reward"] == pytest.approx(rewards[3:].mean(), abs=1e-6)
    assert statistics["imagined_raw_reward"] > statistics["imagined_penalised_reward"]
    assert statistics["imagined_uncertainty"] == pytest.approx(disagreement.mean())
    assert env.take_statistics()["real_reward"] == 0.0


def test_a_full_branch_at_the_end_of_a_rollout_is_left_to_the_learner() -> None:
    env = make_env(real_ratio=0.0)
    env.reset()
    env.start_rollout(0.0, 3)
    for _ in range(3):
        _, _, done, infos = env.step(np.zeros(8, np.int64))
        assert not done.any()
        assert all(info == {} for info in infos)
    with pytest.raises(RuntimeError, match="expected start_rollout"):
        env.step(np.zeros(8, np.int64))
    env.start_rollout(0.0, 3)
    env.step(np.zeros(8, np.int64))


def test_a_full_branch_within_a_rollout_is_truncated_and_followed_by_a_fresh_one() -> None:
    env = make_env(real_ratio=0.0)
    env.reset()
    env.start_rollout(0.0, 7)
    depths = []
    for step in range(1, 8):
        _, _, done, infos = env.step(np.zeros(8, np.int64))
        assert done.all() == (step in (3, 6)) == done.any()
        assert all(info["TimeLimit.truncated"] for info in infos if info)
        depths.append(imagined(env).depth.max())
    assert depths == [1, 2, 0, 1, 2, 0, 1]
    # Cut on purpose, not because anything was out of range.
    assert env.take_statistics()["imagined_truncation_rate"] == 0


def test_branches_grow_with_the_share_of_training_that_is_done() -> None:
    env = make_env(real_ratio=0.0, lengths=Ramp(1, 3, 0.0, 0.5))
    env.reset()
    cuts = {}
    for done in (0.0, 0.3, 0.5, 1.0):
        env.start_rollout(done, 6)
        cuts[done] = [bool(env.step(np.zeros(8, np.int64))[2].any()) for _ in range(6)]
        assert env.take_statistics()["rollout_length"] == {0.0: 1, 0.3: 2, 0.5: 3, 1.0: 3}[done]
    assert cuts[0.0] == [True] * 5 + [False]
    assert cuts[0.3] == [False, True] * 2 + [False, False]
    assert cuts[0.5] == cuts[1.0] == [False, False, True] + [False] * 3


def test_a_branch_ends_where_its_next_bar_was_drawn_outside_the_support() -> None:
    env = make_env(num_envs=400, real_ratio=0.0, penalty_coef=0.0)
    env.branches.supported[:, ::2, 1] = False  # branches 0, 2 and 4, on their second bar
    env.reset()
    env.start_rollout(0.0, 3)
    _, _, done, _ = env.step(np.zeros(400, np.int64))
    assert not done.any()
    before = deepcopy(imagined(env))
    expected = env.branches.features[before.row, before.branch, 1]
    _, rewards, done, infos = env.step(np.zeros(400, np.int64))
    np.testing.assert_array_equal(done, before.branch % 2 == 0)
    assert 0 < done.sum() < 400
    row = int(np.flatnonzero(done)[0])
    assert infos[row]["TimeLimit.truncated"]
    # What was earned on that bar counts, and the state it leads to is the one to bootstrap from.
    assert rewards[row] != 0
    signal = env.dynamics.state_names.index("signal")
    scaled = env.scaler(np.full((1, len(env.dynamics.obs_names)), expected[row, 3], np.float32))[0, signal]
    assert infos[row]["terminal_observation"][signal] == scaled
    depth = imagined(env).depth
    assert (depth[done] == 0).all()
    assert (depth[~done] == 2).all()
    assert env.take_statistics()["imagined_truncation_rate"] == pytest.approx(done.sum() / 800)


def test_a_branch_that_is_killed_outside_the_support_is_terminated_not_truncated() -> None:
    env = make_env(num_envs=4, real_ratio=0.0)
    env.branches.features[:, :, 0, 1] = -0.5
    env.branches.supported[:] = False
    env.reset()
    _, _, done, infos = env.step(np.zeros(4, np.int64))
    assert done.all()
    assert not any(info["TimeLimit.truncated"] for info in infos)
    figures = env.take_statistics()
    assert (figures["imagined_termination_rate"], figures["imagined_truncation_rate"]) == (1.0, 0.0)


def test_a_branch_that_is_killed_on_its_last_bar_is_terminated_not_truncated() -> None:
    env = make_env(num_envs=4, real_ratio=0.0)
    env.branches.features[:, :, 2, 1] = -0.5
    env.reset()
    env.start_rollout(0.0, 7)
    for _ in range(3):
        _, _, done, infos = env.step(np.zeros(4, np.int64))
    assert done.all()
    assert not any(info["TimeLimit.truncated"] for info in infos)


def test_rows_that_go_on_are_untouched_by_those_that_start_afresh() -> None:
    env = make_env(num_envs=64, real_ratio=0.0)
    env.branches.supported[:, 0, 0] = False
    env.reset()
    before = deepcopy(imagined(env))
    whole = make_env(num_envs=64, real_ratio=0.0)
    whole.reset()
    _, _, done, _ = env.step(np.zeros(64, np.int64))
    whole.step(np.zeros(64, np.int64))
    assert 0 < done.sum() < 64
    np.testing.assert_array_equal(env.state[~done], whole.state[~done])
    np.testing.assert_array_equal(env.action_masks()[~done], whole.action_masks()[~done])
    np.testing.assert_array_equal(imagined(env).row[~done], before.row[~done])
    np.testing.assert_array_equal(env.action_masks(), env.dynamics.action_masks(env.state))


def test_lambda_follows_its_schedule_after_each_rollout() -> None:
    seen: list[tuple[float, float, int]] = []

    def schedule(coef: float, done: float, rollout: RolloutStatistics) -> float:
        seen.append((coef, done, rollout.imagined_steps))
        return coef / 2

    env = make_env(num_envs=8, penalty_coef=0.4, penalty=schedule)
    env.reset()
    for done in (0.25, 0.5):
        env.start_rollout(done, 2)
        for _ in range(2):
            env.step(np.zeros(8, np.int64))
        env.end_rollout(done)
    assert seen == [(0.4, 0.25, 8), (0.2, 0.5, 8)]
    figures = env.take_statistics()
    assert figures["penalty_coef"] == 0.1
    # Both rollouts, though the penalty saw them one by one.
    assert figures["imagined_uncertainty"] > 0


def test_model_error_is_reported_where_the_policy_goes() -> None:
    error = np.arange(39.0)
    env = make_env(num_envs=8, model_error=error)
    env.reset()
    visited = env.walks.time.copy()  # type: ignore[union-attr]
    env.step(np.zeros(8, np.int64))
    figures = env.take_statistics()
    assert figures["model_error_visited"] == pytest.approx(error[visited].mean())
    assert figures["model_error_history"] == 19.0
    with pytest.raises(ValueError, match=r"model_error: expected \[39\], was \[40\]"):
        make_env(model_error=np.zeros(40))


def test_penalty_share_relates_the_penalty_to_the_size_of_rewards() -> None:
    plain, charged = make_env(num_envs=6, real_ratio=0.0, penalty_coef=0.0), make_env(num_envs=6, real_ratio=0.0)
    rewards = []
    for env in (plain, charged):
        env.reset()
        rewards.append(env.step(np.zeros(6, np.int64))[1])
    assert plain.take_statistics()["penalty_share"] == 0.0
    expected = (rewards[0] - rewards[1]).mean() / np.abs(rewards[0]).mean()
    assert charged.take_statistics()["penalty_share"] == pytest.approx(expected, rel=1e-4)


def test_a_killed_branch_terminates_and_its_row_starts_a_fresh_one() -> None:
    features = make_features(40)
    env = make_env(num_envs=4, real_ratio=0.0, features=features)
    env.branches.features[:, :, 0, 1] = -0.5
    env.reset()
    _, _, done, infos = env.step(np.zeros(4, np.int64))
    assert done.all()
    assert not any(info["TimeLimit.truncated"] for info in infos)
    now = imagined(env)
    assert (now.depth == 0).all()
    assert (now.account.killed == 0).all()


def test_rebranching_leaves_real_rows_where_they_are() -> None:
    env = make_env()
    env.reset()
    env.step(np.zeros(8, np.int64))
    before = env.walks.time.copy()  # type: ignore[union-attr]
    env.rebranch()
    np.testing.assert_array_equal(env.walks.time, before)  # type: ignore[union-attr]


def test_branches_start_with_the_whole_account_and_spread_over_the_pool() -> None:
    env = make_env(num_envs=200, real_ratio=0.0)
    names = env.dynamics.state_names
    for column, value in {"flat_bars": 7.0, "last_risk_event": 2.0, "open_pnl": 0.03}.items():
        env.starts.states[:, names.index(column)] = value
    env.reset()
    now = imagined(env)
    assert set(now.branch.tolist()) == set(range(5))
    assert (now.account.flat_bars == 7).all()
    assert (now.account.last_risk_event == 2).all()
    np.testing.assert_allclose(now.account.open_pnl, 0.03, rtol=1e-6)


def test_real_rows_feed_the_start_buffer() -> None:
    env = make_env()
    env.reset()
    time = env.walks.time.copy()  # type: ignore[union-attr]
    env.step(np.zeros(8, np.int64))
    assert len(env.starts) == 2 + 4
    np.testing.assert_array_equal(env.starts.rows[2:6], time)


def test_reward_of_an_imagined_step_is_the_account_step_on_the_imagined_bar() -> None:
    env = make_env(
        num_envs=1, real_ratio=0.0, penalty_coef=0.0, dynamics=make_dynamics(RewardConfig(drawdown_weight=0))
    )
    env.reset()
    now = imagined(env)
    position = now.account.position[0]
    gap, move = env.branches.features[now.row[0], now.branch[0], 0, :2].astype(np.float64)
    grown = 1 + position * np.expm1(gap)
    drifted = position * np.exp(gap) / grown
    growth = grown * (1 + drifted * np.expm1(move))
    _, rewards, _, _ = env.step(np.zeros(1, np.int64))
    assert rewards[0] == pytest.approx(np.log(growth) / 0.01, rel=1e-5)


def test_random_walks_through_history_and_imagination_stay_valid_by_the_audit() -> None:
    env, rng = make_env(num_envs=512), np.random.default_rng(0)
    env.reset()
    for step in range(300):
        if step % 3 == 0:
            env.rebranch()
        masks = env.action_masks()
        env.step(np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1))
    assert (env.audit.executed, env.audit.invalid) == (300 * 512, 0)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_luck_is_taken_out_of_real_and_imagined_rewards(ratio: float) -> None:
    # The model expects no move: what is left of a day's profit is the cost and what variance costs.
    reward = RewardConfig(drawdown_weight=0.0)
    rewards = {}
    for share in (0.0, 1.0):
        env = make_env(200, ratio, 0.0, control_variate=share, dynamics=make_dynamics(reward, cost_rate=0.0))
        env.reset()
        rng = np.random.default_rng(0)
        steps = [env.step(random_valid(env, rng))[1] for _ in range(2)]
        rewards[share] = np.concatenate(steps)
    assert np.abs(rewards[1.0]).max() < 0.05 * np.abs(rewards[0.0]).max()
    assert np.abs(rewards[0.0]).max() > 0.0


def test_risk_aversion_rises_for_real_and_imagined_rows_alike() -> None:
    env = make_env(200, 0.5, 0.0, control_variate=0.0, risk_aversion=Ramp(0.0, 40.0, 0.0, 0.5))
    env.reset()
    start, charged = env.state_dict(), []
    for done in (0.0, 0.25, 1.0):
        env.load_state_dict(start)
        env.start_rollout(done, 1)
        charged.append(env.step(random_valid(env, np.random.default_rng(0)))[1])
        assert env.take_statistics()["risk_aversion"] == {0.0: 0.0, 0.25: 20.0, 1.0: 40.0}[done]
    for rows in (slice(0, 100), slice(100, 200)):
        half, whole = (charged[0] - charged[1])[rows], (charged[0] - charged[2])[rows]
        assert half.max() > 0.0
        assert np.allclose(whole, 2 * half, rtol=1e-4, atol=1e-6)
