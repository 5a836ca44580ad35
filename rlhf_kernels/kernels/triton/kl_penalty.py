"""kl_penalty: the estimate of the KL divergence per token, and its slope."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import grid
from ._launch import kernel, launch, tile_count
from ._math import exp_parts
from ._strided import strided, token_at
from ._tiles import tile_bounds

# Tokens per program.
TOKENS = 1024


@triton.jit
def k3_parts(x):
    """exp(-x) - 1 + x and its slope, for any x."""
    y = -x
    near = tl.where(y > 80.0, 80.0, tl.where(y < -80.0, -80.0, y))
    _, em1, em1mx = exp_parts(near)
    # Beyond the range of exp_parts, exp(y) = e^16 exp(y - 16); above y = 96 it is infinite.
    far = exp_parts(tl.where(y > 96.0, 80.0, tl.where(y > 80.0, y - 16.0, 0.0)))[0] * 8886110.5
    # At x = -inf the sum would be inf - inf = NaN.
    far_value = tl.where(far > 3.4e38, far, far + (x - 1.0))
    value = tl.where(y > 80.0, far_value, tl.where(y < -80.0, x - 1.0, em1mx))
    return value, tl.where(y > 80.0, -far, -em1)


@kernel
def penalty_kernel(
    logprobs, ref_logprobs, grad, out, tokens, cols, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    """The estimate of each token, or its slope times the upstream gradient; `out` is contiguous."""
    first, count = tile_bounds(tl.program_id(0), tokens, 1, BLOCK)
    inside = tl.arange(0, BLOCK) < count
    # Indices have the dtype of the token count: 32 bits up to 2^31 tokens.
    i = first.to(tokens.dtype) + tl.arange(0, BLOCK)
    x = tl.load(token_at(logprobs, i, cols), mask=inside, other=0.0)
    ref = tl.load(token_at(ref_logprobs, i, cols), mask=inside, other=0)
    x = x.to(tl.float32) - ref.to(tl.float32)
    if ESTIMATOR == "k1":
        value, slope = x, 1.0
    elif ESTIMATOR == "k2":
        value, slope = 0.5 * x * x, x
    elif ESTIMATOR == "k3":
        value, slope = k3_parts(x)
    else:
        # A NaN fails both comparisons and stays.
        value, slope = tl.abs(x), tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    if grad is not None:
        g = tl.load(token_at(grad, i, cols), mask=inside, other=0.0)
        # A zero upstream gradient gives 0, even where the slope is NaN.
        value = tl.where(g == 0.0, 0.0, g * slope)
    tl.store(out + first + tl.arange(0, BLOCK), value.to(out.dtype.element_ty), mask=inside)


def penalty(
    logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor | None, estimator: str, out: Tensor
) -> None:
    # With "+" the gradient is that of k2.
    straight = grad is not None and estimator.endswith("+")
    rows, cols = grid(out.shape)
    inputs = (strided(logprobs), strided(ref_logprobs), strided(grad, torch.float32))
    constants: dict[str, Any] = {"ESTIMATOR": "k2" if straight else estimator.removesuffix("+")}
    constants |= {"BLOCK": TOKENS, "warps": 4}
    programs = tile_count(rows * cols, TOKENS)
    launch(penalty_kernel, programs, logprobs, *inputs, out, rows * cols, cols, **constants)
