"""sequence_logprobs and reward_model_loss on every backend."""

import itertools
import math

import pytest
import torch

from tests.ops.bits import check_compiled

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import DTYPES, random_mask, to_float64


def make_pairs(count=6, dtype=torch.float32):
    return [(-20 - 5 * torch.randn(count)).to(dtype).requires_grad_() for _ in range(4)]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_logprobs(backend, dtype, average):
    mask = random_mask(5, 50)
    logprobs = torch.where(mask, -torch.rand(5, 50), math.nan).to(dtype).requires_grad_()
    total = rk.sequence_logprobs(logprobs, mask=mask, average=average)
    assert total.dtype is torch.float32 and total.shape == (5,)
    expected, slopes = torch.zeros(5), torch.zeros(5, 50)
    for i in range(5):
        kept = [logprobs[i, t].item() for t in range(50) if mask[i, t]]
        divisor = max(len(kept), 1) if average else 1
        expected[i] = sum(kept) / divisor
        slopes[i] = mask[i] / divisor
    torch.testing.assert_close(total, expected)
    (g,) = gradients(total.sum(), [logprobs])
    torch.testing.assert_close(g, slopes.to(dtype))
    assert expected[:4].abs().min() > 0.1 and expected[4] == 0
    as_integers = rk.sequence_logprobs(logprobs, mask=mask.long(), average=average)
    assert torch.equal(as_integers, total)


def test_sequence_logprobs_packed(backend):
    lengths = [20, 0, 1, 7]
    inside = torch.arange(20) < torch.tensor(lengths).unsqueeze(-1)
    logprobs, mask = -torch.rand(4, 20), random_mask(4, 20, keep=0.8)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    for average in (False, True):
        padded = rk.sequence_logprobs(logprobs, mask=mask & inside, average=average)
        packed = rk.sequence_logprobs(
            logprobs[inside], mask=mask[inside], cu_seqlens=cu_seqlens, average=average
        )
        torch.testing.assert_close(packed, padded)
    with pytest.raises(ValueError, match="cu_seqlens"):
        rk.sequence_logprobs(logprobs[inside], mask=mask[inside], cu_seqlens=cu_seqlens[:-1])


@pytest.mark.parametrize("average", (False, True))
def test_sequence_logprobs_of_many_tokens(backend, average):
    # Added one after the other in float32, 100,000 equal numbers have lost three digits.
    lengths = (100_000, 3, 50_000)
    logprobs = torch.full((sum(lengths),), -1.234567)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = rk.sequence_logprobs(logprobs, mask, cu_seqlens=cu_seqlens, average=average)
    exact = [logprobs[0].item() * (1 if average else n) for n in lengths]
    assert packed.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()
    inside = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    padded = rk.sequence_logprobs(logprobs[0].expand(inside.shape), inside, average=average)
    assert torch.equal(padded, packed)


def test_gradchecks():
    pairs = to_float64(make_pairs(4))
    assert torch.autograd.gradcheck(
        lambda w, r: reference.reward_model_loss(w, r, margin=0.5, center_coef=0.1)[0], pairs[:2]
    )
    mask = random_mask(4, 5)
    logprobs = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.sequence_logprobs(x, mask), logprobs)


@pytest.mark.parametrize("margin", (None, 0.5, "tensor"))
@pytest.mark.parametrize("center_coef", (0.0, 0.01))
def test_reward_model(backend, margin, center_coef):
    chosen, rejected, *_ = make_pairs()
    if margin == "tensor":
        margin = torch.rand(6)
    loss, accuracy = rk.reward_model_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    margins = margin.tolist() if isinstance(margin, torch.Tensor) else [margin or 0.0] * 6
    expected = 0.0
    for w, r, m in zip(chosen.tolist(), rejected.tolist(), margins, strict=True):
        expected += math.log1p(math.exp(-(w - r - m))) + center_coef * (w + r) ** 2
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)
    assert accuracy == (chosen > rejected).float().mean() and 0 < accuracy < 1
    g = gradients(loss, [chosen, rejected])
    assert all(x.abs().max() > 1e-4 for x in g)


def test_extremes_are_finite(backend):
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zeros = torch.zeros(2)
    loss = rk.reward_model_loss(far, zeros).loss
    assert loss.item() == 5000.0
    assert gradients(loss, [far])[0].tolist() == [0.0, -0.5]


def test_no_pairs(backend):
    none = [torch.zeros(0, requires_grad=True) for _ in range(2)]
    loss, accuracy = rk.reward_model_loss(*none)
    loss.backward()
    assert loss == 0 and accuracy == 0 and none[0].grad.shape == (0,)


def test_compile_without_graph_breaks(backend):
    def step(logprobs, mask, ref):
        sums = rk.sequence_logprobs(logprobs, mask=mask)
        w, r = sums.chunk(2)
        dpo = rk.preference_loss(w, r, *ref.chunk(2), beta=0.2).loss
        return (dpo + rk.reward_model_loss(w, r, center_coef=0.1).loss,)

    batches = (
        (-torch.rand(rows, 3 * rows), random_mask(rows, 3 * rows), torch.randn(rows))
        for rows in (4, 6, 10, 14, 30)
    )
    check_compiled(step, batches)


def test_bad_arguments_raise(backend):
    pairs = make_pairs(4)
    with pytest.raises(ValueError, match="rejected_rewards must have the shape"):
        rk.reward_model_loss(pairs[0], pairs[1][:2])
    with pytest.raises(ValueError, match=r"chosen_rewards must be \[B\]"):
        rk.reward_model_loss(*(p.reshape(2, 2) for p in pairs[:2]))
    with pytest.raises(TypeError, match="chosen_rewards must be one of"):
        rk.reward_model_loss(pairs[0].long(), pairs[1])
    with pytest.raises(ValueError, match="center_coef"):
        rk.reward_model_loss(*pairs[:2], center_coef=-1.0)
    with pytest.raises(ValueError, match="margin must have the shape"):
        rk.reward_model_loss(*pairs[:2], margin=torch.zeros(3))
    with pytest.raises(TypeError, match="margin must be a number"):
        rk.reward_model_loss(*pairs[:2], margin="0.5")
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        rk.sequence_logprobs(torch.zeros(2, 3), mask=torch.full((2, 3), 0.5))
