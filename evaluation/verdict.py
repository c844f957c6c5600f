"""Switch, wait or stay: the registered rules applied to what was measured.

`docs/evaluation.md` says why the thresholds are what they are. Safety is shown by intervals, not by the absence of
evidence: a sample too small to rule a loss out is undecided, and nobody switches on it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from configs.evaluation import VerdictConfig
from evaluation.statistics.interval import Interval, NotDecidable
from evaluation.statistics.limits import KillSwitchTest, NonInferiority
from evaluation.statistics.power import paths_needed, seeds_needed
from evaluation.statistics.sharpe import SharpeDifference


class Question(NamedTuple):
    """How people read a criterion."""

    label: str
    measure: str
    """What is held against the threshold."""
    asked: str
    """On which side of the threshold it must lie."""
    format: str
    """Python format of measure and threshold."""
    unit: str = ""
    """Of both, where the format does not say it."""
    detail: str = ""
    """What the label leaves open, where there is room for it."""
    decides: bool = True
    """Whether it counts for the decision; what does not is reported beside it."""


QUESTIONS = {
    "sharpe_point": Question("Sharpe gain, point estimate", "estimate", "asked for at least", "+.3f", "per year"),
    "sharpe_above_zero": Question(
        "Sharpe gain exists",
        "lower end of the gain",
        "asked for more than",
        "+.3f",
        "per year",
        detail="lower end above 0",
    ),
    "sharpe_full_margin": Question(
        "full gain established",
        "lower end of the gain",
        "at least",
        "+.3f",
        "per year",
        detail="reported, decides nothing",
        decides=False,
    ),
    "exposure": Question("enough at stake", "mean exposure", "asked for at least", ".3f", "of equity"),
    "drawdown": Question("drawdown not worse", "upper end of the difference", "allowed below", "+.1%"),
    "kill_switch": Question("kill switch not more frequent", "upper end of the difference", "allowed below", "+.1%"),
    "latency": Question("decides in time", "upper bound on p99", "allowed up to", ".2f", "ms"),
    "valid_actions": Question("no forbidden action", "chosen", "allowed", ".0f"),
    "instrument": Question("instrument passed its checks", "failed checks", "allowed", ".0f"),
}
"""The registered questions by the names of their criteria."""


class Decision(StrEnum):
    """What to do with the challenger."""

    GO = "GO"
    CONDITIONAL = "CONDITIONAL"
    NO_GO = "NO-GO"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One registered question and its answer."""

    name: str
    passed: bool | None
    """None: cannot be decided with this sample."""
    observed: float
    """What is compared with the threshold; NaN where there is nothing to compare."""
    threshold: float
    reason: str
    """A sentence with the numbers."""
    settled_by: str = ""
    """What would decide it, where it is undecided or short of the registered gain."""

    @property
    def question(self) -> Question:
        """How people read it. Raises: KeyError on a name that is not registered."""
        return QUESTIONS[self.name]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; NaN and infinity become None, because JSON has neither."""
        numbers = {"observed": self.observed, "threshold": self.threshold}
        return {
            **asdict(self),
            "label": self.question.label,
            "measure": self.question.measure,
            "unit": self.question.unit or ("share" if self.question.format.endswith("%") else ""),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }


@dataclass(frozen=True)
class Verdict:
    """A decision, everything it rests on, and what to do next."""

    decision: Decision
    criteria: tuple[Criterion, ...]
    headline: str
    next_step: str

    def criterion(self, name: str) -> Criterion:
        """Return one criterion. Raises: KeyError on an unknown name."""
        return {criterion.name: criterion for criterion in self.criteria}[name]

    @property
    def at_full_margin(self) -> bool:
        """The lower bound itself reaches the registered gain; more than GO asks for."""
        return self.criterion("sharpe_full_margin").passed is True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "decision": str(self.decision),
            "headline": self.headline,
            "next_step": self.next_step,
            "at_full_margin": self.at_full_margin,
            "criteria": [criterion.to_dict() for criterion in self.criteria],
        }


def decide(
    challenger: str,
    baseline: str,
    *,
    sharpe: SharpeDifference | NotDecidable,
    drawdown: NonInferiority | NotDecidable,
    kill_switch: KillSwitchTest | NotDecidable,
    latency_ms: float | NotDecidable | None,
    invalid_actions: int,
    exposures: tuple[float, float],
    failed_checks: tuple[str, ...] | None,
    config: VerdictConfig,
    unit: str = "path",
) -> Verdict:
    """Apply the registered rules.

    - GO: the Sharpe gain is at least `min_sharpe_gain` and its lower bound above 0; enough is at stake to speak of a
      Sharpe ratio; drawdown not worse, kill switch not more frequent, latency within budget, no invalid action; the
      instrument failed none of its checks.
    - NO-GO: a safety criterion is violated, or the gain is too small and not even established to exist.
    - CONDITIONAL: anything between, with what would settle it.

    Whether the lower bound reaches the full gain is reported beside, and decides nothing. NaN never passes.

    Args:
        sharpe, drawdown, kill_switch: challenger minus baseline on identical bars, at the level and margins of
            `config`; what raised `NotDecidable` is passed as that error.
        latency_ms: upper bound on the 99th percentile of a decision; None if it was not measured.
        invalid_actions: forbidden actions of the challenger, over all runs.
        exposures: mean |position| of the challenger and of the baseline, multiples of equity.
        failed_checks: what the instrument failed, in words: a measurement by it forbids GO, but condemns nobody; None
            if a suite made no check at all.
        unit: what drawdowns and kill switches were counted on, "path" or "fold".
    Raises: ValueError where a measurement was made at another level or margin than registered.
    """
    _check_registered(sharpe, drawdown, kill_switch, config)
    gain = _sharpe_criteria(sharpe, config)
    safety = (
        _not_worse("drawdown", "mean maximum drawdown", drawdown, config.drawdown_margin, unit),
        _not_worse(
            "kill_switch",
            "kill-switch rate",
            kill_switch if isinstance(kill_switch, NotDecidable) else kill_switch.difference,
            config.kill_switch_margin,
            unit,
        ),
        _latency(latency_ms, config.latency_budget_ms),
        Criterion(
            name="valid_actions",
            passed=bool(invalid_actions == 0),
            observed=invalid_actions,
            threshold=0,
            reason=f"{invalid_actions} forbidden actions chosen, allowed 0",
        ),
    )
    point, above_zero, full = gain
    exposure = _exposure(*exposures, config)
    # A walk-forward, which counts folds, has no truth to check an instrument against.
    instrument = () if unit == "fold" else (_instrument(failed_checks),)
    asked = (point, above_zero, exposure, *safety, *instrument)
    violated = [criterion for criterion in safety if criterion.passed is False]
    if violated or (point.passed is False and above_zero.passed is False):
        decision, against = Decision.NO_GO, violated or [point, above_zero]
        next_step = f"Keep {baseline}: {'; '.join(dict.fromkeys(c.reason for c in against))}."
        next_step += "".join(f" {_capital(one.settled_by)}." for one in instrument if one.passed is False)
    elif all(criterion.passed for criterion in asked):
        decision = Decision.GO
        next_step = f"Switch to {challenger}; {full.reason}."
    else:
        decision = Decision.CONDITIONAL
        steps = dict.fromkeys(c.settled_by or c.reason for c in asked if not c.passed)
        next_step = f"Keep {baseline} for now. {' '.join(f'{_capital(step)}.' for step in steps)}"
    criteria = (*gain, exposure, *safety, *instrument)
    return Verdict(decision, criteria, _headline(decision, challenger, baseline, sharpe), next_step)


def _sharpe_criteria(sharpe: SharpeDifference | NotDecidable, config: VerdictConfig) -> tuple[Criterion, ...]:
    names = ("sharpe_point", "sharpe_above_zero", "sharpe_full_margin")
    thresholds = (config.min_sharpe_gain, 0.0, config.min_sharpe_gain)
    if isinstance(sharpe, NotDecidable):
        return tuple(
            _undecided(name, "Sharpe gain", threshold, sharpe)
            for name, threshold in zip(names, thresholds, strict=True)
        )
    interval, wanted = sharpe.interval, config.min_sharpe_gain
    bound = f"lower end of the {_percent(interval.level)} interval {interval.low:.3f}"
    point = Criterion(
        name=names[0],
        passed=bool(interval.estimate >= wanted),
        observed=interval.estimate,
        threshold=wanted,
        reason=f"annual Sharpe gain {interval.estimate:.3f}, asked for at least {wanted:.2f}",
        settled_by=_settles_point(sharpe, config),
    )
    if sharpe.seeds == 1:
        # Another training run may come out differently, and nothing here says by how much.
        too_few = NotDecidable(1, "training runs", f"{bound} leaves the spread between training runs out")
        return (
            point,
            _undecided(names[1], "sign of the Sharpe gain", thresholds[1], too_few),
            _undecided(names[2], "full Sharpe gain", thresholds[2], too_few),
        )
    above_zero = Criterion(
        name=names[1],
        passed=bool(interval.low > 0.0),
        observed=interval.low,
        threshold=0.0,
        reason=f"{bound}, asked for more than 0 (HAC cross-check {sharpe.hac.low:.3f})",
        settled_by=_settles_bound(sharpe, config),
    )
    is_full = bool(interval.low >= wanted)
    full = Criterion(
        name=names[2],
        passed=is_full,
        observed=interval.low,
        threshold=wanted,
        reason=f"a gain of {wanted:.2f} or more is {'' if is_full else 'not '}established, {bound}",
    )
    return point, above_zero, full


def _settles_point(sharpe: SharpeDifference, config: VerdictConfig) -> str:
    interval, wanted = sharpe.interval, config.min_sharpe_gain
    if not 0.0 < interval.estimate < wanted:
        return ""
    smaller = f"the gain of {interval.estimate:.3f} is less than the {wanted:.2f} asked for: say whether it is enough"
    if interval.high < wanted:
        return f"{smaller}; that it is smaller is established, upper end {interval.high:.3f}"
    return f"{smaller}, or tell it apart from {wanted:.2f} with {_sample(sharpe, wanted - interval.estimate, config)}"


def _settles_bound(sharpe: SharpeDifference, config: VerdictConfig) -> str:
    interval = sharpe.interval
    if not (interval.estimate > 0.0 and interval.low <= 0.0):
        return ""
    return (
        f"were the gain truly {interval.estimate:.3f}, its lower bound would exceed 0 with "
        f"{_sample(sharpe, interval.estimate, config)}"
    )


# How large a sample shows a gain, in words.
def _sample(sharpe: SharpeDifference, gain: float, config: VerdictConfig) -> str:
    if sharpe.seeds == 1:
        return "more training runs: one says nothing of others"
    paths = paths_needed(sharpe, gain, power=config.power)
    seeds = seeds_needed(sharpe, gain, power=config.power)
    ways = []
    if paths is not None and sharpe.paths > 1:
        ways.append(f"{max(paths - sharpe.paths, 1)} more paths")
    elif paths is not None:
        ways.append(f"{max(paths - 1, 1) * sharpe.bars:,} more bars, {max(paths - 1, 1)} times this series")
    if seeds is not None:
        ways.append(f"{max(seeds - sharpe.seeds, 1):,} more training runs")
    size = " or ".join(ways) or "more training runs and more paths together, neither alone is enough"
    return f"{size} (at {_percent(config.power)} power)"


def _not_worse(name: str, what: str, test: NonInferiority | NotDecidable, margin: float, unit: str) -> Criterion:
    if isinstance(test, NotDecidable):
        found = _undecided(name, what, margin, test)
        # The statistics call every independent piece of market a path.
        said = found.reason.replace("path", unit)
        return replace(found, reason=said, settled_by=said)
    interval = test.interval
    passed = True if test.holds else False if test.violated else None
    settled_by = ""
    if passed is None and interval.estimate > margin:
        settled_by = f"the {what} is beyond the margin, which may be chance: more {unit}s or more training runs tell"
    elif passed is None and test.paths_needed is None:
        settled_by = f"no number of {unit}s shows that the {what} keeps the margin; train more often"
    elif passed is None and test.paths_needed is not None:
        more = max(test.paths_needed - test.paths, 1)
        settled_by = f"{more:,} more {unit}s decide the {what} if its difference stays"
    return Criterion(
        name=name,
        passed=passed,
        observed=interval.high,
        threshold=margin,
        reason=f"{what}, difference {_points(interval.estimate)} points ({_percent(interval.level)} interval "
        f"{_points(interval.low)} to {_points(interval.high)}), allowed less than {_points(margin)}",
        settled_by=settled_by,
    )


def _exposure(challenger: float, baseline: float, config: VerdictConfig) -> Criterion:
    # A Sharpe ratio does not know how little was at stake, and a drawdown next to nothing is small by itself.
    least = float(np.maximum(config.min_exposure, config.min_exposure_share * baseline))  # NaN stays, and never passes
    passed = bool(challenger >= least)
    return Criterion(
        name="exposure",
        passed=passed,
        observed=challenger,
        threshold=least,
        reason=f"mean exposure {challenger:.3f} of equity, asked for at least {least:.3f}",
        settled_by="" if passed else "too little is at stake to compare: train or select for more exposure",
    )


def _instrument(failed: tuple[str, ...] | None) -> Criterion:
    if failed is None:
        return Criterion(
            name="instrument",
            passed=None,
            observed=math.nan,
            threshold=0,
            reason="the suite made no check of the instrument",
            settled_by="name learners in evaluation.suite.check_learners",
        )
    passed = not failed
    named = "; ".join(failed)
    return Criterion(
        name="instrument",
        passed=passed,
        observed=len(failed),
        threshold=0,
        reason="no failed check" if passed else f"failed: {named}",
        settled_by="" if passed else f"find out why the instrument failed before believing what it measured: {named}",
    )


def _latency(bound: float | NotDecidable | None, budget: float) -> Criterion:
    if isinstance(bound, NotDecidable):
        return _undecided("latency", "decision time", budget, bound)
    if bound is None:
        text = "decision time was not measured"
        return Criterion(
            name="latency",
            passed=None,
            observed=math.nan,
            threshold=budget,
            reason=text,
            settled_by="measure the decision time",
        )
    reason = f"upper bound on the 99th percentile of a decision {bound:.2f} ms, budget {budget:g} ms"
    return Criterion(name="latency", passed=bool(bound <= budget), observed=bound, threshold=budget, reason=reason)


def _undecided(name: str, what: str, threshold: float, why: NotDecidable) -> Criterion:
    reason = f"the {what} {why}"
    return Criterion(name=name, passed=None, observed=math.nan, threshold=threshold, reason=reason, settled_by=reason)


def _headline(decision: Decision, challenger: str, baseline: str, sharpe: SharpeDifference | NotDecidable) -> str:
    meaning = {
        Decision.GO: f"{challenger} replaces {baseline}",
        Decision.CONDITIONAL: f"{challenger} does not replace {baseline} yet",
        Decision.NO_GO: f"{baseline} stays, {challenger} does not replace it",
    }[decision]
    if isinstance(sharpe, NotDecidable):
        return f"{decision}: {meaning}; the Sharpe difference {sharpe}."
    walked = f"{sharpe.paths} paths" if sharpe.paths > 1 else "one series"
    return (
        f"{decision}: {meaning}; annual Sharpe {_difference(sharpe.interval)}, "
        f"{sharpe.seeds} training run{'s' * (sharpe.seeds > 1)}, {walked} of {sharpe.bars} bars."
    )


def _difference(interval: Interval) -> str:
    where = "lower" if interval.estimate < 0 else "higher"
    return (
        f"{where} by {abs(interval.estimate):.3f} ({_percent(interval.level)} interval {interval.low:.3f} to "
        f"{interval.high:.3f})"
    )


def _check_registered(
    sharpe: SharpeDifference | NotDecidable,
    drawdown: NonInferiority | NotDecidable,
    kill_switch: KillSwitchTest | NotDecidable,
    config: VerdictConfig,
) -> None:
    found: list[tuple[str, float, float]] = []
    if not isinstance(sharpe, NotDecidable):
        found.append(("sharpe.interval.level", sharpe.interval.level, config.confidence))
    if not isinstance(drawdown, NotDecidable):
        found.append(("drawdown.interval.level", drawdown.interval.level, config.confidence))
        found.append(("drawdown.margin", drawdown.margin, config.drawdown_margin))
    if not isinstance(kill_switch, NotDecidable):
        found.append(("kill_switch.interval.level", kill_switch.difference.interval.level, config.confidence))
        found.append(("kill_switch.margin", kill_switch.difference.margin, config.kill_switch_margin))
    for name, actual, registered in found:
        if actual != registered:
            raise ValueError(f"{name}: expected the registered {registered:g}, was {actual:g}; measure it again")


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
