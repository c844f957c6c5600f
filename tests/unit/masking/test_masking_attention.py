"""Absent instruments reach no output and no gradient; order does not matter; training on garbage changes nothing."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableMultiInputActorCriticPolicy

from masking import InvalidMaskError, MaskingError
from masking.attention import MaskedSetEncoder, MaskedSetExtractor

B, N, F, E, D = 16, 6, 3, 8, 2
GARBAGE = [1e6, -1e30, float("inf"), float("nan")]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture
def encoder(generator: torch.Generator) -> MaskedSetEncoder:
    """Every parameter random, so that no bias is zero by initialisation."""
    module = MaskedSetEncoder(F, E)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return module


@pytest.fixture
def rows(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Instruments [B, N, F] and present [B, N]: row 0 full, row 1 empty, row 2 with one."""
    present = torch.rand(B, N, generator=generator) < 0.5
    present[0], present[1], present[2] = True, False, False
    present[2, 4] = True
    return torch.randn(B, N, F, generator=generator), present


def identical(first: Any, second: Any) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_whatever_an_absent_slot_holds_the_outputs_are_bit_identical(encoder: Any, rows: Any, garbage: float) -> None:
    instruments, present = rows
    spoilt = torch.where(present[:, :, None], instruments, garbage)
    identical(encoder(instruments, present), encoder(spoilt, present))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_absent_slots_have_exactly_no_gradient_and_spoil_none(encoder: Any, rows: Any, garbage: float) -> None:
    instruments, present = rows
    gradients = []
    for filling in (0.0, garbage):
        encoder.zero_grad()
        x = torch.where(present[:, :, None], instruments, filling).requires_grad_()
        embeddings, pooled = encoder(x, present)
        (embeddings.pow(2).sum() + pooled.exp().sum()).backward()
        assert (x.grad[~present] == 0).all()
        assert (x.grad[present] != 0).any(dim=-1).all()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in encoder.parameters())])
    identical(*gradients)


def test_the_number_of_absent_slots_does_not_count(encoder: Any, rows: Any) -> None:
    instruments, present = rows
    embeddings, pooled = encoder(instruments, present)
    for row in range(B):
        here = present[row]
        if here.any():
            alone, alone_pooled = encoder(
                instruments[row, here][None], torch.ones(1, int(here.sum()), dtype=torch.bool)
            )
            torch.testing.assert_close(embeddings[row, here], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled[row], alone_pooled[0], rtol=1e-4, atol=1e-5)


def test_present_instruments_do_see_each_other(encoder: Any, rows: Any) -> None:
    instruments, present = rows
    moved = instruments.clone()
    moved[0, 0] += 1.0
    before, after = encoder(instruments, present)[0], encoder(moved, present)[0]
    assert (before[0] != after[0]).any(dim=-1).all()
    assert torch.equal(before[1:], after[1:])


def test_absent_slots_embed_to_zero_and_the_mean_is_over_the_present(encoder: Any, rows: Any) -> None:
    instruments, present = rows
    embeddings, pooled = encoder(instruments, present)
    assert (embeddings[~present] == 0).all()
    assert (embeddings[present] != 0).any(dim=-1).all()
    for row in range(B):
        mean = embeddings[row, present[row]].mean(dim=0) if present[row].any() else torch.zeros(E)
        torch.testing.assert_close(pooled[row], mean)


def test_nobody_present_gives_zeros_and_no_gradient_instead_of_nan(encoder: Any) -> None:
    x = torch.full((2, N, F), float("nan"), requires_grad=True)
    embeddings, pooled = encoder(x, torch.zeros(2, N, dtype=torch.bool))
    assert not embeddings.any()
    assert not pooled.any()
    (embeddings.sum() + pooled.sum()).backward()
    assert not x.grad.any()
    assert all((parameter.grad == 0).all() for parameter in encoder.parameters() if parameter.grad is not None)


