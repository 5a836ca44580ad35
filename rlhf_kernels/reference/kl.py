"""KL divergence over the vocabulary and its per-token estimators, defined."""

import torch
from torch import Tensor

from ._common import compute


def kl_divergence(
    logits: Tensor, ref_logits: Tensor, *, direction: str = "reverse", temperature: float = 1.0
) -> Tensor:
    """sum_j P_j (log P_j - log Q_j); (P, Q) = (policy, ref) for reverse, (ref, policy) for forward.

    Args:
        logits: [..., V] of the policy, differentiated.
        ref_logits: [..., V] of the reference, a constant.
        direction: "reverse" or "forward".
        temperature: divides both.

    Returns:
        The divergence [...], never negative.
    """
    logp = torch.log_softmax(compute(logits) / temperature, dim=-1)
    logq = torch.log_softmax(compute(ref_logits).detach() / temperature, dim=-1)
    if direction == "forward":
        logp, logq = logq, logp
    p = logp.exp()
    # A term of weight zero is zero, also where both log-probabilities are -inf.
    terms = p * (torch.where(p > 0, logp, 0) - torch.where(p > 0, logq, 0))
    kl = terms.sum(-1)
    # Rounding may take it below zero: the value is clamped, the gradient is not cut off.
    return kl + (kl.detach().clamp(min=0) - kl.detach()).nan_to_num(posinf=0.0)


def kl_estimate(x: Tensor, estimator: str) -> Tensor:
    """k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, abs = |x| of x = logprobs - ref_logprobs."""
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        return torch.expm1(-x) + x
    return x.abs()


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || ref) on samples of the policy (Schulman, 2020).

    Args:
        logprobs: [...], differentiated.
        ref_logprobs: [...], a constant.
        estimator: k1, k2, k3 or abs; a suffix "+" keeps the value and takes the gradient of k2,
            which is the one whose expectation is the gradient of the KL.

    Returns:
        The estimates [...].
    """
    x = compute(logprobs) - compute(ref_logprobs).detach()
    value = kl_estimate(x, estimator.removesuffix("+"))
    if not estimator.endswith("+"):
        return value
    k2 = kl_estimate(x, "k2")
    # Value of the estimator to the bit; k2 - k2 is 0 but for its gradient.
    return torch.where(x.isfinite(), value.detach() + (k2 - k2.detach()), value.detach())
