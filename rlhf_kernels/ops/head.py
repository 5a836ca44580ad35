"""The LM head, fused: log-probabilities and KL from hidden states, logits never as a whole."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..core import checks, groups, option_checks, temperature_rules
from ..core.sentinels import SHARD_IGNORED
from ..head import shard
from ..head.chunks import exact_size
from ..kernels import backends
from ._operator import define, head_gradients_fake, once_differentiable, remember, row_arguments
from .logprobs import TokenLogprobs
from .support import Support, linear_token_logprobs_support


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    temperatures: Tensor | None, temperature: float, softcap: float, entropy: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logprobs = hidden.new_empty(labels.shape, dtype=torch.float32)
    return (
        logprobs,
        logprobs.new_empty(labels.shape if entropy else (0,)),
        logprobs.new_empty((*labels.shape, 3)),
    )


_forward = define(
    "linear_token_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperatures, "
    "float temperature, float softcap, bool entropy, int ignore_index, int chunk_tokens, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
# Also gives the labels as columns of this rank's shard, for the backward.
_sharded_forward = define(
    "sharded_linear_token_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperatures, "
    "float temperature, float softcap, bool entropy, int ignore_index, int chunk_tokens, "
    "str group, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: (*_forward_fake(*args), args[3].new_empty(args[3].shape, dtype=torch.int64)),
)
_BACKWARD_ARGS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperatures, "
    "Tensor stats, Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float softcap, "
    "int ignore_index, int chunk_tokens, bool[] needs"
)
_backward = define(
    "linear_token_logprobs_backward",
    f"({_BACKWARD_ARGS}, str backend) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, *rest: head_gradients_fake(hidden, weight, bias, rest[-2]),
)
_sharded_backward = define(
    "sharded_linear_token_logprobs_backward",
    f"({_BACKWARD_ARGS}, str group, str backend) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, *rest: head_gradients_fake(hidden, weight, bias, rest[-3]),
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple:
        *args, group, backend = args
        labels, temperatures, temperature, softcap, entropy, ignore_index, chunk = args
        if group:
            logprobs, entropies, stats, labels = _sharded_forward(
                hidden, weight, bias, *args, group, backend
            )
            ignore_index = SHARD_IGNORED
        else:
            logprobs, entropies, stats = _forward(hidden, weight, bias, *args, backend)
        ctx.set_materialize_grads(False)
        remember(ctx, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, stats)
        ctx.options = (temperature, softcap, ignore_index, chunk)
        ctx.group, ctx.backend = group, backend
        return (logprobs, entropies) if entropy else (logprobs,)

    @staticmethod
    @once_differentiable("linear_token_logprobs")
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple:
        nothing = (None,) * 9
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, *nothing)
        *tensors, stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        args = (*tensors, stats, grad_logprobs, grad_entropy, *ctx.options, needs)
        if ctx.group:
            found = _sharded_backward(*args, ctx.group, ctx.backend)
        else:
            found = _backward(*args, ctx.backend)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *nothing)


def check_head(
    op: str,
    hidden: object,
    weight: object,
    bias: object,
    names: tuple[str, str, str],
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Requires hidden [..., H] and weight [V, H], bias [V], all on one device.

    V may be 0 in a shard of a vocabulary.

    Returns:
        The operands; under autocast in its dtype, as F.linear casts them. Without it their dtypes
        are one, or weight is float32 and hidden of 16 bits, for a product in fp32.
    """
    checks.floating(op, names[0], hidden, double=True)
    checks.floating(op, names[1], weight, double=True)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"{op}: {names[1]} must be [V, H] with V >= 1, got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {names[0]} must be [..., {weight.shape[1]}] as {names[1]} is [V, H], got "
            f"{tuple(hidden.shape)}"
        )
    if weight.shape[1] == 0:
        raise ValueError(
            f"{op}: {names[0]} must be [..., H] with H >= 1, got {tuple(hidden.shape)}"
        )
    checks.same_device(op, names[1], weight, names[0], hidden.device)
    if bias is not None:
        checks.floating(op, names[2], bias, double=True)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: {names[2]} must be [V], ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        checks.same_device(op, names[2], bias, names[0], hidden.device)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head_dtypes(op, hidden, weight, bias, names)
    return hidden, weight, bias


