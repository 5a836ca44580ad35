"""AReaL's policy losses.

The advantages that go with them: `gae(..., mask=m)` with the normalisation of adv_norm, over
rewards less kl_ctl times the KL. AReaL has no KL to a reference policy in its loss.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

from ..enums import KlEstimator
from ..options import CommonOptions, PolicyLossOptions
from ._common import Config, inexpressible, one_of, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

SamplingLevel = Literal["token", "sequence"]


class RejectionSampling(TypedDict, total=False):
    """AReaL's RejectionSamplingConfig; the defaults are those of `_REJECTION`."""

    level: Literal["token", "sequence"]
    action: Literal["mask", "clamp"]
    metric: Literal["ratio", "kl_k1", "kl_k2", "kl_k3"]
    agg: Literal["sum", "mean", "max"]
    upper: float
    lower: float | None


class Options(CommonOptions, total=False):
    """Fields of PolicyLossConfig that are not also arguments of AReaL."""

    dual_clip: float | None
    delta: float | None
    kl_estimator: KlEstimator
    entropy_coef: float


_REJECTION: Mapping[str, Any] = {
    "level": "token",
    "action": "mask",
    "metric": "ratio",
    "agg": "mean",
    "upper": 5.0,
    "lower": None,
}
_CHOICES = {
    "level": ("token", "sequence"),
    "action": ("mask", "clamp"),
    "metric": ("ratio", "kl_k1", "kl_k2", "kl_k3"),
    "agg": ("sum", "mean", "max"),
}


def areal(
    cls: type[Config],
    /,
    *,
    eps_clip: float = 0.2,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    importance_sampling_level: SamplingLevel = "token",
    use_sapo_loss: bool = False,
    sapo_tau_pos: float = 1.0,
    sapo_tau_neg: float = 1.05,
    use_decoupled_loss: bool = False,
    rejection_sampling: RejectionSampling | None = None,
    m2_threshold: float | None = None,
    **options: "Unpack[Options]",
) -> Config:
    """The actor's loss of AReaL (`grpo_loss_fn`); names and defaults of its PPOActorConfig. Read in
    1.0.4.

    The log-ratio is not clamped. AReaL writes its dual clip as c |A|, which binds only where A < 0:
    it is dual_clip=c_clip. Its proximal_logprobs (prox_logp) are the old_logprobs here, recomputed
    or interpolated, and the behaviour's logprobs the rollout_logprobs. Without use_decoupled_loss
    the two are the same. The loss is a mean over tokens, by sequence levels too. With
    importance_sampling_level="sequence" AReaL averages the advantages of a sequence: pass them as
    [B].

    The normalizer is the number of unmasked tokens of the step over all ranks, divided by the
    number of ranks where gradients are averaged. Rejected tokens count.

    AReaL's metrics clip_ratio and dual_clip_ratio are clip_frac_low + clip_frac_high and
    dual_clip_frac here, importance_weight is ratio_mean, -approx_kl is k1_old, and
    behave_imp_weight is correction_mean, of tokens that are not rejected. AReaL's distillation
    beside the loss is ref_logprobs=teacher, kl_estimator="k1", kl_coef=distill_loss_weight.

    Args:
        cls: PolicyLossConfig.
        eps_clip: lower clip distance.
        eps_clip_higher: upper clip distance; None is eps_clip.
        c_clip: c > 1 of dual clipping, or None.
        importance_sampling_level: "token", or "sequence" (GSPO).
        use_sapo_loss: SAPO instead of the clipped ratio.
        sapo_tau_pos: tau where the advantage is positive.
        sapo_tau_neg: tau where it is not.
        use_decoupled_loss: the ratio is to the proximal policy; enables rejection_sampling.
        rejection_sampling: options of AReaL's RejectionSamplingConfig, or None for no correction.
            Expressible with metric="ratio" (by sequence with agg="mean") and with kl_k1 by token.
        m2_threshold: folds into the mask; see its error.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, one that cannot be expressed, or options that AReaL does not
            combine.
    """
    levels = get_args(SamplingLevel)
    one_of("areal", "importance_sampling_level", importance_sampling_level, levels)
    if m2_threshold is not None:
        why = "it sorts the tokens of a batch: unmask only those that it keeps"
        inexpressible("areal", f"m2_threshold={m2_threshold}", why)
    fields: PolicyLossOptions = {
        "ratio_level": importance_sampling_level,
        "log_ratio_clamp": None,
    }
    if use_sapo_loss:
        if use_decoupled_loss:
            require("areal", "use_decoupled_loss", "False with use_sapo_loss")
        fields |= {
            "objective": "sapo",
            "sapo_tau_pos": sapo_tau_pos,
            "sapo_tau_neg": sapo_tau_neg,
        }
    else:
        fields |= {
            "clip_low": eps_clip,
            "clip_high": eps_clip if eps_clip_higher is None else eps_clip_higher,
            "dual_clip": c_clip,
        }
    if use_decoupled_loss and rejection_sampling is not None:
        by_sequence = importance_sampling_level == "sequence"
        fields |= _correction(rejection_sampling, by_sequence)
    return cls(**fields | cast(PolicyLossOptions, options))


