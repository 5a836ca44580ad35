"""Parity with OpenRLHF 0.11.2: PolicyLoss, KL estimates, value loss, advantages.

What calls OpenRLHF runs where it is installed, with stubs for what it needs only to be imported
(tools/openrlhf_stubs.py); its policy loss is also written out here from its formulas, which runs
everywhere. The actor's loss is put together as its trainer does (ray/ppo_actor.py): PolicyLoss,
plus the token mean of `compute_approx_kl`, less that of the entropy. Different by design:

- OpenRLHF multiplies by the mask, and divides by an empty one; here NaN under the mask changes
  nothing and nothing unmasked gives 0.
- Its dual clip counts in no metric; here it is dual_clip_frac.
- Its variance has a lower bound of 1e-8 where `whiten` adds eps: eps=0 is the same above it.
"""

import dataclasses
import inspect

import pytest
import torch

from tests.parity.comparison import (
    FP32,
    close,
    compare_policy_loss,
    compare_token_logprobs,
    probable,
    row_mean,
)
from tools import openrlhf_stubs
from tools.policy_batches import make_batch

import rlhf_kernels as rk
from rlhf_kernels.testing import random_mask

theirs = openrlhf_stubs.load()
loss, utils = (None, None) if theirs is None else (theirs.loss, theirs.utils)
installed = pytest.mark.skipif(
    theirs is None, reason="needs openrlhf, which `make test` installs where it can"
)

DP_SIZE, GLOBAL_TOKENS, GLOBAL_BATCH = 2, 301, 11
CLIPS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}


def actor_loss(batch, policy_loss_type, *, kl=None, entropy_coef=0.0, distributed, **options):
    """(loss, metrics) as ActorPPOTrainer.training_step computes them."""
    mask = batch.mask.to(batch.logprobs.dtype)
    info = {}
    if distributed:
        info = {
            "dp_size": DP_SIZE,
            "batch_num_tokens": GLOBAL_TOKENS,
            "global_batch_size": GLOBAL_BATCH,
        }
    function = loss.PolicyLoss(policy_loss_type=policy_loss_type, **options)
    total, clip_ratio, ppo_kl, vllm_kl, filtered = function(
        batch.logprobs, batch.old, batch.advantages, mask, batch.rollout, **info
    )
    metrics = {"clip_ratio": clip_ratio, "ppo_kl": ppo_kl, "vllm_kl": vllm_kl, "filter": filtered}
    if kl is not None:
        estimate = utils.compute_approx_kl(batch.logprobs, batch.ref, batch.old, **kl)
        total = total + 0.3 * loss.aggregate_loss(estimate, mask, **info)
    if entropy_coef:
        total = total - entropy_coef * loss.aggregate_loss(batch.entropy, mask, **info)
    return total, metrics


def check(batch, policy_loss_type="ppo", *, kl=None, entropy_coef=0.0, distributed, **options):
    options = CLIPS | options
    preset = options | {"entropy_coef": entropy_coef}
    if kl is not None:
        preset |= {"kl_use_loss": True, "kl_init_coef": 0.3, "kl_estimator": kl["kl_estimator"]}
    by_token = policy_loss_type == "ppo" and options.get("token_level_loss", True)
    divisor = (GLOBAL_TOKENS if by_token else GLOBAL_BATCH) / DP_SIZE if distributed else None
    # compute_approx_kl casts to fp32.
    exact = 1e-7 if kl is None else 1e-5
    return compare_policy_loss(
        lambda batch: actor_loss(
            batch,
            policy_loss_type,
            kl=kl,
            entropy_coef=entropy_coef,
            distributed=distributed,
            **options,
        ),
        batch,
        rk.PolicyLossConfig.openrlhf(policy_loss_type, **preset),
        normalizer=divisor,
        exact=exact,
    )


@installed
@pytest.mark.parametrize("distributed", (False, True))
@pytest.mark.parametrize("dual_clip", (None, 1.75))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_ppo(backend, estimator, dual_clip, distributed):
    kl = {"kl_estimator": estimator}
    options = {"dual_clip": dual_clip, "distributed": distributed}
    ours, theirs = check(make_batch(), kl=kl, entropy_coef=0.05, **options)
    close(ours["clip_frac_low"] + ours["clip_frac_high"], theirs["clip_ratio"], FP32)
    close(ours["k1_old"], theirs["ppo_kl"], 10 * FP32, scale=0.1)
    assert ours["clip_frac_low"] > 0.05 and ours["clip_frac_high"] > 0.05
    assert (ours["dual_clip_frac"] > 0.05) == (dual_clip is not None)


