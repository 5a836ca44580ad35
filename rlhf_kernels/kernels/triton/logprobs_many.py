"""token_logprobs with several labels per token, beside the kernels of rows without a label.

One kernel reads the labels' logits, another writes their gradients; a program takes a row.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...core import sentinels
from ...core.layout import as_rows
from ...core.row_options import RowOptions
from ..logprobs import ManyLabels
from ._launch import kernel, launch
from ._math import good_temperature, label_gradient, scalar
from ._maxima import combine_parts
from ._rows import packed, row_temperature, with_options
from ._strided import Strided, strided_rows, token_at

SHARD_IGNORED = tl.constexpr(sentinels.SHARD_IGNORED)
# Labels that a program takes at a time.
BLOCK = 128


@triton.jit
def labels_of(labels, row, cols, k, count, vocab, ignore_index):
    """(labels k of a row, which of them have a column here), of `count`."""
    y = tl.load(token_at(labels, row, cols) + k, mask=k < count, other=0).to(tl.int64)
    return y, (k < count) & (y != ignore_index) & (y >= 0) & (y < vocab)


@kernel
def labels_kernel(
    logits,
    tokens,
    temperatures,
    partials,
    stats,
    labels,
    out,
    cols,
    parts,
    vocab,
    count,
    row_options,
    ignore_index,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The log-probability of each label of one row from the row's parts, in fp64."""
    row = tl.program_id(0)
    to = out + row.to(tl.int64) * count
    if tl.load(token_at(tokens, row, cols)) == SHARD_IGNORED:
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            tl.store(to + k, tl.zeros((BLOCK,), tl.float32), mask=k < count)
    else:
        temperature = row_temperature(row_options, temperatures, row, cols)
        rate = 1.0 / scalar(temperature).to(tl.float64)
        of_row = partials + row.to(tl.int64) * parts * 3
        m, s, _unused = combine_parts(of_row, parts, rate.to(tl.float32), False, GROUP)
        log_s = tl.log(s)
        # A row that is poisoned has poisoned statistics.
        own_s = tl.load(stats + row.to(tl.int64) * 3 + 1)
        poison = tl.where((own_s == own_s) & good_temperature(temperature), 0.0, float("nan"))
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            y, known = labels_of(labels, row, cols, k, count, vocab, ignore_index)
            z = tl.load(token_at(logits, row, cols) + y, mask=known, other=0.0).to(tl.float32)
            z, _ = with_options(z, row_options)
            logprob = ((z - m).to(tl.float64) * rate - log_s).to(tl.float32) + poison
            logprob = tl.where(known, logprob, float("nan"))
            tl.store(to + k, tl.where(y == ignore_index, 0.0, logprob), mask=k < count)


