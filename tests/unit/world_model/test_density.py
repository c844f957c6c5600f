import math

import numpy as np
import pytest
import torch
from scipy import stats

from world_model.density import (
    MAX_INVERSE_DOF,
    density_nll,
    distribution,
    empirical_quantiles,
    fit_tails,
    student_quantiles,
    transform,
)

TAILS = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)  # Gaussian, 5 and 2.5 degrees of freedom


def reference(dof, variance):
    """Student-t of this variance; `dof` infinite is the Gaussian."""
    if math.isinf(dof):
        return stats.norm(scale=math.sqrt(variance))
    return stats.t(dof, scale=math.sqrt(variance * (dof - 2.0) / dof))


def test_density_and_distribution_agree_with_scipy_and_keep_the_variance():
    value = torch.tensor([[-3.0, 0.5, 7.0]], dtype=torch.float64)
    nll = density_nll(
        torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 3), 4.0, dtype=torch.float64), value, TAILS
    )
    share = distribution(value / 2.0, TAILS)
    for column, dof in enumerate((math.inf, 5.0, 2.5)):
        expected = reference(dof, 4.0)
        assert expected.var() == pytest.approx(4.0)
        assert nll[0, column].item() == pytest.approx(-expected.logpdf(value[0, column].item()), rel=1e-9)
        assert share[0, column] == pytest.approx(expected.cdf(value[0, column].item()), rel=1e-6)


def test_tails_and_variance_are_found_column_by_column():
    generator = np.random.default_rng(0)
    rows = 20_000
    values = np.column_stack((generator.standard_normal(rows), 3.0 * generator.standard_t(5.0, rows)))
    tails, variance = fit_tails(torch.from_numpy(values))
    assert tails[0].item() <= 0.02
    assert tails[1].item() == pytest.approx(0.2, abs=0.03)
    assert variance.tolist() == pytest.approx([1.0, 9.0 * 5.0 / 3.0], rel=0.06)


def test_variance_always_exists():
    tails, variance = fit_tails(torch.from_numpy(np.random.default_rng(0).standard_cauchy((2000, 1))))
    assert tails.item() == MAX_INVERSE_DOF < 0.5
    assert math.isfinite(variance.item())


def test_noise_becomes_draws_of_the_right_law():
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    drawn = transform(noise, student_quantiles(TAILS).to(torch.float32))
    torch.testing.assert_close(drawn[:, 0], noise[:, 0].clamp(-5.0, 5.0), atol=1e-5, rtol=0.0)
    for column, dof in ((1, 5.0), (2, 2.5)):
        levels = [0.001, 0.05, 0.3, 0.5, 0.9, 0.999]
        wanted = reference(dof, 1.0).ppf(levels)
        assert np.quantile(drawn[:, column].numpy(), levels) == pytest.approx(wanted, abs=0.02, rel=0.08)
    assert drawn[:, 1].var().item() == pytest.approx(1.0, abs=0.03)
    # what a draw is depends on its own number alone, and NaN stays NaN
    assert torch.equal(transform(noise[5:6], student_quantiles(TAILS).to(torch.float32)), drawn[5:6])
    assert transform(torch.full((1, 3), torch.nan), student_quantiles(TAILS).to(torch.float32)).isnan().all()


def test_empirical_draws_are_what_happened():
    happened = torch.cat((torch.full((900, 1), -0.5), torch.full((100, 1), 4.5))).double()
    noise = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(1))
    drawn = transform(noise, empirical_quantiles(happened).to(torch.float32))
    assert (drawn == 4.5).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (drawn == -0.5).float().mean().item() == pytest.approx(0.9, abs=0.02)
