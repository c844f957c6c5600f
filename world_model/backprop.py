"""Loss and gradients of the whole ensemble, written out by hand and computed in pieces that stay in the cache.

Automatic differentiation keeps every intermediate result of a batch of all members: about 4 kB per row and member,
60 MB at 2,048 rows, written to and read back from main memory in every step. Here one member's piece of the batch is
carried forward and back before the next begins, in buffers that are allocated once, so that what is left is close to
the matrix products. Letters: E members, B batch, n rows of a piece, M inputs, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from world_model.losses import HALF_LOG_TWO_PI, gaussian_nll_gradient
from world_model.networks import EnsembleMLP

PIECE_ROWS = 512
"""Most rows of a piece: its buffers take about 2 MB at 64-128-64, what a core's own cache holds. Half as many rows cost
a tenth more in calls, twice as many are as fast on some machines and slower on others."""


@dataclass(frozen=True)
class _Piece:
    # Views of the buffers for one number of rows; making them anew for every piece costs a tenth of the whole.
    gathered: Tensor
    target: Tensor
    activations: list[Tensor]
    transposed: list[Tensor]
    outputs: list[Tensor]
    outputs_transposed: list[Tensor]
    scratch: tuple[Tensor, Tensor, Tensor]
    ones: Tensor


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    bias: Tensor
    weight_transposed: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor


class MemberGradients:
    """`member_nll` of a batch and its gradients, equal to what autograd gives up to rounding.

    Args:
        network: whose parameters get their `grad`; they must keep their storage, as optimisers and `load_state_dict`
            leave it.
        inputs, targets: [N, M] and [N, O] float32, the table that batches are picked from.

    Raises: ValueError if the shapes disagree.
    """

    def __init__(self, network: EnsembleMLP, inputs: Tensor, targets: Tensor) -> None:
        expected = (len(inputs), network.num_inputs), (len(inputs), network.num_outputs)
        if (tuple(inputs.shape), tuple(targets.shape)) != expected:
            raise ValueError(
                f"inputs, targets: expected {[*expected[0]]} and {[*expected[1]]}, "
                f"was {[*inputs.shape]} and {[*targets.shape]}"
            )
        self._network = network
        # Side by side, so that a row costs one look-up in memory that is far larger than the cache.
        self._table = torch.cat((inputs, targets), dim=1)
        self._gradients = [torch.zeros_like(parameter) for parameter in network.parameters()]
        for parameter, gradient in zip(network.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        self._layers = [_layers(network, member) for member in range(network.num_members)]
        widths = [weight.shape[2] for weight in network.weights]
        self._gathered = torch.empty(PIECE_ROWS, self._table.shape[1])
        self._activations = [torch.empty(PIECE_ROWS, width) for width in widths[:-1]]
        self._outputs = [torch.empty(PIECE_ROWS, width) for width in widths]
        self._scratch = torch.empty(3, PIECE_ROWS, network.num_outputs)
        self._pieces: dict[int, _Piece] = {}

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Set every parameter's `grad` to that of the sum over members of their losses.

        Args: rows: [E, B] int64, rows of the table, each member its own.
        Returns: [E], nats per feature, as `member_nll` of these rows.
        """
        torch._foreach_zero_(self._gradients)
        num_pieces = math.ceil(rows.shape[1] / PIECE_ROWS)
        losses = torch.stack(
            [
                torch.stack([self._add(layers, part) for part in torch.chunk(picked, num_pieces)]).sum()
                for layers, picked in zip(self._layers, rows, strict=True)
            ]
        )
        share = 1.0 / (rows.shape[1] * self._network.num_outputs)
        torch._foreach_mul_(self._gradients, share)
        return HALF_LOG_TWO_PI + share * losses

    # Adds the gradients of the given rows to those of one member; returns the sum of their losses.
    def _add(self, layers: list[_Layer], rows: Tensor) -> Tensor:
        piece, last = self._piece(len(rows)), len(layers) - 1
        torch.index_select(self._table, 0, rows, out=piece.gathered)
        for index, layer in enumerate(layers):
            torch.addmm(layer.bias, piece.activations[index], layer.weight, out=piece.outputs[index])
            if index < last:
                torch.ops.aten.silu.out(piece.outputs[index], out=piece.activations[index + 1])
        loss = gaussian_nll_gradient(
            piece.outputs[last], piece.target, self._network.logvar_mid, self._network.logvar_half, piece.scratch
        )
        # Every buffer is overwritten by its own gradient as soon as nobody needs its value any more.
        for index in range(last, -1, -1):
            layer, gradient = layers[index], piece.outputs[index]
            layer.weight_gradient.addmm_(piece.transposed[index], gradient)
            layer.bias_gradient.addmv_(piece.outputs_transposed[index], piece.ones)
            if index:
                torch.mm(gradient, layer.weight_transposed, out=piece.activations[index])
                before = piece.outputs[index - 1]
                torch.ops.aten.silu_backward.grad_input(piece.activations[index], before, grad_input=before)
        return loss

    def _piece(self, rows: int) -> _Piece:
        if rows not in self._pieces:
            gathered = self._gathered[:rows]
            activations = [gathered[:, : self._network.num_inputs], *(buffer[:rows] for buffer in self._activations)]
            outputs = [buffer[:rows] for buffer in self._outputs]
            self._pieces[rows] = _Piece(
                gathered=gathered,
                target=gathered[:, self._network.num_inputs :],
                activations=activations,
                transposed=[buffer.t() for buffer in activations],
                outputs=outputs,
                outputs_transposed=[buffer.t() for buffer in outputs],
                scratch=(self._scratch[0, :rows], self._scratch[1, :rows], self._scratch[2, :rows]),
                ones=torch.ones(rows),
            )
        return self._pieces[rows]


def _layers(network: EnsembleMLP, member: int) -> list[_Layer]:
    layers = []
    for weight, bias in zip(network.weights, network.biases, strict=True):
        assert weight.grad is not None  # noqa: S101 - set by the caller
        assert bias.grad is not None  # noqa: S101
        own = weight.detach()[member]
        layers.append(_Layer(own, bias.detach()[member, 0], own.t(), weight.grad[member], bias.grad[member, 0]))
    return layers
