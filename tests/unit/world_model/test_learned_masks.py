import dataclasses
import json

import numpy as np
import pytest
import torch

from data.errors import DataError
from masking import InvalidMaskError
from world_model import ModelFileError, Normaliser
from world_model.learned_masks import (
    LearnedMaskConfig,
    LearnedMasks,
    learn_masks,
    proposed_thresholds,
    split_groups,
)
from world_model.mask_bound import MaskBound, MaskBoundError, mask_errors
from world_model.mask_head import MaskHead, MaskHeadConfig

# One error in a hundred at 95 % needs 299 groups.
CONFIG = LearnedMaskConfig(
    head=MaskHeadConfig(hidden=(16,), batch_size=256, max_epochs=25, learning_rate=1e-2), bound_share=0.5, target=0.01
)
EPISODES, STEPS = 800, 3


def experience(seed=0, episodes=EPISODES, safe_action=0, random_masks=False):
    """Episodes with a fixed y each: action 1 is valid where x > 0, action 2 where y > 0, action 0 always or never."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(episodes), STEPS)
    obs = np.stack([rng.uniform(-1, 1, len(groups)), rng.uniform(-1, 1, episodes)[groups]], axis=1)
    action_masks = np.stack([np.full(len(groups), safe_action == 0), obs[:, 0] > 0, obs[:, 1] > 0], axis=1)
    if random_masks:
        action_masks[:, 1:] = rng.random((len(groups), 2)) < 0.5
    if safe_action is None:
        keep = action_masks.any(axis=1)
        obs, action_masks, groups = obs[keep], action_masks[keep], groups[keep]
    return obs, action_masks, groups


def hand_made(weights, *, threshold=0.0, safe_action=None, num_actions=3):
    """Logits are weights[action] * obs[0]; support [-1, 1]."""
    one = torch.ones(1)
    head = MaskHead(
        Normaliser(0 * one, one), (-one, one), num_actions=num_actions, hidden=(), generator=torch.Generator()
    )
    with torch.no_grad():
        head.network[0].weight.copy_(torch.tensor(weights)[:, None])
    bound = MaskBound(
        target=0.01,
        confidence=0.95,
        threshold=threshold,
        trials=299,
        errors=0,
        upper_bound=0.00997,
        candidates=1,
        passed=1,
    )
    return LearnedMasks(head.requires_grad_(False), bound, safe_action=safe_action)


@pytest.fixture(scope="module")
def learned_and_report():
    return learn_masks(*experience(), safe_action=0, seed=0, config=CONFIG)


def test_promise_holds_on_fresh_episodes_and_few_valid_actions_are_lost(learned_and_report):
    learned, report = learned_and_report
    obs, action_masks, groups = experience(seed=1, episodes=4000)
    errors = mask_errors(learned(obs), action_masks, groups, safe_action=0)
    assert errors.false_valid <= CONFIG.target
    assert errors.false_invalid < 0.1
    assert (report.bound.target, report.bound.confidence, report.held_out.groups) == (0.01, 0.95, 400)
    assert 299 <= report.bound.trials <= 400
    assert report.bound.upper_bound <= 0.01
    assert report.fit.fit_rows + report.fit.stop_rows + report.held_out.rows == EPISODES * STEPS
    assert json.loads(json.dumps(report.to_dict()))["bound"]["trials"] == report.bound.trials


def test_same_seed_same_masks(learned_and_report):
    again, report = learn_masks(*experience(), safe_action=0, seed=0, config=CONFIG)
    assert report == learned_and_report[1]
    obs = torch.tensor(experience(seed=2)[0])
    assert torch.equal(again.head(obs), learned_and_report[0].head(obs))


def test_masks_by_hand_at_the_threshold():
    learned = hand_made([1.0, -1.0, 2.0], threshold=0.5)
    assert learned(np.array([[0.5], [-0.5], [0.25], [1.0]])).tolist() == [
        [True, False, True],
        [False, True, False],
        [False, False, True],
        [True, False, True],
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 1.5])
def test_rows_that_cannot_be_judged_keep_only_the_safe_action(value):
    learned = hand_made([1.0, 1.0, 1.0], threshold=-100.0, safe_action=2)
    masks = learned(np.array([[value], [0.0]]))
    assert masks.tolist() == [[False, False, True], [True, True, True]]
    assert not learned.judge(np.array([[value]])).refused.any()


@pytest.mark.parametrize("value", [np.nan, 1e300, 1.5, -0.5])
def test_without_a_safe_action_rows_without_a_valid_one_are_refused(value):
    learned = hand_made([1.0, 2.0, 3.0])
    obs = np.array([[0.5], [value]])
    verdict = learned.judge(obs)
    assert verdict.action_masks.tolist() == [[True] * 3, [False] * 3]
    assert verdict.refused.tolist() == [False, True]
    with pytest.raises(InvalidMaskError, match="none in 1 of 2 rows, first row 1; truncate branches"):
        learned(obs)


def test_the_safe_action_survives_whatever_the_head_says():
    learned = hand_made([1.0, -9.0, 1.0], safe_action=1)
    assert learned(np.array([[1.0], [-1.0]])).tolist() == [[True, True, True], [False, True, False]]


def test_numpy_and_torch_agree_and_keep_their_kind(learned_and_report):
    learned, obs = learned_and_report[0], experience(seed=3)[0]
    from_numpy, from_torch = learned(obs), learned(torch.tensor(obs))
    assert isinstance(from_numpy, np.ndarray)
    assert from_torch.dtype == torch.bool
    assert np.array_equal(from_numpy, from_torch.numpy())
    frozen = obs.copy()
    frozen.flags.writeable = False
    assert np.array_equal(learned(frozen), from_numpy)


def test_saved_masks_are_the_same_masks(learned_and_report, tmp_path):
    learned, _ = learned_and_report
    digest = learned.save(tmp_path / "masks")
    loaded = LearnedMasks.load(tmp_path / "masks")
    obs = torch.tensor(experience(seed=4)[0])
    assert torch.equal(loaded.head.scores(obs), learned.head.scores(obs))
    assert (loaded.bound, loaded.safe_action, loaded.num_actions) == (learned.bound, 0, 3)
    assert loaded.save(tmp_path / "again") == digest
    assert not any(parameter.requires_grad for parameter in loaded.head.parameters())


def test_a_loosened_threshold_is_found_on_load(learned_and_report, tmp_path):
    learned_and_report[0].save(tmp_path / "masks")
    path = tmp_path / "masks" / "model.json"
    content = json.loads(path.read_text())
    content["bound"]["threshold"] = -100.0
    path.write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match="the file was changed"):
        LearnedMasks.load(tmp_path / "masks")


def test_another_model_is_not_read_as_masks(make_network, make_model, tmp_path):
    make_model(make_network()).save(tmp_path / "market")
    with pytest.raises(ModelFileError, match="kind: expected 'learned_masks', was None"):
        LearnedMasks.load(tmp_path / "market")


def test_weights_that_are_not_finite_are_refused_on_load(tmp_path):
    hand_made([np.nan, 1.0, 1.0]).save(tmp_path / "masks")
    with pytest.raises(ModelFileError, match="finite"):
        LearnedMasks.load(tmp_path / "masks")


def test_too_few_episodes_are_refused_before_anything_is_fitted():
    with pytest.raises(MaskBoundError, match=r"0 errors in 2[0-9] held-out groups .* need 299 groups") as error:
        learn_masks(
            *experience(episodes=60),
            safe_action=0,
            seed=0,
            config=dataclasses.replace(CONFIG, head=MaskHeadConfig(learning_rate=1e30)),  # a fit would diverge
        )
    assert error.value.needed == 299


def test_masks_that_allow_everything_leave_nothing_to_learn():
    obs, action_masks, groups = experience()
    with pytest.raises(
        DataError, match="expected some invalid actions to learn from, found none: nothing is ever masked"
    ):
        learn_masks(obs, np.ones_like(action_masks), groups, safe_action=0, seed=0, config=CONFIG)


def test_masks_that_obs_do_not_tell_are_refused():
    with pytest.raises(MaskBoundError) as error:
        learn_masks(*experience(random_masks=True), safe_action=0, seed=0, config=CONFIG)
    assert error.value.errors > 0
    assert error.value.upper_bound > 0.01


def test_environment_without_a_safe_action():
    obs, action_masks, groups = experience(safe_action=None)
    learned, report = learn_masks(obs, action_masks, groups, safe_action=None, seed=0, config=CONFIG)
    verdict = learned.judge(obs)
    assert not verdict.action_masks[:, 0].any()  # action 0 is never valid here, and nothing makes it so
    assert np.array_equal(verdict.refused, ~verdict.action_masks.any(axis=1))
    assert report.held_out.refused < 0.1


def test_only_the_bound_part_decides_the_bound_and_it_decides_nothing_else():
    config = dataclasses.replace(CONFIG, target=0.3)
    obs, action_masks, groups = experience()
    first, report = learn_masks(obs, action_masks, groups, safe_action=0, seed=0, config=config)
    held_out = split_groups(groups, config.stop_share, config.bound_share)[2]
    changed_obs, changed_masks = obs.copy(), action_masks.copy()
    # One wrong verdict in ten: fit and temperature stay bit for bit, the certificate does not.
    changed_masks[held_out[::10], 1:] = ~changed_masks[held_out[::10], 1:]
    changed_obs[held_out[1::10]] *= 0.9
    second, other = learn_masks(changed_obs, changed_masks, groups, safe_action=0, seed=0, config=config)
    probe = torch.tensor(experience(seed=5)[0])
    assert torch.equal(first.head(probe), second.head(probe))
    assert other.fit == report.fit
    assert other.bound.candidates == report.bound.candidates  # proposed by the stop part
    assert other.bound.errors > report.bound.errors
    assert other.held_out.false_valid > report.held_out.false_valid


def test_groups_are_split_in_the_order_of_their_first_rows():
    groups = np.array([30, 10, 30, 20, 10, 50, 40, 20, 50, 40])
    fit, stop, bound = split_groups(groups, 0.2, 0.4)
    assert fit.tolist() == [0, 1, 2, 4]  # 30 and 10
    assert stop.tolist() == [3, 7]  # 20
    assert bound.tolist() == [5, 6, 8, 9]  # 50 and 40


def test_a_part_without_a_group_is_refused():
    with pytest.raises(DataError, match="was 1, 0, 1 of 2"):
        split_groups(np.array([1, 1, 2]), 0.1, 0.4)


def test_thresholds_are_proposed_by_the_share_of_valid_actions_they_lose():
    scores = np.arange(1, 1001, dtype=np.float64)
    thresholds = proposed_thresholds(scores)
    assert thresholds[0] == 900.0  # nine in ten are lost
    assert thresholds[-1] == 1.0  # none is
    assert (np.diff(thresholds) < 0).all()
    # What cannot be judged proposes nothing, and what is more likely invalid than valid is never let through.
    assert proposed_thresholds(np.array([-np.inf, -3.0, 2.0, 2.0])).tolist() == [2.0, 0.0]
    with pytest.raises(DataError, match="found none"):
        proposed_thresholds(np.array([-np.inf]))


def broken(**changes):
    obs, action_masks, groups = experience(episodes=20)
    return {"obs": obs, "action_masks": action_masks, "groups": groups, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"obs": np.full((60, 2), np.nan)}, DataError, r"obs: expected finite numbers, was nan at \[0, 0\]"),
        ({"obs": np.zeros((60, 2), dtype=int)}, ValueError, "obs: expected floating"),
        ({"obs": np.zeros(60)}, ValueError, "obs: expected floating"),
        ({"groups": np.zeros(60)}, ValueError, "groups: expected integers"),
        ({"groups": np.zeros(59, dtype=int)}, ValueError, "groups: expected integers"),
        ({"action_masks": np.ones((60, 3))}, InvalidMaskError, "dtype bool"),
        ({"action_masks": np.ones((59, 3), dtype=bool)}, InvalidMaskError, "shape"),
        ({"action_masks": np.ones(60, dtype=bool)}, InvalidMaskError, r"expected \[60, A\]"),
        ({"action_masks": np.zeros((60, 3), dtype=bool)}, InvalidMaskError, "safe action 0"),
    ],
)
def test_experience_that_cannot_be_used_is_refused(changes, error, match):
    with pytest.raises(error, match=match):
        learn_masks(**broken(**changes), safe_action=0, seed=0, config=CONFIG)


@pytest.mark.parametrize("safe_action", [3, -1])
def test_a_safe_action_that_does_not_exist_is_refused(safe_action):
    with pytest.raises(ValueError, match=r"safe_action: expected an action in 0\.\.2 or None"):
        learn_masks(**broken(), safe_action=safe_action, seed=0, config=CONFIG)
    with pytest.raises(ValueError, match="safe_action"):
        hand_made([1.0, 1.0, 1.0], safe_action=safe_action)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": 0.0},
        {"confidence": 1.0},
        {"stop_share": 0.0},
        {"bound_share": np.nan},
        {"stop_share": 0.5, "bound_share": 0.5},
    ],
)
def test_config_that_leaves_a_part_empty_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        LearnedMaskConfig(**changes)
