"""From a config to everything a run computes with: bars, features, windows, scaler, dynamics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from configs import ConfigError, DetentConfig, config_hash
from data import DataError, FeatureTable, Scaler, Split, hash_bars, open_source, walk_forward_splits
from data.features import LOOKBACK, compute_features
from envs import REWARDS, TradingDynamics, observation_scaler
from masking import RuleError
from pipeline.provenance import rule_sources, run_key

MAX_PACE = 2.5
"""Bars per year may differ from the configured number by this factor."""


class WarmStart(NamedTuple):
    """A world model to begin with."""

    folder: Path
    sha256: str
    """Of its description and weights."""


@dataclass(frozen=True)
class RunInputs:
    """Validated inputs of a run; nothing in here depends on a random number."""

    config: DetentConfig
    bars: pd.DataFrame
    table: FeatureTable
    split: Split
    scaler: Scaler
    """Of observations without a world model, fitted on the training window only."""
    dynamics: TradingDynamics
    data_hash: str
    warm_start: WarmStart | None = None
    """World model whose weights the fit begins with; None draws them."""

    @property
    def train(self) -> FeatureTable:
        """Training window."""
        return self.table.rows(self.split.train)

    @property
    def validation(self) -> FeatureTable:
        """Validation window: every choice is made here."""
        return self.table.rows(self.split.validation)

    @property
    def test(self) -> FeatureTable:
        """Test window: reported only."""
        return self.table.rows(self.split.test)

    @property
    def run_key(self) -> str:
        """Name of what this run computes."""
        began_with = None if self.warm_start is None else self.warm_start.sha256
        return run_key(config_hash(self.config), self.data_hash, self.rule_sources, began_with)

    @cached_property
    def rule_sources(self) -> dict[str, str]:
        """SHA-256 of the source behind rules of the user's own, by module name."""
        return rule_sources(self.dynamics.rule_set.rules, self.config.limits.rule_modules)

    def windows(self) -> dict[str, dict[str, Any]]:
        """First and last timestamp and number of rows of each window."""
        tables = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            name: {
                "first": table.timestamps[0].isoformat(),
                "last": table.timestamps[-1].isoformat(),
                "rows": len(table),
            }
            for name, table in tables.items()
        }


# Volatility is annualised with this number and compared with a limit: five-minute bars counted as days would switch
# the circuit breaker off.
def _check_bars_per_year(bars: pd.DataFrame, bars_per_year: int, symbol: str) -> None:
    years = (bars.index[-1] - bars.index[0]) / pd.Timedelta(days=365.25)
    found = (len(bars) - 1) / years if years > 0 else float("nan")
    if len(bars) > 1 and not bars_per_year / MAX_PACE < found < bars_per_year * MAX_PACE:
        raise DataError(
            f"{symbol}: data.bars_per_year: expected about {found:,.0f} as the timestamps have it, was {bars_per_year}"
        )


def load_inputs(config: DetentConfig, until: pd.Timestamp | None = None) -> RunInputs:
    """Read and check the bars, compute features, choose the latest walk-forward fold.

    Args: until: leave out newer bars; None takes all.
    Raises: DataError for anything wrong with the data; ConfigError for an unknown reward, RuleError for a bad rule.
    """
    if config.reward.name not in REWARDS:
        raise ConfigError(f"reward.name: expected one of {sorted(REWARDS)}, was {config.reward.name!r}")
    bars = open_source(config.data.source).load()
    symbol = config.data.source.symbol
    if until is not None:
        bars = bars.loc[:until]
    _check_bars_per_year(bars, config.data.bars_per_year, symbol)
    table = compute_features(bars, config.data.bars_per_year, symbol)
    purge = LOOKBACK + config.mbpo.rollout_length
    split = walk_forward_splits(len(table), config.data.split, config.data.bars_per_year, purge)[-1]
    return RunInputs(
        config=config,
        bars=bars,
        table=table,
        split=split,
        scaler=observation_scaler(table.rows(split.train)),
        dynamics=TradingDynamics.from_config(table.names, config),
        data_hash=hash_bars(bars),
    )


def check_extra_rules(inputs: RunInputs) -> None:
    """Prove that the rules judge alike in training and when served; seconds, and only where a config adds rules.

    Raises: RuleError naming rule, property and the first state that fails.
    """
    if not inputs.config.limits.extra_rules:
        return
    from masking.conformance import check_rule_set

    try:
        check_rule_set(inputs.dynamics.rule_set)
    except RuleError as error:
        raise RuleError(f"limits.extra_rules: {error}") from error
