import copy
import math

import numpy as np
import pytest
import torch

import world_model.trainer as trainer_module
from configs.schema import WorldModelConfig
from data.errors import DataError
from data.fields import Field
from data.files import canonical_json
from world_model import TrainingError, evaluate_market_model, fit_market_model
from world_model.trainer import (
    _beyond_line,
    bootstrap_indices,
    epoch_batches,
    epoch_steps,
    recalibrate,
    stopping_score,
    training_support,
)

SMALL = WorldModelConfig(num_members=3, num_elites=2, hidden=(16,), max_epochs=6, batch_size=128)
PHI = np.array([0.0, -0.5, 0.5])


@pytest.fixture(scope="module")
def learned():
    """A longer fit, shared by the tests that look at what was learned."""
    rng = np.random.default_rng(7)
    sigma = np.array([0.01, 1.0, 0.2])
    values = np.zeros((7000, 3))
    for row in range(1, len(values)):
        values[row] = PHI * values[row - 1] + sigma * rng.standard_normal(3)
    values = values[100:]
    config = WorldModelConfig(
        num_members=3, num_elites=2, hidden=(32, 32), learning_rate=3e-3, batch_size=256, max_epochs=30, patience=8
    )
    fields = tuple(Field(f"f{column}", "market", "1", -math.inf, math.inf, "test") for column in range(3))
    model, report = fit_market_model(values[:4900], fields, config, seed=0, purge=5)
    return model, report, fields, values[4900:]


def test_learns_a_linear_gaussian_system_to_near_the_optimum(learned):
    model, _, fields, test = learned
    metrics = evaluate_market_model(model, test, fields)
    # Var(delta) = sigma**2 * 2/(1+phi): R2 of the delta 1 - (1+phi)/2, NLL 0.5*log(2*pi*e*(1+phi)/2) in delta units
    optimum_r2 = 1.0 - (1.0 + PHI) / 2.0
    optimum_nll = 0.5 * np.log(2.0 * np.pi * np.e * (1.0 + PHI) / 2.0)
    assert [*metrics.r2_by_field.values()] == pytest.approx(optimum_r2, abs=0.04)
    assert [*metrics.nll_by_field.values()] == pytest.approx(optimum_nll, abs=0.06)
    assert metrics.nll_gain > 0.3
    assert metrics.nll_gain < 0.42  # optimum: mean of 0.5*log(2/(1+phi)) = 0.394
    # the mean of the system itself, not only its score
    point = torch.tensor([[0.01, 1.0, -0.2]])
    wanted = torch.tensor(PHI, dtype=torch.float32) * point[0]
    error = (model.mixture(point)[0][0] - wanted) / torch.tensor([0.01, 1.0, 0.2])
    assert error.abs().max().item() < 0.2


def test_recalibration_restores_coverage_on_rows_it_never_saw(learned):
    fitted, _, fields, test = learned
    model = copy.deepcopy(fitted)
    # make every member overconfident: about a quarter of the variance
    model.network.biases[-1][..., model.num_features :] -= 0.25
    broken, after = recalibrate(model, test[:1000])
    assert broken["80"] < 0.6
    assert after["80"] == pytest.approx(0.8, abs=0.02)
    point = torch.from_numpy(test[:1])
    torch.testing.assert_close(model.mixture(point)[1], fitted.mixture(point)[1], rtol=0.2, atol=0.0)
    found = model.variance_scale.clone()
    assert recalibrate(model, test[:1000]) == (broken, after)  # starts afresh, does not multiply up
    assert torch.equal(model.variance_scale, found)
    fresh = evaluate_market_model(model, test[1000:], fields).coverage
    for level, share in fresh.items():
        assert share == pytest.approx(int(level) / 100, abs=0.02)


