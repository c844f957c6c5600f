"""The strict policy refuses every unmasked path and otherwise is sb3-contrib's own policy, bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from masking import InvalidMaskError, MaskingError, MissingMaskError
from masking.strict_policy import StrictMaskablePolicy

NUM_ACTIONS = 5
OBS = np.eye(NUM_ACTIONS, dtype=np.float32)


class MaskedIdentity(gymnasium.Env):
    """Name the context you see, among the valid actions; episodes of eight steps. Counts forbidden actions."""

    observation_space = spaces.Box(0.0, 1.0, (NUM_ACTIONS,), np.float32)
    action_space = spaces.Discrete(NUM_ACTIONS)

    def __init__(self) -> None:
        self.forbidden = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        self._draw()
        return OBS[self.context], {}

    def step(self, action: Any):
        self.forbidden += int(not self.masks[action])
        reward = float(action == self.context)
        self.steps += 1
        self._draw()
        return OBS[self.context], reward, False, self.steps >= 8, {}

    def action_masks(self) -> np.ndarray:
        return self.masks

    def _draw(self) -> None:
        self.context = int(self.np_random.integers(NUM_ACTIONS))
        self.masks = self.np_random.random(NUM_ACTIONS) < 0.3
        self.masks[[0, self.context]] = True


def learner(policy: type[MaskableActorCriticPolicy] = StrictMaskablePolicy, **kwargs: Any) -> MaskablePPO:
    return MaskablePPO(
        policy, MaskedIdentity(), n_steps=32, batch_size=16, n_epochs=2, seed=3, device="cpu",
        policy_kwargs={"net_arch": [16]}, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MaskablePPO:
    return learner()


def masks_of(*rows: list[int]) -> np.ndarray:
    masks = np.zeros((len(rows), NUM_ACTIONS), dtype=bool)
    for mask, row in zip(masks, rows, strict=True):
        mask[row] = True
    return masks


# --- the same learner ----------------------------------------------------------------------------------------


def test_learning_equals_the_plain_policy_bit_for_bit() -> None:
    # Building a learner seeds the generators of the whole process, so each learns before the next is built.
    ours = learner().learn(128).policy.state_dict()
    theirs = learner(MaskableActorCriticPolicy).learn(128).policy.state_dict()
    assert list(ours) == list(theirs)
    for name, weights in ours.items():
        assert torch.equal(weights, theirs[name]), name
    fresh = learner().policy.state_dict()
    assert not torch.equal(ours["action_net.weight"], fresh["action_net.weight"])


def test_masks_reach_training_and_no_forbidden_action_is_executed() -> None:
    strict = learner()
    strict.learn(128)
    env = strict.get_env().envs[0].unwrapped
    assert env.forbidden == 0


def test_masked_evaluation_works_and_the_plain_policy_without_masks_executes_forbidden_actions() -> None:
    env = MaskedIdentity()
    evaluate_masked(learner(), Monitor(env), n_eval_episodes=4)
    assert env.forbidden == 0
    evaluate_policy(learner(MaskableActorCriticPolicy), Monitor(env), n_eval_episodes=4)
    assert env.forbidden > 10  # of 32; this is what the strict policy refuses


# --- unmasked paths ------------------------------------------------------------------------------------------


def test_predict_without_masks_raises(model: MaskablePPO) -> None:
    for deterministic in (False, True):
        with pytest.raises(MissingMaskError, match=r"pass action_masks= to predict\(\)"):
            model.predict(OBS, deterministic=deterministic)


def test_learning_without_masking_raises() -> None:
    with pytest.raises(MissingMaskError, match="use_masking=False"):
        learner().learn(32, use_masking=False)


def test_the_plain_eval_callback_raises() -> None:
    callback = EvalCallback(Monitor(MaskedIdentity()), eval_freq=8, n_eval_episodes=1, verbose=0)
    with pytest.raises(MissingMaskError, match="stable-baselines3's EvalCallback"):
        learner().learn(32, callback=callback)


def test_plain_evaluate_policy_raises(model: MaskablePPO) -> None:
    with pytest.raises(MissingMaskError):
        evaluate_policy(model, Monitor(MaskedIdentity()), n_eval_episodes=1)


def test_every_method_of_the_policy_raises_without_masks(model: MaskablePPO) -> None:
    obs, actions = torch.as_tensor(OBS), torch.zeros(NUM_ACTIONS, dtype=torch.int64)
    for call in (
        lambda: model.policy(obs),
        lambda: model.policy.forward(obs, deterministic=True),
        lambda: model.policy.get_distribution(obs),
        lambda: model.policy._predict(obs),
        lambda: model.policy.evaluate_actions(obs, actions),
    ):
        with pytest.raises(MissingMaskError):
            call()


# --- wrong masks ---------------------------------------------------------------------------------------------

WRONG = {
    "additive": np.where(masks_of(*[[0, 1]] * 5), 0.0, -np.inf),
    "integers": masks_of(*[[0, 1]] * 5).astype(np.int64),
    "float 0/1": masks_of(*[[0, 1]] * 5).astype(np.float32),
    "NaN": np.full((5, NUM_ACTIONS), np.nan),
    "all False": masks_of(*[[]] * 5),
    "one row all False": masks_of([0], [0], [], [0], [0]),
    "transposed": masks_of(*[[0, 1]] * 4).T.copy(),
    "wrong batch": masks_of(*[[0, 1]] * 4),
    "one row for five": masks_of([0, 1])[0],
    "flattened": masks_of(*[[0, 1]] * 5).ravel(),
    "two batches": np.stack([masks_of(*[[0, 1]] * 5)] * 2),
}


@pytest.mark.parametrize("masks", WRONG.values(), ids=WRONG)
def test_wrong_masks_raise_on_every_path(model: MaskablePPO, masks: np.ndarray) -> None:
    obs, actions = torch.as_tensor(OBS), torch.zeros(NUM_ACTIONS, dtype=torch.int64)
    for call in (
        lambda: model.predict(OBS, action_masks=masks),
        lambda: model.policy(obs, action_masks=masks),
        lambda: model.policy(obs, action_masks=torch.as_tensor(masks)),
        lambda: model.policy.get_distribution(obs, masks),
        lambda: model.policy.evaluate_actions(obs, actions, masks),
    ):
        with pytest.raises(InvalidMaskError):
            call()


@pytest.mark.parametrize("wrong", [0.5, -np.inf, np.nan, 2.0])
def test_a_rollout_buffer_with_anything_but_0_and_1_raises(model: MaskablePPO, wrong: float) -> None:
    masks = torch.ones(5, NUM_ACTIONS)
    masks[3, 2] = wrong
    with pytest.raises(InvalidMaskError, match="only 0 and 1 in the rollout buffer"):
        model.policy.evaluate_actions(torch.as_tensor(OBS), torch.zeros(5, dtype=torch.int64), masks)


def test_an_additive_mask_of_zeros_in_the_buffer_raises_too(model: MaskablePPO) -> None:
    with pytest.raises(InvalidMaskError, match="safe action 0"):
        model.policy.evaluate_actions(
            torch.as_tensor(OBS), torch.zeros(5, dtype=torch.int64), torch.zeros(5, NUM_ACTIONS)
        )


# --- valid masks ---------------------------------------------------------------------------------------------


def test_the_buffers_float_masks_and_bool_masks_evaluate_alike(model: MaskablePPO) -> None:
    obs, actions = torch.as_tensor(OBS), torch.zeros(5, dtype=torch.int64)
    masks = torch.as_tensor(masks_of(*[[0, 1, 3]] * 5))
    for ours, theirs in zip(
        model.policy.evaluate_actions(obs, actions, masks),
        model.policy.evaluate_actions(obs, actions, masks.float()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_the_stacked_answer_of_a_batched_environment_is_accepted(model: MaskablePPO) -> None:
    masks = masks_of(*[[0, 1, 3]] * 5)
    flat = model.policy.get_distribution(torch.as_tensor(OBS), masks)
    stacked = model.policy.get_distribution(torch.as_tensor(OBS), masks[None])
    assert torch.equal(flat.distribution.probs, stacked.distribution.probs)


def test_a_single_observation_takes_a_single_mask_row(model: MaskablePPO) -> None:
    action, _ = model.predict(OBS[0], action_masks=masks_of([0])[0])
    assert action == 0


def test_entropy_is_the_logarithm_of_the_number_of_valid_actions_for_a_uniform_policy() -> None:
    policy = learner().policy
    torch.nn.init.zeros_(policy.action_net.weight)
    masks = masks_of([0], [0, 1], [0, 2, 4], [0, 1, 2, 3], list(range(5)))
    _, _, entropy = policy.evaluate_actions(torch.as_tensor(OBS), torch.zeros(5, dtype=torch.int64), masks)
    np.testing.assert_allclose(entropy.exp().detach().numpy(), [1, 2, 3, 4, 5], rtol=1e-5)


@pytest.mark.parametrize("bias", [-1e9, -3e38, -np.inf, 1e9, np.inf])
def test_exploded_logits_still_choose_a_valid_action(bias: float) -> None:
    # sb3-contrib masks with -1e8: below that, a valid action would be less likely than every forbidden one.
    policy = learner().policy
    with torch.no_grad():
        policy.action_net.bias[:2] = bias
    masks = masks_of(*[[0, 1]] * 5)
    for deterministic in (True, False):
        actions, _, log_prob = policy(torch.as_tensor(OBS), deterministic, masks)
        assert set(actions.tolist()) <= {0, 1}
        assert torch.isfinite(log_prob).all()


def test_nan_logits_raise_instead_of_acting() -> None:
    policy = learner().policy
    with torch.no_grad():
        policy.action_net.bias[3] = np.nan
    with pytest.raises(ValueError, match="logits"):
        policy(torch.as_tensor(OBS), False, masks_of(*[[0, 1]] * 5))


# --- MultiDiscrete and other safe actions -----------------------------------------------------------------------------


class Pairs(gymnasium.Env):
    """Two choices of three, the middle one safe."""

    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = spaces.MultiDiscrete([3, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any):
        assert self.action_masks()[[action[0], 3 + action[1]]].all()
        return np.zeros(2, np.float32), float(action.sum()), False, True, {}

    def action_masks(self) -> np.ndarray:
        return np.array([False, True, True, True, True, False])


def test_multi_discrete_actions_stay_in_their_masks_and_need_their_safe_action(tmp_path: Any) -> None:
    options = {"n_steps": 32, "batch_size": 16, "device": "cpu", "seed": 0}
    model = MaskablePPO(StrictMaskablePolicy, Pairs(), policy_kwargs={"safe_action": 1}, **options).learn(64)
    model.save(tmp_path / "model.zip")
    again = MaskablePPO.load(tmp_path / "model.zip", device="cpu")
    assert again.policy.safe_action == 1
    obs, masks = np.zeros(2, np.float32), Pairs().action_masks()
    assert again.predict(obs, action_masks=masks, deterministic=True)[0].shape == (2,)
    with pytest.raises(InvalidMaskError, match="safe action 1 valid in every row of dimension 0"):
        again.predict(obs, action_masks=np.array([True, False, True, True, True, False]))
    with pytest.raises(InvalidMaskError, match="safe action 0"):  # the default, which this environment masks
        MaskablePPO(StrictMaskablePolicy, Pairs(), **options).learn(32)


def test_without_a_safe_action_any_row_with_a_choice_is_accepted() -> None:
    policy = learner().policy
    policy.safe_action = None
    obs = torch.as_tensor(OBS)
    actions, _, _ = policy(obs, False, masks_of([1], [2], [3], [4], [0, 1]))
    assert actions[:4].tolist() == [1, 2, 3, 4]
    with pytest.raises(InvalidMaskError, match="at least one valid action"):
        policy(obs, False, masks_of([1], [], [3], [4], [0, 1]))


def test_dict_observations_are_combined_without_being_asked() -> None:
    env = gymnasium.make("envs.registration:detent/Portfolio-v0")
    options = {"n_steps": 19, "batch_size": 19, "n_epochs": 1, "device": "cpu"}
    model = MaskablePPO(StrictMaskablePolicy, env, policy_kwargs={"safe_action": 5}, **options)
    obs, _ = env.reset(seed=0)
    assert model.predict(obs, action_masks=env.unwrapped.action_masks())[0].shape == (3,)


def test_a_policy_saved_by_itself_keeps_its_safe_action(tmp_path: Any) -> None:
    policy = StrictMaskablePolicy(Pairs.observation_space, Pairs.action_space, lambda _: 1e-3, safe_action=1)
    policy.save(tmp_path / "policy.pt")
    assert StrictMaskablePolicy.load(tmp_path / "policy.pt").safe_action == 1


def test_other_action_spaces_are_refused() -> None:
    class Continuous(MaskedIdentity):
        action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    with pytest.raises(MaskingError, match="expected actions from 0, was Discrete"):
        StrictMaskablePolicy(Continuous.observation_space, spaces.Discrete(3, start=2), lambda _: 1e-3)
    with pytest.raises(MaskingError, match="action_space: expected Discrete or MultiDiscrete, was Box"):
        StrictMaskablePolicy(Continuous.observation_space, Continuous.action_space, lambda _: 1e-3)
