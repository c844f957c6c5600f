"""Masked distributions for torch: one action, one per dimension, one per present agent.

Masked actions have probability exactly 0 and receive gradient exactly 0, whatever their logits hold: NaN, inf or
1e9. Invalid action masking after arXiv:2006.14171; our deviation: masked logits become -inf before one log-softmax
instead of a large negative number (sb3-contrib and CleanRL: -1e8), so no logit is small enough to fall below it.
Everything handed out is finite but the log-probability of an action that is not valid, -inf, and the divergence from
a distribution that masks more, inf.

Arithmetic runs in float32 or better; results have the dtype of the logits, saturated at its largest number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax, pad

from masking.errors import InvalidActionError, InvalidMaskError, MaskingError
from masking.validation import refuse_broken_rows, validate_action_masks

LARGEST_LOGIT = 2.0**30
"""Logits beyond +-this (about 1.07e9, exact in every dtype but float16, whose inf becomes it) count as this."""


class _MaskedRows(ABC):
    """Masked categorical rows [B, ..., A]; a subclass says how the rows of one batch entry combine.

    With `validate=False` nothing is checked, for graphs (`torch.export` cannot branch on values) and for masks checked
    before. Then bad input fails closed: a row without a valid action takes action 0, NaN on a valid action is the
    smallest logit.
    """

    def __init__(self, logits: torch.Tensor, action_masks: torch.Tensor, validate: bool) -> None:
        if validate:
            _check_logits(logits, action_masks)
        else:
            logits, action_masks = _fail_closed(logits, action_masks)
        self.dtype = logits.dtype
        self._masks = action_masks.clone()  # what a caller writes into its own array later changes nothing here
        bounded = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        # `where`, not a product or a sum: what a masked logit holds reaches neither value nor gradient.
        self._logits = torch.where(action_masks, bounded, -math.inf)
        log_probs = log_softmax(self._logits, dim=-1)
        # Finite everywhere, 0 on masked actions: 0 * -inf would be NaN in entropy, divergence and every gradient.
        self._log_probs = torch.where(action_masks, log_probs, 0.0)

    @abstractmethod
    def _total(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, ...] per row to [B] per batch entry."""

    @property
    def probs(self) -> torch.Tensor:
        """Probabilities, shape of the logits, exactly 0 on masked actions."""
        return self._cast(self._row_probs)

    @property
    def mode(self) -> torch.Tensor:
        """Most probable valid actions; ties go to the lowest index."""
        # Of logits: the softmax rounds close ones to a tie.
        return self._logits.argmax(dim=-1)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None) -> torch.Tensor:
        """Random valid actions, by Gumbel-max (arXiv:1411.0030): no rounding can let a masked action win.

        Args: generator on the device of the logits; None takes torch's global one, as learners that seed it do.
        """
        # float64: Gumbel noise from float32 lies in -2.8..16.6, so actions rarer than about 4e-9 would never come.
        shape, device = self._log_probs.shape, self._log_probs.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        gumbel = -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
        return torch.where(self._masks, self._log_probs + gumbel, -math.inf).argmax(dim=-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability [B] of integer actions, shaped as `mode`.

        An action that its mask forbids, or that does not exist, gives -inf and gradient 0; every other one is finite.
        Raises: InvalidActionError on shape or dtype.
        """
        shape = self._log_probs.shape[:-1]
        if actions.shape != shape or actions.is_floating_point() or actions.dtype == torch.bool:
            raise InvalidActionError(
                f"actions: expected integers {list(shape)}, was {actions.dtype} {list(actions.shape)}"
            )
        last = self._log_probs.shape[-1] - 1
        index = actions.long().clamp(0, last)[..., None]
        valid = self._masks.gather(-1, index)[..., 0] & (actions >= 0) & (actions <= last)
        chosen = self._log_probs.gather(-1, index)[..., 0]
        return self._cast(self._total(torch.where(valid, chosen, -math.inf)))

    def entropy(self) -> torch.Tensor:
        """Entropy [B] in nats, over valid actions."""
        return self._cast(self._total(self._row_entropy()))

    def kl(self, other: _MaskedRows) -> torch.Tensor:
        """Divergence KL(self || other) [B] in nats; inf, with gradient 0, where an action valid here is masked there.

        Raises: MaskingError if `other` is over another shape.
        """
        if type(other) is not type(self) or other._masks.shape != self._masks.shape:
            raise MaskingError(
                f"other: expected {type(self).__name__} over {list(self._masks.shape)}, "
                f"was {type(other).__name__} over {list(other._masks.shape)}"
            )
        rows = (self._row_probs * (self._log_probs - other._log_probs)).sum(dim=-1)
        escapes = (self._masks & ~other._masks).any(dim=-1)
        return self._cast(self._total(torch.where(escapes, math.inf, rows)))

    @property
    def _row_probs(self) -> torch.Tensor:
        return torch.where(self._masks, self._log_probs.exp(), 0.0)

    def _row_entropy(self) -> torch.Tensor:
        return (self._row_probs * -self._log_probs).sum(dim=-1)

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        if values.dtype == self.dtype:
            return values
        limits = torch.finfo(self.dtype)
        # A finite number must not become -inf, which means "not valid".
        return torch.where(values.isinf(), values, values.clamp(limits.min, limits.max)).to(self.dtype)


class MaskedCategorical(_MaskedRows):
    """One action per row.

    Args: logits [B, A]; action_masks bool [B, A]; `validate` as above.
    Raises: InvalidMaskError for wrong masks or a row without a valid action; MaskingError for NaN on a valid action.
    """

    def __init__(self, logits: torch.Tensor, action_masks: Any, *, validate: bool = True) -> None:
        _check_shape(logits, ("B", "A"))
        masks = torch.as_tensor(action_masks, device=logits.device)
        if validate:
            validate_action_masks(masks, num_actions=logits.shape[1], batch=logits.shape[0], safe_action=None)
        super().__init__(logits, masks, validate)

    def _total(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class MaskedMultiCategorical(_MaskedRows):
    """One action per dimension of a MultiDiscrete space, independent given the masks; actions [B, K].

    Log-probability, entropy and divergence are sums over dimensions. Factored masks cannot express a budget that the
    dimensions share.

    Args: logits [B, sum(nvec)]; action_masks bool, flat, same shape; nvec (A_1, ..., A_K); `validate` as above.
    Raises: InvalidMaskError for wrong masks or a dimension without a valid action; MaskingError for NaN on a valid one.
    """

    def __init__(self, logits: torch.Tensor, action_masks: Any, nvec: Sequence[int], *, validate: bool = True) -> None:
        self.nvec = tuple(int(size) for size in nvec)
        _check_shape(logits, ("B", sum(self.nvec)))
        masks = torch.as_tensor(action_masks, device=logits.device)
        if validate:
            validate_action_masks(masks, num_actions=self.nvec, batch=logits.shape[0], safe_action=None)
        super().__init__(self._padded(logits), self._padded(masks), validate)

    @property
    def probs(self) -> torch.Tensor:
        """Probabilities, flat [B, sum(nvec)], exactly 0 on masked actions."""
        rows = super().probs
        return torch.cat([rows[:, k, :size] for k, size in enumerate(self.nvec)], dim=-1)

    def _total(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(dim=-1)

    # [B, sum(nvec)] to [B, K, max(nvec)]: one softmax for all dimensions; padding is masked like any other action.
    def _padded(self, flat: torch.Tensor) -> torch.Tensor:
        widest = max(self.nvec)
        parts = torch.split(flat, list(self.nvec), dim=-1)
        return torch.stack([pad(part, (0, widest - part.shape[-1])) for part in parts], dim=1)


class AgentCategorical(_MaskedRows):
    """One action per present agent or instrument; actions [B, N].

    Log-probability and divergence sum over present agents, entropy averages over them (0 with none present), so that
    its weight in a loss does not grow with their number. Absent agents contribute nothing, whatever their logits,
    masks and actions hold, get gradient 0 and take `absent_action`.

    Args: logits [B, N, A]; action_masks bool [B, N, A]; present bool [B, N]; `validate` as above.
    Raises: InvalidMaskError for wrong masks or a present agent without a valid action (rows are counted agent by
        agent, b * N + n); MaskingError for NaN on a valid action of a present agent.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        action_masks: Any,
        present: Any,
        *,
        absent_action: int = 0,
        validate: bool = True,
    ) -> None:
        _check_shape(logits, ("B", "N", "A"))
        masks = torch.as_tensor(action_masks, device=logits.device)
        self.present = torch.as_tensor(present, device=logits.device)
        num_actions = logits.shape[2]
        if self.present.dtype != torch.bool or self.present.shape != logits.shape[:2]:
            raise InvalidMaskError(
                f"present: expected bool {list(logits.shape[:2])}, was {self.present.dtype} {list(self.present.shape)}"
            )
        if masks.shape != logits.shape:
            raise InvalidMaskError(f"action_masks: expected shape {list(logits.shape)}, was {list(masks.shape)}")
        if not 0 <= absent_action < num_actions:
            raise InvalidActionError(f"absent_action: expected 0 <= action < {num_actions}, was {absent_action}")
        # An absent agent is an agent with one action: certain, without entropy, and blind to its logits.
        here = self.present[..., None]
        only = torch.arange(num_actions, device=logits.device) == absent_action
        masks = torch.where(here, masks, only)
        if validate:
            validate_action_masks(masks.reshape(-1, num_actions), num_actions=num_actions, safe_action=None)
        super().__init__(torch.where(here, logits, 0.0), masks, validate)

    def entropy(self) -> torch.Tensor:
        """Entropy [B] in nats, averaged over present agents."""
        return self._cast(self._total(self._row_entropy()) / self.present.sum(dim=-1).clamp(min=1))

    def _total(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.where(self.present, rows, 0.0).sum(dim=-1)


def _check_shape(logits: torch.Tensor, shape: tuple[str | int, ...]) -> None:
    fits = logits.ndim == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, logits.shape, strict=True)
    )
    if not fits or not logits.is_floating_point():
        raise MaskingError(
            f"logits: expected floating point [{', '.join(map(str, shape))}], was {logits.dtype} {list(logits.shape)}"
        )


def _check_logits(logits: torch.Tensor, action_masks: torch.Tensor) -> None:
    refuse_broken_rows(
        (logits.isnan() & action_masks).flatten(1).any(dim=1),
        "logits: expected numbers on valid actions, was NaN",
        look_for="NaN in the observation or for diverged weights",
    )


def _fail_closed(logits: torch.Tensor, action_masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.arange(action_masks.shape[-1], device=action_masks.device) == 0
    dead = ~action_masks.any(dim=-1, keepdim=True)
    return torch.where(logits.isnan(), -math.inf, logits), action_masks | (dead & first)