def test_predictions_and_samples_use_the_variance_scale(learned):
    fitted, _, _, test = learned
    model = copy.deepcopy(fitted)
    features = torch.from_numpy(test[:4])
    var = model.predict(features)[1]
    noise, member = torch.ones(4, 3), torch.full((4,), model.elites[0])
    mean = model.predict(features, model.elites[:1])[0][0]
    step = model.sample_next(features, member, noise) - mean
    model.variance_scale.mul_(4.0)
    torch.testing.assert_close(model.predict(features)[1], 4.0 * var)
    torch.testing.assert_close(model.sample_next(features, member, noise) - mean, 2.0 * step, atol=1e-6, rtol=1e-3)


def test_fitted_model_records_no_gradients(learned):
    model, _, _, test = learned
    assert not model.predict(torch.from_numpy(test[:2]))[0].requires_grad
    assert not model.training


def test_report_says_what_was_fitted(learned):
    model, report, _, _ = learned
    assert report.holdout_rows == round(0.2 * 4899)
    assert report.train_rows == 4899 - report.holdout_rows - 5
    assert report.elites == model.elites
    assert 1 <= max(report.best_epochs) <= report.epochs <= 30
    assert report.coverage_after == report.holdout.coverage
    canonical_json(report.to_dict())


def test_elites_are_the_members_with_the_lowest_score(autoregression, make_fields):
    _, report = fit_market_model(autoregression(400), make_fields(3), SMALL, seed=1)
    ranked = sorted(range(3), key=report.member_scores.__getitem__)
    assert report.elites == tuple(ranked[:2])


def test_two_fits_with_one_seed_are_bit_identical_and_leave_the_global_generator_alone(autoregression, make_fields):
    values = autoregression(500)
    torch.manual_seed(123)
    global_state = torch.get_rng_state()
    first, first_report = fit_market_model(values, make_fields(3), SMALL, seed=4)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(99)
    again, again_report = fit_market_model(values, make_fields(3), SMALL, seed=4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert first_report.to_dict() == again_report.to_dict()
    other, _ = fit_market_model(values, make_fields(3), SMALL, seed=5)
    assert not torch.equal(first.network.weights[0], other.network.weights[0])


def test_bootstrap_rows_stay_the_members_own_in_every_epoch():
    generator = torch.Generator().manual_seed(0)
    indices = bootstrap_indices(50, 3, generator)
    owned = indices.sort(dim=1).values
    assert len({*indices[0].tolist()}) < 50  # with replacement
    assert not torch.equal(owned[0], owned[1])
    epochs = [torch.cat([*epoch_batches(indices, 16, generator)], dim=1) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(dim=1).values, owned)
    assert not torch.equal(epochs[0], epochs[1])


def test_fit_draws_one_bootstrap_and_keeps_it_for_all_epochs(autoregression, make_fields, monkeypatch):
    seen = []

    def spy(indices, batch_size, generator):
        seen.append(indices.clone())
        return epoch_batches(indices, batch_size, generator)

    monkeypatch.setattr(trainer_module, "epoch_batches", spy)
    _, report = fit_market_model(autoregression(400), make_fields(3), SMALL, seed=0)
    assert len(seen) == report.epochs > 1
    assert all(torch.equal(indices, seen[0]) for indices in seen)
    assert seen[0].shape == (3, report.train_rows)
    # a bootstrap sample leaves out a share of 1/e of the rows
    for member in seen[0]:
        assert len({*member.tolist()}) / report.train_rows == pytest.approx(1.0 - 1.0 / math.e, abs=0.08)
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"), [(50, 2048, [50]), (50, 25, [25, 25]), (51, 25, [17, 17, 17])]
)
def test_batches_are_even_and_never_larger_than_asked(rows, batch_size, sizes):
    indices = torch.arange(rows).expand(2, rows)
    batches = [*epoch_batches(indices, batch_size, torch.Generator().manual_seed(0))]
    assert [batch.shape[1] for batch in batches] == sizes