def test_reordered_instruments_reorder_the_embeddings_and_leave_the_mean(
    encoder: Any, rows: Any, generator: Any
) -> None:
    instruments, present = rows
    embeddings, pooled = encoder(instruments, present)
    for _ in range(5):
        order = torch.randperm(N, generator=generator)
        reordered, reordered_pooled = encoder(instruments[:, order], present[:, order])
        torch.testing.assert_close(reordered, embeddings[:, order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reordered_pooled, pooled, rtol=1e-4, atol=1e-5)


def test_training_evaluation_and_inference_round_alike(encoder: Any, rows: Any) -> None:
    expected = [output.detach() for output in encoder.train()(*rows)]
    encoder.eval()
    identical([output.detach() for output in encoder(*rows)], expected)
    with torch.no_grad():
        identical(encoder(*rows), expected)
    with torch.inference_mode():
        identical(encoder(*rows), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_are_as_blind(encoder: Any, rows: Any, dtype: torch.dtype) -> None:
    encoder, instruments, present = encoder.to(dtype), rows[0].to(dtype), rows[1]
    spoilt = torch.where(present[:, :, None], instruments, float("nan"))
    outputs = encoder(spoilt, present)
    identical(outputs, encoder(instruments, present))
    assert [output.dtype for output in outputs] == [dtype, dtype]


def test_a_nan_in_a_present_instrument_stays_visible_in_its_row_only(encoder: Any, rows: Any) -> None:
    instruments, present = rows
    broken = instruments.clone()
    broken[0, 0, 0] = float("nan")
    _, pooled = encoder(broken, present)
    assert pooled[0].isnan().all()
    assert torch.equal(pooled[1:], encoder(instruments, present)[1][1:])


@pytest.mark.filterwarnings("ignore")  # of the exporter itself
def test_the_exported_graph_is_as_blind(encoder: Any, rows: Any) -> None:
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        encoder.eval(), rows, dynamo=True, external_data=False, verbose=False,
        input_names=["instruments", "present"], dynamic_shapes=({0: batch}, {0: batch}),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in (1, 3, B):
        instruments, present = rows[0][:size], rows[1][:size]
        spoilt = torch.where(present[:, :, None], instruments, float("nan"))
        with torch.no_grad():
            expected = encoder(instruments, present)
        outputs = session.run(None, {"instruments": spoilt.numpy(), "present": present.numpy()})
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("instruments", "present", "message"),
    [
        (
            (4, N, F + 1),
            torch.ones(4, N, dtype=torch.bool),
            r"instruments: expected shape \[B, N, 3\], was \[4, 6, 4\]",
        ),
        ((N, F), torch.ones(N, dtype=torch.bool), r"instruments: expected shape \[B, N, 3\], was \[6, 3\]"),
        ((4, N, F), torch.ones(4, N), r"present: expected bool \[4, 6\], True = present, was torch.float32 \[4, 6\]"),
        ((4, N, F), torch.ones(N, 4, dtype=torch.bool), r"present: expected bool \[4, 6\].*was torch.bool \[6, 4\]"),
    ],
)
def test_wrong_shapes_and_masks_that_are_not_bool_are_refused(
    encoder: Any, instruments: tuple[int, ...], present: torch.Tensor, message: str
) -> None:
    with pytest.raises(InvalidMaskError, match=message):
        encoder(torch.zeros(instruments), present)


@pytest.mark.parametrize("sizes", [(8, 3, 1), (8, 0, 1), (8, 2, 0), (0, 2, 1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"embed_dim a multiple of num_heads, was \d, \d, \d"):
        MaskedSetEncoder(F, *sizes)


# stable-baselines3


def dict_space(**parts: spaces.Space) -> spaces.Dict:
    standard = {"instruments": spaces.Box(-1.0, 1.0, (N, F)), "present": spaces.MultiBinary(N)}
    return spaces.Dict({**standard, **parts})


def test_features_are_pooled_then_per_instrument_then_observations(rows: Any, generator: Any) -> None:
    space = dict_space(observations=spaces.Box(-1.0, 1.0, (D,)))
    extractor = MaskedSetExtractor(space, E, per_instrument=True)
    observations = torch.randn(B, D, generator=generator)
    features = extractor({"instruments": rows[0], "present": rows[1].float(), "observations": observations})
    embeddings, pooled = extractor.encoder(*rows)
    assert features.shape == (B, extractor.features_dim) == (B, E + N * E + D)
    assert torch.equal(features, torch.cat((pooled, embeddings.flatten(1), observations), dim=1))
    smaller = MaskedSetExtractor(dict_space(), E)
    assert smaller({"instruments": rows[0], "present": rows[1].float()}).shape == (B, smaller.features_dim) == (B, E)


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0, 2.0, float("nan")])
def test_anything_but_one_is_absent(rows: Any, value: float) -> None:
    extractor = MaskedSetExtractor(dict_space(present=spaces.Box(0.0, 1.0, (N,))), E)
    instruments, present = rows
    unclear = torch.where(present, 1.0, value)
    plain = extractor({"instruments": instruments, "present": present.float()})
    identical([extractor({"instruments": instruments, "present": unclear})], [plain])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0.0, 1.0, (N, F)),
        spaces.Dict({"instruments": spaces.Box(0.0, 1.0, (N, F))}),
        spaces.Dict({"present": spaces.MultiBinary(N)}),
        dict_space(instruments=spaces.Box(0.0, 1.0, (N,))),
        dict_space(present=spaces.MultiBinary(N + 1)),
        dict_space(present=spaces.Discrete(2)),
        dict_space(observations=spaces.Box(0.0, 1.0, (D, D))),
        dict_space(observations=spaces.Discrete(2)),
        dict_space(more=spaces.Box(0.0, 1.0, (D,))),
    ],
)
def test_other_observation_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(MaskingError, match=r"expected a Dict of 'instruments' Box \[N, F\], 'present'"):
        MaskedSetExtractor(space)


