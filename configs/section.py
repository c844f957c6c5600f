"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
# Judged with the rules at hand, whose errors name rule and parameter; editors get the outline.
RuleEntry = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1}]})]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, field docstrings become the schema's text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class PPOConfig(Section):
    """Masked PPO (sb3-contrib MaskablePPO); both policies use the same section type."""

    total_steps: Count = 600_000
    """Environment steps; for MBPO real and imagined together."""
    num_envs: Count = 64
    """Rows stepped at once."""
    n_steps: Count = 64
    """Steps per row between updates; MBPO uses its rollout length instead."""
    batch_size: Count = 1024
    """Rows per minibatch."""
    n_epochs: Count = 5
    """Passes over each rollout."""
    learning_rate: Positive = 2e-4
    """Adam step size."""
    gamma: Fraction = 0.99
    """Discount per bar."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    ent_coef: NonNegative = 0.01
    """Entropy bonus over the valid actions."""
    clip_range: Positive = 0.2
    """PPO ratio clip."""
    net_arch: tuple[Count, ...] = (64, 64)
    """Hidden widths of policy and value network."""
    validations: Count = 10
    """Times the policy is scored on the validation window; the best snapshot is kept."""
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Validations in a row without a better score after which training stops; 0 never stops early."""
