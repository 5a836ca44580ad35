"""Parity with verl 0.9.1: losses of policy and value, KL estimates, log-probabilities.

The actor's loss is compared through `ppo_loss`, the function that its workers call, with the policy
losses from its registry. Masks have gaps inside rows and one row that is wholly masked. Different
by design:

- verl multiplies by the mask in places; here NaN under the mask changes nothing.
- verl's `kl_penalty` clamps k3; here that is an option of the loss (PolicyLossConfig.verl sets it).
- Its bfloat16 log-probabilities are bfloat16 on CPU, ours float32.
"""

import importlib.util
import inspect
import math

import pytest

# Not importorskip: an import that fails where verl is installed must show.
if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl, which `make test` installs", allow_module_level=True)

import torch
import verl.utils.torch_functional as verl_F
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

from tests.parity.comparison import (
    FP32,
    close,
    compare_policy_loss,
    compare_token_logprobs,
    probable,
)
from tests.parity.verl_cases import (
    ACTOR,
    AGGREGATIONS,
    DP_SIZE,
    EXACT,
    GLOBAL_BATCH,
    GLOBAL_TOKENS,
    SCALE_FACTOR,
    actor_loss,
    check,
    normalizer,
    rollout_weights,
)
from tools.policy_batches import make_batch

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import random_mask

KL_TYPES = ("low_var_kl", "kl+", "mse", "abs+", "k3+", "k1", "k2+", "abs")
ROLLOUT = (None, ("token", 1.25), ("sequence", 1.5), ("token", "0.8_1.2"), ("sequence", "0.5_2.0"))


@pytest.mark.parametrize("loss_mode", ("vanilla", "gspo", "sapo", "cispo", "gpg"))
def test_actor_loss(backend, loss_mode):
    for i, loss_agg_mode in enumerate(AGGREGATIONS):
        terms = {
            "entropy_coeff": 0.05,
            "use_kl_loss": True,
            "kl_loss_coef": 0.3,
            "kl_loss_type": KL_TYPES[i],
        }
        if loss_mode == "sapo" and loss_agg_mode != "seq-mean-token-mean":
            terms = {}
        # Seconds a call in Triton's interpreter.
        for distributed in (i % 2 == 0,) if backend in ("cuda", "triton") else (False, True):
            if loss_mode == "sapo" and not distributed and "norm" in loss_agg_mode:
                continue
            batch = make_batch(seed=i)
            rollout = ROLLOUT[(i + distributed) % 5]
            ours, theirs = check(
                batch, loss_mode, loss_agg_mode, distributed=distributed, rollout=rollout, **terms
            )
            check_metrics(loss_mode, terms, rollout, batch, ours, theirs)


def check_metrics(loss_mode, terms, rollout, batch, ours, theirs):
    close(ours["pg_loss"], theirs["actor/pg_loss"], 10 * FP32, scale=0.1)
    if terms:
        close(ours["kl_loss"], theirs["kl_loss"], FP32)
        close(ours["entropy_loss"], theirs["actor/entropy_loss"], FP32)
    if rollout is not None:
        mean = verl_F.masked_mean(rollout_weights(batch, *rollout), batch.mask)
        close(ours["correction_mean"], mean, FP32)
        assert abs(mean - 1) > 1e-3
    if loss_mode == "gpg":
        return
    close(ours["k1_old"], theirs["actor/ppo_kl"], 10 * FP32, scale=0.1)
    clipped = ours["clip_frac_low"] + ours["clip_frac_high"]
    close(clipped, theirs["actor/pg_clipfrac"], FP32)
    close(ours["dual_clip_frac"], theirs["actor/pg_clipfrac_lower"], FP32)
    if loss_mode != "sapo":
        assert ours["clip_frac_low"] > 0.02 and ours["clip_frac_high"] > 0.02
    if loss_mode == "vanilla":
        assert ours["dual_clip_frac"] > 0.02