@installed
@pytest.mark.parametrize("distributed", (False, True))
@pytest.mark.parametrize("policy_loss_type", ("ppo", "gspo"))
def test_means_by_sequence(backend, policy_loss_type, distributed):
    options = {"token_level_loss": False, "distributed": distributed}
    ours, theirs = check(make_batch(), policy_loss_type, **options)
    close(ours["clip_frac_low"] + ours["clip_frac_high"], theirs["clip_ratio"], FP32)


@installed
@pytest.mark.parametrize("mode", ("mask", "clip"))
def test_importance_correction(backend, mode):
    options = {"is_correction_mode": mode, "is_correction_threshold": (0.8, 1.2)}
    options |= {"is_correction_level": "token", "distributed": False}
    ours, theirs = check(make_batch(), **options)
    assert 0.05 < theirs["filter"] < 0.6 and abs(ours["correction_mean"] - 1) > 1e-3


@installed
@pytest.mark.parametrize("level", ("token", "seq"))
@pytest.mark.parametrize("gating", ("ratio", "tv", "binary_kl"))
def test_gates_that_fold_into_the_advantages(level, gating):
    """As the messages say; the gates of two constants have no field."""
    batch = probable(make_batch(7, 13))
    m, x = batch.mask, batch.old - batch.rollout
    p, q = batch.rollout.exp(), batch.old.exp()
    most = 0.02 if level == "token" else 0.014
    threshold = {"tv": (0.0, most), "binary_kl": (0.0, 0.004)}.get(gating, (0.97, 1.04))
    if level == "token" and gating == "ratio":
        threshold = (0.8, 1.2)
    statistic = (p - q).abs()
    if gating == "binary_kl":
        statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if level == "seq":
        statistic = row_mean(statistic, m).expand_as(x)
    weights = torch.where(statistic <= threshold[1], x.exp(), 0)
    if gating == "ratio":
        criterion = "token_ratio" if level == "token" else "seq_mean_ratio"
        weights = rk.mismatch_weights(
            batch.old, batch.rollout, m, level="token", reject={criterion: threshold}
        ).weights
    assert 0.05 < (weights[m] == 0).float().mean() < 0.9
    ours = rk.policy_loss(
        batch.logprobs, batch.old, batch.advantages * weights, m,
        config=rk.PolicyLossConfig.openrlhf(**CLIPS),
    ).loss  # fmt: skip
    gate = {"is_correction_level": level, "is_correction_gating": gating}
    gate |= {"is_correction_threshold": threshold}
    expected, _ = actor_loss(batch, "ppo", distributed=False, **CLIPS, **gate)
    slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, expected)]
    close(ours.detach(), expected.detach(), FP32, scale=float(slopes[1].abs().sum()))
    close(*slopes, 3 * FP32)


@installed
def test_gspo_to_the_rollout(backend):
    """What its gspo does with a correction level: the rollout's logprobs are the old ones."""
    batch = make_batch()
    config = rk.PolicyLossConfig.openrlhf("gspo", is_correction_level="token", **CLIPS)
    other = {"is_correction_level": "seq", "is_correction_gating": "tv"}
    assert config == rk.PolicyLossConfig.openrlhf("gspo", **CLIPS, **other)

    def theirs(moved):
        return actor_loss(
            moved._replace(old=batch.ref.to(moved.old.dtype), rollout=moved.old),
            "gspo",
            distributed=False,
            is_correction_level="token",
            **CLIPS,
        )

    compare_policy_loss(theirs, batch, config, exact=1e-7)


@installed
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_kl_clamps(backend, estimator):
    batch = make_batch(4, 9)
    far = torch.tensor([2.0, 4.0, 12.0, 25.0, -4.0, -12.0, -25.0])
    batch.ref[0, :7] = batch.logprobs.detach()[0, :7] + far
    mask = batch.mask.clone()
    mask[0] = True
    check(batch._replace(mask=mask), kl={"kl_estimator": estimator}, distributed=False)


