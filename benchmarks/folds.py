"""Independent tasks, each computed once: in this process, on every core or on a cluster, and never twice.

A task is a fold of a walk-forward, or one policy at one training length and seed. Its result is stored as soon as it
is finished, so a run that was killed goes on where it stopped, with another engine if need be::

    directory/
    └── <key>/           appears as a whole; the key is the hash of the task's identity
        ├── arrays.npz   plain arrays, never a pickle
        └── result.json  identity, other values, and the SHA-256 of both files' content

Results are the same bits under every engine: a task computes on one thread, and a fresh result is read from the bytes
that are stored. They travel as those bytes, so workers need no access to the directory. One run per directory at a
time: the caller holds the lock.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from joblib import Parallel, delayed, parallel_config
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from configs.errors import ConfigError
from data.files import TEMP_PREFIX, atomic_directory, canonical_json, sha256_bytes

ARRAYS_NAME = "arrays.npz"
RECORD_NAME = "result.json"

FULLY_TOLD = 3
"""Failed tasks whose traceback is shown; of the others, the reason."""

Engine = Literal["serial", "joblib", "ray"]
"""This process; the cores of this machine; a Ray cluster."""
Progress = Callable[[int, int, str], None]
"""Called with tasks done, tasks in all, and the label of the task that was just done."""


class FoldError(RuntimeError):
    """Tasks failed; the results of all others are stored."""


@dataclass(frozen=True, eq=False)
class FoldTask:
    """One unit of work.

    Attributes:
        label: what people read.
        identity: everything that determines the result (settings, seed, hashes of data and code), as JSON.
        payload: what the work needs besides; it must follow from `identity`, for it is not hashed.
    """

    label: str
    identity: Mapping[str, Any]
    payload: Any = None

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity. Raises: ValueError or TypeError where it is not JSON."""
        return sha256_bytes(canonical_json(self.identity).encode("utf-8"))


@dataclass(frozen=True, eq=False)
class FoldResult:
    """What the work returned for a task.

    Attributes:
        label: of the task.
        arrays: the arrays by name.
        values: everything else by name, as JSON gives it back: tuples are lists.
        seconds: wall time of the work.
        resumed: it was computed by an earlier run.
    """

    label: str
    arrays: dict[str, NDArray[Any]]
    values: dict[str, Any]
    seconds: float
    resumed: bool


Work = Callable[[FoldTask], Mapping[str, Any]]
"""A pure function of the task. Arrays are stored as arrays, all else as JSON, where NaN is an error."""


