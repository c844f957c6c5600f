from __future__ import annotations

import numpy as np
import torch

from mbpo import model_error


class KnownMarket:
    """Predicts that nothing moves, with variance 4; the last column never does."""

    varying = torch.tensor([True, True, False])

    def mixture(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return features, torch.full_like(features, 4.0)


def test_each_row_is_scored_on_the_row_that_followed() -> None:
    features = np.array([[0.0, 0.0, 7.0], [2.0, 4.0, 9.0], [2.0, 4.0, 7.0], [8.0, 4.0, 7.0]])
    expected = [(4 / 4 + 16 / 4) / 2, 0.0, 36 / 4 / 2]
    np.testing.assert_allclose(model_error(KnownMarket(), features), expected)  # type: ignore[arg-type]
