"""What is timed of a world model: an epoch of training, imagination by all members, imagination by one member per row.

Three contenders of one shape: Detent, the same mathematics in plain torch, and the matrix products alone, below which
none can come. All run the same numbers of rows, members and layers; plain torch is what one writes without thinking of
speed: batched products, autograd, Adam, everything in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from configs.schema import WorldModelConfig
from data.fields import Field
from mbpo import imagine_market
from world_model import EnsembleMLP, MarketModel, Normaliser, member_nll
from world_model.backprop import MemberGradients
from world_model.trainer import bootstrap_indices, epoch_batches
from world_model.volatility import BAR_MOVES

Tasks = dict[str, Callable[[], object]]
"""`epoch`, `imagine`, `sample`, each run as a whole."""

LOGVAR_BOUNDS = (-10.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes every contender runs."""

    obs: int = 64
    actions: int = 6
    members: int = 5
    hidden: tuple[int, ...] = (64, 128, 64)
    transitions: int = 100_000
    """Rows of a training epoch, per member."""
    batch: int = 2048
    """Rows of a gradient step, per member."""
    rows: int = 4096
    """Rows imagined at once."""
    horizon: int = 3
    """Steps imagined."""

    @property
    def inputs(self) -> int:
        """Columns a member reads."""
        return self.obs + self.actions

    @property
    def outputs(self) -> int:
        """Columns a member predicts, each with mean and log-variance: observation and reward."""
        return self.obs + 1


SMOKE = Shapes(obs=5, actions=2, members=2, hidden=(4, 4, 4), transitions=64, batch=16, rows=12, horizon=2)
"""Sizes that answer nothing but run everything."""


def detent_tasks(shapes: Shapes) -> Tasks:
    """Detent's own training step and imagination.

    Imagination runs a `MarketModel` of as many features as the others have inputs, which predicts them all: a little
    more work than the others do. Its penalty is the disagreement of the elites, all members here.
    """
    generator = torch.Generator().manual_seed(0)
    network = _network(shapes, shapes.outputs, generator)
    inputs, targets = _table(shapes, generator)
    indices = bootstrap_indices(shapes.transitions, shapes.members, generator)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    gradients = MemberGradients(network, inputs, targets)
    model = _market(shapes, generator)
    start = torch.randn(shapes.rows, shapes.inputs, generator=generator)
    elites = torch.tensor(model.elites)

    def epoch() -> None:
        for rows in epoch_batches(indices, shapes.batch, generator):
            gradients(rows)
            optimiser.step()

    def imagine() -> object:
        return imagine_market(model, start.numpy(), horizon=shapes.horizon, branches_per_row=1, generator=generator)

    def sample() -> None:
        features = start
        for _ in range(shapes.horizon):
            member = elites[torch.randint(len(elites), (shapes.rows,), generator=generator)]
            features = model.sample_next(features, member, torch.randn(features.shape, generator=generator))

    return {"epoch": epoch, "imagine": imagine, "sample": sample}


