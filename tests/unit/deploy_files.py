"""What lies in `deploy/` and what the runbook says, read for tests."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ExitCode
from serving.http.auth import Role
from serving.http.routes import ROUTES

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, RUNBOOK = ROOT / "deploy", ROOT / "docs" / "runbook.md"
UNITS = sorted((DEPLOY / "systemd").iterdir())
DETENT = "/opt/detent/bin/detent"
GOOD_ENDS = {int(ExitCode.CHAMPION_KEPT), int(ExitCode.ALREADY_DONE)}
NEEDS_A_PERSON = {2, int(ExitCode.BAD_DATA), int(ExitCode.BUG), int(ExitCode.BAD_CONFIG)}
PUBLIC_PATHS = {route.path for route in ROUTES if route.role is Role.PUBLIC}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def objects() -> dict[str, dict[str, Any]]:
    """Kubernetes objects by kind."""
    paths = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    found = [document for path in paths for document in documents(path)]
    assert sorted(each["kind"] for each in found) == ["CronJob", "Deployment", "PersistentVolumeClaim", "Service"]
    return {each["kind"]: each for each in found}


def compose_file() -> dict[str, Any]:
    (found,) = documents(DEPLOY / "compose.yaml")
    return found


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> Iterator[list[str]]:
    """Simple commands of a script as words; here-documents are left out."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.DOTALL).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>(){}")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&(){}"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def detent_arguments(words: list[str]) -> list[str] | None:
    """What follows `detent` where it is the command, behind `chrt`, `sudo` and the like; None for other commands."""
    for index, word in enumerate(words):
        if word == "detent" or (word.startswith("/opt/") and word.endswith("/bin/detent")):
            before = words[:index]
            started = not before or before[0] in ("chrt", "sudo", "env") or before[:2] in (["docker", "compose"],)
            return words[index + 1 :] if started and before[-1:] != ["-u"] else None
    return None


def command_lines() -> dict[str, list[str]]:
    """Every call of `detent`, by where it is written."""
    found: dict[str, list[str]] = {}

    def add(where: str, arguments: list[str] | None) -> None:
        if arguments is not None:
            found[f"{where}: {shlex.join(['detent', *arguments])[:70]}"] = arguments

    for path in UNITS:
        for line in re.findall(r"^ExecStart=(.*)$", path.read_text(), re.MULTILINE):
            add(path.name, detent_arguments(shlex.split(line)))
    for path in (RUNBOOK, DEPLOY / "README.md"):
        inline = re.findall(r"`(detent [^`\n]+)`", path.read_text())
        for block in [*code_blocks(path, "sh"), *inline]:
            for words in shell_commands(block):
                add(path.name, detent_arguments(words))
    add("deployment.yaml", container(objects()["Deployment"])["args"])
    for words in shell_commands(container(objects()["CronJob"])["args"][0]):
        add("cronjob.yaml", detent_arguments(words))
    for name in ("serve", "retrain"):
        add("compose.yaml", compose_file()["services"][name]["command"])
    add("Containerfile", json.loads(re.search(r"^CMD (.*)$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)[1]))
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(workload)["containers"]
    return found


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec = workload["spec"]
    return (spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec)["template"]["spec"]
