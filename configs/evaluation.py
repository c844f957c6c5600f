"""Settings of the evaluation: markets with known truth, baselines, sample sizes and the thresholds of the verdict.

The thresholds are registered before a result is seen: `docs/evaluation.md` says why each is what it is.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from configs.section import Count, Fraction, NonNegative, Positive, Section

Regimes = tuple[float, float, float]
"""One number per hidden regime: calm, sideways, stressed."""
PositiveRegimes = tuple[Positive, Positive, Positive]
NonNegativeRegimes = tuple[NonNegative, NonNegative, NonNegative]


class SyntheticMarketConfig(Section):
    """A market whose truth is known: hidden regimes, a predictive signal seen through noise, a spread, jumps.

    Rates are per year and per day, so that one description serves one-minute and daily bars.
    """

    bars_per_day: Count = 1
    """1 for daily bars, 390 for one-minute bars; a year has 252 days."""
    drift: Regimes = (0.18, -0.06, -0.45)
    """Mean log return per year of each regime, jumps included."""
    volatility: PositiveRegimes = (0.10, 0.14, 0.26)
    """Standard deviation of the diffusive return per square root of a year."""
    duration_days: PositiveRegimes = (120.0, 60.0, 30.0)
    """Mean stay in each regime; a leaving market enters either other regime with equal chance."""
    signal_drift: NonNegative = 0.30
    """Mean log return per year that one standard deviation of the true signal adds."""
    signal_half_life_days: Positive = 10.0
    """Half-life of the AR(1) signal."""
    signal_noise: NonNegative = 1.7
    """Standard deviation of the noise on the observed signal, in standard deviations of the true one."""
    spread_bps: PositiveRegimes = (1.0, 2.0, 5.0)
    """Mean quoted spread of each regime, basis points of price."""
    spread_noise: NonNegative = 0.6
    """Standard deviation of the log spread around its regime: without it the spread would give the regime away."""
    volume_noise: NonNegative = 0.4
    """Standard deviation of the log volume around its regime."""
    jump_rate: NonNegativeRegimes = (0.5, 1.0, 6.0)
    """Jumps per year; they fall into the gap before the open."""
    jump_std: NonNegative = 0.02
    """Standard deviation of a jump's log return; jumps have mean zero."""
    gap_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of a bar's mean and variance that falls between the previous close and the open."""

    @property
    def bars_per_year(self) -> int:
        """Bars in a year of 252 days."""
        return 252 * self.bars_per_day


class GarchConfig(Section):
    """GARCH(1,1) with Student-t innovations, in place of the regimes: heavy tails nobody trained for."""

    annual_volatility: Positive = 0.16
    """Unconditional standard deviation per square root of a year."""
    alpha: Fraction = 0.09
    """Weight of the last squared return."""
    beta: Fraction = 0.90
    """Weight of the last variance."""
    degrees_of_freedom: Annotated[float, Field(gt=2.0)] = 5.0
    """Of the Student-t innovations."""
    drift: float = 0.05
    """Mean log return per year."""

    @model_validator(mode="after")
    def _stationary(self) -> Self:
        if self.alpha + self.beta >= 1.0:
            raise ValueError(f"evaluation.garch: expected alpha + beta < 1, was {self.alpha + self.beta:g}")
        return self


class RidgeConfig(Section):
    """Ridge forecast of the next returns and a cost-aware choice; both grids are searched on validation."""

    horizons: tuple[Count, ...] = (3, 5, 10, 20)
    """Bars ahead whose mean return is forecast."""
    penalties: tuple[Positive, ...] = (10.0, 100.0, 1000.0, 10000.0)
    """Ridge penalties on standardised features."""
    risk_aversions: tuple[NonNegative, ...] = (0.0, 5.0, 20.0, 50.0)
    """Weights of the variance in the choice; 0 maximises expected growth after costs."""


class SACConfig(Section):
    """Soft actor-critic on the continuous position; limits are enforced by projection onto the valid actions."""

    total_steps: Count = 100_000
    """Environment steps."""
    num_envs: Count = 32
    """Rows stepped at once."""
    gradient_steps: Count = 4
    """Updates after each batched step."""
    batch_size: Count = 256
    """Rows per update."""
    learning_rate: Positive = 3e-4
    """Adam step size."""
    gamma: Fraction = 0.99
    """Discount per bar."""
    net_arch: tuple[Count, ...] = (64, 64)
    """Hidden widths of actor and critics."""
    validations: Count = 10
    """Times the policy is scored on the validation window; the best snapshot is kept."""


class DQNConfig(Section):
    """Masked double DQN."""

    total_steps: Count = 200_000
    """Environment steps."""
    num_envs: Count = 32
    """Rows stepped at once."""
    gradient_steps: Count = 4
    """Updates after each batched step."""
    batch_size: Count = 256
    """Rows per update."""
    learning_rate: Positive = 2e-4
    """Adam step size."""
    gamma: Fraction = 0.99
    """Discount per bar."""
    exploration_fraction: Fraction = 0.3
    """Share of training over which random actions fade out."""
    net_arch: tuple[Count, ...] = (64, 64)
    """Hidden widths."""
    validations: Count = 10
    """Times the policy is scored on the validation window; the best snapshot is kept."""


