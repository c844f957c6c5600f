from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import array_api_compat
import numpy as np
import pytest
import torch
from masking_worlds import unregistering

from masking import RULES, ActionTable, RuleError, RuleSet, is_reduction, register_rule, trading_rules
from masking.conformance import _judge_with, check_rule, check_rule_set
from masking.probe_states import probe_states

HEAT = ("heat",)


@pytest.fixture(autouse=True)
def _own_rules() -> Iterator[None]:
    with unregistering():
        yield


def calm_entries():
    """The user's rule of the README."""

    @register_rule("calm_entries")
    @dataclass(frozen=True, kw_only=True)
    class CalmEntries:
        fields: ClassVar[tuple[str, ...]] = ("volatility_5", "position")
        limit: float = 0.4

        def __call__(self, state):
            return (state["volatility_5"] < self.limit) | is_reduction(state)

    return CalmEntries()


def broken(judge, *, fields=HEAT, **parameters):
    """A registered rule `broken` whose verdict is `judge(self, state)`."""

    def call(self, state):
        return judge(self, state)

    annotations = {name: type(value) for name, value in parameters.items()}
    namespace = {"__annotations__": annotations, "__call__": call, "fields": fields, **parameters}
    return register_rule("broken")(dataclass(frozen=True, kw_only=True)(type("Broken", (), namespace)))()


@pytest.mark.parametrize("rule", trading_rules(), ids=lambda rule: type(rule).name)
def test_every_trading_rule_conforms(rule):
    check_rule(rule, samples=128)


def test_every_registered_rule_is_among_those_checked():
    assert sorted(RULES) == sorted(type(rule).name for rule in trading_rules())


def test_the_trading_rules_conform_as_a_set_and_so_does_a_set_without_rules():
    check_rule_set(RuleSet(trading_rules(paper=True), ActionTable()), samples=128)
    check_rule_set(RuleSet([], ActionTable((-1.0, 0.0, 1.0))), samples=16)


def test_a_users_rule_of_six_lines_conforms_over_another_action_table():
    check_rule(calm_entries(), actions=ActionTable((-1.0, 0.0, 1.0)))


@pytest.mark.parametrize("rule", trading_rules(max_exposure=1.0), ids=lambda rule: type(rule).name)
def test_the_drawn_states_meet_every_rule_on_both_sides(rule):
    states = probe_states(RuleSet(trading_rules(), ActionTable()), {}, 256, np.random.default_rng(0))
    verdict = _judge_with(np.asarray, "NumPy", ActionTable())(rule, states, "purity")
    assert 0.05 < verdict[:, 1:].mean() < 0.95


def count_calls(rule, state):
    rule.calls.append(1)
    return (state["heat"] < 0.5) & (len(rule.calls) <= 50)


def in_place(rule, state):
    heat = state["heat"]
    heat *= 100
    return heat < 50


def float_verdict(rule, state):
    return (state["heat"] < 0.5) * 1.0


def flat_verdict(rule, state):
    return state["heat"][:, 0] < 0.5


def fail_open(rule, state):
    return ~(state["heat"] > rule.limit)


def read_another(rule, state):
    return (state["heat"] < 0.5) & (state.get("rain", state["heat"]) < 1)


def hotter_than_most(rule, state):
    xp = array_api_compat.array_namespace(state["heat"])
    return state["heat"] <= xp.mean(state["heat"])


def branch(rule, state):
    if bool(array_api_compat.array_namespace(state["heat"]).all(state["heat"] < 0.5)):
        return state["heat"] < float("inf")
    return state["heat"] < 0.5


def numpy_only(rule, state):
    return np.isin(state["heat"], [0.0, 1.0])


def unknown_anywhere(rule, state):
    xp = array_api_compat.array_namespace(state["heat"])
    return (state["heat"] < 0.5) & xp.all(xp.isfinite(state["heat"]))


def looser_in_torch(rule, state):
    return state["heat"] <= 0.0 if isinstance(state["heat"], torch.Tensor) else state["heat"] < 0.0


def looser_in_graphs(rule, state):
    return state["heat"] <= 0.0 if torch.compiler.is_exporting() else state["heat"] < 0.0