def plain_torch_tasks(shapes: Shapes) -> Tasks:
    """The same with autograd, softplus bounds, noise for every member and the max-norm penalty of MOPO."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shapes.inputs, *shapes.hidden, 2 * shapes.outputs]
    weights = [
        (torch.randn(shapes.members, before, after, generator=generator) / (2.0 * math.sqrt(before))).requires_grad_()
        for before, after in pairwise(sizes)
    ]
    biases = [torch.zeros(shapes.members, 1, after, requires_grad=True) for after in sizes[1:]]
    inputs, targets = _table(shapes, generator)
    indices = bootstrap_indices(shapes.transitions, shapes.members, generator)
    optimiser = torch.optim.Adam([*weights, *biases], lr=1e-3, weight_decay=1e-4)
    start = torch.randn(shapes.rows, shapes.obs, generator=generator)
    action = torch.zeros(shapes.rows, shapes.actions)

    def forward(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            rows = rows @ weight + bias
            if layer < len(weights) - 1:
                rows = functional.silu(rows)
        mean, logvar = rows.chunk(2, dim=-1)
        low, high = LOGVAR_BOUNDS
        logvar = high - functional.softplus(high - logvar)
        return mean, low + functional.softplus(logvar - low)

    def epoch() -> None:
        order = torch.stack([torch.randperm(indices.shape[1], generator=generator) for _ in indices])
        for rows in torch.split(torch.gather(indices, 1, order), shapes.batch, dim=1):
            mean, logvar = forward(inputs[rows])
            loss = member_nll(mean, logvar, targets[rows]).sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()

    @torch.no_grad()
    def imagine() -> None:
        obs, every = start, torch.arange(shapes.rows)
        for _ in range(shapes.horizon):
            mean, logvar = forward(torch.cat((obs, action), dim=1).expand(shapes.members, -1, -1))
            std = torch.exp(0.5 * logvar)
            drawn = mean + std * torch.randn(mean.shape, generator=generator)
            picked = drawn[torch.randint(shapes.members, (shapes.rows,), generator=generator), every]
            penalty = torch.linalg.vector_norm(std, dim=2).amax(dim=0)
            obs = obs + picked[:, : shapes.obs]
            _ = picked[:, shapes.obs] - penalty

    @torch.no_grad()
    def sample() -> None:
        obs = start
        whole = shapes.rows - shapes.rows % shapes.members
        for _ in range(shapes.horizon):
            order = torch.randperm(whole, generator=generator)
            rows = torch.cat((obs, action), dim=1)[order].view(shapes.members, -1, shapes.inputs)
            mean, logvar = forward(rows)
            drawn = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
            obs = obs.clone()
            obs[order] += drawn.view(whole, -1)[:, : shapes.obs]

    return {"epoch": epoch, "imagine": imagine, "sample": sample}


def floor_tasks(shapes: Shapes) -> Tasks:
    """The matrix products alone, in the order and the pieces in which Detent runs them, with no memory allocated."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shapes.inputs, *shapes.hidden, 2 * shapes.outputs]
    pieces = 512
    weights = [
        [torch.randn(before, after, generator=generator) / math.sqrt(before) for before, after in pairwise(sizes)]
        for _ in range(shapes.members)
    ]
    spare = [torch.empty_like(weight) for weight in weights[0]]
    # Real numbers: products of leftovers in fresh memory are denormal and fifty times slower.
    values = [torch.randn(pieces, size, generator=generator) for size in sizes]
    outputs = [torch.empty(pieces, size) for size in sizes]

    def products(rows: int, layers: list[torch.Tensor], *, backward: bool) -> None:
        for first in range(0, rows, pieces):
            size = min(pieces, rows - first)
            for index, weight in enumerate(layers):
                torch.mm(values[index][:size], weight, out=outputs[index + 1][:size])
            if backward:
                for index in range(len(layers) - 1, -1, -1):
                    torch.mm(values[index][:size].t(), values[index + 1][:size], out=spare[index])
                    if index:
                        torch.mm(values[index + 1][:size], layers[index].t(), out=outputs[index][:size])

    def epoch() -> None:
        for first in range(0, shapes.transitions, shapes.batch):
            for layers in weights:
                products(min(shapes.batch, shapes.transitions - first), layers, backward=True)

    def imagine() -> None:
        for _ in range(shapes.horizon):
            for layers in weights:
                products(shapes.rows, layers, backward=False)

    def sample() -> None:
        for _ in range(shapes.horizon):
            for layers in weights:
                products(shapes.rows // shapes.members, layers, backward=False)

    return {"epoch": epoch, "imagine": imagine, "sample": sample}


def _network(shapes: Shapes, outputs: int, generator: torch.Generator) -> EnsembleMLP:
    return EnsembleMLP(
        shapes.members,
        shapes.inputs,
        outputs,
        hidden=shapes.hidden,
        logvar_bounds=LOGVAR_BOUNDS,
        generator=generator,
    )


def _table(shapes: Shapes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(shapes.transitions, shapes.inputs, generator=generator)
    return inputs, torch.randn(shapes.transitions, shapes.outputs, generator=generator)


def _market(shapes: Shapes, generator: torch.Generator) -> MarketModel:
    names = [*BAR_MOVES, *(f"feature_{index}" for index in range(shapes.inputs - len(BAR_MOVES)))]
    ones = torch.ones(shapes.inputs)
    return MarketModel(
        [Field(name, "market", "1", -math.inf, math.inf, "benchmark") for name in names],
        WorldModelConfig(num_members=shapes.members, num_elites=shapes.members, hidden=shapes.hidden),
        Normaliser(0.0 * ones, ones),
        Normaliser(0.0 * ones, 0.1 * ones),
        _network(shapes, shapes.inputs, generator),
        elites=range(shapes.members),
        support=(-1e3 * ones, 1e3 * ones),
    )
