"""The runbook, the dashboard and the command lines in `deploy/`: true of the commands, routes and metrics there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
import typer
import yaml
from deploy_files import DEPLOY, RUNBOOK, code_blocks, command_lines, compose_file, detent_arguments, shell_commands
from ledger_parts import body

from pipeline import cli_serve
from pipeline.cli import app
from serving.drift.monitor import DriftLevel, DriftSettings, DriftStatus
from serving.http import auth
from serving.http.metrics import ServiceMetrics
from serving.http.routes import ROUTES
from serving.http.service import CommandRequest
from serving.ledger.sqlite import SqliteLedger
from serving.records import Command, ControlRecord, DecisionRecord, Mode, Reason, RiskState, Source

COMMAND_LINES = command_lines()


def check_command_line(arguments: list[str]) -> None:
    """Parse as the command would, without running it. Raises: what click raises for a usage error."""
    command, context = typer.main.get_command(app), None
    rest = list(arguments)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"{name!r}: expected one of {sorted(command.commands)}"
        command = command.commands[name]
    context = command.make_context(command.name, rest, resilient_parsing=False)
    context.close()


@pytest.mark.parametrize("where", COMMAND_LINES)
def test_every_command_line_is_one_the_command_understands(where):
    check_command_line(COMMAND_LINES[where])


def test_command_lines_were_found_where_there_are_any():
    files = {where.partition(":")[0] for where in COMMAND_LINES}
    assert files == {
        "Containerfile", "compose.yaml", "cronjob.yaml", "deployment.yaml", "detent-retrain.service",
        "detent-serve.service", "runbook.md",
    }  # fmt: skip
    called = {tuple(arguments[:2]) for where, arguments in COMMAND_LINES.items() if where.startswith("runbook")}
    assert {("audit", "verify"), ("audit", "replay"), ("audit", "show")} <= called


@pytest.mark.parametrize(
    "line", ["detent nonsense", "detent retrain --no-such-option", "detent audit verify", "detent audit show a b c"]
)
def test_command_line_that_is_wrong_is_seen(line):
    (words,) = shell_commands(line)
    with pytest.raises(Exception, match=r"expected one of|[Nn]o such option|[Mm]issing|unexpected extra"):
        check_command_line(detent_arguments(words) or [])


def test_variables_of_the_service_are_ones_it_reads():
    known = {auth.READ_TOKEN, auth.DECIDE_TOKEN, auth.OPERATOR_TOKEN, cli_serve.LEDGER, cli_serve.REDIS_URL}
    text = "\n".join(path.read_text() for path in [*DEPLOY.rglob("*.*"), DEPLOY / "Containerfile", RUNBOOK])
    assert set(re.findall(r"\bDETENT_[A-Z]\w*", text)) <= known


# --- dashboard --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, set[str]]:
    """Every sample a service can give, with its labels."""
    provenance = SimpleNamespace(git_commit="0" * 40)
    bundle = SimpleNamespace(hash="a" * 64, manifest=SimpleNamespace(rule_set_hash="b" * 64, provenance=provenance))
    ledger = SqliteLedger(tmp_path_factory.mktemp("ledger") / "ledger.db", fsync="never")
    engine: Any = SimpleNamespace(
        bundle=bundle, challenger=bundle, risk=RiskState(), agreement=(1, 2), ledger=ledger, subscribe=lambda _: None,
        trading_state=0, unrecorded={Reason.LEDGER_FAILED: 1},
    )  # fmt: skip
    drift = DriftStatus(
        bars=60, psi={"a": 0.1}, ks={"a": 0.5}, nll_mean=1.0, nll_z=0.1, level=DriftLevel.OK, worst="a", words=""
    )
    metrics = ServiceMetrics(engine)
    metrics.observe(_record(), _record(mode=Mode.SHADOW))
    metrics.observe(
        ControlRecord(time=0.0, command="kill", person="p", detail="d", bundle_hash="", risk=RiskState()), None
    )
    metrics.answered("/decide", 200)
    metrics.inferred("policy", 1, 0)
    metrics.watch_drift(lambda: drift)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    ledger.close()
    return found


def _record(**changes: Any) -> DecisionRecord:
    empty: dict[str, Any] = dict.fromkeys(("caller_masks", "target_position", "value"), None)
    empty |= dict.fromkeys(("event_id", "input_hash", "detail", "bundle_hash", "rule_set_hash"), "")
    empty |= dict.fromkeys(("time", "bar_time", "drawdown"), 0.0) | dict.fromkeys(("action_masks", "probabilities"), ())
    empty |= dict.fromkeys(("proposed", "executed", "seed", "trading_state"), 0)
    empty |= {"mode": Mode.LIVE, "state": b"", "blocked": {}, "flatten": False, "uncertainty": 0.1}
    empty |= {
        "source": Source.POLICY,
        "reason": Reason.OK,
        "risk": RiskState(),
        "latency_us": {"total": 100.0, "policy": 50.0},
    }
    return DecisionRecord(**(empty | changes))


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "detent.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*found, *(each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query")]


def unknown_in(query: str, samples: dict[str, set[str]]) -> set[str]:
    """Metrics and labels of a query that no service has; `job` is Prometheus's own."""
    names = set(re.findall(r"\b(?:detent|process)_\w+", query))
    assert names, query
    labels = {word for part in re.findall(r"\bby \(([^)]*)\)", query) for word in part.split(", ")}
    labels |= {label for part in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)(?:=~|!=|=)", part)}
    known = {"job"}.union(*(samples.get(name, set()) for name in names))
    return (names - set(samples)) | (labels - known)


@pytest.mark.parametrize("query", queries())
def test_dashboard_asks_for_metrics_that_exist(query, samples):
    assert unknown_in(query, samples) == set()


