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
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(_take(bias, members), inputs, _take(weight, members))
            if layer < last:
                inputs = functional.silu(inputs)
                if dropout > 0.0:
                    kept = torch.rand(inputs.shape, generator=generator) >= dropout
                    inputs = inputs * kept / (1.0 - dropout)
        mean, raw = inputs[..., : self.num_outputs], inputs[..., self.num_outputs :]
        return mean, self.logvar_mid + self.logvar_half * torch.tanh(raw)


# One member is a view; copying its weights for every chunk of rows would cost as much as small products.
def _take(parameter: Tensor, members: Sequence[int] | None) -> Tensor:
    if members is None:
        return parameter
    if len(members) == 1:
        return parameter[members[0] : members[0] + 1]
    return torch.stack([parameter[member] for member in members])
