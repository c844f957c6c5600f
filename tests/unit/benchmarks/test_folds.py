"""Tasks run once, on any engine to the same bits, and a killed, damaged or failing run loses nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from benchmarks.folds import Engine, FoldError, FoldResult, FoldTask, run_folds
from configs.errors import ConfigError
from data.files import TEMP_PREFIX, canonical_json, sha256_bytes

HERE = Path(__file__).parent


def compute(task: FoldTask) -> dict[str, Any]:
    """Sums whose last bits depend on the number of threads, and every kind of value that is stored."""
    rng = np.random.default_rng(task.identity["seed"])
    returns = rng.standard_normal((300, 300))
    return {
        "product": returns @ returns.T,
        "softmax": torch.softmax(torch.as_tensor(returns @ returns), dim=1).numpy(),
        "total": torch.as_tensor(returns).sum().numpy(),
        "allow_pickle": np.array([np.nan, -np.inf, -0.0]),
        "valid": returns > 0,
        "closes": np.array(["2020-01-02", "NaT"], dtype="datetime64[us]"),
        "file": np.array(["sp500", "ñ"]),
        "sharpe": float(returns.mean()),
        "threads": max(torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())),
        "notes": {"window": (1, 2), "gate": None},
    }


def logged(task: FoldTask) -> dict[str, Any]:
    """Count the call in a file, misbehave as told, and wait for a file if told to."""
    seed, payload = task.identity["seed"], task.payload
    with open(payload["log"], "a") as log:
        log.write(f"{seed}\n")
    if seed in payload.get("raise", ()):
        raise ArithmeticError(f"seed {seed} diverged")
    if seed in payload.get("die", ()):
        os.kill(os.getpid(), signal.SIGKILL)
    while seed in payload.get("block", ()):
        time.sleep(0.01)
    return {"walk": np.random.default_rng(seed).standard_normal(100).cumsum(), "seed": seed}


def tasks(count: int, payload: Any = None) -> list[FoldTask]:
    return [FoldTask(f"fold {seed}", {"policy": "toy", "seed": seed}, payload) for seed in range(count)]


def content(results: list[FoldResult]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Everything but the clock, arrays as dtype, shape and bytes."""
    return [
        (result.label, {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in result.arrays.items()}, result.values)
        for result in results
    ]


def calls(payload: Mapping[str, Any]) -> list[int]:
    return sorted(int(line) for line in Path(payload["log"]).read_text().splitlines())


def test_results_come_in_task_order_as_arrays_and_values(tmp_path: Path) -> None:
    (result,) = run_folds(tasks(1), compute, tmp_path / "new" / "folder", engine="serial")
    expected = compute(tasks(1)[0])
    assert set(result.arrays) == {n for n, value in expected.items() if isinstance(value, np.ndarray)}
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == expected[name].dtype
    assert result.values["sharpe"] == expected["sharpe"]
    assert result.values["notes"] == {"window": [1, 2], "gate": None}, "tuples come back as lists, fresh or resumed"
    assert (result.label, result.resumed) == ("fold 0", False)
    assert result.seconds > 0


@pytest.mark.parametrize("engine", ["serial", "joblib"])
def test_finished_tasks_are_read_back_and_reported(tmp_path: Path, engine: Engine) -> None:
    payload = {"log": str(tmp_path / "log")}
    seen: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, label: str) -> None:
        seen.append((done, total, label))

    two = tasks(4, payload)[1:3]
    first = run_folds(two, logged, tmp_path / "runs", engine=engine, jobs=2, progress=progress)
    second = run_folds(tasks(4, payload), logged, tmp_path / "runs", engine=engine, jobs=2, progress=progress)
    assert content(second)[1:3] == content(first)
    assert [result.resumed for result in second] == [False, True, True, False]
    assert [result.values["seed"] for result in second] == [0, 1, 2, 3]
    assert calls(payload) == [0, 1, 2, 3]
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [label for *_, label in seen[2:4]] == ["fold 1", "fold 2"]
    assert {label for *_, label in seen[4:]} == {"fold 0", "fold 3"}


def test_cores_and_this_process_agree_bit_by_bit_whatever_threads_the_caller_has(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2):
            serial = run_folds(tasks(3), compute, tmp_path / "serial", engine="serial")
            assert {pool["num_threads"] for pool in threadpool_info()} == {torch.get_num_threads()} == {2}
    finally:
        torch.set_num_threads(before)
    parallel = run_folds(tasks(3), compute, tmp_path / "joblib", engine="joblib", jobs=2)
    assert content(parallel) == content(serial)
    assert [result.values["threads"] for result in serial + parallel] == [1] * 6


