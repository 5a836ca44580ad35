"""Calls without a gradient go straight to a kernel; under transforms of torch.func and in forward
mode they must not, since a tensor of the usual type then stands for more than its memory.
"""

import pytest
import torch
from torch.autograd import forward_ad

from tests.cases import calls as cases

import rlhf_kernels as rk
from rlhf_kernels.kernels import triton
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


# By name: a gradient of f at x within torch.func, of which a kernel's gradient is no part.
WITHIN = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))[1],
}


def _one_each(result, x, upstream):
    rows = [torch.autograd.grad(result, x, u, retain_graph=True)[0] for u in upstream]
    return torch.stack(rows)


# By name: gradients of one result for several upstream gradients.
SEVERAL = {
    "is_grads_batched": lambda result, x, upstream: torch.autograd.grad(
        result, x, upstream, is_grads_batched=True, retain_graph=True
    )[0],
    "vmap": lambda result, x, upstream: torch.func.vmap(
        lambda u: torch.autograd.grad(result, x, u, retain_graph=True)[0]
    )(upstream),
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


@pytest.mark.parametrize("name", CALLS)
def test_functionalize_changes_nothing(name):
    call, shape = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.func.functionalize(call)(x), call(x))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "gae"])
def test_a_tangent_is_refused_and_not_dropped(name, implementation):
    call, shape = CALLS[name]
    if implementation == "reference" and name in ("policy_loss", "value_loss"):
        pytest.skip("plain torch, which has a forward mode")
    refused = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with rk.use_backend(implementation), forward_ad.dual_level(), refused:
        call(forward_ad.make_dual(torch.ones(shape), torch.ones(shape)))


@pytest.mark.parametrize("call, name", list(_differentiable()))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_gradient_within_torch_func_is_right_or_refused_in_a_sentence(call, name):
    call = call.requiring()
    f, x = _by_tensor(call, name), call.tensors[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    for way, derivative in WITHIN.items():
        if call.op not in cases.PLAIN:
            with pytest.raises(NotImplementedError, match=f"{call.op}: its kernels have no grad"):
                derivative(f, x)
        with rk.use_backend("reference"):
            found = derivative(f, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=way)


@pytest.mark.parametrize("implementation", ["cpu", *(["triton"] if triton.interpreted() else [])])
@pytest.mark.parametrize("call, name", list(_differentiable()))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_upstream_gradients_give_what_one_each_does(call, name, implementation):
    call = call.requiring()
    with rk.use_backend("auto" if call.op in cases.PLAIN else implementation):
        x = call.tensors[name].clone().requires_grad_()
        result = _by_tensor(call, name)(x)
        upstream = torch.tensor([1.0, 0.0, -0.7])
        expected = _one_each(result, x, upstream)
        for way, several in SEVERAL.items():
            assert torch.equal(several(result, x, upstream), expected), way
    jacobian = torch.autograd.functional.jacobian
    f, x = _by_tensor(call, name), x.detach()
    assert torch.equal(jacobian(f, x, vectorize=True), jacobian(f, x))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_where_none_is_asked_for(name, context):
    call, shape = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with context():
        assert call(x).grad_fn is None
    assert call(x.detach()).grad_fn is None


@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "value_loss", "gae"])
@pytest.mark.parametrize("asks", [False, True], ids=["no gradient", "gradient"])
def test_a_tensor_that_outlived_a_transform_is_its_values(name, asks):
    call, shape = CALLS[name]
    x, kept = torch.linspace(-2, -1, B * T * V)[: torch.Size(shape).numel()].view(shape), []
    torch.func.grad(lambda t: (kept.append(t * 1), t.sum())[1])(x)
    with rk.use_backend("cpu"), torch.set_grad_enabled(asks):
        assert torch.equal(call(kept[0]), call(x))
