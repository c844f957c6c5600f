"""Can the nightly job run here? One check per thing that has to be right, each with what to do about it.

Nothing is changed: no work directory, no database and no experiment is created. A check that itself fails is a
failed check, so one broken library never hides the others.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.schema import DetentConfig

MIN_DISK_BYTES = 2 * 1024**3
MIN_MEMORY_BYTES = 2 * 1024**3
_GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is right, what was found, and what to do if it is not."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def run_checks(workdir: str | Path, config: DetentConfig) -> list[Check]:
    """All checks, in the order in which a person would repair them."""
    path = Path(workdir)
    return [
        _guarded("python", check_python),
        _guarded("packages", check_packages),
        _guarded("torch", lambda: check_torch(config.torch_threads)),
        _guarded("onnxruntime", check_onnxruntime),
        _guarded("workdir", lambda: check_workdir(path)),
        _guarded("disk", lambda: check_disk(path)),
        _guarded("memory", check_memory),
        _guarded("data", lambda: check_data(config)),
        _guarded("registry", lambda: check_registry(path, config)),
    ]


def check_python(minimum: str | None = None) -> Check:
    """The interpreter against `requires-python`."""
    from packaging.specifiers import SpecifierSet

    wanted = minimum or _project()[0]
    ok = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    return Check("python", ok, f"{platform.python_version()} (needs {wanted})", f"install Python {wanted}")


def check_packages(requirements: list[str] | None = None) -> Check:
    """Installed versions against the bounds in pyproject.toml; every one that is wrong is named."""
    from packaging.requirements import Requirement

    wrong: list[str] = []
    wanted = [Requirement(text) for text in (requirements if requirements is not None else _project()[1])]
    for need in wanted:
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} missing (needs {need.specifier})")
            continue
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} {found} (needs {need.specifier})")
    detail = "; ".join(wrong) or f"{len(wanted)} packages within their bounds"
    return Check("packages", not wrong, detail, "reinstall with `pip install -e .` or `make setup`")


def check_torch(threads: int) -> Check:
    """Torch loads, and the configured threads have processors to run on."""
    import torch

    processors = len(os.sched_getaffinity(0))
    detail = f"torch {torch.__version__}, {threads} thread(s) configured, {processors} processor(s) usable"
    return Check("torch", threads <= processors, detail, f"set torch_threads to at most {processors}")


def check_onnxruntime() -> Check:
    """Onnxruntime loads and runs a graph of one node."""
    import numpy as np

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "doctor",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    # Old on purpose: the newest onnx may write a format that the installed onnxruntime cannot read yet.
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones(1, dtype=np.float32)})
    ok = bool(result[0] == 2.0)
    return Check("onnxruntime", ok, f"onnxruntime {onnxruntime.__version__}, 1 + 1 = {result[0]:g}", "reinstall it")


def check_workdir(workdir: Path) -> Check:
    """A file can be written there, or where the directory will be created."""
    place = _nearest_existing(workdir)
    hint = "choose another --workdir or correct its permissions"
    if not place.is_dir():
        return Check("workdir", False, f"{place} is a file, not a directory", hint)
    try:
        # An actual write: permission bits say nothing about read-only file systems and quotas.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "error")
        return Check("workdir", False, f"{place} cannot be written: {reason}, {error.strerror}", hint)
    if place == workdir:
        return Check("workdir", True, f"{workdir} is writable")
    return Check("workdir", True, f"{workdir} will be created in {place}")


def check_disk(workdir: Path, minimum: int = MIN_DISK_BYTES) -> Check:
    """Free space for replay, artefacts and bundles."""
    place = _nearest_existing(workdir)
    free = shutil.disk_usage(place).free
    detail = f"{free / _GIB:.1f} GiB free at {place} (needs {minimum / _GIB:.1f})"
    return Check("disk", free >= minimum, detail, "free some space or choose another --workdir")


def check_memory(minimum: int = MIN_MEMORY_BYTES, root: Path = Path("/")) -> Check:
    """Memory that can still be taken: the kernel's estimate, or the container's limit if that is lower."""
    available = _available_memory(root)
    if available is None:
        return Check("memory", True, f"unknown on {sys.platform}")
    detail = f"{available / _GIB:.1f} GiB available (needs {minimum / _GIB:.1f})"
    return Check("memory", available >= minimum, detail, "stop other work or raise the container's limit")


def check_data(config: DetentConfig) -> Check:
    """The configured bars can be read and pass validation."""
    from data.bars import open_source

    source = config.data.source
    bars = open_source(source).load()
    first, last = bars.index[0], bars.index[-1]
    return Check("data", True, f"{source.symbol}: {len(bars)} bars, {first:%Y-%m-%d} to {last:%Y-%m-%d}")


def check_registry(workdir: Path, config: DetentConfig) -> Check:
    """MLflow answers; nothing is created where there is none yet."""
    from pipeline.mlflow_access import local_uri, open_client, sqlite_path, translated, without_password

    uri = config.tracking.uri or local_uri(workdir)
    if uri.startswith("sqlite:") and not sqlite_path(uri).exists():
        return Check("registry", True, f"{sqlite_path(uri)} will be created by the first run")
    client = open_client(uri)
    with translated(uri):
        # Asking the registry, not only the tracking store: a server may offer one without the other.
        found = client.search_registered_models(f"name = '{config.tracking.model_name}'", max_results=1)
    known = "known" if found else "not yet registered"
    return Check("registry", True, f"{without_password(uri)} answers, {config.tracking.model_name} {known}")


# --- helpers ----------------------------------------------------------------------------------------------

_HINTS = {
    "data": "check data.source in the configuration",
    "registry": "start the MLflow server, or correct tracking.uri",
}


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        text = " ".join(str(error).split())
        hint = _HINTS.get(name, "reinstall with `pip install -e .` or `make setup`")
        return Check(name, False, f"{type(error).__name__}: {text}", hint)


def _project() -> tuple[str, list[str]]:
    """`requires-python` and run-time requirements, from the checkout if this is one, else from the metadata.

    The checkout comes first: after an edit of pyproject.toml the metadata of an editable install is stale.
    """
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        if project["name"] == "detent":
            return project["requires-python"], project["dependencies"]
    metadata = importlib.metadata.metadata("detent")
    requirements = [text for text in importlib.metadata.requires("detent") or [] if "extra ==" not in text]
    return metadata["Requires-Python"], requirements


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _nearest_existing(path.parent)


def _available_memory(root: Path) -> int | None:
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if match is None:
        return None
    available = int(match[1]) * 1024
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
        # File pages that the kernel drops on demand count as used, but can be taken.
        cache = re.search(r"^inactive_file (\d+)$", (root / "sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    return min(available, int(limit) - used + (int(cache[1]) if cache else 0))
