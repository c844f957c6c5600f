"""Planners in one learned world: how fast they decide, and what their plans are worth beside those of others.

All actions are valid, because no peer masks imagined steps, and plans are compared with theirs. Nothing is learned: the
networks are fresh, members as alike as fitted ones are, and the world is what they say.

Letters: E members, S start rows, H horizon, D obs, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.planner_tasks import (
    DEEP,
    DEEP_FLOOR,
    ROWS,
    SAMPLED,
    SAMPLED_FLOOR,
    TREE,
    TREE_FLOOR,
    TREE_TORCH,
    Call,
    PlannerSizes,
    open_graph,
    products_call,
    rows_call,
)
from export.onnx_files import EXAMPLE_BATCH, onnx_bytes
from export.world_planner_graph import Search, WorldPlannerGraph, WorldPlannerOutputs
from mbpo.planning_world import WorldPlanning
from planner import CEM, Objective
from planner.dense import DenseExhaustive
from world_model import Normaliser
from world_model.known import KnownParts
from world_model.world import WorldModel, WorldSizes

UNDISCOUNTED = Objective(discount=1.0)
"""mbrl-lib and TorchRL add rewards up as they are."""
RANDOM = "random sequences"


@dataclass(frozen=True, kw_only=True)
class PlanQuality:
    """What the plans of one planner earn."""

    rows: int
    value: float
    """Mean over the rows."""
    best_value: float
    """Of the tree's plans from the same rows; it tries every plan there is."""
    best_actions: float
    """Share of rows in which the plan begins as the tree's."""


