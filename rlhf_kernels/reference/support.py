"""Reference of log-probabilities over the token ids that the sampler kept."""

from typing import Any

import torch
from torch import Tensor

from ..core.row_options import RowResults
from ._common import compute, with_options
from .head import head_logits
from .logprobs import token_logprobs


def support_mask(indptr: Tensor, indices: Tensor, keep: Tensor, vocab: int) -> Tensor:
    """The sampling mask, bool [..., V]: True for the token ids in each token's support.

    Args:
        indptr: [N + 1].
        indices: [nnz].
        keep: bool [...] of N tokens; the entries of a dropped token are not read.
        vocab: V.
    """
    mask = torch.zeros(keep.numel() + 1, vocab, dtype=torch.bool, device=keep.device)
    entry = torch.arange(indices.shape[0], device=keep.device)
    token = torch.searchsorted(indptr[1:].long().contiguous(), entry, right=True)
    # Entries of dropped tokens go to an extra last row.
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
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    **options: Any,
) -> RowResults:
    """`token_logprobs` with every logit outside the token's support at -inf.

    Args:
        logits: [..., V].
        labels: [...], integers in [0, V) or `ignore_index`, of N tokens in row-major order.
        indptr: [N + 1]; the support of token n is indices[indptr[n]:indptr[n + 1]].
        indices: [nnz], token ids.
        temperature: as in `token_logprobs`.
        entropy: also return the entropy over the support.
        ignore_index: as in `token_logprobs`.
        lse: also return the log-sum-exp over the support.
        collision: also return the sum of the squared probabilities.
        argmax: also return the most likely token.
        options: those of `with_options`.
    """
    mask = support_mask(indptr, indices, labels != ignore_index, logits.shape[-1])
    # Masked before the options too: NaN outside the support must reach no value or gradient.
    z = with_options(torch.where(mask, compute(logits), 0), **options)
    return token_logprobs(
        torch.where(mask, z, -torch.inf),
        labels,
        temperature=temperature,
        entropy=entropy,
        ignore_index=ignore_index,
        lse=lse,
        collision=collision,
        argmax=argmax,
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
) -> RowResults:
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
