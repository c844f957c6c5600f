"""Two runs never share a work directory, and no crash leaves it locked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import LockedError, exit_code_for
from pipeline.lock import WorkdirLock

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pipeline.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def other_process(workdir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_lock(workdir) -> None:
    with other_process(workdir) as holder:
        with pytest.raises(LockedError) as caught, WorkdirLock(workdir):
            pass
        assert f"held by pid {holder.pid} on {socket.gethostname()} since 20" in str(caught.value)
        assert exit_code_for(caught.value) == 75
        # Losing must not have wiped the holder's name.
        assert f"pid {holder.pid}" in (workdir / ".lock").read_text()
        holder.communicate()


def test_a_killed_holder_leaves_the_directory_free(workdir) -> None:
    with other_process(workdir) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with WorkdirLock(workdir):
            assert f"pid {os.getpid()} on" in (workdir / ".lock").read_text()


def test_the_lock_is_free_after_an_error_inside(workdir) -> None:
    with pytest.raises(ZeroDivisionError), WorkdirLock(workdir):
        raise ZeroDivisionError
    with WorkdirLock(workdir):
        pass
    assert (workdir / ".lock").read_text() == ""


def test_the_same_process_cannot_hold_it_twice(workdir) -> None:
    lock = WorkdirLock(workdir)
    with lock:
        with pytest.raises(LockedError, match=f"pid {os.getpid()} "), WorkdirLock(workdir):
            pass
        with pytest.raises(LockedError, match="entered twice"), lock:
            pass


def test_a_missing_directory_is_created(tmp_path) -> None:
    with WorkdirLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()


def test_a_file_in_place_of_the_directory_is_a_config_problem(tmp_path) -> None:
    path = tmp_path / "var"
    path.write_text("")
    with pytest.raises(NotADirectoryError, match="was a file") as caught, WorkdirLock(path):
        pass
    assert exit_code_for(caught.value) == 78


def test_a_child_that_outlives_the_lock_does_not_keep_it(workdir) -> None:
    with WorkdirLock(workdir) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[fd for fd in map(int, os.listdir("/proc/self/fd")) if points_to(fd, lock.path)],
        )
    with child, WorkdirLock(workdir):
        child.communicate()


def points_to(fd: int, path: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/self/fd/{fd}", path)
    except FileNotFoundError:  # the descriptor of the listing itself, or of a pipe
        return False
