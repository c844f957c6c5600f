"""`detent audit`: is a ledger whole, do its decisions come out again, what does one say, how did a challenger do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs import ConfigError
from data import DataError
from pipeline.cli_output import RuleModules, emit, import_rules, positive_number, reported, whole_number

if TYPE_CHECKING:
    from serving.bundle import Bundle
    from serving.ledger.audit import Replay
    from serving.ledger.base import Ledger
    from serving.records import Entry

audit_app = typer.Typer(help="Check, replay and read a ledger of decisions.", no_args_is_help=True)

SHOWN = 20
"""Differences that are printed; JSON has them all."""

LedgerArgument = Annotated[
    str,
    typer.Argument(
        metavar="LEDGER", help="File, or postgresql://user@host/database (password in PGPASSWORD or a password file)."
    ),
]
Account = Annotated[str | None, typer.Option(help="Whose ledger; the only one there is if left out.")]
Bundles = Annotated[
    list[Path] | None, typer.Option("--bundle", "-b", help="Bundle directory that decided; may be repeated.")
]
First = Annotated[int, typer.Option(help="First entry.", **whole_number(at_least=1))]
Last = Annotated[int | None, typer.Option(help="Last entry; the newest if left out.", **whole_number(at_least=1))]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@audit_app.command("verify")
def audit_verify(
    where: LedgerArgument,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Hash of a former head, noted down elsewhere: shows a cut or rewritten end."),
    ] = None,
    account: Account = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the chain of hashes from the first entry to the last. Exit code 1 if it is broken.

    The hash it prints is worth noting down elsewhere: with it a later check also sees entries cut off at the end.
    """
    with reported(as_json), _reading(where, account) as ledger:
        from pipeline.progress import Reporter
        from serving.ledger.audit import verify

        reporter = Reporter(quiet=quiet)
        try:
            with reporter.stage("verify") as progress:
                found = verify(ledger, _digest(head), progress=progress)
        finally:
            reporter.close()
        if as_json:
            emit({"ok": found.ok, "account": ledger.account, **vars(found)})
        else:
            typer.echo(f"{found.entries} entries of account {ledger.account!r} follow from each other")
            typer.echo(f"head {found.head_hash}")
            if not found.ok:
                typer.echo(f"BROKEN: {found.problem}")
        if not found.ok:
            raise typer.Exit(1)


