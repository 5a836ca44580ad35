"""Products of hidden rows with the weight's rows of a support's token ids, and their gradients.

Gradients of the head are weighted sums of gathered rows, in the order of the entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows
from ._launch import kernel, launch, tile_count
from ._math import tree_sum, tree_sums
from ._strided import Strided, alignment, in_units, strided, strided_rows, token_at

# Entries and columns per tile of products, and per tile of a sum of rows: 32 values per thread.
# Fewer for unaligned rows, where every value needs an address. The order of a sum does not depend
# on these numbers.
PRODUCT_ROWS, PRODUCT_ROWS_UNALIGNED, PRODUCT_COLS = 32, 8, 128
SUM_ROWS, SUM_COLS, SUM_COLS_UNALIGNED = 4, 512, 128
# Entries per partial sum of a list.
SUM_TERMS = 512
WARPS = 4
# Bound on the length of a list, so that lengths fit 32 bits. Valid lists are not longer than the
# vocabulary.
LONGEST = tl.constexpr(2**30)


@triton.jit
def sum_rows(x):
    """Sums of a tile's columns, [R, C] to [C], as trees."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.reshape(x, (x.shape[1],))


@triton.jit
def entries_of(starts, i, entries):
    """(first entry, number of entries) of list i, within [0, entries) even for bad `starts`."""
    size = tl.full((), 0, tl.int64) + entries
    begin = tl.minimum(tl.maximum(tl.load(starts + i).to(tl.int64), 0), size)
    end = tl.minimum(tl.load(starts + i + 1).to(tl.int64), size)
    return begin, tl.minimum(tl.maximum(end - begin, 0), LONGEST).to(tl.int32)


@kernel(aligned=("hidden", "weight"))
def products_kernel(
    hidden,
    weight,
    bias,
    labels,
    indices,
    owner,
    kept,
    cols,
    tokens,
    entries,
    vocab,
    width,
    ignore_index,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Raw logits of a tile of entries; width and strides of rows are counted in units of ALIGN."""
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = entry < entries
    token = tl.load(owner + entry, mask=inside, other=0)
    read = inside & (token < tokens)
    label = tl.load(token_at(labels, token, cols), mask=read, other=ignore_index)
    read &= label != ignore_index
    token_id = tl.load(indices + entry, mask=read, other=-1).to(tl.int64)
    read &= (token_id >= 0) & (token_id < vocab)
    x = token_at(hidden, token, cols, ALIGN)
    weights, _, stride = weight
    w = weights + token_id * stride * ALIGN
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width * ALIGN, COLS):
        column = start + tl.arange(0, COLS)
        mask = read[:, None] & (column < width * ALIGN)[None, :]
        a = tl.load(w[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += a * b
    z = tree_sums(acc)
    if bias is not None:
        biases, _, stride = bias
        z += tl.load(biases + token_id * stride, mask=read, other=0.0)
    tl.store(kept + entry, z, mask=inside)


@kernel(aligned=("source", "out"))
def sums_kernel(
    source,
    starts,
    order,
    rows,
    dz,
    out,
    bias,
    blocks,
    cols,
    limit,
    entries,
    width,
    ALIGN: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A block of columns of one row of `out`: the sum of dz * row of `source` over a list.

    List i has the entries starts[i] to starts[i + 1], through `order` if that is given. `rows` is
    the row of each entry; `source` has `limit` rows. `bias` takes the sum of dz.
    """
    pid = tl.program_id(0)
    i, block = pid // blocks, pid % blocks
    begin, count = entries_of(starts, i, entries)
    column = block * COLS + tl.arange(0, COLS)
    wanted = column < width * ALIGN
    sums = tl.zeros((COLS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, count, TERMS):
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(first, tl.minimum(first + TERMS, count), ROWS):
            j = start + tl.arange(0, ROWS)
            inside = j < count
            entry = begin + j
            if order is not None:
                entry = tl.load(order + entry, mask=inside, other=0)
            factor = tl.load(dz + entry, mask=inside, other=0.0)
            row = tl.load(rows + entry, mask=inside, other=0).to(tl.int64)
            read = inside & (factor != 0.0) & (row >= 0) & (row < limit)
            factor = tl.where(read, factor, 0.0)
            if out is not None:
                x = token_at(source, row, cols, ALIGN)
                mask = read[:, None] & wanted[None, :]
                value = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                acc += factor[:, None] * value
            if bias is not None:
                total += factor.to(tl.float64)
        if out is not None:
            sums += sum_rows(acc)
    if out is not None:
        to = out + i.to(tl.int64) * width * ALIGN + column
        tl.store(to, sums.to(out.dtype.element_ty), mask=wanted)
    if bias is not None:
        if block == 0:
            tl.store(bias + i, tree_sum(total, ROWS).to(tl.float32))


def owners(indptr: Tensor, entries: int) -> Tensor:
    """The token of each entry, int64 [entries]; the number of tokens for an entry without one."""
    at = torch.arange(entries, dtype=indptr.dtype, device=indptr.device)
    return torch.searchsorted(indptr[1:], at, right=True)


def store_products(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Strided,
    indptr: Tensor,
    indices: Tensor,
    kept: Tensor,
    cols: int,
    ignore_index: int,
) -> None:
    """Writes the raw logits of all entries, hidden [..., H] times rows of weight [V, H], to `kept`.

    Args:
        hidden: from `as_rows`.
        labels: with `cols` columns; entries of tokens with the label `ignore_index` are 0.
        indptr, indices: the support, contiguous.
    """
    weight, (vocab, width), entries = as_rows(weight), weight.shape, indices.shape[0]
    rows, weights = strided_rows(hidden), strided_rows(weight)
    align = alignment(width, rows, weights)
    tile = PRODUCT_ROWS if align > 1 else PRODUCT_ROWS_UNALIGNED
    launch(
        products_kernel,
        tile_count(entries, tile),
        hidden,
        in_units(rows, align),
        in_units(weights, align),
        strided(bias, torch.float32),
        labels,
        indices,
        owners(indptr, entries),
        kept,
        cols,
        indptr.shape[0] - 1,
        entries,
        vocab,
        width // align,
        ignore_index,
        ALIGN=align,
        ROWS=tile,
        COLS=PRODUCT_COLS,
        warps=WARPS,
    )


def store_sums(
    source: Tensor,
    starts: Tensor,
    order: Tensor | None,
    rows: Tensor,
    dz: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    cols: int,
    limit: int,
) -> None:
    """Writes the sums of dz times rows of `source` [..., H] over each list to `out` and `bias`."""
    width, x = source.shape[-1], strided_rows(source)
    align = alignment(width, x)
    columns = SUM_COLS if align > 1 else SUM_COLS_UNALIGNED
    # At least one block: the bias has a gradient even if the rows have no columns.
    blocks = max(tile_count(width, columns), 1) if out is not None else 1
    launch(
        sums_kernel,
        (starts.shape[0] - 1) * blocks,
        source,
        in_units(x, align),
        starts,
        order,
        rows,
        dz,
        out,
        bias,
        blocks,
        cols,
        limit,
        dz.shape[0],
        width // align,
        ALIGN=align,
        TERMS=SUM_TERMS,
        ROWS=SUM_ROWS,
        COLS=columns,
        warps=WARPS,
    )
