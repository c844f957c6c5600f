"""Promotion gates: what a challenger must show on the validation window, each with its reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from configs.schema import GatesConfig
from evaluation import PolicyMetrics


@dataclass(frozen=True)
class Gate:
    """One decided gate."""

    name: str
    passed: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def decide_gates(
    config: GatesConfig,
    *,
    challenger: PolicyMetrics,
    planner: PolicyMetrics | None = None,
    champion: PolicyMetrics | None,
    no_champion_reason: str,
    nll_gain: float,
    latency_p99_ms: float,
    latency_budget_ms: float,
    invalid_actions: int,
    paper: bool,
    other_market: str,
) -> list[Gate]:
    """Decide every gate; a NaN never passes.

    Args:
        challenger, planner, champion: metrics on the same validation window. A live system decides by policy or by
            planner, so both must keep the absolute limits; the policy alone is held against the champion's. Champion
            None if there is none to compare with, `no_champion_reason` says why.
        nll_gain: nats per feature of the world model over the tightest constant Gaussian, validation window.
        invalid_actions: forbidden actions that were executed, all policies and windows, or chosen by the graph and
            replaced by the last check.
        paper: the bundle allows more than full investment.
        other_market: market of the champion if it is another one, else empty.
    """
    served = {"": challenger} if planner is None else {"": challenger, " of the planner": planner}
    # NaN first, whichever is asked for: it must not hide behind a number.
    (sharpe, sharpe_of), (exposure, exposure_of) = (
        min(((getattr(one, name), of) for of, one in served.items()), key=lambda pair: (pair[0] == pair[0], pair[0]))
        for name in ("sharpe", "exposure")
    )
    (drawdown, drawdown_of), (killed, killed_of) = (
        max(((getattr(one, name), of) for of, one in served.items()), key=lambda pair: (pair[0] != pair[0], pair[0]))
        for name in ("max_drawdown", "kill_switch_rate")
    )
    gates = [
        _gate("invalid_actions", invalid_actions == 0, f"{invalid_actions} forbidden actions chosen, allowed 0"),
        _gate(
            "live_limits",
            not paper,
            "trained in paper mode, never for live trading" if paper else "limits of live trading",
        ),
        _at_least("world_model", nll_gain, config.min_nll_gain, "nats per feature over a constant Gaussian"),
        _gate(
            "sharpe",
            sharpe > config.min_sharpe,
            f"annual Sharpe {sharpe:.3f}{sharpe_of}, must exceed {config.min_sharpe:.3f}",
        ),
        _at_least("exposure", exposure, config.min_exposure, f"mean exposure{exposure_of}"),
        _at_most("drawdown", drawdown, config.max_drawdown, f"maximum drawdown{drawdown_of}"),
        _at_most("kill_switch", killed, config.max_kill_switch_rate, f"share of paths{killed_of} that were killed"),
        _at_most("latency", latency_p99_ms, latency_budget_ms, "ms decision latency p99"),
    ]
    if other_market:
        reason = f"the champion trades {other_market}; give this market its own tracking.model_name"
        gates.append(_gate("champion", False, reason))
    elif champion is None:
        gates.append(_gate("champion", True, no_champion_reason))
    else:
        gain = challenger.sharpe - champion.sharpe
        gates.append(_at_least("champion", gain, config.min_sharpe_gain, "annual Sharpe gained over the champion"))
    return gates


def _gate(name: str, passed: bool, reason: str) -> Gate:
    return Gate(name, bool(passed), reason)


def _at_least(name: str, value: float, limit: float, what: str) -> Gate:
    return _gate(name, value >= limit, f"{value:.4g} {what}, at least {limit:.4g}")


def _at_most(name: str, value: float, limit: float, what: str) -> Gate:
    return _gate(name, value <= limit, f"{value:.4g} {what}, at most {limit:.4g}")
