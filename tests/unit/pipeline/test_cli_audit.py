"""`detent audit`: what it prints, and the exit code it ends in."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from audit_parts import STEPS, find, is_decided, live_through, put, rewrite, rows
from services import RealPostgres
from typer.testing import CliRunner, Result

from pipeline.cli_audit import audit_app
from serving import Bundle
from serving.ledger.postgres import PostgresLedger
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, DecisionRecord

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Path:
    path = tmp_path_factory.mktemp("lived") / "ledger.db"
    live_through(path, bundle, bundle)
    return path


@pytest.fixture
def path(lived: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(lived, tmp_path / "ledger.db"))


def audit(*arguments: str | Path) -> Result:
    return RUNNER.invoke(audit_app, [str(argument) for argument in arguments])


def audit_json(*arguments: str | Path) -> tuple[int, dict]:
    result = audit(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def test_a_whole_ledger_passes_and_its_head_is_printed(path: Path) -> None:
    entries = rows(path)
    result = audit("verify", path)
    assert result.exit_code == 0, result.output
    assert f"{len(entries)} entries of account 'default' follow from each other" in result.stdout
    assert f"head {entries[-1][2]}" in result.stdout
    assert audit("verify", path, "--head", entries[5][2].upper(), "--quiet").exit_code == 0
    code, found = audit_json("verify", path)
    assert (code, found["ok"], found["entries"], found["problem"]) == (0, True, len(entries), "")


def test_a_broken_chain_and_a_cut_end_exit_with_1(path: Path) -> None:
    entries = rows(path)
    put(path, entries[:-1])
    assert audit("verify", path, "--head", entries[-1][2]).exit_code == 1
    put(path, [*entries[:7], *entries[8:]])
    result = audit("verify", path)
    assert result.exit_code == 1
    assert "BROKEN: entry 8 is missing" in result.stdout
    code, found = audit_json("verify", path)
    assert (code, found["ok"], found["broken_seq"]) == (1, False, 8)


def test_a_replay_counts_what_came_out_again(path: Path, bundle_path: Path) -> None:
    result = audit("replay", path, "--bundle", bundle_path)
    assert result.exit_code == 0, result.output
    code, found = audit_json("replay", path, "--bundle", bundle_path)
    assert (code, found["ok"], found["differences"]) == (0, True, [])
    assert f"{found['decisions']} decisions made again, 0 of them differ" in result.stdout
    assert found["decisions"] > STEPS * 0.8
    assert f"{len(found['stateless'])} without a state row" in result.stdout
    assert audit_json("replay", path, "-b", bundle_path, "--first", "2", "--last", "3")[1]["decisions"] == 2


def test_a_decision_that_differs_and_a_missing_bundle_exit_with_1(
    path: Path, bundle_path: Path, bundle: Bundle
) -> None:
    result = audit("replay", path)
    assert result.exit_code == 1
    assert f"bundle {bundle.hash} is needed and not given" in result.stdout
    seq = rewrite(path, lambda record: is_decided(record) and record.executed > 1, executed=1)
    assert audit("verify", path).exit_code == 0
    result = audit("replay", path, "--bundle", bundle_path)
    assert result.exit_code == 1
    assert f"DIFFERS: entry {seq}, event" in result.stdout
    code, found = audit_json("replay", path, "--bundle", bundle_path)
    assert (code, [one["seq"] for one in found["differences"]]) == (1, [seq])


def test_an_entry_is_shown_by_number_by_event_and_as_the_last(path: Path, bundle_path: Path, bundle: Bundle) -> None:
    by_event = audit("show", path, "bar-4", "--bundle", bundle_path)
    assert by_event.exit_code == 0, by_event.output
    assert "live decision on event 'bar-4'" in by_event.stdout
    assert "momentum" in by_event.stdout
    seq = find(path, lambda record: isinstance(record, DecisionRecord) and record.event_id == "bar-4")
    assert audit("show", path, str(seq), "--bundle", bundle_path).stdout == by_event.stdout
    assert f"event 'bar-{STEPS - 1}'" in audit("show", path).stdout
    assert "column 3" in audit("show", path).stdout
    kill = find(path, lambda record: isinstance(record, ControlRecord) and record.command == "kill")
    assert "command kill by Ada" in audit("show", path, str(kill), "--bundle", bundle_path).stdout
    code, found = audit_json("show", path, str(seq))
    assert (code, found["seq"], found["record"]["event_id"]) == (0, seq, "bar-4")


def test_an_event_may_be_named_like_a_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as ledger:
        ledger.append(b"{}", event_id="17")
    assert audit_json("show", path, "17")[1]["seq"] == 1


def test_a_challenger_is_compared_in_words_and_numbers(path: Path, bundle_path: Path, bundle: Bundle) -> None:
    result = audit("shadow", path, "--bundle", bundle_path, "--quiet")
    assert result.exit_code == 0, result.output
    code, found = audit_json("shadow", path, "--bundle", bundle_path, "--quiet")
    (trial,) = found["trials"]
    compared = trial["agreement"]["compared"]
    assert (code, found["account"], found["cost_rate"]) == (0, "default", pytest.approx(3e-4))
    # The challenger was the bundle itself, for ten steps, some of which were refused.
    assert (trial["challenger"], trial["bundles"]) == (bundle.hash, {bundle.hash: compared})
    assert 5 < trial["agreement"]["equal"] == compared < 10
    assert trial["agreement"]["interval"][1] == 1.0
    assert trial["difference"]["bars"] + sum(trial["left_out"].values()) == compared
    assert trial["difference"] == {
        "bars": trial["live"]["pnl"]["bars"],
        "total": 0.0,
        "mean": 0.0,
        "standard_error": 0.0,
    }
    assert trial["difference"]["bars"] > 0
    said = " ".join(result.stdout.split())
    for words in (
        f"challenger {bundle.hash} beside {bundle.hash}: {compared} decisions",
        f"equal actions {compared} of {compared}: 100.0 %, 95 % interval",
        "live shadow decisions 0 hold 0 hold",
        f"trading state ACTIVE {compared} kill switch latched never",
        "latency, us graphs p50 p99 total p50 p99 live",
        "P&L, basis points of equity, after 3 bps per traded notional",
        "shadow - live",
        "left out:",
        "not where the challenger's own positions would have led",
    ):
        assert words in said


def test_without_the_bundle_a_challenger_has_no_pnl(path: Path) -> None:
    result = audit("shadow", path)
    assert result.exit_code == 0, result.output
    assert "the bundle that decided is not given" in result.stdout
    assert "equal actions" in result.stdout
    trial = audit_json("shadow", path)[1]["trials"][0]
    assert trial["difference"] == {"bars": 0, "total": 0.0, "mean": None, "standard_error": None}


def test_costs_and_the_stretch_of_a_comparison(path: Path, bundle_path: Path) -> None:
    free, dear = (
        audit_json("shadow", path, "-b", bundle_path, "--cost-bps", cost)[1]["trials"][0] for cost in ("0", "100")
    )
    assert free["live"]["pnl"]["total"] > dear["live"]["pnl"]["total"]
    assert audit("shadow", path, "--last", "3").stdout == "no challenger beside 2 live decisions\n"
    assert (
        audit_json("shadow", path, "--bar-seconds", "3600", "-b", bundle_path)[1]["trials"][0]["live"]["pnl"]["bars"]
        == 0
    )
    for wrong in ("-1", "nan", "inf"):
        result = audit("shadow", path, "--cost-bps", wrong)
        assert (result.exit_code, "--cost-bps: expected a finite number" in result.stderr) == (78, True)


@pytest.mark.parametrize("command", ["verify", "replay", "show", "shadow"])
def test_a_path_that_is_wrong_is_a_setting_to_correct(tmp_path: Path, command: str) -> None:
    for wrong in (
        tmp_path,
        tmp_path / "missing.db",
        "postgres:/host/db",
        "mysql://a:open-sesame@h/d",
    ):
        result = audit(command, wrong)
        assert result.exit_code == 78, result.output
        assert "LEDGER: expected a file or postgresql://" in result.stderr.replace("\n", "")
    assert not (tmp_path / "missing.db").exists()
    assert "open-sesame" not in audit(command, "mysql://a:open-sesame@h/d").output


def test_what_is_no_ledger_is_bad_data(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database at all" * 100)
    code, found = audit_json("verify", path)
    assert (code, found["kind"]) == (65, "DataError")
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE prices (x)")
    assert audit("show", path).exit_code == 65


def test_other_arguments_that_are_wrong(path: Path, tmp_path: Path, bundle_path: Path) -> None:
    assert audit("verify", path, "--head", "abc").exit_code == 78
    assert audit("show", path, "no-such-event").exit_code == 78
    assert audit("show", path, "0").exit_code == 78
    assert audit("replay", path, "--bundle", tmp_path).exit_code == 65
    assert audit("verify", path, "--account", "other").exit_code == 65
    rewrite(path, is_decided, bundle_hash="f" * 64)
    seq = find(path, lambda record: isinstance(record, DecisionRecord) and record.bundle_hash == "f" * 64)
    result = audit("show", path, str(seq), "--bundle", bundle_path)
    assert (result.exit_code, "f" * 64 in result.stderr) == (65, True)


def test_a_damaged_file_is_bad_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 3 :] = bytes(len(content) - 4096 * 3)
    path.write_bytes(content)
    assert audit("verify", path).exit_code == 65


def test_a_ledger_in_postgres_and_a_server_that_is_away(path: Path, postgres_server: RealPostgres) -> None:
    url = postgres_server.new_database()
    assert audit("verify", url).exit_code == 65
    with closing(PostgresLedger(url, "main")) as ledger:
        for _, body, _ in rows(path):
            ledger.append(body)
        code, found = audit_json("verify", url)
        assert (code, found["account"], found["entries"]) == (0, "main", len(rows(path)))
    result = audit("verify", url.replace(f":{postgres_server.port}/", ":1/"))
    assert result.exit_code == 69, result.output
    assert "open-sesame" not in audit("verify", "postgresql://detent:open-sesame@127.0.0.1:1/ledger").output
