"""Every setting of Detent, typed, bounded and documented in one place.

Unknown keys are errors. A loaded config is frozen; derived numbers are properties.
Fractions are plain numbers (0.08 is 8 %), one basis point is 1e-4, and a *bar* is one row of the input.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.evaluation import EvaluationConfig
from configs.section import Count, Fraction, NonNegative, Positive, PPOConfig, RuleEntry, Section


class SourceConfig(Section):
    """Where the bars come from."""

    kind: Literal["bundled", "file"] = "bundled"
    """`bundled`: daily bars 1999-2018 that come with the `arch` package. `file`: your own CSV or Parquet."""
    symbol: Annotated[str, Field(min_length=1, max_length=64)] = "sp500"
    """Name of the instrument; for `bundled` one of sp500, nasdaq."""
    path: str | None = None
    """CSV or Parquet file with columns timestamp, open, high, low, close, volume (UTC); only for `file`."""

    @model_validator(mode="after")
    def _path_fits_kind(self) -> Self:
        if self.kind == "file" and not self.path:
            raise ValueError("data.source.path: expected a file because data.source.kind is 'file', was empty")
        if self.kind == "bundled" and self.symbol not in ("sp500", "nasdaq"):
            raise ValueError(f"data.source.symbol: expected 'sp500' or 'nasdaq' (bundled), was {self.symbol!r}")
        return self


class SplitConfig(Section):
    """Walk-forward windows, in years of bars; between windows `purge` rows are dropped."""

    train_years: Positive | None = 2.0
    """Length of the training window; null takes everything before the validation window."""
    validation_years: Positive = 1.0
    """Length of the validation window: model selection and promotion gates look only here."""
    test_years: Positive = 0.5
    """Length of the test window: reported, never used for a choice."""
    step_years: Positive = 0.5
    """How far the next fold starts after the previous one. The nightly job uses the latest fold."""


class DataConfig(Section):
    """Bars and windows."""

    source: SourceConfig = SourceConfig()
    split: SplitConfig = SplitConfig()
    bars_per_year: Count = 252
    """Bars in a year: 252 for daily bars; annualises volatility and Sharpe."""


class LimitsConfig(Section):
    """The limits the mask rules enforce, in every real, imagined, planned and live step."""

    max_exposure: Positive = 1.25
    """Largest |position| in multiples of equity."""
    paper: bool = False
    """Paper mode: only here may |position| exceed 1."""
    soft_drawdown: Fraction = 0.08
    """Running drawdown at which trading becomes REDUCE_ONLY."""
    hard_drawdown: Fraction = 0.12
    """Running drawdown at which trading is HALTED and the risk manager flattens."""
    kill_drawdown: Fraction = 0.15
    """Running drawdown at which the kill switch latches until a person resets it."""
    cooldown_bars: Count = 20
    """Bars spent flat after which REDUCE_ONLY or HALTED is released and the running peak starts anew."""
    min_holding_bars: Annotated[int, Field(ge=0)] = 3
    """Bars a new position must be kept before it may change again (reducing in REDUCE_ONLY is exempt)."""
    max_position_change: Annotated[float, Field(ge=0.25)] = 0.6
    """Largest |target - position| of one decision; at least one step of the action table, else nobody could enter."""
    max_volatility: Positive = 0.6
    """Annualised 20-bar volatility at which the circuit breaker allows only Hold and smaller positions."""
    max_data_age_bars: NonNegative = 1.0
    """Age of the newest bar, in bars, beyond which only Hold is valid."""
    rule_modules: tuple[str, ...] = ()
    """Python modules imported first, so that the rules they register are known; imports run their code."""
    extra_rules: tuple[RuleEntry, ...] = ()
    """More rules, `name` or `name: {parameter: value}`; they can only forbid more than the limits above."""

    @model_validator(mode="after")
    def _ladder_ascends(self) -> Self:
        ladder = (self.soft_drawdown, self.hard_drawdown, self.kill_drawdown)
        if not 0.0 < ladder[0] < ladder[1] < ladder[2] < 1.0:
            raise ValueError(f"limits: expected 0 < soft < hard < kill drawdown < 1, was {ladder}")
        return self


class AccountConfig(Section):
    """What a trade costs."""

    commission_bps: NonNegative = 1.0
    """Commission per traded notional, basis points."""
    slippage_bps: NonNegative = 2.0
    """Slippage per traded notional, basis points; execution is at the next bar's open."""
    spread_share: Fraction = 0.0
    """Share of the `spread` feature of the bar traded in that is paid per traded notional: 0.5 crosses half of a quoted
    spread. 0 where the spread is only estimated, as from daily highs and lows."""

    @property
    def cost_rate(self) -> float:
        """Cost of trading a notional of 1, as a fraction."""
        return (self.commission_bps + self.slippage_bps) * 1e-4


