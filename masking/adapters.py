"""Other libraries' mask conventions, in and out of ours; every conversion is asked for by name and validated.

Ours is bool, True = valid, [B, A] for Discrete and flat [B, A_1 + ... + A_K] for MultiDiscrete. Everywhere else the
same information is an int8 array in `info`, float32 zeros and ones in a Dict observation, K arrays in a tuple, 0 and
-inf to be added to logits, or ones where an action is *forbidden*. None of these can be told apart safely by looking
at the numbers (an additive mask that allows everything is a 0/1 mask that forbids everything), so nothing is guessed:
`MaskAdapter` has one pair of methods per convention. `docs/masks.md` lists which library uses which.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from masking.errors import InvalidMaskError, MaskingError, MissingMaskError
from masking.validation import check_safe_action, validate_action_masks

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskAdapter:
    """Converts the masks of one action space.

    Every `from_...` takes one row or a batch and returns bool [B, A], B = 1 for a row. Every `to_...` takes bool [A]
    or [B, A] and keeps that rank. Both raise InvalidMaskError for a wrong dtype, shape or value, and for a row (or a
    dimension of it) without a valid action; MissingMaskError where no mask was given at all.
    """

    num_actions: int | tuple[int, ...]
    """A, or (A_1, ..., A_K) for MultiDiscrete."""
    safe_action: int | tuple[int, ...] | None = None
    """Action that every row must allow, e.g. `masking.HOLD`. None, as most environments declare no such action, asks
    for one valid action per row and dimension."""

    def __post_init__(self) -> None:
        check_safe_action(self.num_actions, self.safe_action)

    @classmethod
    def of(cls, action_space: Any, safe_action: int | tuple[int, ...] | None = None) -> MaskAdapter:
        """Adapter of a Gymnasium Discrete or one-axis MultiDiscrete space. Raises: MaskingError for any other."""
        nvec, n = getattr(action_space, "nvec", None), getattr(action_space, "n", None)
        if np.any(getattr(action_space, "start", 0)):
            raise MaskingError(f"action_space: expected actions that start at 0, was {action_space}; shift them")
        if nvec is not None and np.ndim(nvec) == 1:
            return cls(tuple(int(size) for size in nvec), safe_action)
        if n is not None and action_space.shape == ():  # MultiBinary has an `n` too, but an axis
            return cls(int(n), safe_action)
        raise MaskingError(f"action_space: expected Discrete or MultiDiscrete with one axis, was {action_space}")

    @property
    def width(self) -> int:
        """Columns of a mask row: A, or A_1 + ... + A_K."""
        return self.num_actions if isinstance(self.num_actions, int) else sum(self.num_actions)

    # 0/1 numbers or bool, 1 = valid: TorchRL, Tianshou and the building block of the dictionaries below.

    def from_binary(self, masks: Any) -> BoolArray:
        """Zeros and ones of any real dtype, bool included, [A] or [B, A], 1 = valid."""
        return self._validated(binary_masks(masks, self.width))

    def to_binary(self, action_masks: Any, dtype: npt.DTypeLike = np.int8) -> npt.NDArray[Any]:
        """Zeros and ones of `dtype`; int8 is what `Discrete.sample(mask)` demands."""
        return self._ours(action_masks).astype(dtype)

    # The method `action_masks()`: sb3-contrib. `masking.wrappers` gives the method to environments without it.

    def from_env(self, env: Any) -> BoolArray:
        """Masks of an environment, below any wrappers, or of a stable-baselines3 VecEnv, by `action_masks()`.

        A VecEnv answers one row per environment, a batched one a single [B, A] array in a list of one. A row may be
        flat or, for MultiDiscrete, a list of K.
        """
        vectorised = hasattr(env, "env_method")
        has = env.has_attr if vectorised else getattr(env, "has_wrapper_attr", partial(hasattr, env))
        if not has("action_masks"):
            raise MissingMaskError(
                "action_masks: expected an environment with a method action_masks(); if it tells its masks in info or "
                "in a Dict observation, wrap it in masking.wrappers.MaskFromInfo or MaskFromDict"
            )
        if vectorised:
            return np.concatenate([self._from_row(row) for row in env.env_method("action_masks")])
        return self._from_row(getattr(env, "get_wrapper_attr", partial(getattr, env))("action_masks")())

    # info["action_mask"]: Gymnasium, e.g. its Taxi.

    def from_info(self, info: Mapping[str, Any]) -> BoolArray:
        """Mask of a `reset` or `step` info: int8 [A], or a tuple of K arrays for MultiDiscrete.

        A Gymnasium vector environment stacks the rows and marks in `info["_action_mask"]` which environments gave
        one; all must have.
        """
        if "action_mask" not in info:
            raise MissingMaskError(f"info: expected the key 'action_mask', was {sorted(map(str, info))}")
        masks = info["action_mask"]
        given = np.asarray(info.get("_action_mask", True))
        if not given.all():
            raise MissingMaskError(
                f"info['_action_mask']: expected a mask of every environment, missing those of "
                f"{np.flatnonzero(~given).tolist()}; a zero row there is padding, not a mask"
            )
        if isinstance(masks, np.ndarray) and masks.dtype == object:  # a vector environment over tuples
            return np.concatenate([self._from_row(row) for row in masks])
        return self._from_row(masks)

    def to_info(self, action_masks: Any) -> dict[str, Any]:
        """Entries to merge into info: a row as `action_space.sample` takes it, a batch as vector environments stack."""
        masks = self.to_binary(action_masks)
        if isinstance(self.num_actions, int):
            rows: Any = masks
        elif masks.ndim == 1:
            rows = self._split(masks)
        else:
            rows = np.empty(len(masks), dtype=object)
            rows[:] = [self._split(row) for row in masks]
        return {"action_mask": rows} | ({} if masks.ndim == 1 else {"_action_mask": np.ones(len(masks), dtype=bool)})

    # {"observations", "action_mask"}: RLlib.

    def from_dict_observation(self, observation: Mapping[str, Any]) -> tuple[Any, BoolArray]:
        """Split {"observations": ..., "action_mask": 0/1 [A] or [B, A]} into observations and masks."""
        return _entry(observation, "observations"), self.from_binary(_entry(observation, "action_mask"))

    def to_dict_observation(self, observations: Any, action_masks: Any) -> dict[str, Any]:
        """Join observations and masks; the mask becomes float32."""
        return {"observations": observations, "action_mask": self.to_binary(action_masks, np.float32)}

    # {agent: {"observation", "action_mask"}}: PettingZoo.

    def from_agents(self, observations: Mapping[Any, Mapping[str, Any]]) -> tuple[dict[Any, Any], BoolArray]:
        """Split the observations of N agents into {agent: observation} and masks [N, A], rows in the same order.

        Pass only agents that act now: the others have all-zero masks, which are refused.
        """
        if not observations:
            raise MissingMaskError("observations: expected at least one agent, was none")
        rows = [binary_masks(_entry(own, "action_mask", agent), self.width) for agent, own in observations.items()]
        masks = self._validated(np.concatenate(rows))
        return {agent: _entry(own, "observation", agent) for agent, own in observations.items()}, masks

    def to_agents(self, observations: Mapping[Any, Any], action_masks: Any) -> dict[Any, dict[str, Any]]:
        """Join {agent: observation} with masks [N, A], rows in the same order; the masks become int8."""
        masks = self.to_binary(action_masks)
        if masks.ndim != 2 or len(masks) != len(observations):
            raise InvalidMaskError(
                f"action_masks: expected one row per agent [{len(observations)}, {self.width}], was {list(masks.shape)}"
            )
        pairs = zip(observations.items(), masks, strict=True)
        return {agent: {"observation": own, "action_mask": mask} for (agent, own), mask in pairs}

    # One array per dimension: the `mask` of `MultiDiscrete.sample`.

    def from_dimensions(self, masks: Sequence[Any]) -> BoolArray:
        """K arrays of zeros and ones, [A_k] or [B, A_k] each, to flat masks."""
        sizes = self._sizes()
        if not isinstance(masks, list | tuple) or len(masks) != len(sizes):
            was = f"{len(masks)} of them" if isinstance(masks, list | tuple) else type(masks)
            raise InvalidMaskError(f"masks: expected a list or tuple of {len(sizes)} arrays, was {was}")
        parts = [
            binary_masks(part, size, f"masks[{k}]") for k, (part, size) in enumerate(zip(masks, sizes, strict=True))
        ]
        if len({len(part) for part in parts}) != 1:
            raise InvalidMaskError(f"masks: expected one batch size, was {[len(part) for part in parts]}")
        return self._validated(np.concatenate(parts, axis=1))

    def to_dimensions(self, action_masks: Any) -> tuple[BoolArray, ...]:
        """K bool arrays, [A_k] or [B, A_k] each."""
        return self._split(self._ours(action_masks))

    # Numbers to add to logits.

    def from_additive(self, masks: Any) -> BoolArray:
        """0 = valid, -inf = forbidden, [A] or [B, A]; no other value, such as a large negative one, is accepted."""
        numbers = _numbers(masks, "masks")
        if not np.isin(numbers, (0.0, -np.inf)).all():
            raise InvalidMaskError(
                f"masks: expected only 0 (valid) and -inf (forbidden), was also "
                f"{_strangers(numbers, (0.0, -np.inf))}; with a finite floor use from_binary(masks == 0)"
            )
        return self.from_binary(numbers == 0)

    def to_additive(self, action_masks: Any, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """0 where valid, -inf where not; `dtype` must be a floating one."""
        if not np.issubdtype(dtype, np.floating):
            raise InvalidMaskError(f"dtype: expected a floating dtype, which has -inf, was {np.dtype(dtype)}")
        return np.where(self._ours(action_masks), 0.0, -np.inf).astype(dtype)

    # The opposite polarity: mctx.

    def from_invalid_actions(self, invalid_actions: Any) -> BoolArray:
        """Ones where *forbidden*, bool or 0/1, [A] or [B, A]."""
        return self._validated(~binary_masks(invalid_actions, self.width, "invalid_actions"))

    def to_invalid_actions(self, action_masks: Any) -> BoolArray:
        """Bool, True where *forbidden*."""
        return ~self._ours(action_masks)

    def _from_row(self, masks: Any) -> BoolArray:
        # A list of K arrays cannot be a list of K flat rows: a row is wider than its first dimension.
        nested = isinstance(masks, list | tuple) and any(np.ndim(part) for part in masks)
        return (
            self.from_dimensions(masks) if nested and isinstance(self.num_actions, tuple) else self.from_binary(masks)
        )

    def _validated(self, masks: BoolArray) -> BoolArray:
        validate_action_masks(masks, num_actions=self.num_actions, safe_action=self.safe_action)
        return masks

    def _ours(self, action_masks: Any) -> BoolArray:
        if not isinstance(action_masks, np.ndarray):
            raise InvalidMaskError(
                f"action_masks: expected a NumPy array, was {type(action_masks)}; call .numpy() first"
            )
        # The validation judges a batch: a row is a batch of one.
        self._validated(action_masks[None] if action_masks.ndim == 1 else action_masks)
        return action_masks

    def _sizes(self) -> tuple[int, ...]:
        if isinstance(self.num_actions, int):
            raise MaskingError(f"num_actions: expected (A_1, ..., A_K) of a MultiDiscrete, was {self.num_actions}")
        return self.num_actions

    def _split(self, masks: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        return tuple(np.split(masks, np.cumsum(self._sizes())[:-1], axis=-1))


def binary_masks(masks: Any, width: int, name: str = "masks") -> BoolArray:
    """Zeros and ones of any real dtype as bool, whatever the rows allow.

    Args: masks [width] or [B, width].
    Returns: bool [B, width], a copy.  Raises: InvalidMaskError for another value, NaN included, or shape.
    """
    numbers = _numbers(masks, name)
    if not ((numbers == 0) | (numbers == 1)).all():
        hint = "use from_additive for 0/-inf masks" if np.isneginf(numbers).any() else "convert it explicitly first"
        raise InvalidMaskError(f"{name}: expected only 0 and 1, was also {_strangers(numbers, (0, 1))}; {hint}")
    if numbers.ndim not in (1, 2) or numbers.shape[-1] != width:
        raise InvalidMaskError(f"{name}: expected shape [{width}] or [B, {width}], was {list(numbers.shape)}")
    return np.array(numbers, dtype=bool, ndmin=2)


def _numbers(masks: Any, name: str) -> npt.NDArray[Any]:
    try:
        numbers = np.asarray(masks)
    except ValueError as error:
        raise InvalidMaskError(
            f"{name}: expected an array, was ragged; use from_dimensions for one array each"
        ) from error
    if numbers.dtype.kind not in "biuf":
        raise InvalidMaskError(f"{name}: expected bool or real numbers, was dtype {numbers.dtype}")
    return numbers


def _strangers(numbers: npt.NDArray[Any], expected: tuple[float, ...]) -> list[float]:
    other = numbers[~np.isin(numbers, expected)]
    return [float(value) for value in np.unique(other)[:3]]


def _entry(observation: Mapping[str, Any], key: str, agent: Hashable = None) -> Any:
    if not isinstance(observation, Mapping) or key not in observation:
        where = "observation" if agent is None else f"observation of {agent!r}"
        was = sorted(map(str, observation)) if isinstance(observation, Mapping) else type(observation)
        error = MissingMaskError if key == "action_mask" else MaskingError
        raise error(f"{where}: expected a mapping with {key!r}, was {was}")
    return observation[key]
