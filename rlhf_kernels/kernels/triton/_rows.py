"""Options of rows of logits in kernels, like csrc/cuda/rows.cuh.

A kernel takes the options as one argument `row_options`, a tuple of floats with None for an option
that is off. Triton compiles a variant for None but not for the value of a float. A named tuple
would make each launch slower.
"""

import triton
import triton.language as tl

from ...core.row_options import RowOptions
from ._math import tanh_parts
from ._strided import token_at


def packed(options: RowOptions) -> tuple[float | None, ...]:
    """(temperature, softcap), the tuple that the functions below unpack."""
    # float(): an int has another type and would compile another kernel.
    return float(options.temperature), float(options.softcap) if options.softcap > 0 else None


def order_slack(options: RowOptions) -> float:
    """By how much rounding may move a logit under the options out of the order of the logits."""
    return options.softcap * 2.0**-20


@triton.jit
def with_options(x, row_options):
    """Logits after the options, before the temperature divides them, and the slope of this map.

    The map never decreases. -inf may become finite, so padding must be excluded by its position.
    """
    _, softcap = row_options
    slope = 1.0
    if softcap is not None:
        th, slope = tanh_parts(x / softcap)
        x = softcap * th
    return x, slope


@triton.jit
def tile_with_options(z, inside, row_options):
    """Logits of a tile after the options; z is -inf in columns that are not `inside`."""
    _, softcap = row_options
    if softcap is not None:
        z, _ = with_options(z, row_options)
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def row_temperature(row_options, temperatures, row, cols, valid=None):
    """The temperature of all rows, or one per row; 1 where a row of the block is not `valid`."""
    temperature, _ = row_options
    if temperatures is not None:
        at = token_at(temperatures, row, cols)
        if valid is None:
            temperature = tl.load(at)
        else:
            temperature = tl.load(at, mask=valid, other=1.0)
    return temperature
