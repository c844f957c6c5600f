import numpy as np
import pytest
from arch.univariate import GARCH, StudentsT
from scipy import stats

from evaluation.volatility import EWMA_DECAY, constant_log_density, ewma_log_density, garch_log_density


@pytest.fixture(scope="module")
def market():
    """A GARCH(1,1)-t whose parameters are known: returns, in fractions."""
    shocks = StudentsT(seed=np.random.default_rng(0)).simulate(np.array((6.0,)))
    returns, variance = GARCH(p=1, q=1).simulate(np.array((0.05, 0.1, 0.85)), 4000, shocks)[:2]
    return 0.01 * returns, 1e-4 * variance


def test_the_constant_is_the_gaussian_of_the_training_window():
    training = np.tile([-0.01, 0.03], 60)
    found = constant_log_density(training, np.array([0.5]), np.array([0.01, 0.03]))
    assert found == pytest.approx(stats.norm.logpdf([0.01, 0.03], 0.01, 0.02))


def test_ewma_by_hand():
    training, between, test = np.tile([-0.01, 0.01], 50), np.array([0.05]), np.array([0.0, 0.02])
    # a training window of equal squares leaves the average at 1e-4
    first = EWMA_DECAY * 1e-4 + (1 - EWMA_DECAY) * 0.05**2
    second = EWMA_DECAY * first
    wanted = [stats.norm.logpdf(0.0, 0.0, first**0.5), stats.norm.logpdf(0.02, 0.0, second**0.5)]
    assert ewma_log_density(training, between, test) == pytest.approx(wanted)


def test_garch_comes_close_to_the_truth_and_beats_the_others_on_its_own_market(market):
    returns, variance = market
    parts = returns[:2000], returns[2000:2100], returns[2100:]
    scale = np.sqrt(variance[2100:] * 4.0 / 6.0)
    truth = (stats.t.logpdf(returns[2100:] / scale, 6.0) - np.log(scale)).mean()
    found = garch_log_density(*parts).mean()
    assert truth - 0.01 < found < truth + 0.005
    assert found > ewma_log_density(*parts).mean() > constant_log_density(*parts).mean()
    assert garch_log_density(*parts, asymmetric=True).mean() == pytest.approx(found, abs=0.01)


def test_nothing_after_a_bar_changes_its_density(market):
    returns = market[0][:700]
    changed = returns.copy()
    changed[650:] = 0.2
    for method in (constant_log_density, ewma_log_density, garch_log_density):
        ours = method(returns[:500], returns[500:520], returns[520:])
        theirs = method(changed[:500], changed[500:520], changed[520:])
        assert ours[:130] == pytest.approx(theirs[:130], rel=1e-9)
        assert ours[-1] != theirs[-1]


@pytest.mark.parametrize(
    ("training", "test", "message"),
    [
        (np.zeros(99), np.zeros(3), "training: expected at least 100 returns"),
        (np.zeros(120), np.zeros(3), "training: expected returns that move"),
        (np.arange(120.0), np.array([np.nan]), "test: expected finite returns"),
        (np.arange(120.0), np.zeros(0), "test: expected at least 1 returns"),
    ],
)
def test_bad_input_is_refused(training, test, message):
    for method in (constant_log_density, ewma_log_density, garch_log_density):
        with pytest.raises(ValueError, match=message):
            method(training, np.zeros(0), test)
