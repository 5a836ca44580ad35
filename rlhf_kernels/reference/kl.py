"""Reference of the KL divergence over the vocabulary and its per-token estimators."""

from typing import Any

import torch
from torch import Tensor

from ..core import tracing
from ..core.pair_options import SAME
from ._common import compute, distances, with_options


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


class _Mixture(torch.autograd.Function):
    """beta KL(q || m) + (1 - beta) KL(p || m) of p = softmax(x) and q = softmax(y).

    m = (1 - beta) p + beta q. Gradient in x: (1 - beta) p_j (log(p_j / m_j) - KL(p || m)).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, beta: float) -> Tensor:
        logp, logq = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
        of_p, of_q = mixture_terms(logp, logq, beta)
        mean_p = _mean_difference(logp.exp(), of_p, torch.zeros_like(of_p))
        mean_q = _mean_difference(logq.exp(), of_q, torch.zeros_like(of_q))
        kl = (beta * mean_q + (1 - beta) * mean_p).squeeze(-1)
        return torch.where(kl < 0, 0, kl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.beta = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logp, logq = (torch.log_softmax(t, -1) for t in ctx.saved_tensors)
        p, grad = logp.exp(), grad.unsqueeze(-1)
        of_p, _ = mixture_terms(logp, logq, ctx.beta)
        excess = of_p - _mean_difference(p, of_p, torch.zeros_like(of_p))
        slope = torch.where(p > 0, (1 - ctx.beta) * p * excess, p)
        return torch.where(grad == 0, 0, grad * slope), None, None


def mixture_terms(logp: Tensor, logq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m), m = (1 - beta) p + beta q; NaN where p and q are 0.

    Relative to the larger of p and q, so nothing overflows and close p and q lose no digits.
    """
    d = logp - logq
    smaller = d < 0
    # Not abs, whose slope of 0 at 0 is neither side's.
    below = torch.where(smaller, d, -d)
    log_m = torch.log1p(torch.where(smaller, 1 - beta, beta) * torch.expm1(below))
    return torch.where(smaller, d - log_m, -log_m), torch.where(smaller, -log_m, -log_m - d)


class _Capped(torch.autograd.Function):
    """cap * tanh(x / cap). A zero upstream gradient gives zero, even where x is NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cap: float) -> Tensor:
        return with_options(x, softcap=cap)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.cap = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # 1 - tanh^2 would cancel near the cap.
        slope = torch.cosh(x / ctx.cap).square().reciprocal()
        return torch.where(grad == 0, 0, grad * slope), None


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


def _scaled_distances(z: Tensor, softcap: float | None, temperature: float) -> Tensor:
    z = compute(z)
    if softcap is not None:
        z = _Capped.apply(z, softcap)
    return distances(z, temperature)


def _entropy(x: Tensor) -> Tensor:
    """The entropies [...] of softmax(x); they have no gradient."""
    logp = torch.log_softmax(x.detach(), -1)
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, 0)).sum(-1)


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    beta: float | None = None,
    temperature: float = 1.0,
    ref_temperature: float | str = SAME,
    softcap: float | None = None,
    ref_softcap: float | str | None = SAME,
    entropy: bool = False,
) -> Any:
    """sum_j P_j (log P_j - log Q_j); (P, Q) = (policy, ref) for reverse, (ref, policy) for forward.

    Args:
        logits: [..., V] of the policy, differentiated.
        ref_logits: [..., V] of the reference, a constant.
        direction: "reverse", "forward", or "jsd" for the generalised Jensen-Shannon divergence.
        beta: of "jsd", in [0, 1].
        temperature, ref_temperature: divide the logits; "same" is the policy's.
        softcap, ref_softcap: caps of the logits.
        entropy: also returns the policy's entropies.

    Returns:
        The divergence [...], never negative; with `entropy` (divergence, entropy).
    """
    tracing.refuse_tangents("kl_divergence", logits)
    own_cap = softcap if isinstance(ref_softcap, str) else ref_softcap
    own_temperature = temperature if isinstance(ref_temperature, str) else ref_temperature
    policy = _scaled_distances(logits, softcap, temperature)
    ref = _scaled_distances(ref_logits.detach(), own_cap, own_temperature)
    if direction == "jsd":
        beta = 0.5 if beta is None else beta
        if beta in (0.0, 1.0):
            direction = "reverse" if beta else "forward"
    if direction == "jsd":
        kl = _Mixture.apply(policy, ref, beta)
    else:
        kl = _Divergence.apply(policy, ref, direction == "reverse")
    return (kl, _entropy(policy)) if entropy else kl


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
