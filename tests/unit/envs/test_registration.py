"""Registered ids: found by gymnasium.make, without warnings, and cut by one mechanism only."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from envs_worlds import random_valid
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

import envs.registration  # noqa: F401 - registers the ids
from envs.masked_cartpole import MaskedCartPoleEnv
from masking import InvalidActionError

IDS = ("detent/MaskedCartPole-v0", "detent/Portfolio-v0", "detent/PortfolioPublished-v0", "detent/Trading-v0")
HOLD_EVERYTHING = np.array([5, 5, 5])


def length(env: gymnasium.Env[Any, Any], action: Any) -> tuple[int, bool, bool]:
    """Steps of an episode in which `action(obs)` is taken, and how it ended."""
    obs, _ = env.reset(seed=5)
    for step in range(1, 2000):
        obs, _, terminated, truncated, _ = env.step(action(obs))
        if terminated or truncated:
            return step, terminated, truncated
    raise AssertionError("the episode did not end")


def balance(obs: np.ndarray) -> int:
    buttons = np.rint(obs[4:] * 9).astype(int)
    return int(buttons[int(obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0)])


def test_every_id_is_registered_by_the_import() -> None:
    ours = {name for name in gymnasium.registry if name.startswith("detent/")}
    assert ours == set(IDS)
    assert {gymnasium.spec(name).kwargs.get("variant") for name in IDS} == {None, "strict", "published"}


@pytest.mark.parametrize("name", IDS)
def test_the_spec_describes_an_environment_that_can_be_made_again(name: str) -> None:
    env = gymnasium.make(name)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert type(again.unwrapped) is type(env.unwrapped)
    assert str(again) == str(env)
    for made in (env, again):
        made.reset(seed=0)
    np.testing.assert_equal(env.reset(seed=1), again.reset(seed=1))


def test_an_id_that_names_the_module_needs_no_import_and_loads_nothing_else(tmp_path) -> None:
    code = (
        "import sys, gymnasium\n"
        "env = gymnasium.make('envs.registration:detent/MaskedCartPole-v0')\n"
        "print(type(env.unwrapped).__module__)\n"
    )
    light = "import sys, envs.registration; print({'torch', 'stable_baselines3', 'arch', 'pandas'} & set(sys.modules))"
    for source, expected in ((code, "envs.masked_cartpole\n"), (light, "set()\n")):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (done.stdout, done.stderr) == (expected, "")


# --- one limit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "steps"), [({}, 500), ({"max_episode_steps": 7}, 7), ({"max_episode_steps": 600}, 600)]
)
def test_cartpole_is_cut_by_the_time_limit_alone_so_that_make_can_change_it(asked: dict[str, int], steps: int) -> None:
    env = gymnasium.make("detent/MaskedCartPole-v0", **asked)
    assert env.spec.max_episode_steps == steps
    assert length(env, balance) == (steps, False, True)


def test_a_cartpole_built_without_make_is_cut_at_the_same_step() -> None:
    assert length(MaskedCartPoleEnv(), balance) == (500, False, True)


def test_trading_is_cut_by_its_own_episode_length() -> None:
    env = gymnasium.make("detent/Trading-v0", episode_bars=9)
    assert env.spec.max_episode_steps is None
    assert "TimeLimit" not in str(env)
    assert length(env, lambda _: 0) == (9, False, True)


@pytest.mark.parametrize(("name", "variant"), [(IDS[1], "strict"), (IDS[2], "published")])
def test_a_portfolio_ends_after_its_periods(name: str, variant: str) -> None:
    env = gymnasium.make(name)
    assert env.unwrapped.portfolio.variant == variant
    assert "TimeLimit" not in str(env)
    assert length(env, lambda _: HOLD_EVERYTHING) == (19, True, False)


# --- masks reach through the wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detent/MaskedCartPole-v0", "detent/Trading-v0"])
def test_masks_are_found_below_the_wrappers_and_a_forbidden_action_still_raises(name: str) -> None:
    env = gymnasium.make(name)
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0)
    assert is_masking_supported(env)
    for _ in range(50):
        masks = get_action_masks(env)
        assert masks.dtype == np.bool_
        np.testing.assert_array_equal(masks, info["action_mask"])
        _, _, terminated, truncated, info = env.step(random_valid(masks[None], rng)[0])
        if terminated or truncated:
            _, info = env.reset()
    assert (env.unwrapped.audit.executed, env.unwrapped.audit.invalid) == (50, 0)
    with pytest.raises(InvalidActionError):
        env.step(np.flatnonzero(~info["action_mask"])[0])


def test_a_vector_of_registered_environments_steps_without_warnings() -> None:
    vector = gymnasium.make_vec("detent/MaskedCartPole-v0", num_envs=3, vectorization_mode="sync", num_actions=2)
    vector.reset(seed=0)
    for _ in range(30):
        vector.step(vector.action_space.sample())
