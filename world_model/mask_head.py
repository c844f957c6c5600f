"""A network that learns which actions are valid: p(valid | obs, action), calibrated.

For environments that tell their masks only at real states, where imagined ones need a mask too. The head alone promises
nothing; `world_model.learned_masks` turns its scores into masks with a bounded false-valid rate.
Letters: B batch, N rows, D obs, A actions.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from data.errors import DataError
from world_model.errors import TrainingError
from world_model.normaliser import Normaliser

# The support is the range of the fitted rows widened by this share of it on either side, as in the market model.
SUPPORT_MARGIN = 0.1
# A column that never moved may still wobble by rounding, absolutely or relative to its size.
ROUNDING_MARGIN = 1e-5
# A temperature outside these bounds points at a broken fit; it must neither silence nor inflate it.
TEMPERATURE_BOUNDS = (0.05, 20.0)
BISECTIONS = 50

Rows = tuple[NDArray[np.floating], NDArray[np.bool_]]
"""obs [N, D] and their action_masks [N, A]."""


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """Size and schedule of the fit."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers."""
    learning_rate: float = 2e-3
    """Of AdamW, decayed to zero by a cosine over `max_epochs`."""
    weight_decay: float = 1e-5
    """Of the weights."""
    batch_size: int = 1024
    """Rows per gradient step."""
    max_epochs: int = 60
    """Most passes over the fit rows."""
    patience: int = 10
    """Passes without a lower loss on the stop rows after which the fit ends."""

    def __post_init__(self) -> None:
        counts = {"batch_size": self.batch_size, "max_epochs": self.max_epochs, "patience": self.patience}
        for name, value in {**counts, **{f"hidden[{i}]": width for i, width in enumerate(self.hidden)}}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, was {value}")
        if not 0.0 < self.learning_rate < math.inf or not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"learning_rate, weight_decay: expected > 0 and >= 0, was {self.learning_rate} and {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class MaskFitReport:
    """What the fit of the head did. Losses are nats per (row, action) pair of the stop rows."""

    fit_rows: int
    stop_rows: int
    epochs: int
    """Epochs run, early stopping included."""
    best_epoch: int
    """Epoch whose weights were kept, counted from 1."""
    stop_loss: float
    """Before the temperature."""
    calibrated_loss: float
    """After it."""
    temperature: float
    """Above 1 the network was too sure of itself."""


class MaskHead(nn.Module):
    """SiLU network from normalised obs to one calibrated logit per action."""

    temperature: Tensor
    support_low: Tensor
    support_high: Tensor

    def __init__(
        self,
        normaliser: Normaliser,
        support: tuple[Tensor, Tensor],
        *,
        num_actions: int,
        hidden: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.num_obs, self.num_actions = len(normaliser.mean), num_actions
        self.normaliser = normaliser
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("support_low", support[0].to(torch.float32, copy=True))
        self.register_buffer("support_high", support[1].to(torch.float32, copy=True))
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((self.num_obs, *hidden, num_actions)):
            # Built on "meta": the constructor's own draw would come from torch's global generator.
            linear = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, obs: Tensor) -> Tensor:
        """Calibrated logits [B, A] of p(valid) for obs [B, D]; NaN gives NaN. Raises: ValueError on shape or dtype."""
        obs = self._checked(obs)
        logits: Tensor = self.network(self.normaliser(obs)) / self.temperature
        return logits

    def probabilities(self, obs: Tensor) -> Tensor:
        """p(valid | obs, action) [B, A] for obs [B, D]; NaN gives NaN."""
        return torch.sigmoid(self(obs))

    def scores(self, obs: Tensor) -> Tensor:
        """Logits [B, A], -inf in rows that cannot be judged: NaN, infinite or outside the support."""
        return torch.where(self.in_support(obs)[:, None], self(obs), -torch.inf)

    def in_support(self, obs: Tensor) -> Tensor:
        """[B] bool: every number lies within the range of the fitted rows, widened by a tenth; NaN is outside."""
        obs = self._checked(obs)
        return ((obs >= self.support_low) & (obs <= self.support_high)).all(dim=-1)

    def _checked(self, obs: Tensor) -> Tensor:
        if obs.ndim != 2 or obs.shape[1] != self.num_obs or not obs.is_floating_point():
            raise ValueError(f"obs: expected floating [B, {self.num_obs}], was {obs.dtype} {[*obs.shape]}")
        return obs.to(torch.float32)


