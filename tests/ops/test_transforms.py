"""Calls without a gradient go straight to a kernel; under transforms of torch.func and in forward
mode they must not, since a tensor of the usual type then stands for more than its memory.
"""

import pytest
import torch
from torch.autograd import forward_ad

import rlhf_kernels as rk

B, T, V = 2, 3, 5
LABELS = torch.arange(B * T).reshape(B, T) % V
MASK = torch.ones(B, T, dtype=torch.bool)

# By name: a call of one tensor, and the shape of that.
CALLS = {
    "token_logprobs": (lambda x: rk.token_logprobs(x, LABELS).logprobs, (B, T, V)),
    "policy_loss": (lambda x: rk.policy_loss(x, 0.9 * x, x, MASK).loss, (B, T)),
    "value_loss": (lambda x: rk.value_loss(x, 0.9 * x, -x, MASK).loss, (B, T)),
    "gae": (lambda x: rk.gae(x, -x, mask=MASK).advantages, (B, T)),
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


@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "value_loss"])
def test_a_tangent_is_refused_and_not_dropped(name):
    call, shape = CALLS[name]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(forward_ad.make_dual(torch.ones(shape), torch.ones(shape)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_where_none_is_asked_for(name, context):
    call, shape = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with context():
        assert call(x).grad_fn is None
    assert call(x.detach()).grad_fn is None