def of_three_rows(rule, state):
    return state["heat"] < (0.4 if state["heat"].shape[0] == 3 else 0.5)


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        pytest.param(
            count_calls,
            {"calls": []},
            r"rule 'broken', property 'purity': state \d+ \(heat=\S+\): expected .* \[0, 1, .*\], was \[\]; keep",
            id="stateful",
        ),
        pytest.param(
            in_place, {}, r"'broken' in NumPy, property 'fields': changed state\['heat'\]; the other", id="in-place"
        ),
        pytest.param(
            float_verdict,
            {},
            r"property 'verdict': expected bool \[64, 1\] or \[64, 7\] from float32, was float64 \[64, 1\]; return a",
            id="float",
        ),
        pytest.param(flat_verdict, {}, r"property 'verdict': .*was bool \[64\]; return a comparison", id="flat"),
        pytest.param(
            fail_open,
            {"limit": 0.5},
            r"property 'nan': state 0 .*heat=nan allows action 1, which heat=.* forbids; say what is allowed: `x",
            id="NaN opens",
        ),
        pytest.param(
            read_another, {}, r"property 'fields': read \['rain'\], declared are \['heat'\]; add", id="undeclared"
        ),
        pytest.param(
            lambda rule, state: state["rain"] < 1,
            {},
            r"property 'fields': read \['rain'\]",
            id="undeclared and missing",
        ),
        pytest.param(hotter_than_most, {}, r"property 'batch': state .*judge each row by its own values", id="mean"),
        pytest.param(branch, {}, r"property 'backends': cannot become an ONNX graph: .*; no `if`", id="branch"),
        pytest.param(
            numpy_only,
            {},
            r"in torch, property 'backends': expected Tensor, was ndarray; take functions",
            id="NumPy only",
        ),
        pytest.param(
            lambda rule, state: state["heat"].astype(np.float64) < 1,
            {},
            r"in torch, property 'backends': raised AttributeError: 'Tensor'.*; use array-API functions",
            id="NumPy method",
        ),
        pytest.param(
            unknown_anywhere,
            {},
            r"property 'closed': state .*a broken row must not reach its neighbours",
            id="poisoned batch",
        ),
        pytest.param(
            looser_in_torch,
            {},
            r"rule 'broken', property 'backends': state \d+ \(heat=-?0\): expected .* \[\], was \[0, 1, .*\]; torch",
            id="another verdict in torch",
        ),
        pytest.param(
            looser_in_graphs,
            {},
            r"property 'backends': .*ONNX graph at batch 1 must agree",
            id="another verdict in ONNX",
        ),
        pytest.param(
            of_three_rows, {}, r"property 'backends': cannot become an ONNX graph", id="a batch size written down"
        ),
        pytest.param(
            lambda rule, state: state["heat"] < 0.5,
            {"fields": "heat"},
            "rule 'broken': fields: expected a tuple of column names, was 'heat'",
            id="no tuple",
        ),
    ],
)
def test_a_broken_rule_is_named_with_what_to_do(judge, options, message):
    # A mutable default is refused by dataclasses, and rightly: the rule that counts keeps its list on the class.
    options = dict(options)
    calls = options.pop("calls", None)
    rule = broken(judge, **options)
    if calls is not None:
        type(rule).calls = calls
    with pytest.raises(RuleError, match=message):
        check_rule(rule, samples=64)


def test_a_rule_that_follows_the_first_row_shows_in_a_shuffled_batch():
    # Rows one by one, and a batch with a calm first row, give the same verdicts.
    rule = broken(lambda rule, state: (state["heat"] < 0.5) & (state["heat"][:1] < 0.5))
    with pytest.raises(RuleError, match=r"property 'batch': state .*expected .*\[0, 1, .*\], was \[\]; judge each row"):
        check_rule(rule, states={"heat": np.linspace(0, 1, 64)})


def test_a_limit_outside_the_parameters_would_be_lost_in_a_bundle():
    @register_rule("tuned")
    @dataclass(frozen=True, kw_only=True)
    class Tuned:
        fields: ClassVar[tuple[str, ...]] = HEAT
        limit: float = 0.0

        def __call__(self, state):
            return state["heat"] < self.limit + getattr(self, "extra", 0.0)

    rule = Tuned()
    check_rule(rule, samples=64)
    object.__setattr__(rule, "extra", 1.0)
    with pytest.raises(
        RuleError, match=r"'tuned', property 'description': state .*let the verdict depend on the dataclass"
    ):
        check_rule(rule, samples=64)


