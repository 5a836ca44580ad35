"""Problems with a support, and how to run them: from logits and from hidden states."""

import torch

import rlhf_kernels as rk
from rlhf_kernels.testing import assert_within_budget, generator

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"softcap": 30.0, "temperature": 1.3},
]
VOCAB, HIDDEN = 97, 21
# A row, a word more than that, a tile, more than a block of a kernel, everything.
SIZES = (1, 2, 3, 31, 33, 64, 96, 97)


def supports(sizes, vocab, labels, *, outside=(), seed=0, dtype=torch.int64):
    """Unsorted lists of these sizes that hold the token's label, except for tokens `outside`."""
    g = generator(seed)
    lists = []
    for n, (size, label) in enumerate(zip(sizes, labels.tolist(), strict=True)):
        words = torch.randperm(vocab, generator=g)
        if size and 0 <= label < vocab:
            rest = words[words != label]
            words = rest if n in outside else torch.cat([words[words == label], rest])
        words = words[:size]
        lists.append(words[torch.randperm(words.numel(), generator=g)])
    indptr = torch.tensor([0, *(len(words) for words in lists)]).cumsum(0)
    return indptr.to(dtype), torch.cat(lists).to(dtype)


def problem(sizes, dtype, *, vocab=VOCAB, outside=(), seed=0, spread=3.0):
    """(logits, labels, support)"""
    g = generator(seed)
    logits = (torch.randn(len(sizes), vocab, generator=g) * spread).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (len(sizes),), generator=g)
    return logits, labels, supports(sizes, vocab, labels, outside=outside, seed=seed)


def head_problem(sizes, dtype, *, vocab=VOCAB, hidden=HIDDEN, outside=(), seed=0):
    """((hidden, weight, bias), labels, support)"""
    g = generator(seed)
    operands = (
        torch.randn(len(sizes), hidden, generator=g),
        torch.randn(vocab, hidden, generator=g) * 0.5,
        torch.randn(vocab, generator=g),
    )
    operands = tuple(t.to(dtype).requires_grad_() for t in operands)
    labels = torch.randint(0, vocab, (len(sizes),), generator=g)
    return operands, labels, supports(sizes, vocab, labels, outside=outside, seed=seed)


def run(logits, labels, support, upstream, **options):
    """(logprobs, entropy, gradient)"""
    found = rk.token_logprobs(logits, labels, support=support, entropy=True, **options)[:2]
    return *found, *torch.autograd.grad(found, logits, list(upstream))


def run_head(operands, labels, support, upstream, **options):
    """(logprobs, entropy, gradients of the operands that require one)"""
    hidden, weight, bias = operands
    found = rk.linear_token_logprobs(
        hidden, weight, labels, bias=bias, support=support, entropy=True, **options
    )[:2]
    wanted = [t for t in operands if t is not None and t.requires_grad]
    return *found, *torch.autograd.grad(found, wanted, list(upstream))


def dense(function, inputs, labels, support, upstream, **options):
    """The same of a definition, on inputs of its own dtype."""
    found = function(*inputs, labels, *support, entropy=True, **options)[:2]
    wanted = [t for t in (*inputs, options.get("bias")) if t is not None and t.requires_grad]
    return *found, *torch.autograd.grad(found, wanted, [u.to(found[0].dtype) for u in upstream])


def within(support, shape):
    """[tokens, words], true for the words of the support; None without one."""
    if support is None:
        return None
    indptr, words = (t.long() for t in support)
    kept = torch.zeros(tuple(shape), dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(shape[0]), indptr.diff())
    kept[rows, words] = True
    return kept


def check(actual, plain, oracle, scales):
    for a, p, o, scale in zip(actual, plain, oracle, scales, strict=True):
        assert_within_budget(a, o, p, scale=scale)


def gradient_scale(oracle, upstream, options):
    """Size of dz: p rounds with its exponent, and the entropy's part with log p."""
    t = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    g, h = upstream.double().abs().unsqueeze(-1)
    size = 1 + oracle[1].detach().abs().unsqueeze(-1)
    return (g + h * size) * 8 / t * (1 + options.get("softcap", 0.0) / t)


def both_forms(labels, support):
    operands, _, _ = head_problem((1,) * labels.numel(), torch.float32)
    logits = torch.randn(labels.numel(), VOCAB, requires_grad=True)
    upstream = torch.ones(2, labels.numel())
    yield lambda: run(logits, labels, support, upstream)
    yield lambda: run_head(operands, labels, support, upstream)
