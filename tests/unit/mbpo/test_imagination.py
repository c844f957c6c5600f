from __future__ import annotations

import numpy as np
import pytest
import torch
from mbpo_worlds import NAMES, SteppingMarket, make_features

from mbpo import Forecast, MarketBranches, branch_summary, historical_forecast, historical_uncertainty, imagine_market
from world_model.model import Outlook


def no_forecast_of(shape: tuple[int, ...]) -> Forecast:
    return Forecast(*np.zeros((2, *shape, 2), np.float32))


def imagine(seed: int = 0, **options: int) -> tuple[MarketBranches, SteppingMarket]:
    model = SteppingMarket()
    settings = {"horizon": 3, "branches_per_row": 4, **options}
    branches = imagine_market(
        model,
        make_features(20),
        generator=torch.Generator().manual_seed(seed),
        **settings,  # type: ignore[arg-type]
    )
    return branches, model


def test_branches_continue_their_own_row_step_by_step() -> None:
    branches, _ = imagine()
    start = make_features(20)[:, 3]
    for depth in range(3):
        expected = np.repeat(start[:, None] + depth + 1, 4, axis=1)
        np.testing.assert_allclose(branches.features[:, :, depth, 3], expected)
        np.testing.assert_allclose(branches.uncertainty[:, :, depth], expected)


def test_forecasts_are_those_of_the_bar_before() -> None:
    class Trending(SteppingMarket):
        # Expects a gap of a thousandth of the signal.
        def outlook(self, features: torch.Tensor) -> Outlook:
            mean, variance, disagreement = super().outlook(features)
            mean[:, 0] = 0.001 * features[:, 3]
            return Outlook(mean, variance, disagreement)

    features = make_features(6)
    branches = imagine_market(
        Trending(),  # type: ignore[arg-type]
        features,
        horizon=2,
        branches_per_row=1,
        generator=torch.Generator().manual_seed(0),
    )
    for depth in range(2):
        np.testing.assert_allclose(
            branches.forecast.mean[:, 0, depth, 0], 0.001 * (features[:, 3] + depth), rtol=1e-5, atol=1e-9
        )
    np.testing.assert_allclose(branches.forecast.variance, 1e-6, rtol=1e-6)
    history = historical_forecast(Trending(), features)  # type: ignore[arg-type]
    np.testing.assert_allclose(history.mean[:, 0], 0.001 * features[:, 3], rtol=1e-5)


def test_only_elites_generate() -> None:
    _, model = imagine()
    assert model.members == {0, 2}


def test_branches_of_one_row_differ() -> None:
    branches, _ = imagine()
    assert len(np.unique(branches.features[:, :, 0, 1])) == 80


def test_same_seed_same_branches_and_other_seed_others() -> None:
    first, again, other = imagine(1)[0], imagine(1)[0], imagine(2)[0]
    np.testing.assert_array_equal(first.features, again.features)
    assert not np.array_equal(first.features, other.features)


def test_nan_from_the_model_stops() -> None:
    class BrokenMarket(SteppingMarket):
        def sample_next(self, features: torch.Tensor, member: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return super().sample_next(features, member, noise) * torch.nan

    with pytest.raises(FloatingPointError, match="NaN"):
        imagine_market(
            BrokenMarket(),  # type: ignore[arg-type]
            make_features(3),
            horizon=1,
            branches_per_row=1,
            generator=torch.Generator(),
        )


def test_each_bar_tells_whether_it_was_drawn_inside_the_support() -> None:
    class BoundedMarket(SteppingMarket):
        def at_edge(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, 3] >= 3

    features = make_features(20)
    branches = imagine_market(
        BoundedMarket(),  # type: ignore[arg-type]
        features,
        horizon=3,
        branches_per_row=2,
        generator=torch.Generator().manual_seed(0),
    )
    # The signal is -1 or 1 and grows by 1 a bar.
    risen = features[:, 3] == 1
    assert 0 < risen.sum() < 20
    assert branches.supported[~risen].all()
    np.testing.assert_array_equal(branches.supported[risen], np.full((risen.sum(), 2, 3), [True, False, False]))


def test_parts_of_branches_that_do_not_fit_are_refused() -> None:
    rows, numbers, flags = np.zeros((4, 2, 3, 4)), np.zeros((4, 2, 3)), np.ones((4, 2, 3), bool)
    forecast, short = no_forecast_of((4, 2, 3)), no_forecast_of((4, 2, 2))
    MarketBranches(rows, numbers, flags, forecast)
    for parts in (
        (rows[0], numbers, flags, forecast),
        (rows, numbers[:, :, :2], flags, forecast),
        (rows, numbers, flags[:3], forecast),
        (rows, numbers, flags, short),
    ):
        with pytest.raises(ValueError, match=r"uncertainty and supported \[T, K, H\]"):
            MarketBranches(*parts)


@pytest.mark.parametrize("options", [{"horizon": 0}, {"branches_per_row": 0}])
def test_empty_branches_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected >= 1"):
        imagine(**options)


def test_historical_uncertainty_is_the_disagreement_at_each_row() -> None:
    features = make_features(7)
    np.testing.assert_allclose(historical_uncertainty(SteppingMarket(), features), features[:, 3])  # type: ignore[arg-type]


def test_summary_compares_each_depth_with_history() -> None:
    features = np.zeros((4, 4))
    features[:, 1] = [0.01, -0.01, 0.03, 0.01]
    imagined = np.zeros((4, 1, 2, 4), np.float32)
    imagined[:, 0, 0, 0] = 0.02
    imagined[:, 0, 1, 1] = [0.01, -0.01, 0.01, -0.01]
    branches = MarketBranches(
        imagined, np.full((4, 1, 2), 0.5, np.float32), np.ones((4, 1, 2), bool), no_forecast_of((4, 1, 2))
    )
    summary = branch_summary(branches, features, NAMES, 100)
    assert summary["history"] == pytest.approx({"drift": 1.0, "volatility": np.sqrt(2) * 0.1})
    assert summary["depth_1"] == pytest.approx({"drift": 2.0, "volatility": 0.0}, abs=1e-6)
    assert summary["depth_2"] == pytest.approx({"drift": 0.0, "volatility": 0.1}, abs=1e-6)