class PlannerWalkConfig(Section):
    """How far planners take part; their settings are the section `planner`."""

    max_paths: Annotated[int, Field(ge=0)] = 20
    """Test paths the planners walk, from the first; they decide one bar at a time and are slow over many. 0 leaves
    planners out."""


class SuiteConfig(Section):
    """Sizes and seeds of the benchmark on known markets. Seeds of training, validation and test are disjoint."""

    train_bars: tuple[Annotated[int, Field(ge=250)], ...] = (500, 1250, 5000)
    """Lengths of the training path at which policies are compared."""
    primary_train_bars: Annotated[int, Field(ge=250)] = 1250
    """The length whose verdict is the suite's: five years of daily bars."""
    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 10
    """Training runs per length, each with a training path and a generator seed of its own."""
    validation_paths: Count = 20
    """Paths on which snapshots and grids are chosen, for every policy alike."""
    validation_bars: Annotated[int, Field(ge=60)] = 1260
    """Bars of a validation path."""
    test_paths: Count = 220
    """Paths on which policies are judged; below 217 even no kill at all cannot show a rate within 2 %."""
    test_bars: Annotated[int, Field(ge=60)] = 2520
    """Bars of a test path."""
    base_seed: Annotated[int, Field(ge=0, lt=2**31 - 400_000)] = 20_700_000
    """Training paths use base_seed + 1 + i, validation base_seed + 100_000, test base_seed + 200_000, stress
    base_seed + 300_000."""
    stress_paths: Annotated[int, Field(ge=0)] = 50
    """GARCH-t paths on which the policies of the longest training length are walked as well; 0 leaves them out."""
    learners: tuple[str, ...] = ("linear_signal", "ridge", "model_free", "sac", "masked_dqn", "mbpo")
    """Learners that are fitted; `benchmarks.contenders.LEARNERS` has them all."""
    check_learners: tuple[str, ...] = ("ridge", "model_free", "mbpo")
    """Learners that also learn with tomorrow's return among the features, and with shuffled labels."""
    trials: dict[str, Count] = Field(default_factory=dict)
    """Settings tried on validation before the ones in force, by learner: what the deflated Sharpe ratio counts."""
    timed_decisions: Annotated[int, Field(ge=20)] = 500
    """Single decisions of each policy that are timed."""

    @model_validator(mode="after")
    def _primary_is_compared(self) -> Self:
        if self.primary_train_bars not in self.train_bars:
            raise ValueError(
                f"evaluation.suite.primary_train_bars: expected one of {list(self.train_bars)}, "
                f"was {self.primary_train_bars}"
            )
        return self


class WalkForwardConfig(Section):
    """Folds over real bars; their windows are those of `data.split`."""

    embargo_bars: Annotated[int, Field(ge=0)] = 5
    """Bars dropped after the training and after the validation window, on top of the purge of look-back and rollout."""
    max_folds: Count | None = None
    """Only the newest folds; null takes all that fit."""
    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Training runs per fold."""
    learners: tuple[str, ...] = ("linear_signal", "ridge", "model_free", "mbpo")
    """Learners that are fitted on every fold; `benchmarks.contenders.LEARNERS` has them all."""


class VerdictConfig(Section):
    """What must be shown before anybody switches; registered before the result."""

    challenger: str = "mbpo"
    """The model-based policy that the claim is about; its rival is the model-free one that is best on validation."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of every two-sided interval; a lower bound is the lower end of it."""
    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples."""
    min_sharpe_gain: NonNegative = 0.10
    """Annualised Sharpe ratio by which the model-based policy must exceed the best model-free one."""
    min_exposure: NonNegative = 0.05
    """Mean |position| the challenger must have, multiples of equity: a Sharpe ratio does not know how little was at
    stake."""
    min_exposure_share: NonNegative = 0.25
    """The same as a share of the rival's mean |position|."""
    drawdown_margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Largest excess of mean maximum drawdown that still counts as not worse."""
    kill_switch_margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Largest excess of the kill-switch rate that still counts as not higher."""
    latency_budget_ms: Positive = 50.0
    """Budget that the upper bound on the 99th percentile of a decision must keep."""
    power: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.8
    """Probability with which the power table's samples would show a true gain."""


class EvaluationConfig(Section):
    """Backtests that are reported, and the evaluation suite."""

    random_seeds: Count = 20
    """Random-valid runs that are averaged."""
    market: SyntheticMarketConfig = SyntheticMarketConfig()
    garch: GarchConfig = GarchConfig()
    suite: SuiteConfig = SuiteConfig()
    walk_forward: WalkForwardConfig = WalkForwardConfig()
    ridge: RidgeConfig = RidgeConfig()
    sac: SACConfig = SACConfig()
    dqn: DQNConfig = DQNConfig()
    planner: PlannerWalkConfig = PlannerWalkConfig()
    verdict: VerdictConfig = VerdictConfig()
