"""Masked distributions: golden numbers, torch's Categorical on the valid subset as oracle, and extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.distributions import Categorical, kl_divergence

from masking import InvalidActionError, InvalidMaskError, MaskingError
from masking.distributions import LARGEST_LOGIT, AgentCategorical, MaskedCategorical, MaskedMultiCategorical

NAN, INF = math.nan, math.inf
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
LOGITS = [-1.8222, 1.0769, -0.6567]
NVEC = (2, 3, 1)


def bools(*rows: str) -> torch.Tensor:
    """Masks from strings: `"101"` is valid, masked, valid."""
    return torch.tensor([[char == "1" for char in row] for row in rows])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agents(logits: torch.Tensor, masks: torch.Tensor, **kwargs: Any) -> AgentCategorical:
    return AgentCategorical(logits[:, None], masks[:, None], torch.ones(len(logits), 1, dtype=torch.bool), **kwargs)


def multi(logits: torch.Tensor, masks: torch.Tensor, **kwargs: Any) -> MaskedMultiCategorical:
    return MaskedMultiCategorical(logits, masks, (logits.shape[1],), **kwargs)


# All three over rows [B, A]: with one dimension or one present agent they are the same distribution.
KINDS: list[Callable[..., Any]] = [MaskedCategorical, multi, agents]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["plain", "multi", "agents"])


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float64 [B, A] and masks with a valid action in every row."""
    batch, num_actions = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    logits = draw(hnp.arrays(np.float64, (batch, num_actions), elements=st.floats(-30, 30)))
    masks = draw(hnp.arrays(np.bool_, (batch, num_actions)))
    masks[np.arange(batch), draw(hnp.arrays(np.int64, batch, elements=st.integers(0, num_actions - 1)))] = True
    return torch.as_tensor(logits), torch.as_tensor(masks)


# --- golden numbers ----------------------------------------------------------------------------------------------


@every_kind
def test_probabilities_of_the_literature(kind: Callable[..., Any]) -> None:
    masked = kind(torch.tensor([LOGITS, LOGITS]), bools("111", "001"))
    expected = [[0.0447, 0.8119, 0.1434], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(masked.probs.reshape(2, 3), expected, atol=5e-5)
    assert masked.mode.ravel().tolist() == [1, 2]


@every_kind
def test_entropy_of_a_uniform_masked_row_is_the_log_of_its_valid_actions(kind: Callable[..., Any]) -> None:
    masks = bools("11111", "01011", "00100")
    uniform = kind(torch.full((3, 5), 7.0, dtype=torch.float64), masks)
    np.testing.assert_allclose(uniform.entropy(), np.log([5, 3, 1]), atol=1e-15)


def test_worked_by_hand() -> None:
    # exp(logits) = 1, 2, 3, 4; valid are 1 and 3: p = 1/4 and 3/4, against q = 1/2 and 1/2.
    mask = bools("1010")
    ours = MaskedCategorical(torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)), mask)
    uniform = MaskedCategorical(torch.zeros(1, 4, dtype=torch.float64), mask)
    assert ours.probs.tolist() == [[pytest.approx(0.25), 0.0, pytest.approx(0.75), 0.0]]
    assert ours.log_prob(torch.tensor([2])).item() == pytest.approx(math.log(3 / 4))
    assert ours.entropy().item() == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert ours.kl(uniform).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert uniform.kl(ours).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_ties_go_to_the_lowest_valid_index_and_close_logits_are_no_tie() -> None:
    logits = torch.tensor([[5.0, 5.0, 5.0], [5.0, 5.0, 5.0], [0.0, 1e-8, 2e-8]])
    # The last row: float32 log-probabilities of all three are equal.
    assert MaskedCategorical(logits, bools("111", "011", "111")).mode.tolist() == [0, 1, 2]


# --- against torch's Categorical on the valid subset -------------------------------------------------------------