@pytest.mark.parametrize("loss_mode", ("dppo_tv", "dppo_kl"))
def test_gated_losses(backend, loss_mode):
    batch = probable(make_batch(6, 40))
    bounds = {"clip_ratio_low": 0.011, "clip_ratio_high": 0.012}
    if loss_mode == "dppo_kl":
        bounds = {"clip_ratio_low": 0.0031, "clip_ratio_high": 0.0027}
    terms = {"entropy_coeff": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.3, "clip_ratio_c": 1.4}
    for rollout in ROLLOUT[:2]:
        ours, theirs = check(
            batch, loss_mode, "token-mean", distributed=False, rollout=rollout, **terms, **bounds
        )
        close(ours["pg_loss"], theirs["actor/pg_loss"], 10 * FP32, scale=0.1)
        dropped = ours["gate_frac_low"] + ours["gate_frac_high"]
        close(dropped, theirs["actor/pg_clipfrac"], FP32)
        assert ours["gate_frac_low"] > 0.02 and ours["gate_frac_high"] > 0.02


def test_geo_mean(backend):
    """GMPO: of advantages of sequences, and a mean over all rows, those without a token too."""
    batch = make_batch(6, 40)
    each = batch.advantages[:, :1].expand_as(batch.advantages).contiguous()
    batch = batch._replace(advantages=each)
    actor = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "loss_agg_mode": "seq-mean-token-mean"}
    config = rk.PolicyLossConfig.verl("geo_mean", **actor)

    def theirs(batch):
        return actor_loss(batch, "geo_mean", distributed=False, **actor)

    rows = float(len(each))
    ours, metrics = compare_policy_loss(theirs, batch, config, normalizer=rows, exact=EXACT)
    close(ours["k1_old"], metrics["actor/ppo_kl"], 10 * FP32, scale=0.1)
    assert ours["clip_frac_low"] > 0.02 and ours["clip_frac_high"] > 0.02
    assert rk.PolicyLossConfig.verl("geo_mean", clip_ratio_high=1e3).clip_high is None
    with pytest.raises(ValueError, match="clip_ratio_low must be a number >= 0"):
        rk.PolicyLossConfig.verl("geo_mean", clip_ratio_low=-0.1)
    with pytest.raises(ValueError, match="weights that were capped one by one"):
        rk.PolicyLossConfig.verl("geo_mean", rollout_is="token", rollout_is_threshold=2.0)


def test_dro():
    """Its penalty pulls to old: ours has it as the reference."""
    batch = make_batch()
    batch = batch._replace(ref=batch.old)
    for distributed, mode in ((True, "token-mean"), (False, "seq-mean-token-mean")):
        actor = ACTOR | {"loss_agg_mode": mode, "entropy_coeff": 0.05}

        def theirs(batch, distributed=distributed, actor=actor):
            policy = {"dro_beta": 0.3}
            return actor_loss(batch, "dro", distributed=distributed, policy=policy, **actor)

        ours, metrics = compare_policy_loss(
            theirs,
            batch,
            rk.PolicyLossConfig.verl("dro", dro_beta=0.3, **actor),
            normalizer=normalizer(mode) if distributed else None,
            exact=EXACT,
        )
        close(ours["k1_old"], metrics["actor/ppo_kl"], 10 * FP32, scale=0.1)


