"""Terms of the field's policy losses in float64, of a namespace `t` of tensors [B, T]."""

import math

import torch


def mean(x, t):
    """Over the kept tokens."""
    return (x * t.mask).sum() / t.mask.sum()


def row(t, m):
    """Mean over each sequence's kept tokens, [B, 1]."""
    return (t * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)


def of_rows(x, t):
    """Mean over sequences of their means."""
    return row(x, t.mask).mean()


def ratio(t):
    return torch.exp(t.logprobs - t.old)


def clipped(r, a, low=0.2, high=0.2):
    return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def k3(t):
    x = t.ref - t.logprobs
    return torch.exp(x) - x - 1


def dual(t, c=3.0):
    loss, a = clipped(ratio(t), t.advantages), t.advantages
    return torch.where(a < 0, torch.minimum(loss, -a * c), loss)


def two_sided(t, delta=1.6):
    r, a = ratio(t), t.advantages
    return -torch.minimum(r.clamp(max=delta) * a, r.clamp(0.8, 1.2) * a)


def sequence_ratio(t, *, per_token=False):
    s = torch.exp(row(t.logprobs - t.old, t.mask))
    if not per_token:
        return s.expand_as(t.logprobs)
    return s.detach() * torch.exp(t.logprobs - t.logprobs.detach())


def sapo(t):
    r, a = ratio(t), t.advantages
    tau = torch.where(a > 0, 1.0, 1.05).double()
    return -a * torch.sigmoid(tau * (r - 1)) * 4 / tau


def cispo(t, low=0.8, high=1.2):
    return -t.advantages * ratio(t).detach().clamp(low, high) * t.logprobs


def tv_keep(t, q, low=0.05, high=0.05):
    d = (torch.exp(t.logprobs) - torch.exp(q)).detach()
    dropped = ((t.advantages > 0) & (d > high)) | ((t.advantages < 0) & (d < -low))
    return (~dropped).double()


def binary_kl_keep(t, bound=0.01):
    p, q = torch.exp(t.logprobs).detach(), torch.exp(t.old)
    kl = q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p).clamp(min=1e-8))
    above, a = p > q, t.advantages
    return (~((kl > bound) & ((above & (a > 0)) | (~above & (a < 0))))).double()


def within(x, low, high):
    return ((x >= low) & (x <= high)).double()


def mismatch(t):
    return torch.exp(t.old - t.rollout)


def sequence_mismatch(t, *, average):
    x = (t.old - t.rollout) * t.mask
    total = x.sum(1, keepdim=True)
    return torch.exp(total / t.mask.sum(1, keepdim=True) if average else total)


def geometric_mean(t, bound=0.4):
    x = t.logprobs - t.old
    cut = torch.where(t.advantages > 0, x.clamp(max=bound), x.clamp(min=-bound))
    return torch.exp((cut * t.mask).sum(1, keepdim=True) / t.mask.sum(1, keepdim=True))


def vespo(t):
    log_w = ((t.logprobs - t.old).clamp(-20, 20) * t.mask).sum(1, keepdim=True).detach()
    log_w = log_w.clamp(math.log(1e-8), 20)
    k, lam = (torch.where(t.advantages >= 0, *pair).double() for pair in ((2.0, 3.0), (3.0, 2.0)))
    return -torch.exp(lam + k * log_w - lam * torch.exp(log_w)) * t.advantages * t.logprobs


def covariance(t):
    a = t.advantages - mean(t.advantages, t)
    return (a * (t.logprobs - mean(t.logprobs, t))).detach()


def fipo(t):
    x, found = ((t.logprobs - t.old) * t.mask).detach(), []
    total = torch.zeros(6, dtype=torch.float64)
    for i in reversed(range(40)):
        kept = t.mask[:, i]
        total = torch.where(kept, x[:, i] + 0.9 * total, total)
        found.append(total)
    return torch.exp(torch.stack(found[::-1], 1)).clamp(0.8, 1.2)