def test_query_for_what_does_not_exist_is_seen(samples):
    assert unknown_in('sum by (color) (rate(detent_decisions_totals{mood="live"}[5m]))', samples) == {
        "detent_decisions_totals", "color", "mood",
    }  # fmt: skip


def test_dashboard_shows_every_metric_a_person_acts_on(samples):
    text = "\n".join(queries())
    silent = {"detent_drift_bars", "detent_inferred_rows_total", "detent_inferred_overridden_rows_total"}
    own = {name for name in samples if name.startswith("detent_") and not name.endswith("_created")}
    assert {name for name in own if name not in text} == silent


def test_dashboard_panels_lie_side_by_side():
    dashboard = json.loads((DEPLOY / "grafana" / "detent.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


# --- runbook ----------------------------------------------------------------------------------------------


def curl_calls() -> list[list[str]]:
    return [words for block in code_blocks(RUNBOOK, "sh") for words in shell_commands(block) if words[0] == "curl"]


@pytest.mark.parametrize("words", curl_calls(), ids=lambda words: words[2])
def test_calls_of_the_runbook_are_routes_with_the_right_token(words):
    (url,) = (word for word in words if word.startswith("http://127.0.0.1:8470"))
    path = url.removeprefix("http://127.0.0.1:8470").partition("?")[0]
    method = "POST" if "-d" in words else "GET"
    (route,) = (route for route in ROUTES if (route.method, route.path) == (method, path))
    token = f"Authorization: Bearer $DETENT_{route.role.name}_TOKEN"
    assert (token in words) == (route.role is not auth.Role.PUBLIC)
    if "-d" in words:
        assert "Content-Type: application/json" in words
        assert route.body is CommandRequest
        msgspec.json.decode(words[words.index("-d") + 1], type=CommandRequest)


def test_commands_of_persons_are_all_in_the_runbook():
    called = {word for words in curl_calls() for word in words if word.startswith("http")}
    operators = {route.path for route in ROUTES if route.role is auth.Role.OPERATOR}
    assert {url.removeprefix("http://127.0.0.1:8470") for url in called} >= operators


def test_runbook_speaks_of_what_exists(samples):
    known = {reason.value for reason in Reason} | set(get_args(Command)) | set(samples)
    known |= {field.name for field in msgspec.structs.fields(RiskState)} | {"volatility_20"}
    words = re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", RUNBOOK.read_text())
    assert words
    assert set(words) <= known


@pytest.mark.parametrize("path", [RUNBOOK, DEPLOY / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (path.parent / target).exists(), target
    if path.name == "README.md":
        assert all((DEPLOY / name).exists() for name in re.findall(r"`((?:systemd|kubernetes|grafana)/[\w.-]+)`", text))


@pytest.mark.parametrize("index", [0, 1])
def test_tokens_are_made_as_the_service_wants_them(index, tmp_path):
    blocks = [block for block in code_blocks(DEPLOY / "README.md", "sh") if "umask" in block]
    (loop,) = re.findall(r"^(for .*?)(?: > /etc/detent/detent\.env| > \.env)$", blocks[index], re.MULTILINE | re.DOTALL)
    if shutil.which("openssl") is None:
        loop = loop.replace("openssl rand -hex 24", "od -An -N24 -tx1 /dev/urandom | tr -d ' \\n'")
    done = subprocess.run(["sh", "-c", loop], capture_output=True, text=True, check=True)
    entries = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert auth.Tokens.from_environment(entries).required
    if index == 1:
        assert set(re.findall(r"\$\{([A-Z_]+)", yaml.safe_dump(compose_file()["services"]))) == set(entries)


def test_roll_back_of_the_runbook_moves_the_alias(tmp_path):
    (block,) = (block for block in code_blocks(RUNBOOK, "sh") if "previous" in block)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "sqlite:////var/lib/detent/mlflow.db" in block
    (script,) = re.findall(r"<<'EOF'\n(.*?)\nEOF$", block, re.MULTILINE | re.DOTALL)
    from pipeline.mlflow_access import open_client

    client = open_client(uri)
    client.create_registered_model("detent-policy")
    for _ in range(2):
        client.create_model_version("detent-policy", str(tmp_path))
    client.set_registered_model_alias("detent-policy", "previous", "1")
    client.set_registered_model_alias("detent-policy", "champion", "2")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "champion is version 1"
    version = client.get_model_version_by_alias("detent-policy", "previous").version
    assert client.get_model_version_by_alias("detent-policy", "champion").version == version


def test_back_up_of_the_runbook_copies_a_ledger_that_is_written(tmp_path):
    (block,) = (block for block in code_blocks(RUNBOOK, "sh") if "backup(" in block)
    (script,) = re.findall(r"-c '(.*?)'", block)
    source, copied = tmp_path / "ledger.db", tmp_path / "backup.db"
    with SqliteLedgerOf(source) as ledger:
        subprocess.run([sys.executable, "-c", script, str(source), str(copied)], check=True)
        expected = ledger.head()
    with sqlite3.connect(copied) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (3,)
    found = SqliteLedger(copied, None, read_only=True)
    assert found.head() == expected
    found.close()


class SqliteLedgerOf:
    """A ledger with three entries, open for writing."""

    def __init__(self, path: Path) -> None:
        self.ledger = SqliteLedger(path, fsync="never")

    def __enter__(self) -> SqliteLedger:
        for index in range(3):
            self.ledger.head()
            self.ledger.append(body(RiskState(peak=float(index))))
        return self.ledger

    def __exit__(self, *_: object) -> None:
        self.ledger.close()


def test_alarm_is_as_rare_as_the_runbook_says():
    assert "no more than one of a thousand windows" in " ".join(RUNBOOK.read_text().split())
    assert DriftSettings().alarm_rate == 0.001
