"""token_logprobs over a support, the list of token ids that the sampler kept for each token.

Work on entries (support_products.py) is cut into tiles of consecutive entries across token borders,
so one token with a long list costs no more than many with short lists. Work on tokens loops over
the token's entries. The bits of an entry or a token do not depend on its neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows, as_upstream, grid
from ...core.row_options import RowOptions
from .. import support
from ._launch import kernel, launch
from ._math import LOG2E, good_temperature, label_gradient, scalar, tree_sum
from ._maxima import merged
from ._rows import packed, row_temperature, with_options
from ._strided import strided, strided_rows, token_at
from .logprobs_backward import LOWEST
from .support_products import entries_of, owners, store_products, store_sums

# Entries that a token's program takes at a time. Few lists are longer, and 512 would spill
# registers.
BLOCK = 256
WARPS = 4
# Entries of indptr that are checked at a time.
CHECKED = 2048


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


@triton.jit
def tile_sums(z, rate, ENTROPY: tl.constexpr, N: tl.constexpr):
    """m = max z, sum of e = exp(rate (z - m)) and sum of e rate (z - m), over a block [N].

    z is -inf where the block has no entry.
    """
    m = tl.max(z, axis=0)
    # A block of only -inf adds 0. A NaN that the maximum ignores still reaches the sums.
    d = z - tl.where(m == float("-inf"), 0.0, m)
    e = tl.exp2(d * (rate * LOG2E))
    t = 0.0
    if ENTROPY:
        # Far from the maximum e is 0 and d may be -inf; the term is 0.
        t = tree_sum(tl.where(e == 0.0, 0.0, e * d), N) * rate
    return m, tree_sum(e, N), t


@kernel
def rows_kernel(
    logits,
    kept,
    labels,
    temperatures,
    support,
    poison,
    logprobs,
    entropies,
    stats,
    cols,
    vocab,
    row_options,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Log-probability, entropy and statistics of one token; with `logits` also its kept ones."""
    row = tl.program_id(0)
    label = tl.load(token_at(labels, row, cols)).to(tl.int64)
    logprob, entropy = 0.0, 0.0
    out_m, out_s, mean = 0.0, 1.0, 0.0
    if label != ignore_index:
        temperature = row_temperature(row_options, temperatures, row, cols)
        rate = 1.0 / scalar(temperature).to(tl.float64)
        rate32 = rate.to(tl.float32)
        indptr, indices, entries = support
        begin, count = entries_of(indptr, row, entries)
        if logits is not None:
            x = token_at(logits, row, cols)
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
            if logits is not None:
                z = tl.load(x + token_id, mask=inside & known, other=float("-inf")).to(tl.float32)
                tl.store(kept + begin + i, z, mask=inside)
            else:
                z = tl.load(kept + begin + i, mask=inside, other=float("-inf"))
            z, _ = with_options(z, row_options)
            here = inside & (token_id == label)
            found = tl.max(tl.where(here, z, float("-inf")), axis=0)
            own = tl.where(found > own, found, own)
            z = tl.where(inside, z, float("-inf"))
            tile_m, tile_s, tile_t = tile_sums(z, rate32, entropies is not None, BLOCK)
            m, s, t = merged(
                m, s, t, tile_m, tile_m, tile_s, tile_t, rate32, entropies is not None, 1
            )
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
    if entropies is not None:
        tl.store(entropies + row, entropy)
    out = stats + row.to(tl.int64) * 3
    tl.store(out, out_m)
    tl.store(out + 1, out_s)
    tl.store(out + 2, mean)


