"""Peers' planners on Detent's weights, behind the line protocol of `peer_speed`.

Started by path with the peer's interpreter, where Detent is not installed, by `benchmarks.planner_speed`. A task plans
from the next of the start rows and answers `[row, first action, ..., last action]`, so that the plans can be scored.

Every peer asks the same network: E members of SiLU layers that give, from obs and one-hot action, the change of obs and
the reward. A particle follows the mean of one member from start to end; without noise peers plan better and faster
than with it. mbrl-lib and TorchRL search real numbers: A of them stand for the action whose number is largest.

Letters: E members, S start rows, N candidates, P particles, H horizon, D obs, A actions.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The protocol sets the number of threads before numpy is imported: that waits until a peer is built.
Settings = dict[str, Any]
Plan = Callable[[int], list[int]]
"""A start row's index to H actions."""


def mbrl_lib(settings: Settings) -> dict[str, Callable[[], list[int]]]:
    """mbrl-lib's TrajectoryOptimizerAgent with its CEM, scored by its ModelEnv on a GaussianMLP (TSinf of PETS)."""
    import numpy as np
    import omegaconf
    import torch
    from gymnasium import spaces
    from mbrl.models import GaussianMLP, ModelEnv, OneDTransitionRewardModel
    from mbrl.models.util import EnsembleLinearLayer
    from mbrl.planning import TrajectoryOptimizerAgent

    torch.set_num_threads(1)
    weights, biases, starts = _problem(settings)
    members, inputs, outputs = len(weights[0]), weights[0].shape[1], weights[-1].shape[2]
    num_obs = starts.shape[1]
    num_actions = inputs - num_obs

    class Environment:
        observation_space = spaces.Box(-np.inf, np.inf, (num_obs,))
        action_space = spaces.Box(-1.0, 1.0, (num_actions,))

    def layer(index: int) -> EnsembleLinearLayer:
        built = EnsembleLinearLayer(members, *weights[index].shape[1:])
        built.weight.data, built.bias.data = torch.from_numpy(weights[index]), torch.from_numpy(biases[index])
        return built

    network = GaussianMLP(
        inputs, outputs, "cpu", ensemble_size=members, deterministic=True, propagation_method="fixed_model"
    )
    # Its constructor knows one width for all hidden layers; the layers themselves are its own.
    network.hidden_layers = torch.nn.Sequential(
        *(torch.nn.Sequential(layer(index), torch.nn.SiLU()) for index in range(len(weights) - 1))
    )
    network.mean_and_logvar = layer(len(weights) - 1)

    class OneHotModel(OneDTransitionRewardModel):  # type: ignore[misc]
        def _get_model_input(self, obs: Any, action: Any) -> Any:
            best = action.argmax(dim=1)
            return super()._get_model_input(obs, torch.nn.functional.one_hot(best, num_actions).float())

    env = ModelEnv(
        Environment(),
        OneHotModel(network, target_is_delta=True, normalize=False, learned_rewards=True),
        termination_fn=lambda action, next_obs: torch.zeros(len(next_obs), 1, dtype=torch.bool),  # noqa: ARG005
        generator=torch.Generator().manual_seed(0),
    )
    torch.manual_seed(0)

    def planner(particles: int) -> Plan:
        optimiser = omegaconf.OmegaConf.create(
            {
                "_target_": "mbrl.planning.CEMOptimizer",
                "num_iterations": settings["iterations"],
                "elite_ratio": settings["elites"] / settings["candidates"],
                "population_size": settings["candidates"],
                "alpha": 0.1,
                "device": "cpu",
                "lower_bound": "???",
                "upper_bound": "???",
            }
        )
        agent = TrajectoryOptimizerAgent(
            optimiser, [-1.0] * num_actions, [1.0] * num_actions, planning_horizon=settings["horizon"]
        )
        agent.set_trajectory_eval_fn(
            lambda state, actions: env.evaluate_action_sequences(actions, state, num_particles=particles)
        )

        def plan(row: int) -> list[int]:
            agent.reset()
            found: list[int] = agent.plan(starts[row]).argmax(axis=1).tolist()
            return found

        return plan

    return _tasks({f"{count} particles": planner(count) for count in settings["particles"]}, len(starts))


