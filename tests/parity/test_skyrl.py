"""SkyRL's policy losses, written out from their formulas, against PolicyLossConfig.skyrl."""

import pytest
import torch

from tests.parity.comparison import (
    FP32,
    close,
    compare_policy_loss,
    probable,
    refused,
    row_mean,
    row_sum,
    with_gradients,
    written_out,
)
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.skyrl
CLIPS = {"eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 1.75}
CISPO = {"cispo_eps_clip_low": 0.3, "cispo_eps_clip_high": 0.4}
REDUCTIONS = (
    "token_mean",
    "token_mean_legacy",
    "sequence_mean",
    "seq_mean_token_sum_norm",
    "prompt_mean",
)
MAX_LENGTH, MICRO_BATCHES = 24, 1
# Two rows, then the rest.
PROMPTS = (slice(0, 2), slice(2, 5))


def token_scale(mask, reduction):
    """[B, 1]: what SkyRL multiplies the advantages by; its losses are sums."""
    rows, length = mask.shape[0], mask.sum(-1, keepdim=True).clamp(min=1).double()
    one = torch.ones_like(length)
    if reduction in ("token_mean", "token_mean_legacy"):
        return one / (mask.sum() * MICRO_BATCHES)
    if reduction == "sequence_mean":
        return one / (rows * length)
    if reduction == "seq_mean_token_sum_norm":
        return one / (rows * MAX_LENGTH)
    for prompt in PROMPTS:
        one[prompt] /= len(PROMPTS) * mask[prompt].sum()
    return one


def kept_by_dppo(batch, kind, low, high):
    p, q = batch.logprobs.detach().exp(), batch.old.exp()
    moved = p - q
    if kind == "binary_tv":
        above, below = moved > high, -moved > low
    else:
        others = ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        kl = q * (batch.old - batch.logprobs.detach()) + (1 - q) * others
        above, below = (moved > 0) & (kl > high), (moved < 0) & (kl > low)
    a = batch.advantages
    return ~((a > 0) & above | (a < 0) & below)


def objective(batch, name, dppo=None):
    """The term of a token; in losses with a ratio to the rollout `old` is the rollout."""
    a, lp, m = batch.advantages, batch.logprobs, batch.mask
    x = (lp - batch.old).clamp(-20, 20)
    if name == "gspo":
        mean = row_mean(lp - batch.old, m).detach()
        x = (lp - lp.detach() + mean).clamp(max=10)
    ratio = x.exp()
    if name == "cispo":
        return -a * ratio.clamp(0.7, 1.4).detach() * lp
    if name == "sapo":
        tau = torch.where(a > 0, 1.0, 1.5)
        return -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if name == "rollout_is":
        inside = (ratio > 0.8) & (ratio < 1.28)
        return -torch.where(inside, ratio, 0).detach() * a * lp
    if name == "dppo":
        return -ratio * a * kept_by_dppo(batch, *dppo)
    if name == "importance_sampling":
        return -(lp - batch.old).exp() * a
    if name == "cross_entropy":
        return -lp
    term = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a)
    if name == "dual_clip":
        term = torch.where(a < 0, torch.min(-a * 1.75, term), term)
    return term


def formula(batch, *, name, reduction, kl=None, entropy=0.0, tis=None, dppo=None):
    m = batch.mask
    scaled = batch._replace(advantages=batch.advantages * token_scale(m, reduction))
    term = objective(scaled, name, dppo)
    if tis is not None:
        level, high = tis
        x = batch.old - batch.rollout
        w = (row_sum(x, m) if level == "sequence" else x).clamp(-20, 20).exp()
        term = term * w.clamp(max=high)
    loss = torch.where(m, term, 0).sum()
    if kl is not None:
        x = batch.ref - batch.logprobs
        if kl == "k3":
            near = x.clamp(-20, 20)
            value = (near.exp() - near - 1).clamp(-10, 10)
        else:
            value = {"k1": -x, "abs": x.abs(), "k2": x * x / 2}[kl]
        loss = loss + 0.3 * row_mean(value, m).mean()
    if entropy:
        loss = loss - entropy * torch.where(m, batch.entropy, 0).sum() / m.sum()
    return loss


def ours_of(batch, reduction, with_kl):
    """(advantages, normalizer), as the table of the docstring has them."""
    m = batch.mask
    rows, tokens = m.shape[0], m.sum()
    n = m.sum(-1, keepdim=True).double()
    of_prompt = torch.ones_like(n)
    for prompt in PROMPTS:
        of_prompt[prompt] = len(PROMPTS) * m[prompt].sum()
    a = batch.advantages
    if with_kl:
        factor = {
            "token_mean": rows * n / tokens,
            "token_mean_legacy": rows * n / (MICRO_BATCHES * tokens),
            "sequence_mean": torch.ones_like(n),
            "seq_mean_token_sum_norm": n / MAX_LENGTH,
            "prompt_mean": rows * n / of_prompt,
        }[reduction]
        return (a * factor).to(a.dtype), float(rows)
    if reduction == "prompt_mean":
        return (a / of_prompt).to(a.dtype), None
    divisors = {
        "token_mean": float(tokens),
        "token_mean_legacy": float(tokens * MICRO_BATCHES),
        "sequence_mean": float(rows),
        "seq_mean_token_sum_norm": float(rows * MAX_LENGTH),
    }
    return a, divisors[reduction]


