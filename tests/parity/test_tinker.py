"""tinker's losses, written out from its documentation, against PolicyLossConfig.tinker."""

import torch

from tests.parity.comparison import compare_policy_loss, refused, written_out
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.tinker


def formula(batch, *, name, low=None, high=None, beta=None):
    """A sum over tokens; tinker has no mask, its other tokens have advantages of 0."""
    a, lp = torch.where(batch.mask, batch.advantages, 0), batch.logprobs
    ratio = (lp - batch.old).exp()
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "ppo":
        return -torch.min(ratio * a, ratio.clamp(low, high) * a).sum()
    if name == "cispo":
        return -(ratio.clamp(low, high).detach() * lp * a).sum()
    if name == "dro":
        return -(lp * a - 0.5 * beta * (lp - batch.old) ** 2).sum()
    return -(a * lp).sum()


def check(config, batch=None, **options):
    batch = make_batch() if batch is None else batch
    return compare_policy_loss(written_out(formula, **options), batch, config)[0]


def test_losses():
    check(preset(), name="importance_sampling")
    check(preset("cross_entropy"), name="cross_entropy")
    ours = check(preset("ppo"), name="ppo", low=0.8, high=1.2)
    assert ours["clip_frac_low"] > 0.05 and ours["clip_frac_high"] > 0.05
    bounds = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    check(preset("ppo", **bounds), name="ppo", low=0.9, high=1.1)
    wide = make_batch()
    wide = wide._replace(logprobs=(wide.old + torch.randn(5, 13) * 2).requires_grad_())
    ours = check(preset("cispo"), wide, name="cispo", low=0.0, high=4.0)
    assert ours["clip_frac_low"] == 0 and ours["clip_frac_high"] > 0.05
    check(preset("cispo", **bounds), name="cispo", low=0.9, high=1.1)


def test_dro_counts_every_token():
    batch = make_batch()
    batch = batch._replace(ref=batch.old, mask=torch.ones_like(batch.mask))
    check(preset("dro", beta=0.3), batch, name="dro", beta=0.3)


def test_what_is_refused():
    refused(
        preset,
        (
            ({"loss_fn": "stable_reinforce"}, "tinker does not publish its formula"),
            ({"loss_fn": "grpo"}, "loss_fn must be one of"),
            ({"loss_fn": "dro"}, "beta must be a number with 'dro'"),
            ({"beta": 0.1}, "beta must be None without 'dro'"),
            ({"clip_low_threshold": 0.8}, "must be None with 'importance_sampling'"),
        ),
    )