def _autocast(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """A head's operands in the dtype that autocast is on for; float64 stays, as in F.linear."""
    kind = operands[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in operands)


def _check_head_dtypes(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> None:
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype and not (half and weight.dtype is torch.float32):
        raise TypeError(
            f"{op}: {names[1]} must have {names[0]}'s dtype {hidden.dtype}"
            f"{', or float32' if half else ''}, got {weight.dtype}; cast one of them, or call "
            "under torch.autocast, which casts both"
        )
    if bias is not None and (bias.dtype is torch.float64) != (weight.dtype is torch.float64):
        raise TypeError(
            f"{op}: {names[2]} must have {names[1]}'s dtype {weight.dtype}, got {bias.dtype}"
        )


def check_ref_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Requires a reference policy's head over the tokens and the vocabulary of the policy's.

    Returns:
        Its operands, as `check_head`, constant.
    """
    names = ("ref_hidden", "ref_weight", "ref_bias")
    checks.floating(op, "ref_hidden", ref_hidden, double=True)
    checks.same_device(op, "ref_hidden", ref_hidden, "hidden", hidden.device)
    with torch.no_grad():
        ref = check_head(op, ref_hidden, ref_weight, ref_bias, names, sharded=sharded)
    expected = tuple(hidden.shape[:-1]), weight.shape[0]
    got = tuple(ref_hidden.shape[:-1]), ref_weight.shape[0]
    if got != expected:
        raise ValueError(
            f"{op}: ref_hidden and ref_weight must have the tokens and the vocabulary of hidden "
            f"and weight, {expected[0]} and {expected[1]}, got {got[0]} and {got[1]}"
        )
    return tuple(None if t is None else t.detach() for t in ref)


def check_chunk(
    op: str,
    chunk_tokens: object,
    batch_invariant: object,
    weight: Tensor,
    columns: int,
    backend: str,
) -> int:
    """An operator's chunk_tokens (see `_head.Chunk`), for logits of `columns` in all."""
    if chunk_tokens is not None:
        chunk_tokens = option_checks.integer(
            op, "chunk_tokens", chunk_tokens, low=1, what=" or None"
        )
    if not option_checks.flag(op, "batch_invariant", batch_invariant):
        return chunk_tokens or 0
    if backend == backends.REFERENCE:
        raise ValueError(f"{op}: the reference backend has no batch_invariant")
    return -exact_size(chunk_tokens, weight.device, columns, weight.dtype)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: Support | None = None,
) -> TokenLogprobs:
    """`token_logprobs` straight from hidden states: the LM head's logits never exist as a whole.

    logits = (hidden @ weight.T + bias) * logit_scale, computed chunk by chunk of tokens in one
    buffer, forward and again backward. Tokens with `ignore_index` are dropped before the product;
    tokens whose upstream gradient is zero (clipped, without advantage, prompt) are skipped in the
    backward pass. The gradient of the weight is accumulated over chunks in fp32, and has no buffer
    where the weight is frozen.

    With `group` the vocabulary is sharded over its ranks as in `token_logprobs`: weight and bias
    are this rank's rows; hidden and everything per token are the same on every rank. The gradients
    of weight and bias are those of this rank's rows; that of hidden is summed over the ranks, in
    fp32 and once per backward, so it is whole on every rank. All ranks need it or none, and all
    take part in the backward, with the same upstream gradient.

    Args:
        hidden: [..., H], float32, bfloat16 or float16.
        weight: [V, H], dtype of hidden; or float32 with 16-bit hidden states, whose product is then
            in fp32, a chunk of them upcast at a time. Under autocast any of these dtypes: operands
            are cast as F.linear casts them. Gradients come in each operand's own dtype.
        labels: [...], int64 or int32.
        bias: [V], or None.
        temperature: as in `token_logprobs`; over logit_scale it lies within the same bounds.
        softcap: as in `token_logprobs`, applied after logit_scale.
        logit_scale: a number between 2^-60 and 2^60 (Cohere, Granite).
        entropy: also return the entropy.
        ignore_index: label of tokens to skip.
        chunk_tokens: tokens of a chunk. None: what 128 MiB of logits hold on CPU, 1 GiB on a GPU;
            a CPU's backward pass then takes blocks of the vocabulary, not of tokens, so that the
            gradient of the weight is written once, and only that of hidden is summed in fp32.
        batch_invariant: every product takes exactly chunk_tokens rows, the last chunk padded, so
            that a token's results and its own gradient are the same bits in any batch. GEMM
            libraries choose their kernel, and with it the order of a sum, by the number of rows;
            without this a batch of another size may differ in the last bits. Costs the padding: up
            to a chunk of products, little where tokens fill several chunks. No more than 8192 rows,
            nor 16 times the default, whatever chunk_tokens says.
        group: process group over which V is sharded; None for none.
        support: the words that the sampler kept for each token, (indptr, indices), as in
            `token_logprobs`. Only their rows of the weight are multiplied, in fp32 without chunks,
            and only they have a gradient.

    Returns:
        TokenLogprobs(logprobs [...], entropy [...] or None), float32, differentiable in hidden,
        weight and bias. Logits of 16-bit operands are summed in fp32; on CPU the GEMM then rounds
        those of bfloat16 to 16 bits, else they stay fp32. Of float16 a CPU multiplies blocks
        widened to fp32.

    Raises:
        TypeError, ValueError, IndexError: as `token_logprobs`; operands whose shapes or dtypes do
            not match.
    """
    op = "linear_token_logprobs"
    shards = groups.name(op, group)
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = check_head(op, hidden, weight, bias, names, sharded=bool(shards))
    options = checks.row_options(
        op, labels, "hidden", hidden, temperature, softcap, logit_scale, entropy, ignore_index
    )
    temperature, softcap, logit_scale, entropy, ignore_index = options
    if support is not None:
        if shards:
            raise ValueError(f"{op}: support and group do not go together")
        return TokenLogprobs(
            *linear_token_logprobs_support(
                hidden,
                weight,
                bias,
                labels,
                support,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                entropy=entropy,
                ignore_index=ignore_index,
            )
        )

    backend = backends.select(op, hidden.device)
    chunk = check_chunk(op, chunk_tokens, batch_invariant, weight, weight.shape[0], backend)
    if backend == backends.REFERENCE:
        effective, *_ = row_arguments(temperature, softcap, logit_scale)
        keep = labels != ignore_index
        if shards:
            shard.meet(op, weight.shape[0], labels, effective, keep, shards)
        else:
            checks.token_data(op, labels, effective, keep, weight.shape[0])
        return TokenLogprobs(
            *reference.linear_token_logprobs(
                hidden,
                weight,
                labels,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                entropy=entropy,
                ignore_index=ignore_index,
                group=shards,
            )
        )
    checks.floating(op, "hidden", hidden)
    logprobs, *entropies = _LinearTokenLogprobs.apply(
        hidden,
        weight,
        bias,
        labels,
        *row_arguments(temperature, softcap, logit_scale),
        entropy,
        ignore_index,
        chunk,
        shards,
        backend,
    )
    return TokenLogprobs(logprobs, entropies[0] if entropy else None)


_kl_forward = define(
    "linear_kl_divergence",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
    "Tensor? ref_bias, Tensor? mask, float temperature, bool reverse, int chunk_tokens, "
    "str backend) -> (Tensor, Tensor)",
    lambda hidden, *_: (
        hidden.new_empty(hidden.shape[:-1], dtype=torch.float32),
        hidden.new_empty((*hidden.shape[:-1], 5), dtype=torch.float32),
    ),
)
_kl_backward = define(
    "linear_kl_divergence_backward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
    "Tensor? ref_bias, Tensor? mask, Tensor stats, Tensor grad, float temperature, bool reverse, "
    "int chunk_tokens, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, *rest: head_gradients_fake(hidden, weight, bias, rest[-2]),
)


class _LinearKlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
    ) -> Tensor:
        *constants, temperature, reverse, chunk, backend = args
        kl, stats = _kl_forward(hidden, weight, bias, *args)
        remember(ctx, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, *constants, stats)
        ctx.options = (temperature, reverse, chunk)
        ctx.backend = backend
        return kl

    @staticmethod
    @once_differentiable("linear_kl_divergence")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[:3])
        found = _kl_backward(*ctx.saved_tensors, grad, *ctx.options, needs, ctx.backend)
        gradients = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*gradients, *(None,) * 8)


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    direction: str = "reverse",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`kl_divergence` between two LM heads, without the logits of either in memory as a whole.

    Both heads' logits are computed chunk by chunk of tokens, forward and again backward.
    reverse: KL(policy || ref); forward: KL(ref || policy), the loss of distillation.

    Args:
        hidden: policy's hidden states [..., H], float32, bfloat16 or float16.
        weight: policy's head [V, H], its dtype as in `linear_token_logprobs`.
        ref_hidden: reference's hidden states [..., H'], same leading shape; constant.
        ref_weight: reference's head [V, H'], dtype of weight; constant.
        bias: [V], or None.
        ref_bias: [V], or None; constant.
        mask: [...], bool or integer, nonzero = keep, or floating, of 0 and 1: the others are not
            multiplied and give 0.
        logit_scale: a finite number > 0 that multiplies the logits of both.
        direction: "reverse" or "forward".
        temperature: a number, over logit_scale between 2^-60 and 2^60; divides both.
        chunk_tokens: as in `linear_token_logprobs`.
        batch_invariant: as in `linear_token_logprobs`.

    Returns:
        [...], float32, differentiable in hidden, weight and bias; values as `kl_divergence`.

    Raises:
        TypeError, ValueError: as `kl_divergence`; operands whose shapes or dtypes do not match.
    """
    op = "linear_kl_divergence"
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = check_head(op, hidden, weight, bias, names)
    ref_hidden, ref_weight, ref_bias = check_ref_head(
        op, hidden, weight, ref_hidden, ref_weight, ref_bias
    )
    checks.same_dtype(op, "ref_weight", ref_weight, "weight", weight.dtype)
    if mask is not None:
        mask = checks.mask(op, "mask", mask)
        checks.same_shape(op, "mask", mask, "hidden without H", hidden.shape[:-1])
        checks.same_device(op, "mask", mask, "hidden", hidden.device)
    option_checks.one_of(op, "direction", direction, ("reverse", "forward"))
    temperature = option_checks.positive(op, "temperature", temperature)
    logit_scale = option_checks.positive(op, "logit_scale", logit_scale)
    temperature_rules.check(op, temperature, None, logit_scale)

    backend = backends.select(op, hidden.device)
    chunk = check_chunk(op, chunk_tokens, batch_invariant, weight, 2 * weight.shape[0], backend)
    if backend == backends.REFERENCE:
        return reference.linear_kl_divergence(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            mask=mask,
            logit_scale=logit_scale,
            direction=direction,
            temperature=temperature,
        )
    checks.floating(op, "hidden", hidden)
    return _LinearKlDivergence.apply(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, temperature / logit_scale,
        direction == "reverse", chunk, backend,
    )  # fmt: skip
