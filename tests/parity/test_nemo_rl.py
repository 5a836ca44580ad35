"""NeMo-RL's ClippedPGLossFn, written out from its formula, against PolicyLossConfig.nemo_rl.

Different by design: NeMo-RL adds 1e-8 to its divisors, and beyond its two clamps of the KL stops
the gradient of the KL's weight too (`test_beyond_the_clamps`).
"""

import pytest
import torch

from tests.parity.comparison import (
    compare_policy_loss,
    refused,
    row_mean,
    row_sum,
    written_out,
)
from tools.policy_batches import make_batch

import rlhf_kernels as rk

preset = rk.PolicyLossConfig.nemo_rl
CLIPS = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
SEQUENCES = {"token_level_loss": False, "sequence_level_importance_ratios": True}
KL_COEF, TOKENS, ROWS = 0.3, 301, 11


def kl_term(batch, kind, most_input, most):
    """With the weight exp(x - sg(x)), detached beyond the clamp of the input."""
    x = batch.ref - batch.logprobs
    weight = (batch.logprobs - batch.logprobs.detach()).exp()
    if most_input is not None:
        bounded = x.clamp(-most_input, most_input)
        weight = torch.where(x == bounded, weight, weight.detach())
        x = bounded
    value = weight * {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[kind]
    return value if most is None else value.clamp(-most, most)


def correction(batch, by_sequence, kind, low, high):
    x = batch.old - batch.rollout
    w = (row_sum(x, batch.mask) if by_sequence else x).exp()
    if kind == "tis":
        return w.clamp(low or 0, high)
    if kind == "icepop":
        return torch.where((w >= low) & (w <= high), w, 0)
    if kind == "seq-mask-tis":
        mean = row_mean(x, batch.mask).exp()
        return w * ((mean >= low) & (mean <= high))
    return w


def formula(
    batch, *, by_token=True, by_sequence=False, loss="clip", c=None, kl=None, is_correction=None
):
    a, m = batch.advantages, batch.mask
    x = batch.logprobs - batch.old
    ratio = (row_mean(x, m) if by_sequence else x).exp().expand_as(x)
    if loss == "on-policy":
        ratio = (batch.logprobs - batch.logprobs.detach()).exp()
    clipped = ratio.clamp(0.8, 1.28)
    if loss == "reinforce":
        term = -a * batch.logprobs
    elif loss == "cispo":
        term = -a * clipped.detach() * batch.logprobs
    elif loss == "on-policy":
        term = -a * ratio
    else:
        term = torch.max(-a * ratio, -a * clipped)
    if c is not None:
        term = torch.where(a < 0, torch.min(term, -a * c), term)
    if is_correction is not None:
        term = term * correction(batch, by_sequence, *is_correction)
    if kl is not None:
        term = term + KL_COEF * kl_term(batch, *kl)
    if by_token:
        return torch.where(m, term, 0).sum() / TOKENS
    return row_mean(term, m).sum() / ROWS


def check(config, batch=None, **options):
    batch = make_batch() if batch is None else batch
    by_token = options.get("by_token", True)
    theirs = written_out(formula, **options)
    divisor = TOKENS if by_token else ROWS
    return compare_policy_loss(theirs, batch, config, normalizer=divisor)[0]


def kl_options(kind, most_input=20.0, most=10.0):
    return {
        "reference_policy_kl_penalty": KL_COEF,
        "reference_policy_kl_type": kind,
        "kl_input_clamp_value": most_input,
        "kl_output_clamp_value": most,
    }


@pytest.mark.parametrize("by_token", (True, False))
@pytest.mark.parametrize("kind", ("k1", "k2", "k3"))
def test_clip_and_kl(kind, by_token):
    options = kl_options(kind) | {"token_level_loss": by_token}
    config = preset(**CLIPS, ratio_clip_c=1.75, **options)
    ours = check(config, by_token=by_token, c=1.75, kl=(kind, 20.0, 10.0))
    for name in ("clip_frac_low", "clip_frac_high", "dual_clip_frac"):
        assert ours[name] > 0.02
    config = preset(**CLIPS, **kl_options(kind, None, None))
    check(config, kl=(kind, None, None))
    assert preset(use_kl_in_reward=True).kl_coef == 0


@pytest.mark.parametrize("kind", ("k1", "k2", "k3"))
def test_beyond_the_clamps(kind):
    """There the value is the same; the gradient is with another reference, as the docstring has."""
    batch = make_batch(4, 9)
    far = torch.tensor([2.0, 4.0, 12.0, 25.0, -4.0, -12.0, -25.0])
    batch.ref[0, :7] = batch.logprobs.detach()[0, :7] + far
    mask = batch.mask.clone()
    mask[0] = True
    batch = batch._replace(mask=mask)
    wide = [batch.logprobs.double(), batch.ref.double()]
    x = (wide[1] - wide[0]).detach()
    value = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[kind]
    beyond = (x.abs() > 20) | (value.abs() > 10)
    assert 2 <= beyond[mask].sum() <= 6
    config = preset(**CLIPS, **kl_options(kind))

    def run(ref):
        result = rk.policy_loss(
            batch.logprobs,
            batch.old,
            batch.advantages,
            mask,
            ref_logprobs=ref,
            normalizer=TOKENS,
            config=config,
        )
        return result.loss.detach().double(), torch.autograd.grad(result.loss, batch.logprobs)[0]

    doubles = batch._replace(
        logprobs=wide[0].detach().requires_grad_(),
        **{name: getattr(batch, name).double() for name in ("old", "advantages", "ref")},
    )
    loss = formula(doubles, kl=(kind, 20.0, 10.0))
    (slope,) = torch.autograd.grad(loss, doubles.logprobs)
    torch.testing.assert_close(run(batch.ref)[0], loss.detach(), rtol=1e-5, atol=1e-6)
    moved = torch.where(beyond, batch.logprobs.detach() + (kind == "k1"), batch.ref)
    torch.testing.assert_close(run(moved)[1].double(), slope, rtol=1e-5, atol=1e-7)
    kept = ~beyond
    torch.testing.assert_close(run(batch.ref)[1].double()[kept], slope[kept], rtol=1e-5, atol=1e-7)


def test_other_losses():
    no_kl = {"reference_policy_kl_penalty": 0.0}
    options = CLIPS | no_kl
    ours = check(preset(**options, **SEQUENCES), by_token=False, by_sequence=True)
    assert ours["clip_frac_low"] + ours["clip_frac_high"] > 0.1
    check(preset(**options, use_cispo=True), loss="cispo")
    check(preset(**options, disable_ppo_ratio=True, ratio_clip_c=3.0), loss="reinforce")
    batch = make_batch()
    on_policy = batch._replace(old=batch.logprobs.detach().clone())
    check(preset(**options, force_on_policy_ratio=True), on_policy, loss="on-policy")


@pytest.mark.parametrize("by_sequence", (False, True))
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    ((None, None, None), ("tis", None, 1.1), ("tis", 0.9, 1.1), ("icepop", 0.8, 1.2)),
)
def test_importance_correction(kind, low, high, by_sequence):
    options = CLIPS | kl_options("k3") | {"use_importance_sampling_correction": True}
    options |= {
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }
    if by_sequence:
        options |= SEQUENCES
    ours = check(
        preset(**options),
        by_token=not by_sequence,
        by_sequence=by_sequence,
        is_correction=(kind, low, high),
        kl=("k3", 20.0, 10.0),
    )
    assert abs(ours["correction_mean"] - 1) > 1e-3


