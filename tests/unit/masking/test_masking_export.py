"""The same rule set inside an exported graph: torch.export, then onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from masking_worlds import BOUNDARIES, CALM, FIELDS, near, ruleset
from torch import nn

RULES = ruleset(paper=True)

Graph = Callable[[np.ndarray], np.ndarray]


class MaskModule(nn.Module):
    """Named columns of one state array to masks, as flat columns or as slices."""

    def __init__(self, *, slices: bool) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        if self.slices:
            return RULES({name: state[:, index : index + 1] for index, name in enumerate(FIELDS)})
        return RULES({name: state[:, index] for index, name in enumerate(FIELDS)})


def boundary_states() -> np.ndarray:
    """[N, F] float32: every boundary with its neighbours, and every field broken in three ways."""
    rows = []
    for field in FIELDS:
        values = [value for boundary in BOUNDARIES[field] for value in near(boundary)]
        for value in (*values, np.nan, np.inf, -np.inf):
            for position in (0.0, 0.5, 1.25):
                for code in (0.0, 1.0):
                    row = {
                        **CALM,
                        "position": position,
                        "trading_state": code,
                        "holding_time": 2.0 + code,
                        field: value,
                    }
                    rows.append([row[name] for name in FIELDS])
    return np.array(rows, dtype=np.float32)


def numpy_masks(state: np.ndarray) -> np.ndarray:
    return RULES({name: state[:, index] for index, name in enumerate(FIELDS)})


def exported(*, slices: bool) -> torch.export.ExportedProgram:
    # Two rows: an example of one row would freeze the batch dimension silently.
    return torch.export.export(
        MaskModule(slices=slices).eval(),
        (torch.zeros(2, len(FIELDS)),),
        dynamic_shapes={"state": {0: torch.export.Dim("batch")}},
    )


def onnx_model(*, slices: bool) -> onnx.ModelProto:
    with warnings.catch_warnings():
        # torch's own exporter uses parts of torch that torch deprecates.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported(slices=slices),
            dynamo=True,
            external_data=False,
            input_names=["state"],
            output_names=["masks"],
            verbose=False,
        )
    return program.model_proto


def onnx_graph(*, slices: bool) -> Graph:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = onnx_model(slices=slices).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda state: session.run(["masks"], {"state": state})[0]


@pytest.fixture(scope="module", params=["torch.export", "onnxruntime", "onnxruntime, slices"])
def graph(request: pytest.FixtureRequest) -> Graph:
    if request.param != "torch.export":
        return onnx_graph(slices=request.param.endswith("slices"))
    module = exported(slices=False).module()
    return lambda state: module(torch.as_tensor(state)).numpy()


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_graphs_give_the_masks_of_numpy_at_any_batch(graph: Graph, batch: int) -> None:
    states = boundary_states()
    for first in range(0, len(states) - batch + 1, batch):
        state = states[first : first + batch]
        masks = graph(state)
        assert masks.dtype == np.bool_
        np.testing.assert_array_equal(masks, numpy_masks(state))


def test_graphs_give_the_masks_of_numpy_on_random_states(graph: Graph) -> None:
    rng = np.random.default_rng(0)
    state = rng.uniform(0.0, 1.3, (4096, len(FIELDS))).astype(np.float32)
    state[:, FIELDS.index("drawdown")] *= 0.12
    state[:, FIELDS.index("trading_state")] = rng.integers(0, 3, 4096)
    state[:, FIELDS.index("holding_time")] = rng.integers(0, 6, 4096)
    masks = graph(state)
    np.testing.assert_array_equal(masks, numpy_masks(state))
    assert 0.01 < masks[:, 1:].mean() < 0.5


def test_a_broken_row_in_a_graph_leaves_only_hold_and_its_neighbours_alone(graph: Graph) -> None:
    state = np.array([[CALM[name] for name in FIELDS]] * 3, dtype=np.float32)
    state[1, FIELDS.index("drawdown")] = np.nan
    masks = graph(state)
    assert masks[1].tolist() == [True] + [False] * 6
    assert masks[0].tolist() == masks[2].tolist() == [True, True, True, True, False, False, False]


def test_the_exported_rules_stay_a_small_graph() -> None:
    # Time follows the number of nodes, about 0.25 us each at one row; 75 and more missed the goal of 20 us.
    assert len(onnx_model(slices=True).graph.node) <= 58
    assert len(onnx_model(slices=False).graph.node) <= 64
