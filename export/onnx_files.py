"""From torch module to ONNX bytes that depend on nothing but the module.

The exporter writes stack traces with paths of the machine into every node; they are removed, together with all other
descriptive metadata, so that equal modules give equal bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from masking.rules_graph import quiet_exporter

OPSET = 20
"""Operator set of every exported graph."""
EXAMPLE_BATCH = 3
"""Rows of the example input. One row can freeze the batch without a word, so there are more; readers check."""


def onnx_bytes(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    metadata: Mapping[str, str],
) -> bytes:
    """Export a module whose inputs and outputs share a leading batch of any size.

    Args: inputs: name -> example [EXAMPLE_BATCH, ...], in the order of `forward`; metadata: stored in the file.
    Returns: one self-contained ONNX file.
    """
    batch = torch.export.Dim("batch", min=1)
    module = module.eval()
    with _quiet(), torch.no_grad():
        # Traced first: the exporter would meet a batch that cannot vary by freezing it, without a word.
        traced = torch.export.export(
            module, tuple(inputs.values()), dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
        )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(output_names),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export: expected a program, was None")
    model = program.model_proto
    strip_metadata(model)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def strip_metadata(model: Any) -> None:
    """Remove everything that only describes: documentation, metadata and types of inner values."""
    del model.metadata_props[:]
    model.doc_string = ""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        # Inner values repeat the exporter's names and metadata; readers infer their types.
        del graph.value_info[:]
        for part in (graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
            part.doc_string = ""
            del part.metadata_props[:]
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_exporter():
        # All inputs share one batch on purpose; the exporter points out each repetition of its name.
        warnings.filterwarnings("ignore", message=r"# The axis name: batch will not be used", category=UserWarning)
        yield