def check(batch, config, **options):
    """Loss and gradients of ours against the formula in float64; our metrics."""
    wide = type(batch)(*(x.double() if x.is_floating_point() else x for x in batch))
    wide = wide._replace(
        logprobs=wide.logprobs.detach().requires_grad_(),
        entropy=wide.entropy.detach().requires_grad_(),
    )
    theirs = with_gradients(formula(wide, **options), wide)
    advantages, divisor = ours_of(batch, options["reduction"], options.get("kl") is not None)
    if options["name"] == "cross_entropy":
        # A sum, whatever the reduction.
        advantages, divisor = torch.ones_like(batch.advantages), 1.0
    result = rk.policy_loss(
        batch.logprobs,
        batch.old,
        advantages,
        batch.mask,
        ref_logprobs=batch.ref,
        rollout_logprobs=batch.rollout,
        entropy=batch.entropy,
        normalizer=divisor,
        config=config,
    )
    ours = with_gradients(result.loss, batch)
    close(ours[0], theirs[0], FP32, scale=float(theirs[1].abs().sum()))
    for pair in zip(ours[1:], theirs[1:], strict=True):
        close(*pair, 3 * FP32)
    assert abs(theirs[0]) > 1e-3 and (theirs[1][batch.mask] != 0).float().mean() > 0.2
    return result.metrics


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ("regular", "dual_clip", "gspo", "cispo", "sapo"))
def test_losses_and_reductions(name, reduction):
    batch = make_batch(seed=2)
    options = CLIPS | CISPO | {"loss_reduction": reduction, "tau_neg": 1.5, "kl_loss_coef": 0.3}
    kl = {"regular": "k3", "dual_clip": "k1", "gspo": "k2", "cispo": "abs", "sapo": "k3"}[name]
    config = preset(name, **options, kl_estimator_type=kl)
    ours = check(batch, config, name=name, reduction=reduction, kl=kl)
    clipped = ours["clip_frac_low"] + ours["clip_frac_high"]
    assert clipped > 0.05 or name == "sapo"
    assert (ours["dual_clip_frac"] > 0.02) == (name == "dual_clip")

    for tis in (("token", 1.1), ("sequence", 1.3)):
        options |= {"tis_ratio_type": tis[0], f"{tis[0]}_tis_ratio_clip_high": tis[1]}
        config = preset(name, **options, use_kl_loss=False)
        check(batch, config, name=name, reduction=reduction, tis=tis)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ("importance_sampling", "cross_entropy"))
def test_sums(name, reduction):
    config = preset(name, loss_reduction=reduction, use_kl_loss=False, tis_ratio_type="token")
    check(make_batch(), config, name=name, reduction=reduction)


@pytest.mark.parametrize("reduction", ("token_mean", "prompt_mean"))
def test_ratios_to_the_rollout(reduction):
    batch = probable(make_batch(seed=3))
    options = CLIPS | CISPO | {"loss_reduction": reduction, "use_kl_loss": False}
    # A third of the way: most ratios are inside the bounds.
    near = (batch.old + (batch.logprobs.detach() - batch.old) / 3).requires_grad_()
    ours = check(
        batch._replace(logprobs=near),
        preset("rollout_is", **options),
        name="rollout_is",
        reduction=reduction,
    )
    assert ours["gate_frac_low"] > 0.05 and ours["gate_frac_high"] > 0.05
    check(
        batch, preset("cispo", cispo_anchor="rollout", **options), name="cispo", reduction=reduction
    )
    for kind, low, high in (("binary_tv", 0.011, 0.012), ("binary_kl", 0.0031, 0.0027)):
        config = preset("dppo", dppo_type=kind, delta_low=low, delta_high=high, **options)
        dppo = (kind, low, high)
        ours = check(batch, config, name="dppo", reduction=reduction, dppo=dppo)
        assert ours["gate_frac_low"] > 0.02 and ours["gate_frac_high"] > 0.02


def test_entropy():
    batch = make_batch()
    config = preset(**CLIPS, use_kl_loss=False, use_entropy_loss=True, entropy_loss_coef=0.05)
    check(batch, config, name="regular", reduction="token_mean", entropy=0.05)
    assert preset("cross_entropy", use_entropy_loss=True).entropy_coef == 0


