"""The joint policy is the product of its conditionals, a distribution over valid combinations, and learns with PPO."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO

from envs.portfolio import LIMITS, TABLE, PortfolioEnv, PortfolioVecEnv, observation_space
from masking import (
    ActionAudit,
    InvalidActionError,
    InvalidMaskError,
    JointLimits,
    JointWalk,
    MaskingError,
    MissingMaskError,
    TradeTable,
)
from masking.joint_policy import JointDistribution, JointMaskablePolicy, ObservationsExtractor

COMBINATIONS = torch.tensor(list(itertools.product(range(11), repeat=3)))
ACTIONS = spaces.MultiDiscrete([11, 11, 11])
Batch = tuple[dict[str, torch.Tensor], np.ndarray]


def policy_with(space: Any = None, actions: Any = ACTIONS, **kwargs: Any) -> JointMaskablePolicy:
    """A policy whose budget net reacts to the budget, as after training, and whose logits differ by more than noise."""
    torch.manual_seed(0)
    policy = JointMaskablePolicy(space or observation_space(), actions, lambda _: 1e-3, limits=LIMITS, **kwargs)
    with torch.no_grad():
        policy.budget_net.weight.normal_(0, 1)
        policy.budget_net.bias.normal_(0, 1)
        policy.action_net.weight.normal_(0, 1)
    return policy


def batch_of(num_envs: int, steps: int = 5) -> Batch:
    """Observations and masks of portfolios after a few random trades, asset orders mixed."""
    env = PortfolioVecEnv(num_envs, shuffle_assets=True, seed=1)
    obs, rng = env.reset(), np.random.default_rng(2)
    for _ in range(steps):
        obs = env.step(LIMITS.sample(obs["state"], rng, env.action_masks()))[0]
    return {name: torch.as_tensor(part) for name, part in obs.items()}, env.action_masks()


def repeated(batch: Batch, row: int, times: int) -> Batch:
    obs, masks = batch
    return {name: part[row].expand(times, -1) for name, part in obs.items()}, np.tile(masks[row], (times, 1))


def conditionals(policy: JointMaskablePolicy, batch: Batch, row: int, actions: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities [A] of each asset in the order of a row, given the actions before it; plain NumPy."""
    obs = {name: part[row].numpy() for name, part in batch[0].items()}
    with torch.no_grad():
        latent = policy.mlp_extractor.policy_net(torch.as_tensor(obs["observations"])[None])
        base = policy.action_net(latent)[0].double().numpy()
    weight, bias = (part.detach().double().numpy() for part in (policy.budget_net.weight, policy.budget_net.bias))
    cash, units, prices = float(obs["state"][0]), obs["state"][1:4].astype(float), obs["state"][4:].astype(float)
    walk, pending, needed, result = JointWalk(LIMITS, obs["state"][None], batch[1][row][None]), np.ones(3), 0.0, []
    for asset in obs["asset_order"]:
        held = units * prices
        value = cash + held.sum()
        features = np.concatenate(([cash / value, held.sum() / value, needed / value], held / value, pending))
        logits = (base + weight @ features + bias).reshape(3, 11)[asset]
        logits = np.where(walk.action_masks(int(asset))[0], logits, -np.inf)
        result.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        lot, action = TABLE.lots[actions[asset]], actions[asset]
        cash -= lot * prices[asset] + abs(lot) * (TABLE.buy_cost if lot > 0 else TABLE.sell_cost)[asset]
        units[asset] += lot
        pending[asset] = 0.0
        if lot > 0:
            needed = max(needed, units[asset] * prices[asset] / LIMITS.max_share[asset])
        walk.take(int(asset), np.array([action]))
    return result


# --- the distribution --------------------------------------------------------------------------------------------


def test_log_probability_and_entropy_equal_a_plain_loop() -> None:
    policy, batch = policy_with(), batch_of(40)
    actions, values, log_prob = policy(*batch[:1], action_masks=batch[1])
    assert (actions.shape, values.shape, log_prob.shape) == ((40, 3), (40, 1), (40,))
    _, _, entropy = policy.evaluate_actions(batch[0], actions, batch[1])
    for row in range(40):
        loop, order = conditionals(policy, batch, row, actions[row].numpy()), batch[0]["asset_order"][row].tolist()
        expected = sum(rows[actions[row, asset]] for rows, asset in zip(loop, order, strict=True))
        assert log_prob[row].item() == pytest.approx(expected, abs=2e-4)
        nats = -sum((np.exp(rows) * np.where(np.isfinite(rows), rows, 0)).sum() for rows in loop)
        assert entropy[row].item() == pytest.approx(nats, abs=2e-4)


