"""Builders shared by the world-model tests: fields, hand-made models, simulated markets."""

import math

import numpy as np
import pytest
import torch

from configs.schema import WorldModelConfig
from data.fields import Field
from world_model import EnsembleMLP, MarketModel, Normaliser


@pytest.fixture
def make_fields():
    def build(size):
        groups = ["market" if column % 2 == 0 else "signals" for column in range(size)]
        return tuple(
            Field(f"f{column}", group, "1", -math.inf, math.inf, "test") for column, group in enumerate(groups)
        )

    return build


@pytest.fixture
def make_network():
    def build(size=3, members=4, hidden=(8, 6), bounds=(-10.0, 4.0), seed=0):
        generator = torch.Generator().manual_seed(seed)
        return EnsembleMLP(members, size, size, hidden=hidden, logvar_bounds=bounds, generator=generator)

    return build


@pytest.fixture
def constant_network():
    """A network that ignores its input: delta_mean[E][M] and delta_var[M], in normalised units."""

    def build(delta_mean, delta_var, bounds=(-10.0, 4.0)):
        members, size = len(delta_mean), len(delta_var)
        network = EnsembleMLP(members, size, size, hidden=(2,), logvar_bounds=bounds, generator=torch.Generator())
        middle, half = 0.5 * (bounds[1] + bounds[0]), 0.5 * (bounds[1] - bounds[0])
        raw = [math.atanh((math.log(variance) - middle) / half) for variance in delta_var]
        with torch.no_grad():
            for weight in network.weights:
                weight.zero_()
            for member, mean in enumerate(delta_mean):
                network.biases[-1][member, 0] = torch.tensor([*mean, *raw])
        return network

    return build


@pytest.fixture
def make_model(make_fields):
    def build(network, *, elites=None, mean=0.0, std=1.0, delta_mean=0.0, delta_std=1.0, support=1e6, **options):
        size, ones = network.num_inputs, torch.ones(network.num_inputs)
        config = WorldModelConfig(
            num_members=network.num_members,
            num_elites=1,
            hidden=tuple(weight.shape[2] for weight in network.weights[:-1]),
        )
        return MarketModel(
            make_fields(size),
            config,
            Normaliser(mean * ones, std * ones),
            Normaliser(delta_mean * ones, delta_std * ones),
            network,
            elites=range(network.num_members) if elites is None else elites,
            support=(-support * ones, support * ones),
            **options,
        )

    return build


@pytest.fixture
def autoregression():
    """x[t+1] = phi*x[t] + sigma*noise, one column per phi, from a stationary start."""

    def build(rows, phi=(0.0, -0.5, 0.5), sigma=(0.01, 1.0, 0.2), seed=0):
        phi, sigma = np.array(phi), np.array(sigma)
        noise = np.random.default_rng(seed).standard_normal((rows, len(phi))) * sigma
        values = np.empty_like(noise)
        values[0] = noise[0] / np.sqrt(1.0 - phi**2)
        for row in range(1, rows):
            values[row] = phi * values[row - 1] + noise[row]
        return values

    return build


@pytest.fixture
def small_config():
    return WorldModelConfig(num_members=2, num_elites=2, hidden=(16,), batch_size=256, max_epochs=20, patience=5)
