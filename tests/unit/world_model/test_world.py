"""A world learned whole, or around its declared parts."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from line_world import STEP, line_experience, masks_at

from data.errors import DataError
from masking import InvalidMaskError
from world_model import EnsembleMLP, ModelFileError, Normaliser, TrainingError
from world_model.known import KnownParts
from world_model.uncertainty import total_std
from world_model.warm_start import adopt_world_weights
from world_model.world import WorldModel, WorldSizes, one_hot
from world_model.world_fit import (
    BOOTSTRAP_BLOCK,
    WorldFitConfig,
    block_bootstrap,
    fit_network,
    fit_world_model,
)

SMALL = WorldFitConfig(num_members=3, num_elites=2, hidden=(32,), batch_size=64, max_epochs=40, learning_rate=1e-2)


@pytest.fixture(scope="module")
def fitted():
    return fit_world_model(line_experience(fenced=True), SMALL, seed=0)


def draws(model, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    elites = model.elite_index
    return {
        "member": elites[torch.randint(len(elites), (rows,), generator=generator)],
        "noise": torch.randn(rows, model.sizes.num_obs + 1, generator=generator),
        "uniform": torch.rand(rows, generator=generator),
    }


def line_step(model, x, action, **options):
    obs = torch.tensor([[value, 0.25] for value in x])
    return model.step(obs, torch.tensor(action)[:, None], **(draws(model, len(x)) | options))


def test_delta_reward_termination_and_mask_are_learned_whole(fitted):
    model, report = fitted
    test = line_experience(seed=1, fenced=True)
    obs, action = torch.from_numpy(test.obs), torch.from_numpy(test.action)
    mean, var = model.predict(obs, action)
    delta = np.concatenate((test.next_obs - test.obs, test.reward[:, None]), axis=1)
    assert np.abs(mean.mean(dim=0).numpy() - delta).mean(axis=0).max() < 0.08  # rewards spread by 0.3
    assert var[..., 1].max() == 0.0
    ended = model.termination_probability(obs, action, torch.from_numpy(test.next_obs)) > 0.5
    assert (ended.numpy() == test.terminated).mean() > 0.98
    masks, refused = model.action_masks(obs)
    assert (masks.numpy() == test.action_masks).all(axis=1).mean() > 0.95
    assert not refused.any()
    assert report.masks == "uncertified"
    assert report.train_rows + report.holdout_rows == 600
    assert report.holdout_rmse < 0.2


def test_what_never_changed_stays_exactly_as_it_is(fitted):
    step = line_step(fitted[0], [0.0, 0.5], [0, 1])
    assert step.next_obs[:, 1].tolist() == [0.25, 0.25]


def test_termination_is_sampled_and_the_draw_is_an_argument(fitted):
    model = fitted[0]
    sure = line_step(model, [0.99, 0.0], [1, 1], uniform=torch.tensor([0.5, 0.5]))
    assert sure.terminated.tolist() == [True, False]
    never = line_step(model, [0.99, 0.0], [1, 1], uniform=torch.tensor([1.0, 1.0]))
    assert never.terminated.tolist() == [False, False]


def test_declared_parts_replace_the_learned_ones():
    known = KnownParts(
        reward=lambda obs, action, next_obs: 7.0 + 0.0 * next_obs[:, 0],
        terminated=lambda next_obs: next_obs[:, 0] > 0.3,
        action_masks=lambda obs: torch.from_numpy(masks_at(obs.numpy())),
        transition=lambda obs, action, next_obs: torch.stack((obs[:, 0] + 1.0, next_obs[:, 1]), dim=1),
        exact=(0,),
    )
    model, report = fit_world_model(line_experience(), SMALL, seed=0, known=known)
    step = line_step(model, [-2.0, 0.0], [0, 1])
    assert step.reward.tolist() == [7.0, 7.0]
    assert step.next_obs[:, 0].tolist() == [-1.0, 1.0]
    assert step.terminated.tolist() == [False, True]
    assert model.action_masks(torch.tensor([[0.0, 0.25]]))[0].tolist() == [[True, True, False]]
    assert (model.termination, report.termination, report.masks) == (None, None, "declared")
    assert not model.targets.varying.any()  # nothing was left to learn


def test_exact_columns_without_a_transition_are_refused():
    with pytest.raises(ValueError, match=r"exact: expected none without a declared transition, was \(0,\)"):
        KnownParts(exact=(0,))
    with pytest.raises(ValueError, match="exogenous: expected exact columns"):
        KnownParts(exogenous=True)


def test_exogenous_parts_depend_on_neither_the_exact_columns_nor_the_action():
    known = KnownParts(
        transition=lambda obs, action, next_obs: torch.stack((obs[:, 0] + 0.1, next_obs[:, 1]), dim=1),
        exact=(0,),
        exogenous=True,
    )
    rng = np.random.default_rng(0)
    experience = line_experience()
    # The button halves and wobbles, whatever the point does.
    buttons = rng.uniform(-1, 1, 600).astype(np.float32)
    obs, following = experience.obs.copy(), experience.next_obs.copy()
    obs[:, 1], following[:, 1] = buttons, 0.5 * buttons
    moved = dataclasses.replace(experience, obs=obs, next_obs=following)
    model, _ = fit_world_model(moved, SMALL, seed=0, known=known)
    asked = torch.tensor([[-5.0, 0.8], [0.0, 0.8], [9.0, 0.8]])
    # One by one: rows of a batch are not rounded alike on every processor.
    means = [model.predict(asked[row : row + 1], torch.tensor([[row % 2]]))[0] for row in range(3)]
    assert torch.equal(means[0][:, 0, 1], means[1][:, 0, 1])
    assert torch.equal(means[0][:, 0, 1], means[2][:, 0, 1])
    assert float(means[0][0, 0, 1]) == pytest.approx(-0.4, abs=0.05)
    assert model.in_support(asked).all()  # the exact column has no support to leave
    assert not model.in_support(torch.tensor([[torch.nan, 0.8], [0.0, 3.0]])).any()


def test_a_world_that_never_ended_and_masked_nothing_does_neither():
    experience = dataclasses.replace(
        line_experience(spread=0.5), action_masks=np.ones((600, 3), bool), terminated=np.zeros(600, bool)
    )
    model, report = fit_world_model(experience, SMALL, seed=0)
    step = line_step(model, [0.4], [1], uniform=torch.zeros(1))
    assert step.terminated.tolist() == [False]
    assert model.action_masks(torch.zeros(2, 2))[0].all()
    assert (report.termination, report.masks) == (None, "never masked")


def test_a_row_without_a_valid_action_in_any_dimension_is_refused():
    sizes = WorldSizes(num_obs=1, num_actions=(2, 2), num_members=1, hidden=(4,), terminates=False)
    told = torch.tensor([[True, False, False, True], [True, True, False, False], [False] * 4])
    dynamics, _ = sizes.networks(torch.Generator())
    ones = torch.ones(1)
    model = WorldModel(
        sizes,
        KnownParts(action_masks=lambda obs: told[: len(obs)]),
        inputs=Normaliser(0 * ones, ones),
        targets=Normaliser(torch.zeros(2), torch.ones(2)),
        dynamics=dynamics,
        termination=None,
        elites=(0,),
        termination_elites=(),
        support=(-ones, ones),
        masks=None,
    )
    assert model.action_masks(torch.zeros(3, 1))[1].tolist() == [False, True, True]


def test_the_drawn_member_alone_answers_with_or_without_a_measure(fitted):
    model = fitted[0]
    plain = line_step(model, [0.1, -0.4, 0.7], [0, 1, 0])
    measured = line_step(model, [0.1, -0.4, 0.7], [0, 1, 0], measure=total_std)
    torch.testing.assert_close(plain.next_obs, measured.next_obs)
    assert plain.uncertainty.tolist() == [0.0, 0.0, 0.0]
    assert (measured.uncertainty > 0).all()
    with pytest.raises(ValueError, match="member: expected elites"):
        line_step(model, [0.1], [0], member=torch.tensor([({0, 1, 2} - {*model.elites}).pop()]))


def test_uncertainty_is_that_of_the_elites_alone(fitted):
    model = fitted[0]
    before = line_step(model, [0.1, 0.2], [0, 1], measure=total_std).uncertainty
    outsider = ({0, 1, 2} - {*model.elites}).pop()
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.dynamics.biases[-1][outsider] += 100.0
    assert torch.equal(line_step(spoilt, [0.1, 0.2], [0, 1], measure=total_std).uncertainty, before)
    with torch.no_grad():
        spoilt.dynamics.biases[-1][spoilt.elites[0]] += 100.0
    assert (line_step(spoilt, [0.1, 0.2], [0, 1], measure=total_std).uncertainty > before + 1).all()


def test_predicted_noise_is_that_of_the_world():
    experience = line_experience(rows=1000, noise=0.05, spread=0.9)
    model, _ = fit_world_model(experience, dataclasses.replace(SMALL, batch_size=128), seed=0)
    x = torch.zeros(4000, 2)
    x[:, 1] = 0.25
    step = model.step(x, torch.ones(4000, 1, dtype=torch.int64), **draws(model, 4000))
    assert float(step.next_obs[:, 0].mean()) == pytest.approx(STEP, abs=0.01)
    assert float(step.next_obs[:, 0].std()) == pytest.approx(0.05, rel=0.15)


def test_the_same_seed_fits_the_same_weights_and_another_does_not():
    short = dataclasses.replace(SMALL, max_epochs=3)
    first, again, other = (fit_world_model(line_experience(rows=200), short, seed=seed)[0] for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.dynamics.weights[0], other.dynamics.weights[0])


def test_a_members_rows_are_drawn_once_per_fit_and_stay_when_rows_are_added():
    few, many = (block_bootstrap(rows, 3, torch.Generator().manual_seed(5)) for rows in (2 * BOOTSTRAP_BLOCK, 500))
    assert torch.equal(many[:, : 2 * BOOTSTRAP_BLOCK], few)
    assert many.shape == (3, 500)
    assert (int(many.min()), int(many.max())) >= (0, 400)
    assert int(many.max()) < 500
    assert not torch.equal(many[0], many[1])
    share = torch.tensor([len(torch.unique(rows)) / 500 for rows in many])
    assert ((share > 0.55) & (share < 0.72)).all()  # 1 - 1/e of the rows


def test_every_epoch_trains_a_member_on_its_own_rows_only():
    seen = [set(), set()]
    targets = torch.arange(40.0)[:, None]
    indices = torch.stack((torch.arange(0, 20), torch.arange(20, 40)))

    def recorded(mean, logvar, target):
        for member, values in enumerate(target):
            seen[member] |= {*values.flatten().tolist()}
        return (mean - target).square().mean(dim=(1, 2)) + 0.0 * logvar.mean(dim=(1, 2))

    def judged(mean, logvar, target):
        return (mean - target).square().mean(dim=(1, 2))

    network = EnsembleMLP(2, 1, 1, hidden=(4,), logvar_bounds=(-5, 5), generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SMALL, batch_size=7, max_epochs=3)
    fit_network(
        network, (targets / 40, targets), indices, torch.arange(40), loss=recorded, score=judged, config=config,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert seen == [{*range(20)}, {*range(20, 40)}]


def test_one_members_better_epoch_does_not_snapshot_the_others():
    network = EnsembleMLP(2, 1, 1, hidden=(4,), logvar_bounds=(-5, 5), generator=torch.Generator().manual_seed(0))
    weights, scores = [], iter([[9.0, 9.0], [1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])

    def judged(mean, logvar, target):
        weights.append([weight.detach().clone() for weight in network.weights])
        return torch.tensor(next(scores))

    report = fit_network(
        network,
        (torch.rand(30, 1), torch.rand(30, 1)),
        torch.arange(30).expand(2, -1),
        torch.arange(30),
        loss=lambda mean, logvar, target: (mean - target).square().mean(dim=(1, 2)),
        score=judged,
        config=dataclasses.replace(SMALL, max_epochs=3),
        generator=torch.Generator().manual_seed(0),
    )
    assert (report.best_epochs, report.scores, report.elites) == ((1, 2), (1.0, 4.0), (0, 1))
    for layer, weight in enumerate(network.weights):
        assert torch.equal(weight[0], weights[1][layer][0])
        assert torch.equal(weight[1], weights[2][layer][1])


def test_a_warm_start_begins_where_the_last_fit_ended_and_needs_fewer_epochs():
    old, new = line_experience(rows=400, spread=0.6), line_experience(rows=500, spread=1.0)
    previous, _ = fit_world_model(old, dataclasses.replace(SMALL, max_epochs=20), seed=0)
    brief = dataclasses.replace(SMALL, max_epochs=2)
    warm = fit_world_model(new, brief, seed=0, previous=previous)[1]
    cold = fit_world_model(new, brief, seed=0)[1]
    assert warm.holdout_rmse < 0.5 * cold.holdout_rmse


def test_carried_weights_predict_the_same_under_other_statistics():
    previous, _ = fit_world_model(line_experience(rows=300), dataclasses.replace(SMALL, max_epochs=10), seed=0)
    inputs = Normaliser(torch.tensor([0.2, 0.1]), torch.tensor([0.7, 1.0]))
    targets = Normaliser(torch.tensor([0.05, 0.0, -0.3]), torch.tensor([0.2, 1.0, 0.5]))
    dynamics, termination = previous.sizes.networks(torch.Generator())
    adopt_world_weights(previous, dynamics, termination, previous.sizes, inputs, targets)
    obs, action = torch.tensor([[0.3, 0.25], [-0.5, 0.25]]), torch.tensor([[0], [1]])
    mean, logvar = dynamics(torch.cat((inputs(obs), one_hot(action, (3,))), dim=1), previous.elites)
    expected, variance = previous.predict(obs, action)
    torch.testing.assert_close(targets.inverse(mean)[..., [0, 2]], expected[..., [0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        (logvar + 2 * torch.log(targets.std))[..., [0, 2]], torch.log(variance[..., [0, 2]]), atol=0.5, rtol=0.1
    )


def test_a_previous_model_of_other_sizes_is_refused(fitted):
    with pytest.raises(ValueError, match="previous: expected a model of"):
        fit_world_model(line_experience(), dataclasses.replace(SMALL, hidden=(16,)), seed=0, previous=fitted[0])


def test_a_saved_model_steps_the_same(fitted, tmp_path):
    model = fitted[0]
    model.save(tmp_path / "world")
    loaded = WorldModel.load(tmp_path / "world")
    for one, other in zip(line_step(model, [0.1, -0.9], [0, 0]), line_step(loaded, [0.1, -0.9], [0, 0]), strict=True):
        assert torch.equal(one, other)
    obs = torch.tensor([[0.8, 0.25]])
    assert torch.equal(model.action_masks(obs)[0], loaded.action_masks(obs)[0])
    assert loaded.learned_masks.bound == model.learned_masks.bound


def test_a_damaged_model_or_other_declared_parts_are_refused(fitted, tmp_path):
    fitted[0].save(tmp_path / "world")
    with pytest.raises(ModelFileError, match=r"known: expected \[\] with exact columns \[\], was \['terminated'\]"):
        WorldModel.load(tmp_path / "world", KnownParts(terminated=lambda next_obs: next_obs[:, 0] > 1))
    weights = tmp_path / "world" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelFileError, match="sha256: expected"):
        WorldModel.load(tmp_path / "world")


def test_support_is_the_range_of_the_data_widened_by_a_tenth(fitted):
    obs = torch.tensor([[0.0, 0.25], [1.2, 0.25], [1.35, 0.25], [torch.nan, 0.25]])
    assert fitted[0].in_support(obs).tolist() == [True, True, False, False]
    assert fitted[0].clamp(obs)[2, 0] < 1.35


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"obs": np.full((600, 2), np.nan, np.float32)},
            DataError,
            r"obs: expected finite numbers, was nan at \[0, 0\]",
        ),
        ({"reward": np.zeros(599, np.float32)}, ValueError, r"reward: expected \[600\], was \[599\]"),
        ({"action": np.full((600, 1), 3)}, DataError, "action: expected 0..2, was 3 in row 0"),
        ({"action": np.zeros((600, 1))}, ValueError, "action: expected integer, was float64"),
        ({"action_masks": np.zeros((600, 3), bool)}, InvalidMaskError, "at least one valid action in every row"),
        ({"terminated": np.zeros(600)}, ValueError, "terminated: expected bool, was float64"),
    ],
)
def test_bad_experience_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(line_experience(), **change)


def test_too_few_transitions_are_refused():
    with pytest.raises(DataError, match="expected at least 50 transitions, was 49"):
        fit_world_model(line_experience(rows=49), SMALL, seed=0)


def test_an_exploding_loss_stops_the_fit():
    with pytest.raises(TrainingError, match="expected finite numbers"):
        fit_world_model(line_experience(), dataclasses.replace(SMALL, learning_rate=1e30), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_elites": 6}, "num_elites: expected at most num_members=5, was 6"),
        ({"hidden": ()}, "hidden: expected at least one width"),
        ({"beta": 1.5}, "beta: expected between 0 and 1, was 1.5"),
        ({"holdout_fraction": 0.0}, "holdout_fraction: expected between 0 and 0.9, was 0.0"),
        ({"max_epochs": 0}, "max_epochs: expected at least 1, was 0"),
    ],
)
def test_contradictory_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WorldFitConfig(**change)


@pytest.mark.parametrize(
    ("obs", "action", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), r"obs: expected floating \[B >= 1, 2\]"),
        (torch.zeros(2, 2), torch.zeros(2, 1), r"action: expected int64 \[2, 1\], was torch.float32"),
    ],
)
def test_wrong_shapes_are_refused(fitted, obs, action, message):
    with pytest.raises(ValueError, match=message):
        fitted[0].predict(obs, action)