def test_what_folds():
    """seq-mask-tis as weights of the advantages, and the KL weighted by the ratio to rollout."""
    batch = make_batch(seed=1)
    low, high = 0.97, 1.04
    found = rk.mismatch_weights(
        batch.old, batch.rollout, batch.mask, level="token", reject={"seq_mean_ratio": (low, high)}
    )
    kept = found.mask.any(-1)
    assert kept.any() and not kept[batch.mask.any(-1)].all()
    config = preset(**CLIPS, reference_policy_kl_penalty=0.0)
    ours = rk.policy_loss(
        batch.logprobs, batch.old, batch.advantages * found.weights, batch.mask,
        normalizer=TOKENS, config=config,
    ).loss  # fmt: skip
    theirs = formula(batch, is_correction=("seq-mask-tis", low, high))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)

    weighted = rk.PolicyLossConfig(
        kl_coef=KL_COEF, kl_weight="ratio", log_ratio_clamp=None, normalizer=TOKENS
    )
    nothing = torch.zeros_like(batch.advantages)
    ours = rk.policy_loss(
        batch.logprobs, batch.rollout, nothing, batch.mask, ref_logprobs=batch.ref, config=weighted
    ).loss
    x = batch.ref - batch.logprobs
    term = (batch.logprobs - batch.rollout).exp() * (x.exp() - 1 - x)
    theirs = KL_COEF * torch.where(batch.mask, term, 0).sum() / TOKENS
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    slopes = [torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


def test_what_is_refused():
    tis = {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis"}
    pop = tis | {"truncated_importance_sampling_type": "icepop"}
    high = {"truncated_importance_sampling_ratio": 2.0}
    refused(
        preset,
        (
            ({"reference_policy_kl_type": "k4"}, "reference_policy_kl_type must be one of"),
            ({"sequence_level_importance_ratios": True}, "token_level_loss must be False"),
            ({"use_cispo": True, "ratio_clip_c": 3.0}, "use_cispo must be alone"),
            ({"use_cispo": True, "disable_ppo_ratio": True}, "use_cispo must be alone"),
            ({"use_on_policy_kl_approximation": True}, "second call with advantages of 0"),
            ({"positive_example_nll_weight": 0.1}, "add the loss of a second call"),
            (tis, "ratio must be a number with 'tis'"),
            (pop | high, "ratio_min must be a number with 'icepop'"),
            (high, "truncated_importance_sampling_type must be one of"),
            (tis | high | {"use_importance_sampling_correction": False}, "must be None without"),
            (
                {"truncated_importance_sampling_type": "seq-mask-tis"},
                "multiply the advantages by mismatch_weights",
            ),
        ),
    )
    plain = preset(use_kl_in_reward=True, use_on_policy_kl_approximation=True)
    assert plain == preset(use_kl_in_reward=True)
