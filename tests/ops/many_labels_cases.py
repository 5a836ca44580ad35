"""Several labels per token: their results from the formulas, and how ours are judged."""

import math

import torch

from tests.ops.row_results_cases import FIELDS, plain, weights

import rlhf_kernels as rk
from rlhf_kernels.testing import assert_within_budget, generator, to_float64

EVERY = dict.fromkeys((*FIELDS[1:], "argmax"), True)


def problem(rows, vocab, dtype, count, *, seed=0):
    """Logits, and labels of which some are ignored and some come twice."""
    g = generator(seed)
    logits = (torch.randn(rows, vocab, generator=g) * 4).to(dtype)
    labels = torch.randint(0, vocab, (rows, count), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
    if rows > 2:
        labels[1] = -100
        labels[2] = labels[2, 0].clamp(min=0)
    return logits.requires_grad_(), labels


def upstreams(labels):
    """Upstream gradients of the fields; those of log-probabilities are like the labels."""
    found = weights(math.prod(labels.shape[:-1]))
    found = {name: u.view(labels.shape[:-1]) for name, u in found.items()}
    found["logprobs"] = torch.randn(labels.shape, generator=generator(1))
    return found


def exact_fields(logits, labels, **options):
    """From the formulas in torch; 0 (or -1) for what is ignored."""
    wanted = labels >= 0
    keep = wanted.any(-1)
    x = torch.where(keep.unsqueeze(-1), logits, 0)
    of_tokens = plain(x, labels.clamp(min=0)[:, 0], **options)
    z = x if x.dtype == torch.float64 else x.float()
    cap, t = options.get("softcap"), torch.as_tensor(options.get("temperature", 1.0))
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = (z / t.to(z.dtype).reshape(-1, 1)).log_softmax(-1)
    found = {name: torch.where(keep, t, -1 if name == "argmax" else 0)
             for name, t in of_tokens.items()}  # fmt: skip
    return found | {"logprobs": torch.where(wanted, logp.gather(-1, labels.clamp(min=0)), 0)}


def ours(logits, labels, **options):
    found = rk.token_logprobs(logits, labels, **EVERY, **options)
    return {name: getattr(found, name) for name in (*FIELDS, "argmax")}


def run(function, logits, labels, upstream, **options):
    """The fields, and under "gradient" that of their sum weighted by `upstream`."""
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf, labels, **options)
    total = sum((found[k] * u.to(found[k].dtype)).sum() for k, u in upstream.items())
    return found | {"gradient": torch.autograd.grad(total, leaf)[0]}


def check(logits, labels, upstream=None, *, run_kernel=None, **options):
    """Every field, and the gradient of all together, within the budget of the fp64 result."""
    upstream = upstreams(labels) if upstream is None else upstream
    if run_kernel is None:
        found = run(ours, logits, labels, upstream, **options)
    else:
        found = run_kernel(logits, labels, upstream, **options)
    working = run(exact_fields, logits, labels, upstream, **options)
    exact = run(exact_fields, to_float64(logits), labels, upstream, **to_float64(options))
    z, cap = logits.detach().double(), options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    t = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    size = (z / t).abs().amax(-1) + math.log(max(2, z.shape[-1]))
    for name in FIELDS:
        scale = size.unsqueeze(-1) if name == "logprobs" else size
        assert_within_budget(found[name], exact[name], working[name], scale=scale)
    assert torch.equal(found["argmax"], exact["argmax"])
    logp = (z / t).log_softmax(-1)
    g = 2 * sum(u.double().abs().reshape(len(z), -1).sum(-1, keepdim=True)
                for u in upstream.values())  # fmt: skip
    amplitude = g * (1 + logp.abs() + exact["entropy"].detach().abs().unsqueeze(-1))
    tiny = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    scale = (logp.exp() * (1 + logp.abs()) + tiny) * amplitude / t * (1 + (cap or 0.0) / t)
    # At its own column a label's upstream gradient stands alone, and that of equal ones adds up.
    at_labels = torch.zeros_like(z).scatter_add_(
        -1, labels.clamp(min=0), upstream["logprobs"].double().abs()
    )
    assert_within_budget(found["gradient"], exact["gradient"], working["gradient"],
                         scale=scale + at_labels / t)  # fmt: skip
    return found


def head(seed=0, dtype=torch.float32, count=4):
    """(hidden, weight, bias), labels: products of few bits are exact in any order and dtype."""
    g = generator(seed)
    hidden, weight, bias = (torch.randint(-4, 5, shape, generator=g).to(dtype) / 4
                            for shape in ((21, 8), (259, 8), (259,)))  # fmt: skip
    labels = torch.randint(0, 259, (21, count), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
    labels[[3, 4, 20]] = -100
    labels[5] = 258
    return (hidden, weight, bias), labels