@pytest.mark.parametrize(
    ("rows", "batch_size", "steps"),
    [(1, 2048, 1), (4000, 2048, 2), (64 * 10, 10, 64), (65 * 10, 10, 33), (2060, 10, 52)],
)
def test_a_long_pass_is_cut_into_even_epochs(rows, batch_size, steps):
    assert epoch_steps(rows, batch_size) == steps


def test_epochs_that_are_parts_of_a_pass_go_on_where_the_last_one_ended(autoregression, make_fields, monkeypatch):
    monkeypatch.setattr(trainer_module, "EPOCH_STEPS", 2)
    monkeypatch.setattr(trainer_module, "SCORED_ROWS", 30)  # fewer than the holdout has
    passes = []

    def spy(indices, batch_size, generator):
        passes.append([])
        for rows in epoch_batches(indices, batch_size, generator):
            passes[-1].append(rows)
            yield rows

    monkeypatch.setattr(trainer_module, "epoch_batches", spy)
    _, report = fit_market_model(
        autoregression(400), make_fields(3), SMALL.model_copy(update={"batch_size": 64}), seed=0
    )
    # 319 rows in batches of 64: a pass of 5 steps, in epochs of 2
    assert report.epochs == 6
    assert [len(one) for one in passes] == [5, 5, 2]
    whole = [torch.cat(one, dim=1).sort(dim=1).values for one in passes[:2]]
    assert torch.equal(whole[0], whole[1])


def test_rows_in_the_purge_never_matter(autoregression, make_fields):
    values = autoregression(400)
    purge = 30
    holdout = round(0.2 * 399)
    train = 399 - holdout - purge
    changed = values.copy()
    changed[train + 1 : train + purge] += 1000.0
    first, _ = fit_market_model(values, make_fields(3), SMALL, seed=0, purge=purge)
    again, _ = fit_market_model(changed, make_fields(3), SMALL, seed=0, purge=purge)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_holdout_rows_never_reach_the_statistics(autoregression, make_fields):
    values = autoregression(400)
    changed = values.copy()
    changed[-60:] *= 3.0
    first, _ = fit_market_model(values, make_fields(3), SMALL, seed=0)
    again, _ = fit_market_model(changed, make_fields(3), SMALL, seed=0)
    for name in ("input_normaliser.mean", "delta_normaliser.std", "support_low", "support_high"):
        assert torch.equal(first.state_dict()[name], again.state_dict()[name]), name


def test_fitting_stops_when_no_member_improves(autoregression, make_fields):
    # nothing can be learned about a random walk: the score rises once the members overfit
    walk = np.cumsum(autoregression(300, phi=(0.0, 0.0, 0.0)), axis=0)
    config = WorldModelConfig(
        num_members=2, num_elites=1, hidden=(64,), learning_rate=1e-2, batch_size=32, max_epochs=200, patience=3
    )
    seen = []
    _, report = fit_market_model(walk, make_fields(3), config, 0, lambda *call: seen.append(call))
    assert report.epochs == max(report.best_epochs) + 3
    assert report.epochs < 200
    assert [call[0] for call in seen] == [*range(1, report.epochs + 1)]
    assert {call[1] for call in seen} == {200}
    assert seen[-1][2] == pytest.approx(sum(report.member_scores) / 2)


def test_every_member_ends_with_the_weights_of_its_own_best_epoch(autoregression, make_fields):
    walk = np.cumsum(autoregression(300, phi=(0.0, 0.0, 0.0)), axis=0)
    config = WorldModelConfig(
        num_members=3, num_elites=1, hidden=(64,), learning_rate=1e-2, batch_size=32, max_epochs=12, patience=12
    )
    model, report = fit_market_model(walk, make_fields(3), config, seed=0, purge=10)
    assert max(report.best_epochs) < report.epochs
    assert len({*report.best_epochs}) > 1
    holdout = torch.from_numpy(walk[report.train_rows + 10 :])
    network_inputs = model.input_normaliser(model.clamp(holdout[:-1].float()))
    # The line that the members saw; the model has one fitted to all rows.
    inputs = model.input_normaliser(model.clamp(torch.from_numpy(walk[:-1]).float()))
    _, targets = _beyond_line(inputs, walk, report.train_rows, model.input_normaliser, model.delta_normaliser)
    target = targets[report.train_rows + 10 :]
    with torch.no_grad():
        scores = stopping_score(*model.network(network_inputs), target, model.varying)
    assert scores.tolist() == pytest.approx(report.member_scores, abs=1e-4)


