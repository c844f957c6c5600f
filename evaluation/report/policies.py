"""The policies by name: what each one is, and an order that fixes how it is drawn."""

from __future__ import annotations

from collections.abc import Iterable

POLICIES = {
    "mbpo": "masked PPO on real and imagined bars",
    "model_free": "MaskablePPO on history alone",
    "sac": "soft actor-critic on the continuous position, projected onto the valid actions",
    "masked_dqn": "masked double DQN",
    "ridge": "ridge forecast with a cost-aware choice",
    "buy_and_hold": "fully invested as far as the limits allow",
    "linear_signal": "long where one signal is high, flat where it is low",
    "mbpo_planner": "the planner with MBPO's value function at its horizon",
    "planner": "exhaustive planner over the world model",
    "belief_filter": "an exact programme on what can be known of regime and signal",
    "oracle": "an exact programme that is told the hidden regime and signal",
    "vol_target": "position scaled to a constant volatility",
    "flat": "never trades",
    "random_valid": "a random valid action at every bar",
}
"""Name -> what it is. A colour and line belong to a place: new policies go to the end."""


def glossary(names: Iterable[str]) -> dict[str, str]:
    """What those of the names mean that have a meaning here, in the order of `POLICIES`."""
    present = set(names)
    return {name: meaning for name, meaning in POLICIES.items() if name in present}