def compute_or_die(task: FoldTask) -> dict[str, Any]:
    if task.payload == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(task)


def test_a_ray_cluster_agrees_bit_by_bit_and_survives_a_dead_worker(tmp_path: Path, monkeypatch) -> None:
    ray = pytest.importorskip("ray", reason="ray is an optional extra: pip install 'detent[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # its workers import this module
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    seen: list[int] = []
    deadly = [FoldTask(task.label, task.identity, "die" if task.label == "fold 1" else None) for task in tasks(4)]
    with (
        pytest.warns(RuntimeWarning, match="^fold 1 failed, the others go on: "),
        pytest.raises(FoldError, match=r"1 of 4 tasks failed(?s:.*)\nfold 1: "),
    ):
        run_folds(
            deadly, compute_or_die, tmp_path / "ray", engine="ray", jobs=2,
            progress=lambda done, total, label: seen.append(done),
        )  # fmt: skip
    assert seen == [1, 2, 3, 4]
    assert not ray.is_initialized(), "the cluster it started ends with the call"
    resumed = run_folds(tasks(4), compute, tmp_path / "ray", engine="serial")
    assert [result.resumed for result in resumed] == [True, False, True, True]
    assert content(resumed) == content(run_folds(tasks(4), compute, tmp_path / "serial", engine="serial"))


def test_ray_that_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine: expected ray to be installed, .* pip install 'detent\[ray\]'"):
        run_folds(tasks(1), compute, tmp_path, engine="ray")


def stored_seeds(root: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["record"]["identity"]["seed"] for path in root.glob("*/result.json"))


@pytest.mark.parametrize("engine", ["serial", "joblib"])
def test_failing_tasks_are_named_after_all_others_are_stored(tmp_path: Path, engine: Engine) -> None:
    payload = {"log": str(tmp_path / "log"), "raise": [1, 3]}
    seen: list[int] = []
    with pytest.warns(RuntimeWarning, match="failed, the others go on") as warned, pytest.raises(FoldError) as caught:
        run_folds(
            tasks(5, payload), logged, tmp_path / "runs", engine=engine, jobs=2,
            progress=lambda done, total, label: seen.append(done),
        )  # fmt: skip
    assert sorted(str(one.message) for one in warned) == [
        f"fold {number} failed, the others go on: ArithmeticError: seed {number} diverged" for number in (1, 3)
    ]
    message = str(caught.value)
    assert message.startswith("2 of 5 tasks failed")
    assert message.index("fold 1: Traceback") < message.index("ArithmeticError: seed 1 diverged")
    assert message.index("seed 1 diverged") < message.index("fold 3: Traceback") < message.index("seed 3 diverged")
    assert stored_seeds(tmp_path / "runs") == [0, 2, 4]
    assert seen == [1, 2, 3, 4, 5]
    cured = {"log": payload["log"]}
    results = run_folds(tasks(5, cured), logged, tmp_path / "runs", engine=engine, jobs=2)
    assert [result.resumed for result in results] == [True, False, True, False, True]


def always_fails(task: FoldTask) -> dict[str, Any]:
    raise ValueError("no bars")


def test_of_many_failures_the_first_are_told_in_full(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="no bars"), pytest.raises(FoldError) as raised:
        run_folds(tasks(5), always_fails, tmp_path, engine="serial")
    message = str(raised.value)
    assert [message.count(f"fold {number}: Traceback") for number in range(5)] == [1, 1, 1, 0, 0]
    assert message.endswith("\nfold 3: ValueError: no bars\nfold 4: ValueError: no bars")


def test_a_failure_is_told_before_the_next_task_starts(tmp_path: Path) -> None:
    told = "fold 1 failed, the others go on: ArithmeticError: seed 1 diverged"
    payload = {"log": str(tmp_path / "log"), "raise": [1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=told):
            run_folds(tasks(5, payload), logged, tmp_path / "runs", engine="serial")
    assert stored_seeds(tmp_path / "runs") == [0]


def test_a_worker_that_dies_takes_only_its_own_task_along(tmp_path: Path) -> None:
    payload = {"log": str(tmp_path / "log"), "die": [0, 4]}
    causes = r"2 of 6 tasks failed(?s:.*)fold 0: its worker process died(?s:.*)fold 4: its worker process died"
    with pytest.warns(RuntimeWarning, match="its worker process died"), pytest.raises(FoldError, match=causes):
        run_folds(tasks(6, payload), logged, tmp_path / "runs", engine="joblib", jobs=2)
    assert stored_seeds(tmp_path / "runs") == [1, 2, 3, 5]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import test_folds
payload = {"log": sys.argv[2] + "/log", "block": [2, 3, 4, 5]}
test_folds.run_folds(test_folds.tasks(6, payload), test_folds.logged, sys.argv[2] + "/runs", engine="joblib", jobs=2)
"""


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    child = subprocess.Popen([sys.executable, "-c", CHILD, HERE, tmp_path], start_new_session=True)
    try:
        # A result that is being written lies in a temporary folder.
        while (
            sum(not path.parent.name.startswith(TEMP_PREFIX) for path in runs.glob("*/result.json")) < 2
            or len(calls({"log": tmp_path / "log"})) < 3
        ):
            assert child.poll() is None, "the child ended by itself"
            time.sleep(0.02)
        child.kill()
        child.wait()
        # Its workers follow by themselves; nobody else would end them.
        deadline = time.monotonic() + 30.0
        while group_lives(child.pid):
            assert time.monotonic() < deadline, "workers outlive the run"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert stored_seeds(runs) == [0, 1]

    payload = {"log": str(tmp_path / "second")}
    resumed = run_folds(tasks(6, payload), logged, runs, engine="joblib", jobs=2)
    undisturbed = run_folds(tasks(6, payload | {"log": os.devnull}), logged, tmp_path / "whole", engine="serial")
    assert calls(payload) == [2, 3, 4, 5]
    assert [result.resumed for result in resumed] == [True, True, False, False, False, False]
    assert content(resumed) == content(undisturbed)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"seed": 0\n', '"seed": 7\n'))


def of_another_format(path: Path) -> None:
    record = {"label": "fold 0"}
    path.write_text(json.dumps({"record": record, "sha256": sha256_bytes(canonical_json(record).encode())}))


DAMAGE = {
    "a flipped bit in the arrays": ("arrays.npz", flip_a_bit, "arrays.npz: expected the content"),
    "arrays cut short": ("arrays.npz", lambda path: os.truncate(path, 100), "arrays.npz: expected the content"),
    "no arrays": ("arrays.npz", Path.unlink, "No such file"),
    "an edited number": ("result.json", other_number, "result.json: expected the content"),
    "a cut record": ("result.json", lambda path: os.truncate(path, 100), "Expecting|Unterminated"),
    "an empty record": ("result.json", lambda path: os.truncate(path, 0), "Expecting value"),
    "a foreign record": ("result.json", lambda path: path.write_text("[1]"), "result.json: expected the content"),
    "a sealed record of another format": ("result.json", of_another_format, "identity"),
    "no record": ("result.json", Path.unlink, "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_computed_again_with_a_warning(tmp_path: Path, damage: str) -> None:
    payload = {"log": str(tmp_path / "log")}
    (whole,) = content(run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial"))
    name, spoil, reason = DAMAGE[damage]
    (folder,) = (tmp_path / "runs").iterdir()
    before = (folder / name).read_bytes()
    spoil(folder / name)
    assert not (folder / name).exists() or (folder / name).read_bytes() != before
    with pytest.warns(RuntimeWarning, match=f"damaged, computing 'fold 0' again: .*(?:{reason})"):
        again = run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial")
    assert content(again) == [whole]
    assert not again[0].resumed
    assert run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial")[0].resumed
    assert calls(payload) == [0, 0]


def test_a_folder_copied_under_another_key_is_not_that_tasks_result(tmp_path: Path) -> None:
    payload = {"log": str(tmp_path / "log")}
    first, second = tasks(2, payload)
    run_folds([first], logged, tmp_path / "runs", engine="serial")
    (tmp_path / "runs" / first.key).rename(tmp_path / "runs" / second.key)
    with pytest.warns(RuntimeWarning, match="expected the result of 'fold 1', was that of 'fold 0'"):
        (result,) = run_folds([second], logged, tmp_path / "runs", engine="serial")
    assert result.values["seed"] == 1


class Burglar:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_smuggled_in_with_the_right_checksums_is_never_opened(tmp_path: Path) -> None:
    payload = {"log": str(tmp_path / "log")}
    run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial")
    (folder,) = (tmp_path / "runs").iterdir()
    np.savez(folder / "arrays.npz", walk=np.array([Burglar(tmp_path / "broken-in")], dtype=object))
    record = json.loads((folder / "result.json").read_text())["record"]
    record["arrays_sha256"] = sha256_bytes((folder / "arrays.npz").read_bytes())
    sealed = {"record": record, "sha256": sha256_bytes(canonical_json(record).encode())}
    (folder / "result.json").write_text(json.dumps(sealed))
    with pytest.warns(RuntimeWarning, match="computing 'fold 0' again: Object arrays cannot be loaded"):
        run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial")
    assert not (tmp_path / "broken-in").exists()


def test_a_full_disk_stops_the_run_and_leaves_no_half_result(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run_folds(tasks(1), compute, tmp_path, engine="serial")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_damaged_result_stays_when_its_task_fails(tmp_path: Path) -> None:
    payload = {"log": str(tmp_path / "log")}
    run_folds(tasks(1, payload), logged, tmp_path / "runs", engine="serial")
    (folder,) = (tmp_path / "runs").iterdir()
    flip_a_bit(folder / "arrays.npz")
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.warns(RuntimeWarning, match="failed, the others go on"),
        pytest.raises(FoldError, match="1 of 1 tasks failed"),
    ):
        run_folds(tasks(1, payload | {"raise": [0]}), logged, tmp_path / "runs", engine="serial")
    assert sorted(os.listdir(folder)) == ["arrays.npz", "result.json"]


def test_what_a_killed_write_left_behind_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / f"{TEMP_PREFIX}123-abc").mkdir()
    (tmp_path / f"{TEMP_PREFIX}124-abd").touch()
    run_folds(tasks(1, {"log": os.devnull}), logged, tmp_path, engine="serial")
    assert os.listdir(tmp_path) == [tasks(1)[0].key]


def with_objects(task: FoldTask) -> dict[str, Any]:
    return {"policies": np.array([print, "x"], dtype=object)}


def with_nan(task: FoldTask) -> dict[str, Any]:
    return {"sharpe": float("nan")}


def with_numpy_scalar(task: FoldTask) -> dict[str, Any]:
    return {"trades": np.int64(3)}


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (with_objects, "policies: expected numbers, truth values, text or times, was an array of objects"),
        (with_nan, "sharpe: expected an array or finite JSON values, was nan"),
        (with_numpy_scalar, r"trades: expected an array or finite JSON values, was np.int64\(3\)"),
    ],
)
def test_what_cannot_be_stored_is_the_failure_of_its_task_by_name(tmp_path: Path, work, message: str) -> None:
    with (
        pytest.warns(RuntimeWarning, match=message),
        pytest.raises(FoldError, match=f"fold 0: (?s:.*)ValueError: {message}"),
    ):
        run_folds(tasks(1), work, tmp_path, engine="serial")
    assert os.listdir(tmp_path) == []


def test_two_tasks_of_one_identity_are_refused(tmp_path: Path) -> None:
    twins = [FoldTask("mbpo", {"seed": 1}), FoldTask("ppo", {"seed": 1})]
    with pytest.raises(ValueError, match="expected an identity of its own for each, was one for 'mbpo' and 'ppo'"):
        run_folds(twins, compute, tmp_path)


def test_key_depends_on_the_identity_alone() -> None:
    task = FoldTask("a", {"seed": 1, "policy": "toy"})
    assert task.key == FoldTask("b", {"policy": "toy", "seed": 1}, payload=np.zeros(3)).key
    assert task.key != FoldTask("a", {"seed": 2, "policy": "toy"}).key
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = FoldTask("a", {"seed": float("nan")}).key


def test_bad_arguments_and_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine: expected one of \['joblib', 'ray', 'serial'\], was 'dask'"):
        run_folds(tasks(1), compute, tmp_path, engine="dask")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jobs: expected at least 1, was 0"):
        run_folds(tasks(1), compute, tmp_path, jobs=0)
    for engine in ("serial", "joblib"):
        assert run_folds([], compute, tmp_path, engine=engine) == []


def test_a_file_where_a_result_belongs_is_replaced_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / tasks(1)[0].key).write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="damaged, computing 'fold 0' again"):
        (result,) = run_folds(tasks(1), compute, tmp_path, engine="serial")
    assert not result.resumed
    (again,) = run_folds(tasks(1), compute, tmp_path, engine="serial")
    assert again.resumed
