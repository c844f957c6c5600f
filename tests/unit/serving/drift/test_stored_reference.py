"""What training saw, as a file: exact, and refused where it is not as written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drift_parts import FAST, WINDOW, autoregressions, nats, verdict

from data import DataError, canonical_json
from serving.drift.monitor import DriftReference, DriftSettings
from serving.errors import BundleFormatError


def test_reference_survives_its_file_exactly(reference):
    text = canonical_json(reference.to_dict())
    again = DriftReference.from_dict(json.loads(text))
    assert canonical_json(again.to_dict()) == text
    assert (again.edges.dtype, again.counts.dtype) == (np.float32, np.int64)
    rng = np.random.default_rng(17)
    rows, nll = autoregressions(rng, 1, WINDOW, FAST)[0] + 0.5, nats(rng, WINDOW)
    assert verdict(again, rows, nll) == verdict(reference, rows, nll)
    without = DriftReference.fit(["one"], rng.standard_normal((500, 1)))
    assert DriftReference.from_dict(without.to_dict()).nll is None


def test_fit_is_deterministic():
    values = autoregressions(np.random.default_rng(18), 1, 600, FAST)[0]
    first, second = (DriftReference.fit("abcd", values).to_dict() for _ in range(2))
    assert first == second


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format_version", 2), "format_version"),
        (_set("window", 60.5), "window"),
        (_set("window", 5), "window"),
        (_set("names", []), "names"),
        (_set("names", ["a", "a", "b", "c"]), "names: expected each once"),
        (_set("names", ["a", "b", "c"]), "edges: expected 3 entries"),
        (_set("more", 1), "more"),
        (lambda raw: raw.pop("psi"), "psi"),
        (lambda raw: raw["edges"][0].reverse(), "edges: expected ascending"),
        (lambda raw: raw["edges"][0].pop(), "edges.0"),
        (lambda raw: raw["edges"][0].__setitem__(0, float("nan")), "edges.0"),
        (lambda raw: raw["counts"][1].__setitem__(3, -1), "counts.1.3"),
        (lambda raw: raw["counts"][1].__setitem__(3, 10**6), "counts: expected the same number"),
        (_set("psi_expected", [0.1]), "psi_expected: expected 4 entries"),
        (_set("psi.spread", [0.0] * 4), "psi.spread.0"),
        (_set("ks.centre", [0.1]), "ks.centre: expected 4"),
        (_set("ks.tail.windows", 0.0), "ks.tail.windows"),
        (_set("ks.tail.skew", 3.0), "ks.tail.skew"),
        (_set("nll.mean", "1.0"), "nll.mean"),
        (lambda raw: raw["nll"]["quantiles"].reverse(), "nll.quantiles: expected ascending"),
        (lambda raw: raw["nll"]["quantiles"].pop(), "nll.quantiles"),
    ],
)
def test_file_that_is_not_as_written_is_refused(reference, change, words):
    raw = copy.deepcopy(reference.to_dict())
    change(raw)
    with pytest.raises(BundleFormatError, match=rf"^drift\.json: .*{words}"):
        DriftReference.from_dict(raw)


def test_file_that_is_no_object_is_refused():
    with pytest.raises(BundleFormatError, match=r"^drift\.json: "):
        DriftReference.from_dict([])  # type: ignore[arg-type]


def test_rows_that_nothing_can_be_learned_from_are_refused():
    rows = np.zeros((240, 2))
    with pytest.raises(DataError, match="values: expected at least 240 rows, was 239"):
        DriftReference.fit("ab", rows[1:])
    bad = rows.copy()
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match="values: expected finite numbers, 1 are not"):
        DriftReference.fit("ab", bad)
    with pytest.raises(DataError, match="nll: expected at least 180 rows, was 10"):
        DriftReference.fit("ab", rows, np.zeros(10))
    with pytest.raises(ValueError, match=r"values: expected \[T, 3\], was \[240, 2\]"):
        DriftReference.fit("abc", rows)
    with pytest.raises(ValueError, match=r"nll: expected \[N\]"):
        DriftReference.fit("ab", rows, rows)
    with pytest.raises(ValueError, match="window: expected at least 12 bars, was 11"):
        DriftReference.fit("ab", rows, window=11)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"psi_warning": 0.3}, "psi_warning"),
        ({"psi_warning": -0.1}, "psi_warning"),
        ({"psi_alarm": float("nan")}, "psi_alarm"),
        ({"alarm_rate": 0.0}, "alarm_rate"),
        ({"alarm_rate": 0.02}, "alarm_rate"),
        ({"warning_rate": 0.5}, "warning_rate"),
    ],
)
def test_settings_that_contradict_are_refused(changes, field):
    with pytest.raises(ValueError, match=f"^drift: .*{field}"):
        DriftSettings(**changes)


def test_serving_process_needs_no_scipy_for_it():
    code = (
        "import sys, serving.drift.monitor\n"
        "print(sorted({'scipy', 'pandas', 'torch', 'mlflow', 'gymnasium', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
