"""Wrappers move a mask between info, Dict observation and `action_masks()` without changing it."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.toy_text.taxi import TaxiEnv
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO

from masking import HOLD, InvalidMaskError, MaskingError, MissingMaskError
from masking.wrappers import MaskFromDict, MaskFromInfo, MaskToDict, MaskToInfo


class Countdown(gymnasium.Env):
    """Take 1 or 2 from a pile of five, never more than there is; the terminal state has no valid action.

    Observation: pile and the largest pile seen. Counts forbidden actions.
    """

    observation_space = spaces.Box(0.0, 5.0, (2,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012
    forbidden = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.pile = 5
        return self._obs(), {"pile": self.pile}

    def step(self, action: Any):
        self.forbidden += int(not self.action_masks()[action])
        self.pile = max(self.pile - 1 - int(action), 0)
        return self._obs(), -1.0, self.pile == 0, False, {"pile": self.pile}

    def action_masks(self) -> np.ndarray:
        return np.array([self.pile >= 1, self.pile >= 2])

    def _obs(self) -> np.ndarray:
        return np.array([self.pile, 5], dtype=np.float32)


class Pair(Countdown):
    """The same pile with a second, always free dimension."""

    action_space = spaces.MultiDiscrete([2, 3])

    def step(self, action: Any):
        return super().step(action[0])

    def action_masks(self) -> np.ndarray:
        return np.concatenate((super().action_masks(), np.ones(3, dtype=bool)))


STACKS = {
    "taxi": lambda: MaskFromInfo(TaxiEnv()),
    "taxi in dict": lambda: MaskToDict(MaskFromInfo(TaxiEnv())),
    "to info": lambda: MaskToInfo(Countdown()),
    "to dict": lambda: MaskToDict(Countdown()),
    "to dict, multidiscrete": lambda: MaskToDict(Pair()),
    "to info, multidiscrete": lambda: MaskToInfo(Pair()),
    "info and back": lambda: MaskFromInfo(MaskToInfo(Countdown())),
    "dict and back": lambda: MaskFromDict(MaskToDict(Countdown())),
    "all four": lambda: MaskFromDict(MaskToDict(MaskFromInfo(MaskToInfo(Pair())))),
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_wrapped_environments_pass_check_env(stack: Any) -> None:
    with warnings.catch_warnings():
        # check_env warns that it is given a wrapper, which is the point here, and no registered id.
        for message in (".*different from the unwrapped version", ".*alternative render modes"):
            warnings.filterwarnings("ignore", message)
        check_env(stack(), skip_render_check=True)


@pytest.mark.parametrize("env_class", [Countdown, Pair])
@pytest.mark.parametrize(
    "back", [lambda env: MaskFromInfo(MaskToInfo(env)), lambda env: MaskFromDict(MaskToDict(env))], ids=["info", "dict"]
)
def test_a_mask_comes_back_unchanged_at_every_step(back: Any, env_class: type[Countdown]) -> None:
    plain = env_class()
    env = back(plain)
    assert env.observation_space == plain.observation_space
    obs, _ = env.reset(seed=1)
    terminated = False
    while not terminated:
        np.testing.assert_array_equal(obs, plain._obs())
        masks = env.action_masks()
        assert masks.dtype == bool
        np.testing.assert_array_equal(masks, plain.action_masks())
        obs, _, terminated, _, _ = env.step(0 if env_class is Countdown else np.array([0, 2]))
    assert plain.forbidden == 0


def test_taxi_gets_the_method_action_masks() -> None:
    env = MaskFromInfo(TaxiEnv())
    _, info = env.reset(seed=7)
    for _ in range(30):
        np.testing.assert_array_equal(env.action_masks(), info["action_mask"] == 1)
        _, _, _, _, info = env.step(int(np.flatnonzero(env.action_masks())[-1]))


def test_dict_observations_hold_a_float32_mask_of_the_current_state() -> None:
    env = MaskToDict(Countdown())
    assert env.observation_space == spaces.Dict(
        {"observations": Countdown.observation_space, "action_mask": spaces.Box(0.0, 1.0, (2,), np.float32)}
    )
    obs, _ = env.reset()
    assert obs["action_mask"].dtype == np.float32
    env.step(1)
    obs, _, _, _, _ = env.step(1)  # 5 - 2 - 2: one left
    assert obs["action_mask"].tolist() == [1.0, 0.0]


def test_a_terminal_state_is_not_asked_for_a_mask() -> None:
    info_env, dict_env = MaskToInfo(Countdown()), MaskToDict(Countdown())
    for env in (info_env, dict_env):
        env.reset()
        for action in (1, 1):
            env.step(action)
    _, _, terminated, _, info = info_env.step(0)
    assert terminated
    assert info == {"pile": 0}
    obs, _, terminated, _, _ = dict_env.step(0)
    assert terminated
    assert obs["action_mask"].tolist() == [0.0, 0.0]


def test_own_entries_of_info_stay() -> None:
    _, info = MaskToInfo(Countdown()).reset()
    assert info.keys() == {"pile", "action_mask"}
    assert info["action_mask"].dtype == np.int8


@pytest.mark.parametrize("wrap", [lambda: MaskFromInfo(Countdown()), lambda: MaskFromDict(MaskToDict(Countdown()))])
def test_a_mask_before_the_first_reset_is_missing(wrap: Any) -> None:
    with pytest.raises(MissingMaskError, match=r"called before reset\(\)"):
        wrap().action_masks()


def test_an_environment_without_a_mask_is_refused_when_it_is_asked() -> None:
    env = MaskFromInfo(Countdown())
    env.reset()
    with pytest.raises(MissingMaskError, match=r"info: expected the key 'action_mask', was \['pile'\]"):
        env.action_masks()
    for wrapper in (MaskToInfo, MaskToDict):
        with pytest.raises(MissingMaskError, match="expected an environment with a method"):
            wrapper(gymnasium.make("CartPole-v1")).reset(seed=0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0.0, 1.0, (2,)),
        spaces.Dict({"observations": spaces.Discrete(2)}),
        spaces.Dict({key: spaces.Discrete(2) for key in ("observations", "action_mask", "more")}),
    ],
)
def test_observations_without_a_mask_entry_are_refused(space: spaces.Space) -> None:
    env = Countdown()
    env.observation_space = space
    with pytest.raises(MaskingError, match=r"expected a Dict of \['action_mask', 'observations'\]"):
        MaskFromDict(env)


def test_a_declared_safe_action_is_demanded_of_every_mask() -> None:
    env = MaskFromInfo(MaskToInfo(Countdown()), safe_action=1)
    env.reset()
    assert env.action_masks().tolist() == [True, True]
    env.step(1)
    env.step(1)
    with pytest.raises(InvalidMaskError, match="the safe action 1 valid"):
        env.action_masks()


def test_a_wrapped_environment_can_be_made_again_from_its_spec() -> None:
    gymnasium.register("DetentTestCountdown-v0", entry_point=Countdown)
    try:
        env = MaskFromInfo(MaskToInfo(gymnasium.make("DetentTestCountdown-v0")), safe_action=HOLD)
        again = env.spec.make()
    finally:
        gymnasium.registry.pop("DetentTestCountdown-v0")
    assert str(again) == str(env)
    again.reset()
    assert again.action_masks().tolist() == [True, True]


def test_maskable_ppo_learns_from_info_masks_without_one_forbidden_action() -> None:
    env = Countdown()
    model = MaskablePPO(
        "MlpPolicy", MaskFromInfo(MaskToInfo(env)), n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0
    )
    model.learn(128)
    assert env.forbidden == 0