def test_the_mode_is_the_likeliest_action_of_each_asset_in_turn() -> None:
    policy, batch = policy_with(), batch_of(40)
    actions, _, _ = policy(batch[0], deterministic=True, action_masks=batch[1])
    for row in range(40):
        loop, order = conditionals(policy, batch, row, actions[row].numpy()), batch[0]["asset_order"][row].tolist()
        assert [int(rows.argmax()) for rows in loop] == actions[row, order].tolist()
    again, _ = policy.predict(
        {name: part.numpy() for name, part in batch[0].items()}, action_masks=batch[1], deterministic=True
    )
    assert (again == actions.numpy()).all()


@pytest.mark.parametrize("row", range(6))
def test_probabilities_of_all_combinations_sum_to_one_and_the_entropy_is_that_of_the_joint(row: int) -> None:
    policy, batch = policy_with(), batch_of(6)
    obs, masks = repeated(batch, row, len(COMBINATIONS))
    valid = LIMITS.check(obs["state"], COMBINATIONS)
    assert 1 < valid.sum() < 1331
    subset = {name: part[valid] for name, part in obs.items()}
    with torch.no_grad():
        _, log_prob, entropy = policy.evaluate_actions(subset, COMBINATIONS[valid], masks[valid.numpy()])
    probs = log_prob.double().exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probs * entropy).sum().item() == pytest.approx(
        -(probs * log_prob.double())[probs > 0].sum().item(), abs=1e-4
    )


def test_frequencies_are_the_probabilities() -> None:
    policy, n = policy_with(), 20_000
    obs, masks = repeated(batch_of(6), 3, n)
    torch.manual_seed(4)
    with torch.no_grad():
        actions, _, log_prob = policy(obs, action_masks=masks)
    found, index = actions.unique(dim=0, return_inverse=True)
    share = index.bincount().double() / n
    probs = torch.zeros(len(found), dtype=torch.float64).scatter(0, index, log_prob.double().exp())
    often = probs > 1e-3
    assert often.sum() > 3
    assert ((share - probs)[often].abs() < 4.5 * (probs * (1 - probs) / n)[often].sqrt()).all()


def test_evaluation_repeats_the_log_probabilities_of_the_rollout_bit_for_bit() -> None:
    policy, batch = policy_with(), batch_of(500)
    actions, values, log_prob = policy(batch[0], action_masks=batch[1])
    in_buffer = torch.as_tensor(batch[1], dtype=torch.float32)
    again = policy.evaluate_actions(batch[0], actions, in_buffer)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], log_prob)
    distribution = policy.get_distribution(batch[0], batch[1])
    assert torch.equal(distribution.log_prob(actions), log_prob)


def test_masks_of_the_environment_forbid_more() -> None:
    policy, batch = policy_with(), batch_of(2000)
    masks = batch[1].reshape(-1, 3, 11).copy()
    masks[:, 0, TABLE.hold + 1 :] = False
    actions, _, _ = policy(batch[0], action_masks=masks.reshape(-1, 33))
    assert (actions[:, 0] <= TABLE.hold).all()
    assert (actions[:, 1:] > TABLE.hold).any()
    assert LIMITS.check(batch[0]["state"], actions).all()


