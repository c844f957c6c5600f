"""Every foreign mask convention, in and out: golden rows, round trips, and refusals that say what to do."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.toy_text.taxi import TaxiEnv
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from stable_baselines3.common.vec_env import DummyVecEnv

from masking import HOLD, InvalidMaskError, MaskingError, MissingMaskError
from masking.adapters import MaskAdapter, binary_masks

DISCRETE = MaskAdapter(3)
MULTI = MaskAdapter((2, 3))
MASKS = np.array([[True, False, True], [False, True, False]])
FLAT = np.array([[True, False, False, True, True], [True, True, True, False, False]])
INFINITY = np.inf


@st.composite
def spaces_and_masks(draw: st.DrawFn) -> tuple[MaskAdapter, np.ndarray]:
    """Any space of up to four dimensions, any batch, at least one valid action per row and dimension."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    batch = draw(st.integers(1, 4))
    parts = []
    for size in sizes:
        part = draw(arrays.arrays(bool, (batch, size)))
        part[np.arange(batch), draw(arrays.arrays(int, batch, elements=st.integers(0, size - 1)))] = True
        parts.append(part)
    discrete = len(sizes) == 1 and draw(st.booleans())
    return MaskAdapter(sizes[0] if discrete else tuple(sizes)), np.concatenate(parts, axis=1)


ROUND_TRIPS = {
    "binary": lambda a, m: a.from_binary(a.to_binary(m)),
    "float binary": lambda a, m: a.from_binary(a.to_binary(m, np.float16)),
    "info": lambda a, m: a.from_info(a.to_info(m)),
    "rows of info": lambda a, m: np.concatenate([a.from_info(a.to_info(row)) for row in m]),
    "dict observation": lambda a, m: a.from_dict_observation(a.to_dict_observation(None, m))[1],
    "agents": lambda a, m: a.from_agents(a.to_agents(dict.fromkeys(range(len(m))), m))[1],
    "additive": lambda a, m: a.from_additive(a.to_additive(m)),
    "invalid actions": lambda a, m: a.from_invalid_actions(a.to_invalid_actions(m)),
}


@pytest.mark.parametrize("there_and_back", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@given(spaces_and_masks())
def test_every_convention_keeps_every_mask_there_and_back(there_and_back: Any, case: Any) -> None:
    adapter, masks = case
    back = there_and_back(adapter, masks)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, masks)


@given(spaces_and_masks())
def test_dimensions_keep_every_mask_there_and_back_in_rows_and_batches(case: Any) -> None:
    adapter, masks = case
    adapter = adapter if isinstance(adapter.num_actions, tuple) else MaskAdapter((adapter.num_actions,))
    parts = adapter.to_dimensions(masks)
    assert [part.shape for part in parts] == [(len(masks), size) for size in adapter.num_actions]
    np.testing.assert_array_equal(adapter.from_dimensions(parts), masks)
    np.testing.assert_array_equal(adapter.from_dimensions(list(adapter.to_dimensions(masks[0]))), masks[:1])


def test_each_convention_has_the_dtype_and_polarity_of_its_library() -> None:
    def same(actual: Any, expected: Any, dtype: type) -> None:
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)

    row = MASKS[0]
    same(DISCRETE.to_binary(row), [1, 0, 1], np.int8)
    same(DISCRETE.to_info(row)["action_mask"], [1, 0, 1], np.int8)
    same(DISCRETE.to_dict_observation(7, row)["action_mask"], [1, 0, 1], np.float32)
    same(DISCRETE.to_agents({"a": 7}, row[None])["a"]["action_mask"], [1, 0, 1], np.int8)
    same(DISCRETE.to_additive(row), [0, -INFINITY, 0], np.float32)
    same(DISCRETE.to_invalid_actions(row), [False, True, False], np.bool_)
    same(MULTI.to_dimensions(FLAT[0])[0], [True, False], np.bool_)
    same(MULTI.to_dimensions(FLAT[0])[1], [False, True, True], np.bool_)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_zeros_and_ones_of_any_dtype_become_bool(convert: Any, dtype: type) -> None:
    np.testing.assert_array_equal(DISCRETE.from_binary(convert(MASKS.astype(dtype))), MASKS)
    np.testing.assert_array_equal(DISCRETE.from_binary(convert(MASKS[1].astype(dtype))), MASKS[1:])


