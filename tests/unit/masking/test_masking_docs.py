"""The examples of docs/masks.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from masking_worlds import unregistering

from masking.declare import parse_rule_set

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "masks.md").read_text(encoding="utf-8")


def run(block: str, names: dict[str, object]) -> None:
    # Compiled by itself: this file's annotations are text, a reader's are not.
    exec(compile(block, "masks.md", "exec", dont_inherit=True), names)  # noqa: S102 - our own documentation


def test_the_python_examples_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    with unregistering():
        for block in blocks:
            run(block, names)
    assert len(blocks) == 10
    assert "is denied: drawdown 9 % reached the soft limit 8 %" in capsys.readouterr().out


def test_the_rule_set_of_the_page_is_a_rule_set() -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    with unregistering():
        run(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], {})  # registers the page's rule
        rule_set = parse_rule_set(re.sub(r"modules:.*\n", "", text))
    assert [type(rule).name for rule in rule_set.rules][-1] == "calm_entries"
