"""An ensemble asked about states and actions: what a state adds to the first layer is computed once per state.

With one-hot actions the first layer is a sum of two parts, and a search asks for many actions of few states. The
scaling of inputs and outputs is folded into the first and the last layer, and members run one after another, each in
two-dimensional products with its bias inside: in onnxruntime that is a third faster than one batched product per layer.

Letters: K members asked for, B states, D columns of a state, W of an action, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from world_model.networks import EnsembleMLP


class PairedEnsemble:
    """Members of an `EnsembleMLP` whose inputs are states beside actions. Traceable by `torch.export`.

    Args:
        network: of D + W inputs.
        members: K of them, in this order; one may occur more than once.
        input_scale: [D + W], what inputs are multiplied by first.
        output_scale, output_shift: [O] or [2 O], what the first outputs are multiplied by and what is added then; as
            many outputs are computed.
    """

    def __init__(
        self,
        network: EnsembleMLP,
        members: Sequence[int],
        *,
        input_scale: Tensor,
        output_scale: Tensor,
        output_shift: Tensor,
    ) -> None:
        self._layers = []
        for member in members:
            layers = [
                (weight[member], bias[member, 0]) for weight, bias in zip(network.weights, network.biases, strict=True)
            ]
            weight, bias = layers[0]
            layers[0] = (weight * input_scale[:, None], bias)
            weight, bias = layers[-1]
            width = output_scale.shape[0]
            layers[-1] = (weight[:, :width] * output_scale, bias[:width] * output_scale + output_shift)
            self._layers.append(layers)

    def each(self, states: Tensor, actions: Tensor) -> Tensor:
        """Outputs [K, B, O] of one action per state: [K, B, D] and [K, B, W], a slice for each member."""
        size, found = states.shape[2], []
        for ((weight, bias), *later), rows, action in zip(
            self._layers, states.unbind(0), actions.unbind(0), strict=True
        ):
            found.append(_run(torch.addmm(bias, rows, weight[:size]) + action @ weight[size:], later))
        return torch.stack(found)

    def pairs(self, states: Tensor) -> Tensor:
        """Outputs [K, B * W, O] of every one-hot action in every state [K, B, D], state after state."""
        size, found = states.shape[2], []
        for ((weight, bias), *later), rows in zip(self._layers, states.unbind(0), strict=True):
            first = torch.addmm(bias, rows, weight[:size])[:, None] + weight[size:]
            found.append(_run(first.flatten(0, 1), later))
        return torch.stack(found)


def _run(value: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for weight, bias in layers:
        value = torch.addmm(bias, functional.silu(value), weight)
    return value
