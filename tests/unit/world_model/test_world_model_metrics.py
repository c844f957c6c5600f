import math

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.files import canonical_json
from world_model import ModelFileError, evaluate_market_model, fan_chart

HALF_LOG_TWO_PI = 0.9189385332


def test_mixture_nll_by_hand(constant_network, make_model):
    # elites predict delta 0 and 2 with variance 1 (normalised), std 10; deltas seen: 0 and 20 raw = 0 and 2 units
    model = make_model(constant_network([[0.0], [2.0]], [1.0]), std=20.0, delta_std=10.0)
    metrics = evaluate_market_model(model, np.array([[5.0], [5.0], [25.0]]), model.fields)
    # each transition lies on one mean and 2 std from the other: -log((1 + exp(-2))/2) + 0.5*log(2*pi)
    wanted = HALF_LOG_TWO_PI - math.log((1.0 + math.exp(-2.0)) / 2.0)
    assert metrics.rows == 2
    assert metrics.nll == pytest.approx(wanted, abs=1e-5)
    assert metrics.nll_by_field == {"f0": pytest.approx(wanted, abs=1e-5)}
    # constant Gaussian N(0, 1): (0 + 2**2/2)/2 = 1 above the floor
    assert metrics.nll_constant == pytest.approx(HALF_LOG_TWO_PI + 1.0, abs=1e-5)
    assert metrics.nll_gain == pytest.approx(metrics.nll_constant - metrics.nll)


def test_whole_rows_are_mixed_jointly(constant_network, make_model):
    # a row that takes one feature from each member is unlikely under both members
    model = make_model(constant_network([[0.0, 0.0], [4.0, 4.0]], [1.0, 1.0]))
    metrics = evaluate_market_model(model, np.array([[0.0, 0.0], [0.0, 4.0]]), model.fields)
    # joint: both members give exp(-8), so 8 nats over two features; by field: -log((1 + exp(-8))/2) each
    assert metrics.nll == pytest.approx(HALF_LOG_TWO_PI + 4.0, abs=1e-4)
    by_field = HALF_LOG_TWO_PI - math.log((1.0 + math.exp(-8.0)) / 2.0)
    assert [*metrics.nll_by_field.values()] == pytest.approx([by_field, by_field], abs=1e-4)


def test_baselines_by_hand(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]), mean=1.0, std=0.5, delta_mean=1.0, delta_std=1.0)
    metrics = evaluate_market_model(model, np.array([[0.0], [2.0]]), model.fields)
    # next = 2. constant: N(0+1, 1) -> 1/2. persistence: N(0, 1+1) -> log(2)/2 + 4/4. level N(1, 1/4): log(1/4)/2 + 2
    assert metrics.nll_constant == pytest.approx(HALF_LOG_TWO_PI + 0.5, abs=1e-5)
    assert metrics.nll_persistence == pytest.approx(HALF_LOG_TWO_PI + 0.5 * math.log(2.0) + 1.0, abs=1e-5)
    assert metrics.nll_tightest == pytest.approx(HALF_LOG_TWO_PI - math.log(2.0) + 2.0, abs=1e-5)


def test_r2_is_of_the_delta_against_the_mean_training_delta(constant_network, make_model):
    # predicted delta 1 = 0.5 + 0.5; training mean delta 0.5. deltas 1 and 2: residual 0, 1; deviation 0.5, 1.5
    model = make_model(constant_network([[0.5, 0.5], [0.5, 0.5]], [1.0, 1.0]), delta_mean=0.5)
    features = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    metrics = evaluate_market_model(model, features, model.fields)
    assert metrics.r2_by_field == {"f0": pytest.approx(0.6), "f1": pytest.approx(0.6)}  # 1 - 1/2.5
    assert metrics.r2_by_group == {"market": pytest.approx(0.6), "signals": pytest.approx(0.6)}


