"""The check-up finds each thing that can be wrong, names it, and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs import load_config
from pipeline.doctor import (
    Check,
    check_data,
    check_disk,
    check_memory,
    check_packages,
    check_python,
    check_registry,
    check_torch,
    check_workdir,
    run_checks,
)
from pipeline.tracking import Tracker


def test_this_machine_passes_and_nothing_is_created(tmp_path) -> None:
    checks = run_checks(tmp_path / "a" / "var", load_config())
    assert [check.name for check in checks] == [
        "python",
        "packages",
        "torch",
        "onnxruntime",
        "workdir",
        "disk",
        "memory",
        "data",
        "registry",
    ]
    # Memory and disk belong to the machine, not to the code.
    assert not [check for check in checks if not check.ok and check.name not in ("memory", "disk")]
    assert os.listdir(tmp_path) == []


def test_a_check_that_breaks_is_a_failed_check_and_hides_no_other(workdir) -> None:
    config = load_config(
        "default",
        ["data.source.kind=file", f"data.source.path={workdir / 'absent.csv'}", "tracking.uri=mongodb://x"],
    )
    checks = {check.name: check for check in run_checks(workdir, config)}
    assert not checks["data"].ok
    assert "absent.csv" in checks["data"].detail
    assert checks["data"].hint == "check data.source in the configuration"
    assert not checks["registry"].ok
    assert checks["registry"].detail.startswith("ConfigError: tracking.uri")
    assert checks["onnxruntime"].ok


def test_an_old_python_is_found() -> None:
    assert check_python().ok
    check = check_python(">=9.1")
    assert not check.ok
    assert check.hint == "install Python >=9.1"


def test_every_wrong_package_is_named_and_no_right_one() -> None:
    check = check_packages(["numpy>=1000", "pydantic>=2", "detent-does-not-exist>=1"])
    assert not check.ok
    assert check.detail.startswith("numpy ")
    assert "(needs >=1000); detent-does-not-exist missing (needs >=1)" in check.detail
    assert "pydantic" not in check.detail


def test_the_bounds_come_from_the_project_itself() -> None:
    check = check_packages()
    assert check.ok
    assert int(check.detail.split()[0]) >= 15


def test_more_threads_than_processors_are_found() -> None:
    assert check_torch(1).ok
    check = check_torch(10_000)
    assert not check.ok
    assert "10000 thread(s) configured" in check.detail


def test_a_work_directory_that_is_a_file_is_found(tmp_path) -> None:
    (tmp_path / "var").write_text("")
    assert check_workdir(tmp_path / "var") == Check(
        "workdir",
        False,
        f"{tmp_path / 'var'} is a file, not a directory",
        "choose another --workdir or correct its permissions",
    )


def test_a_directory_that_takes_no_files_is_found() -> None:
    check = check_workdir(Path("/proc/self"))  # not even root may create a file there
    assert not check.ok
    assert "/proc/self cannot be written: E" in check.detail


def test_a_missing_work_directory_is_looked_for_upwards(tmp_path, workdir) -> None:
    assert check_workdir(workdir).detail == f"{workdir} is writable"
    assert check_workdir(tmp_path / "x" / "y").detail == f"{tmp_path / 'x' / 'y'} will be created in {tmp_path}"


def test_too_little_disk_is_found(tmp_path) -> None:
    assert check_disk(tmp_path / "x", minimum=1).ok
    assert not check_disk(tmp_path / "x", minimum=10**18).ok


@pytest.mark.parametrize(
    ("limit", "available_gib"),
    [("max", 8.0), (str(3 * 1024**3), 2.5), (str(100 * 1024**3), 8.0)],
    ids=["no limit", "limit 3, used 1, cache 0.5", "limit above the machine"],
)
def test_memory_is_the_lower_of_machine_and_container(tmp_path, limit: str, available_gib: float) -> None:
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:    {8 * 1024**2} kB\n")
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{1024**3}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {1024**3 // 2}\n")
    assert check_memory(root=tmp_path).detail.startswith(f"{available_gib:.1f} GiB")
    assert check_memory(minimum=int(available_gib * 1024**3), root=tmp_path).ok
    assert not check_memory(minimum=int(available_gib * 1024**3) + 1, root=tmp_path).ok


def test_unknown_memory_is_no_failure(tmp_path) -> None:
    assert check_memory(root=tmp_path).ok


def test_the_bundled_bars_are_counted() -> None:
    assert check_data(load_config()).detail == "sp500: 5031 bars, 1999-01-04 to 2018-12-31"


def test_a_registry_is_asked_but_never_created(workdir) -> None:
    config = load_config("default", ["tracking.model_name=asked"])
    assert "will be created by the first run" in check_registry(workdir, config).detail
    absent = load_config("default", [f"tracking.uri=sqlite:///{workdir}/other.db"])
    assert "other.db will be created by the first run" in check_registry(workdir, absent).detail
    assert os.listdir(workdir) == []
    Tracker(None, "tests", workdir)._client.create_registered_model("asked")
    assert check_registry(workdir, config).detail.endswith("mlflow.db answers, asked known")
    other = load_config("default", ["tracking.model_name=other"])
    assert check_registry(workdir, other).detail.endswith("other not yet registered")
