"""token_logprobs over a support, the list of token ids that the sampler kept for each token.

Work on entries (products with the weight) is cut into tiles of consecutive entries across token
borders, so one token with a long list costs no more than many with short lists. Work on tokens
loops over the token's entries. Gradients of the head are weighted sums of gathered rows, in the
order of the entries. The bits of an entry or a token do not depend on its neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import checks, env
from ...core.layout import as_grid, as_rows, as_upstream, grid, grid_strides, rows_strides
from ...core.row_options import RowOptions
from ._launch import kernel, launch, tile_count
from ._math import LOG2E, good_temperature, scalar, tree_sum
from ._rows import packed, row_temperature, token_at, with_options
from .logprobs import LOWEST, _strides, alignment, label_gradient, tile_sums

# Entries that a token's program takes at a time. Few lists are longer, and 512 would spill
# registers.
BLOCK = 256
# Entries and columns per tile of products, and per tile of a sum of rows: 32 values per thread.
# Fewer for unaligned rows, where every value needs an address. The order of a sum does not depend
# on these numbers.
PRODUCT_ROWS, PRODUCT_ROWS_UNALIGNED, PRODUCT_COLS = 32, 8, 128
SUM_ROWS, SUM_COLS, SUM_COLS_UNALIGNED = 4, 512, 128
# Entries per partial sum of a list.
SUM_TERMS = 512
WARPS = 4
# Entries of indptr that are checked at a time.
CHECKED = 2048
# Bound on the length of a list, so that lengths fit 32 bits. Valid lists are not longer than the
# vocabulary.
LONGEST = tl.constexpr(2**30)


@triton.jit
def sum_cols(x):
    """Sums of a tile's rows, [R, C] to [R], as trees of neighbours with the same bits in any
    layout.
    """
    for _ in tl.static_range(20):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return tl.reshape(x, (x.shape[0],))


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


@kernel
def check_kernel(indptr, poison, tokens, entries, BLOCK: tl.constexpr):
    """Stores 0, or NaN if indptr does not start at 0, decreases, or does not end at `entries`."""
    bad = (tl.load(indptr) != 0) | (tl.load(indptr + tokens) != entries)
    wrong = tl.where(bad, 1, 0)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < tokens
        low = tl.load(indptr + i, mask=inside, other=0)
        high = tl.load(indptr + i + 1, mask=inside, other=0)
        wrong = tl.maximum(wrong, tl.max(tl.where(high < low, 1, 0), axis=0))
    tl.store(poison, tl.where(wrong != 0, float("nan"), 0.0))


@kernel(aligned=("hidden", "weight"))
def products_kernel(
    hidden, weight, bias, labels, indices, owner, kept, cols, tokens, entries, vocab, width,
    stride0, stride1, weight_stride, bias_stride, labels_stride0, labels_stride1, ignore_index,
    ALIGN: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Raw logits of a tile of entries; width and strides of rows are counted in units of ALIGN."""
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = entry < entries
    token = tl.load(owner + entry, mask=inside, other=0)
    read = inside & (token < tokens)
    at = token_at(token, cols, labels_stride0, labels_stride1)
    read &= tl.load(labels + at, mask=read, other=ignore_index) != ignore_index
    token_id = tl.load(indices + entry, mask=read, other=-1).to(tl.int64)
    read &= (token_id >= 0) & (token_id < vocab)
    x = hidden + token_at(token, cols, stride0, stride1) * ALIGN
    w = weight + token_id * weight_stride * ALIGN
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width * ALIGN, COLS):
        column = start + tl.arange(0, COLS)
        mask = read[:, None] & (column < width * ALIGN)[None, :]
        a = tl.load(w[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += a * b
    z = sum_cols(acc)
    if BIAS:
        z += tl.load(bias + token_id * bias_stride, mask=read, other=0.0)
    tl.store(kept + entry, z, mask=inside)


@kernel
def rows_kernel(
    logits, kept, labels, temperatures, indptr, indices, poison, logprobs, entropies, stats, cols,
    vocab, entries, stride0, stride1, labels_stride0, labels_stride1, temperatures_stride0,
    temperatures_stride1, row_options, ignore_index, GATHER: tl.constexpr,
    ENTROPY: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probability, entropy and statistics of one token; with GATHER also its kept logits."""
    row = tl.program_id(0)
    label = tl.load(labels + token_at(row, cols, labels_stride0, labels_stride1)).to(tl.int64)
    logprob, entropy = 0.0, 0.0
    out_m, out_s, mean = 0.0, 1.0, 0.0
    if label != ignore_index:
        temperature = row_temperature(
            row_options, temperatures, row, cols, temperatures_stride0, temperatures_stride1,
            PER_TOKEN,
        )  # fmt: skip
        rate = 1.0 / scalar(temperature).to(tl.float64)
        rate32 = rate.to(tl.float32)
        begin, count = entries_of(indptr, row, entries)
        x = logits + token_at(row, cols, stride0, stride1)
        m = tl.full((), float("-inf"), tl.float32)
        s = tl.full((), 0.0, tl.float64)
        t = tl.full((), 0.0, tl.float64)
        own = tl.full((), float("-inf"), tl.float32)
        wrong = tl.full((), 0, tl.int32)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < count
            token_id = tl.load(indices + begin + i, mask=inside, other=0).to(tl.int64)
            known = (token_id >= 0) & (token_id < vocab)
            wrong = tl.maximum(wrong, tl.max(tl.where(known, 0, 1), axis=0))
            if GATHER:
                z = tl.load(x + token_id, mask=inside & known, other=float("-inf")).to(tl.float32)
                tl.store(kept + begin + i, z, mask=inside)
            else:
                z = tl.load(kept + begin + i, mask=inside, other=float("-inf"))
            z, _ = with_options(z, row_options)
            here = inside & (token_id == label)
            found = tl.max(tl.where(here, z, float("-inf")), axis=0)
            own = tl.where(found > own, found, own)
            z = tl.where(inside, z, float("-inf"))
            tile_m, tile_s, tile_t = tile_sums(z, rate32, ENTROPY, BLOCK)
            # This maximum may lose a NaN, but the sums have it too.
            top = tl.where(m > tile_m, m, tile_m)
            base = tl.where(top == float("-inf"), 0.0, top)
            # A tile of only -inf has no reference point and a sum of 0; its distance is 0.
            shift = tl.where(tile_s == 0.0, 0.0, (tile_m - base) * rate32)
            weight = tl.exp2(shift * LOG2E).to(tl.float64)
            before = tl.where(s == 0.0, 0.0, (m - base) * rate32)
            old = tl.exp2(before * LOG2E).to(tl.float64)
            if ENTROPY:
                moved = tl.where(weight == 0.0, 0.0, weight * (tile_t + tile_s * shift))
                t = tl.where(old == 0.0, 0.0, old * (t + s * before)) + moved
            s = old * s + weight * tile_s
            m = top
        # The token is NaN for a label or token id outside the vocabulary, a bad temperature,
        # decreasing offsets or an empty support.
        good = (label >= 0) & (label < vocab) & good_temperature(temperature)
        good &= (wrong == 0) & (m > float("-inf"))
        nan = tl.where(good, tl.load(poison), float("nan"))
        log_s = tl.log(s)
        # A label that was not kept has the logit own = -inf and gives -inf, not NaN.
        logprob = ((own - m).to(tl.float64) * rate - log_s).to(tl.float32) + nan
        mean = (t / s).to(tl.float32) + nan
        entropy = (log_s - t / s).to(tl.float32) + nan
        out_m, out_s = m, s.to(tl.float32) + nan
    tl.store(logprobs + row, logprob)
    if ENTROPY:
        tl.store(entropies + row, entropy)
    out = stats + row.to(tl.int64) * 3
    tl.store(out, out_m)
    tl.store(out + 1, out_s)
    tl.store(out + 2, mean)


@kernel
def gradient_kernel(
    kept, labels, temperatures, indptr, indices, stats, grad_logprobs, grad_entropy, dz, token_ids,
    out, cols, vocab, entries, labels_stride0, labels_stride1, temperatures_stride0,
    temperatures_stride1, g_stride0, g_stride1, h_stride0, h_stride1, row_options, ignore_index,
    DENSE: tl.constexpr, PER_TOKEN: tl.constexpr, LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a token's kept logits: into a row of zeros of `out` with DENSE, else into `dz`.

    Also stores `token_ids`: the token id of each entry with a gradient, `vocab` for the others.
    """
    row = tl.program_id(0)
    label = tl.load(labels + token_at(row, cols, labels_stride0, labels_stride1)).to(tl.int64)
    g, h = scalar(0.0), scalar(0.0)
    if LOGPROBS:
        g = tl.load(grad_logprobs + token_at(row, cols, g_stride0, g_stride1))
    if ENTROPY:
        h = tl.load(grad_entropy + token_at(row, cols, h_stride0, h_stride1))
    begin, count = entries_of(indptr, row, entries)
    used = (label != ignore_index) & ((g != 0.0) | (h != 0.0))
    if used:
        temperature = row_temperature(
            row_options, temperatures, row, cols, temperatures_stride0, temperatures_stride1,
            PER_TOKEN,
        )  # fmt: skip
        rate = 1.0 / scalar(temperature).to(tl.float64)
        rate32 = rate.to(tl.float32)
        of_row = stats + row.to(tl.int64) * 3
        m, mean = tl.load(of_row), tl.load(of_row + 2).to(tl.float64)
        s = tl.load(of_row + 1).to(tl.float64)
        log_s = tl.log(s)
        # dz = e (a0 + a1 log2 e): the entropy term is linear in log p.
        a0 = ((-g + h * mean) / s * rate).to(tl.float32)
        a1 = (-h / s * rate / LOG2E).to(tl.float32)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < count
            token_id = tl.load(indices + begin + i, mask=inside, other=0).to(tl.int64)
            known = inside & (token_id >= 0) & (token_id < vocab)
            raw = tl.load(kept + begin + i, mask=known, other=float("-inf"))
            here = known & (token_id == label)
            own = tl.max(tl.where(here, raw, float("-inf")), axis=0)
            z, slope = with_options(raw, row_options)
            own, own_slope = with_options(own, row_options)
            d = z - m
            log2_e = d * (rate32 * LOG2E)
            e = tl.exp2(log2_e)
            value = e * a0
            if ENTROPY:
                value = e * (a0 + a1 * log2_e)
            # Exactly zero, even at -inf, where e d is NaN.
            value = tl.where(d * rate32 < LOWEST, 0.0, value * slope)
            distance = (own - m).to(tl.float64) * rate
            at_label = label_gradient(distance - log_s, distance, mean, g, h) * rate * own_slope
            at_label = at_label.to(tl.float32)
            value = tl.where(here, at_label, value)
            if DENSE:
                to = out + row.to(tl.int64) * vocab + token_id
                tl.store(to, value.to(out.dtype.element_ty), mask=known)
            else:
                moves = known & (value != 0.0)
                tl.store(dz + begin + i, tl.where(moves, value, 0.0), mask=inside)
                tl.store(token_ids + begin + i, tl.where(moves, token_id, vocab), mask=inside)
    else:
        if DENSE == 0:
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                tl.store(dz + begin + i, tl.zeros((BLOCK,), tl.float32), mask=i < count)
                tl.store(
                    token_ids + begin + i, tl.zeros((BLOCK,), tl.int32) + vocab, mask=i < count
                )


@kernel(aligned=("source", "out"))
def sums_kernel(
    source, starts, order, rows, dz, out, bias, blocks, cols, limit, entries, width, stride0,
    stride1, ALIGN: tl.constexpr, SORTED: tl.constexpr, SUM: tl.constexpr, BIAS: tl.constexpr,
    TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A block of columns of one row of `out`: the sum of dz * row of `source` over a list.

    List i has the entries starts[i] to starts[i + 1], through `order` if SORTED. `rows` is the row
    of each entry; `source` has `limit` rows. With BIAS also the sum of dz.
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
            if SORTED:
                entry = tl.load(order + entry, mask=inside, other=0)
            factor = tl.load(dz + entry, mask=inside, other=0.0)
            row = tl.load(rows + entry, mask=inside, other=0).to(tl.int64)
            read = inside & (factor != 0.0) & (row >= 0) & (row < limit)
            factor = tl.where(read, factor, 0.0)
            if SUM:
                x = source + token_at(row, cols, stride0, stride1) * ALIGN
                mask = read[:, None] & wanted[None, :]
                value = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                acc += factor[:, None] * value
            if BIAS:
                total += factor.to(tl.float64)
        if SUM:
            sums += sum_rows(acc)
    if SUM:
        to = out + i.to(tl.int64) * width * ALIGN + column
        tl.store(to, sums.to(out.dtype.element_ty), mask=wanted)
    if BIAS:
        if block == 0:
            tl.store(bias + i, tree_sum(total, ROWS).to(tl.float32))


def _owners(indptr: Tensor, entries: int) -> Tensor:
    """The token of each entry, int64 [entries]; the number of tokens for an entry without one."""
    at = torch.arange(entries, dtype=indptr.dtype, device=indptr.device)
    return torch.searchsorted(indptr[1:], at, right=True)


def _forward(
    op: str,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, width = labels.shape, rows.shape[-1]
    vocab = width if weight is None else weight.shape[0]
    logprobs = torch.empty(shape, dtype=torch.float32, device=rows.device)
    entropies = torch.empty_like(logprobs) if options.entropy else logprobs.new_empty(0)
    stats = logprobs.new_empty((*shape, 3))
    kept = logprobs.new_empty(indices.shape)
    if labels.numel() == 0:
        return logprobs, entropies, stats, kept
    if env.CHECK:
        keep = labels != options.ignore_index
        checks.support_data(op, labels, temperatures, indptr, indices, keep, vocab)
    tokens, entries, (_, cols) = labels.numel(), indices.shape[0], grid(shape)
    rows, labels, temperatures = (
        as_rows(rows),
        as_grid(labels),
        as_grid(temperatures, torch.float32),
    )
    indptr, indices = indptr.contiguous(), indices.contiguous()
    poison = logprobs.new_empty(1)
    launch(check_kernel, 1, rows, indptr, poison, tokens, entries, BLOCK=CHECKED, warps=WARPS)
    if weight is not None and entries:
        weight, bias = as_rows(weight), as_grid(bias, torch.float32)
        align = alignment(width, rows, weight)
        tile = PRODUCT_ROWS if align > 1 else PRODUCT_ROWS_UNALIGNED
        launch(
            products_kernel, tile_count(entries, tile), rows, rows, weight, bias, labels,
            indices, _owners(indptr, entries), kept, cols, tokens, entries, vocab, width // align,
            *(s // align for s in rows_strides(rows)), rows_strides(weight)[1] // align,
            _strides(bias)[1],
            *grid_strides(labels), options.ignore_index, ALIGN=align, BIAS=bias is not None,
            ROWS=tile, COLS=PRODUCT_COLS, warps=WARPS,
        )  # fmt: skip
    launch(
        rows_kernel, tokens, rows, rows, kept, labels, temperatures, indptr, indices, poison,
        logprobs, entropies, stats, cols, vocab, entries, *rows_strides(rows),
        *grid_strides(labels), *_strides(temperatures), packed(options), options.ignore_index,
        GATHER=weight is None, ENTROPY=options.entropy, PER_TOKEN=temperatures is not None,
        BLOCK=BLOCK, warps=WARPS,
    )  # fmt: skip
    return logprobs, entropies, stats, kept


def _gradient(
    vocab: int,
    out: Tensor | None,
    dz: Tensor | None,
    token_ids: Tensor | None,
    kept: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
) -> None:
    """Writes the gradient into `out` (all zeros before), or per entry into dz and token_ids."""
    _, cols = grid(labels.shape)
    labels, temperatures = as_grid(labels), as_grid(temperatures, torch.float32)
    g, h = as_upstream(grad_logprobs), as_upstream(grad_entropy)
    launch(
        gradient_kernel, labels.numel(), kept, kept, labels, temperatures, indptr, indices, stats,
        g, h, dz, token_ids, out, cols, vocab, indices.shape[0], *grid_strides(labels),
        *_strides(temperatures), *_strides(g), *_strides(h), packed(options),
        options.ignore_index, DENSE=out is not None, PER_TOKEN=temperatures is not None,
        LOGPROBS=g is not None, ENTROPY=h is not None, BLOCK=BLOCK, warps=WARPS,
    )  # fmt: skip


def _sums(
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
    width = source.shape[-1]
    align = alignment(width, source)
    columns = SUM_COLS if align > 1 else SUM_COLS_UNALIGNED
    # At least one block: the bias has a gradient even if the rows have no columns.
    blocks = max(tile_count(width, columns), 1) if out is not None else 1
    stride0, stride1 = (s // align for s in rows_strides(source))
    launch(
        sums_kernel, (starts.shape[0] - 1) * blocks, source, source, starts, order, rows, dz, out,
        bias, blocks, cols, limit, dz.shape[0], width // align, stride0, stride1, ALIGN=align,
        SORTED=order is not None, SUM=out is not None, BIAS=bias is not None, TERMS=SUM_TERMS,
        ROWS=SUM_ROWS, COLS=columns, warps=WARPS,
    )  # fmt: skip


def token_logprobs_support(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _forward("token_logprobs", logits, None, None, *args)


def token_logprobs_support_backward(
    kept: Tensor, labels: Tensor, temperatures: Tensor | None, indptr: Tensor, indices: Tensor,
    *args: Any,
) -> Tensor:  # fmt: skip
    *inputs, vocab, dtype = args
    out = torch.zeros((*labels.shape, vocab), dtype=dtype, device=kept.device)
    if indices.numel() and labels.numel():
        _gradient(
            vocab, out, None, None, kept, labels, temperatures, indptr.contiguous(),
            indices.contiguous(), *inputs,
        )  # fmt: skip
    return out


def linear_token_logprobs_support(*args: Any) -> tuple[Tensor, ...]:
    return _forward("linear_token_logprobs", *args)


def linear_token_logprobs_support_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, labels: Tensor,
    temperatures: Tensor | None, indptr: Tensor, indices: Tensor, *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *inputs, (of_hidden, of_weight, of_bias) = args
    vocab, entries, tokens = weight.shape[0], indices.shape[0], labels.numel()
    grad_hidden = hidden.new_empty(hidden.shape) if of_hidden else hidden.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if of_weight else hidden.new_empty(0)
    grad_bias = kept.new_empty(vocab if of_bias else 0)
    if not entries or not tokens:
        found = (grad_hidden.zero_(), grad_weight.zero_(), grad_bias.zero_())
    else:
        found = (grad_hidden, grad_weight, grad_bias)
        indptr, indices = indptr.contiguous(), indices.contiguous()
        dz, token_ids = torch.empty_like(kept), torch.empty_like(kept, dtype=torch.int32)
        _gradient(vocab, None, dz, token_ids, kept, labels, temperatures, indptr, indices, *inputs)
        hidden, weight = as_rows(hidden), as_rows(weight)
        if of_hidden:
            _sums(weight, indptr, None, indices, dz, grad_hidden, None, vocab, vocab)
        if of_weight or of_bias:
            token_ids, order = torch.sort(token_ids, stable=True)
            starts = torch.searchsorted(
                token_ids, torch.arange(vocab + 1, dtype=torch.int32, device=token_ids.device)
            )
            _sums(
                hidden, starts, order, _owners(indptr, entries), dz,
                grad_weight if of_weight else None, grad_bias if of_bias else None,
                grid(labels.shape)[1], tokens,
            )  # fmt: skip
    bias_dtype = bias.dtype if of_bias and bias is not None else hidden.dtype
    return found[0], found[1], found[2].to(bias_dtype)


LAUNCHERS: dict[str, Callable[..., object]] = {
    "token_logprobs_support": token_logprobs_support,
    "token_logprobs_support_backward": token_logprobs_support_backward,
    "linear_token_logprobs_support": linear_token_logprobs_support,
    "linear_token_logprobs_support_backward": linear_token_logprobs_support_backward,
}
