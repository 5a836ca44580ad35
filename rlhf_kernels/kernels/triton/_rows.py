"""Options of rows of logits in kernels, as csrc/cuda/rows.cuh has them.

A kernel takes them as one argument `row_options`, a tuple of numbers with None for what is off:
Triton compiles a variant for None and none for the value of a float. Integers stay arguments of
their own: inside a tuple they would be specialised on, whatever the kernel says. A named tuple
would make each launch slower.
"""

import triton
import triton.language as tl

from ...core.row_options import RowOptions
from ._math import tanh_parts


def packed(options: RowOptions) -> tuple[float | None, ...]:
    """(temperature, softcap) as the functions below unpack them."""
    # A whole number would be another type, hence another kernel.
    return float(options.temperature), float(options.softcap) if options.softcap > 0 else None


@triton.jit
def with_options(x, row_options):
    """Logits as the options make them, before the temperature divides, and the slope of that.

    It does not decrease. -inf may become finite: what is no logit must stay out by its position.
    """
    _, softcap = row_options
    slope = 1.0
    if softcap is not None:
        th, slope = tanh_parts(x / softcap)
        x = softcap * th
    return x, slope


@triton.jit
def token_at(i, cols, stride0, stride1):
    """Offset of token i of a grid [rows, cols]."""
    return (i // cols).to(tl.int64) * stride0 + (i % cols).to(tl.int64) * stride1


@triton.jit
def row_temperature(
    row_options, temperatures, row, cols, stride0, stride1, PER_TOKEN: tl.constexpr, valid=None
):  # fmt: skip
    """Temperature of all rows, or that of each; 1 where a block's row is not `valid`."""
    temperature, _ = row_options
    if PER_TOKEN:
        at = temperatures + token_at(row, cols, stride0, stride1)
        if valid is None:
            temperature = tl.load(at)
        else:
            temperature = tl.load(at, mask=valid, other=1.0)
    return temperature