def test_extreme_logits_choose_nothing_invalid() -> None:
    policy, batch = policy_with(), batch_of(2000)
    with torch.no_grad():
        policy.action_net.bias.copy_(torch.linspace(-1e9, 1e9, 33))
    actions, _, log_prob = policy(batch[0], action_masks=batch[1])
    assert LIMITS.check(batch[0]["state"], actions).all()
    assert log_prob.isfinite().all()


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one extractor", "two extractors"])
def test_every_network_gets_a_gradient(shared: bool) -> None:
    policy, batch = policy_with(share_features_extractor=shared), batch_of(300)
    with torch.no_grad():
        actions, _, _ = policy(batch[0], action_masks=batch[1])
    values, log_prob, entropy = policy.evaluate_actions(batch[0], actions, batch[1])
    (values.mean() + log_prob.mean() + entropy.mean()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    optimised = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    assert id(policy.budget_net.weight) in optimised


def test_a_new_policy_does_not_react_to_the_budget() -> None:
    policy = JointMaskablePolicy(observation_space(), ACTIONS, lambda _: 1e-3, limits=LIMITS)
    assert not policy.budget_net.weight.any()
    assert not policy.budget_net.bias.any()


def learner(num_envs: int = 64, **kwargs: Any) -> MaskablePPO:
    env = PortfolioVecEnv(num_envs, shuffle_assets=True, seed=0)
    return MaskablePPO(
        JointMaskablePolicy, env, n_steps=19, batch_size=304, n_epochs=2, gamma=1.0, seed=0, device="cpu",
        policy_kwargs={"limits": LIMITS, "net_arch": [32], **kwargs},
    )  # fmt: skip


def test_ppo_learns_without_one_invalid_action_and_survives_saving(tmp_path) -> None:
    model = learner()
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(3 * 64 * 19)
    assert model.env.audit == ActionAudit(executed=3 * 64 * 19, invalid=0)
    after = model.policy.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    model.save(tmp_path / "joint.zip")
    loaded = MaskablePPO.load(
        tmp_path / "joint.zip", env=PortfolioVecEnv(64, shuffle_assets=True, seed=3), device="cpu"
    )
    assert loaded.policy.limits == LIMITS
    assert loaded.policy.safe_action == TABLE.hold
    obs, masks = batch_of(64)
    for ours, theirs in zip(model.policy(obs, True, masks), loaded.policy(obs, True, masks), strict=True):
        assert torch.equal(ours, theirs)
    loaded.learn(64 * 19)
    assert loaded.env.audit.invalid == 0


def test_a_policy_saved_by_itself_can_be_loaded(tmp_path) -> None:
    policy, batch = policy_with(), batch_of(50)
    policy.save(tmp_path / "policy.pt")
    loaded = JointMaskablePolicy.load(tmp_path / "policy.pt")
    assert torch.equal(loaded(batch[0], True, batch[1])[0], policy(batch[0], True, batch[1])[0])


def test_it_plays_a_single_environment() -> None:
    model, env = learner(), PortfolioEnv()
    obs, _ = env.reset(seed=0)
    done = False
    while not done:
        action, _ = model.predict(obs, action_masks=env.action_masks())
        assert action.shape == (3,)
        obs, _, done, _, _ = env.step(action)
    assert env.audit == ActionAudit(executed=19, invalid=0)


def test_random_orders_remove_the_advantage_of_the_first_asset() -> None:
    # Two identical assets at $60 and money for one purchase of ten. A policy that is indifferent buys the first asset
    # half the time and the second half of the rest: 1/2 and 1/4 in fixed order, 3/8 each in random order.
    table = TradeTable(lots=(0.0, 10.0), buy_cost=(0.0, 0.0), sell_cost=(0.0, 0.0))
    limits, n = JointLimits(table=table, max_share=(1.0, 1.0)), 40_000
    state = torch.tensor([[1000.0, 0, 0, 60, 60]]).expand(n, -1)
    fixed = torch.tensor([0, 1]).expand(n, -1)
    rng = np.random.default_rng(0)
    mixed = torch.as_tensor(rng.permuted(fixed.numpy(), axis=1))
    masks = torch.ones(n, 4, dtype=torch.bool)
    torch.manual_seed(0)
    for order, expected in ((fixed, (1 / 2, 1 / 4)), (mixed, (3 / 8, 3 / 8))):
        distribution = JointDistribution(limits, torch.zeros(n, 4), torch.nn.Linear(7, 4), state, order, masks)
        with torch.no_grad():
            distribution.budget_net.weight.zero_()
            distribution.budget_net.bias.zero_()
            bought = distribution.get_actions().double().mean(dim=0)
        for found, share in zip(bought.tolist(), expected, strict=True):
            assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / n)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_every_path_without_masks_raises() -> None:
    model, (obs, masks) = learner(), batch_of(64)
    arrays = {name: part.numpy() for name, part in obs.items()}
    actions = torch.full((64, 3), TABLE.hold)
    for call in (
        lambda: model.predict(arrays),
        lambda: model.policy(obs),
        lambda: model.policy.get_distribution(obs),
        lambda: model.policy.evaluate_actions(obs, actions),
        lambda: model.learn(64 * 19, use_masking=False),
    ):
        with pytest.raises(MissingMaskError):
            call()
    for wrong in (~masks, masks.astype(np.float32), masks[:, :11], masks.T, np.where(masks, 0.0, -np.inf)):
        with pytest.raises(InvalidMaskError):
            model.policy(obs, action_masks=wrong)


