"""The wheel holds every package, type marker and YAML, and its plain names belong to nobody else."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import provenance

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "benchmarks",
    "configs",
    "data",
    "envs",
    "evaluation",
    "export",
    "masking",
    "mbpo",
    "pipeline",
    "planner",
    "serving",
    "world_model",
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_code_hash_covers_every_package() -> None:
    assert set(provenance.PACKAGES) == PACKAGES


def test_every_package_is_inside_with_its_type_marker(wheel) -> None:
    names = set(wheel.namelist())
    expected = {f"{package}/{file}" for package in PACKAGES for file in ("__init__.py", "py.typed")}
    assert expected <= names


def test_the_wheel_holds_the_packages_and_nothing_else(wheel, pyproject) -> None:
    version = pyproject["project"]["version"]
    assert {name.split("/")[0] for name in wheel.namelist()} == PACKAGES | {f"detent-{version}.dist-info"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name or name.endswith((".pyc", ".ipynb"))]


def test_every_source_file_and_yaml_of_the_tree_is_inside(wheel) -> None:
    names = set(wheel.namelist())
    in_tree = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".css")
    }
    assert {"configs/default.yaml", "configs/smoke.yaml"} <= in_tree
    assert in_tree <= names


def test_the_licence_travels_with_the_wheel(wheel) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    text = wheel.read(licence).decode()
    assert "Apache License" in text
    assert "Copyright 2026 Detent maintainers" in text


def test_the_command_is_declared(wheel) -> None:
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "detent = pipeline.cli:main" in wheel.read(entry).decode()


def test_profiles_load_from_the_unpacked_wheel_outside_the_checkout(wheel, tmp_path) -> None:
    site = tmp_path / "site"
    wheel.extractall(site)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import configs; assert configs.__file__.startswith(sys.argv[1]), configs.__file__\n"
        "print([configs.load_config(name).seed for name in configs.list_profiles()])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(site)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0]\n", "")


def test_each_top_level_name_has_exactly_one_owner() -> None:
    owners = importlib.metadata.packages_distributions()
    foreign = {name: set(owners.get(name, [])) - {"detent"} for name in PACKAGES}
    assert not {name: who for name, who in foreign.items() if who}
    assert not PACKAGES & set(sys.stdlib_module_names)


def test_every_tool_is_told_of_the_same_packages(pyproject) -> None:
    tool = pyproject["tool"]
    lists = {
        "hatch": tool["hatch"]["build"]["targets"]["wheel"]["packages"],
        "isort": tool["ruff"]["lint"]["isort"]["known-first-party"],
        "mypy": tool["mypy"]["packages"],
        "import-linter": tool["importlinter"]["root_packages"],
    }
    assert {name: set(packages) for name, packages in lists.items()} == dict.fromkeys(lists, PACKAGES)


def test_version_is_the_newest_entry_of_the_changelog(pyproject) -> None:
    entries = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert entries, "no entry like `## [0.1.0] - 2026-11-20`"
    assert entries[0] == pyproject["project"]["version"]
    assert entries == sorted(entries, key=lambda text: tuple(map(int, text.split("."))), reverse=True)


def test_no_two_test_modules_have_one_name():
    # pytest imports them by name alone, and says so only where it collects both.
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