@installed
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_unbiased_kl_gradient_where_the_policies_are_one(backend, estimator):
    batch = make_batch()
    batch = batch._replace(old=batch.logprobs.detach())
    config = rk.PolicyLossConfig.openrlhf(kl_use_loss=True, kl_init_coef=0.3)
    config = dataclasses.replace(config, kl_estimator=estimator + "+")
    kl = {"kl_estimator": estimator, "unbiased_gradient": True}

    def theirs(batch):
        return actor_loss(batch, "ppo", kl=kl, distributed=False)

    compare_policy_loss(theirs, batch, config, exact=1e-5)


@installed
def test_defaults_are_those_of_policy_loss():
    theirs = inspect.signature(loss.PolicyLoss).parameters
    ours = inspect.signature(rk.PolicyLossConfig.openrlhf).parameters
    names = [name for name in theirs if name in ours]
    assert {n: ours[n].default for n in names} == {n: theirs[n].default for n in names}
    assert set(theirs) == set(names) and len(names) == 9


@installed
@pytest.mark.parametrize("distributed", (False, True))
@pytest.mark.parametrize("token_level_loss", (True, False))
def test_value_loss(backend, token_level_loss, distributed):
    old, returns = torch.randn(2, 5, 13)
    values = (old + 0.4 * torch.randn(5, 13)).requires_grad_()
    mask = random_mask(5, 13)
    info = {}
    if distributed:
        info = {"batch_num_tokens": GLOBAL_TOKENS, "global_batch_size": GLOBAL_BATCH}
        info["dp_size"] = DP_SIZE
    x = values.detach().double().requires_grad_()
    theirs = loss.ValueLoss(0.25, token_level_loss)(
        x, old.double(), returns.double(), mask.double(), **info
    )
    count = GLOBAL_TOKENS if token_level_loss else GLOBAL_BATCH
    ours, _ = rk.value_loss(
        values,
        old,
        returns,
        mask=mask,
        clip_range=0.25,
        aggregation="token-mean" if token_level_loss else "seq-mean-token-mean",
        normalizer=count / DP_SIZE if distributed else None,
    )
    close(ours, theirs, FP32)
    slopes = [torch.autograd.grad(*pair)[0] for pair in ((ours, values), (theirs, x))]
    close(*slopes, FP32)
    assert theirs > 1e-3 and (slopes[0][mask] != 0).float().mean() > 0.4


@installed
def test_logprobs_and_entropy(backend):
    def theirs(x, labels, temperature):
        # Its division by the temperature is in place.
        logprobs = utils.log_probs_from_logits(x.clone(), labels, temperature)
        return logprobs, utils.compute_entropy(x / temperature)

    # OpenRLHF compiles its entropy, which takes longer than all the rest.
    with torch.compiler.set_stance("force_eager"):
        compare_token_logprobs(theirs, 37, temperature=0.75)


