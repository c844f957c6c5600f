"""Merging, overrides, YAML traps, and error lines that say field, expected and actual."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import ConfigError, load_config
from configs.schema import DetentConfig
from configs.yaml_reader import parse_yaml


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error_of(source: str | Path = "default", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_extends_a_profile(tmp_path) -> None:
    path = write(tmp_path / "mine.yaml", "extends: smoke\nseed: 7\nworld_model:\n  max_epochs: 2\n")
    config = load_config(str(path))
    assert (config.seed, config.world_model.max_epochs) == (7, 2)
    assert config.world_model.hidden == (32, 32)  # from smoke
    assert config.data.split.step_years == 1.5  # from default, by way of smoke


def test_a_file_without_extends_builds_upon_the_schema_alone(tmp_path) -> None:
    config = load_config(write(tmp_path / "bare.yaml", "seed: 3\n"))
    assert config == DetentConfig(seed=3)


def test_naming_one_field_of_the_mbpo_policy_keeps_its_other_special_defaults(tmp_path) -> None:
    path = write(tmp_path / "a.yaml", "mbpo:\n  ppo:\n    total_steps: 1000\n")
    ppo = load_config(path).mbpo.ppo
    assert (ppo.total_steps, ppo.num_envs, ppo.n_steps, ppo.batch_size) == (1000, 2048, 3, 3072)


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path) -> None:
    assert load_config(write(tmp_path / "a.yaml", "")) == DetentConfig()
    assert load_config(write(tmp_path / "b.yaml", "mbpo:\n  # ppo: {}\n")) == DetentConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E+4", 50_000.0),
        ("-1e3", -1000.0),
        ("1_0.5e2", 1050.0),
        (".5e1", 5.0),
        ("0.25", 0.25),
        ("600_000", 600_000),
        ("e5", "e5"),
        ("1e-3x", "1e-3x"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_exponents_without_a_dot_are_numbers_and_nothing_else_is(text: str, value: object) -> None:
    # Asked of the reader itself: pydantic would turn the text "1e-3" into a number and hide the difference.
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\ndata:\n  bars_per_year: 252\n  bars_per_year: 98280\n")
    message = error_of(path)
    assert "line 4" in message
    assert "'bars_per_year' is given twice" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [1\n", "expected YAML, was broken at line 2"),
        ("- seed\n", "expected a mapping at the top, was list"),
        ("seed: !!python/object:os.system {}\n", "expected YAML"),
        ("extends: 3\n", "extends: expected the name of a profile, was 3"),
        ("extends: nightly\n", "profile: expected one of default, smoke, suite, suite-smoke, was 'nightly'"),
        ("mbpo: 3\n", "mbpo: expected a section with fields below it, was 3"),
        ("data: {source: {path: 2024-13-45}}\n", "month must be in 1..12"),
    ],
)
def test_broken_files_name_the_problem(tmp_path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "a.yaml", text))


def test_a_circle_of_extends_is_refused(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    write(path, f"extends: {path}\n")
    assert "was a circle" in error_of(path)


def test_missing_directory_and_non_text_files_are_config_errors(tmp_path) -> None:
    assert "No such file" in error_of(tmp_path / "absent.yaml")
    assert "Is a directory" in error_of(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"seed: \xff\xfe")
    assert "expected UTF-8 text, was broken at byte 6" in error_of(binary)


def test_an_unknown_profile_suggests_the_nearest() -> None:
    assert (
        error_of("smok")
        == "profile: expected one of default, smoke, suite, suite-smoke, was 'smok'; did you mean 'smoke'?"
    )


# --- unknown keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sead: 1\n", "sead: expected a known key, was unknown; did you mean 'seed'?"),
        ("mbpo: {rolout_length: 3}\n", "did you mean 'mbpo.rollout_length'?"),
        ("mbpo: {ppo: {total_step: 3}}\n", "did you mean 'mbpo.ppo.total_steps'?"),
        ("num_members: 3\n", "num_members: expected a known key, was unknown; did you mean 'world_model.num_members'?"),
        ("num_member: 3\n", "num_member: expected a known key, was unknown; did you mean 'world_model.num_members'?"),
        ("mbpo: {gamma: 0.9}\n", "did you mean 'mbpo.ppo.gamma'?"),
        ("ppo: {gamma: 0.9}\n", "did you mean 'mbpo.ppo'?"),
        ("env: {zzz: 1}\n", "env.zzz: expected a known key, was unknown; known here: episode_bars"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_likeliest_intention(tmp_path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "a.yaml", text))


# --- values -----------------------------------------------------------------------------------------------


def test_every_problem_is_one_line_with_field_expected_and_actual(tmp_path) -> None:
    path = write(
        tmp_path / "a.yaml",
        "limits: {max_exposure: -1}\nworld_model: {hidden: [3, x]}\ngates: {min_sharpe: .nan}\nsource: 1\n",
    )
    assert error_of(path).splitlines() == [
        "limits.max_exposure: expected greater than 0, was -1",
        "world_model.hidden[1]: expected a valid integer, unable to parse string as an integer, was 'x'",
        "gates.min_sharpe: expected a finite number, was nan",
        "source: expected a known key, was unknown; did you mean 'data.source'?",
    ]


def test_contradictions_between_fields_keep_the_schemas_own_words() -> None:
    assert error_of("default", "world_model.num_elites=9") == (
        "world_model.num_elites: expected at most num_members=5, was 9"
    )
    assert error_of("default", "data.source.kind=file") == (
        "data.source.path: expected a file because data.source.kind is 'file', was empty"
    )


# --- overrides --------------------------------------------------------------------------------------------


def test_overrides_are_parsed_as_yaml_and_the_last_one_wins() -> None:
    config = load_config(
        "default",
        [
            "world_model.learning_rate=1e-4",
            "world_model.hidden=[8, 8]",
            "data.split.train_years=null",
            "tracking.uri=http://host:5000/a=b",
            "limits.paper=true",
            "seed=1",
            "seed=2",
        ],
    )
    assert config.world_model.learning_rate == 1e-4
    assert config.world_model.hidden == (8, 8)
    assert config.data.split.train_years is None
    assert config.tracking.uri == "http://host:5000/a=b"
    assert config.limits.paper is True
    assert config.seed == 2


def test_an_override_does_not_leak_into_the_next_load() -> None:
    load_config("default", ["limits.max_exposure=0.5"])
    assert load_config("default").limits.max_exposure == 1.25


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: expected section.field=value, was 'seed'"),
        ("=3", "expected section.field=value"),
        ("mbpo=3", "--set mbpo: expected a single value, was a section; set e.g. mbpo.rollout_length=..."),
        ("mbpo.ppo={}", "--set mbpo.ppo: expected a single value, was a section"),
        ("mbpo.rolout_length=2", "did you mean 'mbpo.rollout_length'?"),
        ("limit.paper=true", "--set limit: expected a known key, was unknown; did you mean 'limits'?"),
        ("seed.x=1", "--set seed.x: expected nothing below seed, which is a plain value"),
        ("seed.x.y=1", "--set seed.x: expected nothing below seed, which is a plain value"),
        ("extends=smoke", "--set extends: expected a known key, was unknown"),
        ("seed=[1", "--set seed: expected YAML, was broken at line 1"),
        ("seed=-1", "seed: expected greater than or equal to 0, was -1"),
        ("data..kind=file", "expected a known key, was unknown"),
        ("limits.extra_rules=calm_entries", "limits.extra_rules: expected a list, was 'calm_entries'"),
        ("world_model.hidden=64", "world_model.hidden: expected a list, was 64"),
    ],
)
def test_bad_overrides_say_what_to_write(override: str, expected: str) -> None:
    assert expected in error_of("default", override)


def test_extra_rules_are_left_to_those_who_know_the_rules() -> None:
    rules = load_config(
        "default", ["limits.extra_rules=[calm, {wild: {limit: 1e-3}}, {flat: 1.0}, 3]"]
    ).limits.extra_rules
    assert rules == ("calm", {"wild": {"limit": 1e-3}}, {"flat": 1.0}, 3)
    outline = DetentConfig.model_json_schema()["$defs"]["LimitsConfig"]["properties"]["extra_rules"]["items"]
    assert [choice["type"] for choice in outline["anyOf"]] == ["string", "object"]


def test_an_override_below_a_broken_section_reports_the_section(tmp_path) -> None:
    path = write(tmp_path / "a.yaml", "mbpo: 3\n")
    assert "mbpo: expected a section" in error_of(path, "mbpo.ppo.gamma=0.9")