@kernel
def gradient_kernel(
    kept,
    labels,
    temperatures,
    support,
    stats,
    grad_logprobs,
    grad_entropy,
    dz,
    token_ids,
    out,
    cols,
    vocab,
    row_options,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Gradient of a token's kept logits: into a row of zeros of `out` if it is given, or into `dz`.

    Beside `dz` it stores `token_ids`: that of each entry with a gradient, `vocab` for the others.
    """
    row = tl.program_id(0)
    label = tl.load(token_at(labels, row, cols)).to(tl.int64)
    g, h = scalar(0.0), scalar(0.0)
    if grad_logprobs is not None:
        g = tl.load(token_at(grad_logprobs, row, cols))
    if grad_entropy is not None:
        h = tl.load(token_at(grad_entropy, row, cols))
    indptr, indices, entries = support
    begin, count = entries_of(indptr, row, entries)
    used = (label != ignore_index) & ((g != 0.0) | (h != 0.0))
    if used:
        temperature = row_temperature(row_options, temperatures, row, cols)
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
            if grad_entropy is not None:
                value = e * (a0 + a1 * log2_e)
            # Exactly zero, even at -inf, where e d is NaN.
            value = tl.where(d * rate32 < LOWEST, 0.0, value * slope)
            distance = (own - m).to(tl.float64) * rate
            at_label = label_gradient(distance - log_s, distance, mean, g, h) * rate * own_slope
            at_label = at_label.to(tl.float32)
            value = tl.where(here, at_label, value)
            if out is not None:
                to = out + row.to(tl.int64) * vocab + token_id
                tl.store(to, value.to(out.dtype.element_ty), mask=known)
            else:
                moves = known & (value != 0.0)
                tl.store(dz + begin + i, tl.where(moves, value, 0.0), mask=inside)
                tl.store(token_ids + begin + i, tl.where(moves, token_id, vocab), mask=inside)
    else:
        if out is None:
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                tl.store(dz + begin + i, tl.zeros((BLOCK,), tl.float32), mask=i < count)
                tl.store(
                    token_ids + begin + i, tl.zeros((BLOCK,), tl.int32) + vocab, mask=i < count
                )


def _forward(
    op: str,
    vocab: int,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: support.Tokens,
    options: RowOptions,
    logprobs: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    kept: Tensor,
) -> None:
    labels, temperatures, indptr, indices = tokens
    count, entries, (_, cols) = labels.numel(), indices.shape[0], grid(labels.shape)
    rows, of_tokens = as_rows(rows), strided(labels)
    indptr, indices = indptr.contiguous(), indices.contiguous()
    poison = logprobs.new_empty(1)
    launch(check_kernel, 1, rows, indptr, poison, count, entries, BLOCK=CHECKED, warps=WARPS)
    if weight is not None and entries:
        ignored = options.ignore_index
        store_products(rows, weight, bias, of_tokens, indptr, indices, kept, cols, ignored)
    launch(
        rows_kernel,
        count,
        rows,
        strided_rows(rows) if weight is None else None,
        kept,
        of_tokens,
        strided(temperatures, torch.float32),
        (indptr, indices, entries),
        poison,
        logprobs,
        entropies,
        stats,
        cols,
        vocab,
        packed(options),
        options.ignore_index,
        BLOCK=BLOCK,
        warps=WARPS,
    )


def _gradient(
    vocab: int,
    out: Tensor | None,
    dz: Tensor | None,
    token_ids: Tensor | None,
    given: support.Backward,
) -> None:
    """Writes the gradient into `out` (all zeros before), or per entry into dz and token_ids."""
    kept, tokens, stats, grad_logprobs, grad_entropy, options = given
    labels, temperatures, indptr, indices = tokens
    _, cols = grid(labels.shape)
    launch(
        gradient_kernel,
        labels.numel(),
        kept,
        kept,
        strided(labels),
        strided(temperatures, torch.float32),
        (indptr.contiguous(), indices.contiguous(), indices.shape[0]),
        stats,
        strided(as_upstream(grad_logprobs)),
        strided(as_upstream(grad_entropy)),
        dz,
        token_ids,
        out,
        cols,
        vocab,
        packed(options),
        options.ignore_index,
        BLOCK=BLOCK,
        warps=WARPS,
    )


def _scatter(vocab: int, out: Tensor, given: support.Backward) -> None:
    _gradient(vocab, out, None, None, given)


def _head_backward(
    gradients: support.HeadGradients,
    hidden: Tensor,
    weight: Tensor,
    given: support.Backward,
) -> None:
    vocab, (of_hidden, of_weight, of_bias) = weight.shape[0], gradients
    kept, tokens = given.kept, given.tokens
    labels, indptr, indices = tokens.labels, tokens.indptr.contiguous(), tokens.indices.contiguous()
    dz, token_ids = torch.empty_like(kept), torch.empty_like(kept, dtype=torch.int32)
    _gradient(vocab, None, dz, token_ids, given)
    if of_hidden is not None:
        store_sums(as_rows(weight), indptr, None, indices, dz, of_hidden, None, vocab, vocab)
    if of_weight is not None or of_bias is not None:
        token_ids, order = torch.sort(token_ids, stable=True)
        starts = torch.searchsorted(
            token_ids, torch.arange(vocab + 1, dtype=torch.int32, device=token_ids.device)
        )
        entries = (starts, order, owners(indptr, indices.shape[0]), dz)
        cols, tokens_in_all = grid(labels.shape)[1], labels.numel()
        store_sums(as_rows(hidden), *entries, of_weight, of_bias, cols, tokens_in_all)


LAUNCHERS: support.Launchers = support.launchers(_forward, _scatter, _head_backward, on_device=True)
