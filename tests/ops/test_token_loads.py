"""Tokens wherever they lie: 16 bytes at a time, one by one, or far apart, with the same bits."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import assert_bitwise_equal, generator

# More than a tile of any backend, and not a multiple of 16 bytes of anything.
COLS = 2061


def behind(x: torch.Tensor) -> torch.Tensor:
    """The same tokens, rows one element behind a multiple of 16 bytes."""
    rows, cols = x.shape
    sea = torch.empty(rows, cols // 16 * 16 + 32, dtype=x.dtype)
    sea.view(torch.uint8).fill_(255)
    return sea[:, 1 : 1 + cols].copy_(x)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The same tokens, rows at a multiple of 16 bytes."""
    rows, cols = x.shape
    return torch.empty(rows, cols // 16 * 16 + 32, dtype=x.dtype)[:, :cols].copy_(x)


def across(x: torch.Tensor) -> torch.Tensor:
    """The same tokens, a row's far apart."""
    return x.t().contiguous().t()


LAYOUTS = [torch.clone, aligned, behind, across]
MASKS = [torch.bool, torch.int32, torch.int64]


def tokens(backend, count):
    """So many tensors of tokens, and a mask with runs of both kinds."""
    g = generator(3)
    interpreted = backend == "triton" and triton.interpreted()
    shape = (2, 200 if interpreted else COLS)
    mask = torch.rand(shape, generator=g) < 0.8
    mask[0, 16:48] = True
    mask[:, 60:100] = False
    return [torch.randn(shape, generator=g) * 0.5 for _ in range(count)], mask


def needs_rounding(backend, dtype):
    """Skips where bfloat16 is cut off and not rounded."""
    if backend == "triton" and triton.interpreted() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off what bfloat16 does not hold")


def policy(x, mask):
    logprobs, entropy = x[0].detach().requires_grad_(), x[3].detach().requires_grad_()
    config = rk.PolicyLossConfig(entropy_coef=0.1, kl_coef=0.2)
    found = rk.policy_loss(
        logprobs, x[1], x[2], mask, ref_logprobs=x[4], entropy=entropy, config=config
    )
    return found.loss, *torch.autograd.grad(found.loss, (logprobs, entropy))


def value(x, mask):
    values = x[0].detach().requires_grad_()
    found = rk.value_loss(values, x[1], x[2], mask, clip_range=0.3)
    return found.loss, *torch.autograd.grad(found.loss, values)


def gae(x, mask):
    dones = x[2] > 1.25
    return rk.gae(x[0], x[1], mask, dones=type_as(dones, x[0]), gamma=0.99, lam=0.95)


def type_as(flags, layout):
    """Flags with the strides of another tensor."""
    return torch.empty_strided(flags.shape, layout.stride(), dtype=flags.dtype).copy_(flags)


@pytest.mark.parametrize("operation", [policy, value, gae])
def test_bits_do_not_depend_on_where_tokens_lie(backend, operation):
    if backend == "reference":
        pytest.skip("the order of torch's own sums depends on strides")
    x, mask = tokens(backend, 5)
    want = operation(x, mask)
    for layout in LAYOUTS:
        for dtype in MASKS:
            found = operation([layout(t) for t in x], layout(mask.to(dtype)))
            for a, b in zip(found, want, strict=True):
                assert_bitwise_equal(a, b)


@pytest.mark.parametrize("operation", [policy, value, gae])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tokens_are_their_fp32(backend, operation, dtype):
    needs_rounding(backend, dtype)
    x, mask = tokens(backend, 5)
    x = [t.to(dtype) for t in x]
    want = operation([t.float() for t in x], mask)
    for layout in (torch.clone, behind):
        found = operation([layout(t) for t in x], mask)
        for a, b in zip(found, want, strict=True):
            assert_bitwise_equal(a, b.to(a.dtype))


def test_gradients_of_two_dtypes(backend):
    needs_rounding(backend, torch.bfloat16)
    # Log-probabilities in 16 bits, the entropy in fp32, and the other way round.
    x, mask = tokens(backend, 5)
    x[0], x[3] = x[0].bfloat16(), x[3].bfloat16()
    _, *want = policy([t.float() for t in x], mask)
    for of_logprobs, of_entropy in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        y = [x[0].to(of_logprobs), x[1], x[2], x[3].to(of_entropy), x[4]]
        _, *found = policy(y, mask)
        for a, b in zip(found, want, strict=True):
            assert_bitwise_equal(a, b.to(a.dtype))
