"""Golden decisions: inputs stored with the bundle and the outputs the training policy gave for them.

They prove on the serving machine, at load time, that this processor and this onnxruntime decide as training did.
Letters: G golden rows, S state columns, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from masking import HOLD
from serving.errors import BundleFormatError

Features = npt.NDArray[np.float32]
"""[B, M], raw units."""

PLAN_TOLERANCE = 1e-4
"""Largest difference of a plan's value between machines, relative to 1 + its size: a plan sums up many numbers."""
ROUNDED_APART = 0.05
"""Largest such difference where rounding sent a scenario another way, at a rung of the ladder or another threshold."""
GOLDEN_TOLERANCE = 1e-5
"""Largest probability difference between machines; another vector width moves float32 by about 1e-7."""
PLAN_FORMS = {
    "action_values": "-inf where masked, the plan's value at its action",
    "sequence": "one that begins with the action, Hold alone without a plan",
}
"""What holds of every plan, whatever its numbers."""
NLL_TOLERANCE = 1e-4
"""Largest difference of a likelihood between machines, in nats, on top of one part in 10,000."""
TIE = 1e-6
"""Two actions whose probabilities are this close may be chosen one for the other."""


class PolicyOutputs(NamedTuple):
    """Outputs of the policy graph, in graph order."""

    action: npt.NDArray[np.int64]
    """[B]."""
    probabilities: npt.NDArray[np.float32]
    """[B, A], exactly 0 where masked."""
    action_masks: npt.NDArray[np.bool_]
    """[B, A], rules and caller combined."""
    value: npt.NDArray[np.float32]
    """[B], 0 where there is no finite estimate."""
    fallback: npt.NDArray[np.bool_]
    """[B], True where the graph could not decide and took Hold."""


class PlannerOutputs(NamedTuple):
    """Outputs of the planner graph, in graph order. Letters: B batch, A actions, H horizon."""

    action: Any
    """int64 [B]: first action of the best valid sequence, Hold where there is none."""
    value: Any
    """[B]: of that sequence, 0 where there is none."""
    action_values: Any
    """[B, A]: of the best sequence that begins with each action, -inf where masked or never finite."""
    sequence: Any
    """int64 [B, H]: Hold from where all scenarios have ended."""
    action_masks: Any
    """bool [B, A]: rules and caller's masks combined; Hold alone where nothing is left."""
    fallback: Any
    """bool [B]: no plan, so it holds."""