def test_masks_coming_in_are_copies_so_that_a_reused_buffer_cannot_change_them() -> None:
    buffer = MASKS.copy()
    masks = DISCRETE.from_binary(buffer)
    buffer[:] = True
    np.testing.assert_array_equal(masks, MASKS)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.array([1, 2, 0], dtype=np.int8), r"only 0 and 1, was also \[2.0\]"),
        (np.array([1, -1, 0], dtype=np.int8), r"only 0 and 1, was also \[-1.0\]"),
        (np.array([1.0, np.nan, 0.0]), r"was also \[nan\]; convert it explicitly"),
        (np.array([0.9, 0.1, 0.0]), r"was also \[0.1, 0.9\]"),
        (np.array([0.0, -INFINITY, 0.0]), "use from_additive"),
        (np.array([True, None, True], dtype=object), "was dtype object"),
        (np.array(["1", "0", "1"]), "was dtype <U1"),
        (None, "was dtype object"),
        (np.ones((3, 2)), r"expected shape \[3\] or \[B, 3\], was \[3, 2\]"),
        (np.ones((1, 2, 3)), r"was \[1, 2, 3\]"),
        (np.array(True), r"was \[\]"),
        ([[1, 0, 1], [1]], "was ragged; use from_dimensions"),
        (np.zeros(3), "at least one valid action in every row"),
        (np.array([[1, 0, 0], [0, 0, 0]]), "not so in 1 of 2 rows, first row 1"),
    ],
)
def test_what_is_no_mask_of_zeros_and_ones_is_refused(masks: Any, message: str) -> None:
    with pytest.raises(InvalidMaskError, match=message):
        DISCRETE.from_binary(masks)


def test_a_declared_safe_action_must_be_valid_on_the_way_in_and_out() -> None:
    strict = MaskAdapter(3, safe_action=HOLD)
    with pytest.raises(InvalidMaskError, match="safe action 0 valid in every row, not so in 1 of 2 rows"):
        strict.from_binary(MASKS.astype(np.int8))
    with pytest.raises(InvalidMaskError, match="safe action 0 valid in every row, not so in 1 of 1 rows"):
        strict.to_binary(MASKS[1])


@pytest.mark.parametrize("name", ["binary", "info", "additive", "invalid_actions"])
@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (MASKS.astype(np.int8), "expected dtype bool"),
        (MASKS.tolist(), "expected a NumPy array, was <class 'list'>"),
        (torch.as_tensor(MASKS), "expected a NumPy array, was <class 'torch.Tensor'>"),
        (MASKS[:, :2], r"expected shape \[B, 3\]"),
        (MASKS[None], r"expected shape \[B, 3\]"),
        (MASKS & False, "at least one valid action"),
    ],
    ids=["int8", "list", "torch", "short", "three axes", "all-False"],
)
def test_nothing_but_our_own_masks_goes_out(name: str, masks: Any, message: str) -> None:
    with pytest.raises(InvalidMaskError, match=message):
        getattr(DISCRETE, f"to_{name}")(masks)


def test_an_empty_dimension_of_a_multidiscrete_row_is_refused() -> None:
    blocked = np.array([[True, True, False, False, False]])
    for convert in (MULTI.from_binary, MULTI.to_binary, MULTI.to_dimensions):
        with pytest.raises(InvalidMaskError, match="every row of dimension 1"):
            convert(blocked)


# Gymnasium