def torchrl(settings: Settings) -> dict[str, Callable[[], list[int]]]:
    """TorchRL's CEMPlanner on a ModelBasedEnvBase whose state is that of all particles."""
    import torch
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.data import Composite, Unbounded
    from torchrl.envs.model_based import ModelBasedEnvBase
    from torchrl.modules import CEMPlanner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    raw_weights, raw_biases, raw_starts = _problem(settings)
    weights, biases = ([torch.from_numpy(part) for part in parts] for parts in (raw_weights, raw_biases))
    starts, members = torch.from_numpy(raw_starts), len(raw_weights[0])
    num_obs = starts.shape[1]
    num_actions = weights[0].shape[1] - num_obs

    def step(obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one_hot = torch.nn.functional.one_hot(action.argmax(dim=-1), num_actions).to(obs.dtype)
        rows = torch.cat((obs, one_hot[..., None, :].expand(*obs.shape[:-1], num_actions)), dim=-1)
        # Particle p follows member p % E.
        hidden = rows.reshape(-1, members, rows.shape[-1]).transpose(0, 1)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if index < len(weights) - 1:
                hidden = torch.nn.functional.silu(hidden)
        change = hidden.transpose(0, 1).reshape(*obs.shape[:-1], num_obs + 1)
        return obs + change[..., :-1], change[..., -1].mean(dim=-1, keepdim=True)

    class Environment(ModelBasedEnvBase):  # type: ignore[misc]
        def __init__(self, particles: int) -> None:
            super().__init__(TensorDictModule(step, ["obs", "action"], ["obs", "reward"]))
            self.observation_spec = Composite(obs=Unbounded((particles, num_obs)))
            self.state_spec = Composite(obs=Unbounded((particles, num_obs)))
            self.action_spec = Unbounded((num_actions,))
            self.reward_spec = Unbounded((1,))
            self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def _step(self, tensordict: TensorDict) -> TensorDict:
            following = super()._step(tensordict)
            self.seen = [*self.seen, (tensordict["action"], following["reward"])][-settings["horizon"] :]
            return following

        def _reset(self, *_: Any, **__: Any) -> TensorDict:
            raise RuntimeError("reset: expected never to be called, a planner starts where it is told to")

    def planner(particles: int) -> Plan:
        env = Environment(particles)
        search = CEMPlanner(
            env, settings["horizon"], settings["iterations"], settings["candidates"], settings["elites"]
        )

        @torch.no_grad()
        def plan(row: int) -> list[int]:
            search.planning(TensorDict({"obs": starts[row].expand(particles, -1)}, batch_size=[]))
            # It answers with the first action only. The others are what it has computed as well: the means of the best
            # candidates of its last iteration.
            earned = torch.stack([reward for _, reward in env.seen]).sum(dim=0)[:, 0]
            best = earned.topk(settings["elites"]).indices
            return [int(action[best].mean(dim=0).argmax()) for action, _ in env.seen]

        return plan

    return _tasks({f"{count} particles": planner(count) for count in settings["particles"]}, len(starts))


def mctx_search(settings: Settings) -> dict[str, Callable[[], list[int]]]:
    """The gumbel_muzero_policy of mctx, compiled, without Gumbel noise; its state is that of all members.

    It is made for trained priors and values. Here priors are flat and values 0, so that it sees rewards alone, like the
    others.
    """
    import jax
    import mctx
    from jax import numpy as jnp

    raw_weights, raw_biases, starts = _problem(settings)
    weights, biases = ([jnp.asarray(part) for part in parts] for parts in (raw_weights, raw_biases))
    members, num_obs = len(raw_weights[0]), starts.shape[1]
    num_actions = raw_weights[0].shape[1] - num_obs
    flat = jnp.zeros((1, num_actions))

    def step(params: Any, rng: Any, action: Any, obs: Any) -> tuple[Any, Any]:  # noqa: ARG001 - its signature
        one_hot = jnp.broadcast_to(jax.nn.one_hot(action, num_actions)[:, None], (1, members, num_actions))
        hidden = jnp.concatenate((obs, one_hot), axis=2).transpose(1, 0, 2)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = hidden @ weight + bias
            if index < len(weights) - 1:
                hidden = jax.nn.silu(hidden)
        change = hidden.transpose(1, 0, 2)
        reward = change[:, :, -1].mean(axis=1)
        nothing = jnp.zeros_like(reward)
        answer = mctx.RecurrentFnOutput(reward=reward, discount=nothing + 1.0, prior_logits=flat, value=nothing)
        return answer, obs + change[:, :, :-1]

    def planner(simulations: int) -> Plan:
        @jax.jit  # type: ignore[untyped-decorator]
        def search(start: Any) -> Any:
            root = mctx.RootFnOutput(
                prior_logits=flat,
                value=jnp.zeros(1),
                embedding=jnp.broadcast_to(start, (1, members, num_obs)),
            )
            found = mctx.gumbel_muzero_policy(
                None,
                jax.random.key(0),
                root,
                step,
                num_simulations=simulations,
                max_depth=settings["horizon"],
                gumbel_scale=0.0,
            )
            return _walk(found, settings["horizon"])

        return lambda row: [int(action) for action in search(starts[row])]

    # Its action, then at every node the visited child of the highest value; 0 where nothing was visited.
    def _walk(found: Any, horizon: int) -> Any:
        tree, action, node = found.search_tree, found.action[0], 0
        plan = [action]
        for _ in range(horizon - 1):
            node = tree.children_index[0, node, action]
            values = tree.children_rewards[0, node] + tree.children_discounts[0, node] * tree.children_values[0, node]
            values = jnp.where((tree.children_visits[0, node] > 0) & (node >= 0), values, -jnp.inf)
            action = values.argmax()
            plan.append(action)
        return jnp.stack(plan)

    return _tasks({f"{count} simulations": planner(count) for count in settings["simulations"]}, len(starts))


PEERS: dict[str, tuple[Callable[[Settings], dict[str, Callable[[], list[int]]]], tuple[str, ...]]] = {
    "mbrl-lib": (mbrl_lib, ("mbrl", "torch")),
    "TorchRL": (torchrl, ("torchrl", "torch")),
    "mctx": (mctx_search, ("mctx", "jax")),
}
"""By name: what builds the tasks, and the distributions whose versions matter."""


# Weights [E, in, out] and biases [E, 1, out] of each layer, and start rows [S, D].
def _problem(settings: Settings) -> tuple[list[Any], list[Any], Any]:
    import numpy as np

    with np.load(settings["problem"]) as stored:
        layers = range(sum(name.startswith("weight") for name in stored))
        return (
            [stored[f"weight_{index}"] for index in layers],
            [stored[f"bias_{index}"] for index in layers],
            stored["starts"],
        )


# Each task plans from one start row after the other, again and again.
def _tasks(planners: dict[str, Plan], num_starts: int) -> dict[str, Callable[[], list[int]]]:
    def task(plan: Plan) -> Callable[[], list[int]]:
        rows: Iterator[int] = itertools.cycle(range(num_starts))

        def call() -> list[int]:
            row = next(rows)
            return [row, *plan(row)]

        return call

    return {name: task(plan) for name, plan in planners.items()}


if __name__ == "__main__":
    # Not where the interpreter looks if it runs in isolation.
    sys.path.insert(0, str(Path(__file__).parent))
    from peer_speed import serve  # type: ignore[import-not-found]

    serve(PEERS, sys.argv[1], json.loads(sys.argv[2]))
