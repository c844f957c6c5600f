import numpy as np
import pytest
import torch

from data.errors import DataError
from world_model import Normaliser


def test_golden_mean_and_population_std():
    normaliser = Normaliser.fit(np.array([[1.0, 10.0], [3.0, 30.0]]))
    assert normaliser.mean.tolist() == [2.0, 20.0]
    assert normaliser.std.tolist() == [1.0, 10.0]
    assert normaliser(torch.tensor([[3.0, 10.0]])).tolist() == [[1.0, -1.0]]


def test_inverse_undoes_forward():
    normaliser = Normaliser.fit(np.random.default_rng(0).normal(3.0, 2.0, (50, 4)))
    values = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normaliser.inverse(normaliser(values)), values)


@pytest.mark.parametrize("level", [0.0, 0.1, -1e6, 1e-15])
def test_constant_column_gets_std_one_and_is_marked(level):
    normaliser = Normaliser.fit(np.column_stack([np.full(1000, level), np.arange(1000.0)]))
    assert normaliser.std[0].item() == 1.0
    assert normaliser.varying.tolist() == [False, True]


def test_column_of_rounding_noise_counts_as_constant():
    normaliser = Normaliser.fit(1e-14 * np.random.default_rng(0).standard_normal((50, 1)))
    assert normaliser.std.tolist() == [1.0]
    assert not normaliser.varying.any()


def test_buffers_do_not_share_memory_with_the_arguments():
    mean = torch.zeros(2)
    normaliser = Normaliser(mean, torch.ones(2))
    mean.fill_(9.0)
    assert normaliser.mean.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_value_is_refused_with_its_place(bad):
    values = np.zeros((4, 3))
    values[2, 1] = bad
    with pytest.raises(DataError, match="row 2, column 1"):
        Normaliser.fit(values)


def test_single_row_is_refused():
    with pytest.raises(DataError, match="N >= 2"):
        Normaliser.fit(np.zeros((1, 3)))


def test_disagreeing_shapes_are_refused():
    with pytest.raises(ValueError, match=r"was \[2\], \[3\], \[2\]"):
        Normaliser(torch.zeros(2), torch.ones(3))