def test_what_cannot_be_expressed_is_refused():
    preset = rk.PolicyLossConfig.openrlhf
    token = {"is_correction_level": "token"}
    for options, message in (
        ({"policy_loss_type": "sapo"}, "policy_loss_type must be one of"),
        ({"policy_loss_type": "gspo", "kl_use_loss": True}, "beside means by sequence cannot"),
        ({"token_level_loss": False, "entropy_coef": 0.1}, "beside means by sequence cannot"),
        ({"kl_use_loss": True, "kl_unbiased_gradient": True}, "kl_unbiased_gradient cannot"),
        ({"kl_use_loss": True, "kl_estimator": "k3+"}, "kl_estimator must be one of"),
        ({"is_correction_level": "seq"}, "is_correction_level='seq' cannot.*mismatch_weights"),
        ({"is_correction_level": "row"}, "is_correction_level must be one of"),
        (token | {"is_correction_gating": "tv"}, "is_correction_gating='tv' cannot.*or by 0"),
        (token | {"is_correction_gating": "kl"}, "is_correction_gating must be one of"),
        (token | {"is_correction_mode": "drop"}, "is_correction_mode must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(**options)
    assert preset(entropy_coef=0.0) == preset()


def written_out(batch, policy_loss_type, *, kl_estimator, dual_clip, by_token, correction):
    """The loss from the formulas of OpenRLHF 0.11.2."""
    m = batch.mask.to(batch.logprobs.dtype)
    a, x = batch.advantages, batch.logprobs - batch.old
    if policy_loss_type == "ppo":
        ratio = x.clamp(-20, 20).exp()
    else:
        ratio = ((x * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1)).exp()
    surrogate = torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a)
    if dual_clip is not None:
        surrogate = torch.where(a < 0, torch.max(surrogate, dual_clip * a), surrogate)
    w = (batch.old - batch.rollout).exp()
    if correction == "mask":
        surrogate = torch.where((w >= 0.8) & (w <= 1.2), w, 0) * surrogate
    elif correction == "clip":
        surrogate = w.clamp(0.8, 1.2) * surrogate
    if not by_token:
        lengths = m.sum(-1)
        means = -(surrogate * m).sum(-1) / lengths.clamp(min=1)
        return means.sum() / (lengths > 0).sum()
    z = batch.logprobs - batch.ref
    bounded = z.clamp(min=-10)
    kl = {"k1": z, "k2": z**2 / 2, "k3": (-bounded).exp() - 1 + bounded}[kl_estimator]
    term = -surrogate + 0.3 * kl.clamp(-10, 10) - 0.05 * batch.entropy
    return (term * m).sum() / m.sum()


@pytest.mark.parametrize(
    ("policy_loss_type", "kl_estimator", "dual_clip", "by_token", "correction"),
    (
        ("ppo", "k1", None, True, "mask"),
        ("ppo", "k2", 1.75, True, "clip"),
        ("ppo", "k3", 1.75, True, None),
        ("ppo", None, 1.75, False, "mask"),
        ("gspo", None, None, False, None),
    ),
)
def test_against_its_formulas(
    backend, policy_loss_type, kl_estimator, dual_clip, by_token, correction
):
    batch = make_batch()
    batch.ref[0, :3] = batch.logprobs.detach()[0, :3] + torch.tensor([4.0, 12.0, -12.0])
    settings = {"dual_clip": dual_clip, "token_level_loss": by_token} | CLIPS
    if by_token:
        settings |= {"kl_use_loss": True, "kl_init_coef": 0.3, "kl_estimator": kl_estimator}
        settings["entropy_coef"] = 0.05
    if correction is not None:
        settings |= {"is_correction_level": "token", "is_correction_mode": correction}
        settings["is_correction_threshold"] = (0.8, 1.2)
    config = rk.PolicyLossConfig.openrlhf(policy_loss_type, **settings)

    def theirs(batch):
        loss = written_out(
            batch,
            policy_loss_type,
            kl_estimator=kl_estimator,
            dual_clip=dual_clip,
            by_token=by_token,
            correction=correction,
        )
        return loss, {}

    compare_policy_loss(theirs, batch, config)


def test_advantages_against_its_formulas(backend):
    rewards, values = torch.randn(2, 5, 13)
    mask = random_mask(5, 13)
    r, v = (torch.where(mask, x.double(), 0) for x in (rewards, values))
    advantages, returns = torch.zeros(2, 5, 14, dtype=torch.float64)
    for t in reversed(range(13)):
        v_next = v[:, t + 1] if t < 12 else 0
        advantages[:, t] = r[:, t] + 0.9 * v_next - v[:, t] + 0.9 * 0.8 * advantages[:, t + 1]
        returns[:, t] = r[:, t] + 0.9 * returns[:, t + 1]
    raw = rk.gae(rewards, values, mask=mask, gamma=0.9, lam=0.8, masked="zero")
    close(raw.advantages[mask], advantages[:, :13][mask], FP32)
    close(raw.returns[mask], (advantages[:, :13] + v)[mask], FP32)
    to_go = rk.discounted_returns(rewards, mask=mask, gamma=0.9, masked="zero")
    close(to_go[mask], returns[:, :13][mask], FP32)
    kept = advantages[:, :13][mask]
    whitened = (kept - kept.mean()) * kept.var(correction=0).clamp(min=1e-8).rsqrt()
    close(rk.whiten(raw.advantages, mask=mask, unbiased=False, eps=0)[mask], whitened, FP32)
    scores = torch.randn(12)
    grouped = scores.double().view(3, 4)
    grouped = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-9)
    close(rk.group_advantages(scores, 4, eps=1e-9), grouped.flatten(), FP32)