@given(batches(), st.integers(0, 2**32))
def test_every_quantity_equals_the_subset(case: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    logits, masks = case
    others = torch.rand(logits.shape, generator=generator(seed), dtype=logits.dtype)
    ours, other = MaskedCategorical(logits, masks), MaskedCategorical(others, masks)
    drawn = ours.sample(generator(seed))
    for row in range(len(logits)):
        valid = masks[row].nonzero()[:, 0]
        subset, subset_other = Categorical(logits=logits[row, valid]), Categorical(logits=others[row, valid])
        torch.testing.assert_close(ours.probs[row, valid], subset.probs)
        torch.testing.assert_close(ours.entropy()[row], subset.entropy())
        torch.testing.assert_close(ours.kl(other)[row], kl_divergence(subset, subset_other), atol=1e-12, rtol=1e-7)
        assert ours.mode[row] == valid[logits[row, valid].argmax()]
        assert drawn[row] in valid
        for action in range(logits.shape[1]):
            log_prob = ours.log_prob(torch.full((len(logits),), action))[row]
            if action in valid:
                torch.testing.assert_close(log_prob, subset.log_prob((valid == action).nonzero()[0, 0]))
            else:
                assert log_prob == -INF
                assert ours.probs[row, action] == 0


@given(batches())
def test_gradients_equal_those_of_the_subset_and_are_exactly_zero_on_masked_logits(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, masks = case
    ours = logits.clone().requires_grad_()
    masked = MaskedCategorical(ours, masks)
    (masked.entropy().sum() + 3 * masked.log_prob(masked.mode).sum()).backward()
    for row in range(len(logits)):
        valid = masks[row]
        theirs = logits[row, valid].clone().requires_grad_()
        subset = Categorical(logits=theirs)
        (subset.entropy() + 3 * subset.log_prob(theirs.argmax())).backward()
        torch.testing.assert_close(ours.grad[row, valid], theirs.grad, atol=1e-12, rtol=1e-7)
        assert (ours.grad[row, ~valid] == 0).all()


# --- extreme and broken logits -----------------------------------------------------------------------------------


def losses(kind: Callable[..., Any], logits: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every differentiable quantity, each as one tensor."""
    ours, other = kind(logits, masks), kind(-logits, masks)
    return {
        "entropy": ours.entropy(),
        "kl": ours.kl(other),
        "probs": ours.probs,
        "mode": ours.log_prob(ours.mode),
        "least likely": ours.log_prob(other.mode),
        "sample": ours.log_prob(ours.sample(generator())),
    }


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [NAN, INF, -INF, 1e9, -1e9], ids=str)
@pytest.mark.parametrize("valid", [(1e9, -1e9), (-1e9, -1e9), (1e9, 1e9), (INF, 0.0), (-INF, -INF)], ids=str)
def test_all_is_finite_and_masked_gradients_are_zero(
    kind: Callable[..., Any], dtype: torch.dtype, masked: float, valid: tuple[float, float]
) -> None:
    row = [masked, valid[0], masked, valid[1]]
    masks = bools("0101", "0101")
    for name, value in losses(kind, torch.tensor([row, row], dtype=dtype), masks).items():
        assert value.dtype == dtype, name
        assert value.isfinite().all(), name
    for name in losses(kind, torch.zeros(2, 4), masks):
        logits = torch.tensor([row, row], dtype=dtype, requires_grad=True)
        losses(kind, logits, masks)[name].sum().backward()
        assert logits.grad.isfinite().all(), name
        assert (logits.grad[~masks] == 0).all(), name


@every_kind
def test_what_masked_logits_hold_changes_no_bit(kind: Callable[..., Any]) -> None:
    logits, masks = torch.randn(64, 6, generator=generator()), torch.rand(64, 6, generator=generator(1)) < 0.5
    masks[:, 2] = True
    reference = losses(kind, logits, masks)
    for masked in (NAN, INF, -INF, 1e9, 0.0):
        for name, value in losses(kind, torch.where(masks, logits, masked), masks).items():
            assert torch.equal(value, reference[name]), (masked, name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits = torch.randn(32, 9, generator=generator()).to(dtype)
    masks = torch.rand(32, 9, generator=generator(1)) < 0.6
    masks[:, 0] = True
    half, single = MaskedCategorical(logits, masks), MaskedCategorical(logits.float(), masks)
    for ours, exact in ((half.entropy(), single.entropy()), (half.probs, single.probs)):
        assert torch.equal(ours, exact.to(dtype))


def test_the_bound_on_logits_is_exact_where_it_applies() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.tensor(LARGEST_LOGIT, dtype=dtype).item() == LARGEST_LOGIT > 1e9
    infinite = MaskedCategorical(torch.tensor([[INF, 0.0, INF]]), bools("111"))
    assert infinite.probs.tolist() == [[0.5, 0.0, 0.5]]


# --- actions that are not valid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [0, -1, 3, 99])
def test_an_action_that_is_masked_or_none_has_log_probability_minus_infinity_and_no_gradient(action: int) -> None:
    logits = torch.tensor([LOGITS, LOGITS], requires_grad=True)
    log_prob = MaskedCategorical(logits, bools("011", "011")).log_prob(torch.tensor([action, 1]))
    assert log_prob.isfinite().tolist() == [False, True]
    ratio = (log_prob - 0.5).exp()  # as in PPO
    assert ratio[0] == 0
    (log_prob.sum() + ratio.sum()).backward()
    assert (logits.grad[0] == 0).all()
    assert logits.grad.isfinite().all()


def test_divergence_is_infinite_where_an_action_valid_here_is_masked_there() -> None:
    logits = torch.tensor([LOGITS, LOGITS], requires_grad=True)
    wide, narrow = MaskedCategorical(logits, bools("111", "011")), MaskedCategorical(logits, bools("011", "011"))
    assert wide.kl(narrow).tolist() == [INF, 0.0]
    wide.kl(narrow).sum().backward()
    assert logits.grad.isfinite().all()
    valid = Categorical(logits=torch.tensor(LOGITS[1:]))
    expected = (valid.probs * (valid.logits - Categorical(logits=torch.tensor(LOGITS)).logits[1:])).sum()
    torch.testing.assert_close(narrow.kl(wide)[0].detach(), expected)


# --- sampling ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_samples_never_leave_the_mask(kind: Callable[..., Any], dtype: torch.dtype) -> None:
    # Over all kinds and dtypes; the spread of logits reaches from 1 to 1e9.
    rows, num_actions = 100_000, 10
    scale = 10.0 ** torch.randint(0, 10, (rows, 1), generator=generator(2))
    logits = torch.randn(rows, num_actions, generator=generator()) * scale
    masks = torch.rand(rows, num_actions, generator=generator(1)) < 0.3
    masks[:, 4] |= ~masks.any(dim=1)
    masked = kind(torch.where(masks, logits, NAN).to(dtype), masks)
    drawn = masked.sample(generator(3)).reshape(rows, 1)
    assert masks.gather(1, drawn).all()
    assert masks.gather(1, masked.mode.reshape(rows, 1)).all()


def test_frequencies_are_the_probabilities() -> None:
    n = 200_000
    masks, logits = bools("11011"), torch.tensor([[0.0, 1.0, 9.0, -2.0, -6.0]])
    masked = MaskedCategorical(logits.expand(n, 5), masks.expand(n, 5))
    counts = masked.sample(generator(5)).bincount(minlength=5).double()
    expected = masked.probs[0].double() * n
    assert counts[2] == 0
    chi_square = ((counts - expected)[masks[0]] ** 2 / expected[masks[0]]).sum()
    assert chi_square < 16.3  # 99.9 % quantile, 3 degrees of freedom


def test_samples_depend_on_the_generator_alone() -> None:
    masked = MaskedCategorical(torch.zeros(50, 4), torch.ones(50, 4, dtype=torch.bool))
    first = masked.sample(generator(7))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(masked.sample(generator(7)), first)
    assert not torch.equal(masked.sample(generator(8)), first)
    assert torch.equal(torch.get_rng_state(), state)


# --- several dimensions ------------------------------------------------------------------------------------------


def test_dimensions_are_independent_rows() -> None:
    logits = torch.randn(20, 6, generator=generator(), dtype=torch.float64)
    masks = bools("110111", "011011").repeat(10, 1)
    joint = MaskedMultiCategorical(logits, masks, NVEC)
    other = MaskedMultiCategorical(-logits, masks, NVEC)
    actions = joint.sample(generator())
    columns = [slice(0, 2), slice(2, 5), slice(5, 6)]
    parts = [MaskedCategorical(logits[:, part], masks[:, part]) for part in columns]
    others = [MaskedCategorical(-logits[:, part], masks[:, part]) for part in columns]
    torch.testing.assert_close(joint.probs, torch.cat([part.probs for part in parts], dim=1))
    assert torch.equal(joint.mode, torch.stack([part.mode for part in parts], dim=1))
    torch.testing.assert_close(joint.entropy(), sum(part.entropy() for part in parts))
    torch.testing.assert_close(joint.kl(other), sum(a.kl(b) for a, b in zip(parts, others, strict=True)))
    log_probs = [part.log_prob(column) for part, column in zip(parts, actions.T, strict=True)]
    torch.testing.assert_close(joint.log_prob(actions), sum(log_probs))


def test_an_action_beyond_its_own_dimension_is_no_action() -> None:
    # Dimensions are padded to the widest, 3: action 2 of the first dimension is padding.
    joint = MaskedMultiCategorical(torch.zeros(3, 6), bools("111111").expand(3, 6), NVEC)
    log_prob = joint.log_prob(torch.tensor([[1, 2, 0], [2, 2, 0], [1, 2, 1]]))
    assert log_prob.tolist() == [pytest.approx(-math.log(6)), -INF, -INF]


# --- refusals ----------------------------------------------------------------------------------------------------


@every_kind
def test_a_row_without_a_valid_action_raises(kind: Callable[..., Any]) -> None:
    with pytest.raises(InvalidMaskError, match=r"valid action in every row.*first row 1"):
        kind(torch.zeros(2, 3), bools("010", "000"))


def test_a_dimension_without_a_valid_action_raises() -> None:
    with pytest.raises(InvalidMaskError, match="of dimension 1, not so in 1 of 2 rows, first row 1"):
        MaskedMultiCategorical(torch.zeros(2, 6), bools("111111", "110001"), NVEC)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_on_a_valid_action_raises(kind: Callable[..., Any], dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, NAN], [0.0, NAN]], dtype=dtype)
    kind(logits, bools("10", "10"))
    with pytest.raises(MaskingError, match=r"NaN in 1 of 2 rows, first row 1"):
        kind(logits, bools("10", "11"))


@every_kind
@pytest.mark.parametrize(
    "masks",
    [torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int8), torch.full((2, 3), NAN)],
    ids=["additive", "float", "int8", "NaN"],
)
def test_masks_of_another_dtype_raise(kind: Callable[..., Any], masks: torch.Tensor) -> None:
    with pytest.raises(InvalidMaskError, match="expected dtype bool"):
        kind(torch.zeros(2, 3), masks)


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (2, 4)], ids=str)
def test_masks_of_another_shape_raise(shape: tuple[int, int]) -> None:
    masks = torch.ones(shape, dtype=torch.bool)
    for build in (MaskedCategorical, multi):
        with pytest.raises(InvalidMaskError, match="expected shape"):
            build(torch.zeros(2, 3), masks)
    with pytest.raises(InvalidMaskError, match="expected shape"):
        AgentCategorical(torch.zeros(2, 1, 3), masks[:, None], bools("1", "1"))


def test_logits_actions_presence_and_partner_of_another_kind_raise() -> None:
    masks = bools("111", "111")
    ours = MaskedCategorical(torch.zeros(2, 3), masks)
    with pytest.raises(MaskingError, match=r"logits: expected floating point \[B, A\], was torch.int64 \[2, 3\]"):
        MaskedCategorical(torch.zeros(2, 3, dtype=torch.int64), masks)
    with pytest.raises(MaskingError, match=r"\[B, 6\], was torch.float32 \[2, 3\]"):
        MaskedMultiCategorical(torch.zeros(2, 3), masks, NVEC)
    with pytest.raises(MaskingError, match=r"\[B, N, A\]"):
        AgentCategorical(torch.zeros(2, 3), masks, bools("1", "1"))
    for actions in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(InvalidActionError, match=r"actions: expected integers \[2\]"):
            ours.log_prob(actions)
    with pytest.raises(InvalidMaskError, match=r"present: expected bool \[2, 1\]"):
        AgentCategorical(torch.zeros(2, 1, 3), masks[:, None], torch.ones(2, 1))
    with pytest.raises(InvalidActionError, match="absent_action: expected 0 <= action < 3, was 3"):
        AgentCategorical(torch.zeros(2, 1, 3), masks[:, None], bools("1", "1"), absent_action=3)
    with pytest.raises(MaskingError, match=r"other: expected MaskedCategorical over \[2, 3\]"):
        ours.kl(multi(torch.zeros(2, 3), masks))


# --- unchecked, as in graphs -------------------------------------------------------------------------------------


class Graph(torch.nn.Module):
    def forward(self, logits: torch.Tensor, masks: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joint = MaskedMultiCategorical(logits, masks, NVEC, validate=False)
        return joint.mode, joint.log_prob(actions), joint.entropy(), joint.probs


def test_an_exported_graph_equals_eager_at_any_batch() -> None:
    batch = {0: torch.export.Dim("batch")}
    example = (torch.zeros(2, 6), bools("111111", "111111"), torch.zeros(2, 3, dtype=torch.int64))
    exported = torch.export.export(Graph(), example, dynamic_shapes=(batch, batch, batch)).module()
    for rows in (1, 2, 33):
        logits = torch.randn(rows, 6, generator=generator(rows))
        masks = torch.rand(rows, 6, generator=generator(1)) < 0.5
        masks[:, [0, 3, 5]] = True
        checked = MaskedMultiCategorical(torch.where(masks, logits, NAN), masks, NVEC)
        actions = checked.sample(generator())
        expected = checked.mode, checked.log_prob(actions), checked.entropy(), checked.probs
        for ours, eager in zip(exported(logits, masks, actions), expected, strict=True):
            assert torch.equal(ours, eager)


@every_kind
def test_unchecked_input_fails_closed(kind: Callable[..., Any]) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, 0.0], [NAN, NAN, NAN]])
    ours = kind(logits, bools("000", "110", "011"), validate=False)
    assert ours.mode.ravel().tolist() == [0, 0, 1]
    np.testing.assert_array_equal(ours.probs.reshape(3, 3), [[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5]])
    assert ours.entropy().isfinite().all()


def test_a_caller_who_writes_into_the_masks_later_changes_nothing() -> None:
    masks = np.array([[True, False]])
    policy = MaskedCategorical(torch.tensor([[0.0, 5.0]]), masks)
    masks[:] = [[False, True]]
    assert policy.mode.item() == policy.sample(torch.Generator().manual_seed(0)).item() == 0
    assert policy.log_prob(torch.tensor([1])).item() == -math.inf
