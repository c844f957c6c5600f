"""The portfolio environment: what the strict variant guarantees, and every quirk of the published one."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.env_checker import check_env as sb3_check

from envs.portfolio import (
    INITIAL_CASH,
    LARGEST_SCALED,
    LIMITS,
    PERIODS,
    PRICE_CENTRE,
    PRICE_STD,
    TABLE,
    PortfolioBatch,
    PortfolioEnv,
    PortfolioVecEnv,
    mean_prices,
    published_masks,
)
from masking import ActionAudit, InvalidActionError

VARIANTS = ["strict", "published"]
HOLD = TABLE.hold


def act(*lots: float) -> np.ndarray:
    """Actions [1, 3] that trade these units."""
    return np.array([[TABLE.lots.index(lot) for lot in lots]])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def portfolio(variant: str, cash: float, units: tuple[float, ...], prices: tuple[float, ...]) -> PortfolioBatch:
    """One portfolio in a given state."""
    batch = PortfolioBatch(variant, 1)
    batch.restart(np.array([0]), rng())
    batch.state = np.array([[cash, *units, *prices]], dtype=np.float32)
    batch._refresh()
    return batch


def choose(masks: np.ndarray, state: np.ndarray, variant: str, noise: np.random.Generator) -> np.ndarray:
    """Random valid actions."""
    if variant == "strict":
        return LIMITS.sample(state, noise, masks)
    rows = masks.reshape(-1, 3, 11)
    return np.where(rows, noise.random(rows.shape), -1).argmax(axis=2)


# --- both variants -----------------------------------------------------------------------------------------------


class OnlyHold(gymnasium.spaces.MultiDiscrete):
    """Checkers step with samples of the action space; Hold is the only action that is valid in every state."""

    def sample(self, mask=None, probability=None) -> np.ndarray:
        return np.full(3, HOLD)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_both_checkers_accept_the_environment(variant: str, shuffle: bool) -> None:
    env = PortfolioEnv(variant, shuffle_assets=shuffle)
    assert env.action_space == gymnasium.spaces.MultiDiscrete([11, 11, 11])
    env.action_space = OnlyHold([11, 11, 11])
    gymnasium_check(env, skip_render_check=True)
    sb3_check(env)


@pytest.mark.parametrize("variant", VARIANTS)
def test_observations_are_the_table_of_the_module(variant: str) -> None:
    batch = portfolio(variant, 500, (10, 200, 3000), (PRICE_CENTRE[0] - 4, PRICE_CENTRE[1] + 1, 700))
    batch.time[:] = 4
    expected = [0.5, 0.1, 2.0, LARGEST_SCALED, -1.0, 0.5, LARGEST_SCALED, 4 / 19]
    np.testing.assert_allclose(batch.observations()[0], expected, rtol=1e-5)
    assert batch.observations().dtype == np.float32
    env = PortfolioEnv(variant)
    assert env.observation_space.contains(env.reset(seed=0)[0])


def test_mean_prices_are_the_published_curves() -> None:
    # t = 0: 40 + 4 cos 0, 35, 48 - 6 sin 0. t = 4: 40 + 1.6 + 4 cos(pi/2), 35.4, 48 + 1.2 - 6 sin(8 pi/7) = + 2.6033.
    np.testing.assert_allclose(mean_prices(np.array([0, 4])), [[44, 35, 48], [41.6, 35.4, 51.8033]], atol=1e-4)


@pytest.mark.parametrize(("variant", "first"), [("strict", (44, 35, 48)), ("published", (40, 35, 48))])
def test_prices_are_normal_around_the_curves_and_the_published_start_is_not_on_them(variant: str, first) -> None:
    n = 20_000
    batch, noise = PortfolioBatch(variant, n), rng(1)
    batch.restart(np.arange(n), noise)
    for mean in (np.array(first), *mean_prices(np.arange(1, PERIODS))):
        prices = batch.state[:, 4:].astype(np.float64)
        assert (np.abs(prices.mean(axis=0) - mean) < 4.5 * PRICE_STD / np.sqrt(n)).all()
        np.testing.assert_allclose(prices.std(axis=0), PRICE_STD, rtol=0.03)
        if batch.time[0] < PERIODS - 1:
            batch.step(np.full((n, 3), HOLD), noise)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_million_sampled_actions_leave_the_audit_at_zero(variant: str) -> None:
    env, noise = PortfolioVecEnv(10_000, variant, shuffle_assets=True, seed=2), rng(3)
    obs, ended = env.reset(), 0
    for _ in range(100):
        obs, _, done, _ = env.step(choose(env.action_masks(), obs["state"], variant, noise))
        ended += done.sum()
    assert env.audit == ActionAudit(executed=1_000_000, invalid=0)
    assert ended == 50_000
    assert (obs["state"][:, :4] >= 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_invalid_actions_raise_and_nothing_has_moved(variant: str) -> None:
    env = PortfolioEnv(variant)
    env.reset(seed=0)
    before, generator = env.portfolio.state.copy(), env.np_random.bit_generator.state
    masks = env.action_masks()
    forbidden = np.array([np.flatnonzero(~masks[:11])[0], HOLD, HOLD])
    for action in (forbidden, np.array([HOLD, HOLD, 11]), np.array([HOLD, -1, HOLD]), np.array([5.0, 5.0, 5.0])):
        with pytest.raises(InvalidActionError):
            env.step(action)
    assert (env.portfolio.state == before).all()
    assert env.portfolio.time[0] == 0
    assert env.np_random.bit_generator.state == generator
    assert env.audit == ActionAudit()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_episode_has_nineteen_trades_and_then_asks_for_a_reset(variant: str) -> None:
    env = PortfolioEnv(variant)
    with pytest.raises(InvalidActionError):
        env.step(np.full(3, HOLD))
    env.reset(seed=0)
    ends = [env.step(np.full(3, HOLD))[2:4] for _ in range(19)]
    assert ends == [(False, False)] * 18 + [(True, False)]
    with pytest.raises(ValueError, match="expected a restart"):
        env.step(np.full(3, HOLD))
    env.reset()
    env.step(np.full(3, HOLD))


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_are_copies(variant: str) -> None:
    env, batched = PortfolioEnv(variant), PortfolioVecEnv(3, variant, seed=0)
    _, info = env.reset(seed=0)
    batched.reset()
    for masks in (env.action_masks(), info["action_mask"], batched.action_masks()):
        assert masks.dtype == np.bool_
        masks[...] = True
    for portfolios in (env.portfolio, batched.portfolio):
        assert not portfolios.action_masks[0, :5].any()
    obs = batched.reset()
    obs["state"][:] = 1e6
    assert batched.portfolio.state[0, 0] == INITIAL_CASH
    assert (get_action_masks(batched)[0] == batched.action_masks()).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_stepped_together_equal_single_portfolios(variant: str) -> None:
    # Prices come from one generator, so each single portfolio is told the prices that its row drew.
    batch, noise = PortfolioBatch(variant, 30), rng(4)
    batch.restart(np.arange(30), noise)
    for _ in range(PERIODS - 1):
        singles = [portfolio(variant, row[0], tuple(row[1:4]), tuple(row[4:])) for row in batch.state]
        actions = choose(batch.action_masks, batch.state, variant, noise)
        masks = batch.action_masks
        batch.step(actions, noise)
        for index, single in enumerate(singles):
            assert (single.action_masks[0] == masks[index]).all()
            single.step(actions[index : index + 1], rng())
            assert (single.state[0, :4] == batch.state[index, :4]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vec_env_of_one_row_equals_the_environment(variant: str) -> None:
    env, batched, noise = PortfolioEnv(variant), PortfolioVecEnv(1, variant, seed=7), rng(5)
    env.reset(seed=0)
    env._np_random = np.random.default_rng(7)
    obs, many = env.reset()[0], batched.reset()
    for _ in range(PERIODS - 1):
        np.testing.assert_equal({name: part[0] for name, part in many.items()}, obs)
        action = choose(batched.action_masks(), many["state"], variant, noise)
        obs, reward, terminated, _, info = env.step(action[0])
        many, rewards, done, infos = batched.step(action)
        assert rewards[0] == np.float32(reward)
        assert done[0] == terminated
    np.testing.assert_equal(infos[0]["terminal_observation"], obs)
    assert (infos[0]["terminal_action_mask"] == info["action_mask"]).all()
    assert not infos[0]["TimeLimit.truncated"]
    assert batched.audit == env.audit == ActionAudit(executed=19, invalid=0)
    assert many["state"][0].tolist()[:4] == [1000, 0, 0, 0]


def test_asset_orders_are_mixed_only_if_asked() -> None:
    for shuffle, expected in ((False, 1), (True, 6)):
        obs = PortfolioVecEnv(500, shuffle_assets=shuffle, seed=0).reset()
        assert len(np.unique(obs["asset_order"], axis=0)) == expected
        assert (np.sort(obs["asset_order"], axis=1) == np.arange(3)).all()


def test_equal_seeds_give_equal_episodes_and_others_do_not() -> None:
    first, again, other = (PortfolioVecEnv(5, shuffle_assets=True, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_equal(first.reset(), again.reset())
    assert (first.portfolio.state != other.reset()["state"]).any()


@pytest.mark.parametrize(("variant", "batch"), [("Strict", 1), ("strict", 0)])
def test_arguments_that_mean_nothing_are_refused(variant: str, batch: int) -> None:
    with pytest.raises(ValueError, match=r"^(variant|batch): expected"):
        PortfolioBatch(variant, batch)


# --- strict ------------------------------------------------------------------------------------------------------


def test_strict_trades_at_cost_to_the_cent() -> None:
    batch = portfolio("strict", 100, (20, 0, 0), (40, 30, 20))
    batch.step(act(-20, 10, 10), rng())
    # 100 + 20 * 39.975 - 10 * 30.045 - 10 * 20.035 = 398.70
    np.testing.assert_allclose(batch.state[0, :4], [398.7, 0, 10, 10], rtol=1e-6)


def test_strict_rewards_sum_to_the_change_of_value_over_a_thousand() -> None:
    env, noise = PortfolioVecEnv(500, seed=5), rng(6)
    obs, total = env.reset(), np.zeros(500)
    for _ in range(PERIODS - 1):
        obs, reward, done, infos = env.step(choose(env.action_masks(), obs["state"], "strict", noise))
        total += reward
    assert done.all()
    last = np.stack([info["terminal_observation"]["state"] for info in infos]).astype(np.float64)
    final = last[:, 0] + (last[:, 1:4] * last[:, 4:]).sum(axis=1)
    np.testing.assert_allclose(total, (final - 1000) / 1000, atol=1e-5)


def test_strict_refuses_together_what_its_masks_allow_apart() -> None:
    env = PortfolioEnv("strict")
    env.reset(seed=0)
    env.portfolio.state[0, 4:] = 40, 35, 30
    env.portfolio._refresh()
    before = env.portfolio.state.copy()
    for lots in ((20, 0, 0), (0, 10, 0)):
        assert LIMITS.check(env.portfolio.state, act(*lots))
    with pytest.raises(InvalidActionError, match=r"row 0 chose .*: cash after the trade -151.05 is below 1"):
        env.step(act(20, 10, 0)[0])
    assert (env.portfolio.state == before).all()
    assert env.audit.executed == 0


def test_strict_limits_hold_after_every_trade() -> None:
    batch, noise = PortfolioBatch("strict", 3000), rng(8)
    batch.restart(np.arange(3000), noise)
    for _ in range(PERIODS - 1):
        before = batch.state.astype(np.float64)
        batch.step(LIMITS.sample(batch.state, noise, batch.action_masks), noise)
        cash, units = batch.state[:, 0].astype(np.float64), batch.state[:, 1:4].astype(np.float64)
        held = units * before[:, 4:]
        bought, value = units > before[:, 1:4], cash + held.sum(axis=1)
        assert (units >= 0).all()
        assert (cash[bought.any(axis=1)] >= 1 - 1e-3).all()
        for asset, share in enumerate(LIMITS.max_share):
            rows = bought[:, asset]
            assert (held[rows, asset] <= share * value[rows] + 1e-2).all()


@pytest.mark.parametrize(
    ("lots", "prices"),
    [((20, 10, 0), (40, 35, 30)), ((0, 0, 10), (40, 35, 50)), ((0, 20, 0), (40, 35, 50)), ((-10, 0, 0), (40, 35, 50))],
)
def test_the_audit_sees_a_limit_that_the_check_let_through(monkeypatch, lots, prices) -> None:
    monkeypatch.setattr(type(LIMITS), "check", lambda self, state, actions: np.ones(len(state), dtype=bool))
    batch = portfolio("strict", 1000, (0, 0, 0), prices)
    batch.action_masks[:] = True
    batch.step(act(*lots), rng())
    assert batch.audit.invalid == 1


def test_the_audit_sees_a_mask_that_the_check_let_through(monkeypatch) -> None:
    monkeypatch.setattr("envs.portfolio.check_actions", lambda *_: None)
    env, batched = PortfolioEnv("published"), PortfolioVecEnv(2, "published", seed=0)
    env.reset(seed=0)
    batched.reset()
    env.step(act(-10, 0, 0)[0])
    batched.step(np.concatenate((act(-10, 0, 0), act(0, 0, 0))))
    assert env.audit == ActionAudit(executed=1, invalid=1)
    assert batched.audit == ActionAudit(executed=2, invalid=1)


# --- published, quirk by quirk -----------------------------------------------------------------------------------


def test_published_shares_are_judged_before_the_trade_and_exceeded_after_it() -> None:
    batch = portfolio("published", 1000, (0, 0, 0), (40, 35, 10))
    assert batch.action_masks[0, 22:].tolist() == [False] * 5 + [True] * 6
    batch.step(act(0, 0, 50), rng())
    # 50 * 10.03 (sic) leaves 498.50: half of the value is in asset 3.
    np.testing.assert_allclose(batch.state[0, :4], [498.5, 0, 0, 50], rtol=1e-6)


@pytest.mark.parametrize(("units", "allowed"), [((0, 0, 10), True), ((0, 0, 20), False)])
def test_published_asset_three_may_be_bought_at_exactly_a_third(units, allowed: bool) -> None:
    # 10 of 10 * 10 + 200 is a third, 20 is 200 of 400.
    masks = portfolio("published", 200, units, (40, 35, 10)).action_masks[0].reshape(3, 11)
    assert masks[2, 6:].tolist() == [allowed] * 5
    assert masks[:2, 6:].all()


@pytest.mark.parametrize(("cash", "allowed"), [(175, True), (174, False)])
def test_published_asset_two_may_be_bought_at_exactly_two_thirds(cash: float, allowed: bool) -> None:
    masks = portfolio("published", cash, (0, 10, 0), (40, 35, 10)).action_masks[0].reshape(3, 11)
    assert masks[1, 6:].tolist() == [allowed] * 5


@pytest.mark.parametrize(("cash", "allowed"), [(1.0, True), (0.99, False)])
def test_published_least_cash_binds_asset_one_alone(cash: float, allowed: bool) -> None:
    masks = portfolio("published", cash, (10, 0, 0), (40, 35, 10)).action_masks[0].reshape(3, 11)
    assert masks[0, 6:].tolist() == [allowed] * 5
    assert masks[1:, 6:].all()


def test_published_purchases_are_cut_to_what_cash_covers_in_the_order_of_the_assets() -> None:
    # 20 of asset 1 are 800.60 at the buying cost, charged 800.50 at the selling cost; 199.50 is left for none of the
    # ten lots of asset 2 at 350.45, and for one of asset 3 at 100.35, charged 100.30.
    batch = portfolio("published", 1000, (0, 0, 0), (40, 35, 10))
    batch.step(act(20, 10, 50), rng())
    np.testing.assert_allclose(batch.state[0, :4], [99.2, 20, 0, 10], rtol=1e-5)
    assert batch.overridden == 1


def test_published_purchases_are_covered_at_the_buying_cost() -> None:
    # 10 * 40.03 = 400.30 must be covered although 400.25 is charged.
    for cash, bought in ((400.31, 10), (400.29, 0)):
        batch = portfolio("published", cash, (0, 0, 0), (40, 35, 10))
        batch.step(act(10, 0, 0), rng())
        assert batch.state[0, 1] == bought
        assert batch.overridden == (bought == 0)


def test_published_sales_are_cut_to_what_cash_covers_the_cost_of() -> None:
    # Selling 30 costs 0.75; $0.60 covers 20 of them, although the sale would bring $1200.
    batch = portfolio("published", 0.6, (30, 0, 0), (40, 35, 10))
    batch.step(act(-30, 0, 0), rng())
    np.testing.assert_allclose(batch.state[0, :2], [0.6 + 20 * 39.975, 10], rtol=1e-6)
    assert batch.overridden == 1


def test_published_sales_fund_only_the_assets_after_them() -> None:
    for lots, units in (((-10, 10, 0), (0, 10, 0)), ((10, -10, 0), (0, 0, 0))):
        held = tuple(-min(lot, 0) for lot in lots)
        batch = portfolio("published", 1, held, (40, 35, 10))
        batch.step(act(*lots), rng())
        assert tuple(batch.state[0, 1:4]) == units


def test_published_pays_the_final_value_and_nothing_before() -> None:
    env, noise = PortfolioVecEnv(50, "published", seed=1), rng(2)
    obs = env.reset()
    for _ in range(PERIODS - 1):
        obs, reward, done, infos = env.step(choose(env.action_masks(), obs["state"], "published", noise))
        if not done.any():
            assert (reward == 0).all()
    last = np.stack([info["terminal_observation"]["state"] for info in infos]).astype(np.float64)
    np.testing.assert_allclose(reward, last[:, 0] + (last[:, 1:4] * last[:, 4:]).sum(axis=1), rtol=1e-6)


def test_published_random_masked_play_is_worth_what_was_published() -> None:
    env, noise = PortfolioVecEnv(4000, "published", seed=11), rng(12)
    obs = env.reset()
    for _ in range(PERIODS - 1):
        obs, reward, _, _ = env.step(choose(env.action_masks(), obs["state"], "published", noise))
    assert abs(reward.mean() - 1247) < 4 * reward.std() / np.sqrt(4000)
    assert env.portfolio.overridden > 0.9 * 4000 * 19


def test_info_counts_the_overrides_of_an_environment() -> None:
    env = PortfolioEnv("published")
    _, info = env.reset(seed=0)
    assert (info["overridden"], info["value"]) == (0, 1000.0)
    _, _, _, _, info = env.step(act(50, 0, 0)[0])
    assert info["overridden"] == 1
    assert info["value"] == pytest.approx(float(env.portfolio.value[0]))


def test_published_masks_forbid_short_positions() -> None:
    state = np.array([[1000.0, 20, 0, 50, 40, 35, 10]])
    owned = published_masks(state).reshape(3, 11)[:, :6]
    assert owned.tolist() == [[False] * 3 + [True] * 3, [False] * 5 + [True], [True] * 6]
