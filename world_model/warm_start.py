"""Begin a fit with the weights of an earlier model, last night's for one, in the units of today's training rows.

Letters: E members, M features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.schema import WorldModelConfig
from data.fields import Field
from world_model.model import MarketModel, refuse_other_fields
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser


@torch.no_grad()
def adopt_weights(
    network: EnsembleMLP, earlier: MarketModel, input_normaliser: Normaliser, delta_normaliser: Normaliser
) -> None:
    """Copy the earlier model's weights so that the same raw row gives the same raw departure from the baseline.

    Both models standardise by the statistics of their own training rows, which the first and the last layer absorb
    exactly. Log-variances are kept as they are: in units of the deviation of the deltas, which is what they describe.
    Baseline and volatility line belong to each fit and are not carried over; where there is a volatility line,
    departures and variances are in its units, so that they move by as much as it does.

    Args: network: of the new fit, same sizes; changed in place. earlier: stays as it is.
        input_normaliser, delta_normaliser: of the new fit.
    """
    for parameter, source in zip(network.parameters(), earlier.network.parameters(), strict=True):
        parameter.copy_(source)
    old = earlier.input_normaliser
    first = network.weights[0]
    # (x - m0) / s0 = x' * s1 / s0 + (m1 - m0) / s0 with x' = (x - m1) / s1.
    network.biases[0] += ((input_normaliser.mean - old.mean) / old.std)[None, None] @ first
    first *= (input_normaliser.std / old.std)[:, None]
    rescale = earlier.delta_normaliser.std / delta_normaliser.std
    network.weights[-1][..., : network.num_outputs] *= rescale
    network.biases[-1][..., : network.num_outputs] *= rescale


def refuse_other_network(earlier: MarketModel, config: WorldModelConfig, fields: Sequence[Field]) -> None:
    """Raise unless the earlier model has the columns and the network that `config` asks for.

    Raises: ModelFileError for other fields; ValueError naming the setting that differs.
    """
    refuse_other_fields("warm_start", earlier.fields, fields)
    for name in ("num_members", "hidden", "logvar_bounds"):
        ours, theirs = getattr(config, name), getattr(earlier.config, name)
        if ours != theirs:
            raise ValueError(f"warm_start: world_model.{name}: expected {ours}, was {theirs}; start afresh instead")
