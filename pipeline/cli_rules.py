"""`detent rules`: which rules there are, and whether a rule set of one's own holds everywhere."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from masking import RULES, RuleError
from masking.declare import dump_rule_set, load_rule_set
from pipeline.cli_output import RuleModules, import_rules, reported, stdout

rules_app = typer.Typer(help="List and check mask rules.", no_args_is_help=True)

RuleFile = Annotated[Path, typer.Argument(help="Rule set as YAML; see docs/masks.md.")]


@rules_app.command("list")
def rules_list(
    rule_modules: RuleModules = None,
    columns: Annotated[
        bool, typer.Option("--columns", help="List the state columns that rules may read, not the rules.")
    ] = False,
) -> None:
    """List every rule with its parameters and defaults."""
    with reported(as_json=False):
        import_rules(rule_modules)
        if columns:
            _show_columns()
            return
        table = Table("rule", "parameters", "what it allows")
        for name, rule in sorted(RULES.items()):
            parameters = [
                field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default}"
                for field in dataclasses.fields(rule)
                if field.init
            ]
            # Text: what a rule's author wrote is no markup.
            table.add_row(Text(name), Text("\n".join(parameters)), Text(_summary(rule)))
        stdout.print(table)


@rules_app.command("check")
def rules_check(path: RuleFile, rule_modules: RuleModules = None) -> None:
    """Check a rule set: every rule pure, closed to NaN, and equal in NumPy, torch and ONNX. Exit code 78 if not."""
    with reported(as_json=False):
        import_rules(rule_modules)
        rule_set = load_rule_set(path)
        if not rule_set.rules:
            raise RuleError(f"{path}: rules: expected at least one rule, was none, which allows everything")
        from masking.conformance import check_rule_set

        check_rule_set(rule_set)
        typer.echo(dump_rule_set(rule_set), nl=False)
        typer.echo(f"# {len(rule_set.rules)} rules conform; hash {rule_set.hash}")


def _summary(rule: type[Any]) -> str:
    text = inspect.getdoc(rule) or ""
    # A dataclass without a docstring gets its signature as one.
    return "" if text.startswith(f"{rule.__name__}(") else text.split("\n\n")[0].replace("\n", " ")


def _show_columns() -> None:
    from data import FEATURE_FIELDS
    from envs.dynamics import ACCOUNT_FIELDS, AGE_FIELD, UNCERTAINTY_FIELD

    table = Table("column", "unit", "min", "max", "what it is")
    table.caption = "Beside its columns every rule reads target_position, the position that each action leads to."
    for field in (*FEATURE_FIELDS, *ACCOUNT_FIELDS, UNCERTAINTY_FIELD, AGE_FIELD):
        bounds = [f"{bound:g}" if math.isfinite(bound) else "-" for bound in (field.low, field.high)]
        table.add_row(field.name, field.unit, *bounds, field.description)
    stdout.print(table)
