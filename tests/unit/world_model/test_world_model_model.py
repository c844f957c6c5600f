import copy
import math
import re

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import world_model.model as model_module
from world_model import EnsembleMLP, MarketModel, Normaliser


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_predict_gives_next_features_in_raw_units(constant_network, make_model):
    # two members; departures in normalised units 1 and -2, variance 0.25; delta mean 0.1, std 2; variance_scale 3
    network = constant_network([[1.0], [-2.0]], [0.25])
    model = make_model(network, std=5.0, delta_mean=0.1, delta_std=2.0, variance_scale=torch.tensor([3.0]))
    mean, var = model.predict(torch.tensor([[10.0]]))
    assert mean.flatten().tolist() == pytest.approx([12.1, 6.1])  # 10 + 1*2 + 0.1, 10 - 2*2 + 0.1
    assert var.flatten().tolist() == pytest.approx([3.0, 3.0])  # 0.25 * 2**2 * 3


def test_mixture_adds_noise_and_disagreement_of_elites_only(constant_network, make_model):
    model = make_model(constant_network([[1.0], [3.0], [50.0]], [0.25]), elites=(0, 1))
    mean, var = model.mixture(torch.zeros(1, 1))
    assert mean.item() == pytest.approx(2.0)
    assert var.item() == pytest.approx(0.25 + 1.0)


def test_disagreement_is_the_std_of_elite_means_in_delta_units(constant_network, make_model):
    network = constant_network([[1.0, 0.0], [3.0, 0.0], [50.0, 7.0]], [1.0, 1.0])
    model = make_model(network, elites=(0, 1), delta_std=1000.0)
    # feature 0: std of (1, 3) = 1; feature 1: 0; raw units would give 500
    assert model.disagreement(torch.zeros(4, 2)).tolist() == pytest.approx([0.5] * 4)


def test_single_elite_does_not_disagree(make_network, make_model):
    assert make_model(make_network(), elites=(2,)).disagreement(randn(3, 3)).tolist() == [0.0] * 3


def test_disagreement_in_chunks_equals_one_pass(make_network, make_model, monkeypatch):
    model, features = make_model(make_network()), randn(11, 3)
    whole = model.disagreement(features)
    monkeypatch.setattr(model_module, "CHUNK_ROWS", 4)
    torch.testing.assert_close(model.disagreement(features), whole)


def test_sample_uses_each_rows_own_member_and_noise(make_network, make_model, monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK_ROWS", 3)  # several chunks per member
    model = make_model(make_network(), elites=(3, 0, 1), mean=0.2, std=2.0, delta_mean=0.1, delta_std=0.5)
    features, noise = randn(20, 3), randn(20, 3, seed=1)
    member = torch.tensor([3, 0, 1, 0] * 5)
    drawn = model.sample_next(features, member, noise)
    mean, var = model.predict(features)
    for row in range(20):
        wanted = mean[member[row], row] + var[member[row], row].sqrt() * noise[row]
        torch.testing.assert_close(drawn[row], wanted)


@pytest.mark.parametrize("followed", [False, True])
def test_advance_is_the_draw_and_the_outlook_it_is_drawn_from(make_network, make_model, monkeypatch, followed):
    monkeypatch.setattr(model_module, "CHUNK_ROWS", 8)
    model = make_model(make_network(), elites=(3, 0, 1), mean=0.2, std=2.0, delta_mean=0.1, delta_std=0.5)
    model.mean_shrinkage.copy_(torch.tensor([0.3, 1.0, 0.7]))
    model.logvar_shrinkage.copy_(torch.tensor([1.0, 0.4, 0.6]))
    model.variance_scale.copy_(torch.tensor([2.0, 1.0, 0.5]))
    model.follows_baseline[2] = followed
    features, noise = randn(20, 3), randn(20, 3, seed=1)
    member = torch.tensor([3, 0, 1, 0] * 5)
    drawn, outlook = model.advance(features, member, noise, (2, 0))
    torch.testing.assert_close(drawn, model.sample_next(features, member, noise))
    wanted = model.outlook(features)
    torch.testing.assert_close(outlook.mean, wanted.mean[:, [2, 0]])
    torch.testing.assert_close(outlook.variance, wanted.variance[:, [2, 0]])
    torch.testing.assert_close(outlook.disagreement, wanted.disagreement)
    assert outlook.disagreement.min() > 0.0
    with pytest.raises(ValueError, match=r"member: expected elites \(3, 0, 1\)"):
        model.advance(features, torch.full((20,), 2), noise, (0,))


def test_zero_noise_gives_the_members_mean(make_network, make_model):
    model, features = make_model(make_network()), randn(5, 3)
    drawn = model.sample_next(features, torch.full((5,), 2), torch.zeros(5, 3))
    torch.testing.assert_close(drawn, model.predict(features, (2,))[0][0])


def test_sampling_moments_match_the_mixture(constant_network, make_model):
    model = make_model(constant_network([[-1.0, 0.0], [1.0, 0.5]], [0.5, 0.1]), delta_std=2.0)
    rows = 40_000
    generator = torch.Generator().manual_seed(0)
    member = torch.randint(2, (rows,), generator=generator)
    drawn = model.sample_next(torch.zeros(rows, 2), member, torch.randn(rows, 2, generator=generator))
    mean, var = model.mixture(torch.zeros(1, 2))
    # five standard errors; the fourth moment of these mixtures is below 3*var**2
    assert ((drawn.mean(dim=0) - mean[0]).abs() < 5.0 * (var[0] / rows).sqrt()).all()
    assert ((drawn.var(dim=0) - var[0]).abs() < 5.0 * var[0] * math.sqrt(2.0 / rows)).all()


def test_sample_is_clamped_to_the_support(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]), support=2.0)
    noise = torch.tensor([[9.0], [-9.0], [0.5]])
    assert model.sample_next(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), noise).flatten().tolist() == (
        pytest.approx([2.0, -2.0, 0.5])
    )


