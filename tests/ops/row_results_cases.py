"""Every result of token_logprobs, and how they are judged together."""

import functools
import math

import torch

import rlhf_kernels as rk
from rlhf_kernels.testing import assert_within_budget, generator, to_float64

#: The results that have a gradient.
FIELDS = ("logprobs", "entropy", "collision", "lse")
EVERY = dict.fromkeys((*FIELDS[1:], "argmax"), True)


def plain(logits, labels, *, temperature=1.0, softcap=None):
    """The fields from their formulas in torch, in the dtype of the logits, at least fp32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / torch.as_tensor(temperature, dtype=z.dtype).reshape(-1, 1)
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0)).sum(-1)
    return {
        "logprobs": logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": entropy,
        "collision": p.square().sum(-1),
        "lse": z.logsumexp(-1),
        "argmax": logits.detach().argmax(-1),
    }


def ours(logits, labels, **options):
    found = rk.token_logprobs(logits, labels, **EVERY, **options)
    return {name: getattr(found, name) for name in (*FIELDS, "argmax")}


def run(function, logits, labels, upstream, **options):
    """The fields, and under "gradient" that of their sum weighted by `upstream`, by field."""
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf, labels, **options)
    total = sum((found[k] * u.to(found[k].dtype)).sum() for k, u in upstream.items())
    return found | {"gradient": torch.autograd.grad(total, leaf)[0]}


def weights(rows, seed=0):
    return dict(zip(FIELDS, torch.randn(len(FIELDS), rows, generator=generator(seed)), strict=True))


def check(logits, labels, upstream=None, *, run_kernel=None, formulas=plain, **options):
    """Every field, and the gradient of all together, within the budget of the fp64 result.

    `labels` are one per token, or with the `formulas` of many_labels_cases several.
    """
    several = labels.dim() > 1
    upstream = weights(len(labels)) if upstream is None else upstream
    kernel = functools.partial(run, ours) if run_kernel is None else run_kernel
    found = kernel(logits, labels, upstream, **options)
    working = run(formulas, logits, labels, upstream, **options)
    exact = run(formulas, to_float64(logits), labels, upstream, **to_float64(options))
    z = logits.detach().double()
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    t = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    # The largest logit and the logarithm of the sum: what the results are differences of.
    size = (z / t).abs().amax(-1) + math.log(max(2, z.shape[-1]))
    for name in FIELDS:
        scale = size.unsqueeze(-1) if several and name == "logprobs" else size
        assert_within_budget(found[name], exact[name], working[name], scale=scale)
    assert found["argmax"].dtype is torch.int64
    assert torch.equal(found["argmax"], exact["argmax"])
    logp = (z / t).log_softmax(-1)
    g = 2 * sum(u.double().abs().reshape(len(z), -1).sum(-1, keepdim=True)
                for u in upstream.values())  # fmt: skip
    amplitude = g * (1 + logp.abs() + exact["entropy"].detach().abs().unsqueeze(-1))
    # p is as exact as its exponent. Probabilities below the smallest normal float count as zero.
    tiny = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    scale = (logp.exp() * (1 + logp.abs()) + tiny) * amplitude / t
    # Near the cap, and for equal logits, tanh leaves one rounding of the cap.
    scale = scale * (1 + (cap or 0.0) / t)
    if several:
        # At its own column a label's upstream gradient stands alone; that of equal ones adds up.
        alone = upstream["logprobs"].double().abs()
        scale += torch.zeros_like(z).scatter_add_(-1, labels.clamp(min=0), alone) / t
    assert_within_budget(found["gradient"], exact["gradient"], working["gradient"], scale=scale)
    return found
