"""linear_kl_divergence: the KL divergence of two LM heads, from hidden states."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DIRECTIONS, Direction
from ..core import checks, data_checks, option_checks, pair_options
from ..core.pair_options import SAME, Same
from ..head import kl as head
from ..head.arguments import Batching, Divergence, Operands
from ..kernels import backends
from ._autograd import InputGradients, apply, gathered, once_differentiable, remember
from ._heads import check_batching, check_head, check_ref_head
from ._operator import define, head_gradients_fake, select
from .kl import KlDivergence, result


@define("linear_kl_divergence", head.forward)
def _forward(
    operands: Operands, ref_: Operands, divergence: Divergence, batching: Batching, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = operands.hidden.shape[:-1]
    kl = operands.hidden.new_empty(shape, dtype=torch.float32)
    entropies = kl.new_empty(shape) if divergence.options.entropy else None
    return kl, kl.new_empty((*shape, 5)), entropies


@define("linear_kl_divergence_backward", head.backward)
def _backward(
    operands: Operands,
    ref_: Operands,
    divergence: Divergence,
    stats: Tensor,
    grad: Tensor,
    batching: Batching,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_gradients_fake(operands, needs)


class _LinearKlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        """`args`: the fields of both heads' Operands and of Divergence; batching, backend."""
        operands, reference, divergence, batching, backend = gathered(
            args, Operands, Operands, Divergence
        )
        kl, stats, entropies = _forward(operands, reference, divergence, batching, backend)
        remember(ctx, *operands)
        ctx.save_for_backward(*operands, *reference, divergence.mask, stats)
        ctx.options, ctx.batching, ctx.backend = divergence.options, batching, backend
        if not divergence.options.entropy:
            return kl
        ctx.mark_non_differentiable(entropies)
        return kl, entropies

    @staticmethod
    @once_differentiable("linear_kl_divergence")
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> InputGradients:
        needs = list(ctx.needs_input_grad[:3])
        *heads, mask, stats = ctx.saved_tensors
        found = _backward(
            Operands(*heads[:3]), Operands(*heads[3:]), Divergence(mask, ctx.options), stats, grad,
            ctx.batching, needs, ctx.backend,
        )  # fmt: skip
        gradients = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*gradients, *(None,) * 7)


@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    ref_logit_scale: float | Same = SAME,
    entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    ref_logit_scale: float | Same = SAME,
    entropy: Literal[True],
) -> KlDivergence: ...


@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    ref_logit_scale: float | Same = SAME,
    entropy: bool,
) -> Tensor | KlDivergence: ...


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    ref_logit_scale: float | Same = SAME,
    entropy: bool = False,
) -> Tensor | KlDivergence:
    """`kl_divergence` between two LM heads, without ever holding all logits of either in memory.

    Both heads' logits are computed in chunks of tokens, once forward and once more backward. The
    divergences are those of `kl_divergence`. Its use is on-policy distillation (Agarwal et al.,
    2306.13649), or an exact KL in the place of an estimate.

    Args:
        hidden: policy's hidden states [..., H], float32, bfloat16 or float16.
        weight: policy's head [V, H], its dtype as in `linear_token_logprobs`.
        ref_hidden: reference's hidden states [..., H'], same leading shape; constant.
        ref_weight: reference's head [V, H'], dtype of weight; constant.
        bias: [V], or None.
        ref_bias: [V], or None; constant.
        mask: [...]; bool or integer, nonzero = keep, or floating with only 0 and 1. Masked tokens
            are not multiplied and give 0.
        logit_scale: a finite number > 0 that multiplies the logits of both heads.
        direction, beta: as in `kl_divergence`.
        temperature: a number that divides the logits of both heads; temperature / logit_scale must
            lie between 2^-60 and 2^60.
        chunk_tokens: as in `linear_token_logprobs`.
        kept_tokens: as in `linear_token_logprobs`, by the mask.
        batch_invariant: as in `linear_token_logprobs`.
        softcap: cap of the logits of both heads after logit_scale, as in `kl_divergence`.
        ref_temperature, ref_softcap, ref_logit_scale: the reference's own; "same" is the policy's.
        entropy: also return the policy's entropy, which has no gradient.

    Returns:
        [...], float32, differentiable in hidden, weight and bias; values as in `kl_divergence`.
        With entropy=True a KlDivergence(kl, entropy).

    Raises:
        TypeError, ValueError: as in `kl_divergence`; operands whose shapes or dtypes do not match.
    """
    op = "linear_kl_divergence"
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = check_head(op, hidden, weight, bias, names)
    ref_hidden, ref_weight, ref_bias = check_ref_head(
        op, hidden, weight, ref_hidden, ref_weight, ref_bias
    )
    checks.same_dtype(op, "ref_weight", ref_weight, "weight", weight.dtype)
    mask = checks.row_mask(op, mask, "hidden without H", hidden.shape[:-1], hidden.device)
    option_checks.one_of(op, "direction", direction, DIRECTIONS)
    scales = (logit_scale, ref_logit_scale)
    options = pair_options.checked(
        op, direction, beta, temperature, ref_temperature, softcap, ref_softcap, entropy, *scales
    )

    backend = select(op, hidden.device)
    batching = check_batching(
        op, chunk_tokens, kept_tokens, batch_invariant, weight, 2 * weight.shape[0], backend
    )
    if backend == backends.REFERENCE:
        if mask is None:
            keep = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        else:
            keep = mask != 0
        data_checks.kept_tokens(op, keep, batching.kept)
        found = reference.linear_kl_divergence(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            mask=mask,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            direction=direction,
            beta=beta,
            temperature=temperature,
            ref_temperature=ref_temperature,
            softcap=softcap,
            ref_softcap=ref_softcap,
            entropy=options.entropy,
        )
    else:
        checks.floating(op, "hidden", hidden)
        heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        found = apply(op, _LinearKlDivergence, *heads, mask, options, batching, backend)
    return result(found, options)
