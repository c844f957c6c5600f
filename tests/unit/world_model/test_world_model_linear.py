"""The line under the network against textbook formulas and known worlds."""

import numpy as np
import pytest

from world_model.linear import PENALTIES, fit_line


def world(rows: int, slope: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, 3))
    return inputs, (slope * inputs[:, :1] + rng.standard_normal((rows, 1)))


def test_coefficients_solve_the_ridge_equations_at_the_chosen_penalty() -> None:
    inputs, targets = world(200, 0.5)
    coefficients, penalties = fit_line(inputs, targets)
    design = np.column_stack((np.ones(200), inputs))
    expected = np.linalg.solve(design.T @ design + penalties[0] * np.eye(4), design.T @ targets[:, 0])
    np.testing.assert_allclose(coefficients[0], expected, rtol=1e-9)


def test_the_chosen_penalty_has_the_largest_evidence() -> None:
    inputs, targets = world(60, 0.4)
    _, penalties = fit_line(inputs, targets)
    design = np.column_stack((np.ones(60), inputs))

    def evidence(penalty: float) -> float:
        # y ~ N(0, s^2 C) with C = I + design design' / penalty, and s^2 at its maximum.
        covariance = np.eye(60) + design @ design.T / penalty
        noise = float(targets[:, 0] @ np.linalg.solve(covariance, targets[:, 0])) / 60
        return -0.5 * 60 * np.log(noise) - 0.5 * np.linalg.slogdet(covariance)[1]

    assert penalties[0] == PENALTIES[np.argmax([evidence(penalty) for penalty in PENALTIES])]


def test_weighted_rows_solve_the_weighted_equations_and_a_common_factor_is_none() -> None:
    inputs, targets = world(200, 0.5)
    weights = np.random.default_rng(3).uniform(0.1, 2.0, (200, 1))
    coefficients, penalties = fit_line(inputs, targets, weights)
    design, share = np.column_stack((np.ones(200), inputs)), weights[:, 0] / weights.mean()
    gram = design.T @ (share[:, None] * design) + penalties[0] * np.eye(4)
    np.testing.assert_allclose(coefficients[0], np.linalg.solve(gram, design.T @ (share * targets[:, 0])), rtol=1e-9)
    np.testing.assert_allclose(fit_line(inputs, targets, 7.0 * weights)[0], coefficients, rtol=1e-9)
    assert not np.allclose(fit_line(inputs, targets)[0], coefficients)


def test_noisy_rows_count_less_where_their_weight_says_so() -> None:
    rng = np.random.default_rng(4)
    inputs, noise = rng.standard_normal((400, 1)), rng.standard_normal((400, 50))
    size = np.where(np.arange(400) < 200, 0.5, 8.0)[:, None]
    targets = 0.5 * inputs + size * noise
    weights = np.broadcast_to(size**-2.0, targets.shape)
    errors = [np.abs(fit_line(inputs, targets, given)[0][:, 1] - 0.5).mean() for given in (None, weights)]
    assert errors[1] < 0.5 * errors[0]


def test_structure_is_kept_and_noise_is_shrunk_away() -> None:
    kept, _ = fit_line(*world(1000, 0.5))
    assert kept[0, 1] == pytest.approx(0.5, abs=0.1)
    rng = np.random.default_rng(1)
    noise, penalties = fit_line(rng.standard_normal((500, 8)), rng.standard_normal((500, 40)))
    assert np.median(np.abs(noise)) < 0.02  # least squares leaves 0.03 at the median
    assert np.median(penalties) > 1_000


def test_a_sure_intercept_is_kept_and_a_doubtful_one_is_not() -> None:
    rng = np.random.default_rng(2)
    inputs, noise = rng.standard_normal((400, 2)), rng.standard_normal((400, 2))
    coefficients, _ = fit_line(inputs, noise + np.array([5.0, 0.05]))
    assert coefficients[0, 0] == pytest.approx(5.0, abs=0.15)
    assert abs(coefficients[1, 0]) < 0.05


def test_constant_inputs_and_targets_give_a_line_of_zeros() -> None:
    coefficients, _ = fit_line(np.zeros((50, 2)), np.zeros((50, 1)))
    np.testing.assert_array_equal(coefficients, 0.0)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 1)), "expected"),
        (np.zeros(3), np.zeros((3, 1)), "expected"),
        (np.full((3, 2), np.nan), np.zeros((3, 1)), "finite"),
        (np.zeros((3, 2)), np.full((3, 1), np.inf), "finite"),
    ],
)
def test_bad_tables_are_refused(inputs: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_line(inputs, targets)
