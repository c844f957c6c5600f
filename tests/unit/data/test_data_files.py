"""Atomic writes: the destination is the old content or the new content, never a mixture."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data.files import (
    TEMP_PREFIX,
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    sha256_bytes,
    sha256_file,
)

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def in_child(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in its own process: limits and user ids changed there cannot leak into the tests."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_write_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    atomic_write_text(path, "old")
    atomic_write_bytes(path, "neü".encode())
    assert path.read_text(encoding="utf-8") == "neü"
    assert os.listdir(path.parent) == ["a.txt"]


def test_written_file_is_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'


def test_nan_in_json_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_json_cannot_hold(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": [bad]})


def test_canonical_json_does_not_depend_on_insertion_order() -> None:
    for obj in ({"b": [1, 2.5], "a": "é"}, {"a": "é", "b": [1, 2.5]}):
        assert canonical_json(obj) == '{"a":"é","b":[1,2.5]}'


def test_sha256_of_known_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"") == sha256_bytes(memoryview(b"")) == EMPTY_SHA256


def test_full_disk_keeps_the_old_file_and_removes_the_temporary(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    result = in_child(
        """
        import os, resource
        from data.files import atomic_write_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            atomic_write_bytes("a", b"x" * 5000)
        except OSError as error:
            print(type(error).__name__, os.listdir("."))
        """,
        tmp_path,
    )
    assert result.stdout.strip() == "OSError ['a']", result.stderr
    assert (tmp_path / "a").read_text() == "old"


def test_missing_permission_keeps_the_old_file_and_propagates(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    folder.chmod(0o555)
    result = in_child(
        """
        import os
        from data.files import atomic_directory, atomic_write_bytes
        if os.geteuid() == 0:  # root may write anywhere
            os.setgroups([])
            os.setuid(65534)
        try:
            atomic_write_bytes("a", b"new")
        except PermissionError:
            print("file refused", os.listdir("."))
        try:
            with atomic_directory("d"):
                print("entered")
        except PermissionError:
            print("folder refused", os.listdir("."))
        """,
        folder,
    )
    folder.chmod(0o755)
    assert result.stdout.splitlines() == ["file refused ['a']", "folder refused ['a']"], result.stderr
    assert (folder / "a").read_text() == "old"


def test_error_after_the_temporary_was_opened_removes_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError):
        atomic_write_bytes(tmp_path / "a", 3.0)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_directory_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "bundle"
    with atomic_directory(target) as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "a").write_text("x")
        assert temp.parent == target.parent
        assert temp.name.startswith(TEMP_PREFIX)
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"
    assert os.listdir(target.parent) == ["bundle"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_error_in_the_block_leaves_nothing_and_propagates(tmp_path: Path, error: BaseException) -> None:
    def build() -> None:
        with atomic_directory(tmp_path / "bundle") as temp:
            (temp / "a").write_text("x")
            raise error

    with pytest.raises(type(error)):
        build()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_destination_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "bundle"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("old")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="expected no such path"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["bundle"]


def test_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def build() -> None:
        with atomic_directory(target) as temp:
            (temp / "a").write_text("x")
            target.mkdir()

    with pytest.raises(FileExistsError):
        build()
    assert os.listdir(tmp_path) == ["bundle"]
    assert os.listdir(target) == []