def test_a_clamped_draw_is_at_the_edge_and_one_inside_is_not(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]), support=2.0)
    noise = torch.tensor([[9.0], [-9.0], [0.5]])
    drawn = model.sample_next(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), noise)
    assert model.at_edge(drawn).tolist() == [True, True, False]
    assert model.at_edge(torch.tensor([[2.1], [torch.nan]])).tolist() == [True, False]


def test_network_never_sees_inputs_beyond_the_support(make_network, make_model):
    model = make_model(make_network(), support=2.0)
    at_the_edge, far_out = torch.full((1, 3), 2.0), torch.full((1, 3), 1e5)
    edge_mean, edge_var = model.predict(at_the_edge)
    far_mean, far_var = model.predict(far_out)
    torch.testing.assert_close(far_mean - far_out, edge_mean - at_the_edge, atol=0.02, rtol=0.0)  # float32 at 1e5
    assert torch.equal(far_var, edge_var)
    assert torch.equal(model.disagreement(far_out), model.disagreement(at_the_edge))


def test_nan_stays_visible(make_network, make_model):
    model = make_model(make_network())
    features = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    drawn = model.sample_next(features, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    assert drawn.isnan().any(dim=1).tolist() == [True, False]
    assert model.disagreement(features).isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 3), (5, 2), (3,), (2, 0, 3)])
def test_empty_or_misshapen_features_are_refused(make_network, make_model, shape):
    model = make_model(make_network())
    with pytest.raises(ValueError, match="features: expected"):
        model.predict(torch.zeros(shape))
    with pytest.raises(ValueError, match="features: expected"):
        model.disagreement(torch.zeros(shape))


def test_integer_features_are_refused(make_network, make_model):
    with pytest.raises(ValueError, match="floating point"):
        make_model(make_network()).predict(torch.zeros(1, 3, dtype=torch.int64))


def test_sampling_from_a_non_elite_is_refused(make_network, make_model):
    model = make_model(make_network(), elites=(0, 2))
    with pytest.raises(ValueError, match=r"expected elites \(0, 2\), was \[0, 1\]"):
        model.sample_next(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("member", "noise"),
    [
        (torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3)),
        (torch.zeros(2), torch.zeros(2, 3)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1)),
    ],
)
def test_misshapen_member_or_noise_is_refused(make_network, make_model, member, noise):
    with pytest.raises(ValueError, match="expected"):
        make_model(make_network()).sample_next(torch.zeros(2, 3), member, noise)


@pytest.mark.parametrize("elites", [(), (0, 0), (4,), (-1,)])
def test_bad_elites_are_refused(make_network, make_model, elites):
    with pytest.raises(ValueError, match="distinct indices"):
        make_model(make_network(), elites=elites)


def test_parts_of_another_size_are_refused(make_network, make_model, make_fields):
    model = make_model(make_network())
    parts = (model.config, model.input_normaliser, model.delta_normaliser)
    support = (torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"input_normaliser: expected \[2\]"):
        MarketModel(make_fields(2), *parts, model.network, elites=(0,), support=support)
    wide = Normaliser(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="network: expected 2 inputs"):
        MarketModel(
            make_fields(2),
            model.config,
            wide,
            wide,
            model.network,
            elites=(0,),
            support=(torch.zeros(2), torch.ones(2)),
        )