def test_pit_is_uniform_and_coverage_nominal_for_the_true_model(constant_network, make_model):
    rows = 4000
    walk = np.cumsum(np.random.default_rng(0).standard_normal((rows + 1, 2)), axis=0)
    model = make_model(constant_network([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]))
    metrics = evaluate_market_model(model, walk, model.fields)
    for level, share in metrics.coverage.items():
        assert share == pytest.approx(int(level) / 100, abs=0.02)
    for shares in metrics.pit_histogram().values():
        assert sum(shares) == pytest.approx(1.0)
        assert max(abs(share - 0.05) for share in shares) < 5.0 * math.sqrt(0.05 * 0.95 / rows)


def test_one_sided_predictions_pile_up_at_the_end_of_the_pit_histogram(constant_network, make_model):
    model = make_model(constant_network([[-5.0], [-5.0]], [1.0]))
    metrics = evaluate_market_model(model, np.zeros((5, 1)), model.fields)
    assert metrics.pit_histogram()["market"][-1] == 1.0


def test_report_is_finite_json(make_network, make_model):
    model = make_model(make_network())
    values = np.random.default_rng(0).standard_normal((30, 3))
    values[:, 1] = 0.5  # stands still in this slice: no R2, the rest stays
    raw = evaluate_market_model(model, values, model.fields).to_dict()
    canonical_json(raw)
    assert sorted(raw["r2_by_field"]) == ["f0", "f2"]
    assert sorted(raw["nll_by_field"]) == ["f0", "f1", "f2"]


def test_columns_that_never_moved_in_training_are_not_scored(make_network, make_model):
    model = make_model(make_network())
    model.delta_normaliser.varying[1] = False
    metrics = evaluate_market_model(model, np.random.default_rng(0).standard_normal((9, 3)), model.fields)
    assert sorted(metrics.nll_by_field) == ["f0", "f2"]
    assert metrics.pit.shape == (8, 2)


def test_other_fields_nan_and_single_rows_are_refused(make_network, make_model, make_fields):
    model = make_model(make_network())
    values = np.zeros((4, 3))
    with pytest.raises(ModelFileError, match="expected 3 columns"):
        evaluate_market_model(model, values, make_fields(2))
    with pytest.raises(ValueError, match=r"was \[4, 2\]"):
        evaluate_market_model(model, values[:, :2], model.fields)
    with pytest.raises(DataError, match="at least 2 rows"):
        evaluate_market_model(model, values[:1], model.fields)
    values[3, 2] = np.nan
    with pytest.raises(DataError, match="row 3, field 'f2'"):
        evaluate_market_model(model, values, model.fields)


def test_fan_chart_spreads_like_a_random_walk_and_is_reproducible(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]), delta_mean=0.5)
    start = torch.tensor([3.0])
    paths = fan_chart(model, start, 4, 4000, torch.Generator().manual_seed(1))
    assert paths.shape == (4000, 4, 1)
    steps = torch.arange(1.0, 5.0)
    torch.testing.assert_close(paths.mean(dim=0)[:, 0], 3.0 + 0.5 * steps, atol=0.16, rtol=0.0)  # 5 standard errors
    torch.testing.assert_close(paths.var(dim=0)[:, 0], steps, atol=0.0, rtol=0.12)
    assert torch.equal(paths, fan_chart(model, start, 4, 4000, torch.Generator().manual_seed(1)))


def test_fan_chart_draws_every_elite_and_no_other(constant_network, make_model):
    # members 10 apart with little noise: the first step tells who was asked
    model = make_model(constant_network([[0.0], [10.0], [20.0]], [1e-3]), elites=(2, 0))
    first = fan_chart(model, torch.zeros(1), 1, 400, torch.Generator().manual_seed(0)).flatten()
    assert sorted({round(value / 10.0) * 10 for value in first.tolist()}) == [0, 20]


def test_fan_chart_refuses_bad_arguments(make_network, make_model):
    model = make_model(make_network())
    with pytest.raises(ValueError, match="start"):
        fan_chart(model, torch.zeros(2), 1, 1, torch.Generator())
    with pytest.raises(ValueError, match="at least 1, was 0 and 5"):
        fan_chart(model, torch.zeros(3), 0, 5, torch.Generator())
