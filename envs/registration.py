"""Registered ids of the environments: importing this module makes them known to `gymnasium.make`.

Gymnasium dropped its plugin entry points in 1.0; an id may name the module that registers it instead::

    gymnasium.make("envs.registration:detent/MaskedCartPole-v0")

An episode is cut by one mechanism only. CartPole leaves it to Gymnasium's `TimeLimit`: 500 steps, or what
`gymnasium.make(..., max_episode_steps=...)` asks for. The other environments end themselves, as their history or
their periods do; they are registered without a limit, and `TimeLimit` could only shorten them.
"""

from __future__ import annotations

import gymnasium

gymnasium.register(
    "detent/MaskedCartPole-v0",
    entry_point="envs.masked_cartpole:MaskedCartPoleEnv",
    max_episode_steps=500,
    kwargs={"max_episode_steps": None},
)
gymnasium.register("detent/Portfolio-v0", entry_point="envs.portfolio:PortfolioEnv", kwargs={"variant": "strict"})
gymnasium.register(
    "detent/PortfolioPublished-v0", entry_point="envs.portfolio:PortfolioEnv", kwargs={"variant": "published"}
)
gymnasium.register("detent/Trading-v0", entry_point="envs.trading:bundled_trading_env")
