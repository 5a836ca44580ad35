"""token_logprobs: log-probability, entropy and more of tokens from their logits."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..config.enums import EmptySupport
from ..core import checks, groups, layout, option_checks, row_options, tracing
from ..core.option_checks import shown
from ..core.row_options import RowArguments, RowOptions
from ..core.sentinels import SHARD_IGNORED
from ..head import shard
from ..kernels import backends
from ..kernels.rows import LabelResults
from ._autograd import InputGradients, apply, once_differentiable, remember
from ._operator import define
from .logprobs_results import (
    TokenLogprobs,
    TokenLogprobsEntropy,
    asked_for,
    by_name,
    named_result,
    named_results,
)
from .support import (
    SamplingMask,
    check_empty_support,
    check_one_label,
    support_or_whole,
    token_logprobs_support,
)


def _check_inplace(logits: Tensor) -> None:
    op = "token_logprobs"
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: inplace_backward is not supported under torch.compile")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            f"{op}: inplace_backward would overwrite a leaf tensor; logits must be the result of "
            "an operation"
        )
    lead = tuple(logits.shape[:-2]), logits.stride()[:-2]
    bad = logits.is_neg() or logits.stride(-1) != 1 or 0 in logits.stride()
    if bad or layout.row_stride(*lead) is None:
        raise ValueError(
            f"{op}: inplace_backward needs logits whose elements do not share memory, whose last "
            "stride is 1 and whose leading dimensions form rows of one stride, got strides "
            f"{logits.stride()}"
        )


def _results(logits: Tensor, labels: Tensor, options: RowOptions) -> LabelResults:
    shape = logits.shape[:-1]
    return LabelResults(
        logits.new_empty(labels.shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float32) if options.entropy else None,
        logits.new_empty((*shape, 3), dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float32) if options.collision else None,
        logits.new_empty(shape, dtype=torch.int64) if options.argmax else None,
    )


@define("token_logprobs")
def _forward(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    options: RowOptions,
    grad: bool,
    backend: str,
) -> LabelResults:
    """A backend on the CPU leaves out the statistics if no gradient follows."""
    results = _results(logits, labels, options)
    return results if grad or backends.get(backend).gpu else results._replace(stats=None)


@define("sharded_token_logprobs", shard.token_logprobs)
def _sharded_forward(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    options: RowOptions,
    group: str,
    backend: str,
) -> shard.ShardResults:
    """With the labels as columns of this shard the usual backward applies."""
    local = labels.new_empty(labels.shape, dtype=torch.int64)
    return shard.ShardResults(*_results(logits, labels, options), local)


@define("token_logprobs_backward")
def _backward(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
    grad_lse: Tensor | None,
    grad_collision: Tensor | None,
    collisions: Tensor | None,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@define("token_logprobs_backward_inplace", mutates="logits")
def _backward_inplace(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
    grad_lse: Tensor | None,
    grad_collision: Tensor | None,
    collisions: Tensor | None,
    backend: str,
) -> None:
    return None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        inplace_backward: bool,
        group: str,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        args = (logits, labels, temperatures, options)
        if group:
            found = _sharded_forward(*args, group, backend)
            results, labels = found.rows, found.local
            options = options._replace(ignore_index=SHARD_IGNORED)
        else:
            results = _forward(*args, True, backend)
        ctx.set_materialize_grads(False)
        remember(ctx, logits)
        # Traced, what is not wanted is an empty tensor.
        collision = results.collision if options.collision else None
        ctx.save_for_backward(logits, labels, temperatures, results.stats, collision)
        if options.argmax:
            ctx.mark_non_differentiable(results.argmax)
        ctx.options, ctx.backend = options, backend
        ctx.inplace = inplace_backward
        return asked_for(options, labels, temperatures, results)

    @staticmethod
    @once_differentiable("token_logprobs")
    def backward(ctx: Any, *gradients: Tensor | None) -> InputGradients:
        nothing = (None,) * 6
        if all(g is None for g in gradients):
            return (None, *nothing)
        logits, labels, temperatures, stats, collisions = ctx.saved_tensors
        g = by_name(ctx.options, gradients)
        args = (
            labels, temperatures, stats, g.logprobs, g.entropy, ctx.options, g.lse, g.collision,
            collisions, ctx.backend,
        )  # fmt: skip
        if not ctx.inplace:
            return (_backward(logits, *args), *nothing)
        memory = logits.detach()
        _backward_inplace(memory, *args)
        # Autograd does not see this write; the new version makes other uses of these logits raise.
        torch.autograd.graph.increment_version(logits)
        return (memory, *nothing)


def _over_vocabulary(
    logits: Tensor,
    labels: Tensor,
    arguments: RowArguments,
    masked: bool,
    inplace_backward: bool = False,
    shards: str = "",
    plain: bool = False,
) -> TokenLogprobs | TokenLogprobsEntropy:
    """`token_logprobs` without a support, of checked arguments.

    `masked`: whether the labels are another tensor than the caller's. `plain`: as `checks.plain`
    has found of the caller's tensors.
    """
    op = "token_logprobs"
    backend = backends.select(op, logits.device)
    if backend == backends.REFERENCE:
        if inplace_backward:
            raise ValueError(f"{op}: the reference backend has no inplace_backward")
        keep = labels != arguments.ignore_index
        temperature, vocab = arguments.temperature, logits.shape[-1]
        shard.check_tokens(op, vocab, labels, temperature, keep, shards)
        return named_result(
            *reference.token_logprobs(logits, labels, **arguments.of_logits(), group=shards)
        )
    if not plain:
        checks.not_double(op, logits=logits)
    if inplace_backward:
        _check_inplace(logits)
    temperatures, options = arguments.split()
    rows = (logits, labels, temperatures, options)
    if (torch.is_grad_enabled() and logits.requires_grad) or tracing.forward_mode():
        args = (*rows, inplace_backward, shards, backend)
        found = apply(op, _TokenLogprobs, *args, plain=plain)
        return named_results(options, found)
    if not plain:
        # A tensor that outlived a transform of torch.func asks for a gradient, and has no memory.
        rows = (layout.constant(logits), *rows[1:])
    if shards:
        results = _sharded_forward(*rows, shards, backend).rows
    else:
        whole = plain and not masked and temperatures is None
        # The log-sum-exp is computed from the statistics.
        results = _forward(*rows, options.lse, backend, plain=whole)
    return named_results(options, asked_for(options, labels, temperatures, results))


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[False] = False,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    inplace_backward: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: Literal[True],
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    inplace_backward: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobsEntropy: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    inplace_backward: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs | TokenLogprobsEntropy: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    inplace_backward: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs | TokenLogprobsEntropy:
    """Log-probability of each label, and optionally the entropy of the token's distribution.

    With z = logits / temperature, or softcap * tanh(logits / softcap) / temperature:
    lse = log sum_j exp(z_j), logprob = z_y - lse, and with p = softmax(z) entropy =
    -sum_j p_j log p_j and collision = sum_j p_j^2. All are differentiable in logits. The forward
    pass reads the logits once; the backward pass reads and writes them once. TRL calls this
    `selective_log_softmax`, verl `logprobs_from_logits`.

    With `group` the vocabulary is sharded over the ranks of the group (tensor parallelism). Ranks
    hold consecutive column ranges of any size, including 0, and all ranks pass the same labels. The
    forward pass exchanges four floats per token and one per further label, the backward pass
    nothing. Every rank gets the complete result with the same bits and computes the same loss from
    it. The gradient of a rank's logits is that of this one loss, as without a group.

    Args:
        logits: [..., V], float32, bfloat16 or float16. Any [N, V] or [B, T, V] view with unit
            stride over V is read where it lies: `logits[:, :-1]` costs no copy.
        labels: [...], int64 or int32; or [..., K] for K >= 1 labels per token (a teacher's top k,
            or candidates): as many dimensions as logits. Each has the log-probability, to the bit,
            that it has alone, and gradients of equal labels of a token add up.
        mask: [...]; bool or integer, nonzero = keep, or floating with only 0 and 1. Masked tokens
            are skipped like tokens with `ignore_index`, whatever their labels. None keeps
            everything.
        temperature: a number between 2^-60 and 2^60, or a float tensor of one per token that
            broadcasts to the shape of labels (not differentiated). Temperatures of ignored tokens
            have no effect. A temperature that is NaN or out of bounds raises ValueError with its
            position on CPU. On a GPU or in traced code it makes its token NaN instead, unless
            RLHF_KERNELS_CHECK=1.
        softcap: cap of the final logits (Gemma 2), applied before temperature; None for none.
        entropy: also return the entropy.
        ignore_index: label of tokens to skip: results 0, gradient exactly 0, logits never read. Of
            K labels each can be skipped; the token is where all are.
        lse: also return the log-sum-exp (for a z-loss).
        collision: also return sum_j p_j^2 (for an optimal token baseline, or WPO's weights).
        argmax: also return the id of the most likely token, int64, which is -1 for a token to skip:
            the first of the largest logits, or the first NaN if there is one.
        inplace_backward: write the gradient into the memory of `logits`, which saves a buffer. Only
            for logits that nothing else needs; a later use in the same graph raises in autograd.
        group: process group over which V is sharded. logits are then this rank's [..., V_rank];
            labels count from the first column of rank 0, and all other arguments are the same on
            every rank.
        support: the sampling mask, as the token ids that top-k, top-p or min-p kept for each token:
            (indptr [N + 1], indices [nnz]), each int32 or int64. N is the number of tokens in
            row-major order of labels. Token n kept indices[indptr[n]:indptr[n + 1]], in any order
            and without repeats. vLLM's sampling mask has them as `offsets` and `token_ids`; for
            indices `top` [..., k] of a top-k pass (torch.arange(N + 1) * k, top.reshape(-1)).
            Logits outside the support count as -inf after the cap: log-probability and entropy are
            renormalised over the support, and the gradient outside it is 0. A label outside its
            support, which the sampler cannot have drawn, gives -inf and a gradient in the kept
            logits. Give tokens of prompts and tools `ignore_index`; their entries are not read.
            Only the kept logits are read, and only they are saved for the backward pass.
        empty_support: what a token has whose support is empty. "nan": NaN, and gradient 0. "whole":
            its distribution is over the whole vocabulary, for samplers that record a support only
            where they cut one. Each token is still read by one of two passes alone, but the
            gradient is the sum of theirs, with a second buffer of its size, and logits are saved.

    Returns:
        TokenLogprobs(logprobs, entropy, collision, lse, argmax), each [...], float32 but for the
        ids, None where not asked for, and logprobs like the labels; with entropy=True a
        TokenLogprobsEntropy of the same fields. A row that holds NaN or +inf, or only -inf, gives
        NaN; a label whose logit is -inf gives -inf, as in torch.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; temperature or softcap not between 2^-60
            and 2^60; inplace_backward on a leaf, on overlapping memory, under torch.compile, on the
            reference backend, or with support; group, lse, collision, argmax or labels [..., K]
            with support; on CPU
            an indptr that does not start at 0, decreases, or does not end at nnz, or a repeated
            token id in a support.
        IndexError: on CPU, a label or kept token id outside [0, V), with its position; it is never
            used as an index. On a GPU it gives NaN instead, and a repeated token id gives an
            undefined result, unless RLHF_KERNELS_CHECK=1.

    With `group` on CPU, bad data of one rank, or labels that differ between ranks, raise on every
    rank.
    """
    op = "token_logprobs"
    plain = checks.plain("rl", logits, labels)
    if not plain:
        checks.floating(op, "logits", logits, double=True)
    shards = groups.name(op, group)
    if logits.dim() == 0 or (logits.size(-1) == 0 and not shards):
        raise ValueError(f"{op}: logits must be [..., V] with V >= 1, got {shown(logits.shape)}")
    arguments = row_options.checked(
        op,
        labels,
        "logits",
        logits,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        ignore_index=ignore_index,
        lse=lse,
        collision=collision,
        argmax=argmax,
        fit=plain,
        several=True,
    )
    several = labels.dim() == logits.dim()
    if mask is not None or not -(2**31) <= arguments.ignore_index < 2**31:
        labels = row_options.without_masked(op, labels, mask, arguments.ignore_index, several)
    inplace_backward = option_checks.flag(op, "inplace_backward", inplace_backward)
    if type(empty_support) is not str or empty_support != "nan":
        check_empty_support(op, empty_support, support)
    if support is not None:
        if inplace_backward or shards:
            raise ValueError(f"{op}: support goes with neither inplace_backward nor group")
        check_one_label(op, several)
        if empty_support == "whole":
            return support_or_whole(
                op,
                labels,
                support,
                arguments.ignore_index,
                lambda own: token_logprobs_support(logits, own, support, arguments),
                lambda own: _over_vocabulary(logits, own, arguments, masked=True),
            )
        return named_result(*token_logprobs_support(logits, labels, support, arguments))
    return _over_vocabulary(
        logits, labels, arguments, mask is not None, inplace_backward, shards, plain
    )