@pytest.mark.parametrize(
    ("loss_type", "rollout_is", "threshold"),
    (
        ("ppo_clip", None, 2.0),
        ("ppo_clip", "sequence", 1.1),
        ("reinforce", None, 2.0),
        ("reinforce", "token", 1.25),
        ("reinforce", "token", "0.8_1.3"),
    ),
)
def test_bypass_mode(loss_type, rollout_is, threshold):
    """The old log-probabilities are the rollout's; the weight is of the current ones."""
    correction = {"loss_type": loss_type, "rollout_is": rollout_is}
    correction |= {"rollout_is_threshold": threshold}
    actor = ACTOR | {"loss_agg_mode": "token-mean", "use_kl_loss": True, "kl_loss_coef": 0.3}
    policy = {"rollout_correction": RolloutCorrectionConfig(bypass_mode=True, **correction)}

    def theirs(batch):
        return actor_loss(batch, "bypass_mode", distributed=True, policy=policy, **actor)

    config = rk.PolicyLossConfig.verl("bypass_mode", **actor, **correction)
    ours, metrics = compare_policy_loss(
        theirs, make_batch(), config, normalizer=normalizer("token-mean"), exact=EXACT
    )
    close(ours["k1_old"], metrics["actor/ppo_kl"], 10 * FP32, scale=0.1)
    if threshold == "0.8_1.3":
        assert ours["gate_frac_low"] > 0.05 and ours["gate_frac_high"] > 0.05


def test_what_folds_into_weights():
    """What the messages of refused options say to pass instead."""
    batch = make_batch(seed=2)
    m = batch.mask

    def ours(config, advantages, **arguments):
        return rk.policy_loss(
            batch.logprobs, batch.old, advantages, m,
            normalizer=normalizer("token-mean"), config=config, **arguments,
        ).loss  # fmt: skip

    def same(found, loss_mode, correction=None, weights=None, **policy):
        if correction is not None:
            policy["rollout_correction"] = RolloutCorrectionConfig(bypass_mode=True, **correction)
        expected, _ = actor_loss(
            batch, loss_mode, distributed=True, weights=weights, policy=policy, **ACTOR
        )
        slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (found, expected)]
        close(found.detach(), expected.detach(), FP32, scale=float(slopes[1].abs().sum()))
        close(*slopes, 3 * FP32)

    preset = rk.PolicyLossConfig.verl
    level = {"level": "sequence", "high": 1.5, "log_ratio_clamp": 20}
    found = rk.mismatch_weights(batch.logprobs.detach(), batch.old, m, **level)
    config = preset("bypass_mode", loss_type="reinforce")
    reinforce = {"loss_type": "reinforce", "rollout_is": "sequence", "rollout_is_threshold": 1.5}
    same(ours(config, batch.advantages * found.weights), "bypass_mode", reinforce)
    found = rk.mismatch_weights(batch.old, batch.rollout, m, **level)
    config = preset("dro", dro_beta=0.3)
    loss = ours(config, batch.advantages, weights=found.weights, ref_logprobs=batch.old)
    same(loss, "dro", weights=rollout_weights(batch, "sequence", 1.5), dro_beta=0.3)
    found = rk.mismatch_weights(batch.old, batch.rollout, m, **level, normalize=True)
    weights = rollout_corr_helper.compute_rollout_correction_weights(
        batch.old - batch.rollout, m.long(), "sequence", 1.5, rollout_is_batch_normalize=True
    )[0]
    loss = ours(preset(**ACTOR), batch.advantages * found.weights)
    same(loss, "vanilla", weights=weights)


@pytest.mark.parametrize("kl_loss_type", KL_TYPES)
def test_kl_loss_and_its_clamps(backend, kl_loss_type):
    batch = make_batch(4, 9)
    far = torch.tensor([2.0, 4.0, 12.0, 25.0, -4.0, -12.0, -25.0])
    batch.ref[0, :7] = batch.logprobs.detach()[0, :7] + far
    mask = batch.mask.clone()
    mask[0] = True
    batch = batch._replace(mask=mask)
    terms = {"use_kl_loss": True, "kl_loss_coef": 0.5, "kl_loss_type": kl_loss_type}
    ours, theirs = check(batch, "vanilla", "token-mean", distributed=False, **terms)
    close(ours["kl_loss"], theirs["kl_loss"], FP32)
    if kl_loss_type in ("low_var_kl", "k3+"):
        # Four of the seven at the bound of 10.
        assert 40 < float(ours["kl_loss"]) * float(mask.sum()) < 120


