import numpy as np
import pytest
import torch

from data.errors import DataError
from world_model.horizons import evaluate_horizons


def generator():
    return torch.Generator().manual_seed(0)


def test_a_random_walk_grows_by_the_root_of_the_horizon_and_is_covered(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]), std=50.0)
    walk = np.random.default_rng(0).standard_normal((2000, 1)).cumsum(axis=0)
    steps = evaluate_horizons(model, walk, model.fields, generator=generator(), horizon=5, num_paths=100)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step.rows == 1995
        assert step.error["f0"] == pytest.approx(step.step**0.5, rel=0.1)
        assert step.error_persistence["f0"] == pytest.approx(step.error["f0"], rel=0.05)
        for level, share in step.coverage.items():
            assert share == pytest.approx(int(level) / 100, abs=0.05)
        assert step.coverage_by_group == {"market": step.coverage}
    # the paths' own noise makes their mean a little worse than standing still
    assert steps[0].no_better == ("f0",)


def test_a_trend_beats_persistence_and_the_constant_knows_it(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [0.01]), std=50.0, delta_mean=1.0)
    line = np.arange(60.0)[:, None]
    steps = evaluate_horizons(model, line, model.fields, generator=generator(), horizon=3, num_paths=400)
    for step in steps:
        assert step.error_persistence["f0"] == pytest.approx(step.step)
        assert step.error_constant["f0"] == pytest.approx(0.0, abs=1e-9)
        assert step.error["f0"] < 0.03
    assert steps[2].to_dict()["no_better"] == ["f0"]


def test_the_same_generator_gives_the_same_figures_whatever_the_chunk(constant_network, make_model, monkeypatch):
    model = make_model(constant_network([[0.0], [1.0]], [1.0]))
    rows = np.random.default_rng(0).standard_normal((30, 1))
    calls = []
    first = evaluate_horizons(
        model, rows, model.fields, generator=generator(), horizon=2, num_paths=7, progress=lambda *c: calls.append(c)
    )
    assert first == evaluate_horizons(model, rows, model.fields, generator=generator(), horizon=2, num_paths=7)
    assert calls == [(28, 28)]


def test_bad_input_is_refused(constant_network, make_model):
    model = make_model(constant_network([[0.0], [0.0]], [1.0]))
    with pytest.raises(ValueError, match="horizon and num_paths: expected at least 1, was 0 and 9"):
        evaluate_horizons(model, np.zeros((9, 1)), model.fields, generator=generator(), horizon=0, num_paths=9)
    with pytest.raises(ValueError, match=r"expected \[T, 1\], was \[9, 2\]"):
        evaluate_horizons(model, np.zeros((9, 2)), model.fields, generator=generator())
    for rows in (np.zeros((5, 1)), np.full((9, 1), np.nan)):
        with pytest.raises(DataError, match="expected at least 6 rows of finite numbers"):
            evaluate_horizons(model, rows, model.fields, generator=generator())