def fit_mask_head(
    fit: Rows, stop: Rows, config: MaskHeadConfig, generator: torch.Generator
) -> tuple[MaskHead, MaskFitReport]:
    """Fit a head by binary cross-entropy, stop it early, and set its temperature.

    Args:
        fit: rows whose gradients are followed and whose range becomes the support.
        stop: other rows, which choose the epoch and the temperature; both choices flatter them.
        config: size and schedule.
        generator: of weights and batches; torch's global generator is not touched.

    Raises: DataError on NaN or infinite obs; TrainingError if a loss is not finite.
    """
    (obs, target), (stop_obs, stop_target) = _tensors("fit", fit), _tensors("stop", stop)
    head = MaskHead(
        Normaliser.fit(obs.double().numpy()),
        _support(obs.numpy()),
        num_actions=target.shape[1],
        hidden=config.hidden,
        generator=generator,
    )
    epochs, best_epoch, stop_loss = _train(head, (obs, target), (stop_obs, stop_target), config, generator)
    head.requires_grad_(False).eval()
    logits = head(stop_obs)
    head.temperature.fill_(fit_temperature(logits, stop_target))
    return head, MaskFitReport(
        fit_rows=len(obs),
        stop_rows=len(stop_obs),
        epochs=epochs,
        best_epoch=best_epoch,
        stop_loss=stop_loss,
        calibrated_loss=_loss(head, stop_obs, stop_target),
        temperature=float(head.temperature),
    )


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The T that minimises the binary cross-entropy of logits / T (Guo et al., arXiv:1706.04599, sec. 4.2).

    The loss is convex in 1/T and its slope there is `mean(logits * (sigmoid(logits / T) - target))`: bisection, where
    the paper searches by gradient. Our deviation: targets are softened to `(n + 1) / (n + 2)` for n valid pairs and
    `1 / (n + 2)` for n invalid ones (Platt, "Probabilistic outputs for support vector machines", 1999, sec. 2.2), so
    that rows a head separates perfectly do not make it certain. T stays within TEMPERATURE_BOUNDS.

    Args: logits, target: one shape; target 1 for valid, 0 for invalid.
    """
    logits, valid = logits.double(), target > 0.5
    soft_valid = (valid.sum() + 1.0) / (valid.sum() + 2.0)
    soft_invalid = 1.0 / ((~valid).sum() + 2.0)
    soft = torch.where(valid, soft_valid.double(), soft_invalid.double())
    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        slope = (logits * (torch.sigmoid(logits / math.exp(middle)) - soft)).sum()
        # A positive slope in 1/T asks for a smaller 1/T.
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(0.5 * (low + high))


def _train(
    head: MaskHead,
    fit: tuple[Tensor, Tensor],
    stop: tuple[Tensor, Tensor],
    config: MaskHeadConfig,
    generator: torch.Generator,
) -> tuple[int, int, float]:
    obs, target = fit
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.max_epochs)
    best_loss, best_epoch, best_weights = math.inf, 0, head.state_dict()
    epoch = 0
    while epoch < config.max_epochs and epoch - best_epoch < config.patience:
        epoch += 1
        order = torch.randperm(len(obs), generator=generator)
        for rows in torch.chunk(order, math.ceil(len(order) / config.batch_size)):
            loss = functional.binary_cross_entropy_with_logits(head(obs[rows]), target[rows])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
        schedule.step()
        stop_loss = _loss(head, *stop)
        if not math.isfinite(stop_loss):
            raise TrainingError(
                f"mask head: expected a finite loss, was {stop_loss} in epoch {epoch}; lower the learning_rate",
                epoch=epoch,
                members=(0,),
            )
        if stop_loss < best_loss:
            best_loss, best_epoch, best_weights = stop_loss, epoch, copy.deepcopy(head.state_dict())
    head.load_state_dict(best_weights)
    return epoch, best_epoch, best_loss


@torch.no_grad()
def _loss(head: MaskHead, obs: Tensor, target: Tensor) -> float:
    return float(functional.binary_cross_entropy_with_logits(head(obs), target))


def _tensors(name: str, rows: Rows) -> tuple[Tensor, Tensor]:
    # torch casts without a warning; what overflows float32 is refused with the rest.
    obs, target = torch.tensor(rows[0]).to(torch.float32), torch.tensor(rows[1]).to(torch.float32)
    if obs.ndim != 2 or target.ndim != 2 or len(obs) != len(target) or len(obs) < 2:
        raise ValueError(f"{name} rows: expected obs [N >= 2, D], masks [N, A], was {[*obs.shape]}, {[*target.shape]}")
    finite = torch.isfinite(obs)
    if not finite.all():
        row, column = torch.nonzero(~finite)[0].tolist()
        raise DataError(f"{name} rows: obs: expected finite numbers, was {rows[0][row, column]} at [{row}, {column}]")
    return obs, target


def _support(obs: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
    low, high = obs.min(axis=0).astype(np.float64), obs.max(axis=0).astype(np.float64)
    margin = np.where(high > low, SUPPORT_MARGIN * (high - low), ROUNDING_MARGIN * np.maximum(np.abs(low), 1.0))
    return torch.from_numpy(low - margin), torch.from_numpy(high + margin)
