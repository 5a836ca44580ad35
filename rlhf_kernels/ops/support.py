"""Log-probabilities over the token ids that the sampler kept (`support` of public functions)."""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import reference
from ..config.enums import EMPTY_SUPPORT
from ..core import checks, data_checks, option_checks, row_options
from ..core.row_options import RowArguments, RowOptions, RowResults
from ..head.arguments import Operands
from ..kernels import backends
from ..kernels.support import Results, Tokens
from ._autograd import InputGradients, apply, once_differentiable, remember
from ._operator import define, head_gradients_fake
from .logprobs_results import TokenLogprobs, TokenLogprobsEntropy

#: (indptr [N + 1], indices [nnz]): the token ids that the sampler kept for each token.
SamplingMask = tuple[Tensor, Tensor]


def _results(like: Tensor, tokens: Tokens, options: RowOptions) -> Results:
    shape = tokens.labels.shape
    logprobs = like.new_empty(shape, dtype=torch.float32)
    return Results(
        logprobs,
        logprobs.new_empty(shape) if options.entropy else None,
        logprobs.new_empty((*shape, 3)),
        logprobs.new_empty(tokens.indices.shape),
    )


@define("token_logprobs_support")
def _forward(logits: Tensor, tokens: Tokens, options: RowOptions, backend: str) -> Results:
    return _results(logits, tokens, options)


@define("token_logprobs_support_backward")
def _backward(
    kept: Tensor,
    tokens: Tokens,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
    vocab: Annotated[int, "SymInt"],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return kept.new_empty((*tokens.labels.shape, vocab), dtype=dtype)


@define("linear_token_logprobs_support")
def _head_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tokens,
    options: RowOptions,
    backend: str,
) -> Results:
    return _results(hidden, tokens, options)


@define("linear_token_logprobs_support_backward")
def _head_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    tokens: Tokens,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_gradients_fake(Operands(hidden, weight, bias), needs)


def _check_arguments(op: str, arguments: RowArguments) -> None:
    if arguments.lse or arguments.collision or arguments.argmax:
        raise ValueError(
            f"{op}: support gives log-probabilities and entropies alone, neither lse nor collision "
            "nor argmax"
        )


def check_empty_support(op: str, value: object, support: object) -> None:
    """Requires an `empty_support` other than the default, which goes with a support alone."""
    option_checks.one_of(op, "empty_support", value, EMPTY_SUPPORT)
    if support is None:
        raise ValueError(f"{op}: empty_support={value!r} needs a support")


def support_or_whole(
    op: str,
    labels: Tensor,
    support: SamplingMask,
    ignore_index: int,
    over_kept: Callable[[Tensor], RowResults],
    over_all: Callable[[Tensor], TokenLogprobs | TokenLogprobsEntropy],
) -> TokenLogprobs | TokenLogprobsEntropy:
    """Results over each token's support, or over the whole vocabulary where that is empty.

    Args:
        op: name for errors.
        labels: [...], with `ignore_index` for tokens to skip.
        support: of all tokens.
        ignore_index: label to skip.
        over_kept: the operation over the support, for labels of which some more are skipped.
        over_all: the same over the whole vocabulary.
    """
    indptr, _ = checks.support(op, support, labels.numel(), labels.device)
    empty = (indptr[1:] == indptr[:-1]).view(labels.shape)
    of_kept = over_kept(row_options.without_masked(op, labels, ~empty, ignore_index))
    of_whole = over_all(row_options.without_masked(op, labels, empty, ignore_index))
    logprobs = torch.where(empty, of_whole.logprobs, of_kept.logprobs)
    if of_kept.entropy is None or of_whole.entropy is None:
        return TokenLogprobs(logprobs)
    return TokenLogprobsEntropy(logprobs, torch.where(empty, of_whole.entropy, of_kept.entropy))


def check_one_label(op: str, several: bool) -> None:
    """Refuses labels [..., K] beside a support."""
    if several:
        raise ValueError(
            f"{op}: support goes with one label per token, [...]; call once for each of K labels"
        )


