"""linear_kl_divergence with a mixture, options of each model, and the policy's entropy."""

import pytest
import torch

from tests.head.head_cases import B, H, T, operands

import rlhf_kernels as rk
from rlhf_kernels.testing import assert_bitwise_equal, to_float64

OPTIONS = (
    {"direction": "jsd", "beta": 0.3},
    {"direction": "jsd", "temperature": 0.8, "softcap": 9.0, "ref_softcap": None},
    {"direction": "forward", "logit_scale": 0.5, "ref_logit_scale": 1.5, "softcap": 7.0},
    {"direction": "reverse", "ref_temperature": 1.4, "ref_softcap": 6.0},
)


def logits_of(hidden, weight, bias, scale, cap, temperature):
    z = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) * scale
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


def plain(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, **given):
    """(divergence, entropy) of one head after the other, in torch."""
    scale, cap, t = given.get("logit_scale", 1), given.get("softcap"), given.get("temperature", 1)
    own = logits_of(hidden, weight, bias, scale, cap, t)
    ref = logits_of(
        ref_hidden,
        ref_weight,
        ref_bias,
        given.get("ref_logit_scale", scale),
        given.get("ref_softcap", cap),
        given.get("ref_temperature", t),
    )
    p, q = own.softmax(-1), ref.softmax(-1)
    if given["direction"] == "jsd":
        beta = given.get("beta", 0.5)
        m = (1 - beta) * p + beta * q
        kl = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    elif given["direction"] == "reverse":
        kl = (p * (p / q).log()).sum(-1)
    else:
        kl = (q * (q / p).log()).sum(-1)
    return kl, -(p * p.log()).sum(-1)


def ours(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, **given):
    return rk.linear_kl_divergence(
        hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, entropy=True, **given
    )


def run(function, heads, upstream, **given):
    kl, entropy = function(*heads, **given)
    return kl, entropy, *torch.autograd.grad((kl * upstream).sum(), heads[:3])


def two_heads():
    own, ref = operands()[:3], operands(width=H // 2, seed=1)[:3]
    return (*own, *(t.detach() for t in ref))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o))
def test_matches_fp64(backend, options):
    heads, mask = two_heads(), torch.rand(B, T) < 0.7
    upstream = torch.randn(B, T)
    more = {"mask": mask, "chunk_tokens": 16}
    found = run(ours, heads, upstream, **options, **more)
    exact = run(plain, to_float64(heads), upstream.double() * mask, **options)
    exact = (exact[0] * mask, exact[1] * mask, *exact[2:])
    for x, e in zip(found, exact, strict=True):
        torch.testing.assert_close(
            x.double(), e, rtol=5e-5, atol=1e-5 * max(1.0, e.abs().max().item())
        )
    kl, entropy = ours(*heads, mask=mask, **options)
    assert (kl[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert not entropy.requires_grad and kl.requires_grad
    # In one chunk; without the mask's tokens where their number is known.
    whole = ours(*heads, mask=mask, kept_tokens=B * T, **options) if backend != "reference" else kl
    if backend != "reference":
        torch.testing.assert_close(whole.kl, kl, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole.entropy, entropy, rtol=1e-5, atol=1e-6)


def test_options_of_the_policy_hold_for_the_reference(backend):
    heads = two_heads()
    options = {"direction": "jsd", "softcap": 9.0, "temperature": 0.8, "logit_scale": 0.5}
    expected = ours(*heads, **options)
    own = {"ref_softcap": 9.0, "ref_temperature": 0.8, "ref_logit_scale": 0.5}
    for x, y in zip(ours(*heads, **options, **own), expected, strict=True):
        assert_bitwise_equal(x, y)


def test_tokens_without_an_upstream_gradient_are_skipped(backend):
    heads, options = two_heads(), {"direction": "jsd", "softcap": 9.0}
    upstream = torch.randn(B, T)
    upstream[:, 3:6] = 0
    _, _, of_hidden, *_ = run(ours, heads, upstream, **options)
    assert (of_hidden[:, 3:6] == 0).all() and of_hidden[:, :3].abs().amax(-1).min() > 0


def test_bad_options(backend):
    heads = two_heads()
    with pytest.raises(ValueError, match="ref_logit_scale must be a finite number > 0"):
        ours(*heads, ref_logit_scale=0)
    with pytest.raises(ValueError, match=r"ref_temperature / ref_logit_scale \(0.5\) must lie"):
        ours(*heads, ref_logit_scale=0.5, ref_temperature=2.0**60)