def test_taxi_tells_int8_masks_in_info_and_samples_under_them() -> None:
    env = TaxiEnv()
    adapter = MaskAdapter.of(env.action_space)
    assert adapter == MaskAdapter(6)
    _, info = env.reset(seed=3)
    for _ in range(50):
        masks = adapter.from_info(info)
        np.testing.assert_array_equal(masks[0], info["action_mask"] == 1)
        action = env.action_space.sample(adapter.to_info(masks[0])["action_mask"])
        assert masks[0, action]
        _, _, _, _, info = env.step(action)


def test_a_vector_of_taxis_gives_one_row_each_and_back() -> None:
    envs = gymnasium.vector.SyncVectorEnv([TaxiEnv] * 3)
    _, info = envs.reset(seed=5)
    masks = MaskAdapter.of(envs.single_action_space).from_info(info)
    assert masks.shape == (3, 6)
    np.testing.assert_array_equal(masks, info["action_mask"] == 1)
    back = MaskAdapter(6).to_info(masks)
    for key in ("action_mask", "_action_mask"):
        assert back[key].dtype == info[key].dtype
        np.testing.assert_array_equal(back[key], info[key])
    envs.close()


def test_a_row_without_a_mask_in_a_vector_info_is_missing_not_all_zero() -> None:
    info = {"action_mask": np.array([[1, 0, 1], [0, 0, 0]], dtype=np.int8), "_action_mask": np.array([True, False])}
    with pytest.raises(MissingMaskError, match=r"missing those of \[1\]"):
        DISCRETE.from_info(info)
    with pytest.raises(MissingMaskError, match=r"expected the key 'action_mask', was \['prob'\]"):
        DISCRETE.from_info({"prob": 1.0})


class PairEnv(gymnasium.Env):
    """MultiDiscrete (2, 3) with the tuple mask that its own space samples under."""

    observation_space = spaces.Discrete(1)
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return 0, MULTI.to_info(FLAT[0])

    def action_masks(self) -> list[list[bool]]:
        return [[True, False], [False, True, True]]


def test_a_multidiscrete_info_mask_is_the_tuple_that_the_space_samples_under() -> None:
    mask = MULTI.to_info(FLAT[0])["action_mask"]
    assert isinstance(mask, tuple)
    assert [part.dtype for part in mask] == [np.int8, np.int8]
    samples = {tuple(PairEnv.action_space.sample(mask)) for _ in range(40)}
    assert samples == {(0, 1), (0, 2)}
    envs = gymnasium.vector.SyncVectorEnv([PairEnv, PairEnv])
    _, info = envs.reset()
    masks = MaskAdapter.of(envs.single_action_space).from_info(info)
    np.testing.assert_array_equal(masks, FLAT[[0, 0]])
    np.testing.assert_array_equal(info["action_mask"][1][1], MULTI.to_info(masks)["action_mask"][1][1])


# the method action_masks()


class RowEnv(gymnasium.Env):
    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(3)

    def action_masks(self) -> np.ndarray:
        return MASKS[1]


class Batched:
    """What a batched VecEnv answers: the whole batch in a list of one."""

    def has_attr(self, name: str) -> bool:
        return name == "action_masks"

    def env_method(self, name: str) -> list[np.ndarray]:
        return [MASKS]


def test_the_method_action_masks_is_found_below_wrappers_and_in_vector_environments() -> None:
    wrapped = gymnasium.wrappers.TimeLimit(RowEnv(), max_episode_steps=5)
    np.testing.assert_array_equal(DISCRETE.from_env(wrapped), MASKS[1:])
    np.testing.assert_array_equal(DISCRETE.from_env(DummyVecEnv([RowEnv, RowEnv])), MASKS[[1, 1]])
    np.testing.assert_array_equal(DISCRETE.from_env(Batched()), MASKS)
    np.testing.assert_array_equal(MULTI.from_env(PairEnv()), FLAT[:1])
    np.testing.assert_array_equal(MULTI.from_env(DummyVecEnv([PairEnv, PairEnv])), FLAT[[0, 0]])


class PlainEnv(gymnasium.Env):
    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(3)


