"""topk_divergence: a teacher's K tokens and a bucket for the rest."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.testing import generator

N, V, K = 7, 40, 5
KINDS = (("forward", None), ("reverse", None), ("jsd", None), ("jsd", 0.2))


def models(dtype=torch.float32):
    g = generator(5)
    own, ref = (torch.randn(N, V, generator=g) * 2 for _ in range(2))
    logq, ids = ref.log_softmax(-1).topk(K, -1)
    return own.to(dtype), ids, logq


def plain(logp, logq, direction, beta):
    """From the formula, over lists of numbers."""
    p, q = ([math.exp(v) for v in x] for x in (logp, logq))
    p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if direction != "jsd":
        return kl(q, p) if direction == "forward" else kl(p, q)
    beta = 0.5 if beta is None else beta
    m = [(1 - beta) * x + beta * y for x, y in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_against_a_scalar_loop(direction, beta):
    logits, ids, logq = models()
    logp = logits.log_softmax(-1).gather(-1, ids)
    found = rk.topk_divergence(logp, logq, direction=direction, beta=beta)
    for i in range(N):
        expected = plain(logp[i].double().tolist(), logq[i].double().tolist(), direction, beta)
        assert found[i].item() == pytest.approx(expected, rel=1e-5)
    doubles, of_ref = logp.double().requires_grad_(), logq.double()
    # A token to which both give the same probability has the slope of its neighbours.
    of_ref[:, 1] = doubles[:, 1].detach()
    torch.autograd.gradcheck(
        lambda x: rk.topk_divergence(x, of_ref, direction=direction, beta=beta), doubles
    )


@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_all_but_one_token_give_the_divergence_of_the_vocabulary(backend, direction, beta):
    """From logits and from hidden states, value and gradient."""
    g = generator(6)
    hidden, weight = torch.randn(N, 6, generator=g), torch.randn(9, 6, generator=g)
    ref = torch.randn(N, 9, generator=g)
    ids = torch.arange(8).expand(N, 8)
    logq = ref.log_softmax(-1)[:, :8]
    options = {"direction": direction, "beta": beta}
    weight.requires_grad_()
    logp = rk.linear_token_logprobs(hidden, weight, ids).logprobs
    found = rk.topk_divergence(logp, logq, **options)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    logits = hidden @ weight.T
    expected = rk.kl_divergence(logits, ref, **options)
    (of_logits,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, of_logits, rtol=1e-3, atol=1e-4)
    again = rk.topk_divergence(rk.token_logprobs(hidden @ weight.T, ids).logprobs, logq, **options)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_extremes(direction, beta):
    options = {"direction": direction, "beta": beta}
    logits, ids, logq = models()
    logp = logits.log_softmax(-1).gather(-1, ids)
    equal = logq.clone().requires_grad_()
    kl = rk.topk_divergence(equal, logq, **options)
    assert (kl >= 0).all() and kl.max() < 1e-6
    assert torch.autograd.grad(kl.sum(), equal)[0].abs().max() < 1e-5
    # Masked tokens hold anything; K tokens without mass in one model or in both.
    mask = torch.arange(N) != 2
    dirty, of_ref = logp.clone(), logq.clone()
    dirty[2] = math.nan
    dirty[3, 1], of_ref[3, 1] = -math.inf, -math.inf
    dirty.requires_grad_()
    kl = rk.topk_divergence(dirty, of_ref, mask, **options)
    (gradient,) = torch.autograd.grad(kl.sum(), dirty)
    assert kl[2] == 0 and (gradient[2] == 0).all()
    assert kl.isfinite().all() and gradient.isfinite().all()
    # All of the mass on the K tokens: the rest is the resolution of the sum.
    whole = logq - logq.logsumexp(-1, keepdim=True)
    assert rk.topk_divergence(whole, logq, **options).isfinite().all()


def test_bad_arguments():
    *_, logq = models()
    with pytest.raises(ValueError, match="ref_logprobs must have"):
        rk.topk_divergence(logq, logq[:, :3])
    with pytest.raises(ValueError, match="beta is an option"):
        rk.topk_divergence(logq, logq, beta=0.5)
    with pytest.raises(ValueError, match="mask"):
        rk.topk_divergence(logq, logq, torch.ones(N, K))
    assert rk.topk_divergence(logq[:0], logq[:0]).shape == (0,)
