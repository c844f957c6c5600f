from __future__ import annotations

import numpy as np
import pytest

from configs import load_config
from data import DataError
from data.features import LOOKBACK
from pipeline.inputs import load_inputs


def test_windows_are_in_order_and_purged_by_lookback_and_rollout() -> None:
    inputs = load_inputs(load_config("default"))
    split = inputs.split
    gap = LOOKBACK + inputs.config.mbpo.rollout_length
    assert split.validation.start - split.train.stop == gap
    assert split.test.start - split.validation.stop == gap
    assert split.test.stop == len(inputs.table)


def test_the_scaler_sees_the_training_window_only() -> None:
    config = load_config("default")
    inputs = load_inputs(config)
    quantiles = np.quantile(inputs.train.values, [0.01, 0.99], axis=0).astype(np.float32)
    features = len(inputs.table.names)
    np.testing.assert_allclose(inputs.scaler.centre[:features], quantiles.mean(axis=0), rtol=1e-5, atol=1e-8)
    assert inputs.scaler.names == inputs.dynamics.obs_names
    assert len(inputs.dynamics.obs_names) <= 64


def test_bars_per_year_that_the_timestamps_contradict_are_refused() -> None:
    with pytest.raises(DataError, match=r"bars_per_year: expected about 25\d .*, was 19656"):
        load_inputs(load_config("smoke", ["data.bars_per_year=19656"]))


def test_run_key_changes_with_seed_and_data_and_nothing_else() -> None:
    key = load_inputs(load_config("smoke")).run_key
    assert load_inputs(load_config("smoke")).run_key == key
    assert load_inputs(load_config("smoke", ["seed=1"])).run_key != key
    assert load_inputs(load_config("smoke", ["data.source.symbol=nasdaq"])).run_key != key
