from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from smoke_runs import SmokeRun

from configs import load_config
from masking import RULES
from pipeline.inputs import load_inputs

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str, names: dict[str, Any]) -> None:
    # Compiled by itself: this file's annotations are text, a reader's are not.
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)  # noqa: S102 - our own README


def test_the_decision_example_runs_on_a_real_bundle(first_run: SmokeRun) -> None:
    names: dict[str, Any] = {}
    run(BLOCKS[0].replace("var/runs/RUN/bundle", first_run.result["bundle"]), names)
    decision = names["decision"]
    assert decision.action_masks[decision.action]


def test_the_rule_example_forbids_entries_in_a_wild_market() -> None:
    inputs = load_inputs(load_config("smoke"))
    names: dict[str, Any] = {"dynamics": inputs.dynamics}
    try:
        run(BLOCKS[1], names)
        state = np.zeros((2, len(inputs.dynamics.state_names)), np.float32)
        state[:, inputs.dynamics.state_names.index("volatility_5")] = [0.1, 0.9]
        masks = names["dynamics"].action_masks(state)
        assert masks[:, 3].tolist() == [True, False]
        assert inputs.dynamics.action_masks(state)[:, 3].tolist() == [True, True]
    finally:
        RULES.pop("calm_entries", None)


def test_nothing_is_left_to_fill_in() -> None:
    assert len(BLOCKS) == 2
    assert "@@" not in README