@pytest.mark.parametrize(("batch_size", "where"), [(128, "training loss"), (2048, "holdout score")])
def test_divergence_is_an_error_with_epoch_and_members(autoregression, make_fields, batch_size, where):
    # one step throws the weights out of range; the next number computed with them must raise
    config = SMALL.model_copy(update={"learning_rate": 1e30, "batch_size": batch_size})
    with pytest.raises(TrainingError, match=f"{where}.*learning_rate") as caught:
        fit_market_model(autoregression(400), make_fields(3), config, seed=0)
    assert caught.value.epoch == 1
    assert caught.value.members


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_non_finite_rows_are_refused_by_name(autoregression, make_fields, bad):
    values = autoregression(400)
    values[7, 2] = bad
    with pytest.raises(DataError, match="row 7, field 'f2'"):
        fit_market_model(values, make_fields(3), SMALL, seed=0)


def test_too_few_rows_are_refused_with_both_counts(autoregression, make_fields):
    with pytest.raises(DataError, match=r"30 training rows .* and 50 holdout rows, was 159 and 40"):
        fit_market_model(autoregression(200), make_fields(3), SMALL, seed=0)
    with pytest.raises(DataError, match=r"was 0 and 80 .*purge 9000"):
        fit_market_model(autoregression(400), make_fields(3), SMALL, seed=0, purge=9000)


def test_misuse_is_refused(autoregression, make_fields):
    with pytest.raises(ValueError, match=r"expected \[T, 2\]"):
        fit_market_model(autoregression(400), make_fields(2), SMALL, seed=0)
    with pytest.raises(ValueError, match="purge"):
        fit_market_model(autoregression(400), make_fields(3), SMALL, seed=0, purge=-1)
    with pytest.raises(DataError, match="all are constant"):
        fit_market_model(np.ones((400, 3)), make_fields(3), SMALL, seed=0)


def test_constant_column_stays_where_it_was(autoregression, make_fields):
    values = autoregression(400)
    values[:, 1] = 0.7
    model, report = fit_market_model(values, make_fields(3), SMALL, seed=0)
    assert report.variance_scale["f1"] == 1.0
    assert "f1" not in report.holdout.nll_by_field
    noise = 5.0 * torch.ones(10, 3)
    drawn = model.sample_next(torch.from_numpy(values[:10]), torch.full((10,), model.elites[0]), noise)
    assert drawn[:, 1].tolist() == pytest.approx([0.7] * 10)
    assert torch.isfinite(drawn).all()


def test_column_that_wakes_up_in_the_holdout_does_not_stop_the_others_from_learning(autoregression, make_fields):
    # like overnight gaps, exactly 0 for years: a stir now and then in training, real moves in the holdout
    bars = np.arange(1500)
    values = autoregression(1500, phi=(-0.5, -0.5, 0.0), sigma=(1.0, 1.0, 1.0))
    values[:, 2] *= np.where(bars < 1200, np.where(bars % 50 == 0, 0.001, 0.0), np.where(bars % 20 == 0, 1.0, 0.0))
    config = WorldModelConfig(
        num_members=2, num_elites=2, hidden=(32,), learning_rate=3e-3, batch_size=256, max_epochs=60, patience=5
    )
    _, report = fit_market_model(values, make_fields(3), config, seed=0)
    assert report.holdout.r2_by_field["f0"] > 0.6  # optimum 0.75
    assert report.holdout.r2_by_field["f1"] > 0.6
    assert all(map(math.isfinite, report.member_scores))


