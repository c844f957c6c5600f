"""Everything a MaskablePPO in training depends on, taken between two rollouts and put back.

There the rollout buffer is spent and its next content has not begun, so weights, optimiser, the observations to go on
from, counters and generators are all there is. stable-baselines3 seeds and draws from the global generators of torch,
NumPy and Python; they are part of the state.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO

from envs.vec_env import TradingVecEnv

_COUNTERS = ("num_timesteps", "_n_updates", "_current_progress_remaining")


def learner_state(model: MaskablePPO, env: TradingVecEnv) -> dict[str, Any]:
    """A tree of arrays, tensors and JSON values."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the generator sb3 shuffles minibatches with
    return {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict()["state"],
        "last_obs": model._last_obs,
        "last_episode_starts": model._last_episode_starts,
        "counters": {name: getattr(model, name) for name in _COUNTERS},
        "env": env.state_dict(),
        "generators": {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()},
    }


def restore_learner(model: MaskablePPO, env: TradingVecEnv, state: dict[str, Any]) -> None:
    """Put back what `learner_state` gave, in a model and an environment that were built the same.

    Raises: KeyError, RuntimeError or ValueError where they were not.
    """
    model.policy.load_state_dict(_tensors(state["policy"]))
    optimizer = model.policy.optimizer
    moments = {int(index): _tensors(part) for index, part in state["optimizer"].items()}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    model._last_obs, model._last_episode_starts = state["last_obs"], state["last_episode_starts"]
    for name in _COUNTERS:
        setattr(model, name, state["counters"][name])
    env.load_state_dict(state["env"])
    generators = state["generators"]
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(generators["numpy"])  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(generators["torch"]))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