def test_hold_of_every_asset_must_be_valid() -> None:
    policy, (obs, masks) = policy_with(), batch_of(8)
    masks = masks.copy()
    masks[5, 11 + TABLE.hold] = False
    with pytest.raises(InvalidMaskError, match="safe action 5 valid in every row of dimension 1"):
        policy(obs, action_masks=masks)


@pytest.mark.parametrize("missing", ["observations", "state", "asset_order"])
def test_an_observation_space_without_its_parts_is_refused(missing: str) -> None:
    parts = dict(observation_space().spaces)
    del parts[missing]
    with pytest.raises(MaskingError, match=r"observation_space: .*missing"):
        policy_with(spaces.Dict(parts), features_extractor_class=_AnyExtractor)


class _AnyExtractor(ObservationsExtractor):
    def __init__(self, space: spaces.Dict) -> None:
        super().__init__(spaces.Dict({"observations": spaces.Box(0, 1, (8,)), **space.spaces}))


def test_an_observation_that_is_no_dict_is_refused() -> None:
    with pytest.raises(MaskingError, match="observation_space: expected a Dict"):
        policy_with(spaces.Box(0, 1, (8,)), features_extractor_class=_FlatExtractor)


class _FlatExtractor(ObservationsExtractor):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(spaces.Dict({"observations": space}))


@pytest.mark.parametrize(
    "actions", [spaces.MultiDiscrete([11, 11]), spaces.MultiDiscrete([11, 11, 10]), spaces.Discrete(33)]
)
def test_an_action_space_other_than_the_trade_table_is_refused(actions: spaces.Space) -> None:
    with pytest.raises(MaskingError, match=r"action_space: expected MultiDiscrete\(\[11, 11, 11\]\)"):
        policy_with(actions=actions)


@pytest.mark.parametrize("order", [[0, 0, 2], [1, 2, 3], [-1, 0, 1]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    policy, (obs, masks) = policy_with(), batch_of(4)
    orders = obs["asset_order"].clone()
    orders[2] = torch.tensor(order)
    with pytest.raises(MaskingError, match="asset_order: expected a permutation"):
        policy({**obs, "asset_order": orders}, action_masks=masks)


def test_a_combination_outside_the_limits_is_refused_with_its_reasons() -> None:
    policy, (obs, masks) = policy_with(), batch_of(3, steps=0)
    actions = torch.full((3, 3), TABLE.hold)
    actions[1] = 10
    with pytest.raises(InvalidActionError, match=r"row 1 chose \[10, 10, 10\]: cash after the trade"):
        policy.evaluate_actions(obs, actions, masks)


def test_the_exact_check_stands_behind_the_walk(monkeypatch) -> None:
    policy, (obs, masks) = policy_with(), batch_of(200)
    monkeypatch.setattr(JointWalk, "action_masks", lambda self, asset: torch.ones(len(asset), 11, dtype=torch.bool))
    with pytest.raises(InvalidActionError, match="actions: row"):
        policy(obs, action_masks=masks)


def test_a_combination_that_the_order_cannot_reach_has_log_probability_minus_infinity() -> None:
    # As in the tests of the walk: only an intermediate sale pays for the purchase, and the purchase comes first.
    table = TradeTable(lots=(-20.0, -10.0, 0.0, 10.0), buy_cost=(0.0, 0.0), sell_cost=(1.0, 1.0))
    limits = replace(JointLimits(table=table, max_share=(1.0, 1.0)), max_share=(0.5, 1.0))
    state = torch.tensor([[12.0, 0, 20, 10, 10]]).expand(2, -1)
    logits, masks = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool)
    distribution = JointDistribution(
        limits, logits, torch.nn.Linear(7, 8), state, torch.tensor([[0, 1], [1, 0]]), masks
    )
    log_prob = distribution.log_prob(torch.tensor([[3, 1], [3, 1]]))
    assert log_prob[0] == -math.inf
    assert log_prob[1].isfinite()