def test_clamps_of_the_log_ratio():
    """Beyond +-20 (gspo: 10) the gradient is 0."""
    batch = make_batch(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    for name, drift in (("regular", (22.0, 18.0, -22.0)), ("gspo", (12.0, 8.0, -22.0))):
        moved = (batch.old + torch.tensor(drift).unsqueeze(-1)).requires_grad_()
        far = batch._replace(logprobs=moved, mask=mask, advantages=-batch.advantages.abs())
        config = preset(name, **CLIPS, use_kl_loss=False, loss_reduction="sequence_mean")
        theirs = written_out(formula, name=name, reduction="sequence_mean")
        compare_policy_loss(theirs, far, config, normalizer=3.0)


@pytest.mark.parametrize(
    ("criterion", "options"),
    (
        ("seq_mean_ratio", {"sequence_mask_metric": "geometric"}),
        ("seq_sum_ratio", {"sequence_mask_metric": "product"}),
        ("seq_max_ratio", {"outlier_token_is_threshold_high": 1.3}),
        (
            "token_ratio",
            {"token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.2},
        ),
    ),
)
def test_masks_fold(criterion, options):
    """They are refused with the criterion of mismatch_weights that is the same mask."""
    refused(preset, ((options, f"'{criterion}': .*weights"),))
    batch = make_batch(7, 13)
    x, m = batch.old - batch.rollout, batch.mask
    low, high = {"seq_max_ratio": (0.7, 1.45), "token_ratio": (0.8, 1.2)}.get(
        criterion, (0.96, 1.04) if criterion == "seq_mean_ratio" else (0.7, 1.5)
    )
    statistic = {
        "seq_mean_ratio": row_mean(x, m).expand_as(x),
        "seq_sum_ratio": row_sum(x, m).expand_as(x),
        "token_ratio": x,
    }.get(criterion)
    if statistic is None:
        inside = (x.exp() >= low) & (x.exp() <= high)
        keep = (inside | ~m).all(-1, keepdim=True).expand_as(m)
    else:
        keep = (statistic.exp() >= low) & (statistic.exp() <= high)
    assert 0.1 < keep[m].float().mean() < 0.95
    rules = {"reject": {criterion: (low, high)}}
    if statistic is None:
        rules = {"reject": {criterion: high}, "veto": low}
    found = rk.mismatch_weights(batch.old, batch.rollout, m, log_ratio_clamp=20, **rules)
    close(found.weights, (keep & m).float(), FP32)


def test_losses_by_covariance_fold():
    """With the tokens of the largest covariance given, as the messages say."""
    batch = make_batch(seed=4)
    a, m = batch.advantages, batch.mask
    chosen = torch.zeros_like(m)
    chosen[1, ::3] = True
    chosen &= m
    count = float(m.sum())

    def ours(config, advantages, mask=m):
        return rk.policy_loss(
            batch.logprobs, batch.old, advantages, mask, ref_logprobs=batch.old,
            normalizer=count, config=config,
        ).loss  # fmt: skip

    options = {"use_kl_loss": False} | CLIPS
    x = batch.logprobs - batch.old
    unclipped = -a * x.exp()
    clip_cov = torch.maximum(unclipped, -a * x.exp().clamp(0.8, 1.28)) * ~chosen
    kl_cov = torch.where(chosen, unclipped + 0.7 * x.abs(), unclipped)
    plain = preset(**options, log_ratio_clamp=None)
    pull = preset("importance_sampling", **options, kl_coef=0.7, kl_estimator="abs")
    for found, term in (
        (ours(plain, a * ~chosen), clip_cov),
        (
            ours(preset("importance_sampling", **options), a)
            + ours(pull, torch.zeros_like(a), chosen),
            kl_cov,
        ),
    ):
        expected = torch.where(m, term, 0).sum() / count
        slopes = [
            torch.autograd.grad(x, batch.logprobs, retain_graph=True)[0] for x in (found, expected)
        ]
        close(found.detach(), expected.detach(), FP32, scale=float(slopes[1].abs().sum()))
        close(*slopes, 3 * FP32)


def test_what_is_refused():
    refused(
        preset,
        (
            ({"policy_loss_type": "clip_cov"}, "'clip_cov' cannot be expressed: it drops tokens"),
            ({"policy_loss_type": "kl_cov"}, "'kl_cov' cannot be expressed: it adds a KL"),
            ({"policy_loss_type": "ppo"}, "policy_loss_type must be one of"),
            ({"loss_reduction": "mean"}, "loss_reduction must be one of"),
            ({"kl_estimator_type": "k4"}, "kl_estimator_type must be one of"),
            ({"use_entropy_loss": True}, "subtract entropy_loss_coef"),
            ({"tis_ratio_type": "row"}, "tis_ratio_type must be one of"),
            ({"policy_loss_type": "dppo", "tis_ratio_type": "token"}, "would count twice"),
            ({"policy_loss_type": "dppo", "dppo_type": "tv"}, "dppo_type must be one of"),
            ({"cispo_anchor": "ref"}, "cispo_anchor must be one of"),
            ({"sequence_mask_metric": "mean"}, "sequence_mask_metric must be one of"),
        ),
    )
    # One bound of the token mask alone does nothing in SkyRL.
    assert preset(token_mask_is_threshold_low=0.5) == preset()
