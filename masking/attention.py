"""Feature level: attention over a padded set of instruments, blind to those that are absent.

A universe changes: instruments are listed, delisted, halted. Observations keep one slot per instrument and say in
`present` which slots mean something. What an absent slot holds (zeros, a stale price, NaN) must not reach any output:
it is replaced by a constant before any arithmetic, so outputs are bit-identical and gradients exactly zero, and
present instruments do not attend to it, so that the constant does not count either.

Attention itself is `torch.nn.functional.scaled_dot_product_attention`. Not `nn.MultiheadAttention` or
`nn.TransformerEncoder`: their inference path rounds differently from their training path, and returns NaN for a row
in which nobody is present.

Sources: Set Transformer, arXiv:1810.00825 (attention blocks on sets; pooled here by a mean over the present instead
of by attention), pre-norm residual blocks, arXiv:2002.04745.
"""

from __future__ import annotations

import torch
from gymnasium.spaces import Box, Dict, MultiBinary
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional

from masking.errors import InvalidMaskError, MaskingError


class MaskedSetEncoder(nn.Module):
    """Embeds each present instrument in the context of the others.

    Equivariant to the order of the instruments, and, up to rounding, indifferent to the number of absent slots.

    Args:
        num_features: F.
        embed_dim: E, a multiple of `num_heads`.
        num_layers: attention blocks; the hidden layer in each is 2 E wide.
    """

    def __init__(self, num_features: int, embed_dim: int = 32, num_heads: int = 2, num_layers: int = 2) -> None:
        super().__init__()
        if num_heads < 1 or num_layers < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim, num_heads, num_layers: expected positive numbers, embed_dim a multiple of num_heads, "
                f"was {embed_dim}, {num_heads}, {num_layers}"
            )
        self.num_features = num_features
        self.embed_dim = embed_dim
        self.embed = nn.Linear(num_features, embed_dim)
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, instruments: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, N, E], zero where absent, and their mean over the present ones [B, E], zero if none is.

        Args: instruments [B, N, F]; absent slots may hold anything. present bool [B, N].
        Raises: InvalidMaskError on dtype or shape. A NaN in a *present* instrument stays visible as NaN in its row.
        """
        if instruments.ndim != 3 or instruments.shape[2] != self.num_features:
            raise InvalidMaskError(
                f"instruments: expected shape [B, N, {self.num_features}], was {list(instruments.shape)}"
            )
        if present.dtype != torch.bool or present.shape != instruments.shape[:2]:
            raise InvalidMaskError(
                f"present: expected bool {list(instruments.shape[:2])}, True = present, "
                f"was {present.dtype} {list(present.shape)}"
            )
        here = present[:, :, None]
        # `where`, not a product: 0 * NaN is NaN, in the forward and in the backward pass.
        hidden = self.embed(torch.where(here, instruments, 0.0))
        for block in self.blocks:
            hidden = block(hidden, present[:, None, None, :])
        embeddings = torch.where(here, self.norm(hidden), 0.0)
        return embeddings, embeddings.sum(dim=1) / here.sum(dim=1).clamp(min=1)


class _Block(nn.Module):
    # Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)).

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.query_key_value = nn.Linear(embed_dim, 3 * embed_dim)
        self.attention_out = nn.Linear(embed_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, hidden: Tensor, key_mask: Tensor) -> Tensor:
        # hidden [B, N, E], key_mask bool [B, 1, 1, N] -> [B, N, E]
        heads = self.query_key_value(self.attention_norm(hidden)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, heads, N, E / heads]
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        hidden = hidden + self.attention_out(context.transpose(1, 2).flatten(2))
        result: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return result


class MaskedSetExtractor(BaseFeaturesExtractor):
    """`MaskedSetEncoder` as stable-baselines3 features extractor, for `MultiInputPolicy`.

    The observation is a Dict of "instruments" Box [N, F], "present" MultiBinary [N] or Box in [0, 1] [N], and
    optionally "observations" Box [D], passed on unchanged. Features: pooled embedding [E], with `per_instrument` the
    embedding of each slot [N * E], observations [D], in this order. Exactly 1 is present; any other number, NaN
    included, is absent.

    Use: `policy_kwargs={"features_extractor_class": MaskedSetExtractor, "features_extractor_kwargs": {...}}`.

    Args:
        per_instrument: for heads with one action per instrument, which must tell the slots apart.
    """

    def __init__(
        self,
        observation_space: Dict,
        embed_dim: int = 32,
        num_heads: int = 2,
        num_layers: int = 2,
        *,
        per_instrument: bool = False,
    ) -> None:
        N, F, D = _dimensions(observation_space)
        super().__init__(observation_space, features_dim=embed_dim * (1 + N * per_instrument) + D)
        self.encoder = MaskedSetEncoder(F, embed_dim, num_heads, num_layers)
        self.per_instrument = per_instrument

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features [B, E (+ N * E) (+ D)]."""
        # stable-baselines3 hands over the MultiBinary as float32.
        embeddings, pooled = self.encoder(observations["instruments"], observations["present"] == 1)
        features = [pooled]
        if self.per_instrument:
            features.append(embeddings.flatten(1))
        if "observations" in observations:
            features.append(observations["observations"])
        return torch.cat(features, dim=1)


def _dimensions(space: Dict) -> tuple[int, int, int]:
    # N, F, D of the observation space (D = 0 without observations), or an error that says what is expected.
    parts = dict(space.spaces) if isinstance(space, Dict) else {}
    instruments, present = parts.pop("instruments", None), parts.pop("present", None)
    observations = parts.pop("observations", Box(0.0, 1.0, (0,)))
    if (
        not isinstance(instruments, Box)
        or len(instruments.shape) != 2
        or not isinstance(present, MultiBinary | Box)
        or present.shape != instruments.shape[:1]
        or not isinstance(observations, Box)
        or len(observations.shape) != 1
        or parts
    ):
        raise MaskingError(
            "observation_space: expected a Dict of 'instruments' Box [N, F], 'present' MultiBinary [N] and optionally "
            f"'observations' Box [D], was {space}"
        )
    N, F = instruments.shape
    return N, F, observations.shape[0]
