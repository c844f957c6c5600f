"""What is timed of planning: the policy, planners of the trading market, and the matrix products of a search alone.

Every call decides one row, batch 1, one thread, onnxruntime as serving opens it. In the world all actions are valid,
and its graphs take as long whatever the masks say. Planners of the market walk only what masks leave: rows are flat,
active accounts, which have the most before them, and once again rows of all kinds, most of which must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from gymnasium import spaces
from onnx import helper, numpy_helper
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import nn

from configs.schema import DetentConfig, PlannerConfig
from data import Scaler
from data.features import FEATURE_FIELDS
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, TradingDynamics
from export.graphs import FORBIDDEN_LOGIT, PolicyGraph
from export.onnx_files import EXAMPLE_BATCH, OPSET, onnx_bytes
from export.planner_graph import PlannerGraph
from export.states import probe_states
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy
from serving import PlannerOutputs, PolicyOutputs
from world_model import EnsembleMLP, MarketModel, Normaliser
from world_model.world import WorldModel

Call = Callable[[int], object]
"""Decides one row; the index may be any number, rows repeat."""

POLICY, NETWORK, PREDICT = "policy", "policy, network alone", "policy, sb3-contrib"
TREE, TREE_FLOOR, TREE_TORCH = "tree", "tree, products alone", "tree, plain torch"
DEEP, DEEP_FLOOR = "deep tree", "deep tree, products alone"
SAMPLED, SAMPLED_FLOOR = "cem", "cem, products alone"
SCENARIOS, SCENARIOS_MIXED, SCENARIOS_DEFAULT = "scenarios", "scenarios, all kinds of rows", "scenarios, default"
FLOORS = {POLICY: NETWORK, TREE: TREE_FLOOR, DEEP: DEEP_FLOOR, SAMPLED: SAMPLED_FLOOR}

ROWS = 256
"""Distinct rows that the calls cycle through."""


@dataclass(frozen=True, kw_only=True)
class PlannerSizes:
    """Sizes of the worlds and searches."""

    obs: int = 64
    actions: int = 7
    members: int = 5
    hidden: tuple[int, ...] = (64, 128, 64)
    horizon: int = 3
    deep_horizon: int = 4
    candidates: int = 512
    elites: int = 32
    iterations: int = 3
    scenarios: int = 320

    @property
    def outputs(self) -> int:
        """Columns a member predicts the mean of: change of obs, and reward."""
        return self.obs + 1

    def widths(self, horizon: int) -> list[int]:
        """Nodes of each depth of the tree."""
        return [self.actions**depth for depth in range(1, horizon + 1)]


SMOKE = PlannerSizes(
    obs=3,
    actions=3,
    members=2,
    hidden=(4, 4),
    horizon=1,
    deep_horizon=1,
    candidates=8,
    elites=2,
    iterations=1,
    scenarios=DetentConfig().planner.scenarios,
)
"""Sizes that answer nothing but run everything, and share graphs: an export takes seconds."""


class NetworkGraph(nn.Module):
    """What sb3-contrib computes for a decision, as a graph: obs [B, D], masks bool [B, A] ready made -> action [B]."""

    def __init__(self, policy: MaskableActorCriticPolicy) -> None:
        super().__init__()
        self.mlp_extractor, self.action_net = policy.mlp_extractor, policy.action_net

    def forward(self, obs: torch.Tensor, action_masks: torch.Tensor) -> torch.Tensor:
        """Most probable valid action."""
        logits = self.action_net(self.mlp_extractor.forward_actor(obs))
        return torch.where(action_masks, logits, FORBIDDEN_LOGIT).argmax(dim=1)


def trading_calls(sizes: PlannerSizes) -> dict[str, Call]:
    """The policy's graph, its network alone, sb3-contrib's way to ask it, and scenario planners of the trading market.

    Networks of the default config, untrained; planners end with the policy's value, as in a bundle. sb3-contrib and the
    network alone get obs and masks ready made, which the graph computes.
    """
    config = DetentConfig()
    names = tuple(field.name for field in FEATURE_FIELDS)
    dynamics = TradingDynamics.from_config(names, config)
    rng = np.random.default_rng(0)
    features = Scaler.fit(0.01 * rng.standard_normal((ROWS, len(names))), names)
    scaler = Scaler.concat([features, Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))])
    state = probe_states(dynamics, scaler, 4 * ROWS, rng)
    state = state[(np.abs(state) < 1e6).all(axis=1)][:ROWS]
    flat = _flat(dynamics, state)
    policy = _policy(dynamics, config)
    inputs = {"state": state, "caller_masks": np.ones((ROWS, dynamics.num_actions), dtype=np.bool_)}
    ready = {"obs": np.asarray(scaler(state[:, :-1])), "action_masks": np.asarray(dynamics.action_masks(state))}
    graph, network = PolicyGraph(dynamics, scaler, policy), NetworkGraph(policy)
    calls = {
        POLICY: rows_call(open_graph(onnx_bytes(graph, _example(inputs), PolicyOutputs._fields, {})), inputs),
        NETWORK: rows_call(open_graph(onnx_bytes(network, _example(ready), ("action",), {})), ready),
        PREDICT: _predict_call(policy, ready["obs"], ready["action_masks"]),
    }
    inputs["seed"] = np.zeros(ROWS, dtype=np.int64)
    model, value = untrained_market(config), TorchPolicy("value", policy, scaler)
    wanted = {
        SCENARIOS: (sizes.scenarios, flat),
        SCENARIOS_MIXED: (sizes.scenarios, state),
        SCENARIOS_DEFAULT: (config.planner.scenarios, flat),
    }
    graphs = {}
    for scenarios in {scenarios for scenarios, _ in wanted.values()}:
        settings = PlannerConfig(search="exhaustive", horizon=sizes.horizon, scenarios=scenarios)
        planner = PlannerPolicy(dynamics, model, settings, seed=0, gamma=config.mbpo.ppo.gamma, value=value)
        data = onnx_bytes(PlannerGraph(planner), _example(inputs), PlannerOutputs._fields, {})
        graphs[scenarios] = open_graph(data)
    return calls | {
        name: rows_call(graphs[scenarios], inputs | {"state": rows}) for name, (scenarios, rows) in wanted.items()
    }


def products_call(world: WorldModel, rows: Sequence[int], *, times: int = 1) -> Call:
    """The products of one search alone, as one graph: each member's layers for so many rows of each depth.

    One member after the other, which onnxruntime runs faster than products of all members at once.

    Args: rows of each depth; times: how often the graph runs in a call.
    """
    widths = [weight.shape[2] for weight in world.dynamics.weights[:-1]]
    sizes = [world.dynamics.num_inputs, *widths, world.dynamics.num_outputs]
    nodes, inputs, outputs, feed = [], [], [], {}
    rng = np.random.default_rng(0)
    constants = {"first": np.array([0]), "second": np.array([1])}
    for member in range(len(world.elites)):
        for layer, weight in enumerate(world.dynamics.weights):
            constants[f"weight_{member}_{layer}"] = weight[member, :, : sizes[layer + 1]].numpy()
    for depth, count in enumerate(rows):
        for member in range(len(world.elites)):
            value = f"rows_{depth}_{member}"
            feed[value] = rng.standard_normal((count, sizes[0]), dtype=np.float32)
            inputs.append(helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [count, sizes[0]]))
            for layer in range(len(sizes) - 1):
                product = f"product_{depth}_{member}_{layer}"
                nodes.append(helper.make_node("MatMul", [value, f"weight_{member}_{layer}"], [product]))
                value = product
            # One row: what nobody asks for is not computed, and copying all out would count.
            nodes.append(helper.make_node("Slice", [value, "first", "second", "first"], [f"out_{depth}_{member}"]))
            outputs.append(
                helper.make_tensor_value_info(f"out_{depth}_{member}", onnx.TensorProto.FLOAT, [1, sizes[-1]])
            )
    initialisers = [numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in constants.items()]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initialisers)
    # onnxruntime reads this version of the format; newer ones than it knows are refused.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = open_graph(model.SerializeToString())

    def call(index: int) -> None:  # noqa: ARG001 - any row
        for _ in range(times):
            session.run(None, feed)

    return call


def open_graph(data: bytes) -> Any:
    """An onnxruntime session with the options of serving."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def rows_call(session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> Call:
    """Decide row by row. Args: inputs [ROWS, ...] by name."""
    feeds = [{name: np.ascontiguousarray(part[row : row + 1]) for name, part in inputs.items()} for row in range(ROWS)]
    return lambda index: session.run(None, feeds[index % ROWS])


