"""Reference of the KL divergence over the vocabulary and its per-token estimators."""

from typing import Any

import torch
from torch import Tensor

from ..core import tracing
from ._common import compute, distances


def _mean_difference(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean of x - y under p, [..., 1]; a term with p = 0 is 0, even where y is -inf."""
    return (p * torch.where(p > 0, x - y, 0)).sum(-1, keepdim=True)


class _Divergence(torch.autograd.Function):
    """The divergence of softmax(x) and softmax(y), x and y [..., V] with maximum 0.

    Gradient in x. reverse: p_j (x_j - y_j - mean), with the mean of x - y under p; the log-sum-exp
    terms cancel. It is NaN where the divergence is infinite. forward: p_j - q_j, even where the
    divergence is infinite.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, reverse: bool) -> Tensor:
        if not reverse:
            x, y = y, x
        logp, logq = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
        kl = _mean_difference(logp.exp(), logp, logq).squeeze(-1)
        # Rounding may make kl negative. NaN stays.
        return torch.where(kl < 0, 0, kl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        p, grad = torch.softmax(x, -1), grad.unsqueeze(-1)
        if ctx.reverse:
            mean = _mean_difference(p, x, y)
            mean = torch.where(mean.isinf(), torch.nan, mean)
            slope = torch.where(p > 0, p * (x - y - mean), p)
        else:
            slope = p - torch.softmax(y, -1)
        return torch.where(grad == 0, 0, grad * slope), None, None


class _Sloped(torch.autograd.Function):
    """A zero upstream gradient gives zero, even where the slope is infinite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, estimator: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.estimator = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.estimator == "k1":
            return grad, None, None
        if ctx.estimator == "k2":
            slope = x
        elif ctx.estimator == "k3":
            slope = -torch.expm1(-x)
        else:  # "abs"; torch.sign would map NaN to 0
            slope = torch.where(x.isnan(), x, x.sign())
        return torch.where(grad == 0, 0, grad * slope), None, None


def kl_divergence(
    logits: Tensor, ref_logits: Tensor, *, direction: str = "reverse", temperature: float = 1.0
) -> Tensor:
    """sum_j P_j (log P_j - log Q_j); (P, Q) = (policy, ref) for reverse, (ref, policy) for forward.

    Args:
        logits: [..., V] of the policy, differentiated.
        ref_logits: [..., V] of the reference, a constant.
        direction: "reverse" or "forward".
        temperature: divides both tensors.

    Returns:
        The divergence [...], never negative.
    """
    tracing.refuse_tangents("kl_divergence", logits)
    policy = distances(compute(logits), temperature)
    ref = distances(compute(ref_logits).detach(), temperature)
    kl: Tensor = _Divergence.apply(policy, ref, direction == "reverse")
    return kl


def kl_estimate(x: Tensor, estimator: str) -> Tensor:
    """k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, abs = |x| of x = logprobs - ref_logprobs."""
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        e = torch.expm1(-x)
        # At x = -inf the sum would be inf - inf = NaN.
        return torch.where(e.isinf(), e, e + x)
    return x.abs()


def sloped(x: Tensor, value: Tensor, estimator: str) -> Tensor:
    """`value` [...] with the gradient of an estimator in x [...]."""
    tracing.refuse_tangents("the gradient of a KL estimator", x)
    result: Tensor = _Sloped.apply(x, value, estimator)
    return result


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || ref) on samples of the policy (Schulman, 2020).

    Args:
        logprobs: [...], differentiated.
        ref_logprobs: [...], a constant.
        estimator: k1, k2, k3 or abs. A suffix "+" keeps the value but takes the gradient of k2,
            whose expectation is the gradient of the KL.

    Returns:
        The estimates [...].
    """
    x = compute(logprobs) - compute(ref_logprobs).detach()
    plain = estimator.removesuffix("+")
    return sloped(x, kl_estimate(x.detach(), plain), "k2" if plain != estimator else plain)
