"""Calls of every operation for the tests of a GPU, and how they are compared."""

import contextlib

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.kernels import triton
from rlhf_kernels.ops import _examples
from rlhf_kernels.testing import assert_bitwise_equal

KERNELS = [f for f in _examples.EXAMPLES if f.__name__ in triton.launchers()]
each_kernel = pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)


def example(function, device, *, rows=5, size=1031, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return _examples.EXAMPLES[function](_examples.Inputs(rows, size, dtype, device, g))


def moved(call, device):
    """The arguments of a call as tensors of their own on `device`."""

    def move(v):
        if not isinstance(v, torch.Tensor):
            return v
        return v.detach().to(device, copy=True).requires_grad_(v.requires_grad)

    return tuple(map(move, call[0])), {k: move(v) for k, v in call[1].items()}


def inputs_of(call):
    return [v for v in (*call[0], *call[1].values()) if isinstance(v, torch.Tensor)]


def forward(function, call):
    return list(_examples.tensors(function(*call[0], **call[1])))


def run(function, call):
    """Results and gradients."""
    results = forward(function, call)
    return [r.detach() for r in results] + _examples.gradients(results, call)


class Step:
    """Forward and backward on fixed tensors, without anything that copies from the host."""

    def __init__(self, function, call):
        self.function, self.call = function, call
        # Also compiles.
        results = forward(function, call)
        self.leaves = [t for t in inputs_of(call) if t.requires_grad]
        self.upstream = [torch.ones_like(r) if r.requires_grad else None for r in results]

    def __call__(self):
        results = forward(self.function, self.call)
        pairs = [(r, u) for r, u in zip(results, self.upstream, strict=True) if u is not None]
        if not pairs:
            return results
        outputs, upstream = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, self.leaves, upstream, allow_unused=True)
        return [r.detach() for r in results] + [g for g in grads if g is not None]


def assert_all_equal(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, e)


@contextlib.contextmanager
def compilations():
    """List of the kernels that Triton compiles, or loads, inside."""
    import triton as compiler

    names = []
    runtime = compiler.knobs.runtime
    before = runtime.jit_post_compile_hook
    runtime.jit_post_compile_hook = lambda *, repr, **_: names.append(repr)
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before


def _token_logprobs(logits, labels, g, h):
    logits.requires_grad_()
    r = rk.token_logprobs(logits, labels, entropy=True, temperature=0.7)
    return [*r, *torch.autograd.grad(tuple(r), logits, (g, h))]


def _kl_divergence(logits, ref, g):
    kl = rk.kl_divergence(logits.requires_grad_(), ref, temperature=0.7)
    return [kl, *torch.autograd.grad(kl, logits, g)]


def _kl_penalty(logprobs, ref, g):
    kl = rk.kl_penalty(logprobs.requires_grad_(), ref, estimator="k3")
    return [kl, *torch.autograd.grad(kl, logprobs, g)]


# Operations whose rows have nothing to do with each other -> (call, what its tensors are).
ROWWISE = {
    "token_logprobs": (_token_logprobs, ("rows", "labels", "one", "one")),
    "kl_divergence": (_kl_divergence, ("rows", "rows", "one")),
    "kl_penalty": (_kl_penalty, ("tokens", "tokens", "upstream")),
    "gae": (lambda r, v, m: [*rk.gae(r, v, mask=m, gamma=0.99)], ("tokens", "tokens", "mask")),
    "discounted_returns": (
        lambda r, m: [rk.discounted_returns(r, mask=m, gamma=0.99)],
        ("tokens", "mask"),
    ),
}
ROWWISE = {k: v for k, v in ROWWISE.items() if k in triton.launchers()}


def rowwise_inputs(kinds, rows, size, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = {
        "rows": lambda: (4 * torch.randn(rows, size, generator=g)).to(dtype),
        "tokens": lambda: torch.randn(rows, size, generator=g).to(dtype),
        "upstream": lambda: torch.randn(rows, size, generator=g),
        "labels": lambda: torch.randint(0, size, (rows,), generator=g),
        "mask": lambda: torch.rand(rows, size, generator=g) < 0.8,
        "one": lambda: torch.randn(rows, generator=g),
    }
    return [make[kind]().to(device) for kind in kinds]
