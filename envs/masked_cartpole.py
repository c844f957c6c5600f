"""CartPole with N buttons, of which two random ones are wired in each episode: the smallest world whose mask matters.

The physics, limits and reward are those of Gymnasium's CartPole-v1 (Barto, Sutton and Anderson, 1983). Which button
pushes where can be read off the observation, so the mask is a function of it and can be learned. There is no action
that is always valid: a strict policy is built with `safe_action=None`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking import ActionAudit, check_actions

X_LIMIT = 2.4
"""Distance of the cart from the middle, metres, beyond which an episode terminates."""
ANGLE_LIMIT = math.radians(12)
"""Angle of the pole from the vertical, radians, beyond which an episode terminates."""

_GRAVITY = 9.8
_POLE_MASS = 0.1
_TOTAL_MASS = 1.0 + _POLE_MASS
_HALF_LENGTH = 0.5
_PUSH = 10.0
_SECONDS = 0.02
_START = 0.05
_UNWIRED = -1


def cart_pole_step(state: np.ndarray, force: np.ndarray) -> np.ndarray:
    """One Euler step of 0.02 s.

    Args: state [B, 4], position (m), velocity (m/s), angle (rad), angular velocity (rad/s); force [B], newtons.
    Returns: [B, 4], the next state, not limited to the track.
    """
    _, velocity, angle, spin = state.T
    cos, sin = np.cos(angle), np.sin(angle)
    pull = (force + _POLE_MASS * _HALF_LENGTH * spin**2 * sin) / _TOTAL_MASS
    spin_up = (_GRAVITY * sin - cos * pull) / (_HALF_LENGTH * (4.0 / 3.0 - _POLE_MASS * cos**2 / _TOTAL_MASS))
    speed_up = pull - _POLE_MASS * _HALF_LENGTH * spin_up * cos / _TOTAL_MASS
    rates = np.stack((velocity, speed_up, spin, spin_up), axis=1)
    return np.asarray(state + _SECONDS * rates)


class MaskedCartPoleEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One cart with N buttons; pressing one that is not wired raises `InvalidActionError` before anything moves.

    Actions: Discrete(N). In each episode one random button pushes left with 10 N, another one right.
    Observation, float32 [6]:

    | index | name | unit | min | max |
    | --- | --- | --- | --- | --- |
    | 0 | position | m | -4.8 | 4.8 |
    | 1 | velocity | m/s | -3.4e38 | 3.4e38 |
    | 2 | angle | rad | -0.419 | 0.419 |
    | 3 | angular velocity | rad/s | -3.4e38 | 3.4e38 |
    | 4 | left button | index / (N - 1) | 0 | 1 |
    | 5 | right button | index / (N - 1) | 0 | 1 |

    The reward is 1 per step. An episode terminates when |position| > 2.4 or |angle| > 12 degrees and is truncated
    after `max_episode_steps`; stepping on without `reset` raises ValueError. Episodes begin with the four numbers
    uniform in [-0.05, 0.05]; `reset(options=...)` may fix `state` [4] and `buttons` (left, right).

    `info["action_mask"]` is bool like `action_masks()`; Gymnasium's own environments give int8, which
    `action_space.sample` asks for. Executed actions are counted in `audit`.

    Args: num_actions: N >= 2; max_episode_steps: >= 1, or None where a `TimeLimit` wrapper cuts episodes.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, *, num_actions: int = 10, max_episode_steps: int | None = 500) -> None:
        self._carts = _Carts(1, num_actions, max_episode_steps)
        self.observation_space, self.action_space = _spaces(num_actions)
        self.audit = ActionAudit()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode, with newly wired buttons."""
        super().reset(seed=seed)
        state, buttons = self._carts.draw(1, self.np_random)
        self._carts.restart(np.array([0]), *self._given(options or {}, state, buttons))
        return self._carts.observe()[0], {"action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Press one button."""
        actions, masks = np.asarray([action]), self._carts.action_masks
        step = self._carts.step(actions)
        self.audit.record(actions, masks)
        return (
            self._carts.observe()[0],
            float(step.reward[0]),
            bool(step.terminated[0]),
            bool(step.truncated[0]),
            {"action_mask": self.action_masks()},
        )

    def action_masks(self) -> np.ndarray:
        """The two wired buttons, bool [N]; none before the first `reset`."""
        masks: np.ndarray = self._carts.action_masks[0]
        return masks

    def _given(
        self, options: Mapping[str, Any], state: np.ndarray, buttons: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if "state" in options:
            state = np.asarray([options["state"]], dtype=np.float64)
            if state.shape != (1, 4) or not np.isfinite(state).all() or _is_down(state)[0]:
                raise ValueError(
                    f"options['state']: expected 4 finite numbers with |position| <= {X_LIMIT} and "
                    f"|angle| <= {ANGLE_LIMIT:.3f}, was {options['state']}"
                )
        if "buttons" in options:
            buttons, n = np.asarray([options["buttons"]]), self._carts.num_actions
            if buttons.shape != (1, 2) or not set(buttons[0].tolist()) <= set(range(n)) or np.ptp(buttons) == 0:
                raise ValueError(
                    f"options['buttons']: expected two different ones in 0..{n - 1}, was {options['buttons']}"
                )
        return state, buttons


class MaskedCartPoleVecEnv(BatchVecEnv):
    """`MaskedCartPoleEnv` in rows that are stepped together.

    Args: as `MaskedCartPoleEnv`; `seed` seeds the starts and the buttons of all rows.
    """

    def __init__(self, num_envs: int, *, num_actions: int = 10, max_episode_steps: int | None = 500, seed: int) -> None:
        super().__init__(num_envs, *_spaces(num_actions))
        self._carts = _Carts(num_envs, num_actions, max_episode_steps)
        self._rng = np.random.default_rng(seed)

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        return self._carts.observe(rows)

    @property
    def _masks(self) -> np.ndarray:
        return self._carts.action_masks

    def _reset_rows(self, rows: np.ndarray) -> None:
        self._carts.restart(rows, *self._carts.draw(len(rows), self._rng))

    def _advance(self, actions: np.ndarray) -> BatchStep:
        return self._carts.step(actions)


class _Carts:
    # B carts: `state` [B, 4] float64, `buttons` [B, 2] (left, right), `steps` [B], and `running` [B], which is False
    # before the first restart and after the end of an episode.

    def __init__(self, batch: int, num_actions: int, max_episode_steps: int | None) -> None:
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps: expected >= 1 or None, was {max_episode_steps}")
        self.num_actions = num_actions
        self.max_episode_steps = max_episode_steps
        self.state = np.zeros((batch, 4))
        self.buttons = np.full((batch, 2), _UNWIRED)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.running = np.zeros(batch, dtype=bool)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        state = rng.uniform(-_START, _START, (count, 4))
        left = rng.integers(0, self.num_actions, count)
        # One of the other N - 1 buttons: skipping over the left one keeps all ordered pairs equally likely.
        right = rng.integers(0, self.num_actions - 1, count)
        return state, np.stack((left, right + (right >= left)), axis=1)

    def restart(self, rows: np.ndarray, state: np.ndarray, buttons: np.ndarray) -> None:
        self.state[rows], self.buttons[rows] = state, buttons
        self.steps[rows], self.running[rows] = 0, True

    @property
    def action_masks(self) -> np.ndarray:
        # Computed anew for each caller: writing into the answer wires no button.
        left, right = self.buttons[:, :1], self.buttons[:, 1:]
        index = np.arange(self.num_actions)
        return np.asarray((index == left) | (index == right))

    def observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        chosen = slice(None) if rows is None else rows
        scaled = self.buttons[chosen] / (self.num_actions - 1)
        return np.concatenate((self.state[chosen], scaled), axis=1).astype(np.float32)

    def step(self, actions: np.ndarray) -> BatchStep:
        if not self.running.all():
            rows = np.flatnonzero(~self.running).tolist()
            raise ValueError(f"carts {rows}: expected a reset before the first step of an episode, was a step")
        check_actions(actions, self.action_masks)
        force = np.where(actions == self.buttons[:, 1], _PUSH, -_PUSH)
        self.state = cart_pole_step(self.state, force)
        self.steps += 1
        terminated = _is_down(self.state)
        limit = np.inf if self.max_episode_steps is None else self.max_episode_steps
        truncated = (self.steps >= limit) & ~terminated
        self.running = ~(terminated | truncated)
        return BatchStep(np.ones(len(actions)), terminated, truncated)


def _is_down(state: np.ndarray) -> np.ndarray:
    # Written so that NaN counts as down.
    return np.asarray(~((np.abs(state[:, 0]) <= X_LIMIT) & (np.abs(state[:, 2]) <= ANGLE_LIMIT)))


def _spaces(num_actions: int) -> tuple[spaces.Box, spaces.Discrete]:
    if num_actions < 2:
        raise ValueError(f"num_actions: expected >= 2, one button each way, was {num_actions}")
    # Twice the limits, as in CartPole-v1: the last observation of an episode lies beyond them. Velocities have no
    # limit; environment checkers warn about infinite ones.
    limit = np.finfo(np.float32).max
    high = np.array([2 * X_LIMIT, limit, 2 * ANGLE_LIMIT, limit, 1, 1], dtype=np.float32)
    low = np.where(np.arange(6) < 4, -high, 0).astype(np.float32)
    return spaces.Box(low, high, dtype=np.float32), spaces.Discrete(num_actions)