# The same markets seen by an account that is flat, at its peak and free to trade.
def _flat(dynamics: TradingDynamics, state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rows = state.copy()
    columns = {**{field.name: 0.0 for field in ACCOUNT_FIELDS}, "holding_time": 10.0, "data_age": 0.0}
    for name, value in {**columns, "volatility_20": 0.15}.items():
        rows[:, dynamics.state_names.index(name)] = value
    return rows


def _example(inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(part[:EXAMPLE_BATCH].copy()) for name, part in inputs.items()}


# sb3-contrib's own class: Detent's checks are not its cost. `MaskablePPO.predict` is this policy's `predict`.
def _policy(dynamics: TradingDynamics, config: DetentConfig) -> MaskableActorCriticPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = MaskableActorCriticPolicy(
            spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32),
            spaces.Discrete(dynamics.num_actions),
            lr_schedule=lambda _: 0.0,
            net_arch=list(config.mbpo.ppo.net_arch),
        )
    policy.set_training_mode(False)
    return policy


def _predict_call(policy: MaskableActorCriticPolicy, obs: npt.NDArray[Any], masks: npt.NDArray[Any]) -> Call:
    def call(index: int) -> object:
        row = index % ROWS
        return policy.predict(obs[row : row + 1], action_masks=masks[row : row + 1], deterministic=True)

    return call


def untrained_market(config: DetentConfig) -> MarketModel:
    """A market model of the config's sizes with random weights: as fast as a trained one."""
    settings, ones = config.world_model, torch.ones(len(FEATURE_FIELDS))
    network = EnsembleMLP(
        settings.num_members,
        len(FEATURE_FIELDS),
        len(FEATURE_FIELDS),
        hidden=settings.hidden,
        logvar_bounds=settings.logvar_bounds,
        generator=torch.Generator().manual_seed(0),
    )
    return MarketModel(
        FEATURE_FIELDS,
        settings,
        Normaliser(0.0 * ones, 0.01 * ones),
        Normaliser(0.0 * ones, 0.001 * ones),
        network,
        elites=range(settings.num_elites),
        support=(-0.05 * ones, 0.05 * ones),
    )
