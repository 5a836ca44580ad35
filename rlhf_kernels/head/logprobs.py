"""linear_token_logprobs: log-probabilities and entropies chunk by chunk, and their gradients."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..core import data_checks
from ..core.layout import any_of_token
from ..core.sentinels import ELSEWHERE
from ..kernels.rows import Kernels, LabelKernels, LabelResults, LabelRows
from .arguments import Batching, Operands, Targets, Upstream
from .chunks import Chunk, Tile, Tokens, covered, flat, flat_labels, localized, select, zeros_or_nan
from .gemm import blocks
from .gradients import Gradients
from .parts import Parts, logit_of, merged
from .products import TiledHead


def of_products(
    rows: LabelRows,
    products: Iterable[tuple[int, Tensor]],
    chunk: Chunk,
    vocab: int,
    targets: Targets,
    dropped: Tensor | None,
    largest: bool = False,
) -> tuple[LabelResults, Tensor | None]:
    """Results of a chunk of tokens, and the fp32 logits of the most likely ones if `largest`.

    Args:
        rows: the row kernels.
        products: the first column and the logits [n, columns] of each product, in order; one where
            rows are reduced whole.
        chunk: how many columns of a row are reduced at a time.
        vocab: columns of all products together.
        targets: of these tokens.
        dropped: as `Tokens.dropped_of`.
    """
    labels, temperatures, options = targets
    parts = []
    for first, logits in products:
        if chunk.reduced is None or chunk.reduced >= vocab:
            found = rows.token_logprobs(logits, *targets)
            ids = found.argmax if largest else None
            return found, None if ids is None else logit_of(logits, ids)
        for columns in blocks(logits.shape[1], chunk.reduced):
            own = slice(first + columns.start, first + columns.stop)
            local, ignored = localized(labels, own, vocab, options.ignore_index, dropped)
            block, as_block = logits[:, columns], options._replace(ignore_index=ignored)
            found = rows.token_logprobs(block, local, temperatures, as_block)
            ids, of_ids = found.argmax, None
            if ids is not None:
                of_ids = logit_of(block, ids)
                ids = torch.where(ids >= 0, ids + own.start, -1)
            logprobs = torch.where(local == ELSEWHERE, torch.inf, found.logprobs)
            parts.append(Parts(found.stats, logprobs, found.collision, ids, of_ids))
    of_all = Parts.stack(parts)
    found = merged(of_all, labels != options.ignore_index, targets)
    if not largest or chunk.reduced is None or found.argmax is None or of_all.largest is None:
        return found, None
    of_block = (found.argmax // chunk.reduced).clamp(min=0).unsqueeze(0)
    return found, of_all.largest.gather(0, of_block)[0]


def of_part(
    rows: LabelRows,
    head: TiledHead,
    tokens: Tokens,
    part: slice,
    chunk: Chunk,
    targets: Targets,
    largest: bool = False,
) -> tuple[LabelResults, Tensor | None]:
    """As `of_products`, of some of all tokens, to which the targets belong, flat."""
    vocab = head.weight.shape[0]
    states = head.states(tokens, part)
    # Once where a shard has no columns.
    starts = range(0, max(vocab, 1), chunk.columns)
    products = ((t, head.project(states, slice(t, min(t + chunk.columns, vocab)))) for t in starts)
    own = tokens.take(targets.labels, part), tokens.take(targets.temperatures, part)
    targets = Targets(*own, targets.options)
    dropped = tokens.dropped_of(part)
    return of_products(rows, products, chunk, vocab, targets, dropped, largest)


def forward(
    kernels: Kernels | LabelKernels,
    operands: Operands,
    targets: Targets,
    batching: Batching,
    largest: Tensor | None = None,
) -> LabelResults:
    """The results for the labels, whose logits are computed chunk by chunk.

    Args:
        kernels, operands, targets, batching: as the operator's.
        largest: fp32 [N] of all tokens, -inf; receives the logit of each most likely token. None
            where it is not wanted.
    """
    op, weight, options = "linear_token_logprobs", operands.weight, targets.options
    shape, dims = targets.labels.shape, operands.hidden.dim() - 1
    labels, temperatures = flat_labels(targets.labels, dims), flat(targets.temperatures)
    wanted = labels != options.ignore_index
    # The labels of a shard were found good before.
    if kernels.reduce is None:
        data_checks.token_data(op, labels, temperatures, wanted, weight.shape[0])
    keep = any_of_token(wanted, 1)
    data_checks.kept_tokens(op, keep, batching.kept)
    tokens = select(keep, batching.kept)
    several = labels.shape[1] if labels.dim() > 1 else 1
    of_chunk = Chunk.forward(batching, weight, tokens.count, labels=several)
    head = TiledHead.of(operands, of_chunk, tokens.count, kernels.memory)
    shared = (of_chunk, Targets(labels, temperatures, options), largest is not None)
    if tokens.fill(of_chunk):
        found, logits = of_part(kernels.rows, head, tokens, tokens.whole, *shared)
        if largest is not None and logits is not None:
            largest.copy_(logits)
        return _shaped(shape, dims, found)
    empty = zeros_or_nan(keep, batching.kept)
    logprobs = empty
    if labels.dim() > 1:
        logprobs = empty.unsqueeze(-1).repeat(1, labels.shape[1]).masked_fill_(~wanted, 0)
    entropies = empty.clone() if options.entropy else None
    # Of a token without a product as well: a log-sum-exp is computed from them.
    stats = empty.unsqueeze(-1).repeat(1, 3)
    collisions = empty.clone() if options.collision else None
    ids = empty.new_full(empty.shape, -1, dtype=torch.int64) if options.argmax else None
    results = LabelResults(logprobs, entropies, stats, collisions, ids)
    for part in tokens.chunks(of_chunk.size):
        found, logits = of_part(kernels.rows, head, tokens, part, *shared)
        for of_all, own in zip(results, found, strict=True):
            if of_all is not None and own is not None:
                tokens.put(of_all, part, own)
        if largest is not None and logits is not None:
            tokens.put(largest, part, logits)
    return _shaped(shape, dims, results)


def _shaped(shape: torch.Size, dims: int, flat: LabelResults) -> LabelResults:
    """Results of flat tokens in the shape of the labels, of which the first `dims` are tokens'."""
    tokens = shape[:dims]
    entropy, collision, argmax = (
        None if t is None else t.view(tokens) for t in (flat.entropy, flat.collision, flat.argmax)
    )
    stats = flat.stats.view(*tokens, 3)
    return LabelResults(flat.logprobs.view(shape), entropy, stats, collision, argmax)