class RewardConfig(Section):
    """Reward N1: `w_p * utility/profit_scale - w_d * drawdown/drawdown_scale - w_c * 1[limit breached]`.

    Utility is `r - risk_aversion/2 * r^2` of the bar's log return r.

    The reward shapes preference; the limits themselves are enforced by masks, never by these weights.
    """

    name: str = "n1"
    """Name under which the reward function is registered in `envs.reward`."""
    profit_weight: NonNegative = 1.0
    """w_p."""
    risk_aversion: NonNegative = 0.0
    """What variance costs: 0 seeks growth; at 5 a position is sized by its forecast over five times its variance."""
    drawdown_weight: NonNegative = 0.005
    """w_d."""
    breach_weight: NonNegative = 1.0
    """w_c: charged on the bar on which the hard limit or the kill switch is reached."""
    profit_scale: Positive = 0.01
    """Log return that counts as one unit of profit: about one day's standard deviation of an index."""
    drawdown_scale: Positive = 0.15
    """Drawdown that counts as one unit."""


class EnvConfig(Section):
    """Episodes over history."""

    episode_bars: Count = 252
    """Bars after which a training episode is truncated."""


class WorldModelConfig(Section):
    """Probabilistic ensemble (PETS, arXiv:1805.12114)."""

    num_members: Annotated[int, Field(ge=2)] = 5
    """E: networks in the ensemble."""
    num_elites: Annotated[int, Field(ge=1)] = 4
    """Members with the best holdout likelihood that generate imagined bars."""
    hidden: tuple[int, ...] = (64, 128, 64)
    """Hidden layer widths of each member."""
    learning_rate: Positive = 1e-3
    """Adam step size."""
    batch_size: Count = 2048
    """Rows per member and gradient step."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay on the weight matrices."""
    input_noise: NonNegative = 0.0
    """Standard deviation of the Gaussian noise added to inputs in training, in units of each feature's own."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of hidden units silenced at random in every training step."""
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.2
    """Last part of the training window kept for early stopping and calibration, in time order."""
    max_epochs: Count = 200
    """Upper bound on epochs: passes over the training rows, or parts of 64 gradient steps where a pass takes more."""
    patience: Count = 15
    """Epochs without a better holdout loss in any member before fitting stops."""
    logvar_bounds: tuple[float, float] = (-10.0, 4.0)
    """Soft bounds of the log-variance in normalised units; tanh-shaped because softplus is slow in ONNX."""

    volatility_line: bool = True
    """Put a line in log-volatilities and recent moves under the networks' log-variance (`world_model.volatility`)."""
    likelihood: Literal["gaussian", "student_t"] = "gaussian"
    """Of one feature given the row: Gaussian, or Student-t with degrees of freedom found on the holdout."""
    warm_start: bool = False
    """Begin with the networks' weights of the last finished run over older bars in the work directory, if it has one of
    the same symbol, columns and sizes."""
    calibrate_drift: bool = True
    """Settle how strongly expected moves are shrunk, and how large they are, on the validation rows
    (`world_model.drift`)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_elites > self.num_members:
            raise ValueError(
                f"world_model.num_elites: expected at most num_members={self.num_members}, was {self.num_elites}"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"world_model.hidden: expected at least one width >= 1, was {self.hidden}")
        if self.logvar_bounds[0] >= self.logvar_bounds[1]:
            raise ValueError(f"world_model.logvar_bounds: expected low < high, was {self.logvar_bounds}")
        return self


class RolloutScheduleConfig(Section):
    """Length of imagined branches while training goes on: a ramp up to `mbpo.rollout_length`."""

    initial: Annotated[int, Field(ge=1, le=10)] | None = None
    """Bars per branch at the start; null takes `mbpo.rollout_length` throughout."""
    begin: Fraction = 0.0
    """Share of all environment steps after which branches grow."""
    end: Fraction = 1.0
    """Share of all environment steps from which on they have their full length."""

    @model_validator(mode="after")
    def _ramp_ascends(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"mbpo.rollout_schedule: expected begin < end, was {self.begin} and {self.end}")
        return self


class PenaltyScheduleConfig(Section):
    """lambda_u while training goes on; it starts at `mbpo.penalty_coef`."""

    kind: Literal["fixed", "linear", "reward_gap", "kill_rate"] = "fixed"
    """`linear` ends at `final`; the other two move lambda_u after each rollout by
    `step_size * (measured - target)`. `reward_gap` measures imagined minus real reward per bar, `kill_rate` kill
    switches per real bar."""
    final: NonNegative = 0.0
    """lambda_u at the end of training; only for `linear`."""
    target: float = 0.0
    """What is aimed at: a gap in reward units per bar, or the baseline's kill switches per bar."""
    step_size: Positive = 0.1
    """Step of the multiplier update, lambda_u per unit measured."""
    max_coef: Positive = 5.0
    """Upper bound of lambda_u under the multiplier update."""


