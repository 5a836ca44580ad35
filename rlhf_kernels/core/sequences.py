"""Sums over the tokens of a sequence, and the weight of a token in a loss."""

from typing import Any

import torch
from torch import Tensor


def sequence_sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum of each sequence, in float64: [B] of padded [B, T], [S] of packed [N].

    A sequential float32 sum of thousands of tokens would lose three digits. The order of the sum is
    fixed, on a GPU too.
    """
    x = x.double()
    return x.sum(-1) if cu_seqlens is None else _PackedSums.apply(x, cu_seqlens)


class _PackedSums(torch.autograd.Function):
    """`torch.segment_reduce`, which has no second derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        # Clamped, so that unvalidated bad offsets never index out of bounds.
        offsets = cu_seqlens.long().clamp(0, x.shape[0])
        return torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cu_seqlens = inputs
        ctx.save_for_backward(sequence_ids(x, cu_seqlens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return grad[ids], None


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's sequence sum: [B, 1] for padded [B, T], [N] for packed [N]."""
    sums = sequence_sums(x, cu_seqlens).to(x.dtype)
    return sums.unsqueeze(-1) if cu_seqlens is None else sums[sequence_ids(x, cu_seqlens)]


def sequence_ids(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence of each packed token of x [N]."""
    tokens = torch.arange(x.shape[0], device=x.device)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    # Clamped, so that unvalidated offsets that end too early never index out of bounds.
    return ids.clamp(max=cu_seqlens.shape[0] - 2)


def spread(x: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One value per sequence, [B] or [S], for each of its tokens, in the shape of `tokens`."""
    if cu_seqlens is None:
        return x.unsqueeze(-1).expand_as(tokens)
    return x[sequence_ids(tokens, cu_seqlens)]


def per_token(x: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x unchanged if it has the shape of tokens; else one value per sequence, expanded to it.

    For arguments that a caller may give either way. Packed, with as many sequences as tokens, x has
    one value per token.
    """
    return x if x.shape == tokens.shape else spread(x, tokens, cu_seqlens)


def loss_weights(weights: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The caller's weight of each token's term, in the shape of the mask, in fp32 or fp64.

    NaN where it is negative or not finite; 0 where the bool mask is false.
    """
    own = per_token(weights, mask, cu_seqlens)
    own = own if own.dtype is torch.float64 else own.float()
    own = torch.where((own >= 0) & (own < torch.inf), own, torch.nan)
    return torch.where(mask, own, 0)


def token_weights(
    mask: Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Weights c_t such that loss = sum over the mask of c_t * term_t; they broadcast to the mask.

    Args:
        mask: bool, [B, T] or packed [N].
        aggregation: see PolicyLossConfig.
        normalizer: the divisor, or None for the number of unmasked tokens or sequences.
        dtype: of the result.
        cu_seqlens: offsets of packed sequences.
    """
    kept = mask.to(dtype)
    length = sequence_sum(kept, cu_seqlens).clamp(min=1)
    if normalizer is None:
        # Each sequence counts once: 1 / length summed over its tokens.
        count = kept if aggregation == "token-mean" else torch.where(mask, 1 / length, 0)
        normalizer = count.sum().round().clamp(min=1)
    weight = torch.ones_like(length) / normalizer
    return weight / length if aggregation == "seq-mean-token-mean" else weight
