import numpy as np
import pytest
import torch

from world_model import central_coverage, evaluate_market_model, fit_market_model
from world_model.density import transform
from world_model.marginals import calibrate_variance, follow_baselines, shrink_logvar


def test_coverage_counts_what_lies_inside_the_central_intervals():
    pit = np.array([[0.5, 0.26], [0.76, 0.05], [0.93, 0.01]])
    # distances from the middle: 0, .24; .26, .45; .43, .49 against .25, .40, .475
    assert central_coverage(pit) == {"50": pytest.approx(2 / 6), "80": pytest.approx(3 / 6), "95": pytest.approx(5 / 6)}


@pytest.fixture(scope="module")
def heavy():
    """A column with 4 degrees of freedom, uncorrelated in time."""
    return np.random.default_rng(3).standard_t(4.0, (6000, 1))


def test_student_t_covers_what_a_gaussian_does_not(heavy, make_fields, small_config):
    shares, nll = {}, {}
    for likelihood in ("gaussian", "student_t"):
        config = small_config.model_copy(update={"likelihood": likelihood})
        model, _ = fit_market_model(heavy[:3000], make_fields(1), config, seed=0)
        scores = evaluate_market_model(model, heavy[3000:], model.fields)
        shares[likelihood], nll[likelihood] = scores.coverage, scores.nll
    assert shares["gaussian"]["50"] > 0.55
    for level, share in shares["student_t"].items():
        assert share == pytest.approx(int(level) / 100, abs=0.02)
    assert nll["student_t"] < nll["gaussian"] - 0.02
    assert 0.1 < model.inverse_dof.item() < 0.4
    assert scores.coverage_by_group == {"market": scores.coverage}


def test_draws_of_a_heavy_tailed_model_have_its_variance_and_tails(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]))
    model.config = model.config.model_copy(update={"likelihood": "student_t"})
    happened = torch.from_numpy(np.random.default_rng(0).standard_t(5.0, (20_000, 1)))
    calibrate_variance(model, torch.zeros_like(happened), happened)
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = model.sample_next(torch.zeros(100_000, 1), torch.zeros(100_000, dtype=torch.int64), noise)
    assert drawn.var().item() == pytest.approx(model.mixture(torch.zeros(1, 1))[1].item(), rel=0.05)
    levels = [0.005, 0.25, 0.75, 0.995]
    assert np.quantile(drawn.numpy(), levels) == pytest.approx(np.quantile(happened.numpy(), levels), rel=0.1)


def test_log_variances_are_believed_where_they_help(constant_network, make_model):
    # elites say variance 9 whatever the row: no help. The scale is settled by variance_scale.
    model = make_model(constant_network([[0.0], [0.0]], [9.0]))
    rows = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrink_logvar(model, torch.zeros_like(rows), rows)
    assert model.logvar_shrinkage.item() == 0.0


def test_a_column_no_better_than_its_baseline_replays_its_residuals(constant_network, make_model):
    # The network is sure of a wrong mean in column 1 and right in column 0.
    generator = np.random.default_rng(0)
    rows = (generator.exponential(1.0, (3000, 2)) - 1.0) * np.array([0.5, 1.0])
    model = make_model(constant_network([[0.0, 3.0], [0.0, 3.0]], [0.125, 0.5]), std=1.0, delta_std=1.42)
    model.input_normaliser.std.fill_(1.0)
    follow_baselines(model, rows[2000:], rows[:2000])
    assert model.follows_baseline.tolist() == [False, True]
    start = torch.zeros(50_000, 2)
    mean, var = model.predict(start[:1], (0,))
    assert (mean[0, 0, 1].item(), var[0, 0, 1].item()) == (0.0, 1.0)  # level 0, std 1
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    drawn = model.sample_next(start, torch.zeros(len(start), dtype=torch.int64), noise)[:, 1]
    levels = [0.01, 0.5, 0.9, 0.99]
    assert np.quantile(drawn.numpy(), levels) == pytest.approx(np.quantile(rows[:2000, 1], levels), abs=0.05, rel=0.05)
    assert drawn.min().item() >= rows[:2000, 1].min() - 1e-6  # an exponential has no left tail
    assert torch.equal(drawn[:1], transform(noise[:1], model.innovations)[:, 1])
    scores = evaluate_market_model(model, rows[2000:], model.fields)
    assert scores.follows_baseline == ("f1",)
    assert "f1" in scores.no_better
    assert "f0" not in scores.no_better
    assert scores.to_dict()["follows_baseline"] == ["f1"]
    follow_baselines(model, rows[2000:], rows[:2000])
    assert model.follows_baseline.tolist() == [False, True]  # judged afresh