class GoldenPlan(NamedTuple):
    """What the planner decided for the golden inputs, each row with its own number as seed."""

    action: npt.NDArray[np.int64]
    value: npt.NDArray[np.float32]
    fallback: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Golden:
    """Golden inputs and expected outputs.

    Attributes: state [G, S] raw, NaN allowed; caller_masks [G, A]; expected; uncertainty [G], NaN where the
        features are not finite; plan, None where the bundle has no planner; nll [G], nats per feature: of each row's
        features as if they followed those of the row before, the first those of the last; NaN where either are not
        finite, None where the bundle has no likelihood.
    """

    state: npt.NDArray[np.float32]
    caller_masks: npt.NDArray[np.bool_]
    expected: PolicyOutputs
    uncertainty: npt.NDArray[np.float32]
    plan: GoldenPlan | None = None
    nll: npt.NDArray[np.float32] | None = None

    @property
    def seeds(self) -> npt.NDArray[np.int64]:
        """Seeds [G] of the golden plans."""
        return np.arange(len(self.state), dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; NaN becomes None, float32 survives exactly."""
        arrays = {"state": self.state, "caller_masks": self.caller_masks, "uncertainty": self.uncertainty}
        arrays |= self.expected._asdict()
        if self.plan is not None:
            arrays |= {f"plan_{name}": array for name, array in self.plan._asdict().items()}
        if self.nll is not None:
            arrays["nll"] = self.nll
        return {name: _to_lists(array) for name, array in arrays.items()}

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], num_columns: int, num_actions: int, *, planner: bool = False, drift: bool = False
    ) -> Golden:
        """Inverse of `to_dict`. Raises: BundleFormatError naming the array that is missing or misshapen."""
        rows = len(raw["state"]) if isinstance(raw.get("state"), list) else 0
        if rows == 0:
            raise BundleFormatError("golden: state: expected at least one row, was none")
        shapes: dict[str, tuple[type[Any], tuple[int, ...]]] = {
            "state": (np.float32, (rows, num_columns)),
            "caller_masks": (np.bool_, (rows, num_actions)),
            "action": (np.int64, (rows,)),
            "probabilities": (np.float32, (rows, num_actions)),
            "action_masks": (np.bool_, (rows, num_actions)),
            "value": (np.float32, (rows,)),
            "fallback": (np.bool_, (rows,)),
            "uncertainty": (np.float32, (rows,)),
        }
        plans: dict[str, tuple[type[Any], tuple[int, ...]]] = {
            "plan_action": (np.int64, (rows,)),
            "plan_value": (np.float32, (rows,)),
            "plan_fallback": (np.bool_, (rows,)),
        }
        if planner:
            shapes |= plans
        if drift:
            shapes["nll"] = (np.float32, (rows,))
        if set(raw) != set(shapes):
            raise BundleFormatError(f"golden: expected {sorted(shapes)}, was {sorted(raw)}")
        arrays = {name: _to_array(name, raw[name], *form) for name, form in shapes.items()}
        for name in ("action", "plan_action") if planner else ("action",):
            found = _stranger(arrays[name], num_actions)
            if found is not None:
                raise BundleFormatError(f"golden: {name}: {found}")
        expected = PolicyOutputs(*(arrays[name] for name in PolicyOutputs._fields))
        plan = GoldenPlan(*(arrays[name] for name in plans)) if planner else None
        return cls(arrays["state"], arrays["caller_masks"], expected, arrays["uncertainty"], plan, arrays.get("nll"))


def following_rows(state: npt.NDArray[np.float32], num_features: int) -> tuple[Features, Features]:
    """Features of state rows [B, S] and, as if they came next, those of the row after; after the last comes the first.

    Returns: twice [B, M].
    """
    features = np.ascontiguousarray(state[:, :num_features])
    return features, np.roll(features, -1, axis=0)


def number_apart(
    expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32], *, tolerance: float, relative: float = 1e-4
) -> str | None:
    """Say where numbers [B] first differ by more than `tolerance + relative * abs(expected)`, or None; NaN equals NaN.

    Infinities are equal if their signs are.
    """
    wrong = ~np.isclose(actual, expected, rtol=relative, atol=tolerance, equal_nan=True)
    if not wrong.any():
        return None
    row = int(np.flatnonzero(wrong)[0])
    return f"row {row}: expected {expected[row]}, was {actual[row]} ({int(wrong.sum())} of {len(wrong)} rows differ)"


def plan_difference(
    expected: GoldenPlan,
    actual: PlannerOutputs,
    *,
    action_masks: npt.NDArray[np.bool_],
    horizon: int,
    tolerance: float,
    spare: int = 0,
) -> str | None:
    """Say where plans first differ, or None if they agree.

    Masks and fallback flags must be equal, values lie within `tolerance` relative to their size, actions be equal or
    tied within the same. A plan begins with its action and is worth what the best sequence from there is; a masked
    action is worth -inf and never taken; a row without a plan holds. What a sequence is worth needs the model to say.

    Args: expected; actual; action_masks [B, A]: of rules and caller; horizon: H; tolerance; spare: rows whose values
        may lie up to `ROUNDED_APART` apart, and whose actions then differ.
    """
    count, size = action_masks.shape
    forms: dict[str, tuple[type[Any], tuple[int, ...]]] = {
        "action": (np.int64, (count,)),
        "value": (np.float32, (count,)),
        "action_values": (np.float32, (count, size)),
        "sequence": (np.int64, (count, horizon)),
        "action_masks": (np.bool_, (count, size)),
        "fallback": (np.bool_, (count,)),
    }
    for name, (dtype, shape) in forms.items():
        got = getattr(actual, name)
        if got.shape != shape or got.dtype != dtype:
            return f"plan {name}: expected {np.dtype(dtype)} {list(shape)}, was {got.dtype} {list(got.shape)}"
    for name, actions in (("action", expected.action), ("action", actual.action), ("sequence", actual.sequence)):
        found = _stranger(actions, size)
        if found is not None:
            return f"plan {name}: {found}"
    rows = np.arange(count)
    slack = tolerance * (1.0 + np.abs(expected.value))
    held, values = actual.fallback, actual.action_values
    # A masked action is worth -inf, which is no warning's business.
    with np.errstate(invalid="ignore"):
        worth = np.abs(values[rows, actual.action] - actual.value) <= slack
        tied = worth & (np.abs(values[rows, expected.action] - actual.value) <= slack)
    # Written as "not within", so that NaN counts as a difference.
    apart = ~(np.abs(expected.value - actual.value) <= slack)
    if within_spare(apart, expected.value, actual.value, spare):
        tied, apart = tied | apart, np.zeros_like(apart)
    valid = np.where(held, actual.action == HOLD, action_masks[rows, actual.action])
    hold = np.where(held[:, None], HOLD, actual.sequence)
    bad = {
        "action_masks": (actual.action_masks != action_masks).any(axis=1),
        "fallback": expected.fallback != held,
        "value": apart,
        "action": ((expected.action != actual.action) & ~tied) | ~valid,
        "action_values": (~worth & ~held) | (~action_masks & (values != -np.inf)).any(axis=1),
        "sequence": (actual.sequence[:, 0] != actual.action) | (actual.sequence != hold).any(axis=1),
    }
    arrays = {**expected._asdict(), "action_masks": action_masks}
    for name, wrong in bad.items():
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            wanted = arrays[name][row].tolist() if name in arrays else PLAN_FORMS[name]
            return (
                f"plan {name}: row {row}: expected {wanted}, "
                f"was {getattr(actual, name)[row].tolist()} ({int(wrong.sum())} of {count} rows differ)"
            )
    return None


def spared(count: int) -> int:
    """Of so many rows, how many may be at a threshold: one in two hundred, and one more."""
    return 1 + count // 200


def within_spare(
    apart: npt.NDArray[np.bool_], expected: npt.NDArray[Any], actual: npt.NDArray[Any], spare: int
) -> bool:
    """Whether the rows [B] that are `apart` are few, and no further apart than rounding at a threshold explains."""
    near = np.abs(expected - actual) <= ROUNDED_APART * (1.0 + np.abs(expected))
    return int(apart.sum()) <= spare and bool(near[apart].all())


def difference(expected: PolicyOutputs, actual: PolicyOutputs, tolerance: float) -> str | None:
    """Say where two sets of decisions first differ, or None if they agree.

    Masks and fallback flags must be equal, probabilities lie within `tolerance`, values within `tolerance` relative
    to their size, actions be equal or tied within `TIE`, and a masked action must have probability exactly 0.
    """
    rows = np.arange(len(expected.action))
    for name, want in expected._asdict().items():
        got = getattr(actual, name)
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name}: expected {want.dtype} {list(want.shape)}, was {got.dtype} {list(got.shape)}"
    found = _stranger(actual.action, expected.probabilities.shape[1])
    if found is not None:
        return f"action: {found}"
    gap = np.abs(expected.probabilities - actual.probabilities)
    rival = expected.probabilities[rows, expected.action] - expected.probabilities[rows, actual.action]
    allowed = actual.action_masks[rows, actual.action] | actual.fallback
    bad = {
        "action_masks": (expected.action_masks != actual.action_masks).any(axis=1),
        "fallback": expected.fallback != actual.fallback,
        # Written as "not within", so that NaN counts as a difference.
        "probabilities": ~(gap <= tolerance).all(axis=1),
        "probabilities of masked actions": ((actual.probabilities != 0.0) & ~actual.action_masks).any(axis=1)
        & ~actual.fallback,
        "value": ~(np.abs(expected.value - actual.value) <= tolerance * (1.0 + np.abs(expected.value))),
        "action": (expected.action != actual.action) & ~((np.abs(rival) <= TIE) & allowed),
    }
    for name, wrong in bad.items():
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            field = name.split()[0]
            return (
                f"{name}: row {row}: expected {getattr(expected, field)[row].tolist()}, "
                f"was {getattr(actual, field)[row].tolist()} ({int(wrong.sum())} of {len(rows)} rows differ)"
            )
    return None


# The first number that is no action, in words.
def _stranger(actions: npt.NDArray[np.int64], num_actions: int) -> str | None:
    outside = actions[(actions < 0) | (actions >= num_actions)]
    return f"expected 0 to {num_actions - 1}, was {outside[0]}" if outside.size else None


def _to_lists(array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind != "f":
        return array.tolist()
    if np.isinf(array).any():
        raise ValueError("golden: expected finite numbers or NaN, found infinity")
    plain = array.astype(object)
    plain[np.isnan(array)] = None
    return plain.tolist()


def _to_array(name: str, value: Any, dtype: type[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        # float64 first: None becomes NaN there, and NaN must never turn into a bool or an integer.
        array = np.array(value, dtype=np.float64 if dtype is np.float32 else None)
    except (TypeError, ValueError) as error:
        raise BundleFormatError(f"golden: {name}: expected numbers {list(shape)}: {error}") from error
    if array.shape != shape or (dtype is not np.float32 and array.dtype != dtype):
        raise BundleFormatError(
            f"golden: {name}: expected {np.dtype(dtype)} {list(shape)}, was {array.dtype} {list(array.shape)}"
        )
    return array.astype(dtype)
