"""Which earlier world model a fit begins with, and that a run names it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs import load_config, resolved_yaml
from pipeline.inputs import RunInputs, load_inputs
from pipeline.last_night import with_warm_start
from pipeline.training import Visited, world_model_stage
from world_model import MarketModel

TINY = ("world_model.max_epochs=2", "world_model.hidden=[8]")


@pytest.fixture(scope="module")
def inputs() -> RunInputs:
    return load_inputs(load_config("smoke", [*TINY, "world_model.warm_start=true"]))


@pytest.fixture(scope="module")
def trained(inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    world_model_stage(inputs, visited(inputs), run_dir)
    return run_dir / "world_model"


def visited(inputs: RunInputs) -> Visited:
    rows = inputs.train.values
    return Visited(rows, rows[:1, 0], rows[:1])


def leave(root: Path, name: str, inputs: RunInputs, model: Path, days: int) -> Path:
    """A finished run whose bars end so many days before ours."""
    folder = root / "runs" / name
    last = (
        inputs.table.timestamps[-1] - days * (inputs.table.timestamps[-1] - inputs.table.timestamps[-2])
    ).isoformat()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(inputs.config))
    (folder / "report.json").write_text(json.dumps({"windows": {"test": {"last": last}}}))
    shutil.copytree(model, folder / "world_model")
    return folder


def test_the_newest_run_over_older_bars_is_taken(inputs: RunInputs, trained: Path, tmp_path: Path) -> None:
    for name, days in {"old": 5, "last": 1, "tonight": 0, "future": -2}.items():
        leave(tmp_path, name, inputs, trained, days)
    found = with_warm_start(inputs, tmp_path)
    assert found.warm_start is not None
    assert found.warm_start.folder == tmp_path / "runs" / "last" / "world_model"
    assert found.run_key != inputs.run_key
    assert found.run_key == with_warm_start(inputs, tmp_path).run_key


def test_nothing_is_taken_where_it_is_not_asked_for_or_does_not_fit(
    inputs: RunInputs, trained: Path, tmp_path: Path
) -> None:
    assert with_warm_start(inputs, tmp_path).warm_start is None
    leave(tmp_path, "last", inputs, trained, 1)
    off = load_config("smoke", TINY)
    assert with_warm_start(replace(inputs, config=off), tmp_path).warm_start is None
    for setting in ("world_model.hidden=[9]", "world_model.num_members=7"):
        other = load_config("smoke", [*TINY, "world_model.warm_start=true", setting])
        assert with_warm_start(replace(inputs, config=other), tmp_path).warm_start is None


@pytest.mark.parametrize(
    "file", ["report.json", "config.yaml", "world_model/model.json", "world_model/weights.safetensors"]
)
def test_a_damaged_run_is_passed_over(inputs: RunInputs, trained: Path, tmp_path: Path, file: str) -> None:
    leave(tmp_path, "old", inputs, trained, 5)
    (leave(tmp_path, "last", inputs, trained, 1) / file).write_text("{")
    found = with_warm_start(inputs, tmp_path).warm_start
    assert found is not None
    assert found.folder == tmp_path / "runs" / "old" / "world_model"


def test_another_symbol_is_passed_over(inputs: RunInputs, trained: Path, tmp_path: Path) -> None:
    folder = leave(tmp_path, "last", inputs, trained, 1)
    symbol = inputs.config.data.source.symbol
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(symbol, "other"))
    assert with_warm_start(inputs, tmp_path).warm_start is None


def test_the_fit_begins_with_its_weights(inputs: RunInputs, trained: Path, tmp_path: Path) -> None:
    leave(tmp_path, "last", inputs, trained, 1)
    still = load_config("smoke", [*TINY, "world_model.warm_start=true", "world_model.learning_rate=1e-12"])
    warm = with_warm_start(replace(inputs, config=still), tmp_path)
    model = world_model_stage(warm, visited(inputs), tmp_path / "run").model
    earlier = MarketModel.load(trained)
    assert model.network.weights[1].allclose(earlier.network.weights[1], atol=1e-6)
    cold = world_model_stage(replace(warm, warm_start=None), visited(inputs), tmp_path / "cold").model
    assert not cold.network.weights[1].allclose(earlier.network.weights[1], atol=1e-4)