@kernel
def label_gradients_kernel(
    logits,
    tokens,
    temperatures,
    stats,
    grad_logprobs,
    grad_entropy,
    grad_lse,
    grad_collision,
    collisions,
    labels,
    grad_of_labels,
    out,
    cols,
    vocab,
    count,
    row_options,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """The gradient at each label's column of one row: upstream gradients of equal labels add up."""
    row = tl.program_id(0)
    if tl.load(token_at(tokens, row, cols)) != SHARD_IGNORED:
        of_row = row.to(tl.int64)
        zero = tl.full((), 0.0, tl.float32)
        total, h, of_lse, of_collision, collision = zero, zero, zero, zero, zero.to(tl.float64)
        if grad_logprobs is not None:
            total = tl.load(token_at(grad_logprobs, row, cols))
        if grad_entropy is not None:
            h = tl.load(token_at(grad_entropy, row, cols))
        if grad_lse is not None:
            of_lse = tl.load(token_at(grad_lse, row, cols))
        if grad_collision is not None:
            of_collision = tl.load(token_at(grad_collision, row, cols))
            collision = tl.load(collisions + of_row).to(tl.float64)
        # Truths of a block are compared in the block: the interpreter spreads none over it.
        idle = (total == 0.0) & (h == 0.0) & (of_lse == 0.0) & (of_collision == 0.0)
        busy = tl.zeros((BLOCK,), tl.float32) + tl.where(idle, 0.0, 1.0)
        h_of_each = tl.zeros((BLOCK,), tl.float32) + h
        rate = 1.0 / scalar(row_temperature(row_options, temperatures, row, cols)).to(tl.float64)
        m = tl.load(stats + of_row * 3)
        s = tl.load(stats + of_row * 3 + 1).to(tl.float64)
        mean = tl.load(stats + of_row * 3 + 2).to(tl.float64)
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            y, known = labels_of(labels, row, cols, k, count, vocab, ignore_index)
            g = tl.zeros((BLOCK,), tl.float64)
            if grad_of_labels is not None:
                for other in range(0, count):
                    same = tl.load(token_at(labels, row, cols) + other).to(tl.int64) == y
                    more = tl.load(token_at(grad_of_labels, row, cols) + other).to(tl.float64)
                    g = tl.where(same, g + more, g)
            z = tl.load(token_at(logits, row, cols) + y, mask=known, other=0.0).to(tl.float32)
            z, slope = with_options(z, row_options)
            distance = (z - m).to(tl.float64) * rate
            logprob = distance - tl.log(s)
            own = label_gradient(logprob, distance, mean, g, h_of_each) * rate * slope
            p = tl.exp(logprob)
            if grad_lse is not None:
                own += of_lse * p * rate * slope
            if grad_collision is not None:
                further = 2.0 * of_collision * p * (p - collision) * rate * slope
                own += tl.where(of_collision == 0.0, 0.0, further)
            rest = total.to(tl.float64) - g
            own = tl.where(rest == 0.0, own, own - rest * p * rate * slope)
            own = tl.where((g == 0.0) & (busy == 0.0), 0.0, own)
            tl.store(out + of_row * count + k, own.to(tl.float32), mask=known)


@kernel
def scatter_kernel(
    tokens, labels, at_labels, out, cols, vocab, count, ignore_index, BLOCK: tl.constexpr
):
    """Writes the gradients of one row to its labels' columns; equal labels have the same."""
    row = tl.program_id(0)
    if tl.load(token_at(tokens, row, cols)) != SHARD_IGNORED:
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            y, known = labels_of(labels, row, cols, k, count, vocab, ignore_index)
            dz = tl.load(at_labels + row.to(tl.int64) * count + k, mask=known, other=0.0)
            to = token_at(out, row, cols) + y
            tl.store(to, dz.to(to.dtype.element_ty), mask=known)


def forward(
    many: ManyLabels,
    x: Strided,
    tokens: tuple[Strided, Strided | None],
    partials: Tensor,
    stats: Tensor,
    cols: int,
    options: RowOptions,
    group: int,
) -> None:
    """Writes the log-probabilities of all labels.

    Args:
        many: the labels, and where their log-probabilities go.
        x: logits as a kernel takes them.
        tokens: a label of each token, and temperatures, as a kernel takes them.
        partials: fp32, three values for each part of a row.
        stats: of the whole rows, fp32 [..., cols, 3].
        cols: tokens of a row.
        options: of the rows.
        group: parts that are loaded together.
    """
    assert many.logprobs is not None
    programs = stats.numel() // 3
    launch(
        labels_kernel,
        programs,
        stats,
        x,
        *tokens,
        partials,
        stats,
        strided_rows(as_rows(many.labels)),
        many.logprobs,
        cols,
        partials.numel() // 3 // max(programs, 1),
        x[0].shape[-1],
        many.labels.shape[-1],
        packed(options),
        many.ignore_index,
        GROUP=group,
        BLOCK=BLOCK,
        warps=1,
    )


def gradients(
    many: ManyLabels, x: Strided, of_row: tuple[Any, ...], cols: int, options: RowOptions
) -> Tensor:
    """The gradient at each label's column, fp32 [..., K].

    Args:
        many: the labels and their upstream gradients.
        x, cols, options: as of `forward`.
        of_row: as a kernel takes them: a label of each token, temperatures, statistics, the
            upstream gradients of log-probabilities (their sum), entropies, log-sum-exps and sums of
            squared probabilities, and the last sums.
    """
    stats: Tensor = of_row[2]
    given = many.grad_logprobs
    out = stats.new_empty(many.labels.shape)
    launch(
        label_gradients_kernel,
        stats.numel() // 3,
        stats,
        x,
        *of_row,
        strided_rows(as_rows(many.labels)),
        None if given is None else strided_rows(as_rows(given)),
        out,
        cols,
        x[0].shape[-1],
        many.labels.shape[-1],
        packed(options),
        many.ignore_index,
        BLOCK=BLOCK,
        warps=4,
    )
    return out


def scatter(
    many: ManyLabels, at_labels: Tensor, out: Strided, tokens: Strided, cols: int, vocab: int
) -> None:
    """Writes what `gradients` found to the labels' columns of `out`, as a kernel takes it."""
    launch(
        scatter_kernel,
        at_labels.numel() // many.labels.shape[-1],
        at_labels,
        tokens,
        strided_rows(as_rows(many.labels)),
        at_labels,
        out,
        cols,
        vocab,
        many.labels.shape[-1],
        many.ignore_index,
        BLOCK=BLOCK,
        warps=4,
    )
