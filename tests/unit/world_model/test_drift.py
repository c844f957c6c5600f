import numpy as np
import pytest
import torch

from configs.schema import WorldModelConfig
from data import FEATURE_FIELDS
from world_model import MarketModel, Normaliser, calibrate_drift

NAMES = ("gap_return", "intraday_return", "volatility_20")
FIELDS = tuple(field for field in FEATURE_FIELDS if field.name in NAMES)
STD = torch.tensor([0.004, 0.008, 0.05])
# What the last column says of the next move, in standard deviations of the deltas.
SLOPES = torch.tensor([0.05, 0.1])


def market(rows, factor, seed=0):
    """Moves follow the row before by `factor` times what `model` expects: [rows, 3]."""
    generator = np.random.default_rng(seed)
    signal = generator.standard_normal(rows)
    moves = generator.standard_normal((rows, 2)) * STD[:2].numpy()
    moves[1:] += factor * signal[:-1, None] * (SLOPES * STD[:2]).numpy()
    return np.column_stack((moves, 0.2 + STD[2].item() * signal))


@pytest.fixture
def model(constant_network):
    line = torch.zeros(3, 4)
    line[:2, 3] = SLOPES
    return MarketModel(
        FIELDS,
        WorldModelConfig(num_members=2, num_elites=2, hidden=(2,)),
        Normaliser(torch.tensor([0.0, 0.0, 0.2]), torch.tensor([0.003, 0.006, 0.05])),
        Normaliser(torch.zeros(3), STD),
        constant_network([[0.0, 0.0, 0.0]] * 2, [1.0, 1.0, 1.0]),
        elites=(0, 1),
        support=(torch.full((3,), -10.0), torch.full((3,), 10.0)),
        line=line,
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_true_size_of_expected_moves_is_found(model, factor):
    before = model.line.clone()
    found = calibrate_drift(model, market(20_000, factor, 99), np.stack([market(20_000, factor, s) for s in range(5)]))
    assert found.strength is None
    assert found.slope == pytest.approx(factor, abs=4 * found.error)
    assert found.factor == pytest.approx(found.slope, abs=0.01)
    assert torch.allclose(model.line[:2], before[:2] * found.factor)
    assert torch.equal(model.line[2], before[2])
    assert found.size == pytest.approx(found.factor * found.size_before)
    assert found.size_before == pytest.approx(0.112, rel=0.02)
    assert model.mean_shrinkage.tolist() == pytest.approx([found.factor, found.factor, 1.0])


def test_few_rows_hardly_move_it(model):
    training = market(4000, 1.0, 99)
    factors = []
    for seed in range(100):
        start = model.line.clone()
        factors.append(calibrate_drift(model, training, market(60, 0.0, seed)).factor)
        model.line.copy_(start)
        model.mean_shrinkage.fill_(1.0)
    # The prior weighs as much as 80 such rows.
    assert 0.5 < np.mean(factors) < 0.75


def test_a_line_in_which_noise_was_fitted_is_shrunk_harder(constant_network, model):
    # The first input says nothing of the next move; a line that listens to it is worse than its covariances.
    model.line[:2, 1] = 0.3
    found = calibrate_drift(model, market(4000, 1.0, 5), np.stack([market(5000, 1.0, seed) for seed in range(5)]))
    assert found.strength is not None
    assert model.line[1, 3] > 3 * model.line[1, 1].abs()
    assert model.line[1, 3].item() == pytest.approx(0.1, abs=0.05)


def test_a_drift_that_the_evidence_did_not_find_is_found_where_there_is_enough_to_see_it(model):
    model.line[:2] = 0.0
    found = calibrate_drift(model, market(2000, 1.0, 5), np.stack([market(5000, 1.0, seed) for seed in range(5)]))
    assert found.strength is not None
    assert model.line[1, 3].item() == pytest.approx(0.1, abs=0.05)


def test_where_there_is_nothing_to_expect_nothing_is_expected(model):
    model.line[:2] = 0.0
    calibrate_drift(model, market(2000, 0.0, 5), market(60, 0.0))
    # A fiftieth of a standard deviation is one standard error of 2,000 rows.
    assert model.line[:2].abs().max() < 0.05


def test_a_forecast_of_the_wrong_sign_is_silenced_not_turned(model):
    assert calibrate_drift(model, market(200_000, 1.0, 5), market(200_000, -3.0)).factor == 0.0
    assert not model.line[:2].any()


def test_one_bar_does_not_decide(model):
    values = market(20_000, 1.0)
    values[7, :2] = 30.0
    assert calibrate_drift(model, market(20_000, 1.0, 5), values).factor == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("shape", [(1, 3), (5, 2), (2, 1, 3), (3,)])
def test_tables_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"validation: expected \[T >= 2, 3\]"):
        calibrate_drift(model, market(10, 1.0), np.zeros(shape))
    with pytest.raises(ValueError, match=r"training: expected \[N \+ 1 >= 3, 3\]"):
        calibrate_drift(model, np.zeros((2, 3)), market(10, 1.0))


def test_a_market_without_moves_is_left_alone(make_model, constant_network):
    model = make_model(constant_network([[0.0, 0.0, 0.0]] * 2, [1.0, 1.0, 1.0]))
    assert calibrate_drift(model, np.zeros((10, 3)), np.zeros((10, 3))).factor == 1.0
