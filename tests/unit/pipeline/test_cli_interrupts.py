"""A command that is interrupted says so, once, and ends in the exit code it reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.{signal})\n"
# Freed while the interpreter shuts down, after it has given signals back their default handlers.
AGAIN = """
import masking

class Late:
    def __init__(self):
        self.kill, self.arguments = os.kill, (os.getpid(), signal.{signal})
    def __del__(self):
        self.kill(*self.arguments)

masking.late = Late()
"""
RETRAIN = ("retrain", "-p", "smoke", "-w", "var", "-s", "limits.rule_modules=[interrupting]", "--json")


def detent(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "interrupting.py").write_text(module)
    command = [
        sys.executable,
        "-c",
        # A job started in the background of a shell inherits a SIGINT that is ignored.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {str(folder)!r}); from pipeline.cli import main; main()",
    ]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_second_signal_changes_nothing(tmp_path: Path, signal: str) -> None:
    module = "import os, signal\n" + AGAIN + INTERRUPT
    done = detent(tmp_path, module.format(signal=signal), *RETRAIN)
    assert done.returncode == 130
    assert json.loads(done.stdout) == {"exit_code": 130, "status": "interrupted"}
    assert done.stderr.splitlines()[-1] == "interrupted; start again to continue after the last finished stage"


def test_only_a_command_that_continues_says_so(tmp_path: Path) -> None:
    module = INTERRUPT.format(signal="SIGINT")
    for arguments in (("rules", "list", "--rule-module", "interrupting"), (*RETRAIN, "--dry-run")):
        done = detent(tmp_path, module, *arguments)
        assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
