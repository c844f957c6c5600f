"""The public surface of `planner` and what it may load."""

from __future__ import annotations

import subprocess
import sys

import planner


def test_exported_names_exist() -> None:
    assert all(hasattr(planner, name) for name in planner.__all__)


def test_the_planner_loads_neither_the_model_nor_the_environment() -> None:
    code = (
        "import sys, planner\n"
        "others = {'envs', 'world_model', 'mbpo', 'configs', 'gymnasium', 'stable_baselines3', 'mlflow'}\n"
        "assert not others & set(sys.modules), others & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
