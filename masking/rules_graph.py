"""A rule set alone as an ONNX graph; imports torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from masking.ruleset import RuleSet


def rule_set_onnx(rule_set: RuleSet) -> bytes:
    """Export a rule set: `state` float32 [B, F], columns as `RuleSet.fields`, to `action_masks` bool [B, A].

    Raises: whatever torch raises for a rule it cannot trace; `masking.conformance` says what to do about it.
    """
    # Three rows: an example of one row would freeze the batch silently.
    example = torch.zeros(3, len(rule_set.fields))
    shapes = {"state": {0: torch.export.Dim("batch", min=1)}}
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(_Masks(rule_set).eval(), (example,), dynamic_shapes=shapes)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            input_names=["state"],
            output_names=["action_masks"],
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export: expected a program, was None")
    data: bytes = exported.model_proto.SerializeToString()
    return data


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter says of itself: that torchvision is missing, that it uses deprecated torch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


class _Masks(torch.nn.Module):
    def __init__(self, rule_set: RuleSet) -> None:
        super().__init__()
        self.rule_set = rule_set

    def forward(self, state: torch.Tensor) -> Any:
        return self.rule_set({name: state[:, index : index + 1] for index, name in enumerate(self.rule_set.fields)})
