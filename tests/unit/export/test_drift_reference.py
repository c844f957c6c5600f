"""What of a run becomes the drift reference of its bundle."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundle_parts import FIELDS, make_market_model, usual_rows

from data import DataError, canonical_json
from pipeline.bundling import drift_reference
from world_model.marginals import next_row_nll

NAMES = tuple(field.name for field in FIELDS)


class Rows:
    """A window of a feature table."""

    def __init__(self, values):
        self.values = values.astype(np.float64)

    def __len__(self):
        return len(self.values)


def inputs(train, validation):
    return SimpleNamespace(
        table=SimpleNamespace(names=NAMES),
        train=Rows(usual_rows(train)),
        validation=Rows(usual_rows(validation, seed=1)),
    )


def test_reference_is_that_of_training_rows_and_of_the_likelihood_of_validation_rows():
    model, given = make_market_model(), inputs(300, 200)
    reference = drift_reference(given, model)
    assert (reference.names, reference.window) == (NAMES, 60)
    assert reference.counts.sum(axis=1).tolist() == [300] * 4
    rows = torch.from_numpy(usual_rows(200, seed=1))
    expected = [float(next_row_nll(model, *pair).mean()) for pair in zip(rows[:-1, None], rows[1:, None], strict=True)]
    assert reference.nll.mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert reference.nll.quantiles[[0, -1]] == pytest.approx([min(expected), max(expected)], rel=1e-5)


def test_reference_is_the_same_whenever_it_is_made():
    first, second = (canonical_json(drift_reference(inputs(300, 200), make_market_model()).to_dict()) for _ in range(2))
    assert first == second
    assert json.loads(first)["nll"] is not None


def test_too_few_rows_are_done_without_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert drift_reference(inputs(239, 200), make_market_model()) is None
    assert "expected at least 240 training rows, was 239" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert drift_reference(inputs(240, 180), make_market_model()).nll is None
    assert "expected at least 181 validation rows, was 180" in caplog.text
    caplog.clear()
    assert drift_reference(inputs(240, 181), make_market_model()).nll is not None
    assert caplog.text == ""


def test_a_likelihood_that_is_not_finite_is_refused():
    given = inputs(300, 200)
    given.validation.values[7, 0] = np.nan
    with pytest.raises(DataError, match="nll: expected finite numbers, 2 are not"):
        drift_reference(given, make_market_model())
