"""The shipped profiles load, mean what their comments say, and the schema documents every field."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

import configs
from configs import DetentConfig, config_hash, flat_values, json_schema, list_profiles, load_config, resolved_yaml
from configs.fields import field_paths, section_type
from data.bars import open_source
from data.features import LOOKBACK
from data.splits import walk_forward_splits


def models(model: type[BaseModel] = DetentConfig) -> Iterator[type[BaseModel]]:
    yield model
    for name in model.model_fields:
        inner = section_type(model, name)
        if inner is not None:
            yield from models(inner)


def test_nightly_runs_and_suites_ship_with_the_package() -> None:
    assert list_profiles() == ("default", "smoke", "suite", "suite-smoke")


@pytest.mark.parametrize("profile", list_profiles())
def test_every_shipped_profile_loads(profile: str) -> None:
    assert isinstance(load_config(profile), DetentConfig)


def test_default_differs_from_the_schema_only_in_the_split() -> None:
    loaded, schema = load_config("default").model_dump(), DetentConfig().model_dump()
    assert loaded["data"].pop("split") != schema["data"].pop("split")
    assert loaded == schema


@pytest.fixture(scope="module")
def bundled_rows() -> int:
    bars = open_source(DetentConfig().data.source).load()
    return len(bars) - LOOKBACK + 1


@pytest.mark.parametrize("profile", list_profiles())
def test_every_shipped_split_fits_the_bundled_bars(profile: str, bundled_rows: int) -> None:
    config = load_config(profile)
    purge = LOOKBACK + config.mbpo.rollout_length
    assert walk_forward_splits(bundled_rows, config.data.split, config.data.bars_per_year, purge)


def test_default_trains_on_fifteen_years(bundled_rows: int) -> None:
    config = load_config("default")
    newest = walk_forward_splits(bundled_rows, config.data.split, 252, LOOKBACK + 3)[-1]
    assert round((newest.train.stop - newest.train.start) / 252) == 15


def test_smoke_builds_upon_default_and_keeps_to_the_registry_of_its_workdir() -> None:
    default, smoke = load_config("default"), load_config("smoke")
    assert smoke.data.split.step_years == default.data.split.step_years == 1.5
    assert smoke.tracking.uri is None
    assert smoke.mbpo.ppo.total_steps == 12_288


def test_smoke_rollouts_divide_into_whole_minibatches() -> None:
    config = load_config("smoke")
    assert (config.mbpo.ppo.num_envs * config.mbpo.rollout_length) % config.mbpo.ppo.batch_size == 0
    assert (config.model_free.num_envs * config.model_free.n_steps) % config.model_free.batch_size == 0


@pytest.mark.parametrize("model", list(models()), ids=lambda model: model.__name__)
def test_every_field_of_the_schema_is_documented(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        documented = field.description or section_type(model, name)
        assert documented, f"{model.__name__}.{name} has no docstring"
    assert model.__doc__


def test_json_schema_is_json_and_carries_descriptions_and_bounds() -> None:
    schema = json.loads(json.dumps(json_schema()))
    exposure = schema["$defs"]["LimitsConfig"]["properties"]["max_exposure"]
    assert exposure["exclusiveMinimum"] == 0.0
    assert exposure["description"] == "Largest |position| in multiples of equity."
    assert schema["additionalProperties"] is False


def test_a_loaded_config_is_frozen_at_every_depth() -> None:
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.mbpo.ppo.gamma = 0.5  # type: ignore[misc]


def test_resolved_yaml_names_every_field_and_loads_back_equal(tmp_path) -> None:
    config = load_config("smoke", ["account.slippage_bps=1e-5", "data.source.symbol=nasdaq"])
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(config))
    again = load_config(path)
    assert again == config
    assert config_hash(again) == config_hash(config)
    for field in field_paths():
        assert f"{field.rsplit('.', 1)[-1]}:" in path.read_text()


def test_config_hash_ignores_spelling_and_sees_every_value() -> None:
    base = config_hash(load_config())
    assert len(base) == 64
    assert config_hash(load_config("default", ["world_model.learning_rate=1e-3"])) == base
    assert config_hash(load_config("default", ["world_model.learning_rate=0.0010"])) == base
    assert config_hash(load_config("default", ["world_model.learning_rate=2e-3"])) != base


def test_flat_values_are_all_settings_under_their_dotted_paths() -> None:
    flat = flat_values(load_config("smoke"))
    assert list(flat) == list(field_paths())
    assert flat["mbpo.ppo.total_steps"] == 12_288
    assert flat["model_free.n_steps"] == 64
    assert flat["tracking.uri"] is None


def test_exported_names_are_sorted_and_exist() -> None:
    assert configs.__all__ == sorted(configs.__all__)
    assert all(hasattr(configs, name) for name in configs.__all__)
