"""kl_divergence over the whole vocabulary, and kl_penalty, its per-token estimators."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DIRECTIONS, KL_ESTIMATORS, Direction, KlEstimator
from ..core import checks, option_checks, pair_options
from ..core.option_checks import shown
from ..core.pair_options import SAME, PairOptions, Same
from ..kernels import backends
from ._autograd import InputGradients, apply, once_differentiable, remember
from ._operator import define


@define("kl_divergence")
def _divergence(
    logits: Tensor, ref_logits: Tensor, options: PairOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = logits.shape[:-1]
    kl = logits.new_empty(shape, dtype=torch.float32)
    return kl, kl.new_empty((*shape, 5)), kl.new_empty(shape) if options.entropy else None


@define("kl_divergence_backward")
def _divergence_backward(
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    options: PairOptions,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@define("kl_penalty")
def _penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


@define("kl_penalty_backward")
def _penalty_backward(
    logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor, estimator: str, backend: str
) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


class KlDivergence(NamedTuple):
    """Result of `kl_divergence` and `linear_kl_divergence` with `entropy=True`; fp32 [...]."""

    kl: Tensor
    entropy: Tensor


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, options: PairOptions, backend: str
    ) -> Any:
        kl, stats, entropies = _divergence(logits, ref_logits, options, backend)
        remember(ctx, logits)
        ctx.save_for_backward(logits, ref_logits, stats)
        ctx.options = (options, backend)
        if not options.entropy:
            return kl
        ctx.mark_non_differentiable(entropies)
        return kl, entropies

    @staticmethod
    @once_differentiable("kl_divergence")
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> InputGradients:
        logits, ref_logits, stats = ctx.saved_tensors
        gradient = _divergence_backward(logits, ref_logits, stats, grad, *ctx.options)
        return gradient, None, None, None


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


def result(found: Any, options: PairOptions, mask: Tensor | None = None) -> Tensor | KlDivergence:
    """The public result for what an implementation returns; 0 where the mask is."""
    kl, of_policy = found if options.entropy else (found, None)
    if mask is not None:
        kl = torch.where(mask != 0, kl, 0)
        of_policy = None if of_policy is None else torch.where(mask != 0, of_policy, 0)
    return kl if of_policy is None else KlDivergence(kl, of_policy)


@overload
def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    entropy: Literal[True],
) -> KlDivergence: ...


@overload
def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    entropy: bool,
) -> Tensor | KlDivergence: ...


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    beta: float | None = None,
    ref_temperature: float | Same = SAME,
    softcap: float | None = None,
    ref_softcap: float | Same | None = SAME,
    entropy: bool = False,
) -> Tensor | KlDivergence:
    """Exact per-token divergence of two models over the whole vocabulary.

    With p = softmax(logits / temperature) of the policy (the student) and
    q = softmax(ref_logits / ref_temperature) of the reference (the teacher):

    reverse: KL(p || q) = sum_j p_j (log p_j - log q_j), the KL term of RLHF and of on-policy
        distillation.
    forward: KL(q || p), the loss of distillation.
    jsd: the generalised Jensen-Shannon divergence of GKD, beta KL(q || m) + (1 - beta) KL(p || m)
        with m = (1 - beta) p + beta q. As in TRL and Liger, beta = 0 is defined as forward and
        beta = 1 as reverse: the formula itself is 0 there, and its slope in beta is that of the
        forward divergence at 0 and of the reverse one at 1.

    The forward pass reads each tensor once, with "jsd" twice. Differentiable in `logits` only.

    Args:
        logits: policy's logits [..., V], float32, bfloat16 or float16.
        ref_logits: reference's logits, same shape and dtype; a constant.
        mask: [...]; bool or integer, nonzero = keep, or floating with only 0 and 1. Masked tokens
            give 0 and no gradient, whatever their logits. None keeps everything.
        direction: "reverse", "forward" or "jsd".
        temperature: a number between 2^-60 and 2^60; divides both tensors.
        beta: with "jsd" a number in [0, 1]; None is 0.5. None with the other directions.
        ref_temperature: divides ref_logits instead; "same" is `temperature`.
        softcap: c of c * tanh(logits / c), before the temperature (Gemma 2); None for none. It caps
            both tensors unless ref_softcap is given.
        ref_softcap: caps ref_logits instead; None for none, "same" is `softcap`. A teacher of
            another family needs its own: give what its configuration has.
        entropy: also return the policy's entropy, which has no gradient.

    Returns:
        [...], float32, never negative; with entropy=True a KlDivergence(kl, entropy). +inf where
        the second distribution is 0 for a token to which the first gives mass; never with "jsd".
        NaN for a row that holds NaN or +inf, or only -inf. The gradient of an infinite forward
        divergence is still (p - q) / T; that of an infinite reverse divergence is NaN where p > 0,
        else 0.

    Raises:
        TypeError: wrong dtype, or dtypes that differ.
        ValueError: shapes or devices that differ, unknown direction, a beta outside [0, 1] or
            without "jsd", a temperature or cap out of bounds.
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
    options = pair_options.checked(
        op, direction, beta, temperature, ref_temperature, softcap, ref_softcap, entropy
    )
    mask = checks.row_mask(op, mask, "logits without V", logits.shape[:-1], logits.device)
    backend = backends.select(op, logits.device)
    if backend == backends.REFERENCE:
        found = reference.kl_divergence(
            logits,
            ref_logits,
            direction=direction,
            beta=beta,
            temperature=temperature,
            ref_temperature=ref_temperature,
            softcap=softcap,
            ref_softcap=ref_softcap,
            entropy=options.entropy,
        )
    else:
        checks.floating(op, "logits", logits)
        found = apply(op, _KlDivergence, logits, ref_logits.detach(), options, backend)
    # Kernels give a row with zero upstream gradient a zero gradient, even if it holds NaN.
    return result(found, options, mask)


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
