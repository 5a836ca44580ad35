"""AReaL's grpo_loss_fn, written out from its formulas, against PolicyLossConfig.areal."""

import math

import pytest
import torch

from tests.parity.comparison import compare_policy_loss, refused, row_mean, written_out
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.areal
CLIPS = {"eps_clip": 0.2, "eps_clip_higher": 0.28}
TOKENS = 301


def rejection(batch, level, action, metric, low, high):
    """(mask, weight) of AReaL's rejection sampling; agg='mean'."""
    x, m = batch.old - batch.rollout, batch.mask
    x = row_mean(x, m).expand_as(x) if level == "sequence" else x
    statistic = x if metric == "kl_k1" else x.exp()
    low = -math.inf if low is None else low
    if action == "clamp":
        return m, x.exp().clamp(max(low, 0), high)
    return m & (statistic >= low) & (statistic <= high), x.exp()


def formula(batch, *, by_sequence=False, c=None, sapo=None, rule=None, teacher=0.0):
    a, m = batch.advantages, batch.mask
    kept, w = (m, 1.0) if rule is None else rejection(batch, *rule)
    x = batch.logprobs - batch.old
    if by_sequence:
        x, a = row_mean(x, kept).expand_as(x), row_mean(a, kept).expand_as(a)
    ratio = x.exp()
    if sapo is not None:
        tau = torch.where(a > 0, *sapo)
        term = -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:
        term = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.28))
        if c is not None:
            term = torch.min(term, torch.sign(a) * c * a)
    term = term * w + teacher * (batch.logprobs - batch.ref)
    return torch.where(kept, term, 0).sum() / TOKENS


def check(config, batch=None, **options):
    batch = make_batch() if batch is None else batch
    return compare_policy_loss(written_out(formula, **options), batch, config, normalizer=TOKENS)[0]


@pytest.mark.parametrize("c", (None, 1.75))
def test_clips(c):
    ours = check(preset(**CLIPS, c_clip=c), c=c)
    assert ours["clip_frac_low"] > 0.02 and ours["clip_frac_high"] > 0.02
    assert (ours["dual_clip_frac"] > 0.02) == (c is not None)
    assert preset(eps_clip=0.1).clip_high == 0.1


def of_rows(batch):
    """The batch with the mean advantage of each row, as [B, T]: the docstring's [B]."""
    means = row_mean(batch.advantages, batch.mask).expand_as(batch.advantages)
    return batch._replace(advantages=means.contiguous())


def test_sequence_level_averages_the_advantages():
    batch = make_batch()
    config = preset(**CLIPS, importance_sampling_level="sequence", c_clip=1.75)
    check(config, of_rows(batch), by_sequence=True, c=1.75)
    ours = rk.policy_loss(
        batch.logprobs, batch.old, row_mean(batch.advantages, batch.mask)[:, 0], batch.mask,
        normalizer=TOKENS, config=config,
    ).loss  # fmt: skip
    theirs = formula(batch, by_sequence=True, c=1.75)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_sapo(level):
    config = preset(use_sapo_loss=True, sapo_tau_neg=1.5, importance_sampling_level=level)
    by_sequence = level == "sequence"
    batch = of_rows(make_batch()) if by_sequence else make_batch()
    check(config, batch, by_sequence=by_sequence, sapo=(1.0, 1.5))


@pytest.mark.parametrize("gspo", (False, True))
@pytest.mark.parametrize(
    ("level", "action", "metric", "low", "high"),
    (
        ("token", "mask", "ratio", 0.8, 1.2),
        ("token", "mask", "ratio", None, 1.2),
        ("token", "clamp", "ratio", 0.8, 1.2),
        ("token", "clamp", "ratio", None, 1.1),
        ("token", "mask", "kl_k1", -0.2, 0.15),
        ("token", "mask", "kl_k1", None, 0.15),
        ("sequence", "mask", "ratio", 0.95, 1.04),
        ("sequence", "clamp", "ratio", 0.99, 1.02),
    ),
)
def test_rejection_sampling(level, action, metric, low, high, gspo):
    rule = {"level": level, "action": action, "metric": metric, "lower": low, "upper": high}
    options = CLIPS | {"use_decoupled_loss": True, "rejection_sampling": rule}
    batch = make_batch(9, 13, seed=1)
    if gspo:
        options["importance_sampling_level"] = "sequence"
        batch = of_rows(batch)
        if level == "token" and action == "mask":
            refused(preset, ((options, "unmask only these"),))
            return
    ours = check(
        preset(**options), batch, by_sequence=gspo, rule=(level, action, metric, low, high)
    )
    assert abs(ours["correction_mean"] - 1) > 1e-4
    kept, w = rejection(batch, level, action, metric, low, high)
    if action == "mask":
        assert 0 < kept[batch.mask].float().mean() < 1
    elif level == "token":
        assert len(w[batch.mask].unique()) > 5


def test_without_the_decoupled_loss_nothing_is_rejected():
    assert preset(rejection_sampling={"upper": 1.1}) == preset()
    config = preset(use_decoupled_loss=True, rejection_sampling={})
    assert (config.correction_mode, config.correction_min, config.correction_max) == ("mask", 0, 5)


def test_distillation_beside_the_loss():
    config = preset(**CLIPS, kl_estimator="k1", kl_coef=0.3)
    check(config, teacher=0.3)


@pytest.mark.parametrize(("metric", "swap"), (("kl_k2", False), ("kl_k3", True)))
def test_masks_by_a_divergence_fold(metric, swap):
    """AReaL's k3 is that of the log-ratio from rollout to old."""
    rule = {"metric": metric, "upper": 0.02}
    options = {"use_decoupled_loss": True, "rejection_sampling": rule}
    refused(preset, ((options, f"{'rollout, old' if swap else 'old, rollout'}, mask.*token_"),))
    batch = make_batch()
    x, m = batch.old - batch.rollout, batch.mask
    value = x * x / 2 if metric == "kl_k2" else (-x).exp() - 1 + x
    first = (batch.rollout, batch.old) if swap else (batch.old, batch.rollout)
    found = rk.mismatch_weights(*first, m, reject={f"token_{metric[3:]}": 0.02})
    assert torch.equal(found.mask, m & (value <= 0.02)) and not torch.equal(found.mask, m)


def test_what_is_refused():
    decoupled = {"use_decoupled_loss": True}

    def rule(**fields):
        return decoupled | {"rejection_sampling": fields}

    sequence = {"level": "sequence"}
    refused(
        preset,
        (
            ({"importance_sampling_level": "row"}, "importance_sampling_level must be one of"),
            ({"m2_threshold": 0.04}, "it sorts the tokens of a batch"),
            (decoupled | {"use_sapo_loss": True}, "must be False with use_sapo_loss"),
            (rule(leve="token"), "rejection_sampling must be one of level"),
            (rule(level="row"), "rejection_sampling.level must be one of"),
            (rule(upper=1.0), "upper must be above 1"),
            (rule(action="clamp", metric="kl_k2"), "metric must be 'ratio'"),
            (rule(**sequence, agg="sum"), "exp of the mean of old - rollout"),
            (rule(**sequence, metric="kl_k1"), r"the weight is exp\(old - rollout\)"),
            (rule(**sequence, action="clamp", agg="max"), "compute the weight yourself"),
        ),
    )
