"""linear_token_logprobs: log-probabilities from hidden states, with logits only in chunks."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..config.enums import EmptySupport
from ..core import checks, data_checks, groups, row_options
from ..core.layout import any_of_token
from ..core.row_options import RowArguments
from ..core.sentinels import SHARD_IGNORED
from ..head import logprobs as head
from ..head import shard
from ..head.arguments import Batching, Operands, Targets, Upstream
from ..kernels import backends
from ..kernels.rows import LabelResults
from ._autograd import InputGradients, apply, gathered, once_differentiable, remember
from ._heads import check_batching, check_head
from ._operator import define, head_gradients_fake, select
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
    linear_token_logprobs_support,
    support_or_whole,
)


@define("linear_token_logprobs", head.forward)
def _forward(
    operands: Operands, targets: Targets, batching: Batching, backend: str
) -> LabelResults:
    return _results(operands, targets)


@define("sharded_linear_token_logprobs", shard.linear_token_logprobs)
def _sharded_forward(
    operands: Operands, targets: Targets, batching: Batching, group: str, backend: str
) -> shard.ShardResults:
    """The backward pass needs the labels as columns of this rank's shard."""
    local = targets.labels.new_empty(targets.labels.shape, dtype=torch.int64)
    return shard.ShardResults(*_results(operands, targets), local)


def _results(operands: Operands, targets: Targets) -> LabelResults:
    shape = operands.hidden.shape[:-1]
    logprobs = operands.hidden.new_empty(targets.labels.shape, dtype=torch.float32)
    return LabelResults(
        logprobs,
        logprobs.new_empty(shape) if targets.options.entropy else None,
        logprobs.new_empty((*shape, 3)),
        logprobs.new_empty(shape) if targets.options.collision else None,
        logprobs.new_empty(shape, dtype=torch.int64) if targets.options.argmax else None,
    )


@define("linear_token_logprobs_backward", head.backward)
def _backward(
    operands: Operands,
    targets: Targets,
    upstream: Upstream,
    batching: Batching,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_gradients_fake(operands, needs)


@define("sharded_linear_token_logprobs_backward", shard.linear_token_logprobs_backward)
def _sharded_backward(
    operands: Operands,
    targets: Targets,
    upstream: Upstream,
    batching: Batching,
    needs: list[bool],
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_gradients_fake(operands, needs)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> InputGradients:
        """`args`: the fields of Operands and Targets; batching, group, backend."""
        operands, targets, batching, group, backend = gathered(args, Operands, Targets)
        if group:
            found = _sharded_forward(operands, targets, batching, group, backend)
            options = targets.options._replace(ignore_index=SHARD_IGNORED)
            results, targets = found.rows, targets._replace(labels=found.local, options=options)
        else:
            results = _forward(operands, targets, batching, backend)
        # Traced, what is not wanted is an empty tensor.
        collision = results.collision if targets.options.collision else None
        ctx.set_materialize_grads(False)
        remember(ctx, *operands)
        of_rows = (targets.labels, targets.temperatures)
        ctx.save_for_backward(*operands, *of_rows, results.stats, collision)
        if targets.options.argmax:
            ctx.mark_non_differentiable(results.argmax)
        ctx.options, ctx.batching = targets.options, batching
        ctx.group, ctx.backend = group, backend
        return asked_for(targets.options, *of_rows, results)

    @staticmethod
    @once_differentiable("linear_token_logprobs")
    def backward(ctx: Any, *gradients: Tensor | None) -> InputGradients:
        nothing = (None,) * 6
        if all(g is None for g in gradients):
            return (None, None, None, *nothing)
        needs = list(ctx.needs_input_grad[:3])
        *operands, labels, temperatures, stats, collisions = ctx.saved_tensors
        g = by_name(ctx.options, gradients)
        args = (
            Operands(*operands),
            Targets(labels, temperatures, ctx.options),
            Upstream(stats, collisions, g.logprobs, g.entropy, g.lse, g.collision),
            ctx.batching,
            needs,
        )
        if ctx.group:
            found = _sharded_backward(*args, ctx.group, ctx.backend)
        else:
            found = _backward(*args, ctx.backend)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *nothing)


def _over_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    arguments: RowArguments,
    batching: Batching,
    shards: str,
    backend: str,
) -> TokenLogprobs | TokenLogprobsEntropy:
    """`linear_token_logprobs` without a support, of checked arguments."""
    op = "linear_token_logprobs"
    if backend == backends.REFERENCE:
        keep, effective = labels != arguments.ignore_index, arguments.effective_temperature()
        of_tokens = any_of_token(keep, hidden.dim() - 1)
        data_checks.kept_tokens(op, of_tokens, batching.kept)
        shard.check_tokens(op, weight.shape[0], labels, effective, keep, shards)
        return named_result(
            *reference.linear_token_logprobs(
                hidden, weight, labels, bias=bias, **arguments.of_head(), group=shards
            )
        )
    checks.floating(op, "hidden", hidden)
    temperatures, options = arguments.split()
    inputs = (hidden, weight, bias, labels, temperatures, options)
    found = apply(op, _LinearTokenLogprobs, *inputs, batching, shards, backend)
    return named_results(options, found)