def backward(
    kernels: Kernels | LabelKernels,
    operands: Operands,
    targets: Targets,
    upstream: Upstream,
    batching: Batching,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where `needs` says no."""
    weight, options = operands.weight, targets.options
    dims = operands.hidden.dim() - 1
    labels, temperatures = flat_labels(targets.labels, dims), flat(targets.temperatures)
    stats, collision, *given = upstream
    stats, collision = stats.view(-1, 3), flat(collision)
    given = [flat_labels(t, dims) for t in given]
    wanted = labels != options.ignore_index
    keep = any_of_token(wanted, 1)
    if batching.kept is None:
        # A token without an upstream gradient adds nothing: clipped, no advantage, prompt, tool.
        used = [t != 0 for t in given if t is not None]
        used = [t if t.dim() == 1 else (t & wanted).any(-1) for t in used]
        keep &= functools.reduce(torch.logical_or, used)
    elif (enough := covered(keep, batching.kept)) is not None:
        given = [None if t is None else torch.where(enough, t, torch.nan) for t in given]
    tokens = select(keep, batching.kept)
    several = labels.shape[1] if labels.dim() > 1 else 1
    of_chunk = Chunk.backward(batching, weight, tokens, labels=several)
    head = TiledHead.of(operands, of_chunk, tokens.count, kernels.memory)
    gradients = Gradients(head, needs, kernels.reduce)

    def backward(out: Tensor, logits: Tensor, tile: Tile) -> None:
        part = tile.tokens
        own, ignored = localized(
            tokens.take(labels, part),
            tile.columns,
            weight.shape[0],
            options.ignore_index,
            tokens.dropped_of(part),
        )
        g, h, *further = (tokens.take(t, part) for t in (*given, collision))
        kernels.rows.token_logprobs_backward_into(
            out, logits, own, tokens.take(temperatures, part), tokens.take(stats, part),
            g, h, options._replace(ignore_index=ignored), *further,
        )  # fmt: skip

    gradients.sweep(tokens, of_chunk, backward)
    return gradients.results(operands.hidden.shape)
