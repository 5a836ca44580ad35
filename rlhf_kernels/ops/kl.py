"""kl_divergence over the whole vocabulary, and kl_penalty, its per-token estimators."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DIRECTIONS, KL_ESTIMATORS, Direction, KlEstimator
from ..core import checks, option_checks, temperature_rules
from ..core.option_checks import shown
from ..kernels import backends
from ._operator import InputGradients, Operator, apply, define, once_differentiable, remember

_divergence: Operator[tuple[Tensor, Tensor]] = define(
    "kl_divergence",
    "(Tensor logits, Tensor ref_logits, float temperature, bool reverse, str backend) "
    "-> (Tensor, Tensor)",
    lambda logits, *_: (
        logits.new_empty(logits.shape[:-1], dtype=torch.float32),
        logits.new_empty((*logits.shape[:-1], 5), dtype=torch.float32),
    ),
)
_divergence_backward: Operator[Tensor] = define(
    "kl_divergence_backward",
    "(Tensor logits, Tensor ref_logits, Tensor stats, Tensor grad, float temperature, "
    "bool reverse, str backend) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape),
)
_penalty: Operator[Tensor] = define(
    "kl_penalty",
    "(Tensor logprobs, Tensor ref_logprobs, str estimator, str backend) -> Tensor",
    lambda logprobs, *_: logprobs.new_empty(logprobs.shape, dtype=torch.float32),
)
_penalty_backward: Operator[Tensor] = define(
    "kl_penalty_backward",
    "(Tensor logprobs, Tensor ref_logprobs, Tensor grad, str estimator, str backend) -> Tensor",
    lambda logprobs, *_: logprobs.new_empty(logprobs.shape),
)


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        temperature: float,
        reverse: bool,
        backend: str,
    ) -> Tensor:
        kl, stats = _divergence(logits, ref_logits, temperature, reverse, backend)
        remember(ctx, logits)
        ctx.save_for_backward(logits, ref_logits, stats)
        ctx.options = (temperature, reverse, backend)
        return kl

    @staticmethod
    @once_differentiable("kl_divergence")
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        logits, ref_logits, stats = ctx.saved_tensors
        gradient = _divergence_backward(logits, ref_logits, stats, grad, *ctx.options)
        return gradient, None, None, None, None


class _KlPenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str
    ) -> Tensor:
        remember(ctx, logprobs)
        ctx.save_for_backward(logprobs, ref_logprobs)
        ctx.options = (estimator, backend)
        return _penalty(logprobs, ref_logprobs, estimator, backend)

    @staticmethod
    @once_differentiable("kl_penalty")
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        return _penalty_backward(*ctx.saved_tensors, grad, *ctx.options), None, None, None


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
) -> Tensor:
    """Exact per-token KL divergence over the whole vocabulary.

    reverse: KL(policy || ref) = sum_j p_j (log p_j - log q_j), the KL term of RLHF.
    forward: KL(ref || policy), the loss of distillation. Here p = softmax(logits / temperature) and
    q = softmax(ref_logits / temperature). The forward pass reads each tensor once. Differentiable
    in `logits` only.

    Args:
        logits: policy's logits [..., V], float32, bfloat16 or float16.
        ref_logits: reference's logits, same shape and dtype; a constant.
        mask: [...]; bool or integer, nonzero = keep, or floating with only 0 and 1. Masked tokens
            give 0 and no gradient, whatever their logits. None keeps everything.
        direction: "reverse" or "forward".
        temperature: a number between 2^-60 and 2^60; divides both tensors.

    Returns:
        [...], float32, never negative. +inf where the second distribution is 0 for a token to which
        the first gives mass. NaN for a row that holds NaN or +inf, or only -inf. The gradient of an
        infinite forward divergence is still (p - q) / T; that of an infinite reverse divergence is
        NaN where p > 0, else 0.

    Raises:
        TypeError: wrong dtype, or dtypes that differ.
        ValueError: shapes or devices that differ, unknown direction, temperature out of bounds.
    """
    op = "kl_divergence"
    checks.floating(op, "logits", logits, double=True)
    checks.floating(op, "ref_logits", ref_logits, double=True)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits must be [..., V] with V >= 1, got {shown(logits.shape)}")
    checks.same_shape(op, "ref_logits", ref_logits, "logits", logits.shape)
    checks.same_device(op, "ref_logits", ref_logits, "logits", logits.device)
    checks.same_dtype(op, "ref_logits", ref_logits, "logits", logits.dtype)
    option_checks.one_of(op, "direction", direction, DIRECTIONS)
    temperature = option_checks.positive(op, "temperature", temperature)
    mask = checks.row_mask(op, mask, "logits without V", logits.shape[:-1], logits.device)
    temperature_rules.check(op, temperature)
    backend = backends.select(op, logits.device)
    if backend == backends.REFERENCE:
        kl = reference.kl_divergence(
            logits, ref_logits, direction=direction, temperature=temperature
        )
    else:
        checks.floating(op, "logits", logits)
        reverse = direction == "reverse"
        kl = apply(op, _KlDivergence, logits, ref_logits.detach(), temperature, reverse, backend)
    # Kernels give a row with zero upstream gradient a zero gradient, even if it holds NaN.
    return kl if mask is None else torch.where(mask != 0, kl, 0)


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: KlEstimator = "k1",
) -> Tensor:
    """Per-token estimate of KL(policy || ref) from log-probabilities of sampled tokens.

    With x = logprobs - ref_logprobs (Schulman, "Approximating KL divergence", 2020):
    k1 = x; k2 = x^2 / 2; k3 = exp(-x) - 1 + x; abs = |x|. The suffix "+" keeps the value of the
    estimator but takes the gradient of k2 (straight-through), whose expectation is the gradient of
    the KL. As a loss term without "+", k1 has zero expected gradient and k3 a biased one.

    Args:
        logprobs: [...], float32, bfloat16 or float16; differentiated.
        ref_logprobs: [...], same shape, any of these dtypes; a constant.
        mask: the shape of logprobs; as in `kl_divergence`.
        estimator: "k1", "k2", "k3", "abs", or one of these with "+".

    Returns:
        [...], float32. k3 of x < -88 is +inf: it grows as exp(-x).

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes or devices that differ, unknown estimator.
    """
    op = "kl_penalty"
    checks.floating(op, "logprobs", logprobs, double=True)
    checks.floating(op, "ref_logprobs", ref_logprobs, double=True)
    checks.same_shape(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs.shape)
    checks.same_device(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs.device)
    option_checks.one_of(op, "estimator", estimator, KL_ESTIMATORS)
    mask = checks.row_mask(op, mask, "logprobs", logprobs.shape, logprobs.device)
    backend = backends.select(op, logprobs.device)
    if backend == backends.REFERENCE:
        kl = reference.kl_penalty(logprobs, ref_logprobs, estimator=estimator)
    else:
        checks.floating(op, "logprobs", logprobs)
        checks.floating(op, "ref_logprobs", ref_logprobs)
        kl = apply(op, _KlPenalty, logprobs, ref_logprobs.detach(), estimator, backend)
    return kl if mask is None else torch.where(mask != 0, kl, 0)