@pytest.mark.parametrize(
    ("loss_mode", "low", "high"), (("vanilla", -20.0, 20.0), ("gspo", -22.0, 10.0))
)
def test_log_ratio_clamps(backend, loss_mode, low, high):
    batch = make_batch(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    drift = torch.tensor([[high + 2.0], [high - 2.0], [-22.0]])
    logprobs = (batch.old + drift).requires_grad_()
    batch = batch._replace(logprobs=logprobs, mask=mask, advantages=-batch.advantages.abs())
    ours, _ = check(
        batch, loss_mode, "token-mean", distributed=False, clip_ratio_c=1e12, use_kl_loss=False
    )
    close(ours["ratio_max"], math.exp(high), FP32)
    close(ours["ratio_min"], math.exp(low), 1e-5)


def test_defaults_are_those_of_actor_config():
    theirs = {f: v.default for f, v in ActorConfig.__dataclass_fields__.items()}
    ours = inspect.signature(rk.PolicyLossConfig.verl).parameters
    names = [name for name in ours if name in theirs]
    assert {n: ours[n].default for n in names} == {n: theirs[n] for n in names} and len(names) == 11
    ours = {n: p.default for n, p in ours.items() if n.startswith("rollout")}
    theirs = inspect.signature(
        rollout_corr_helper.compute_rollout_correction_and_rejection_mask
    ).parameters
    assert ours == {name: theirs[name].default for name in ours} and len(ours) == 4
    ours = inspect.signature(rk.PolicyLossConfig.verl).parameters
    assert ours["dro_beta"].default == PolicyLossConfig.__dataclass_fields__["dro_beta"].default
    loss_type = RolloutCorrectionConfig.__dataclass_fields__["loss_type"]
    assert ours["loss_type"].default == loss_type.default
    preset = rk.PolicyLossConfig.verl
    assert preset(clip_ratio=0.3).clip_high == 0.2
    assert preset(clip_ratio=0.3, clip_ratio_high=None).clip_high == 0.3


def test_every_policy_loss_is_offered_or_refused():
    preset = rk.PolicyLossConfig.verl
    offered = ("vanilla", "gspo", "sapo", "cispo", "gpg", "geo_mean", "dppo_tv", "dppo_kl")
    offered += ("bypass_mode",)
    for name in core_algos.POLICY_LOSS_REGISTRY:
        if name == "dro":
            assert preset(name, dro_beta=0.1)
        elif name in offered:
            assert preset(name)
        else:
            with pytest.raises(ValueError, match=f"loss_mode='{name}' cannot be expressed"):
                preset(name)
    assert len(core_algos.POLICY_LOSS_REGISTRY) == 12
    dro = {"loss_mode": "dro", "dro_beta": 0.1}
    reinforce = {"loss_mode": "bypass_mode", "loss_type": "reinforce"}
    for options, message in (
        ({"loss_mode": "ppo"}, "loss_mode must be one of"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of"),
        ({"use_kl_loss": True, "kl_loss_type": "full"}, "kl_loss_type must be one of"),
        ({"rollout_is_batch_normalize": True}, "rollout_is_batch_normalize cannot be expressed"),
        ({"rollout_rs": "token_k1"}, "rollout_rs='token_k1' cannot be expressed"),
        ({"rollout_is": "token", "rollout_is_threshold": "a_b"}, "a number or 'low_high'"),
        ({"rollout_is": "word"}, "rollout_is must be one of"),
        ({"loss_mode": "sapo", "use_kl_loss": True}, "'sapo' with 'token-mean' cannot"),
        ({"loss_mode": "dro"}, "dro_beta must be a number > 0"),
        (dro | {"use_kl_loss": True}, "the penalty has it: add a second call"),
        (dro | {"rollout_is": "token"}, "weights the penalty too: pass the weights"),
        (reinforce | {"rollout_is": "sequence"}, "multiply the advantages by mismatch_weights"),
        (reinforce | {"loss_type": "ppo"}, "loss_type must be one of ppo_clip, reinforce"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(**options)
    norm = preset(loss_agg_mode="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="normalizer must be given"):
        batch = make_batch()
        rk.policy_loss(*batch[:3], mask=batch[3], config=norm)


@pytest.mark.parametrize("kind", ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"))
@pytest.mark.parametrize("suffix", ("", "+"))
def test_kl_penalty(backend, kind, suffix):
    """Within verl's clamps of k3; `test_kl_loss_and_its_clamps` is about these."""
    batch = make_batch()
    estimator = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(kind, kind) + suffix
    weights = torch.randn(batch.mask.shape)

    def run(function, x):
        x = x.detach().requires_grad_()
        kl = function(x, batch.ref.to(x.dtype))
        return kl.detach(), torch.autograd.grad((kl * weights).sum(), x)[0]

    def theirs(x, ref):
        return core_algos.kl_penalty(x, ref, kind + suffix)

    actual = run(lambda x, ref: rk.kl_penalty(x, ref, estimator=estimator), batch.logprobs)
    oracle = run(theirs, batch.logprobs.double())
    x = batch.logprobs.detach().double() - batch.ref.double()
    closed = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}
    slopes = {"k1": torch.ones_like(x), "k2": x, "k3": 1 - torch.exp(-x), "abs": x.sign()}
    name = estimator.removesuffix("+")
    close(oracle[0], closed[name], 1e-12)
    close(oracle[1], weights * slopes["k2" if suffix else name], 1e-12)
    for a, o in zip(actual, oracle, strict=True):
        close(a, o, FP32)
        assert o.abs().max() > 0.1


@pytest.mark.parametrize("distributed", (False, True))
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_value_loss(backend, loss_agg_mode, distributed):
    old, returns = torch.randn(2, 5, 13)
    values = (old + 0.4 * torch.randn(5, 13)).requires_grad_()
    mask = random_mask(5, 13)
    config = rk.PolicyLossConfig.verl(loss_agg_mode=loss_agg_mode)
    divisor = normalizer(loss_agg_mode) if distributed else config.normalizer
    if not distributed and loss_agg_mode == "seq-mean-token-sum-norm":
        divisor = float(mask.any(-1).sum()) * SCALE_FACTOR
    batch_info = {"loss_scale_factor": SCALE_FACTOR}
    if distributed:
        batch_info |= {
            "dp_size": DP_SIZE,
            "batch_num_tokens": GLOBAL_TOKENS,
            "global_batch_size": GLOBAL_BATCH,
        }
    x = values.detach().double().requires_grad_()
    theirs, clip_fraction = core_algos.compute_value_loss(
        x, returns.double(), old.double(), mask, 0.25, loss_agg_mode, **batch_info
    )
    options = {"clip_range": 0.25, "aggregation": config.aggregation, "normalizer": divisor}
    loss, metrics = rk.value_loss(values, old, returns, mask=mask, **options)
    y = values.detach().double().requires_grad_()
    oracle = reference.value_loss(y, old.double(), returns.double(), mask, **options)[0]
    slopes = [torch.autograd.grad(*pair)[0] for pair in ((loss, values), (theirs, x), (oracle, y))]
    close(theirs, oracle, EXACT)
    close(slopes[1], slopes[2], EXACT)
    close(loss, oracle, FP32)
    close(slopes[0], slopes[2], FP32)
    close(metrics["clip_frac"], clip_fraction, FP32)
    assert oracle > 1e-3 and 0.1 < clip_fraction < 0.6
    assert (slopes[0][mask] != 0).float().mean() > 0.4 and (slopes[0][~mask] == 0).all()


@pytest.mark.parametrize(("vocabulary", "temperature"), ((1031, 1.0), (37, 0.75)))
def test_logprobs_and_entropy(backend, vocabulary, temperature):
    def theirs(x, labels, temperature):
        x = x / temperature
        return verl_F.logprobs_from_logits(x, labels), verl_F.entropy_from_logits(x)

    compare_token_logprobs(theirs, vocabulary, temperature=temperature)
