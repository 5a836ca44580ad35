"""Shared by the native and Triton launchers of token_logprobs over a support.

A support is (indptr, indices): the token ids that the sampler kept for each token. Results `kept`
are their logits; the backward pass needs no other logits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..core import data_checks, env
from ..core.row_options import RowOptions
from . import logprobs
from .rows import Maybe

#: Memory for the gradients of (hidden, weight, bias); None where not wanted. That of the bias is
#: fp32, the others have the dtypes of their operands.
HeadGradients = Sequence[Tensor | None]


class Tokens(NamedTuple):
    """labels and temperatures (or None) of tokens [...], and their support."""

    labels: Tensor
    temperatures: Tensor | None
    indptr: Tensor
    indices: Tensor


class Backward(NamedTuple):
    """The inputs of a backward pass: what its forward pass kept, and the upstream gradients."""

    kept: Tensor
    tokens: Tokens
    stats: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    options: RowOptions


class Results(NamedTuple):
    """Results of tokens [...], fp32.

    entropy: [...], or None where the options do not ask for it.
    stats: [..., 3], what the backward pass needs.
    kept: the logits of the supports' entries, one behind the other.
    """

    logprobs: Tensor
    entropy: Tensor | None
    stats: Tensor
    kept: Tensor


class Launchers(TypedDict, total=False):
    """By operator name."""

    token_logprobs_support: Callable[[Tensor, Tokens, RowOptions], Results]
    token_logprobs_support_backward: Callable[
        [Tensor, Tokens, Tensor, Maybe, Maybe, RowOptions, int, torch.dtype], Tensor
    ]
    linear_token_logprobs_support: Callable[[Tensor, Tensor, Maybe, Tokens, RowOptions], Results]
    linear_token_logprobs_support_backward: Callable[
        [Tensor, Tensor, Maybe, Tensor, Tokens, Tensor, Maybe, Maybe, RowOptions, Sequence[bool]],
        tuple[Tensor, Tensor, Tensor],
    ]


def launchers(
    forward: Callable[
        [str, int, Tensor, Maybe, Maybe, Tokens, RowOptions, Tensor, Maybe, Tensor, Tensor], None
    ],
    scatter: Callable[[int, Tensor, Backward], None],
    head_backward: Callable[[HeadGradients, Tensor, Tensor, Backward], None],
    on_device: bool,
) -> Launchers:
    """Launchers from the functions of a backend that launch its kernels.

    `forward` takes the operation's name, the size of the vocabulary, logits or hidden, weight and
    bias or None, `Tokens` and options, and writes its last arguments: the log-probabilities, the
    entropies or None, the statistics, kept. `scatter` takes that size, and the gradient of the
    logits that it writes. `head_backward` takes the `HeadGradients` that it writes, hidden, weight.
    None is called without a token. Kernels `on_device` expect zeros where no logit was kept. The
    others write them, and validate the data themselves.
    """

    def run(
        op: str,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tokens,
        options: RowOptions,
    ) -> Results:
        found, entropies = logprobs.results(tokens.labels, options)
        stats = logprobs.statistics(found)
        kept = found.new_empty(tokens.indices.shape)
        vocab = rows.shape[-1] if weight is None else weight.shape[0]
        if found.numel() > 0:
            if on_device and env.CHECK:
                keep = tokens.labels != options.ignore_index
                data_checks.support_data(op, *tokens, keep, vocab)
            outs = (found, entropies, stats, kept)
            forward(op, vocab, rows, weight, bias, tokens, options, *outs)
        return Results(found, entropies, stats, kept)

    def token_logprobs_support(logits: Tensor, tokens: Tokens, options: RowOptions) -> Results:
        return run("token_logprobs", logits, None, None, tokens, options)

    def token_logprobs_support_backward(
        kept: Tensor,
        tokens: Tokens,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        vocab: int,
        dtype: torch.dtype,
    ) -> Tensor:
        make = torch.zeros if on_device else torch.empty
        out = make((*tokens.labels.shape, vocab), dtype=dtype, device=kept.device)
        if out.numel() > 0 and (kept.numel() > 0 or not on_device):
            rest = Backward(kept, tokens, stats, grad_logprobs, grad_entropy, options)
            scatter(vocab, out, rest)
        return out

    def linear_token_logprobs_support(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens, options: RowOptions
    ) -> Results:
        return run("linear_token_logprobs", hidden, weight, bias, tokens, options)

    def linear_token_logprobs_support_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        tokens: Tokens,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        likes = ((hidden, hidden.shape), (weight, weight.shape), (kept, weight.shape[:1]))
        gradients = [
            like.new_empty(shape) if need else None
            for (like, shape), need in zip(likes, needs, strict=True)
        ]
        if tokens.labels.numel() > 0 and kept.numel() > 0:
            rest = Backward(kept, tokens, stats, grad_logprobs, grad_entropy, options)
            head_backward(gradients, hidden, weight, rest)
        else:
            gradients = [None if t is None else t.zero_() for t in gradients]
        dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        of_hidden, of_weight, of_bias = (
            hidden.new_empty(0) if t is None else t.to(dtype)
            for t, dtype in zip(gradients, dtypes, strict=True)
        )
        return of_hidden, of_weight, of_bias

    return {
        "token_logprobs_support": token_logprobs_support,
        "token_logprobs_support_backward": token_logprobs_support_backward,
        "linear_token_logprobs_support": linear_token_logprobs_support,
        "linear_token_logprobs_support_backward": linear_token_logprobs_support_backward,
    }
