"""prime-rl's losses, written out from their formulas, against PolicyLossConfig.prime_rl."""

import pytest
import torch

from tests.parity.comparison import FP32, close, compare_policy_loss, probable, refused, written_out
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.prime_rl
SCALE = 31


def formula(batch, *, name, low=0.0, high=0.0, kl_tau=0.0, teacher=None, weights=1.0):
    a, m = batch.advantages, batch.mask
    if name == "ce":
        return torch.where(m, -batch.logprobs * weights, 0).sum() / SCALE
    x = batch.logprobs - batch.old
    moved = (batch.logprobs.exp() - batch.old.exp()).detach()
    if name == "default":
        drop = torch.where(a > 0, moved > high, moved < -low)
    elif name == "ipo":
        drop = moved.abs() > low
    else:
        drop, kl_tau = moved < -0.2, 1e-3
        a = teacher.to(x.dtype) - batch.logprobs.detach()
    term = -torch.where(drop, 0, a * x.exp()) + kl_tau * x**2
    return torch.where(m, term * weights, 0).sum() / SCALE


def batch_to_old(seed=0):
    """With the inference log-probabilities as old and as ref."""
    batch = probable(make_batch(6, 20, seed=seed))
    return batch._replace(ref=batch.old)


@pytest.mark.parametrize("name", ("default", "ipo"))
def test_rl_losses(name):
    batch = batch_to_old(2)
    bounds = {"dppo_mask_low": 0.02, "dppo_mask_high": 0.03, "ipo_threshold": 0.02, "kl_tau": 0.05}
    theirs = written_out(formula, name=name, low=0.02, high=0.03, kl_tau=0.05)
    ours, _ = compare_policy_loss(theirs, batch, preset(name, **bounds), normalizer=SCALE)
    assert ours["gate_frac_low"] > 0.05 and ours["gate_frac_high"] > 0.02
    x = (batch.logprobs - batch.old).double()[batch.mask]
    close(ours["k3_old"], (x.exp() - x - 1).mean().detach(), 10 * FP32)
    a, m = batch.advantages, batch.mask
    moved = batch.logprobs.exp() - batch.old.exp()
    high = moved > 0.03 if name == "default" else moved > 0.02
    above = (high & (a > 0) if name == "default" else high)[m].float().mean()
    close(ours["gate_frac_high"], above, FP32)


def test_an_advantage_of_zero():
    batch = batch_to_old()
    batch = batch._replace(advantages=batch.advantages * (batch.advantages > 0))
    theirs = written_out(formula, name="default", low=0.02, high=0.03, kl_tau=0.05)
    config = preset(dppo_mask_low=0.02, dppo_mask_high=0.03, kl_tau=0.05)
    compare_policy_loss(theirs, batch, config, normalizer=SCALE)


def test_ref_kl():
    """The pull of the advantages to the teacher, and of the ref slot to old; one-sided."""
    batch = probable(make_batch(6, 20))
    up = {k: getattr(batch, k).detach() + 2.0 for k in ("logprobs", "old", "ref")}
    up["logprobs"].requires_grad_()
    batch = batch._replace(**up)
    teacher = batch.ref
    batch = batch._replace(ref=batch.old, advantages=teacher - batch.logprobs.detach())
    theirs = written_out(formula, name="ref_kl", teacher=teacher)
    # The formula's advantages in float64 are ours up to float32's last bits.
    config = preset("ref_kl", dppo_mask_low=9.0, kl_tau=7.0)
    ours, _ = compare_policy_loss(theirs, batch, config, normalizer=SCALE, exact=1e-6)
    assert ours["gate_frac_low"] > 0.05 and ours["gate_frac_high"] == 0


def test_ce_and_weights():
    batch = batch_to_old()._replace(advantages=torch.ones(6, 20))
    theirs = written_out(formula, name="ce")
    compare_policy_loss(theirs, batch, preset("ce"), normalizer=SCALE)
    weights = torch.rand(6, 20) * 2
    batch = batch_to_old(1)
    config = preset(dppo_mask_low=0.02, dppo_mask_high=0.03, kl_tau=0.05)
    ours = rk.policy_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, ref_logprobs=batch.ref,
        weights=weights, normalizer=SCALE, config=config,
    ).loss  # fmt: skip
    loss = formula(batch, name="default", low=0.02, high=0.03, kl_tau=0.05, weights=weights)
    slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, loss)]
    close(ours.detach(), loss.detach(), FP32, scale=float(slopes[1].abs().sum()))
    close(*slopes, 2 * FP32)


def test_what_is_refused():
    refused(
        preset,
        (
            ({"loss_type": "custom"}, "an imported function has its own formula"),
            ({"loss_type": "grpo"}, "loss_type must be one of"),
            ({"adv_tau": 0.5}, "adv_tau=0.5 cannot be expressed: multiply the advantages"),
        ),
    )
    assert preset().kl_coef == 2e-3 and preset("ipo").gate_low == 0.1