class MBPOConfig(Section):
    """Short masked imagined rollouts mixed with real rows (MBPO arXiv:1906.08253, MOPO arXiv:2005.13239)."""

    rollout_length: Annotated[int, Field(ge=1, le=10)] = 3
    """H: most bars per imagined branch; also PPO's n_steps."""
    rollout_schedule: RolloutScheduleConfig = RolloutScheduleConfig()
    real_ratio: Fraction = 0.5
    """Share of rows that walk through history; the rest are imagined."""
    penalty_coef: NonNegative = 0.5
    """lambda_u: reward units subtracted per unit of |position| and of ensemble disagreement."""
    control_variate: Fraction = 1.0
    """Share of the unforeseen part of a bar's return that is taken out of the reward PPO sees; its mean is 0."""
    risk_aversion: NonNegative | None = None
    """That of the reward MBPO learns from, null takes `reward.risk_aversion`: where luck is taken out of rewards, a
    learner stands a larger one."""
    usual_position: Positive | None = None
    """In place of a number for `risk_aversion`: the position that a forecast of its usual size, root mean square over
    history, is worth. A ratio of mean to risk does not depend on the scale of positions; a fixed aversion keeps a world
    model with small forecasts flat."""
    risk_aversion_ramp: Fraction = 0.5
    """Share of training over which risk aversion rises from `reward.risk_aversion` to MBPO's own, if that is the
    larger: averse from the start, a policy that still trades at random learns first to stay flat, and some never
    leave."""
    penalty_schedule: PenaltyScheduleConfig = PenaltyScheduleConfig()
    branch_pool: Count = 32_768
    """Imagined market branches generated once per fit and reused by every policy update."""
    ppo: PPOConfig = PPOConfig(num_envs=2048, n_steps=3, batch_size=3072, n_epochs=3)

    @property
    def branch_reuse(self) -> float:
        """How often training uses an imagined bar, on average."""
        return self.ppo.total_steps * (1.0 - self.real_ratio) / (self.branch_pool * self.rollout_length)

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        if self.risk_aversion is not None and self.usual_position is not None:
            raise ValueError(
                f"mbpo.usual_position: expected null beside risk_aversion={self.risk_aversion}, "
                f"was {self.usual_position}"
            )
        initial = self.rollout_schedule.initial
        if initial is not None and initial > self.rollout_length:
            raise ValueError(
                f"mbpo.rollout_schedule.initial: expected at most rollout_length={self.rollout_length}, was {initial}"
            )
        penalty = self.penalty_schedule
        if penalty.kind in ("reward_gap", "kill_rate"):
            if not 0.0 < self.real_ratio < 1.0:
                raise ValueError(
                    f"mbpo.penalty_schedule.kind: {penalty.kind} compares real and imagined rows, expected "
                    f"0 < real_ratio < 1, was {self.real_ratio}"
                )
            if self.penalty_coef > penalty.max_coef:
                raise ValueError(
                    f"mbpo.penalty_coef: expected at most penalty_schedule.max_coef={penalty.max_coef}, "
                    f"was {self.penalty_coef}"
                )
        return self


class ExportConfig(Section):
    """Bundle and parity."""

    parity_states: Annotated[int, Field(ge=1000)] = 2000
    """States on which torch and ONNX must choose the same action."""
    parity_tolerance: Positive = 1e-5
    """Largest probability difference."""
    planner: bool = False
    """Whether the bundle gets the planner of the section `planner` as well; its graph takes half a minute to a few
    minutes to write."""
    noise_tables: Count = 8
    """Noise tables of the planner graph that its seed picks from."""
    latency_decisions: Annotated[int, Field(ge=100)] = 10_000
    """Single decisions timed after training."""
    latency_budget_ms: Positive = 50.0
    """Budget of one decision at the 99th percentile."""


