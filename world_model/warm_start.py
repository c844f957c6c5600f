"""Begin a fit with the weights of an earlier one, last night's for instance, in the units of today's training rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.schema import WorldModelConfig
from data.fields import Field
from world_model.model import MarketModel, refuse_other_fields
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.world import WorldModel, WorldSizes


@torch.no_grad()
def adopt_market_weights(
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
    network.load_state_dict(earlier.network.state_dict())
    _restandardise(network, earlier.input_normaliser, input_normaliser, slice(None))
    rescale = earlier.delta_normaliser.std / delta_normaliser.std
    network.weights[-1][..., : network.num_outputs] *= rescale
    network.biases[-1][..., : network.num_outputs] *= rescale


def refuse_other_network(earlier: MarketModel, config: WorldModelConfig, fields: Sequence[Field]) -> None:
    """Raise unless the earlier model has the columns and the network that `config` asks for.

    Raises: ModelFileError for other fields; ValueError naming the setting that differs.
    """
    refuse_other_fields("warm_start", earlier.fields, fields)
    for name in ("num_members", "hidden", "logvar_bounds", "volatility_line"):
        ours, theirs = getattr(config, name), getattr(earlier.config, name)
        if ours != theirs:
            raise ValueError(f"warm_start: world_model.{name}: expected {ours}, was {theirs}; start afresh instead")


@torch.no_grad()
def adopt_world_weights(
    previous: WorldModel,
    dynamics: EnsembleMLP,
    termination: EnsembleMLP | None,
    sizes: WorldSizes,
    inputs: Normaliser,
    targets: Normaliser,
) -> None:
    """Copy the previous weights, rewritten for other input and target statistics.

    Means are unchanged up to rounding. Log-variances are shifted before their tanh bound, which is exact only where
    the bound is slack.

    Raises: ValueError if the sizes differ in anything but whether termination was seen.
    """
    old = previous.sizes
    if (old.num_obs, old.num_actions, old.num_members, old.hidden) != (
        sizes.num_obs,
        sizes.num_actions,
        sizes.num_members,
        sizes.hidden,
    ):
        raise ValueError(f"previous: expected a model of {sizes}, was {old}")
    pairs: list[tuple[EnsembleMLP, EnsembleMLP, tuple[slice, ...]]] = [
        (previous.dynamics, dynamics, (slice(0, sizes.num_obs),))
    ]
    if previous.termination is not None and termination is not None:
        after = sizes.num_obs + sizes.width
        pairs.append((previous.termination, termination, (slice(0, sizes.num_obs), slice(after, None))))
    for source, copy, places in pairs:
        copy.load_state_dict(source.state_dict())
        for place in places:
            _restandardise(copy, previous.inputs, inputs, place)
    size, ratio = sizes.num_obs + 1, previous.targets.std / targets.std
    offset = (previous.targets.mean - targets.mean) / targets.std
    dynamics.weights[-1][..., :size] *= ratio
    dynamics.biases[-1][..., :size] = dynamics.biases[-1][..., :size] * ratio + offset
    dynamics.biases[-1][..., size:] += 2.0 * torch.log(ratio) / dynamics.logvar_half


# The first layer for columns standardised by `new` instead of `old`: with x' = (raw - m') / s' a weight becomes
# w s'/s and a bias gains w (m' - m)/s.
def _restandardise(network: EnsembleMLP, old: Normaliser, new: Normaliser, columns: slice) -> None:
    weight = network.weights[0][:, columns]
    network.biases[0] += (((new.mean - old.mean) / old.std)[:, None] * weight).sum(dim=1, keepdim=True)
    network.weights[0][:, columns] = weight * (new.std / old.std)[:, None]
