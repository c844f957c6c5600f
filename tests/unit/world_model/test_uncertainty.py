"""Measures of uncertainty against numbers worked by hand."""

import pytest
import torch

from world_model.uncertainty import (
    MEASURES,
    ensemble_std,
    max_aleatoric,
    max_pairwise,
    measure_named,
    total_std,
    total_variance,
)

# Two members, two rows, two outputs.
MEAN = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[6.0, 8.0], [1.0, 1.0]]])
VAR = torch.tensor([[[9.0, 16.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]])


def test_max_aleatoric_is_the_largest_norm_of_a_members_std():
    # row 0: norms (5, 1); row 1: (0, 2)
    assert max_aleatoric(MEAN, VAR).tolist() == [5.0, 2.0]


def test_max_pairwise_is_the_distance_of_the_two_farthest_means():
    assert max_pairwise(MEAN, VAR).tolist() == [10.0, 0.0]
    third = torch.cat((MEAN, torch.tensor([[[0.0, -1.0], [1.0, 3.0]]])))
    assert max_pairwise(third, torch.zeros_like(third)).tolist() == pytest.approx([117.0**0.5, 2.0])


def test_ensemble_std_is_the_norm_of_the_std_of_the_means():
    # half distances 3 and 4
    assert ensemble_std(MEAN, VAR).tolist() == [5.0, 0.0]


def test_total_variance_is_variance_of_means_plus_mean_of_variances():
    assert total_variance(MEAN, VAR).tolist() == [[9.0 + 5.0, 16.0 + 8.0], [0.0, 2.0]]
    assert total_std(MEAN, VAR).tolist() == pytest.approx([38.0**0.5, 2.0**0.5])


def test_total_variance_is_that_of_samples_from_the_mixture():
    generator = torch.Generator().manual_seed(0)
    member = torch.randint(2, (200_000,), generator=generator)
    noise = torch.randn(200_000, 2, generator=generator)
    drawn = MEAN[member, 0] + VAR[member, 0].sqrt() * noise
    gap = drawn - drawn.mean(dim=0)
    assert (gap * gap).mean(dim=0).tolist() == pytest.approx(total_variance(MEAN, VAR)[0].tolist(), rel=0.02)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_keeps_nan_and_refuses_other_shapes(name):
    broken = MEAN.clone()
    broken[0, 1, 0] = torch.nan
    variances = VAR.clone()
    variances[1, 1, 1] = torch.nan
    result = measure_named(name)(broken, variances)
    assert torch.isnan(result).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"expected \[E >= 1, B, M\] both"):
        measure_named(name)(MEAN[0], VAR[0])


@pytest.mark.parametrize("name", ["ensemble_std", "max_pairwise"])
def test_a_single_member_is_never_at_odds(name):
    assert measure_named(name)(MEAN[:1], VAR[:1]).tolist() == [0.0, 0.0]


def test_a_measure_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"expected one of .*total_std.*, was 'variance'"):
        measure_named("variance")
