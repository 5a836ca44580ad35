"""linear_kl_divergence: the divergence of two heads chunk by chunk, and its gradient."""

import torch
from torch import Tensor

from ..core import data_checks
from ..kernels.rows import Kernels
from .arguments import Batching, Divergence, Operands
from .chunks import Chunk, Tile, covered, flat, select, zeros_or_nan
from .gradients import Gradients
from .products import TiledHead


def forward(
    kernels: Kernels,
    operands: Operands,
    reference: Operands,
    divergence: Divergence,
    batching: Batching,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of hidden [..., H]: divergences [...], statistics [..., 5], entropies [...] if wanted."""
    mask, options = divergence
    shape, device = operands.hidden.shape[:-1], operands.hidden.device
    keep = (
        torch.ones(shape.numel(), dtype=torch.bool, device=device)
        if mask is None
        else flat(mask) != 0
    )
    data_checks.kept_tokens("linear_kl_divergence", keep, batching.kept)
    tokens = select(keep, batching.kept)
    of_chunk = Chunk.of(batching, operands.weight, heads=2)
    head = TiledHead.of(operands, of_chunk, tokens.count, kernels.memory)
    ref = TiledHead.of(reference, of_chunk, tokens.count, kernels.memory)
    if tokens.fill(of_chunk):
        logits = head.project(head.states(tokens, tokens.whole))
        ref_logits = ref.project(ref.states(tokens, tokens.whole))
        kl, stats, entropies = kernels.rows.kl_divergence(logits, ref_logits, options)
        if entropies is not None:
            entropies = tokens.of_kept(entropies, tokens.whole).view(shape)
        return tokens.of_kept(kl, tokens.whole).view(shape), stats.view(*shape, 5), entropies
    kl = zeros_or_nan(keep, batching.kept)
    entropies = kl.clone() if options.entropy else None
    stats = kl.new_empty((*kl.shape, 5))
    for part in tokens.chunks(of_chunk.size):
        logits = head.project(head.states(tokens, part))
        ref_logits = ref.project(ref.states(tokens, part))
        found, s, h = kernels.rows.kl_divergence(logits, ref_logits, options)
        tokens.put(kl, part, tokens.of_kept(found, part))
        tokens.put(stats, part, s)
        if entropies is not None and h is not None:
            tokens.put(entropies, part, tokens.of_kept(h, part))
    of_policy = None if entropies is None else entropies.view(shape)
    return kl.view(shape), stats.view(*shape, 5), of_policy


def backward(
    kernels: Kernels,
    operands: Operands,
    reference: Operands,
    divergence: Divergence,
    stats: Tensor,
    grad: Tensor,
    batching: Batching,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where `needs` says no."""
    mask, options = divergence
    grad, stats = flat(grad), stats.view(-1, 5)
    if batching.kept is None:
        keep = grad != 0
        if mask is not None:
            keep &= flat(mask) != 0
    else:
        keep = torch.ones_like(grad, dtype=torch.bool) if mask is None else flat(mask) != 0
        if (enough := covered(keep, batching.kept)) is not None:
            grad = torch.where(enough, grad, torch.nan)
    tokens = select(keep, batching.kept)
    of_chunk = Chunk.backward(batching, operands.weight, tokens, heads=2)
    head = TiledHead.of(operands, of_chunk, tokens.count, kernels.memory)
    ref = TiledHead.of(reference, of_chunk, tokens.count, kernels.memory)
    gradients = Gradients(head, needs)

    def backward(out: Tensor, logits: Tensor, tile: Tile) -> None:
        part = tile.tokens
        ref_logits = ref.project(ref.states(tokens, part), tile.columns)
        own, g = tokens.take(stats, part), tokens.of_kept(tokens.take(grad, part), part)
        kernels.rows.kl_divergence_backward_into(out, logits, ref_logits, own, g, options)

    gradients.sweep(tokens, of_chunk, backward)
    return gradients.results(operands.hidden.shape)
