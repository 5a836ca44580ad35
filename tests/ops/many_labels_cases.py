"""Several labels per token: their results from the formulas."""

import math

import torch

from tests.ops import row_results_cases
from tests.ops.row_results_cases import plain, weights

from rlhf_kernels.testing import generator


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


def check(logits, labels, upstream=None, **options):
    """`row_results_cases.check` of several labels per token."""
    upstream = upstreams(labels) if upstream is None else upstream
    return row_results_cases.check(logits, labels, upstream, formulas=exact_fields, **options)


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