class _TokenLogprobsSupport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        options: RowOptions,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        tokens = Tokens(labels, temperatures, indptr, indices)
        logprobs, entropies, stats, kept = _forward(logits, tokens, options, backend)
        # The logits are not saved, so their memory can be freed.
        remember(ctx, logits)
        ctx.save_for_backward(kept, *tokens, stats)
        ctx.options, ctx.backend = options, backend
        ctx.vocab, ctx.dtype = logits.shape[-1], logits.dtype
        ctx.set_materialize_grads(False)
        return (logprobs, entropies) if options.entropy else (logprobs,)

    @staticmethod
    @once_differentiable("token_logprobs")
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> InputGradients:
        nothing = (None,) * 6
        if grad_logprobs is None and grad_entropy is None:
            return (None, *nothing)
        kept, *tokens, stats = ctx.saved_tensors
        gradient = _backward(
            kept,
            Tokens(*tokens),
            stats,
            grad_logprobs,
            grad_entropy,
            ctx.options,
            ctx.vocab,
            ctx.dtype,
            ctx.backend,
        )
        return (gradient, *nothing)


class _LinearTokenLogprobsSupport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        options: RowOptions,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        tokens = Tokens(labels, temperatures, indptr, indices)
        logprobs, entropies, stats, kept = _head_forward(
            hidden, weight, bias, tokens, options, backend
        )
        remember(ctx, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, kept, *tokens, stats)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return (logprobs, entropies) if options.entropy else (logprobs,)

    @staticmethod
    @once_differentiable("linear_token_logprobs")
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> InputGradients:
        nothing = (None,) * 6
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, *nothing)
        hidden, weight, bias, kept, *tokens, stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        found = _head_backward(
            hidden,
            weight,
            bias,
            kept,
            Tokens(*tokens),
            stats,
            grad_logprobs,
            grad_entropy,
            ctx.options,
            needs,
            ctx.backend,
        )
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *nothing)


def token_logprobs_support(
    logits: Tensor, labels: Tensor, support: SamplingMask, arguments: RowArguments
) -> RowResults:
    """`token_logprobs` over a support; expects all other arguments to be checked."""
    op = "token_logprobs"
    _check_arguments(op, arguments)
    pair = checks.support(op, support, labels.numel(), labels.device)
    backend = backends.select(op, logits.device, f"{op}_support")
    if backend == backends.REFERENCE:
        keep = labels != arguments.ignore_index
        data_checks.support_data(op, labels, arguments.temperature, *pair, keep, logits.shape[-1])
        return reference.token_logprobs_support(logits, labels, *pair, **arguments.of_logits())
    checks.floating(op, "logits", logits)
    temperatures, options = arguments.split()
    tokens = (labels, temperatures, *pair)
    return RowResults(*apply(op, _TokenLogprobsSupport, logits, *tokens, options, backend))


def linear_token_logprobs_support(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    support: SamplingMask,
    arguments: RowArguments,
) -> RowResults:
    """`linear_token_logprobs` over a support; expects all other arguments to be checked."""
    op = "linear_token_logprobs"
    _check_arguments(op, arguments)
    pair = checks.support(op, support, labels.numel(), labels.device)
    backend = backends.select(op, hidden.device, f"{op}_support")
    if backend == backends.REFERENCE:
        keep, temperature = labels != arguments.ignore_index, arguments.effective_temperature()
        data_checks.support_data(op, labels, temperature, *pair, keep, weight.shape[0])
        return reference.linear_token_logprobs_support(
            hidden, weight, labels, *pair, bias=bias, **arguments.of_head()
        )
    checks.floating(op, "hidden", hidden)
    # The copy has the size of the hidden states, which is small beside logits.
    hidden = hidden.to(weight.dtype)
    temperatures, options = arguments.split()
    head, tokens = (hidden, weight, bias), (labels, temperatures, *pair)
    inputs = (*head, *tokens, options, backend)
    return RowResults(*apply(op, _LinearTokenLogprobsSupport, *inputs))