def over_support(
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    support: SamplingMask,
    empty_support: EmptySupport,
    arguments: RowArguments,
    batching: Batching,
    backend: str,
) -> TokenLogprobs | TokenLogprobsEntropy:
    """`linear_token_logprobs` over a support, of checked arguments."""
    if empty_support == "nan":
        return named_result(*linear_token_logprobs_support(*head, labels, support, arguments))
    return support_or_whole(
        "linear_token_logprobs",
        labels,
        support,
        arguments.ignore_index,
        lambda own: linear_token_logprobs_support(*head, own, support, arguments),
        lambda own: _over_vocabulary(*head, own, arguments, batching, "", backend),
    )


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: Literal[False] = False,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: Literal[True],
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobsEntropy: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs | TokenLogprobsEntropy: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
) -> TokenLogprobs | TokenLogprobsEntropy:
    """`token_logprobs` from hidden states, without ever holding all of the LM head's logits.

    logits = (hidden @ weight.T + bias) * logit_scale, computed in chunks of tokens in one buffer,
    once forward and once more backward. Tokens with `ignore_index` are dropped before the product.
    The backward pass skips tokens whose upstream gradient is zero (clipped tokens, zero advantage,
    prompts). The gradient of the weight is accumulated over chunks in fp32; a frozen weight has no
    gradient buffer. Heads without all their logits: Wijmans et al., 2411.09009 (by blocks of the
    vocabulary), and Hsu et al., 2410.10989 (by chunks of tokens).

    With `group` the vocabulary is sharded over the ranks of the group as in `token_logprobs`.
    weight and bias are this rank's rows; hidden and all per-token arguments are the same on every
    rank. The gradients of weight and bias cover this rank's rows. The gradient of hidden is summed
    over the ranks, in fp32 and once per backward pass, so every rank gets the complete gradient.
    Either all ranks or none must need it, and all must run the backward pass with the same upstream
    gradient.

    Args:
        hidden: [..., H], float32, bfloat16 or float16.
        weight: [V, H], dtype of hidden; or float32 with 16-bit hidden states, which are then upcast
            chunk by chunk for a product in fp32. It takes the time of fp32 products, of TF32 where
            torch allows it: 16-bit hidden states are exact in TF32, the weight is rounded. Under
            autocast any of these dtypes; operands are cast as F.linear casts them, an fp32 head
            too: for logits in fp32 call under torch.autocast(device_type, enabled=False). Gradients
            have each operand's own dtype.
        labels: [...], or [..., K] for K labels per token, int64 or int32, as in `token_logprobs`.
            The head is multiplied once for all.
        mask: as in `token_logprobs`; masked tokens are not multiplied.
        bias: [V], or None.
        temperature: as in `token_logprobs`; the bounds hold for temperature / logit_scale.
        softcap: as in `token_logprobs`, applied after logit_scale.
        logit_scale: a number between 2^-60 and 2^60 (Cohere, Granite).
        entropy: also return the entropy.
        ignore_index: label of tokens to skip.
        lse, collision, argmax: as in `token_logprobs`.
        chunk_tokens: tokens of a chunk. None: on a GPU 4096, or as many as fit 4 GiB of logits. On
            a CPU both passes then work in blocks of the vocabulary instead of tokens, of 32 MiB of
            logits or more: they merge results of rows in fp64, write the gradient of the weight
            once and sum only that of hidden in fp32.
        kept_tokens: an upper bound of the number of tokens that labels and mask keep, where the
            caller knows one. Neither pass then waits for a GPU to count them, so both can be
            captured in a CUDA graph, and the mask may change between replays. Exactly so many
            tokens are multiplied in each pass; labels.numel() drops none. Dropped tokens have zero
            results and gradients as usual. A bound that is too small raises ValueError on CPU and
            gives NaN on a GPU. None: each pass counts, with one synchronisation of a GPU.
        batch_invariant: every product has exactly chunk_tokens rows (the last chunk is padded), so
            that a token's results and its own gradient have the same bits in any batch. GEMM
            libraries choose the kernel, and thereby the order of a sum, by the number of rows;
            without this option, batches of different sizes may differ in the last bits. The padding
            costs up to one chunk of products. chunk_tokens is capped at 8192 rows and at 16 times
            the default.
        group: process group over which V is sharded; None for none.
        support: the token ids that the sampler kept for each token, (indptr, indices), as in
            `token_logprobs`. Only the rows of the weight for these ids are multiplied, in fp32 and
            without chunks, and only these rows have a gradient. No pass counts tokens, and every
            row is summed alone: chunk_tokens, kept_tokens and batch_invariant change nothing.
        empty_support: as in `token_logprobs`. With "whole" the tokens whose support is empty go
            through the head in chunks, as without a support.

    Returns:
        TokenLogprobs(logprobs, entropy, collision, lse, argmax) or TokenLogprobsEntropy as in
        `token_logprobs`, differentiable in hidden, weight and bias. Logits of 16-bit operands are
        summed in fp32 and stay fp32, except that the GEMM on CPU rounds logits of bfloat16 operands
        to bfloat16. For float16, a CPU multiplies blocks widened to fp32.

    Raises:
        TypeError, ValueError, IndexError: as in `token_logprobs`; operands whose shapes or dtypes
            do not match.
    """
    op = "linear_token_logprobs"
    shards = groups.name(op, group)
    names = ("hidden", "weight", "bias")
    head = check_head(op, hidden, weight, bias, names, sharded=bool(shards))
    hidden, weight, bias = head
    arguments = row_options.checked(
        op,
        labels,
        "hidden",
        hidden,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=entropy,
        ignore_index=ignore_index,
        lse=lse,
        collision=collision,
        argmax=argmax,
        several=True,
    )
    several = labels.dim() == hidden.dim()
    labels = row_options.without_masked(op, labels, mask, arguments.ignore_index, several)
    backend = select(op, hidden.device)
    batching = check_batching(
        op, chunk_tokens, kept_tokens, batch_invariant, weight, weight.shape[0], backend
    )
    if type(empty_support) is not str or empty_support != "nan":
        check_empty_support(op, empty_support, support)
    if support is not None:
        if shards:
            raise ValueError(f"{op}: support and group do not go together")
        check_one_label(op, several)
        data_checks.kept_tokens(op, labels != arguments.ignore_index, batching.kept)
        return over_support(head, labels, support, empty_support, arguments, batching, backend)
    return _over_vocabulary(*head, labels, arguments, batching, shards, backend)
