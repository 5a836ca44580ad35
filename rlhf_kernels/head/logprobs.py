"""linear_token_logprobs: log-probabilities and entropies chunk by chunk, and their gradients."""

import functools

import torch
from torch import Tensor

from ..core import data_checks
from ..core.layout import any_of_token
from ..kernels.rows import Kernels, LabelKernels, LabelResults
from .arguments import Batching, Operands, Targets, Upstream
from .chunks import Chunk, Tile, covered, flat, flat_labels, localized, select, zeros_or_nan
from .gradients import Gradients
from .products import TiledHead


def logit_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The logit of each id [...], fp32, from logits [..., V]; -inf for a negative id or V = 0."""
    if logits.shape[-1] == 0:
        return torch.full(ids.shape, -torch.inf, device=ids.device)
    found = logits.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ids < 0, -torch.inf, found.float())


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
    of_chunk = Chunk.of(batching, weight)
    head = TiledHead.of(operands, of_chunk, tokens.count, kernels.memory)
    if tokens.fill(of_chunk):
        logits = head.project(head.states(tokens, tokens.whole))
        found = kernels.rows.token_logprobs(logits, labels, temperatures, options)
        if largest is not None and found.argmax is not None:
            largest.copy_(logit_of(logits, found.argmax))
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
        logits = head.project(head.states(tokens, part))
        own = tokens.take(labels, part), tokens.take(temperatures, part)
        found = kernels.rows.token_logprobs(logits, *own, options)
        for whole, of_part in zip(results, found, strict=True):
            if whole is not None and of_part is not None:
                tokens.put(whole, part, of_part)
        if largest is not None and found.argmax is not None:
            tokens.put(largest, part, logit_of(logits, found.argmax))
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
    of_chunk = Chunk.backward(batching, weight, tokens)
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
