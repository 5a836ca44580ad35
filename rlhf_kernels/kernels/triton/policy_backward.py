"""loss_backward, of policy_loss and value_loss: gradients times their factors, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import materialized
from ._launch import kernel, launch, tile_count
from ._tokens import WARPS

# Elements per program, and per 16-byte load.
TILE = 4096
ALIGN = tl.constexpr(4)


@triton.jit
def scale_tile(gradient, out, i, inside, factor):
    g = tl.load(gradient + i, mask=inside, other=0.0) * factor
    tl.store(out + i, g.to(out.dtype.element_ty), mask=inside)


@kernel(aligned=("first", "second", "first_out", "second_out"))
def backward_kernel(
    first, second, first_out, second_out, scale, upstream, count, TILE: tl.constexpr
):
    """gradient * (scale * upstream) for one tile of one or two gradients."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    factor = tl.load(scale) * tl.load(upstream).to(tl.float32)
    i = tl.arange(0, TILE)
    left = tl.minimum(count - begin, TILE).to(tl.int32)
    # First full groups of ALIGN elements, with 16-byte loads for any count; then the remainder.
    grouped = i // ALIGN < left // ALIGN
    scale_tile(first + begin, first_out + begin, i, grouped, factor)
    if second is not None:
        scale_tile(second + begin, second_out + begin, i, grouped, factor)
    i = left // ALIGN * ALIGN + tl.arange(0, ALIGN)
    scale_tile(first + begin, first_out + begin, i, i < left, factor)
    if second is not None:
        scale_tile(second + begin, second_out + begin, i, i < left, factor)


def scale_into(
    first: Tensor,
    second: Tensor | None,
    scale: Tensor,
    upstream: Tensor,
    first_out: Tensor,
    second_out: Tensor | None,
) -> None:
    count, factors = first.numel(), (scale, materialized(upstream))
    tensors, tile = (first, second, first_out, second_out), {"TILE": TILE}
    programs = tile_count(count, TILE)
    launch(backward_kernel, programs, first, *tensors, *factors, count, **tile, warps=WARPS)