def test_another_class_under_the_name_of_a_rule_is_refused():
    rule = calm_entries()
    RULES["calm_entries"] = type(trading_rules()[0])
    with pytest.raises(
        RuleError,
        match="CalmEntries: expected the class that is registered as 'calm_entries', was another",
    ):
        check_rule(rule, samples=64)
    with pytest.raises(RuleError, match="expected a rule registered with @register_rule"):
        check_rule(object())


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (lambda self, seen: f"{seen['rain']} mm", "raised KeyError: 'rain'; it is called with the `fields` and"),
        (lambda self: "hot", "raised TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda self, seen: None, "expected text, was None; "),
    ],
)
def test_a_reason_that_finds_no_words_is_named(reason, message):
    rule = broken(lambda rule, state: state["heat"] < 0.5)
    type(rule).reason = reason
    with pytest.raises(RuleError, match=rf"'broken', property 'reason': state \d+ \(heat=.*\): {message}"):
        check_rule(rule, samples=16)
    type(rule).reason = lambda self, seen: f"{seen['heat']:g} before {seen['target_position']:g}"
    check_rule(rule, samples=16)


def test_a_rule_that_changes_an_array_it_shares_with_others_depends_on_its_place():
    @register_rule("greedy")
    @dataclass(frozen=True, kw_only=True)
    class Greedy:
        fields: ClassVar[tuple[str, ...]] = ("heat", "position")

        def __call__(self, state):
            # Pure by itself: but a rule set computes `is_reduction` once, for all rules.
            allowed = is_reduction(state)
            allowed |= state["heat"] < 0.5
            return allowed

    rules = [Greedy(), *trading_rules()]
    message = r"rules 'greedy', .*property 'order': state .*: expected allowed .*; let no rule depend on what another"
    for check in (lambda: check_rule(rules[0]), lambda: check_rule_set(RuleSet(rules, ActionTable()))):
        with pytest.raises(RuleError, match=message):
            check()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda column: isinstance(column, np.ndarray), "property 'closed': state .*declare every column"),
        (lambda column: isinstance(column, torch.Tensor) and not torch.compiler.is_exporting(), "torch must agree"),
        (lambda column: torch.compiler.is_exporting(), "the ONNX graph at batch 1 must agree"),
    ],
    ids=["NumPy", "torch", "ONNX"],
)
def test_a_rule_set_that_opens_to_broken_values_in_one_library_is_found(where, message):
    class Trusting(RuleSet):
        def __call__(self, state):
            xp = array_api_compat.array_namespace(state["position"])
            if where(state["position"]):
                state = {name: xp.where(xp.isfinite(column), column, 0.0) for name, column in state.items()}
            return super().__call__(state)

    with pytest.raises(RuleError, match=message):
        check_rule_set(Trusting(trading_rules()[:1], ActionTable()), samples=16)


def test_given_states_replace_the_drawn_ones():
    def root(rule, state):
        xp = array_api_compat.array_namespace(state["heat"])
        return xp.sqrt(state["heat"]) < 0.5

    rule = broken(root)
    with pytest.raises(RuleError, match="raised RuntimeWarning: invalid value encountered in sqrt"):
        check_rule(rule, samples=64)
    check_rule(rule, states={"heat": np.linspace(0, 1, 50)})


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"heat": np.zeros(9), "rain": np.zeros(9)}, r"states: expected columns .*'heat'.*, was \['rain'\]"),
        ({"heat": np.zeros(2)}, "states: expected at least 3 rows, was 2"),
        ({"heat": np.array([0.0, np.nan, 1.0])}, r"states\['heat'\]: expected finite \[3\].*added by the check"),
        ({"heat": np.zeros((3, 1))}, r"states\['heat'\]: expected finite \[3\], was \[3, 1\]"),
    ],
)
def test_states_that_cannot_be_used_are_refused(states, message):
    with pytest.raises(RuleError, match=message):
        check_rule(broken(lambda rule, state: state["heat"] < 0.5), states=states)


def test_nothing_of_the_backends_is_loaded_before_a_check():
    code = "import masking.conformance, sys; assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
