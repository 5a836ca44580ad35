"""Gradients of fp16 operands under a loss scale: rounded when they are scaled, not before."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.head.gemm import in_fp16

INF, NAN = float("inf"), float("nan")


def gradient(f, x, upstream):
    """The gradient of f in x."""
    x = x.clone().requires_grad_()
    f(x).backward(upstream)
    return x.grad


def fp16_case(n=256, width=16, vocab=96):
    hidden, weight = torch.randn(1, n, width).half(), (torch.randn(vocab, width) * 0.1).half()
    bias = (torch.randn(vocab) * 0.1).half()
    labels = torch.randint(0, vocab, (1, n))
    old = torch.log_softmax((hidden[0].double() @ weight.double().T) + bias.double(), -1)
    old = old.gather(1, labels[0, :, None]).reshape(1, n).float()
    advantages, mask = torch.randn(1, n) * 1e-3, torch.ones(1, n, dtype=torch.bool)
    return (hidden, weight, bias), (labels, old, advantages, mask)


def head_gradients(operands, tokens, config, scale, **options):
    operands = [t.clone().requires_grad_() for t in operands]
    labels, old, advantages, mask = tokens
    loss = rk.linear_policy_loss(
        *operands[:2],
        labels,
        old,
        advantages,
        mask=mask,
        bias=operands[2],
        config=config,
        **options,
    ).loss
    (loss * scale).backward()
    return [t.grad.double() / scale for t in operands]


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_loss_scaling_keeps_fp16_gradients(backend, name):
    # An interpreter needs milliseconds a row.
    operands, tokens = fp16_case(48 if backend in ("cuda", "triton") else 256)
    config = getattr(rk.PolicyLossConfig, name)(entropy_coef=1e-4)
    with rk.use_backend("reference"):
        exact = head_gradients([t.double() for t in operands], tokens, config, 1.0)
    for options in ({}, {"chunk_tokens": 20}, {"chunk_tokens": 32, "batch_invariant": True}):
        if options.get("batch_invariant") and backend == "reference":
            continue
        found = head_gradients(operands, tokens, config, 65536.0 * 16, **options)
        for got, want in zip(found, exact, strict=True):
            error = (got - want).norm() / want.norm()
            assert error < 4e-4, error
            assert ((got == 0) & (want != 0)).double().mean() < 2e-3


def test_fp16_gradients_do_not_overflow_on_the_way(backend):
    """A token's own gradient is 3e6 times what fp16 holds; what it is multiplied with is small."""
    (hidden, weight, bias), tokens = fp16_case(8, 8, 24)
    labels, old, _, mask = tokens
    hidden, weight = hidden * 2e-4, weight * 1e-4
    tokens = (labels, torch.full_like(old, -math.log(24)), torch.full((1, 8), 4e6), mask)
    config = rk.PolicyLossConfig.reinforce()
    with rk.use_backend("reference"):
        exact = head_gradients(
            [t.double() for t in (hidden, weight, bias * 0)], tokens, config, 1.0
        )
    found = head_gradients((hidden, weight, bias * 0), tokens, config, 1.0)
    for got, want in list(zip(found, exact, strict=True))[:2]:
        assert want.abs().max() < 65504 and got.isfinite().all()
        assert (got - want).norm() / want.norm() < 2e-3


@pytest.mark.parametrize("op", ["policy", "value"])
def test_loss_scaling_keeps_fp16_gradients_of_tokens(backend, op):
    x = torch.randn(1, 4096).half()
    constants = x.float() + torch.randn(1, 4096) * 1e-3, torch.randn(1, 4096) * 1e-3
    mask = torch.ones(1, 4096, dtype=torch.bool)

    def loss(x):
        if op == "policy":
            return rk.policy_loss(x, *constants, mask=mask).loss
        return rk.value_loss(x, *constants, mask=mask).loss

    scale = 2.0**20
    got = gradient(loss, x, torch.tensor(scale))
    with rk.use_backend("reference"):
        want = gradient(loss, x.double(), torch.tensor(1.0).double())
    error = (got.double() / scale - want).abs()
    assert bool((error <= 1e-3 * want.abs() + 1e-12).all())


def test_a_unit_per_token_depends_on_no_other_token():
    g = torch.randn(5, 40) * torch.tensor([1e-9, 1.0, 1e6, 0.0, 1e-30])[:, None]
    scaled, unit = in_fp16(g, (1,))
    alone, own = in_fp16(g[:1], (1,))
    assert torch.equal(scaled[:1], alone) and torch.equal(unit[:1], own)
    back = scaled.double() * unit.double()
    limit = 2**-11 * g.double().abs() + 2**-24 * g.double().abs().amax(1, keepdim=True)
    assert bool(((back - g.double()).abs() <= limit + 1e-44).all())
    both, unit = in_fp16(g, (0, 1))
    assert both.isfinite().all() and unit.shape == (1, 1)
    for bad in (NAN, INF):
        assert not in_fp16(torch.tensor([[bad, 1.0]]), (0, 1))[0].isfinite().all()
