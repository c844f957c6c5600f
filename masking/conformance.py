"""Does a rule keep its contract? One call judges any registered rule, in every form in which it will run.

| property | what must hold |
| --- | --- |
| description | rebuilt from its name and its parameters as JSON, as a bundle does, it judges the same |
| fields | it reads its declared `fields` and `target_position`, nothing else, and changes none of them |
| verdict | bool `[B, 1]` or `[B, A]`, from float32 and from float64 columns |
| purity | the same states get the same verdict, whatever was judged in between |
| batch | a row is judged by itself: alone, in a batch, in a reversed and in a shuffled one |
| nan | a NaN allows nothing that some finite value would forbid |
| closed | a non-finite field leaves only Hold in its row and changes no other row |
| reason | a `reason`, where the rule has one, finds words for a denial |
| order | masks are the AND of the rules, wherever a rule stands among others |
| backends | NumPy, torch, the exported ONNX graph at batch 1, 2 and 64, and array-API-strict if installed agree |

Call it in a test of your own rule; it needs torch, onnx and onnxruntime, which no other part of the kernel loads.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from masking.actions import HOLD, ActionTable
from masking.errors import RuleError
from masking.probe_states import Columns, broken_rows, probe_states, take_rows
from masking.rules import Rule, State, trading_rules
from masking.ruleset import RuleSet, rule_name

BATCHES = (1, 2, 64)
"""Batch sizes at which the exported graph is compared."""
NAN_ROWS, NAN_VALUES = 32, 64
"""States whose fields are set to NaN, and finite values that a NaN is compared with."""
_EVALUATE = "use array-API functions and comparisons of named columns only"

_Masks = NDArray[np.bool_]
_Judge = Callable[[Rule, Columns, str], _Masks]


def check_rule(
    rule: Rule,
    *,
    actions: ActionTable = ActionTable(),  # noqa: B008 - frozen
    states: Mapping[str, Any] | None = None,
    samples: int = 256,
    seed: int = 0,
) -> None:
    """Check one rule: alone, and at every place among the trading rules.

    Args: states: columns [N] of finite values for the fields whose range matters, e.g. `{"weekday": days}`. All
        other columns are drawn with `seed`: half of the values on and beside the numbers among the rule's
        parameters, half spread over their scale. `samples` is N when no column is given.
    Raises: RuleError naming rule, property, the first state that fails, what was expected and what to do.
    """
    alone = RuleSet([rule], actions)
    others = [other for other in trading_rules() if rule_name(other) != rule_name(rule)]
    together = RuleSet([rule, *others], actions)
    probes = probe_states(together, states or {}, samples, np.random.default_rng(seed))
    _check_verdicts(rule, probes, actions)
    _check_closed(alone, probes)
    _check_order(together, probes)
    _check_backends(alone, probes)


def check_rule_set(
    rule_set: RuleSet,
    *,
    states: Mapping[str, Any] | None = None,
    samples: int = 256,
    seed: int = 0,
) -> None:
    """Check every rule of a set, and the set as a whole; arguments and errors are those of `check_rule`."""
    probes = probe_states(rule_set, states or {}, samples, np.random.default_rng(seed))
    for rule in rule_set.rules:
        _check_verdicts(rule, probes, rule_set.actions)
    _check_closed(rule_set, probes)
    _check_order(rule_set, probes)
    _check_backends(rule_set, probes)


def _check_verdicts(rule: Rule, states: Columns, actions: ActionTable) -> None:
    subject = _subject(rule)
    judge = _judge_with(np.asarray, "NumPy", actions)
    first = judge(rule, states, "purity")
    seen = {name: states[name] for name in rule.fields}

    count = len(states["position"])
    singles = np.concatenate([judge(rule, take_rows(states, slice(row, row + 1)), "batch") for row in range(count)])
    again = judge(rule, states, "purity")
    _require_equal(subject, "purity", first, again, seen, "keep nothing between calls and draw nothing at random")
    advice = "judge each row by its own values, never by a mean, maximum or any() over the batch"
    _require_equal(subject, "batch", singles, first, seen, advice)
    for order in (np.arange(count)[::-1], np.random.default_rng(0).permutation(count)):
        moved = judge(rule, take_rows(states, order), "batch")
        _require_equal(subject, "batch", first[order], moved, take_rows(seen, order), advice)

    rebuilt = judge(_rebuilt(rule, actions), states, "description")
    advice = "let the verdict depend on the dataclass fields alone"
    _require_equal(subject, "description", first, rebuilt, seen, advice)
    _check_nan(rule, states, actions, judge)
    _check_reason(rule, first, seen, actions)

    for dtype in (np.float32, np.float64):
        typed = {name: column.astype(dtype) for name, column in states.items()}
        expected = judge(rule, typed, "verdict")
        for label, asarray in _libraries():
            same = _judge_with(asarray, label, actions)(rule, typed, "backends")
            _require_equal(subject, "backends", expected, same, seen, f"{label} must agree with NumPy: {_EVALUATE}")


def _rebuilt(rule: Rule, actions: ActionTable) -> Rule:
    description = json.dumps(RuleSet([rule], actions).to_dict(), allow_nan=False)
    return RuleSet.from_dict(json.loads(description)).rules[0]


def _check_reason(rule: Rule, allowed: _Masks, seen: Columns, actions: ActionTable) -> None:
    denied = np.argwhere(~allowed[:, HOLD + 1 :])
    if not hasattr(rule, "reason") or not len(denied):
        return
    row, factor = denied[0]
    observed = {name: float(column[row]) for name, column in seen.items()}
    problem = f"{_row_text(seen, row)}: "
    advice = "it is called with the `fields` and `target_position` of one denied action, as floats, and returns text"
    try:
        words = rule.reason({**observed, "target_position": actions.factors[factor]})
    except Exception as error:
        problem += f"raised {type(error).__name__}: {_first_line(error)}"
        _refuse(_subject(rule), "reason", problem, advice, error)
    if not isinstance(words, str):
        _refuse(_subject(rule), "reason", f"{problem}expected text, was {words!r}", advice)


def _check_nan(rule: Rule, states: Columns, actions: ActionTable, judge: _Judge) -> None:
    rows = take_rows(states, slice(NAN_ROWS))
    count = len(rows["position"])
    for name in rule.fields:
        with np.errstate(all="ignore"):
            unknown = judge(rule, {**rows, name: np.full_like(rows[name], np.nan)}, "nan")
        values = np.unique(states[name])
        values = values[:: max(len(values) // NAN_VALUES, 1)]
        tiled = {column: np.repeat(cells, len(values)) for column, cells in rows.items()}
        tiled[name] = np.tile(values, count)
        known = judge(rule, tiled, "nan").reshape(count, len(values), actions.num_actions)
        opened = unknown[:, None] & ~known
        opened[..., HOLD] = False
        if opened.any():
            row, value, action = np.argwhere(opened)[0]
            seen = _row_text({column: rows[column] for column in rule.fields}, row)
            problem = f"{seen}: {name}=nan allows action {action}, which {name}={values[value]:.9g} forbids"
            advice = "say what is allowed: `x <= limit` is False for NaN, `~(x > limit)` is True"
            _refuse(_subject(rule), "nan", problem, advice)


def _check_closed(rule_set: RuleSet, states: Columns) -> None:
    subject = _subject(*rule_set.rules)
    healthy = _masks(rule_set, states, "closed")
    broken = broken_rows(rule_set, states)
    both = {name: np.concatenate([cells, broken[name]]) for name, cells in states.items()}
    masks = _masks(rule_set, both, "closed")
    count = len(healthy)
    advice = "a broken row must not reach its neighbours"
    _require_equal(subject, "closed", healthy, masks[:count], states, advice)
    only_hold = np.zeros_like(masks[count:])
    only_hold[:, HOLD] = True
    advice = "declare every column that is read in `fields`"
    _require_equal(subject, "closed", only_hold, masks[count:], broken, advice)


def _check_order(rule_set: RuleSet, states: Columns) -> None:
    rules, actions = rule_set.rules, rule_set.actions
    advice = "let no rule depend on what another one did: share no object, change no array that is not your own"
    expected = _masks(RuleSet([], actions), states, "order")
    for rule in rules:
        expected = expected & _masks(RuleSet([rule], actions), states, "order")
    for first in range(len(rules)):
        for order in ((*rules[first:], *rules[:first]), (*rules[first::-1], *rules[:first:-1])):
            masks = _masks(RuleSet(order, actions), states, "order")
            _require_equal(_subject(*order), "order", expected, masks, states, advice)


def _check_backends(rule_set: RuleSet, states: Columns) -> None:
    subject = _subject(*rule_set.rules)
    broken = broken_rows(rule_set, states)
    states = {name: np.concatenate([states[name], broken[name]]).astype(np.float32) for name in rule_set.fields}
    expected = _masks(rule_set, states, "backends")
    for label, asarray in _libraries():
        masks = _masks(rule_set, {name: asarray(cells.copy()) for name, cells in states.items()}, "backends")
        _require_equal(subject, "backends", expected, masks, states, f"{label} must agree with NumPy: {_EVALUATE}")
    graph = _onnx_graph(rule_set, subject)
    rows = np.stack([states[name] for name in rule_set.fields], axis=1)
    for size in BATCHES:
        masks = np.concatenate([graph(rows[first : first + size]) for first in range(0, len(rows), size)])
        label = f"the ONNX graph at batch {size} must agree with NumPy"
        _require_equal(subject, "backends", expected, masks, states, f"{label}: {_EVALUATE}")


def _judge_with(asarray: Callable[[Any], Any], label: str, actions: ActionTable) -> _Judge:
    """A function that evaluates a rule in one library and holds it to `fields` and `verdict`: masks [N, A]."""

    def judge(rule: Rule, states: Columns, prop: str) -> _Masks:
        subject = f"{_subject(rule)} in {label}"
        columns = {name: asarray(states[name][:, None].copy()) for name in rule.fields}
        columns["target_position"] = actions.target_positions(asarray(states["position"].copy()))
        kept = {name: np.asarray(column).copy() for name, column in columns.items()}
        state = _DeclaredState(columns)
        try:
            verdict = rule(state)
        except Exception as error:
            if not state.undeclared:
                problem = f"raised {type(error).__name__}: {_first_line(error)}"
                _refuse(subject, prop, problem, _EVALUATE, error)
            verdict = None
        if state.undeclared:
            problem = f"read {state.undeclared}, declared are {list(rule.fields)}"
            _refuse(subject, "fields", problem, "add them to `fields`, or a broken value in them goes unnoticed")
        for name, column in columns.items():
            if not np.array_equal(np.asarray(column), kept[name], equal_nan=True):
                problem = f"changed state[{name!r}]"
                _refuse(subject, "fields", problem, "the other rules read it too: compute a new array instead")
        xp = array_api_compat.array_namespace(columns["target_position"])
        count = len(states["position"])
        shapes = {(count, 1), (count, actions.num_actions)}
        if not isinstance(verdict, type(columns["target_position"])):
            problem = f"expected {type(columns['target_position']).__name__}, was {type(verdict).__name__}"
            _refuse(subject, prop, problem, "take functions from `array_api_compat.array_namespace(column)`")
        if verdict.dtype != xp.bool or tuple(verdict.shape) not in shapes:
            problem = (
                f"expected bool [{count}, 1] or [{count}, {actions.num_actions}] from {states['position'].dtype}, "
                f"was {verdict.dtype} {list(verdict.shape)}"
            )
            _refuse(subject, "verdict", problem, "return a comparison, True where allowed")
        return np.broadcast_to(np.asarray(verdict), (count, actions.num_actions))

    return judge


def _masks(rule_set: RuleSet, states: Mapping[str, Any], prop: str) -> _Masks:
    try:
        # Broken values are judged on purpose; that NumPy warns of them is no failure.
        with np.errstate(all="ignore"):
            return np.asarray(rule_set(states))
    except Exception as error:
        problem = f"raised {type(error).__name__}: {_first_line(error)}"
        _refuse(_subject(*rule_set.rules), prop, problem, _EVALUATE, error)


class _DeclaredState(Mapping[str, Any]):
    """The declared columns; remembers what else was asked for, `get` and `in` included."""

    def __init__(self, columns: State) -> None:
        self._columns = columns
        self.undeclared: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            self.undeclared.append(name)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _libraries() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    import torch

    yield "torch", torch.asarray
    if importlib.util.find_spec("array_api_strict"):
        import array_api_strict

        yield "array-API-strict", array_api_strict.asarray


def _onnx_graph(rule_set: RuleSet, subject: str) -> Callable[[NDArray[np.float32]], _Masks]:
    import onnxruntime

    from masking.rules_graph import rule_set_onnx

    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(rule_set_onnx(rule_set), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        problem = f"cannot become an ONNX graph: {type(error).__name__}: {_first_line(error)}"
        advice = "no `if`, loop, float() or bool() on values: combine conditions with & and |, choose with xp.where"
        _refuse(subject, "backends", problem, advice, error)

    def masks(rows: NDArray[np.float32]) -> _Masks:
        try:
            return np.asarray(session.run(["action_masks"], {"state": rows})[0])
        except Exception as error:
            problem = f"its ONNX graph cannot judge {len(rows)} rows: {_first_line(error)}"
            _refuse(subject, "backends", problem, "take every shape from a column, write no batch size", error)

    return masks


def _require_equal(subject: str, prop: str, expected: Any, actual: Any, states: Columns, advice: str) -> None:
    if np.array_equal(expected, actual):
        return
    if expected.shape != actual.shape or actual.dtype != np.bool_:
        _refuse(subject, prop, f"expected bool {list(expected.shape)}, was {actual.dtype} {list(actual.shape)}", advice)
    row = int(np.flatnonzero((expected != actual).any(axis=1))[0])
    allowed = [np.flatnonzero(masks[row]).tolist() for masks in (expected, actual)]
    problem = f"{_row_text(states, row)}: expected allowed actions {allowed[0]}, was {allowed[1]}"
    _refuse(subject, prop, problem, advice)


def _row_text(states: Columns, row: int) -> str:
    return f"state {row} ({', '.join(f'{name}={column[row]:.9g}' for name, column in states.items())})"


def _subject(*rules: Rule) -> str:
    names = [repr(rule_name(rule)) for rule in rules]
    return f"rule {names[0]}" if len(names) == 1 else f"rules {', '.join(names)}"


def _refuse(subject: str, prop: str, problem: str, advice: str, cause: BaseException | None = None) -> NoReturn:
    raise RuleError(f"{subject}, property {prop!r}: {problem}; {advice}") from cause


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
