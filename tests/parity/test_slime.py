"""slime's policy_loss_function, written out from its formulas, against PolicyLossConfig.slime."""

import pytest
import torch

from tests.parity.comparison import (
    FP32,
    close,
    compare_policy_loss,
    refused,
    row_mean,
    written_out,
)
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.slime
CLIPS = {"eps_clip": 0.2, "eps_clip_high": 0.28}
SAMPLES, TOKENS = 11, 301


def kl_term(batch, kind, unbiased):
    x = batch.ref - batch.logprobs
    value = {"k1": -x, "k2": x * x / 2}.get(kind, x.exp() - 1 - x)
    if unbiased:
        value = (batch.logprobs - batch.old).exp() * value
    return value.clamp(-10, 10) if kind == "low_var_kl" else value


def formula(
    batch,
    *,
    name="grpo",
    c=None,
    kl=None,
    tis=None,
    delta=None,
    entropy=0.0,
    by_token=False,
    lengths=None,
):
    a, m = batch.advantages, batch.mask
    x = batch.logprobs - batch.old
    distance = -row_mean(x, m)
    ratio = ((-distance).expand_as(x) if name == "gspo" else x).exp()
    clipped = ratio.clamp(0.8, 1.28)
    if name == "cispo":
        term = -clipped.detach() * a * batch.logprobs
    else:
        term = torch.maximum(-ratio * a, -clipped * a)
        if c is not None:
            term = torch.where(a < 0, torch.min(-c * a, term), term)
    if delta is not None:
        term = term * ~((a < 0) & (distance.detach() > delta))
    if tis is not None:
        mode, low, high = tis
        w = (batch.old - batch.rollout).exp()
        inside = (w >= low) & (w <= high)
        term = term * (torch.where(inside, w, 0) if mode == "icepop" else w.clamp(low, high))
    term = term - entropy * batch.entropy
    if kl is not None:
        term = term + 0.3 * kl_term(batch, *kl)
    if by_token:
        return torch.where(m, term, 0).sum() / TOKENS
    lengths = m.sum(-1) if lengths is None else lengths
    return (torch.where(m, term, 0).sum(-1) / lengths.clamp(min=1)).sum() / SAMPLES


def check(config, batch=None, **options):
    batch = make_batch() if batch is None else batch
    divisor = TOKENS if options.get("by_token") else SAMPLES
    theirs = written_out(formula, **options)
    return compare_policy_loss(theirs, batch, config, normalizer=divisor)[0]


KL = {"use_kl_loss": True, "kl_loss_coef": 0.3}


@pytest.mark.parametrize("by_token", (False, True))
@pytest.mark.parametrize("kind", ("k1", "k2", "k3", "low_var_kl"))
def test_ppo_and_kl(kind, by_token):
    batch = make_batch(4, 9)
    batch.ref[0, :4] = batch.logprobs.detach()[0, :4] + torch.tensor([2.0, 4.0, -4.0, 5.0])
    mask = batch.mask.clone()
    mask[0] = True
    batch = batch._replace(mask=mask)
    options = CLIPS | KL | {"kl_loss_type": kind, "entropy_coef": 0.05, "eps_clip_c": 1.75}
    config = preset(**options, calculate_per_token_loss=by_token)
    ours = check(config, batch, c=1.75, kl=(kind, False), entropy=0.05, by_token=by_token)
    for name in ("clip_frac_low", "clip_frac_high", "dual_clip_frac"):
        assert ours[name] > 0.02
    if kind != "low_var_kl":
        config = preset(**options, use_unbiased_kl=True)
        check(config, make_batch(), c=1.75, kl=(kind, True), entropy=0.05)
    assert preset(eps_clip=0.1).clip_high == 0.1


@pytest.mark.parametrize("name", ("gspo", "cispo", "reinforce_plus_plus"))
def test_estimators_that_are_losses(name):
    config = preset(name, **CLIPS, **KL, kl_loss_type="low_var_kl", eps_clip_c=1.75)
    c = None if name == "cispo" else 1.75
    ours = check(config, name=name, c=c, kl=("low_var_kl", False))
    assert ours["clip_frac_low"] + ours["clip_frac_high"] > 0.05


@pytest.mark.parametrize("name", ("grpo", "gspo", "cispo"))
def test_off_policy_sequence_mask(name):
    batch = make_batch(8, 13, per_sequence=True)
    batch = batch._replace(advantages=batch.advantages.unsqueeze(-1).expand(8, 13).contiguous())
    config = preset(name, **CLIPS, **KL, use_opsm=True, opsm_delta=0.05)
    ours = check(config, batch, name=name, kl=("k1", False), delta=0.05)
    assert ours["gate_frac_low"] > 0.05
    x = (batch.logprobs - batch.old).detach()
    dropped = (batch.advantages < 0) & (-row_mean(x, batch.mask) > 0.05)
    close(ours["gate_frac_low"], dropped[batch.mask].float().mean(), FP32)
    assert preset(use_opsm=True).gate_low == 1e-4


@pytest.mark.parametrize("name", ("grpo", "gspo"))
@pytest.mark.parametrize("mode", ("tis", "icepop"))
def test_rollout_correction(name, mode):
    options = CLIPS | KL | {"tis_clip": 1.2, "tis_clip_low": 0.8}
    if mode == "icepop":
        options["custom_tis_function_path"] = "slime.backends.megatron_utils.loss.icepop_function"
    config = preset(name, **options, use_tis=True)
    ours = check(config, name=name, kl=("k1", False), tis=(mode, 0.8, 1.2))
    assert abs(ours["correction_mean"] - 1) > 1e-3
    assert preset(name, **options, get_mismatch_metrics=True) == config
    config = preset(name, use_tis=True)
    assert (config.correction_min, config.correction_max) == (0, 2)


def test_a_rollout_of_several_samples():
    """Each sample's divisor is the length of its rollout: weights of rows."""
    batch = make_batch()
    own = batch.mask.sum(-1)
    lengths = own.clone()
    lengths[:2] = own[:2].sum()
    config = preset(**CLIPS, **KL, entropy_coef=0.05)
    ours = rk.policy_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, ref_logprobs=batch.ref,
        entropy=batch.entropy, weights=own / lengths.clamp(min=1), normalizer=SAMPLES,
        config=config,
    ).loss  # fmt: skip
    theirs = formula(batch, kl=("k1", False), entropy=0.05, lengths=lengths)
    slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, theirs)]
    close(ours.detach(), theirs.detach(), FP32, scale=float(slopes[1].abs().sum()))
    close(*slopes, 2 * FP32)


def test_what_is_refused():
    unbiased = KL | {"use_unbiased_kl": True}
    rollout = {"use_rollout_logprobs": True}
    refused(
        preset,
        (
            ({"advantage_estimator": "rloo"}, "advantage_estimator must be one of"),
            (KL | {"kl_loss_type": "k3+"}, "kl_loss_type must be one of"),
            (unbiased | {"advantage_estimator": "gspo"}, "use_unbiased_kl with gspo cannot"),
            (unbiased | {"kl_loss_type": "low_var_kl"}, "use_unbiased_kl with low_var_kl cannot"),
            (rollout | {"use_tis": True}, "use_tis must be False"),
            (rollout | {"get_mismatch_metrics": True}, "no argument holds"),
            (
                {"use_tis": True, "custom_tis_function_path": "mis.compute_weights"},
                "multiply the advantages by its weights",
            ),
        ),
    )
    assert preset(**rollout, use_unbiased_kl=True) == preset()