def test_stopping_score_limits_rows_and_columns_by_hand():
    floor = 0.5 * math.log(2.0 * math.pi)
    every = torch.ones(2, dtype=torch.bool)
    mean, logvar = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    logvar[..., 1] = -10.0
    # column 0: floor + (0 + 0.5)/2. column 1 at variance exp(-10): both rows exceed 10 nats, limited to 10 each,
    # then to the constant Gaussian's floor + 0.5 plus 1
    target = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    wanted = ((floor + 0.25) + (floor + 0.5 + 1.0)) / 2.0
    assert stopping_score(mean, logvar, target, every).item() == pytest.approx(wanted, abs=1e-5)
    # an absurd row costs 10 nats, to the constant Gaussian as well
    absurd = torch.tensor([[0.0, 0.0], [1000.0, 0.0]])
    assert stopping_score(mean[:, :, :1], logvar[:, :, :1], absurd[:, :1], every[:1]).item() == pytest.approx(
        (floor + 10.0) / 2.0, abs=1e-5
    )
    # columns that never moved do not count
    only_first = torch.tensor([True, False])
    assert stopping_score(mean, logvar, target, only_first).item() == pytest.approx(floor + 0.25, abs=1e-5)


def test_support_is_the_range_widened_by_a_tenth():
    low, high = training_support(np.array([[0.0, 5.0], [10.0, 5.0], [4.0, 5.0]]))
    assert low.tolist() == [-1.0, 5.0]
    assert high.tolist() == [11.0, 5.0]


def test_support_covers_every_training_row(autoregression, make_fields):
    values = autoregression(400)
    model, report = fit_market_model(values, make_fields(3), SMALL, seed=0)
    assert not model.at_edge(torch.from_numpy(values[: report.train_rows + 1])).any()
    assert model.at_edge(torch.from_numpy(values[:1] + 100.0)).all()


def test_line_takes_what_is_straight_the_network_what_is_not_and_noise_is_dropped(make_fields):
    # Column 0 follows column 1 with one bar's delay, column 2 its absolute value; column 1 is white noise.
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(1201)
    before = np.concatenate([[0.0], noise[:-1]])
    features = np.stack([before, noise, np.abs(before)], axis=1)
    config = WorldModelConfig(num_members=3, num_elites=2, hidden=(16,), batch_size=256, max_epochs=60)
    model, report = fit_market_model(features, make_fields(3), config, seed=0)
    assert model.baseline(torch.tensor([[0.0, 2.0, 0.0]]))[0, 0].item() == pytest.approx(2.0, abs=0.05)
    assert report.mean_shrinkage["f2"] > 0.9
    assert report.mean_shrinkage["f1"] < 0.5
    assert [*report.mean_shrinkage.values()] == model.mean_shrinkage.tolist()


def test_the_newest_rows_have_their_say_in_the_line(make_fields):
    # The slope turns in the holdout, which no gradient has seen.
    rng = np.random.default_rng(0)
    before = rng.standard_normal(1001)
    turned = np.where(np.arange(1000) < 800, 1.0, -1.0) * before[:-1] + 0.3 * rng.standard_normal(1000)
    features = np.stack([np.concatenate([[0.0], turned]), before], axis=1)
    config = WorldModelConfig(num_members=2, num_elites=1, hidden=(8,), batch_size=256, max_epochs=2)
    model, _ = fit_market_model(features, make_fields(2), config, seed=0)
    slope = model.baseline(torch.tensor([[0.0, 1.0]])) - model.baseline(torch.tensor([[0.0, 0.0]]))
    # 80 % of the rows say 1, 20 % say -1.
    assert slope[0, 0].item() == pytest.approx(0.6, abs=0.15)
