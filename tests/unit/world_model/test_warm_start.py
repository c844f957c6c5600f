import numpy as np
import pytest
import torch

from world_model import ModelFileError, Normaliser, fit_market_model
from world_model.warm_start import adopt_market_weights


def test_the_same_raw_row_departs_by_the_same_raw_amount(make_network, make_model):
    earlier = make_model(make_network(), mean=2.0, std=3.0, delta_std=0.5)
    inputs = Normaliser(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 0.5, 4.0]))
    deltas = Normaliser(torch.zeros(3), torch.tensor([0.1, 1.0, 3.0]))
    network = make_network(seed=1)
    adopt_market_weights(network, earlier, inputs, deltas)
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    mean, logvar = network(inputs(rows))
    wanted_mean, wanted_logvar = earlier.network(earlier.input_normaliser(rows))
    torch.testing.assert_close(mean * deltas.std, wanted_mean * 0.5, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, wanted_logvar, atol=1e-5, rtol=1e-4)
    assert not torch.equal(network.weights[0], earlier.network.weights[0])  # rebased on a copy


def test_last_nights_weights_are_ahead_after_the_first_epoch(autoregression, make_fields, small_config):
    values = autoregression(1600)
    earlier, _ = fit_market_model(values[:1200], make_fields(3), small_config, seed=0)
    one = small_config.model_copy(update={"max_epochs": 1})
    today = values[200:]
    _, cold = fit_market_model(today, make_fields(3), one, seed=1)
    _, warm = fit_market_model(today, make_fields(3), one, seed=1, warm_start=earlier)
    assert max(warm.member_scores) < min(cold.member_scores) - 0.05


def test_other_fields_or_sizes_are_refused(autoregression, make_fields, small_config):
    values = autoregression(700)
    earlier, _ = fit_market_model(values, make_fields(3), small_config.model_copy(update={"max_epochs": 1}), seed=0)
    wider = small_config.model_copy(update={"hidden": (9,)})
    with pytest.raises(ValueError, match=r"warm_start: world_model.hidden: expected \(9,\), was"):
        fit_market_model(values, make_fields(3), wider, seed=0, warm_start=earlier)
    lineless = small_config.model_copy(update={"volatility_line": not small_config.volatility_line})
    with pytest.raises(ValueError, match=r"warm_start: world_model\.volatility_line: expected"):
        fit_market_model(values, make_fields(3), lineless, seed=0, warm_start=earlier)
    with pytest.raises(ModelFileError, match="warm_start: fields: expected 3 columns"):
        fit_market_model(np.ones((700, 2)), make_fields(2), small_config, seed=0, warm_start=earlier)


@pytest.mark.parametrize("name", ["input_noise", "dropout"])
def test_regularisers_are_seeded_and_keep_a_small_network_from_memorising(name, make_fields, small_config):
    # No structure at all in 160 rows of 2 columns: whatever the network learns is noise.
    values = np.random.default_rng(0).standard_normal((260, 2))
    long = small_config.model_copy(update={"hidden": (64, 64), "max_epochs": 40, "patience": 40})
    strong = long.model_copy(update={name: 0.5})
    first, _ = fit_market_model(values, make_fields(2), strong, seed=0)
    again, _ = fit_market_model(values, make_fields(2), strong, seed=0)
    plain, _ = fit_market_model(values, make_fields(2), long, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True))
    assert not torch.equal(first.network.weights[0], plain.network.weights[0])
