import numpy as np
import pytest
import torch
from scipy import integrate, stats

from data.fields import Field
from world_model.bar_return import return_log_density, sum_log_density

INF = float("inf")
FIELDS = tuple(Field(name, "market", "log return", -INF, INF, "test") for name in ("gap_return", "intraday_return"))


def test_gaussian_parts_add_up():
    found = sum_log_density(np.array([0.5]), np.array([0.2]), np.array([[1.0, 3.0]]), np.zeros(2))
    assert found[0] == pytest.approx(stats.norm.logpdf(0.5, 0.2, 2.0))


@pytest.mark.parametrize(
    ("tails", "var"), [((0.2, 0.1), (0.04, 1.0)), ((0.0, 0.4), (1.0, 0.5)), ((0.4, 0.0), (1e-8, 1.0))]
)
def test_heavy_tailed_parts_are_convolved(tails, var):
    laws = [
        stats.t(1.0 / tail, scale=(v * (1.0 - 2.0 * tail)) ** 0.5) if tail else stats.norm(scale=v**0.5)
        for tail, v in zip(tails, var, strict=True)
    ]
    narrow, wide = sorted(laws, key=lambda law: law.var())
    for value in (0.0, 4.0):
        expected, _ = integrate.quad(lambda p, at=value: wide.pdf(at - narrow.ppf(p)), 0.0, 1.0, limit=100, epsabs=1e-8)
        found = sum_log_density(np.array([value]), np.zeros(1), np.array([var]), np.array(tails))
        assert found[0] == pytest.approx(np.log(expected), abs=0.01)


def test_the_model_density_mixes_members_and_integrates_to_one(constant_network, make_model):
    model = make_model(constant_network([[0.0, 0.0], [2.0, 1.0]], [1.0, 0.25]))
    model.fields = FIELDS
    grid = np.linspace(-12.0, 15.0, 541)
    rows = np.zeros((2 * len(grid), 2))
    rows[1::2, 0] = grid  # every other bar starts from the row of zeros
    for tails in ((0.0, 0.0), (0.3, 0.2)):
        model.inverse_dof.copy_(torch.tensor(tails))
        density = np.exp(return_log_density(model, rows)[::2])
        assert integrate.trapezoid(density, grid) == pytest.approx(1.0, abs=0.01)
        mean = integrate.trapezoid(grid * density, grid)
        assert mean == pytest.approx(1.5, abs=0.05)  # members expect 0 and 3


def test_a_model_without_returns_is_refused(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]))
    with pytest.raises(ValueError, match="expected the features gap_return, intraday_return"):
        return_log_density(model, np.zeros((2, 1)))
