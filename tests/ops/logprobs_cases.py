"""Inputs of token_logprobs, and how its results are judged."""

import math

import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import (
    assert_within_budget,
    generator,
    to_float64,
)

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"softcap": 30.0, "temperature": 1.3},
]


def problem(rows, vocab, dtype, *, spread=4.0, seed=0):
    g = generator(seed)
    logits = (torch.randn(rows, vocab, generator=g) * spread).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    return logits.requires_grad_(), labels


def run(function, logits, labels, upstream, **options):
    """(logprobs, entropy, gradient of both together) of one implementation."""
    logprobs, entropy, *_ = function(logits, labels, entropy=True, **options)
    loss = (logprobs * upstream[0]).sum() + (entropy * upstream[1]).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return logprobs, entropy, gradient


def run_here(*args, **options):
    return run(rk.token_logprobs, *args, **options)


def check_against_oracle(logits, labels, *, run_kernel=run_here, **options):
    """Values and gradient within the budget of the fp64 result on the same inputs."""
    upstream = torch.randn(2, *labels.shape)
    actual = run_kernel(logits, labels, upstream, **options)
    plain = run(reference.token_logprobs, logits, labels, upstream, **options)
    oracle = run(
        reference.token_logprobs, to_float64(logits), labels, upstream.double(),
        **to_float64(options),
    )  # fmt: skip
    # Magnitude of what a log-probability is a difference of.
    z = to_float64(logits).detach()
    scale = torch.maximum(
        oracle[0].abs(), torch.tensor(math.log(max(2, z.shape[-1])), dtype=torch.float64)
    )
    softcap = options.get("softcap")
    t = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    if softcap is not None:
        # A capped logit is rounded before it is divided.
        z = softcap * torch.tanh(z / softcap)
        scale = scale + (z.abs() / t).amax(-1)
    assert_within_budget(actual[0], oracle[0], plain[0], scale=scale)
    assert_within_budget(actual[1], oracle[1], plain[1], scale=scale)
    # dz_j = p_j (g + h (log p_j + H)); p_j is as exact as its exponent, which rounds with its size.
    logp = torch.log_softmax(z / t, -1)
    g, h = upstream.double().abs().unsqueeze(-1)
    amplitude = g + h * (logp.abs() + oracle[1].detach().abs().unsqueeze(-1))
    gradient_scale = logp.exp() * amplitude * (1 + logp.abs()) / t
    # Probabilities below the smallest normal float count as zero.
    tiny = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    gradient_scale = gradient_scale + tiny * (1 + amplitude) / t
    if softcap is not None:
        # Near the cap, and for equal logits, tanh leaves one rounding of the cap.
        gradient_scale = gradient_scale * (1 + softcap / t)
    assert_within_budget(actual[2], oracle[2], plain[2], scale=gradient_scale)
    assert oracle[2].abs().max() > 0 or z.shape[-1] == 1
