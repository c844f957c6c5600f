"""The state row, the masks taken from it, and branches started from a stored row."""

from __future__ import annotations

import re

import array_api_strict
import numpy as np
import pytest
import torch
from envs_worlds import FEATURES, LOOSE, dynamics, fresh, market, random_valid

from configs.schema import AccountConfig, DetentConfig, LimitsConfig, RewardConfig
from envs import ACCOUNT_FIELDS, DATA_AGE, UNCERTAINTY_FIELD, Account, AccountRules, TradingDynamics
from envs.dynamics import AGE_FIELD
from masking import ActionTable, DrawdownLadder, RuleError, RuleSet, trading_rules

ACCOUNT = Account(
    *(
        np.array([value, value2])
        for value, value2 in zip(
            #  equity peak position pnl hold state killed flat event
            (0.9, 1.0, 0.5, 0.03, 4.0, 1.0, 0.0, 0.0, 1.0),
            (2.2, 2.2, 0.0, 0.0, 7.0, 0.0, 0.0, 5.0, 2.0),
            strict=True,
        )
    )
)


def state_of(rules: TradingDynamics, account: Account = ACCOUNT, **kwargs) -> np.ndarray:
    return rules.state_row(np.array([[0.01, 0.02, 0.2], [0.03, 0.04, 0.3]]), account, np.array([0.5, 0.6]), **kwargs)


# --- layout ------------------------------------------------------------------------------------------------


def test_state_names_are_features_account_uncertainty_and_age() -> None:
    rules = dynamics()
    assert rules.state_names == (
        *FEATURES,
        "position",
        "exposure",
        "drawdown",
        "open_pnl",
        "holding_time",
        "trading_state",
        "flat_bars",
        "last_risk_event",
        "model_uncertainty",
        "data_age",
    )
    assert rules.obs_names == rules.state_names[:-1]
    assert tuple(field.name for field in ACCOUNT_FIELDS) == rules.state_names[3:-2]
    assert (UNCERTAINTY_FIELD.name, DATA_AGE) == rules.state_names[-2:]
    assert rules.num_actions == 7


def test_a_state_row_holds_each_value_under_its_name_in_float32() -> None:
    state = state_of(dynamics(), data_age=np.array([0.0, 1.0]))
    assert state.dtype == np.float32
    expected = [
        #          position exposure drawdown pnl hold state flat event uncertainty age
        [0.01, 0.02, 0.2, 0.5, 0.45, 0.1, 0.03, 4, 1, 0, 1, 0.5, 0],
        [0.03, 0.04, 0.3, 0, 0, 0, 0, 7, 0, 5, 2, 0.6, 1],
    ]
    np.testing.assert_allclose(state, expected, rtol=1e-6, atol=1e-7)


def test_exposure_is_measured_against_the_running_peak() -> None:
    account = ACCOUNT._replace(position=np.array([-0.5, 0.25]))
    state = state_of(dynamics(), account)
    np.testing.assert_allclose(state[:, 4], [0.45, 0.25], rtol=1e-6)


def test_data_is_fresh_unless_said_otherwise() -> None:
    assert state_of(dynamics())[:, -1].tolist() == [0.0, 0.0]


def test_every_namespace_assembles_the_same_rows() -> None:
    rules = dynamics()
    expected = state_of(rules)
    for xp in (torch, array_api_strict):
        account = Account(*(xp.asarray(column) for column in ACCOUNT))
        features = xp.asarray(np.array([[0.01, 0.02, 0.2], [0.03, 0.04, 0.3]]))
        state = rules.state_row(features, account, xp.asarray(np.array([0.5, 0.6])))
        assert state.dtype == xp.float32
        np.testing.assert_array_equal(np.asarray(state), expected)
        np.testing.assert_array_equal(np.asarray(rules.action_masks(state)), rules.action_masks(expected))


# --- masks -------------------------------------------------------------------------------------------------


def test_masks_of_a_state_are_the_rule_set_on_its_named_columns() -> None:
    rules = dynamics()
    rng = np.random.default_rng(1)
    state = rng.uniform(0.0, 1.3, (500, len(rules.state_names))).astype(np.float32)
    state[:, rules.state_names.index("drawdown")] *= 0.1
    state[:, rules.state_names.index("trading_state")] = rng.integers(0, 3, 500)
    columns = {name: state[:, rules.state_names.index(name)] for name in rules.state_names}
    masks = rules.action_masks(state)
    np.testing.assert_array_equal(masks, rules.rule_set(columns))
    assert 0.02 < masks[:, 1:].mean() < 0.9


