import math

import pytest
import torch

from world_model import gaussian_nll, member_nll


def test_standard_normal_at_its_mean_costs_half_log_two_pi():
    zero = torch.zeros(1, 1, 1)
    assert gaussian_nll(zero, zero, zero).item() == pytest.approx(0.9189385, abs=1e-6)


def test_golden_number_with_residual_two_and_variance_four():
    # 0.9189385 + 0.5*(ln 4 + 2**2/4) = 0.9189385 + 0.6931472 + 0.5
    nll = gaussian_nll(torch.tensor(1.0), torch.tensor(math.log(4.0)), torch.tensor(3.0))
    assert nll.item() == pytest.approx(2.1120857, abs=1e-6)


def test_density_integrates_to_one():
    grid = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    density = torch.exp(-gaussian_nll(torch.tensor(0.3), torch.tensor(0.7), grid))
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-6)


def test_member_nll_averages_rows_and_features_but_not_members():
    mean, logvar = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    target = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]])
    # second member: (2 + 0 + 0 + 2)/4 = 1 above the floor
    assert member_nll(mean, logvar, target).tolist() == pytest.approx([0.9189385, 1.9189385], abs=1e-6)