@audit_app.command("replay")
def audit_replay(
    where: LedgerArgument,
    bundles: Bundles = None,
    rule_modules: RuleModules = None,
    first: First = 1,
    last: Last = None,
    account: Account = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make each decision again from its state row and compare bit for bit.

    Exit code 1 if one differs, or if the bundle of one is not among those given.
    """
    with reported(as_json), _reading(where, account) as ledger:
        opened = _opened(bundles, rule_modules)
        from pipeline.progress import Reporter
        from serving.ledger.audit import replay

        reporter = Reporter(quiet=quiet)
        try:
            with reporter.stage("replay") as progress:
                found = replay(ledger, opened.get, first=first, last=last, progress=progress)
        finally:
            reporter.close()
        if as_json:
            emit(_as_dict(found))
        else:
            _print_replay(found)
        if not found.ok:
            raise typer.Exit(1)


@audit_app.command("show")
def audit_show(
    where: LedgerArgument,
    which: Annotated[
        str, typer.Argument(metavar="[SEQ|EVENT|last]", help="Number of an entry, name of an event, or the newest.")
    ] = "last",
    bundles: Bundles = None,
    rule_modules: RuleModules = None,
    account: Account = None,
    as_json: Json = False,
) -> None:
    """Print an entry in words: what was known, what was allowed and why not, what was done.

    Without the bundle that decided, columns and actions have numbers, and rules are named but not quoted.
    """
    with reported(as_json), _reading(where, account) as ledger:
        opened = _opened(bundles, rule_modules)
        entry = _find(ledger, which)
        if as_json:
            emit({"seq": entry.seq, "hash": entry.hash, "record": json.loads(entry.body)})
            return
        from serving.ledger.words import explain
        from serving.records import DecisionRecord

        record = entry.record
        bundle = opened.get(record.bundle_hash) if isinstance(record, DecisionRecord) else None
        if opened and bundle is None and isinstance(record, DecisionRecord):
            raise DataError(
                f"entry {entry.seq}: bundle: expected {record.bundle_hash}, was {', '.join(opened)}: leave --bundle "
                "out, or give the one that decided"
            )
        typer.echo(explain(entry, bundle))


@audit_app.command("shadow")
def audit_shadow(
    where: LedgerArgument,
    bundles: Bundles = None,
    rule_modules: RuleModules = None,
    cost_bps: Annotated[
        float, typer.Option(metavar="NUMBER", help="Cost of a traded notional, basis points of it.")
    ] = 3.0,
    bar_seconds: Annotated[
        float, typer.Option(help="Longest time between two bars, as for `detent serve`.", **positive_number())
    ] = 4 * 86_400.0,
    first: First = 1,
    last: Last = None,
    account: Account = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the decisions of each challenger with those that were executed, on the same state rows.

    The P&L is hypothetical: one bar at a time, from the position that was really held, between the opens at which this
    decision and the next are executed. It needs the bundles that were in force, which name the columns of the rows.
    """
    with reported(as_json), _reading(where, account) as ledger:
        if not 0.0 <= cost_bps < math.inf:
            raise ConfigError(f"--cost-bps: expected a finite number of at least 0, was {cost_bps}")
        opened = _opened(bundles, rule_modules)
        from pipeline.cli_audit_shadow import print_report
        from pipeline.progress import Reporter
        from serving.ledger.shadow import shadow_report

        columns = {name: bundle.manifest.state_names for name, bundle in opened.items()}
        settings = {"cost_rate": cost_bps * 1e-4, "bar_seconds": bar_seconds}
        reporter = Reporter(quiet=quiet)
        try:
            with reporter.stage("shadow") as progress:
                found = shadow_report(ledger, columns, **settings, first=first, last=last, progress=progress)
        finally:
            reporter.close()
        if as_json:
            trials = [trial.to_dict() for trial in found.trials]
            emit({"account": ledger.account, **settings, **vars(found), "trials": trials})
        else:
            print_report(found, cost_bps, opened)


# A path that is wrong is a setting to correct, a server that is away may come back, all else is in the data.
@contextmanager
def _reading(where: str, account: str | None) -> Iterator[Ledger]:
    from serving.errors import LedgerError
    from serving.ledger.open import POSTGRES_SCHEMES, open_ledger

    remote = where.startswith(POSTGRES_SCHEMES)
    if not remote and not Path(where).is_file():
        from pipeline.mlflow_access import without_password

        raise ConfigError(f"LEDGER: expected a file or postgresql://..., was {without_password(where)}")
    try:
        with closing(open_ledger(where, account, read_only=True)) as ledger:
            yield ledger
    except LedgerError as error:
        if remote and error.__cause__ is not None:
            raise ConnectionError(str(error)) from error
        raise DataError(str(error)) from error


def _opened(bundles: list[Path] | None, rule_modules: list[str] | None) -> dict[str, Bundle]:
    import_rules(rule_modules)
    if not bundles:
        return {}
    from serving.bundle import open_bundle

    return {bundle.hash: bundle for bundle in map(open_bundle, bundles)}


def _digest(text: str | None) -> str | None:
    if text is None:
        return None
    digest = text.strip().lower()
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"--head: expected 64 hex digits, was {text!r}")
    return digest


def _find(ledger: Ledger, which: str) -> Entry:
    found = None
    if which == "last":
        found = next(ledger.read(-1), None)
    elif which.isdecimal():
        found = next(ledger.read(int(which), int(which)), None)
    found = found or ledger.find(which)
    if found is None:
        raise ConfigError(f"expected 'last', the number of an entry or the name of an event, was {which!r}, not there")
    return found


def _as_dict(found: Replay) -> dict[str, object]:
    return {
        "ok": found.ok,
        "decisions": found.decisions,
        "differences": [vars(one) for one in found.differences],
        "missing_bundles": found.missing_bundles,
        "stateless": [{"seq": seq, "reason": reason} for seq, reason in found.stateless],
        "controls": found.controls,
    }


def _print_replay(found: Replay) -> None:
    unequal = len({one.seq for one in found.differences})
    typer.echo(
        f"{found.decisions} decisions made again, {unequal} of them differ; {found.controls} commands passed over"
    )
    if found.stateless:
        numbers = _numbers([seq for seq, _ in found.stateless])
        typer.echo(f"{len(found.stateless)} without a state row, refused before there was one: entries {numbers}")
    for name, seqs in found.missing_bundles.items():
        typer.echo(f"bundle {name} is needed and not given: {len(seqs)} decisions, entries {_numbers(seqs)}")
    for one in found.differences[:SHOWN]:
        typer.echo(f"DIFFERS: {one}")
    if len(found.differences) > SHOWN:
        typer.echo(f"and {len(found.differences) - SHOWN} more; --json has them all")


def _numbers(seqs: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, seqs[:SHOWN])) + (", ..." if len(seqs) > SHOWN else "")