def test_changing_one_column_moves_only_the_masks_that_read_it() -> None:
    rules = dynamics(**LOOSE)
    state = state_of(rules, fresh(2))
    assert rules.action_masks(state).all()
    for column, name in enumerate(rules.state_names):
        broken = state.copy()
        broken[0, column] = np.nan
        expected = [True] + [name not in rules.rule_set.fields] * 6
        assert rules.action_masks(broken)[0].tolist() == expected, name
        assert rules.action_masks(broken)[1].all()


def test_stale_data_reaches_the_masks() -> None:
    state = state_of(dynamics(**LOOSE), fresh(2), data_age=np.array([1.0, 1.5]))
    assert dynamics(**LOOSE).action_masks(state).sum(axis=1).tolist() == [7, 1]


# --- a branch from a stored row ------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, LOOSE, {"cooldown_bars": 3, "max_position_change": 2.0, "min_holding_bars": 1}])
def test_a_branch_from_a_stored_row_has_the_future_of_the_account_it_was_stored_from(limits) -> None:
    rules, batch, bars = dynamics(**limits), 64, 60
    rng = np.random.default_rng(5)
    features = market(bars * batch, seed=6, swing=0.03).reshape(bars, batch, 3)
    original, uncertainty = fresh(batch), np.zeros(batch)
    branch = None
    seen_states: set[float] = set()
    for bar in range(bars - 1):
        state = rules.state_row(features[bar], original, uncertainty)
        if bar % 6 == 0:
            branch = rules.account_from_state(state, np.float64)
            alive = original.killed == 0  # a terminal state is no start
        masks = rules.action_masks(state)
        branch_masks = rules.action_masks(rules.state_row(features[bar], branch, uncertainty))
        np.testing.assert_array_equal(branch_masks[alive], masks[alive])
        action = random_valid(masks, rng)
        original, outcome, reward = rules.step(original, action, features[bar + 1])
        branch, branch_outcome, branch_reward = rules.step(branch, action, features[bar + 1])
        np.testing.assert_allclose(branch_reward[alive], reward[alive], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(branch_outcome.drawdown[alive], outcome.drawdown[alive], atol=1e-6)
        np.testing.assert_allclose(branch.open_pnl[alive], original.open_pnl[alive], atol=1e-6)
        for name in ("holding_time", "trading_state", "killed", "flat_bars", "last_risk_event"):
            np.testing.assert_array_equal(getattr(branch, name)[alive], getattr(original, name)[alive], name)
        seen_states |= set(original.trading_state[alive].tolist())
    assert seen_states == {0.0, 1.0, 2.0}


def test_an_account_from_a_state_has_equity_one_and_the_stored_drawdown() -> None:
    rules = dynamics()
    account = rules.account_from_state(state_of(rules), np.float64)
    assert account.equity.tolist() == [1.0, 1.0]
    np.testing.assert_allclose(account.drawdown, [0.1, 0.0], atol=1e-7)
    np.testing.assert_allclose(account.position, [0.5, 0.0])
    assert all(column.dtype == np.float64 for column in account)
    columns = list(account)
    for index, column in enumerate(columns):
        assert not any(np.shares_memory(column, other) for other in columns[index + 1 :])


# --- the step and the wiring -----------------------------------------------------------------------------------


def test_the_step_reads_the_two_returns_by_name() -> None:
    shuffled = dynamics(feature_names=("volatility_20", "intraday_return", "gap_return"), cost_bps=0.0, **LOOSE)
    account = fresh()._replace(position=np.ones(1))
    after, outcome, reward = shuffled.step(account, np.array([3]), np.array([[0.2, np.log(1.1), np.log(1.2)]]))
    # The gap of 20 % is earned by the old position of 1, the 10 % after the open by the new one of one half.
    np.testing.assert_allclose(after.equity, [1.2 * 1.05], rtol=1e-12)
    np.testing.assert_allclose(reward, outcome.log_return / 0.01, rtol=1e-12)


def test_every_limit_and_cost_of_the_config_is_wired() -> None:
    config = DetentConfig(
        limits=LimitsConfig(
            max_exposure=1.1,
            paper=True,
            soft_drawdown=0.01,
            hard_drawdown=0.02,
            kill_drawdown=0.03,
            cooldown_bars=4,
            min_holding_bars=5,
            max_position_change=0.3,
            max_volatility=0.4,
            max_data_age_bars=2.0,
        ),
        account=AccountConfig(commission_bps=3.0, slippage_bps=4.0),
        reward=RewardConfig(profit_weight=9.0),
    )
    rules = TradingDynamics.from_config(FEATURES, config)
    ladder = DrawdownLadder(soft=0.01, hard=0.02, kill=0.03, cooldown_bars=4)
    expected = trading_rules(
        max_exposure=1.1,
        paper=True,
        ladder=ladder,
        min_holding_bars=5,
        max_position_change=0.3,
        max_volatility=0.4,
        max_data_age_bars=2.0,
    )
    assert rules.rule_set.rules == expected
    assert rules.account_rules.ladder == ladder
    assert rules.account_rules.cost_rate == pytest.approx(7e-4)
    assert rules.reward.profit_weight == 9.0


def test_leverage_stays_forbidden_outside_paper_mode() -> None:
    features, account = np.array([[0.0, 0.0, 0.2]]), fresh()
    for paper, last in ((False, False), (True, True)):
        rules = dynamics(**{**LOOSE, "paper": paper})
        masks = rules.action_masks(rules.state_row(features, account, np.zeros(1)))
        assert masks.tolist() == [[True] * 6 + [last]]


def test_an_unknown_reward_is_refused_when_the_dynamics_are_built() -> None:
    with pytest.raises(ValueError, match=re.escape("reward.name: expected one of ['n1'], was 'n9'")):
        TradingDynamics.from_config(FEATURES, DetentConfig(reward=RewardConfig(name="n9")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((*FEATURES, "position"), "expected names that occur once in the state row, repeated ['position']"),
        ((*FEATURES, "data_age"), "repeated ['data_age']"),
        ((*FEATURES, "gap_return"), "repeated ['gap_return']"),
        (("gap_return", "volatility_20"), "missing ['intraday_return']"),
        (
            ("gap_return", "intraday_return", "volatility_10"),
            "rule 'volatility_breaker': fields: expected columns of the state row, was 'volatility_20'; "
            "did you mean 'volatility_10'?",
        ),
    ],
)
def test_a_layout_in_which_a_rule_would_read_the_wrong_column_is_refused(names, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dynamics(feature_names=names)


def test_columns_of_the_state_are_described_in_its_order() -> None:
    described = (*ACCOUNT_FIELDS, UNCERTAINTY_FIELD, AGE_FIELD)
    assert dynamics().state_names == (*FEATURES, *(field.name for field in described))


def test_extra_rules_add_to_the_built_in_ones_and_never_replace_them() -> None:
    def rules_with(*extra) -> RuleSet:
        return TradingDynamics.from_config(FEATURES, DetentConfig(limits=LimitsConfig(extra_rules=extra))).rule_set

    with pytest.raises(RuleError, match=r"^limits\.extra_rules: 'max_exposure' is built in; its limits are set under"):
        rules_with({"max_exposure": {"limit": 9.0}})
    with pytest.raises(RuleError, match=r"^limits\.extra_rules: rules\[0\]: rule: expected a registered one"):
        rules_with("max_exposur")
    assert rules_with().rules == trading_rules()


def test_modules_of_extra_rules_are_imported_under_their_own_key() -> None:
    with pytest.raises(RuleError, match=r"^limits\.rule_modules: 'no_such_rules' cannot be imported"):
        TradingDynamics.from_config(FEATURES, DetentConfig(limits=LimitsConfig(rule_modules=("no_such_rules",))))


def test_masks_and_trades_share_one_action_table() -> None:
    with pytest.raises(ValueError, match="actions: expected the same table for masks and trades"):
        TradingDynamics(
            FEATURES,
            AccountRules(actions=ActionTable((0.0, 1.0))),
            RuleSet(trading_rules(), ActionTable()),
            RewardConfig(),
        )


@pytest.mark.parametrize("width", [2, 4])
def test_rows_of_another_width_are_refused(width: int) -> None:
    rules, account = dynamics(), fresh()
    rows = np.zeros((1, width))
    with pytest.raises(ValueError, match=rf"features: expected \[B, 3\], was \[1, {width}\]"):
        rules.state_row(rows, account, np.zeros(1))
    with pytest.raises(ValueError, match=rf"next_features: expected \[B, 3\], was \[1, {width}\]"):
        rules.step(account, np.array([0]), rows)
    for read in (rules.action_masks, lambda state: rules.account_from_state(state, np.float64)):
        with pytest.raises(ValueError, match=r"state: expected \[B, 13\], was \[1, 12\]"):
            read(np.zeros((1, 12), dtype=np.float32))
        with pytest.raises(ValueError, match=r"state: expected \[B, 13\], was \[13\]"):
            read(np.zeros(13, dtype=np.float32))
