"""Calls of every operation for the tests of a GPU, and how they are compared."""

import contextlib

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.kernels import triton
from rlhf_kernels.ops import _calls
from rlhf_kernels.testing import assert_bitwise_equal

KERNELS = [f for f in _calls.OPERATIONS if f.__name__ in triton.launchers()]
each_kernel = pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)


#: Operations over a head, which never wait where they are told how many tokens there are.
HEADS = [rk.linear_token_logprobs, rk.linear_kl_divergence, rk.linear_policy_loss]
each_call = pytest.mark.parametrize("function", [*KERNELS, *HEADS], ids=lambda f: f.__name__)


def example(function, device, *, rows=5, size=1031, dtype=torch.float32, seed=0):
    if function is rk.linear_policy_loss:
        # From 15,361 on one kernel of CUDA's makes statistics, loss and gradient of a row.
        size = max(size, 20_011)
    g = torch.Generator().manual_seed(seed)
    call = _calls.example(function, _calls.Inputs(rows, size, dtype, device, g))
    if function in HEADS:
        call.options["kept_tokens"] = call.tensors["hidden"].shape[:-1].numel()
    return call


def moved(call, device):
    """The call with tensors of their own on `device`."""
    tensors = {k: t.detach().to(device, copy=True).requires_grad_(t.requires_grad)
               for k, t in call.tensors.items()}  # fmt: skip
    return call._replace(tensors=tensors)


run = _calls.results


class Step:
    """Forward and backward on fixed tensors, without anything that copies from the host."""

    def __init__(self, call):
        self.call = call
        # Also compiles.
        results = list(_calls.tensors(call.run()))
        self.leaves = [t for t in call.tensors.values() if t.requires_grad]
        self.upstream = [torch.ones_like(r) if r.requires_grad else None for r in results]

    def __call__(self):
        results = list(_calls.tensors(self.call.run()))
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


STEPS = {"mask": _calls.GIVEN, "gamma": 0.99}
#: Operations whose rows have nothing to do with each other, by name -> options.
ROWWISE = {
    "token_logprobs": {"entropy": True, "temperature": 0.7},
    "kl_divergence": {"temperature": 0.7},
    "kl_penalty": {"estimator": "k3"},
    "gae": STEPS,
    "discounted_returns": STEPS,
}
ROWWISE = {k: v for k, v in ROWWISE.items() if k in triton.launchers()}
OF_TOKENS = [name for name in ROWWISE if not _calls.OPERATIONS[getattr(rk, name)].length]


def rowwise(name, rows, size, dtype, device, seed=0):
    """(step, inputs): step(*inputs) returns results and gradients. All inputs are by rows."""
    function, g = getattr(rk, name), torch.Generator().manual_seed(seed)
    call = _calls.call(function, _calls.Inputs(rows, size, dtype, device, g), **ROWWISE[name])
    results = list(_calls.tensors(call.run())) if call.differentiable else []
    upstream = [torch.randn(r.shape, generator=g).to(device) for r in results]

    def step(*given):
        own = dict(zip(call.tensors, given, strict=False))
        made = call._replace(tensors=own).requiring(*call.differentiable)
        found = list(_calls.tensors(made.run()))
        if not upstream:
            return found
        leaves = [made.tensors[k] for k in call.differentiable]
        return [*found, *torch.autograd.grad(found, leaves, given[len(own) :])]

    return step, [*call.tensors.values(), *upstream]
