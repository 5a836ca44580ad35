"""Parity of linear_kl_divergence with TRL 1.16.0's `ChunkedDivergenceFunction`, value and gradient.

TRL's beta 0, 1 and between are "forward", "reverse" and "jsd" here. TRL has one temperature for
both models; here the teacher's softcap and logit scale are the student's unless they are given.
"""

import importlib.util

import pytest
import torch

import rlhf_kernels as rk

# Not importorskip: an import that fails where TRL is installed must show.
if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl (the extra 'parity')", allow_module_level=True)

from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from rlhf_kernels.testing import generator

N, H, WIDE, V = 9, 16, 24, 301


def heads():
    g = generator(3)
    own = [torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * 0.4]
    ref = [torch.randn(N, WIDE, generator=g), torch.randn(V, WIDE, generator=g) * 0.4]
    biases = [torch.randn(V, generator=g), torch.randn(V, generator=g)]
    return own, ref, biases


@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("capped", (False, True))
def test_divergence_entropy_and_gradients(beta, capped):
    own, ref, (bias, ref_bias) = heads()
    upstream = torch.randn(N, generator=generator(4))
    scale, cap, ref_scale, ref_cap = (0.7, 9.0, 1.2, 15.0) if capped else (1.0, None, 1.0, None)
    leaves = [t.clone().requires_grad_() for t in (*own, bias)]
    theirs = ChunkedDivergenceFunction.apply(
        *leaves, *ref, ref_bias, beta, 0.8, scale, cap, ref_scale, ref_cap
    )
    expected = torch.autograd.grad((theirs[0] * upstream).sum(), leaves)

    leaves = [t.clone().requires_grad_() for t in (*own, bias)]
    found = rk.linear_kl_divergence(
        *leaves[:2],
        *ref,
        bias=leaves[2],
        ref_bias=ref_bias,
        direction="jsd",
        beta=beta,
        temperature=0.8,
        logit_scale=scale,
        ref_logit_scale=ref_scale,
        softcap=cap,
        ref_softcap=ref_cap,
        entropy=True,
    )
    gradients = torch.autograd.grad((found.kl * upstream).sum(), leaves)
    for x, y in zip((*found, *gradients), (*theirs, *expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
    assert found.kl.min() > 1e-2
