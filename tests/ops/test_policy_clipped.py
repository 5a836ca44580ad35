"""The ratio of a sequence whose tokens are clipped one by one (GMPO)."""

import math

import pytest
import torch

from tests.ops.bits import check_compiled, same
from tests.ops.policy_cases import Config, make_inputs, run

import rlhf_kernels as rk


def test_values_and_gradients_by_hand(backend):
    """Two sequences with both signs; clipped tokens have no gradient through the ratio."""
    x = torch.tensor([[0.9, -0.9, 0.1, 7.0], [0.9, -0.9, 0.1, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    old = torch.full_like(x, -2.0)
    logprobs = (old + x).requires_grad_()
    loss, metrics = rk.policy_loss(
        logprobs, old, torch.tensor([2.0, -3.0]), mask, config=Config.gmpo()
    )
    (g,) = torch.autograd.grad(loss, logprobs)
    # Above: min(x, 0.4). Below: max(x, -0.4).
    up, down = math.exp((0.4 - 0.9 + 0.1) / 3), math.exp((0.9 - 0.4 + 0.1) / 3)
    assert loss.item() == pytest.approx((-2 * up + 3 * down) / 2, rel=1e-6)
    a, b = -2 * up / 6, 3 * down / 6
    expected = torch.tensor([[0, a, a, 0], [b, 0, b, 0]])
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=0)
    assert (g == 0).equal(expected == 0)
    assert metrics["clip_frac_high"] == pytest.approx(1 / 6)
    assert metrics["clip_frac_low"] == pytest.approx(1 / 6)
    assert metrics["ratio_max"].item() == pytest.approx(down, rel=1e-6)


def test_without_bounds_it_is_the_mean_of_gspo(backend):
    """No token is clipped: the ratio of the sequence, and its gradient."""
    args, options = make_inputs(4, 60)
    free = {"clip_low": 0.0, "clip_high": None, "clip_absolute": True, "kl_coef": 0.1}
    of_tokens = run(
        rk.policy_loss, args, options, config=Config(**free, ratio_level="clipped-sequence")
    )
    whole = run(rk.policy_loss, args, options, config=Config(**free, ratio_level="sequence"))
    for a, b in zip(of_tokens, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("low", (None, 0.0))
def test_no_bound_clips_no_infinite_ratio(backend, low):
    logprobs, old = torch.tensor([[-math.inf, -1.0], [-1.0, -1.0]]), torch.full((2, 2), -1.0)
    old[1, 0] = -math.inf
    config = Config(
        ratio_level="clipped-sequence", clip_low=low, clip_high=None, clip_absolute=True
    )
    _, metrics = rk.policy_loss(
        logprobs, old, torch.tensor([-1.0, 1.0]), torch.ones(2, 2), config=config
    )
    assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == 0


def test_masked_values_and_layouts_change_no_bit(backend):
    args, options = make_inputs(5, 130)
    config = Config.gmpo(kl_coef=0.1, entropy_coef=0.05)
    expected = run(rk.policy_loss, args, options, config=config)
    nowhere = [
        torch.where(args[3], t.detach(), math.nan).requires_grad_(t.requires_grad) for t in args[:3]
    ]
    found = run(rk.policy_loss, (*nowhere, args[3]), options, config=config)
    turned = [t.detach().t().contiguous().t().requires_grad_(t.requires_grad) for t in args]
    other = run(rk.policy_loss, tuple(turned), options, config=config)
    for a, b, c in zip(found, other, expected, strict=True):
        same(backend)(a, c)
        same(backend)(b, c)
    # Packed, with one advantage per sequence.
    inside, each = args[3], torch.randn(5, generator=torch.Generator().manual_seed(1))
    padded = run(rk.policy_loss, (*args[:2], each, inside), options, config=config)

    def pack(t):
        return t.detach()[inside].requires_grad_(t.requires_grad)

    flat = (*map(pack, args[:2]), each, pack(inside))
    offsets = torch.tensor([0, *inside.sum(1).cumsum(0).tolist()])
    more = {k: pack(v) for k, v in options.items()} | {"cu_seqlens": offsets}
    packed = run(rk.policy_loss, flat, more, config=config)
    torch.testing.assert_close(packed[:2], padded[:2], rtol=1e-5, atol=1e-6)
    for g, e in zip(packed[2:], padded[2:], strict=True):
        torch.testing.assert_close(g, e[inside], rtol=1e-5, atol=1e-7)


def test_compiled(backend):
    config = Config.gmpo(kl_coef=0.1)

    def step(logprobs, old, advantages, mask, ref):
        loss, metrics = rk.policy_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, config=config
        )
        return loss, metrics.tensor

    batches = []
    for shape in ((3, 40), (5, 33)):
        args, options = make_inputs(*shape)
        batches.append((*args, options["ref_logprobs"]))
    check_compiled(step, batches, lambda batch: (batch[0],))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "penalty"}, "objective must be 'clip' with the ratio_level"),
        ({"dual_clip": 3.0}, "dual_clip must be None with the ratio_level"),
        ({"delta": 3.0}, "delta must be None with the ratio_level"),
        ({"clip_absolute": True, "clip_low": 1.1, "clip_high": 2.0}, "clip_low must be at most 1"),
        ({"clip_absolute": True, "clip_low": 0.1, "clip_high": 0.9}, "clip_high must be at least"),
    ],
)
def test_what_does_not_go_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        Config(ratio_level="clipped-sequence", **options)
