"""`detent serve` with options that cannot be: each ends in its exit code and in words, and nothing stays open."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.tracking import Tracker
from serving.http.auth import DECIDE_TOKEN, OPERATOR_TOKEN, READ_TOKEN
from serving.http.server import HttpServer
from serving.ledger.sqlite import SqliteLedger

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (OPERATOR_TOKEN, DECIDE_TOKEN, READ_TOKEN, "DETENT_REDIS_URL", "DETENT_LEDGER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def never_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that nobody saw must not leave the test waiting."""
    monkeypatch.setattr(HttpServer, "run", lambda *_: pytest.fail("it serves"))


def serve(bundle: Path | str, workdir: Path, *options: str) -> Result:
    return RUNNER.invoke(app, ["serve", "--bundle", str(bundle), "--workdir", str(workdir), "--port", "0", *options])


def assert_refused(result: Result, code: int, words: str) -> None:
    said = " ".join(result.stderr.split())
    assert (result.exit_code, words in said) == (code, True), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--inference-ms", "60"), "expected 0 < inference <= decision <= timeout, was 60, 50, 80"),
        (("--timeout-ms", "nan"), "expected 0 < inference <= decision <= timeout"),
        (("--bar-seconds", "0"), "bar_seconds: expected > 0, was 0"),
        (("--canary-fraction", "1.5"), "canary: capital_fraction: expected more than 0 and less than 1, was 1.5"),
        (("--watch-seconds", "-1"), "--watch-seconds: expected a number of seconds, or 0, was -1"),
        (("--redis",), "--redis: expected DETENT_REDIS_URL in the environment, was none"),
        (("--limits-max-age", "5"), "--limits-max-age: expected DETENT_REDIS_URL in the environment, was none"),
        (("--host", "0.0.0.0"), "host: expected a loopback address while DETENT_OPERATOR_TOKEN is not set"),  # noqa: S104
        (("--port", "65536"), "--port: expected at most 65535, was 65536"),
        (("--challenger", "models:/nothing"), "expected a directory or models:/NAME@ALIAS, was 'models:/nothing'"),
        (("--rule-module", "no_such_module"), "no_such_module"),
    ],
)
def test_a_setting_that_is_wrong_ends_with_78(
    bundle_path: Path, workdir: Path, options: tuple[str, ...], words: str
) -> None:
    assert_refused(serve(bundle_path, workdir, *options), 78, words)
    # Nobody holds what was opened before the mistake was seen.
    for ledger in workdir.glob("*.db"):
        SqliteLedger(ledger).close()


def test_limits_that_may_be_no_age_at_all_are_a_setting_to_correct(
    bundle_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETENT_REDIS_URL", "redis://127.0.0.1:1/0")
    result = serve(bundle_path, workdir, "--limits-max-age", "-5")
    assert_refused(result, 78, "max_age_s: expected a positive number of seconds, was -5")


@pytest.mark.parametrize("token", ["short", "with a space in it 123"])
def test_tokens_that_are_none_end_with_78_and_stay_secret(
    bundle_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv(OPERATOR_TOKEN, token)
    result = serve(bundle_path, workdir)
    assert_refused(result, 78, f"{OPERATOR_TOKEN}: expected 16 or more visible ASCII characters")
    assert token not in result.stderr


def test_a_name_that_no_machine_can_have_ends_with_78(
    bundle_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OPERATOR_TOKEN, "operator-token-0123456789")
    result = serve(bundle_path, workdir, "--host", "x" * 64)
    assert_refused(result, 78, f"host: expected an address of this machine, was '{'x' * 64}'")


def test_a_registry_without_a_champion_ends_with_65_and_says_what_makes_one(workdir: Path) -> None:
    Tracker(None, "detent-nightly", workdir)
    words = "models:/detent-policy@champion: expected a version, was none; `detent retrain` makes and promotes one"
    assert_refused(serve("models:/detent-policy@champion", workdir), 65, words)


def test_a_folder_that_is_no_bundle_ends_with_65(workdir: Path, tmp_path: Path) -> None:
    assert_refused(serve(tmp_path / "nowhere", workdir), 65, "nowhere: expected a bundle directory")
    assert_refused(serve(workdir, workdir), 65, "expected manifest.json")


def test_a_registry_that_is_away_ends_with_69(workdir: Path) -> None:
    result = serve(
        "models:/detent-policy@champion", workdir, "--tracking-uri", "postgresql://a:open-sesame@127.0.0.1:1/m"
    )
    assert_refused(result, 69, "expected a service that answers at postgresql://***@127.0.0.1:1/m")
    assert "open-sesame" not in result.output


def test_a_ledger_that_another_service_holds_ends_with_69(bundle_path: Path, workdir: Path) -> None:
    with closing(SqliteLedger(workdir / "ledger-default.db")):
        assert_refused(serve(bundle_path, workdir), 69, "ledger-default.db")


def test_a_port_that_is_taken_ends_with_69_and_gives_the_ledger_back(bundle_path: Path, workdir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(serve(bundle_path, workdir, "--port", str(port)), 69, "Address already in use")
    SqliteLedger(workdir / "ledger-default.db").close()