class GatesConfig(Section):
    """What a challenger must show on the validation window before it becomes champion."""

    min_sharpe: float = 0.0
    """Annualised Sharpe ratio that must be exceeded; staying flat has 0."""
    min_exposure: NonNegative = 0.05
    """Lowest mean |position|: a Sharpe ratio does not know how little was at stake."""
    min_sharpe_gain: float = 0.0
    """Lowest Sharpe gain over the champion on the same window."""
    max_drawdown: Fraction = 0.15
    """Largest drawdown from the all-time peak."""
    max_kill_switch_rate: Fraction = 0.0
    """Largest share of paths that end in the kill switch."""
    min_nll_gain: float = 0.0
    """Lowest log-likelihood gain of the world model, nats per feature, over the tightest constant Gaussian."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking and registry URI without credentials, which MLflow and database drivers read from the environment;
    null is a SQLite file in the work directory."""
    experiment: Annotated[str, Field(min_length=1)] = "detent-nightly"
    """Experiment name."""
    model_name: Annotated[str, Field(min_length=1)] = "detent-policy"
    """Registered model; one per market."""

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        if self.uri and "@" in self.uri.partition("//")[2].partition("/")[0]:
            raise ValueError(
                "tracking.uri: expected no user or password, was a URI with '@'; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or PGUSER and PGPASSWORD"
            )
        return self


TRADING_ACTIONS = 7
"""Actions of the trading environment, Hold included."""


class PlannerConfig(Section):
    """Search over valid action sequences on scenarios of the world model."""

    search: Literal["auto", "exhaustive", "cem", "random_shooting"] = "auto"
    """auto: exhaustive while the tree of sequences has at most `max_nodes` nodes, else cem with as many candidates."""
    horizon: Annotated[int, Field(ge=1, le=5)] = 3
    """H: bars planned ahead."""
    scenarios: Count = 16
    """Market scenarios every sequence is scored on."""
    max_nodes: Annotated[int, Field(ge=6)] = 3_000
    """Imagined steps of one decision at most, for auto."""
    candidates: Annotated[int, Field(ge=2)] = 512
    """Sequences of an iteration of cem, or of random_shooting."""
    elites: Count = 32
    """Best candidates that cem fits its distributions to."""
    iterations: Count = 3
    """Of cem."""
    uncertainty_penalty: NonNegative = 0.0
    """Reward units charged per unit of |position| and of ensemble disagreement, as `mbpo.penalty_coef` does."""
    tail: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the scenarios a sequence is judged by, the worst ones; 1 is the mean, less is CVaR, for
    which `control_variate` must be 0: it takes the tail out with the luck."""
    particles: Literal["all", "each"] = "all"
    """all: a step is valid where every scenario allows it; each: scenarios that forbid it hold."""
    control_variate: Fraction = 1.0
    """Share of the unforeseen part of a bar's return that is taken out of the rewards of a plan; its mean is 0."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.search == "cem" and self.elites > self.candidates:
            raise ValueError(f"elites: expected at most candidates={self.candidates}, was {self.elites}")
        if self.tail < 1.0 and self.control_variate:
            raise ValueError(f"control_variate: expected 0 with tail={self.tail}, was {self.control_variate}")
        if self.tail * self.scenarios < 1.0:
            raise ValueError(f"tail: expected at least 1 of {self.scenarios} scenarios, was {self.tail}")
        tree = sum(TRADING_ACTIONS**depth for depth in range(1, self.horizon + 1))
        least = 2 * self.iterations * self.horizon
        if self.search == "auto" and self.max_nodes < min(tree, least):
            raise ValueError(
                f"max_nodes: expected at least {least} for cem over {self.horizon} bars, was {self.max_nodes}"
            )
        return self


class DetentConfig(Section):
    """One nightly retraining run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every generator in the run."""
    torch_threads: Count = 1
    """Threads of torch; on small batches two are slower than one."""
    data: DataConfig = DataConfig()
    limits: LimitsConfig = LimitsConfig()
    account: AccountConfig = AccountConfig()
    reward: RewardConfig = RewardConfig()
    env: EnvConfig = EnvConfig()
    world_model: WorldModelConfig = WorldModelConfig()
    mbpo: MBPOConfig = MBPOConfig()
    planner: PlannerConfig = PlannerConfig()
    model_free: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    gates: GatesConfig = GatesConfig()
    tracking: TrackingConfig = TrackingConfig()
