"""Any other search of the planner as one graph: CEM, random shooting, and the tree under another objective.

The search is the one that plans in Python, traced over the same scenarios; letters as in `export.scenario_graph`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export.planner_graph import PlannerGraph
from export.scenario_graph import ScenarioGraph
from masking import HOLD
from mbpo.planning import PlannerPolicy, ScenarioModel, Scenarios
from planner import CEM, Exhaustive, RandomShooting
from planner.dense import DenseExhaustive
from serving import PlannerOutputs


class SearchGraph(ScenarioGraph):
    """As `PlannerGraph`, for every search; `seed` picks the search's noise too.

    Of first actions worth the same that of the sequence found stands, whatever the value policy would do.
    """

    draws: Tensor

    def __init__(self, policy: PlannerPolicy, *, noise_tables: int = 1) -> None:
        """Copy what plans. Args: policy; noise_tables: how many the file has."""
        super().__init__(policy, noise_tables)
        search = policy.search
        self.search: DenseExhaustive | CEM | RandomShooting
        if isinstance(search, Exhaustive):
            self.search = DenseExhaustive(
                horizon=search.horizon, objective=search.objective, particles=search.particles
            )
            draws = torch.zeros(1)
        else:
            self.search = search
            draws = torch.stack([policy.search_noise(table)[:, 0] for table in range(noise_tables)])
        self.register_buffer("draws", draws)

    def forward(self, state: Tensor, caller_masks: Tensor, seed: Tensor) -> PlannerOutputs:
        """See `PlannerGraph`."""
        dynamics = self.dynamics
        masks, sane = self.begin(state, caller_masks)
        doubt, bars = self.imagine(state[:, : len(dynamics.feature_names)], seed)
        scenarios = Scenarios(
            torch.stack([bar.features.transpose(1, 2) for bar in bars]),
            torch.stack([doubt, *(bar.uncertainty for bar in bars)]),
            torch.stack([bar.mean.transpose(1, 2) for bar in bars]),
            torch.stack([bar.variance.transpose(1, 2) for bar in bars]),
        )
        model = ScenarioModel(
            dynamics,
            scenarios,
            masks,
            None if self.value is None else self.value.values,
            control_variate=self.control_variate,
        )
        if isinstance(self.search, DenseExhaustive):
            plan = self.search.plan(model, model.roots(state))
        else:
            draws = self.draws[seed.remainder(self.draws.shape[0])].transpose(0, 1)
            plan = self.search.plan(model, model.roots(state), noise=draws)
        decided = sane[:, 0] & ~plan.fallback
        values = plan.action_values
        if values is None:
            raise RuntimeError("plan: expected action values of one dimension, was none")
        return PlannerOutputs(
            torch.where(decided, plan.action, HOLD),
            torch.where(decided, plan.value, 0.0).to(torch.float32),
            values.to(torch.float32),
            torch.where(decided[:, None], plan.sequence, HOLD),
            masks,
            ~decided,
        )


PlannerModule = PlannerGraph | SearchGraph


def planner_graph(policy: PlannerPolicy, *, noise_tables: int = 1) -> PlannerModule:
    """The fastest graph that plans as `policy` does. Args: noise_tables: how many the file has."""
    search = policy.search
    if isinstance(search, Exhaustive) and search.particles == "all" and search.objective.tail >= 1.0:
        return PlannerGraph(policy, noise_tables=noise_tables)
    return SearchGraph(policy, noise_tables=noise_tables)
