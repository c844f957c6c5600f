import math

import numpy as np
import pytest
import torch

from data.errors import DataError
from world_model import Normaliser, TrainingError
from world_model.mask_head import MaskHead, MaskHeadConfig, fit_mask_head, fit_temperature

SMALL = MaskHeadConfig(hidden=(16,), batch_size=64, max_epochs=30, patience=5, learning_rate=1e-2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rule_rows(rows, seed, noise=0.0):
    """Action 0 always, action 1 where x > 0, action 2 where |y| < 1; a share of the verdicts is flipped."""
    rng = np.random.default_rng(seed)
    obs = rng.uniform(-2.0, 2.0, (rows, 2)) * (1.0, 50.0) + (0.0, 1000.0)
    y = (obs[:, 1] - 1000.0) / 50.0
    masks = np.stack([np.ones(rows, dtype=bool), obs[:, 0] > 0, np.abs(y) < 1], axis=1)
    masks[:, 1:] ^= rng.random((rows, 2)) < noise
    return obs, masks


def head_of(num_obs=2, num_actions=3, low=-1.0, high=1.0):
    ones = torch.ones(num_obs)
    return MaskHead(
        Normaliser(0 * ones, ones),
        (low * ones, high * ones),
        num_actions=num_actions,
        hidden=(4,),
        generator=generator(),
    )


def test_fitted_probabilities_follow_the_rule():
    head, report = fit_mask_head(rule_rows(2000, 0), rule_rows(400, 1), SMALL, generator())
    obs, masks = rule_rows(1000, 2)
    probabilities = head.probabilities(torch.tensor(obs)).numpy()
    assert probabilities.shape == (1000, 3)
    assert ((probabilities > 0.5) == masks).mean() > 0.98
    assert (report.fit_rows, report.stop_rows) == (2000, 400)
    assert report.calibrated_loss < 0.1


def test_fit_repeats_bit_for_bit_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, report = fit_mask_head(rule_rows(300, 0), rule_rows(100, 1), SMALL, generator(3))
    again, same_report = fit_mask_head(rule_rows(300, 0), rule_rows(100, 1), SMALL, generator(3))
    other, _ = fit_mask_head(rule_rows(300, 0), rule_rows(100, 1), SMALL, generator(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report == same_report
    obs = torch.tensor(rule_rows(20, 2)[0])
    assert torch.equal(first(obs), again(obs))
    assert not torch.equal(first(obs), other(obs))


def test_weights_are_those_of_the_best_epoch():
    # Four verdicts in ten are flipped: a network that goes on learns the noise of its own rows.
    noisy = MaskHeadConfig(hidden=(64,), batch_size=16, max_epochs=60, patience=6, learning_rate=3e-2)
    stop_obs, stop_masks = rule_rows(500, 1, noise=0.4)
    head, report = fit_mask_head(rule_rows(100, 0, noise=0.4), (stop_obs, stop_masks), noisy, generator())
    assert report.epochs == report.best_epoch + 6 < 60
    logits = head(torch.tensor(stop_obs)) * head.temperature
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(stop_masks).float())
    assert loss.item() == pytest.approx(report.stop_loss, rel=1e-5)
    # Such a head is too sure of itself.
    assert report.temperature > 1.0
    assert report.calibrated_loss < report.stop_loss


def test_temperature_solved_by_hand():
    # All logits are 2 and 6 of 8 pairs valid; soft targets 7/8 and 1/4 average to 23/32 = sigmoid(2 / T).
    target = torch.tensor([1.0] * 6 + [0.0] * 2)
    assert fit_temperature(torch.full((8,), 2.0), target) == pytest.approx(2.0 / math.log(23 / 9))


def test_rows_that_are_separated_perfectly_do_not_make_certain():
    # 9 valid and 9 invalid pairs: nothing bolder than 10/11 = sigmoid(30 / T) can be known from them.
    logits = torch.tensor([30.0] * 9 + [-30.0] * 9)
    assert fit_temperature(logits, (logits > 0).float()) == pytest.approx(30.0 / math.log(10.0))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_temperature_undoes_a_factor_on_true_log_odds(factor):
    logits = 2.0 * torch.randn(50_000, generator=generator())
    target = (torch.rand(50_000, generator=generator(1)) < torch.sigmoid(logits)).float()
    assert fit_temperature(factor * logits, target) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize(("sign", "bound"), [(-1.0, 20.0), (1e-9, 0.05)])
def test_temperature_stays_within_its_bounds(sign, bound):
    # An inverted head would ask for an infinite temperature, one without contrast for zero.
    target = torch.tensor([1.0, 0.0] * 50)
    assert fit_temperature(sign * (2 * target - 1), target) == pytest.approx(bound)


def test_temperature_divides_the_logits():
    head, obs = head_of(), torch.tensor([[0.5, -0.5]])
    before = head(obs)
    head.temperature.fill_(4.0)
    torch.testing.assert_close(head(obs), before / 4.0)
    torch.testing.assert_close(head.probabilities(obs), torch.sigmoid(before / 4.0))


def test_rows_that_cannot_be_judged_score_minus_infinity():
    obs = torch.tensor([[1.0, -1.0], [1.01, 0.0], [0.0, torch.nan], [-torch.inf, 0.0]])
    head = head_of()
    assert head.in_support(obs).tolist() == [True, False, False, False]
    scores = head.scores(obs)
    assert torch.equal(scores[0], head(obs)[0])
    assert (scores[1:] == -torch.inf).all()


def test_support_is_the_range_of_the_fitted_rows_and_a_tenth():
    obs = np.array([[0.0, 5.0], [10.0, 5.0]] * 20)
    masks = np.ones((40, 2), dtype=bool)
    head, _ = fit_mask_head((obs, masks), (obs, masks), SMALL, generator())
    rows = torch.tensor([[-0.99, 5.0], [10.99, 5.0], [-1.01, 5.0], [11.01, 5.0], [5.0, 5.00004], [5.0, 5.1]])
    # A column that never moved may wobble by rounding, no more.
    assert head.in_support(rows).tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("broken", ["fit", "stop"])
def test_rows_that_are_not_finite_in_float32_are_refused(value, broken):
    rows = {"fit": rule_rows(50, 0), "stop": rule_rows(50, 1)}
    rows[broken][0][7, 1] = value
    with pytest.raises(DataError, match=rf"{broken} rows: obs: expected finite numbers, was .* at \[7, 1\]"):
        fit_mask_head(rows["fit"], rows["stop"], SMALL, generator())


def test_rows_that_do_not_belong_together_are_refused():
    obs, masks = rule_rows(50, 0)
    with pytest.raises(ValueError, match="fit rows"):
        fit_mask_head((obs, masks[1:]), (obs, masks), SMALL, generator())
    with pytest.raises(ValueError, match="stop rows"):
        fit_mask_head((obs, masks), (obs[:1], masks[:1]), SMALL, generator())


def test_a_fit_that_diverges_is_named():
    wild = MaskHeadConfig(hidden=(8,), learning_rate=1e30, max_epochs=5)
    with pytest.raises(TrainingError, match="lower the learning_rate") as error:
        fit_mask_head(rule_rows(200, 0), rule_rows(100, 1), wild, generator())
    assert error.value.epoch >= 1


@pytest.mark.parametrize("obs", [torch.zeros(3, 1), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)])
def test_misshapen_or_integer_obs_are_refused(obs):
    with pytest.raises(ValueError, match=r"obs: expected floating \[B, 2\]"):
        head_of().scores(obs)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": (0,)},
        {"batch_size": 0},
        {"max_epochs": 0},
        {"patience": 0},
        {"learning_rate": math.nan},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_config_that_cannot_be_fitted_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MaskHeadConfig(**changes)