def _correction(given: Mapping[str, Any], gspo: bool) -> PolicyLossOptions:
    """The fields for rejection_sampling."""
    for name in given:
        one_of("areal", "rejection_sampling", name, _REJECTION)
    rule = {**_REJECTION, **given}
    for name, allowed in _CHOICES.items():
        one_of("areal", f"rejection_sampling.{name}", rule[name], allowed)
    level, metric, upper, lower = (rule[k] for k in ("level", "metric", "upper", "lower"))
    if metric == "ratio" and upper <= 1:
        require("areal", "rejection_sampling.upper", "above 1 with 'ratio'")
    if rule["action"] == "clamp" and metric != "ratio":
        require("areal", "rejection_sampling.metric", "'ratio' with the action 'clamp'")
    masks = rule["action"] == "mask"
    if gspo and masks and level == "token":
        why = (
            "the ratio of a sequence is then of its kept tokens: unmask only these, by "
            "mismatch_weights(...).mask, and pass the number of all as the normalizer"
        )
        inexpressible("areal", "a mask of tokens with importance_sampling_level='sequence'", why)
    if level == "sequence" and (metric != "ratio" or rule["agg"] != "mean"):
        _refuse_sequences(metric, rule["agg"], masks)
    if metric in ("kl_k2", "kl_k3"):
        first = "old, rollout" if metric == "kl_k2" else "rollout, old"
        why = (
            "tokens keep exp(old - rollout) as their weight: multiply the advantages by it, where "
            f"mismatch_weights({first}, mask, reject={{'token_{metric[3:]}': upper}}).mask"
        )
        inexpressible("areal", f"rejection_sampling.metric={metric!r}", why)
    low = 0.0 if lower is None else lower
    if metric == "kl_k1":
        # The estimate is the log-ratio itself.
        low, upper = 0.0 if lower is None else math.exp(lower), math.exp(upper)
    return {
        "correction_level": "geometric" if level == "sequence" else "token",
        "correction_mode": "mask" if masks else "truncate",
        "correction_min": low,
        "correction_max": upper,
    }


def _refuse_sequences(metric: str, agg: str, masks: bool) -> None:
    what = f"rejection_sampling by sequence with {metric!r} and agg={agg!r}"
    if not masks:
        why = "it truncates the geometric mean by another statistic: compute the weight yourself"
        inexpressible("areal", what, f"{why}, and multiply the advantages by it")
    weight = "exp of the mean of old - rollout" if metric == "ratio" else "exp(old - rollout)"
    why = (
        f"the weight is {weight}, the statistic another: multiply the advantages by the weight "
        "where mismatch_weights(..., reject={'seq_sum_...', 'seq_mean_...' or 'seq_max_...': "
        "bound}).mask keeps the sequence"
    )
    inexpressible("areal", what, why)
