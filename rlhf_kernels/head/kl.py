"""linear_kl_divergence: the divergence of two heads chunk by chunk, and its gradient."""

import torch
from torch import Tensor

from ..kernels.rows import Kernels
from .arguments import Divergence, Operands
from .chunks import Chunk, Tile, flat, select
from .gradients import Gradients
from .products import Head


def forward(
    kernels: Kernels, operands: Operands, reference: Operands, divergence: Divergence, chunk: int
) -> tuple[Tensor, Tensor]:
    """(divergences [...], statistics [..., 5]) of the tokens of hidden [..., H]."""
    mask, temperature, reverse = divergence
    hidden, weight, _ = operands
    shape = hidden.shape[:-1]
    kl = torch.zeros(shape, dtype=torch.float32, device=hidden.device).view(-1)
    stats = kl.new_empty((*kl.shape, 5))
    tokens = select(torch.ones_like(kl, dtype=torch.bool) if mask is None else flat(mask) != 0)
    of_chunk = Chunk.of(chunk, weight, heads=2)
    head = Head.of(operands, of_chunk, tokens.count, kernels.empty)
    ref = Head.of(reference, of_chunk, tokens.count, kernels.empty)
    for part in tokens.chunks(of_chunk.size):
        logits = head.project(head.states(tokens, part))
        ref_logits = ref.project(ref.states(tokens, part))
        found, s = kernels.rows.kl_divergence(logits, ref_logits, temperature, reverse)
        tokens.put(kl, part, found)
        tokens.put(stats, part, s)
    return kl.view(shape), stats.view(*shape, 5)


def backward(
    kernels: Kernels,
    operands: Operands,
    reference: Operands,
    divergence: Divergence,
    stats: Tensor,
    grad: Tensor,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where `needs` says no."""
    mask, temperature, reverse = divergence
    grad, stats = flat(grad), stats.view(-1, 5)
    used = grad != 0
    if mask is not None:
        used &= flat(mask) != 0
    tokens = select(used)
    of_chunk = Chunk.backward(chunk, operands.weight, tokens.count, heads=2)
    head = Head.of(operands, of_chunk, tokens.count, kernels.empty)
    ref = Head.of(reference, of_chunk, tokens.count, kernels.empty)
    gradients = Gradients(head, needs)

    def overwrite(logits: Tensor, tile: Tile) -> None:
        ref_logits = ref.project(ref.states(tokens, tile.tokens), tile.columns)
        own, g = tokens.take(stats, tile.tokens), tokens.take(grad, tile.tokens)
        kernels.rows.kl_divergence_backward_inplace(
            logits, ref_logits, own, g, temperature, reverse
        )

    gradients.sweep(tokens, of_chunk, overwrite)
    return gradients.results(operands.hidden.shape)
