"""Calls without a gradient go straight to a kernel; under transforms of torch.func and in forward
mode they must not, since a tensor of the usual type then stands for more than its memory.
"""

import pytest
import torch
from torch.autograd import forward_ad

import rlhf_kernels as rk
from rlhf_kernels.ops import _calls

B, T, V = 2, 3, 5
LABELS = torch.arange(B * T).reshape(B, T) % V
MASK = torch.ones(B, T, dtype=torch.bool)

HEAD = torch.linspace(-1, 1, V * 4).view(V, 4)

# By name: a call of one tensor, and the shape of that.
CALLS = {
    "token_logprobs": (lambda x: rk.token_logprobs(x, LABELS).logprobs, (B, T, V)),
    "policy_loss": (lambda x: rk.policy_loss(x, 0.9 * x, x, MASK).loss, (B, T)),
    "value_loss": (lambda x: rk.value_loss(x, 0.9 * x, -x, MASK).loss, (B, T)),
    "gae": (lambda x: rk.gae(x, -x, mask=MASK).advantages, (B, T)),
    "kl_penalty": (lambda x: rk.kl_penalty(x, -x), (B, T)),
    "kl_divergence": (lambda x: rk.kl_divergence(x, -x), (B, T, V)),
    "linear_token_logprobs": (
        lambda x: rk.linear_token_logprobs(x, HEAD, LABELS, entropy=True, kept_tokens=B * T)[1],
        (B, T, 4),
    ),
}


def _by_tensor(call, name):
    """A weighted sum of the results as a function of the tensor `name`."""

    def run(x):
        found = list(_calls.tensors(call.run({**call.tensors, name: x})))
        return sum((r * torch.linspace(0.5, 1.5, r.numel()).view(r.shape)).sum() for r in found)

    return run


def _differentiable():
    inputs = _calls.Inputs(2, 6, torch.float32, torch.device("cpu"), torch.Generator())
    for function in _calls.OPERATIONS:
        for call in _calls.examples(function, inputs):
            for name in call.differentiable:
                yield pytest.param(call, name, id=f"{call.op}-{name}-{'support' in call.tensors}")


def _batched(f, x):
    leaf = x.clone().requires_grad_()
    upstream = torch.ones(2)
    return torch.autograd.grad(f(leaf), leaf, upstream, is_grads_batched=True)[0][1]


# By name: a gradient of f at x by one of torch's other ways.
DERIVATIVES = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))[1],
    "is_grads_batched": _batched,
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.fixture(autouse=True)
def _cpu():
    with rk.use_backend("cpu"):
        yield


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_what_one_call_each_does(name):
    call, shape = CALLS[name]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([call(part) for part in x])
    torch.testing.assert_close(torch.func.vmap(call)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "gae"])
def test_a_tangent_is_refused_and_not_dropped(name, implementation):
    call, shape = CALLS[name]
    if implementation == "reference" and name in ("policy_loss", "value_loss"):
        pytest.skip("plain torch, which has a forward mode")
    refused = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with rk.use_backend(implementation), forward_ad.dual_level(), refused:
        call(forward_ad.make_dual(torch.ones(shape), torch.ones(shape)))


@pytest.mark.parametrize("call, name", _differentiable())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_other_ways_to_a_gradient_are_right_or_refused_in_a_sentence(call, name):
    call = call.requiring()
    f, x = _by_tensor(call, name), call.tensors[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    in_torch = call.function in (rk.preference_loss, rk.kto_loss, rk.reward_model_loss)
    in_torch = in_torch or call.function is rk.sequence_logprobs
    for way, derivative in DERIVATIVES.items():
        if not in_torch:
            with pytest.raises(NotImplementedError, match=f"{call.op}: its kernels have no grad"):
                derivative(f, x)
        with rk.use_backend("reference"):
            found = derivative(f, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=way)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_where_none_is_asked_for(name, context):
    call, shape = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with context():
        assert call(x).grad_fn is None
    assert call(x.detach()).grad_fn is None
