"""OpenRLHF's policy losses.

The advantages that go with them:

    gae                   gae(..., mask=m, masked="zero"), then
                          whiten(advantages, m, unbiased=False, eps=0)
    reinforce             discounted_returns(rewards, mask=m, masked="zero", gamma=gamma), then the
                          same whitening
    reinforce_baseline    group_advantages(r, G, scale="none") per token, less KL to go, then the
                          same whitening
    group_norm            group_advantages(r, G, eps=1e-9)

OpenRLHF clamps the variance to at least 1e-8; whiten adds eps to it. With eps=0 both agree for
every variance above 1e-8.
"""

import math
from typing import TYPE_CHECKING, Literal, cast, get_args

from ..options import CommonOptions, PolicyLossOptions
from ._common import Config, inexpressible, one_of, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossType = Literal["ppo", "gspo"]
#: "seq", and the two divergences, with gspo only.
SamplingLevel = Literal["off", "token", "seq"]
SamplingMode = Literal["mask", "clip"]
Gating = Literal["ratio", "binary_kl", "tv"]
Estimator = Literal["k1", "k2", "k3"]


class Options(CommonOptions, total=False):
    """Fields of PolicyLossConfig that are not also arguments of OpenRLHF."""

    delta: float | None
    sapo_tau_pos: float
    sapo_tau_neg: float


def openrlhf(
    cls: type[Config],
    /,
    policy_loss_type: LossType = "ppo",
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    is_correction_level: SamplingLevel = "off",
    is_correction_mode: SamplingMode = "mask",
    is_correction_gating: Gating = "ratio",
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    kl_use_loss: bool = False,
    kl_init_coef: float = 0.01,
    kl_estimator: Estimator = "k1",
    kl_unbiased_gradient: bool = False,
    entropy_coef: float | None = None,
    **options: "Unpack[Options]",
) -> Config:
    """The actor's loss of OpenRLHF; names and defaults of its PolicyLoss and of its flags
    --algo.kl.* (kl_*) and --actor.entropy_coef. Checked against 0.11.2.

    The log-ratio is clamped to +-20 (gspo: not clamped), the KL estimate to +-10, and the input of
    k3 to at least -10. gspo always averages by sequence. OpenRLHF's metric clip_ratio is
    clip_frac_low + clip_frac_high here; its ppo_kl is k1_old.

    The normalizer is batch_num_tokens / dp_size with token_level_loss, else
    global_batch_size / dp_size; dp_size is the number of ranks over which gradients are averaged.

    Args:
        cls: PolicyLossConfig.
        policy_loss_type: "ppo" or "gspo".
        clip_eps_low: lower clip distance.
        clip_eps_high: upper clip distance.
        dual_clip: c > 1, or None.
        token_level_loss: mean over tokens; else mean over sequences of their means.
        is_correction_level: "off" or "token"; "seq" folds into the advantages, see its error. With
            gspo any level but "off" means the ratio to the rollout policy: pass the rollout's
            logprobs as old_logprobs. Gating, mode and threshold then have no effect.
        is_correction_mode: "mask" (weights outside the threshold become 0) or "clip".
        is_correction_gating: "ratio"; a divergence folds into the advantages, see its error.
        is_correction_threshold: (low, high).
        kl_use_loss: add the KL to the reference policy to the loss.
        kl_init_coef: weight of this KL. Apply a controller's updates with
            dataclasses.replace(config, kl_coef=...).
        kl_estimator: k1, k2 or k3.
        kl_unbiased_gradient: not expressible: OpenRLHF weights the gradient, but not the value.
            dataclasses.replace(config, kl_estimator="k2+", kl_weight="detached-ratio",
            kl_weight_max=10) has the same gradient.
        entropy_coef: weight of the entropy bonus; None is 0.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (sequence-level correction,
            divergence gating, unbiased KL gradient, KL or entropy beside means by sequence).
    """
    one_of("openrlhf", "policy_loss_type", policy_loss_type, get_args(LossType))
    levels, gatings = get_args(SamplingLevel), get_args(Gating)
    one_of("openrlhf", "is_correction_level", is_correction_level, levels)
    one_of("openrlhf", "is_correction_gating", is_correction_gating, gatings)
    one_of("openrlhf", "is_correction_mode", is_correction_mode, get_args(SamplingMode))
    one_of("openrlhf", "kl_estimator", kl_estimator, get_args(Estimator))
    gspo = policy_loss_type == "gspo"
    by_sequence = gspo or not token_level_loss
    if by_sequence and (kl_use_loss or entropy_coef):
        why = (
            "OpenRLHF averages KL and entropy over tokens, but the objective over sequences: take "
            "token_level_loss=True and multiply the advantages, of ppo, by the number of tokens "
            "over that of sequences times the length of each"
        )
        inexpressible("openrlhf", "kl_use_loss or entropy_coef beside means by sequence", why)
    if kl_use_loss and kl_unbiased_gradient:
        why = "it weights the gradient but not the value; see kl_weight for both"
        inexpressible("openrlhf", "kl_unbiased_gradient", why)
    corrected = is_correction_level != "off" and not gspo
    if corrected:
        _check_gate(is_correction_level, is_correction_gating)

    fields: PolicyLossOptions = {
        "ratio_level": "sequence" if gspo else "token",
        "clip_low": clip_eps_low,
        "clip_high": clip_eps_high,
        "dual_clip": dual_clip,
        "log_ratio_clamp": None if gspo else 20.0,
        "aggregation": "seq-mean-token-mean" if by_sequence else "token-mean",
        "entropy_coef": entropy_coef or 0.0,
    }
    if kl_use_loss:
        fields |= {"kl_coef": kl_init_coef, "kl_estimator": kl_estimator, "kl_value_clamp": 10.0}
        if kl_estimator == "k3":
            fields["kl_input_clamp"] = (-10.0, math.inf)
    if corrected:
        low, high = is_correction_threshold
        fields |= {
            "correction_level": "token",
            "correction_mode": "truncate" if is_correction_mode == "clip" else "mask",
            "correction_min": low,
            "correction_max": high,
        }
    return cls(**fields | cast(PolicyLossOptions, options))


def _check_gate(level: str, gating: str) -> None:
    """Refuses gates of another statistic than the weight, with what does the same."""
    if gating != "ratio":
        p, q = "rollout.exp()", "old.exp()"
        statistic = f"abs({p} - {q})" if gating == "tv" else "the binary KL"
        if level == "seq":
            statistic = f"the mean over its sequence of {statistic}"
        why = (
            "it drops by the divergence of two constants and keeps exp(old - rollout) as the "
            f"weight: multiply the advantages by this weight, or by 0 where {statistic} is above "
            "the threshold"
        )
        inexpressible("openrlhf", f"is_correction_gating={gating!r}", why)
    why = (
        "it drops by the geometric mean of a sequence but keeps the weights of the tokens: "
        "multiply the advantages by mismatch_weights(old, rollout, mask, level='token', "
        "reject={'seq_mean_ratio': is_correction_threshold}).weights"
    )
    refuse("openrlhf", "is_correction_level", level, {"seq": why})
