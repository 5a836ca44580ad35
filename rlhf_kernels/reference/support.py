"""Log-probabilities over the token ids that the sampler kept, defined."""

from typing import Any

import torch
from torch import Tensor

from ._common import compute, with_options
from .head import head_logits
from .logprobs import token_logprobs


def support_mask(indptr: Tensor, indices: Tensor, keep: Tensor, vocab: int) -> Tensor:
    """Whether a token id is in each token's support, bool [..., V]; a dropped token's is not read.

    Args:
        indptr: [N + 1].
        indices: [nnz].
        keep: bool [...], N of them.
        vocab: V.
    """
    mask = torch.zeros(keep.numel() + 1, vocab, dtype=torch.bool, device=keep.device)
    entry = torch.arange(indices.shape[0], device=keep.device)
    token = torch.searchsorted(indptr[1:].long().contiguous(), entry, right=True)
    # Entries of dropped tokens go to a row of their own.
    used = torch.cat([keep.reshape(-1), keep.new_zeros(1)])[token]
    token, index = torch.where(used, token, keep.numel()), torch.where(used, indices, 0)
    mask[token, index.long()] = True
    return mask[:-1].view(*keep.shape, vocab)


def token_logprobs_support(
    logits: Tensor,
    labels: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` with every logit outside the token's support at -inf.

    Args:
        logits: [..., V].
        labels: [...], integers in [0, V) or `ignore_index`; N of them.
        indptr: [N + 1]; those of token n, in row-major order, are indices[indptr[n]:indptr[n + 1]].
        indices: [nnz].
        temperature: as in `token_logprobs`.
        entropy: also return the entropy over the support.
        ignore_index: as in `token_logprobs`.
        options: those of `with_options`.

    Returns:
        (logprobs [...], entropy [...] or None).
    """
    mask = support_mask(indptr, indices, labels != ignore_index, logits.shape[-1])
    # Before the options too: what lies outside must reach neither value nor gradient.
    z = with_options(torch.where(mask, compute(logits), 0), **options)
    return token_logprobs(
        torch.where(mask, z, -torch.inf),
        labels,
        temperature=temperature,
        entropy=entropy,
        ignore_index=ignore_index,
    )


def linear_token_logprobs_support(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs_support` of the head's logits, with its options."""
    keep = (labels != ignore_index).unsqueeze(-1)
    return token_logprobs_support(
        head_logits(torch.where(keep, hidden, 0), weight, bias, logit_scale),
        labels,
        indptr,
        indices,
        ignore_index=ignore_index,
        **options,
    )