class WorldPlanners:
    """Planners in one untrained world, exported when they are first needed: how fast they are, and what they find."""

    def __init__(self, sizes: PlannerSizes) -> None:
        self.sizes, self.world = sizes, make_world(sizes)
        generator = torch.Generator().manual_seed(1)
        self.starts: npt.NDArray[np.float32] = torch.randn(ROWS, sizes.obs, generator=generator).numpy()
        self.searches: dict[str, Search] = {
            TREE: DenseExhaustive(horizon=sizes.horizon, objective=UNDISCOUNTED),
            DEEP: DenseExhaustive(horizon=sizes.deep_horizon, objective=UNDISCOUNTED),
            SAMPLED: CEM(
                horizon=sizes.horizon,
                candidates=sizes.candidates,
                elites=sizes.elites,
                iterations=sizes.iterations,
                objective=UNDISCOUNTED,
            ),
        }
        self._sessions: dict[Search, Any] = {}

    def calls(self) -> dict[str, Call]:
        """Decisions, and the products in them."""
        sizes = self.sizes
        decide = {name: rows_call(self._session(name), self._inputs(name)) for name in self.searches}
        return {
            TREE: decide[TREE],
            TREE_FLOOR: products_call(self.world, sizes.widths(sizes.horizon)),
            TREE_TORCH: self._eager_call(),
            DEEP: decide[DEEP],
            DEEP_FLOOR: products_call(self.world, sizes.widths(sizes.deep_horizon)),
            SAMPLED: decide[SAMPLED],
            SAMPLED_FLOOR: products_call(self.world, [sizes.candidates] * sizes.horizon, times=sizes.iterations),
        }

    def plans(self, name: str, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Sequences [rows, H] that the graph TREE or SAMPLED finds for these start rows."""
        inputs = {key: value[[*rows]] for key, value in self._inputs(name).items()}
        found = WorldPlannerOutputs(*self._session(name).run(None, inputs))
        sequence: npt.NDArray[np.int64] = found.sequence
        return sequence

    def values(self, rows: Sequence[int], plans: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What plans [rows, H] earn from these start rows, float64 [rows]: mean over members, each on its own mean."""
        members = self.world.elites
        obs = torch.from_numpy(self.starts[[*rows]]).expand(len(members), -1, -1)
        earned = torch.zeros(len(rows), dtype=torch.float64)
        for action in torch.from_numpy(plans).T:
            obs, reward, _ = self.world.step_each(obs, action[None, :, None].expand(len(members), -1, -1), members)
            earned += reward.to(torch.float64).mean(dim=0)
        return earned.numpy()

    def write_problem(self, path: Path, count: int) -> None:
        """Store for peers what they plan with: layers without statistics around them, and the first start rows."""
        network, targets = self.world.dynamics, self.world.targets
        weights, biases = ([*map(torch.clone, part)] for part in (network.weights, network.biases))
        weights[-1] = weights[-1][..., : self.sizes.outputs] * targets.std
        biases[-1] = biases[-1][..., : self.sizes.outputs] * targets.std + targets.mean
        layers = {
            f"{kind}_{index}": part.numpy()
            for kind, parts in (("weight", weights), ("bias", biases))
            for index, part in enumerate(parts)
        }
        np.savez(path, allow_pickle=False, starts=self.starts[:count], **layers)

    def _session(self, name: str) -> Any:
        search = self.searches[name]
        if search not in self._sessions:
            self._sessions[search] = self._exported(search)
        return self._sessions[search]

    def _exported(self, search: Search) -> Any:
        graph = WorldPlannerGraph(self.world, search)
        example = {
            "obs": torch.zeros(EXAMPLE_BATCH, self.sizes.obs),
            "action_masks": torch.ones(EXAMPLE_BATCH, self.sizes.actions, dtype=torch.bool),
        }
        if not isinstance(search, DenseExhaustive):
            example["seed"] = torch.zeros(EXAMPLE_BATCH, dtype=torch.int64)
        return open_graph(onnx_bytes(graph, example, WorldPlannerOutputs._fields, {}))

    def _inputs(self, name: str) -> dict[str, npt.NDArray[Any]]:
        inputs: dict[str, npt.NDArray[Any]] = {
            "obs": self.starts,
            "action_masks": np.ones((ROWS, self.sizes.actions), dtype=np.bool_),
        }
        return inputs | ({"seed": np.zeros(ROWS, dtype=np.int64)} if name == SAMPLED else {})

    def _eager_call(self) -> Call:
        planning, search = WorldPlanning(self.world), self.searches[TREE]
        assert isinstance(search, DenseExhaustive)  # noqa: S101 - built above
        obs, masks = torch.from_numpy(self.starts), torch.ones(1, self.sizes.actions, dtype=torch.bool)

        def call(index: int) -> object:
            row = index % ROWS
            return search.plan(planning, planning.roots(obs[row : row + 1], masks))

        return call


def make_world(sizes: PlannerSizes) -> WorldModel:
    """An untrained world whose episodes do not end within a plan."""
    shape = WorldSizes(
        num_obs=sizes.obs,
        num_actions=(sizes.actions,),
        num_members=sizes.members,
        hidden=sizes.hidden,
        terminates=False,
    )
    network, _ = shape.networks(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in network.weights:
            # Fresh networks answer almost nothing, whatever is done, and agree on nothing; fitted ones do neither.
            weight.copy_(3.0 * torch.lerp(weight[:1].expand_as(weight), weight, 0.1))
    ones = torch.ones(sizes.obs)
    return WorldModel(
        shape,
        KnownParts(terminated=lambda obs: obs[:, 0] > 1e9),
        inputs=Normaliser(0.0 * ones, ones),
        targets=Normaliser(torch.zeros(sizes.outputs), 0.1 * torch.ones(sizes.outputs)),
        dynamics=network,
        termination=None,
        elites=range(sizes.members),
        termination_elites=(),
        support=(-1e3 * ones, 1e3 * ones),
        masks=None,
    )


def compare_plans(planners: WorldPlanners, found: Mapping[str, Mapping[int, Sequence[int]]]) -> dict[str, PlanQuality]:
    """What plans are worth, those of Detent's tree and CEM and of random sequences from all rows among them.

    Args: found: by planner, from start row to actions.
    """
    rows = range(len(planners.starts))
    best = planners.plans(TREE, rows)
    best_values = planners.values(rows, best)
    shape = (len(rows), planners.sizes.horizon)
    known: dict[str, Mapping[int, Sequence[int]]] = {
        TREE: dict(enumerate(best)),
        SAMPLED: dict(enumerate(planners.plans(SAMPLED, rows))),
        RANDOM: dict(enumerate(np.random.default_rng(0).integers(0, planners.sizes.actions, shape))),
        **found,
    }
    qualities = {}
    for name, plans in known.items():
        index = sorted(plans)
        chosen = np.array([plans[row] for row in index], dtype=np.int64)
        qualities[name] = PlanQuality(
            rows=len(index),
            value=float(planners.values(index, chosen).mean()),
            best_value=float(best_values[index].mean()),
            best_actions=float((chosen[:, 0] == best[index, 0]).mean()),
        )
    return qualities