def run_folds(
    tasks: Sequence[FoldTask],
    work: Work,
    directory: str | os.PathLike[str],
    *,
    engine: Engine = "joblib",
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[FoldResult]:
    """Return the result of every task, in order; those found in `directory` are not computed again.

    Args:
        tasks: what is to be done, each with an identity of its own.
        work: called once per missing task; a module-level function, as other processes import it by name.
        directory: where results are kept; created where missing.
        engine: with "ray", RAY_ADDRESS names the cluster; without it one starts on this machine and ends with the call.
        jobs: tasks computed at once.
        progress: told of every finished task, failed ones included.

    A stored result that is damaged is computed again, with a RuntimeWarning. A failed task stops no other one; a
    RuntimeWarning tells its reason when it fails.

    Raises: ValueError for bad arguments; ConfigError if ray is asked for and absent; OSError where `directory` cannot
        be written; FoldError, after all tasks, naming the failed ones.
    """
    _check(tasks, engine, jobs)
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    for stray in root.glob(f"{TEMP_PREFIX}*"):
        _remove(stray)

    results: dict[str, FoldResult] = {}
    failures: dict[str, _Failure] = {}

    def report(label: str) -> None:
        if progress is not None:
            progress(len(results) + len(failures), len(tasks), label)

    for task in tasks:
        if (found := _stored(root / task.key, task)) is not None:
            results[task.key] = found
            report(task.label)
    missing = {task.key: task for task in tasks if task.key not in results}
    for key, outcome in _ENGINES[engine](work, list(missing.values()), jobs):
        task = missing[key]
        if isinstance(outcome, _Failure):
            failures[key] = outcome
            warnings.warn(f"{task.label} failed, the others go on: {outcome.reason}", RuntimeWarning, stacklevel=2)
        else:
            _store(root / key, outcome)
            results[key] = _unpack(outcome, task, resumed=False)
        report(task.label)
    if failures:
        failed = [key for key in missing if key in failures]
        # The first ones in full: what fails a hundred tasks is the same thing, as a rule.
        told = [failures[key].details for key in failed[:FULLY_TOLD]]
        told += [failures[key].reason for key in failed[FULLY_TOLD:]]
        causes = "\n".join(f"{missing[key].label}: {cause}" for key, cause in zip(failed, told, strict=True))
        raise FoldError(
            f"{len(failures)} of {len(tasks)} tasks failed, the others are stored in {root}; remove the cause and run "
            f"again to compute the failed ones\n{causes}"
        )
    return [results[task.key] for task in tasks]


def check_engine(engine: Engine) -> None:
    """Refuse an engine that is not installed. Raises: ConfigError."""
    if engine == "ray" and find_spec("ray") is None:
        raise ConfigError("engine: expected ray to be installed, was absent: pip install 'detent[ray]'")


def _check(tasks: Sequence[FoldTask], engine: Engine, jobs: int) -> None:
    if engine not in _ENGINES:
        raise ValueError(f"engine: expected one of {sorted(_ENGINES)}, was {engine!r}")
    check_engine(engine)
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, was {jobs}")
    labels: dict[str, str] = {}
    for task in tasks:
        if task.key in labels:
            raise ValueError(
                f"tasks: expected an identity of its own for each, was one for {labels[task.key]!r} and "
                f"{task.label!r}; add what tells them apart"
            )
        labels[task.key] = task.label


class _Files(NamedTuple):
    arrays: bytes
    record: bytes


class _Failure(NamedTuple):
    reason: str
    details: str


_Outcome = tuple[str, _Files | _Failure]  # of the task with this key


def _compute(work: Work, task: FoldTask) -> _Outcome:
    try:
        with _one_thread():
            began = time.perf_counter()
            output = work(task)
            return task.key, _pack(task, output, time.perf_counter() - began)
    except Exception as error:  # a task is anybody's code: what it raises is its own failure, and is told at once
        reason = "".join(traceback.format_exception_only(error)).rstrip()
        return task.key, _Failure(reason, traceback.format_exc().rstrip())


# The order of sums depends on the number of threads, so results would differ between engines; and one thread per
# task is fastest where the tasks themselves fill the cores.
@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _pack(task: FoldTask, output: Mapping[str, Any], seconds: float) -> _Files:
    buffer = BytesIO()
    values = {}
    # Not np.savez: its own argument names could not be names of arrays.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in output.items():
            if not isinstance(value, np.ndarray):
                values[name] = value
            elif value.dtype.hasobject:
                raise ValueError(f"{name}: expected numbers, truth values, text or times, was an array of objects")
            else:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
    for name, value in values.items():
        try:
            canonical_json(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected an array or finite JSON values, was {value!r}: {error}") from error
    arrays = buffer.getvalue()
    record = {
        "identity": task.identity,
        "label": task.label,
        "values": values,
        "seconds": seconds,
        "arrays_sha256": sha256_bytes(arrays),
    }
    sealed = {"record": record, "sha256": _seal(record)}
    return _Files(arrays, (json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def _seal(record: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical_json(record).encode("utf-8"))


# Raises ValueError saying what is wrong with the files.
def _unpack(files: _Files, task: FoldTask, *, resumed: bool) -> FoldResult:
    sealed = json.loads(files.record)
    if not isinstance(sealed, dict) or sealed.get("sha256") != _seal(sealed.get("record", {})):
        raise ValueError(f"{RECORD_NAME}: expected the content its SHA-256 names")
    record = sealed["record"]
    if _seal(record["identity"]) != task.key:
        raise ValueError(f"{RECORD_NAME}: expected the result of {task.label!r}, was that of {record['label']!r}")
    if sha256_bytes(files.arrays) != record["arrays_sha256"]:
        raise ValueError(f"{ARRAYS_NAME}: expected the content whose SHA-256 {RECORD_NAME} names")
    with np.load(BytesIO(files.arrays), allow_pickle=False) as archive:
        arrays = dict(archive)
    return FoldResult(task.label, arrays, record["values"], record["seconds"], resumed)


def _store(folder: Path, files: _Files) -> None:
    if folder.exists():  # a damaged result is kept until there is a better one
        _remove(folder)
    with atomic_directory(folder) as temp:
        (temp / ARRAYS_NAME).write_bytes(files.arrays)
        (temp / RECORD_NAME).write_bytes(files.record)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _stored(folder: Path, task: FoldTask) -> FoldResult | None:
    if not folder.exists():
        return None
    try:
        files = _Files((folder / ARRAYS_NAME).read_bytes(), (folder / RECORD_NAME).read_bytes())
        return _unpack(files, task, resumed=True)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{folder}: damaged, computing {task.label!r} again: {error}", RuntimeWarning, stacklevel=3)
        return None


def _in_process(work: Work, tasks: Sequence[FoldTask], jobs: int) -> Iterator[_Outcome]:  # noqa: ARG001
    for task in tasks:
        yield _compute(work, task)


# A worker that dies (out of memory, as a rule) breaks the whole pool. Tasks start in order, so what it was computing is
# among the first `jobs` unfinished ones: these wait, and in the end each gets a pool of its own, where a death is its.
def _on_cores(work: Work, tasks: Sequence[FoldTask], jobs: int) -> Iterator[_Outcome]:
    queue = {task.key: task for task in tasks}
    suspects: list[FoldTask] = []
    while queue:
        try:
            for outcome in _pool(work, list(queue.values()), jobs):
                del queue[outcome[0]]
                yield outcome
        except BrokenExecutor:
            suspects += [queue.pop(key) for key in list(queue)[:jobs]]
    for task in suspects:
        try:
            yield from _pool(work, [task], 2)  # with one job joblib would compute it in this process
        except BrokenExecutor as error:
            reason = f"its worker process died: {error}"
            yield task.key, _Failure(reason, reason)


def _pool(work: Work, tasks: Sequence[FoldTask], jobs: int) -> Iterator[_Outcome]:
    # The environment is set before a worker imports anything, so that no library starts threads it will not use.
    with parallel_config(backend="loky", inner_max_num_threads=1, initializer=_end_with, initargs=(os.getpid(),)):
        pool = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    yield from pool(delayed(_compute)(work, task) for task in tasks)


# A worker whose parent was killed would wait for its next task for good.
def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Not Ray's joblib backend: joblib refuses to stream from it, so nothing would be stored before the last task ended; it
# deals tasks out in turn, so short ones wait behind a long one; and one dead worker ends the run.
def _on_ray(work: Work, tasks: Sequence[FoldTask], jobs: int) -> Iterator[_Outcome]:
    ray = import_module("ray")
    ours = not ray.is_initialized()
    if ours and os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=False)
    elif ours:
        ray.init(address="local", num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_compute)
        shared_work = ray.put(work)
        waiting = deque(tasks)
        running: dict[Any, str] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                running[remote.remote(shared_work, task)] = task.key
            (finished,), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(finished)
            try:
                yield ray.get(finished)
            except ray.exceptions.RayError as error:
                yield key, _Failure(str(error), str(error))
    finally:
        if ours:
            ray.shutdown()


_ENGINES: dict[str, Callable[[Work, Sequence[FoldTask], int], Iterator[_Outcome]]] = {
    "serial": _in_process,
    "joblib": _on_cores,
    "ray": _on_ray,
}
