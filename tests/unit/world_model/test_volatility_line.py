import numpy as np
import pytest
import torch

from configs.schema import WorldModelConfig
from data import FEATURE_FIELDS, Field
from world_model import MarketModel, fit_market_model
from world_model.bar_return import return_log_density
from world_model.marginals import refit_volatility
from world_model.volatility import REACH, VolatilityLine, fit_log_variance

NAMES = ("gap_return", "intraday_return", "volatility_20")
FIELDS = tuple(field for field in FEATURE_FIELDS if field.name in NAMES)
ALL = torch.ones(3, dtype=torch.bool)


def clustered(rows, seed=0):
    """Log-volatility is an AR(1) and is seen; both parts of a bar scale with it. Returns table [rows, 3], variance."""
    generator = np.random.default_rng(seed)
    log_volatility = np.zeros(rows)
    for row in range(1, rows):
        log_volatility[row] = 0.95 * log_volatility[row - 1] + 0.2 * generator.standard_normal()
    seen = 0.15 * np.exp(log_volatility)
    # what a row tells is the size of the next move
    scale = np.concatenate(([seen[0]], seen[:-1])) / 16.0
    parts = scale[:, None] * generator.standard_normal((rows, 2)) * np.array([0.5, 1.0])
    return np.column_stack((parts, seen)), (seen / 16.0) ** 2


def test_coefficients_of_a_known_variance_are_found():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    log_variance = 0.5 + inputs @ torch.tensor([[0.8], [0.0]], dtype=torch.float64)
    noise = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    found = fit_log_variance(inputs, noise.square() * torch.exp(log_variance))
    assert found[1:, 0].tolist() == pytest.approx([0.8, 0.0], abs=0.03)


def test_the_fit_stands_at_the_maximum_of_its_likelihood():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    squares = torch.randn(300, 2, generator=generator, dtype=torch.float64).square() * torch.exp(inputs[:, :1])
    found = fit_log_variance(inputs, squares).requires_grad_()
    h = found[0] + inputs @ found[1:]
    loss = (0.5 * h + 4.5 * torch.log1p(squares * torch.exp(-h) / 6.0)).sum() + 5.0 * found[1:].square().sum()
    loss.backward()
    assert found.grad.abs().max().item() < 1e-3


def test_the_line_follows_volatility_and_extrapolates_only_so_far():
    values, variance = clustered(4000)
    line = VolatilityLine(FIELDS)
    deviations = torch.from_numpy(values[1:] / values[1:].std(axis=0))
    line.fit(values[:-1], deviations, ALL)
    said = line(torch.from_numpy(values[:-1]).to(torch.float32))[:, 1].double().numpy()
    assert np.corrcoef(said, np.log(variance[:-1]))[0, 1] > 0.98
    assert np.polyfit(np.log(variance[:-1]), said, 1)[0] == pytest.approx(1.0, abs=0.1)
    # three times the largest volatility of training is met by more variance than any row of training
    crash = torch.tensor([[0.0, 0.0, 3.0 * values[:, 2].max()]], dtype=torch.float32)
    assert said.max() + 1.0 < line(crash)[0, 1].item() <= said.max() + REACH + 1e-4
    absurd = torch.tensor([[0.0, 0.0, 1e9]], dtype=torch.float32)
    assert line(absurd)[0, 1].item() <= said.max() + REACH + 1e-4


def test_a_still_window_is_finite_and_constant_columns_keep_zero():
    values, _ = clustered(1000)
    line = VolatilityLine(FIELDS)
    line.fit(values[:-1], torch.from_numpy(values[1:]), torch.tensor([True, True, False]))
    still = line(torch.zeros(1, 3))
    assert torch.isfinite(still).all()
    assert still[0, 2].item() == 0.0


def test_a_table_without_volatility_has_no_line(make_fields):
    line = VolatilityLine(make_fields(3))
    assert not line.active
    line.fit(np.zeros((10, 3)), torch.zeros(10, 3), ALL)
    assert not VolatilityLine(FIELDS[:2]).active
    assert VolatilityLine(FEATURE_FIELDS).active


def test_a_fit_with_the_line_beats_one_without_it_on_rows_after_it(small_config):
    values, variance = clustered(1800)
    gains = {}
    for line in (True, False):
        config = small_config.model_copy(update={"volatility_line": line, "likelihood": "student_t", "max_epochs": 8})
        model, _ = fit_market_model(values[:1000], FIELDS, config, seed=0)
        gains[line] = return_log_density(model, values[1000:]).mean()
    total = 1.25 * variance[1000:-1]
    best = -0.5 * (np.log(2.0 * np.pi * total) + values[1001:, :2].sum(axis=1) ** 2 / total).mean()
    assert gains[True] > gains[False]
    assert gains[True] > best - 0.03


def test_the_line_travels_with_the_model(tmp_path, small_config):
    values, _ = clustered(700)
    model, _ = fit_market_model(values, FIELDS, small_config, seed=0)
    model.save(tmp_path / "model")
    again = MarketModel.load(tmp_path / "model", FIELDS)
    rows = torch.from_numpy(values[:5])
    for ours, theirs in zip(model.predict(rows), again.predict(rows), strict=True):
        assert torch.equal(ours, theirs)


def test_a_column_that_follows_the_baseline_keeps_its_line_when_it_is_fitted_again(small_config):
    values, _ = clustered(1000)
    model, _ = fit_market_model(values, FIELDS, small_config, seed=0)
    model.follows_baseline.copy_(torch.tensor([False, True, False]))
    refit_volatility(model, values)
    once = model.volatility.weights.clone()
    refit_volatility(model, values)
    assert once[:, 1].abs().max().item() > 0.1
    torch.testing.assert_close(model.volatility.weights[:, 1], once[:, 1], rtol=1e-3, atol=1e-4)


def test_units_decide_not_names():
    renamed = tuple(Field(f"x_{field.name}", *list(vars(field).values())[1:]) for field in FIELDS)
    assert not VolatilityLine(renamed).active  # without the bar's own move


def test_advance_knows_the_volatility_line():
    values, _ = clustered(700)
    config = WorldModelConfig(num_members=2, num_elites=2, hidden=(8,), max_epochs=2, batch_size=128)
    model, _ = fit_market_model(values, FIELDS, config, seed=0)
    assert model.volatility.active
    features = torch.from_numpy(values[:50]).to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    member, noise = torch.tensor(model.elites).repeat(25), torch.randn(50, 3, generator=generator)
    drawn, outlook = model.advance(features, member, noise, (0, 1))
    torch.testing.assert_close(drawn, model.sample_next(features, member, noise))
    wanted = model.outlook(features)
    torch.testing.assert_close(outlook.mean, wanted.mean[:, :2])
    torch.testing.assert_close(outlook.variance, wanted.variance[:, :2])
    torch.testing.assert_close(outlook.disagreement, wanted.disagreement)
