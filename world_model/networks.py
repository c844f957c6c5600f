"""All members of the ensemble in one batched matrix product per layer.

Letters: E members of the network, K members asked for, B batch, M features in, O features out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Initial log-variance in normalised units: a fresh member is the constant Gaussian with the training variance.
INITIAL_LOGVAR = 0.0
# Rows run at once without gradients: a member's activations then stay in the cache of one core.
PIECE_ROWS = 512


class EnsembleMLP(nn.Module):
    """E independent SiLU networks that give mean and log-variance (PETS, arXiv:1805.12114, sec. 4).

    Deviation from PETS: log-variances are bounded by `mid + half*tanh(raw)` with fixed bounds instead of two
    softplus with learned ones; softplus dominates the run time in onnxruntime, and training uses the very same form.
    """

    def __init__(
        self,
        num_members: int,
        num_inputs: int,
        num_outputs: int,
        *,
        hidden: Sequence[int],
        logvar_bounds: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        low, high = logvar_bounds
        if not low < high:
            raise ValueError(f"logvar_bounds: expected low < high, was {logvar_bounds}")
        self.num_members, self.num_inputs, self.num_outputs = num_members, num_inputs, num_outputs
        self.logvar_mid, self.logvar_half = 0.5 * (high + low), 0.5 * (high - low)
        widths = [num_inputs, *hidden, 2 * num_outputs]
        self.weights = nn.ParameterList(
            [torch.empty(num_members, fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
        )
        self.biases = nn.ParameterList([torch.empty(num_members, 1, fan_out) for fan_out in widths[1:]])
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw fresh weights: truncated normal with std `1/(2*sqrt(fan_in))`, cut at two std, as in PETS."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            std = 1.0 / (2.0 * math.sqrt(weight.shape[1]))
            nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std, generator=generator)
            bias.zero_()
        # Bounds need not be symmetric around 0: start where tanh yields INITIAL_LOGVAR, away from saturation.
        unit = (INITIAL_LOGVAR - self.logvar_mid) / self.logvar_half
        self.biases[-1][..., self.num_outputs :] = math.atanh(min(max(unit, -0.9), 0.9))

    def forward(
        self,
        inputs: Tensor,
        members: Sequence[int] | None = None,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each member.

        Args:
            inputs: [B, M], seen by every member, or [K, B, M], one slice for each.
            members: which members to run, in this order; None runs all (K = E).
            dropout: share of hidden units silenced in training, the others grow by 1/(1 - dropout); `generator` draws.

        Returns: mean [K, B, O], logvar [K, B, O]; logvar lies within the bounds.
        Raises: ValueError on a wrong shape or member.
        """
        outputs = self._outputs(inputs, members, 2 * self.num_outputs, dropout, generator)
        mean, raw = outputs[..., : self.num_outputs], outputs[..., self.num_outputs :]
        return mean, self.bounded(raw)

    def unbounded(self, inputs: Tensor, members: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, but with what `bounded` turns into log-variances, for callers who need few of them."""
        outputs = self._outputs(inputs, members, 2 * self.num_outputs)
        return outputs[..., : self.num_outputs], outputs[..., self.num_outputs :]

    def bounded(self, raw: Tensor) -> Tensor:
        """Log-variances of outputs of the last layer, any shape."""
        return self.logvar_mid + self.logvar_half * torch.tanh(raw)

    def mean(self, inputs: Tensor, members: Sequence[int] | None = None) -> Tensor:
        """Mean [K, B, O] of each member, a fifth cheaper than `forward`; arguments and errors as there."""
        return self._outputs(inputs, members, self.num_outputs)

    @torch.no_grad()
    def rowwise(self, inputs: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each row by a member of its own: one K-th of the work of `forward`.

        Args: inputs: [B, M] float32; member: [B] int64.
        Returns: mean [B, O], logvar [B, O].
        Raises: ValueError on a wrong shape or member.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.num_inputs or member.shape != inputs.shape[:1]:
            raise ValueError(
                f"inputs, member: expected [B, {self.num_inputs}] and [B], was {[*inputs.shape]} and {[*member.shape]}"
            )
        counts = torch.bincount(member, minlength=self.num_members).tolist()
        if len(counts) > self.num_members:
            raise ValueError(f"member: expected indices in 0..{self.num_members - 1}, was {len(counts) - 1}")
        # Sorted by member every one runs over rows that lie together.
        order = torch.argsort(member, stable=True)
        rows = inputs.index_select(0, order)
        found = inputs.new_empty(len(inputs), 2 * self.num_outputs)
        for index, (part, out) in enumerate(zip(torch.split(rows, counts), torch.split(found, counts), strict=True)):
            if len(part):
                self._run_member(index, part, out)
        outputs = torch.empty_like(found).index_copy_(0, order, found)
        mean, raw = outputs[:, : self.num_outputs], outputs[:, self.num_outputs :]
        return mean, torch.tanh(raw).mul_(self.logvar_half).add_(self.logvar_mid)

    # The first columns of the last layer, [K, B, wanted].
    def _outputs(
        self,
        inputs: Tensor,
        members: Sequence[int] | None,
        wanted: int,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        picked = range(self.num_members) if members is None else members
        if not picked or min(picked) < 0 or max(picked) >= self.num_members:
            raise ValueError(f"members: expected indices in 0..{self.num_members - 1}, was {[*picked]}")
        if inputs.ndim == 2:
            inputs = inputs.unsqueeze(0).expand(len(picked), -1, -1)
        if inputs.ndim != 3 or inputs.shape[0] != len(picked) or inputs.shape[2] != self.num_inputs:
            raise ValueError(
                f"inputs: expected [B, {self.num_inputs}] or [{len(picked)}, B, {self.num_inputs}], "
                f"was {[*inputs.shape]}"
            )
        if torch.is_grad_enabled() or torch.compiler.is_exporting() or inputs.dtype != torch.float32:
            return self._in_one(inputs, members, wanted, dropout, generator)
        return self._in_pieces(inputs, picked, wanted)

    # What can be differentiated and traced.
    def _in_one(
        self,
        inputs: Tensor,
        members: Sequence[int] | None,
        wanted: int,
        dropout: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            width = wanted if layer == last else weight.shape[2]
            product = torch.baddbmm(_take(bias, members)[..., :width], inputs, _take(weight, members)[..., :width])
            inputs = functional.silu(product) if layer < last else product
            if layer < last and dropout > 0.0:
                kept = torch.rand(inputs.shape, generator=generator) >= dropout
                inputs = inputs * kept / (1.0 - dropout)
        return inputs

    # The same without gradients: one member's piece after the other, in buffers that stay in the cache.
    def _in_pieces(self, inputs: Tensor, members: Sequence[int], wanted: int) -> Tensor:
        outputs = inputs.new_empty(len(members), inputs.shape[1], wanted)
        for member, rows, out in zip(members, inputs, outputs, strict=True):
            self._run_member(member, rows, out)
        return outputs

    # Writes the first columns of one member's last layer for rows [B, M] to `out` [B, wanted].
    def _run_member(self, member: int, rows: Tensor, out: Tensor) -> None:
        wanted = out.shape[1]
        layers = [(weight[member], bias[member, 0]) for weight, bias in zip(self.weights, self.biases, strict=True)]
        weight, bias = layers.pop()
        last_weight, last_bias = weight[:, :wanted], bias[:wanted]
        hidden = [rows.new_empty(min(len(rows), PIECE_ROWS), weight.shape[1]) for weight, _ in layers]
        for piece, output in zip(torch.split(rows, PIECE_ROWS), torch.split(out, PIECE_ROWS), strict=True):
            value = piece
            for (weight, bias), buffer in zip(layers, hidden, strict=True):
                value = torch.addmm(bias, value, weight, out=buffer[: len(piece)])
                torch.ops.aten.silu_(value)
            torch.addmm(last_bias, value, last_weight, out=output)


# One member is a view; copying its weights for every chunk of rows would cost as much as small products.
def _take(parameter: Tensor, members: Sequence[int] | None) -> Tensor:
    if members is None:
        return parameter
    if len(members) == 1:
        return parameter[members[0] : members[0] + 1]
    return torch.stack([parameter[member] for member in members])
