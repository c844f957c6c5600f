"""Gymnasium wrappers that move a mask between `info`, a Dict observation and the method `action_masks()`.

| wrapper | the environment tells its mask in | wrapped, it tells it in |
| --- | --- | --- |
| `MaskFromInfo` | `info["action_mask"]`, int8 | `action_masks()` |
| `MaskToInfo` | `action_masks()` | `info["action_mask"]`, int8 |
| `MaskFromDict` | `{"observations", "action_mask"}` | `action_masks()` |
| `MaskToDict` | `action_masks()` | `{"observations", "action_mask"}`, float32 |

`action_masks()` answers one flat bool row, as sb3-contrib asks for it. It is not called in a terminal state, where
no action follows and environments need not have a valid one: `MaskToInfo` then adds nothing, `MaskToDict` zeros.
Imports gymnasium, so not part of the pure core of `masking`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.utils import RecordConstructorArgs

from masking.adapters import BoolArray, MaskAdapter
from masking.errors import MaskingError, MissingMaskError

_KEYS = {"observations", "action_mask"}


class _MaskWrapper(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    # What the four share: everything a reset or step returns passes through `_moved`.

    def __init__(self, env: gymnasium.Env[Any, Any], safe_action: int | tuple[int, ...] | None = None) -> None:
        RecordConstructorArgs.__init__(self, safe_action=safe_action)
        super().__init__(env)
        self._adapter = MaskAdapter.of(env.action_space, safe_action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._moved(obs, info, terminated=False)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs, info = self._moved(obs, info, terminated=terminated)
        return obs, reward, terminated, truncated, info

    @abstractmethod
    def _moved(self, obs: Any, info: dict[str, Any], *, terminated: bool) -> tuple[Any, dict[str, Any]]:
        """Observation and info as the wrapped environment hands them out."""


class MaskFromInfo(_MaskWrapper):
    """Gives `action_masks()` to an environment that tells its mask in `info["action_mask"]`, such as Gymnasium's Taxi.

    Args: safe_action every mask must allow; None asks for one valid action per row and dimension.
    """

    _info: dict[str, Any] | None = None

    def action_masks(self) -> BoolArray:
        """Mask of the current state, bool [A].  Raises: MissingMaskError, InvalidMaskError."""
        masks: BoolArray = self._adapter.from_info(_after_reset(self._info))[0]
        return masks

    def _moved(self, obs: Any, info: dict[str, Any], *, terminated: bool) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        self._info = dict(info)
        return obs, info


class MaskToInfo(_MaskWrapper):
    """Adds `info["action_mask"]` as `action_space.sample(mask)` takes it: int8 [A], or a tuple of K.

    Args: safe_action every mask must allow; None asks for one valid action per row and dimension.
    """

    def _moved(self, obs: Any, info: dict[str, Any], *, terminated: bool) -> tuple[Any, dict[str, Any]]:
        return obs, info if terminated else info | self._adapter.to_info(self._adapter.from_env(self.env)[0])


class MaskFromDict(_MaskWrapper):
    """Gives `action_masks()` to an environment with Dict observations {"observations", "action_mask"}.

    Args: safe_action every mask must allow; None asks for one valid action per row and dimension.
    Raises: MaskingError for another observation space.
    """

    _observation: dict[str, Any] | None = None

    def __init__(self, env: gymnasium.Env[Any, Any], safe_action: int | tuple[int, ...] | None = None) -> None:
        super().__init__(env, safe_action)
        space = env.observation_space
        if not isinstance(space, Dict) or set(space) != _KEYS:
            raise MaskingError(f"observation_space: expected a Dict of {sorted(_KEYS)}, was {space}")
        self.observation_space = space["observations"]

    def action_masks(self) -> BoolArray:
        """Mask of the current state, bool [A].  Raises: MissingMaskError, InvalidMaskError."""
        masks: BoolArray = self._adapter.from_dict_observation(_after_reset(self._observation))[1][0]
        return masks

    def _moved(self, obs: Any, info: dict[str, Any], *, terminated: bool) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        self._observation = obs
        return obs["observations"], info


class MaskToDict(_MaskWrapper):
    """Puts the mask into the observation: {"observations": ..., "action_mask": float32 [A]}.

    Args: safe_action every mask must allow; None asks for one valid action per row and dimension.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], safe_action: int | tuple[int, ...] | None = None) -> None:
        super().__init__(env, safe_action)
        mask_space = Box(0.0, 1.0, (self._adapter.width,), np.float32)
        self.observation_space = Dict({"observations": env.observation_space, "action_mask": mask_space})

    def _moved(self, obs: Any, info: dict[str, Any], *, terminated: bool) -> tuple[Any, dict[str, Any]]:
        if terminated:
            return {"observations": obs, "action_mask": np.zeros(self._adapter.width, np.float32)}, info
        return self._adapter.to_dict_observation(obs, self._adapter.from_env(self.env)[0]), info


def _after_reset(last: dict[str, Any] | None) -> dict[str, Any]:
    if last is None:
        raise MissingMaskError("action_masks: expected a state, was called before reset(); call reset() first")
    return last
