import pytest
import torch

from world_model import shrinkage_factor, variance_multiplier
from world_model.calibration import MULTIPLIER_BOUNDS

BOTH = torch.tensor([True, True])


def test_multiplier_is_the_mean_squared_standardised_residual():
    residual = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    variance = torch.tensor([[1.0, 4.0], [1.0, 4.0]])
    # (1 + 9)/2 = 5 and (4 + 16)/4/2 = 2.5
    assert variance_multiplier(residual, variance, BOTH).tolist() == pytest.approx([5.0, 2.5])


def test_one_absurd_row_does_not_widen_a_column():
    residual = torch.randn(800, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    residual[17, 1] = 1000.0
    factor = variance_multiplier(residual, torch.ones(800, 2), BOTH)
    # unbounded it would be 1 + 1000**2/800 = 1251; 10 std count at most: 1/(1 - 100/800) = 1.14
    assert factor[1].item() == pytest.approx(1.14, abs=0.1)


def test_constant_columns_keep_one():
    residual = torch.full((10, 2), 3.0)
    factor = variance_multiplier(residual, torch.ones(10, 2), torch.tensor([True, False]))
    assert factor.tolist() == pytest.approx([9.0, 1.0])


def test_multiplier_stays_within_its_bounds():
    residual = torch.tensor([[0.0, 1e6]] * 4)
    assert variance_multiplier(residual, torch.ones(4, 2), BOTH).tolist() == pytest.approx([*MULTIPLIER_BOUNDS])


def test_shrinkage_is_the_least_squares_factor_less_its_standard_error():
    departure = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    outcome = torch.tensor([[0.5, 3.0, -1.0], [-0.5, -6.0, 2.0]])
    # (0.5 + 1)/(1 + 4) = 0.3, residuals 0.2 and 0.1, error sqrt(0.2^2 + 0.2^2)/5; three times as far is 1
    expected = [0.3 - 0.08**0.5 / 5, 1.0, 0.0]
    assert shrinkage_factor(departure, outcome, torch.ones(3)).tolist() == pytest.approx(expected)


def test_a_departure_that_may_be_luck_is_not_believed():
    generator = torch.Generator().manual_seed(0)
    departure, outcome = torch.randn(2, 100, 200, generator=generator, dtype=torch.float64)
    # 200 columns of pure noise: least squares alone would believe half of them a little.
    believed = shrinkage_factor(departure, outcome, torch.ones(200))
    assert (believed > 0).double().mean() < 0.25


def test_shrinkage_of_a_column_that_never_departs_is_one():
    assert shrinkage_factor(torch.zeros(5, 1), torch.ones(5, 1), torch.ones(1)).item() == 1.0


def test_one_absurd_outcome_does_not_decide_the_shrinkage():
    generator = torch.Generator().manual_seed(0)
    departure = torch.randn(800, 1, generator=generator, dtype=torch.float64)
    outcome = 0.5 * departure
    outcome[3] = -1e6 * torch.sign(departure[3])
    assert shrinkage_factor(departure, outcome, torch.ones(1)).item() == pytest.approx(0.5, abs=0.05)
