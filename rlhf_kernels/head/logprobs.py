"""linear_token_logprobs: log-probabilities and entropies chunk by chunk, and their gradients."""

import functools

import torch
from torch import Tensor

from ..core import checks
from ..kernels.rows import Kernels, LabelKernels
from .arguments import Batching, Operands, Targets, Upstream
from .chunks import Chunk, Tile, covered, flat, localized, select, zeros_or_nan
from .gradients import Gradients
from .products import Head


def forward(
    kernels: Kernels | LabelKernels, operands: Operands, targets: Targets, batching: Batching
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log-probabilities [...], entropies [...] if wanted, statistics [..., 3]) of labels [...]."""
    op, weight, options = "linear_token_logprobs", operands.weight, targets.options
    shape, labels = targets.labels.shape, flat(targets.labels)
    temperatures = flat(targets.temperatures)
    keep = labels != options.ignore_index
    # The labels of a shard were found good before.
    if kernels.reduce is None:
        checks.token_data(op, labels, temperatures, keep, weight.shape[0])
    checks.kept_tokens(op, keep, batching.kept_tokens)
    tokens = select(keep, batching.kept_tokens)
    of_chunk = Chunk.of(batching.chunk_tokens, weight)
    head = Head.of(operands, of_chunk, tokens.count, kernels.empty)
    if tokens.fill(of_chunk):
        logits = head.project(head.states(tokens, tokens.whole))
        logprobs, entropies, stats = kernels.rows.token_logprobs(
            logits, labels, temperatures, options
        )
        return (
            logprobs.view(shape),
            None if entropies is None else entropies.view(shape),
            stats.view(*shape, 3),
        )
    logprobs = zeros_or_nan(keep, batching.kept_tokens)
    entropies = logprobs.clone() if options.entropy else None
    # Of a token without a product as well: a log-sum-exp is computed from them.
    stats = logprobs.unsqueeze(-1).repeat(1, 3)
    for part in tokens.chunks(of_chunk.size):
        logits = head.project(head.states(tokens, part))
        own = tokens.take(labels, part), tokens.take(temperatures, part)
        lp, h, s = kernels.rows.token_logprobs(logits, *own, options)
        tokens.put(logprobs, part, lp)
        tokens.put(stats, part, s)
        if entropies is not None and h is not None:
            tokens.put(entropies, part, h)
    return (
        logprobs.view(shape),
        None if entropies is None else entropies.view(shape),
        stats.view(*shape, 3),
    )


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
    labels, temperatures = flat(targets.labels), flat(targets.temperatures)
    stats, *given = upstream
    g, h, of_lse = (flat(t) for t in given)
    stats = stats.view(-1, 3)
    keep = labels != options.ignore_index
    if batching.kept_tokens < 0:
        # A token without an upstream gradient adds nothing: clipped, no advantage, prompt, tool.
        used = [t != 0 for t in (g, h, of_lse) if t is not None]
        keep &= functools.reduce(torch.logical_or, used)
    elif (enough := covered(keep, batching.kept_tokens)) is not None:
        g, h, of_lse = (
            None if t is None else torch.where(enough, t, torch.nan) for t in (g, h, of_lse)
        )
    tokens = select(keep, batching.kept_tokens)
    of_chunk = Chunk.backward(batching.chunk_tokens, weight, tokens.count)
    head = Head.of(operands, of_chunk, tokens.count, kernels.empty)
    gradients = Gradients(head, needs, kernels.reduce)

    def backward(out: Tensor, logits: Tensor, tile: Tile) -> None:
        part = tile.tokens
        own, ignored = localized(
            tokens.take(labels, part), tile.columns, weight.shape[0], options.ignore_index
        )
        kernels.rows.token_logprobs_backward_into(
            out, logits, own, tokens.take(temperatures, part), tokens.take(stats, part),
            tokens.take(g, part), tokens.take(h, part), options._replace(ignore_index=ignored),
            tokens.take(of_lse, part),
        )  # fmt: skip

    gradients.sweep(tokens, of_chunk, backward)
    return gradients.results(operands.hidden.shape)