def test_elites_travel_with_the_weights(make_network, make_model):
    source, target = make_model(make_network(seed=1), elites=(3, 1)), make_model(make_network(seed=2), elites=(0, 2))
    target.load_state_dict(source.state_dict())
    assert target.elites == (3, 1)
    features = randn(4, 3)
    assert torch.equal(target.mixture(features)[0], source.mixture(features)[0])
    assert copy.deepcopy(source).elites == (3, 1)


class Forecast(nn.Module):
    """What the planner and the state row need from the model, as one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        mean, var = self.model.predict(features, self.model.elites)
        return mean, var, self.model.disagreement(features)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_model_exports_to_onnx_with_a_free_batch(make_network, make_model, tmp_path):
    # The warnings filtered above come from inside the exporter, not from our code.
    forecast = Forecast(make_model(make_network(), elites=(2, 0), std=2.0, delta_std=0.5, support=1.5)).eval()
    program = torch.onnx.export(
        forecast,
        (torch.zeros(2, 3),),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    path = tmp_path / "forecast.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for rows in (1, 9):
        features = randn(rows, 3, seed=rows)
        with torch.no_grad():
            wanted = forecast(features)
        for ours, theirs in zip(wanted, session.run(None, {"features": features.numpy()}), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def test_network_of_another_width_is_refused(make_model):
    network = EnsembleMLP(2, 3, 2, hidden=(4,), logvar_bounds=(-10.0, 4.0), generator=torch.Generator())
    with pytest.raises(ValueError, match="was 3 and 2"):
        make_model(network)


def test_without_a_line_the_baseline_is_the_training_mean(make_model, constant_network):
    # Column 0 drifts (level std 5 above delta std 2): features + 0.1. Column 1 reverts (0.5 below 2) to its level 7.
    network = constant_network([[0.0, 0.0]] * 2, [0.25, 0.25])
    mean, std = torch.tensor([7.0, 7.0]), torch.tensor([5.0, 0.5])
    model = MarketModel(
        make_model(network).fields,
        make_model(network).config,
        Normaliser(mean, std),
        Normaliser(torch.tensor([0.1, 0.1]), torch.tensor([2.0, 2.0])),
        network,
        elites=(0,),
        support=(torch.full((2,), -1e6), torch.full((2,), 1e6)),
    )
    assert model.reverting.tolist() == [False, True]
    assert model.baseline(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([3.1, 7.0])


def test_mean_is_the_line_and_as_much_of_the_network_as_is_believed(make_model, constant_network):
    # Inputs (x - 1)/2; line: column 0 gains 2 * (0.5 + 0.25 * input 0), column 1 (reverting) is 2 * (-1 * input 1).
    line = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, -1.0]])
    model = make_model(constant_network([[1.0, 1.0]] * 2, [0.25, 0.25]), mean=1.0, std=2.0, delta_std=2.0, line=line)
    model.input_normaliser.std[1] = 1.0
    features = torch.tensor([[3.0, 4.0]])
    # Column 0: 3 + 2 * (0.5 + 0.25 * 1); column 1: 2 * (-3).
    assert model.baseline(features)[0].tolist() == pytest.approx([4.5, -6.0])
    model.mean_shrinkage.copy_(torch.tensor([0.5, 0.0]))
    assert model.predict(features)[0][0, 0].tolist() == pytest.approx([5.5, -6.0])
    assert model.outlook(features).mean[0].tolist() == pytest.approx([5.5, -6.0])


def test_line_does_not_extrapolate(make_model, constant_network):
    line = torch.tensor([[0.0, 1.0]])
    model = make_model(constant_network([[0.0]] * 2, [1.0]), line=line, support=2.0)
    # Beyond the support the slope acts on 2, the level still moves with the features.
    assert model.baseline(torch.tensor([[5.0]])).item() == pytest.approx(7.0)


def test_line_of_another_shape_is_refused(make_model, constant_network):
    with pytest.raises(ValueError, match=re.escape("line: expected [1, 2], was [2, 2]")):
        make_model(constant_network([[0.0]] * 2, [1.0]), line=torch.zeros(2, 2))


def test_outlook_in_chunks_is_the_outlook_of_each_part(make_model, constant_network, monkeypatch):
    model = make_model(constant_network([[0.3, -1.0], [0.5, 1.0]], [0.25, 0.5]))
    features = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    whole = model.outlook(features)
    monkeypatch.setattr("world_model.model.CHUNK_ROWS", 3)
    for part, again in zip(whole, model.outlook(features), strict=True):
        torch.testing.assert_close(part, again)
    # Law of total variance by hand: noise 0.25 and 0.5, means 0.3 and 0.5, -1 and 1.
    torch.testing.assert_close(whole.variance[0], torch.tensor([0.25 + 0.01, 0.5 + 1.0]))
    assert whole.disagreement[0].item() == pytest.approx((0.1 + 1.0) / 2)