@pytest.mark.parametrize("env", [object(), gymnasium.make("CartPole-v1"), DummyVecEnv([PlainEnv])])
def test_an_environment_without_the_method_is_told_which_wrapper_gives_it(env: Any) -> None:
    with pytest.raises(MissingMaskError, match=r"wrap it in masking\.wrappers.MaskFromInfo or MaskFromDict"):
        DISCRETE.from_env(env)


class BrokenEnv(RowEnv):
    def action_masks(self) -> np.ndarray:
        return self.no_such_attribute


@pytest.mark.parametrize("env", [BrokenEnv(), DummyVecEnv([BrokenEnv])])
def test_an_attribute_error_inside_the_environment_is_not_taken_for_a_missing_method(env: Any) -> None:
    with pytest.raises(AttributeError, match="no_such_attribute"):
        DISCRETE.from_env(env)


# dictionaries


def test_an_rllib_observation_splits_and_joins() -> None:
    observation = {"action_mask": np.array([0.0, 1.0, 0.0], np.float32), "observations": np.arange(4.0)}
    observations, masks = DISCRETE.from_dict_observation(observation)
    assert observations is observation["observations"]
    np.testing.assert_array_equal(masks, MASKS[1:])
    joined = DISCRETE.to_dict_observation(observations, masks[0])
    assert joined.keys() == observation.keys()
    assert joined["action_mask"].dtype == np.float32
    np.testing.assert_array_equal(joined["action_mask"], observation["action_mask"])


def test_pettingzoo_agents_split_into_rows_in_their_order_and_join() -> None:
    board = np.zeros((6, 7, 2), dtype=np.int8)
    agents = {
        "player_1": {"observation": board, "action_mask": np.array([1, 0, 1], dtype=np.int8)},
        "player_0": {"observation": board + 1, "action_mask": np.array([0, 1, 0], dtype=np.int8)},
    }
    observations, masks = DISCRETE.from_agents(agents)
    assert list(observations) == ["player_1", "player_0"]
    assert observations["player_1"] is board
    np.testing.assert_array_equal(masks, MASKS)
    for agent, joined in DISCRETE.to_agents(observations, masks).items():
        assert joined["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(joined["action_mask"], agents[agent]["action_mask"])
        assert joined["observation"] is agents[agent]["observation"]


def test_agents_that_do_not_act_are_refused_with_their_all_zero_masks() -> None:
    idle = {"a": {"observation": 0, "action_mask": np.ones(3)}, "b": {"observation": 0, "action_mask": np.zeros(3)}}
    with pytest.raises(InvalidMaskError, match=r"not so in 1 of 2 rows, first row 1"):
        DISCRETE.from_agents(idle)
    with pytest.raises(MissingMaskError, match="at least one agent"):
        DISCRETE.from_agents({})


def test_dictionaries_without_a_mask_or_observation_name_the_missing_key() -> None:
    with pytest.raises(MissingMaskError, match=r"expected a mapping with 'action_mask', was \['observations'\]"):
        DISCRETE.from_dict_observation({"observations": 0})
    with pytest.raises(MaskingError, match=r"expected a mapping with 'observations', was \['action_mask', 'obs'\]"):
        DISCRETE.from_dict_observation({"obs": 0, "action_mask": np.ones(3)})
    with pytest.raises(MaskingError, match=r"was <class 'numpy\.ndarray'>"):
        DISCRETE.from_dict_observation(np.ones(3))
    with pytest.raises(MissingMaskError, match=r"observation of 'b': expected a mapping with 'action_mask'"):
        DISCRETE.from_agents({"a": {"observation": 0, "action_mask": np.ones(3)}, "b": {"observation": 0}})


@pytest.mark.parametrize("masks", [MASKS[0], MASKS], ids=["one row", "a row too many"])
def test_agents_need_one_mask_row_each(masks: np.ndarray) -> None:
    with pytest.raises(InvalidMaskError, match=r"expected one row per agent \[1, 3\]"):
        DISCRETE.to_agents({"a": 0}, masks)


# dimensions, additive, inverted


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 3)), "expected a list or tuple of 2 arrays, was <class 'numpy.ndarray'>"),
        ([np.ones(2)], "expected a list or tuple of 2 arrays, was 1 of them"),
        ([np.ones(3), np.ones(2)], r"masks\[0\]: expected shape \[2\] or \[B, 2\], was \[3\]"),
        ([np.ones((2, 2)), np.ones((1, 3))], r"expected one batch size, was \[2, 1\]"),
        ([np.ones(2), np.array([1, 0, 3])], r"masks\[1\]: expected only 0 and 1, was also \[3.0\]"),
    ],
)
def test_wrong_dimensions_are_refused(masks: Any, message: str) -> None:
    with pytest.raises(InvalidMaskError, match=message):
        MULTI.from_dimensions(masks)


