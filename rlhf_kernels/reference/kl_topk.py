"""The divergence of two distributions over K tokens and a bucket for the rest, in plain torch."""

import math

import torch
from torch import Tensor

from ._common import compute
from .kl import mixture_terms

#: The least mass of the rest, the resolution of a sum of fp32 probabilities.
LEAST = 2.0**-23


def _with_rest(logprobs: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1] of K tokens and of none of them."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
    return torch.cat((logprobs, rest.log()), -1)


def _mean(logp: Tensor, term: Tensor) -> Tensor:
    """The mean [...] of a term under p; 0 where p is 0, even where the term is infinite."""
    p = logp.exp()
    return (p * torch.where(p > 0, term, 0)).sum(-1)


def topk_divergence(
    logprobs: Tensor, ref_logprobs: Tensor, keep: Tensor, reverse: bool, beta: float
) -> Tensor:
    """See `rlhf_kernels.topk_divergence`; `reverse` and `beta` as in PairOptions."""
    # A masked token may hold NaN, which must not reach the gradient: it gets an even distribution.
    even = -math.log(logprobs.shape[-1] + 1)
    kept = keep.unsqueeze(-1)
    logp = _with_rest(torch.where(kept, compute(logprobs), even))
    logq = _with_rest(torch.where(kept, compute(ref_logprobs).detach(), even))
    if beta > 0:
        # A token without mass in either has no term.
        neither = (logp == -torch.inf) & (logq == -torch.inf)
        own, ref = (torch.where(neither, 0, t) for t in (logp, logq))
        of_p, of_q = mixture_terms(own, ref, beta)
        kl = beta * _mean(logq, of_q) + (1 - beta) * _mean(logp, of_p)
    else:
        kl = _mean(logp, logp - logq) if reverse else _mean(logq, logq - logp)
    # Rounding may make it negative; the gradient stays. NaN stays.
    kl = kl - kl.detach().clamp(max=0)
    return torch.where(keep, kl, 0)
