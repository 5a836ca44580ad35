"""linear_kl_divergence: the KL divergence of two LM heads, from hidden states."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DIRECTIONS, Direction
from ..core import checks, option_checks, temperature_rules
from ..head import kl as head
from ..head.arguments import Divergence, Operands
from ..kernels import backends
from ._heads import check_batching, check_head, check_ref_head
from ._operator import (
    InputGradients,
    Operator,
    apply,
    define,
    head_gradients_fake,
    once_differentiable,
    remember,
    select,
)

_ARGS = "Operands operands, Operands ref_, Divergence divergence"
_forward: Operator[tuple[Tensor, Tensor]] = define(
    "linear_kl_divergence",
    f"({_ARGS}, Batching batching, str backend) -> (Tensor, Tensor)",
    lambda operands, *_: (
        operands.hidden.new_empty(operands.hidden.shape[:-1], dtype=torch.float32),
        operands.hidden.new_empty((*operands.hidden.shape[:-1], 5), dtype=torch.float32),
    ),
    head.forward,
)
_backward: Operator[tuple[Tensor, Tensor, Tensor]] = define(
    "linear_kl_divergence_backward",
    f"({_ARGS}, Tensor stats, Tensor grad, Batching batching, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda operands, *rest: head_gradients_fake(operands, rest[-2]),
    head.backward,
)


class _LinearKlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """`args`: the fields of both heads' Operands and of Divergence; batching, backend."""
        operands, reference = Operands(*args[:3]), Operands(*args[3:6])
        divergence = Divergence(*args[6:9])
        batching, backend = args[9:]
        kl, stats = _forward(operands, reference, divergence, batching, backend)
        remember(ctx, *operands)
        ctx.save_for_backward(*operands, *reference, divergence.mask, stats)
        ctx.options = (divergence.temperature, divergence.reverse)
        ctx.batching, ctx.backend = batching, backend
        return kl

    @staticmethod
    @once_differentiable("linear_kl_divergence")
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        needs = list(ctx.needs_input_grad[:3])
        *heads, mask, stats = ctx.saved_tensors
        found = _backward(
            Operands(*heads[:3]), Operands(*heads[3:]), Divergence(mask, *ctx.options), stats, grad,
            ctx.batching, needs, ctx.backend,
        )  # fmt: skip
        gradients = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*gradients, *(None,) * 8)


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
) -> Tensor:
    """`kl_divergence` between two LM heads, without ever holding all logits of either in memory.

    Both heads' logits are computed in chunks of tokens, once forward and once more backward.
    reverse: KL(policy || ref); forward: KL(ref || policy), the loss of distillation.

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
        direction: "reverse" or "forward".
        temperature: a number that divides the logits of both heads; temperature / logit_scale must
            lie between 2^-60 and 2^60.
        chunk_tokens: as in `linear_token_logprobs`.
        kept_tokens: as in `linear_token_logprobs`, by the mask.
        batch_invariant: as in `linear_token_logprobs`.

    Returns:
        [...], float32, differentiable in hidden, weight and bias; values as in `kl_divergence`.

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
    temperature = option_checks.positive(op, "temperature", temperature)
    logit_scale = option_checks.positive(op, "logit_scale", logit_scale)
    temperature_rules.check(op, temperature, None, logit_scale)

    backend = select(op, hidden.device)
    batching = check_batching(
        op, chunk_tokens, kept_tokens, batch_invariant, weight, 2 * weight.shape[0], backend
    )
    if backend == backends.REFERENCE:
        if mask is None:
            keep = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        else:
            keep = mask != 0
        checks.kept_tokens(op, keep, batching.kept_tokens)
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
    kl: Tensor = apply(
        op, _LinearKlDivergence, hidden, weight, bias, ref_hidden, ref_weight, ref_bias,
        mask, temperature / logit_scale,
        direction == "reverse", batching, backend,
    )  # fmt: skip
    return kl