def test_dimensions_of_a_discrete_space_are_refused() -> None:
    for convert in (DISCRETE.from_dimensions, DISCRETE.to_dimensions):
        with pytest.raises(MaskingError, match=r"expected \(A_1, ..., A_K\) of a MultiDiscrete, was 3"):
            convert(MASKS)


@pytest.mark.parametrize("value", [-1e9, np.finfo(np.float32).min, 1.0, INFINITY, np.nan])
def test_additive_masks_hold_nothing_but_zero_and_minus_infinity(value: float) -> None:
    np.testing.assert_array_equal(DISCRETE.from_additive([0.0, -INFINITY, 0.0]), MASKS[:1])
    with pytest.raises(InvalidMaskError, match=r"only 0 \(valid\) and -inf \(forbidden\).*from_binary\(masks == 0\)"):
        DISCRETE.from_additive([0.0, value, -INFINITY])


@pytest.mark.parametrize("dtype", [np.int8, np.int64, bool])
def test_a_dtype_without_infinity_cannot_hold_additive_masks(dtype: type) -> None:
    with pytest.raises(
        InvalidMaskError, match=f"^dtype: expected a floating dtype, which has -inf, was {np.dtype(dtype)}$"
    ):
        DISCRETE.to_additive(MASKS, dtype)


@pytest.mark.parametrize(("num_actions", "safe_action"), [(3, 3), (3, -1), ((2, 3), 2), ((2, 3), (0,)), (3, "a")])
def test_a_safe_action_that_does_not_exist_is_refused_at_once(num_actions: Any, safe_action: Any) -> None:
    with pytest.raises(MaskingError, match=r"^safe_action: expected"):
        MaskAdapter(num_actions, safe_action)


def test_inverted_masks_are_read_inverted_only_where_asked() -> None:
    np.testing.assert_array_equal(DISCRETE.from_invalid_actions([[0, 1, 0], [1, 0, 1]]), MASKS)
    with pytest.raises(InvalidMaskError, match="invalid_actions: expected only 0 and 1"):
        DISCRETE.from_invalid_actions([0, 1, 2])
    with pytest.raises(InvalidMaskError, match="at least one valid action"):
        DISCRETE.from_invalid_actions([1, 1, 1])


# spaces


def test_adapters_of_spaces() -> None:
    assert MaskAdapter.of(spaces.Discrete(3), HOLD) == MaskAdapter(3, HOLD)
    assert MaskAdapter.of(spaces.MultiDiscrete([2, 3])) == MULTI
    assert (DISCRETE.width, MULTI.width) == (3, 5)
    assert binary_masks([0, 0], 2).tolist() == [[False, False]]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(0, 1, (3,)), "expected Discrete or MultiDiscrete"),
        (spaces.MultiBinary(3), "expected Discrete or MultiDiscrete"),
        (spaces.MultiDiscrete([[2, 3], [2, 3]]), "with one axis"),
        (spaces.Discrete(3, start=1), "start at 0"),
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "start at 0"),
    ],
)
def test_other_action_spaces_are_refused(space: spaces.Space, message: str) -> None:
    with pytest.raises(MaskingError, match=message):
        MaskAdapter.of(space)