class Universe(gymnasium.Env):
    """Buy one present instrument or hold; the reward is its first feature. Absent slots hold `filling`."""

    observation_space = dict_space(observations=spaces.Box(-1.0, 1.0, (1,)))
    action_space = spaces.Discrete(N + 1)

    def __init__(self, filling: float) -> None:
        self.filling = filling
        self.forbidden = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: Any):
        self.forbidden += int(not self.action_masks()[action])
        reward = float(self.features[action - 1, 0]) if action and self.present[action - 1] else 0.0
        self.steps += 1
        return self._obs(), reward, False, self.steps >= 8, {}

    def action_masks(self) -> np.ndarray:
        return np.concatenate(([True], self.present))

    def _obs(self) -> dict[str, np.ndarray]:
        self.present = self.np_random.random(N) < 0.5
        self.features = self.np_random.uniform(-1.0, 1.0, (N, F)).astype(np.float32)
        self.features[~self.present] = self.filling
        return {
            "instruments": self.features,
            "present": self.present.astype(np.int8),
            "observations": np.zeros(1, np.float32),
        }


def trained(filling: float, per_instrument: bool) -> MaskablePPO:
    env = Universe(filling)
    model = MaskablePPO(
        MaskableMultiInputActorCriticPolicy, env, n_steps=64, batch_size=32, n_epochs=2, seed=5, device="cpu",
        policy_kwargs={
            "features_extractor_class": MaskedSetExtractor,
            "features_extractor_kwargs": {"embed_dim": E, "per_instrument": per_instrument},
            "net_arch": [16],
        },
    )  # fmt: skip
    model.learn(128)
    assert env.forbidden == 0
    return model


@pytest.mark.parametrize("per_instrument", [False, True])
def test_ppo_learns_the_same_parameters_whatever_absent_slots_hold(per_instrument: bool) -> None:
    clean, spoilt = (trained(filling, per_instrument).policy.state_dict() for filling in (0.0, float("nan")))
    identical(clean.values(), spoilt.values())
