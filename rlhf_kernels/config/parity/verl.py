"""verl's policy losses.

The advantages that go with them:

    gae                           gae(..., mask=m, whiten=True)
    grpo                          group_advantages(r, ids)
    grpo, no std (Dr.GRPO)        group_advantages(r, ids, scale="none")
    rloo                          group_advantages(r, ids, baseline="leave-one-out", scale="none")
    remax                         discounted_returns(rewards, mask=m) less the greedy rewards
    reinforce_plus_plus           whiten(discounted_returns(rewards, mask=m, gamma=gamma), m)
    reinforce_plus_plus_baseline  whiten(group_advantages(r, ids, scale="none") per token, m)
    opo                           group_advantages(r, ids, baseline="length-mean", scale="none",
                                  lengths=m.sum(-1))
    grpo_passk                    group_advantages(r, ids, baseline="pass@k"), or scale="none"
    gdpo                          whiten(group_advantages(r [B, K], ids, component_weights=w) per
                                  token, m)
    optimal_token_baseline, and   optimal_token_baseline(rewards, logprobs, collision, ids, m)
    tir_optimal_token_baseline

A group of one has advantage = reward in verl, advantage 0 here.
"""

import math
from typing import TYPE_CHECKING, Literal, get_args

from ..enums import Aggregation, KlEstimator
from ..options import PolicyLossOptions
from ._common import Config, inexpressible, one_of, refuse, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossMode = Literal[
    "vanilla", "gspo", "sapo", "cispo", "gpg", "geo_mean", "dppo_tv", "dppo_kl", "dro",
    "bypass_mode",
]  # fmt: skip
BypassLoss = Literal["ppo_clip", "reinforce"]
AggregationMode = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]  # fmt: skip
KlLossType = Literal[
    "kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3",
    "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+",
]  # fmt: skip
_INEXPRESSIBLE = {
    "clip_cov": (
        "it drops tokens drawn at random among those of a large covariance: set their advantages "
        "to 0 and use loss_mode='vanilla'"
    ),
    "kl_cov": (
        "it adds a KL to old_logprobs over the tokens of the largest covariance alone: add a "
        "second call over these to the loss without clips, with advantages of 0, "
        "kl_estimator='abs' and the old_logprobs as ref_logprobs"
    ),
}

_KL_ESTIMATORS: dict[KlLossType, KlEstimator] = {
    **{"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2"},
    **{"low_var_kl": "k3", "k3": "k3"},
    **{"kl+": "k1+", "k1+": "k1+", "abs+": "abs+", "mse+": "k2+", "k2+": "k2+"},
    **{"low_var_kl+": "k3+", "k3+": "k3+"},
}
_AGGREGATIONS: dict[AggregationMode, Aggregation] = {
    "token-mean": "token-mean",
    "token-sum": "constant",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


def verl(
    cls: type[Config],
    /,
    loss_mode: LossMode = "vanilla",
    *,
    loss_agg_mode: AggregationMode = "token-mean",
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = 0.2,
    clip_ratio_high: float | None = 0.2,
    clip_ratio_c: float = 3.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    entropy_coeff: float = 0.0,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.001,
    kl_loss_type: KlLossType = "low_var_kl",
    rollout_is: Literal["token", "sequence"] | None = None,
    rollout_is_threshold: float | str = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    loss_type: BypassLoss = "ppo_clip",
    dro_beta: float | None = None,
    **options: "Unpack[PolicyLossOptions]",
) -> Config:
    """The actor's loss of verl (`ppo_loss`); names and defaults of its ActorConfig and, for
    rollout_*, loss_type and dro_beta, of the parts of it. Checked against 0.9.1.

    The log-ratio is clamped to +-20 (gspo: to at most 10), the dual clip is 3 by default, and k3
    has its input clamped to +-20 and its value to +-10. gspo is the token form: the ratio of the
    sequence, the gradient of the token's own logprob. verl's metric pg_clipfrac is clip_frac_low +
    clip_frac_high here (for dppo_tv and dppo_kl gate_frac_low + gate_frac_high), its
    pg_clipfrac_lower is dual_clip_frac, and its ppo_kl is k1_old (verl computes it after the
    clamp). Those of geo_mean have no equal here: they count tokens beyond either bound, also where
    the clip does not take effect.

    geo_mean is GMPO, for advantages of sequences: a mean over all sequences, also those without a
    token, by which the normalizer counts. Its clips are distances of the log-ratio, and the
    log-ratio of a sequence is clamped to +-40 here, not in verl.

    In bypass_mode the rollout's logprobs are the old_logprobs. With loss_type="ppo_clip" rollout_is
    then has no effect on the loss, with "reinforce" it weights by the ratio of the current policy.
    dro pulls to old: pass the old_logprobs as ref_logprobs too.

    The normalizer; dp_size is the number of ranks over which gradients are averaged:

        token-mean                                   batch_num_tokens / dp_size
        token-sum                                    1 / dp_size (1 if none is given)
        seq-mean-token-sum, seq-mean-token-mean      global_batch_size / dp_size
        seq-mean-token-sum-norm                      global_batch_size * loss_scale_factor / dp_size

    Args:
        cls: PolicyLossConfig.
        loss_mode: vanilla, gspo, sapo, cispo, gpg, geo_mean, dppo_tv, dppo_kl, dro or bypass_mode.
        loss_agg_mode: as in the table. The objectives of sapo and geo_mean are always
            seq-mean-token-mean.
        clip_ratio: replaces clip_ratio_low or clip_ratio_high where that is None, as in verl.
        clip_ratio_low: lower clip distance; of dppo the bound of the divergence where the
            advantage is negative.
        clip_ratio_high: upper clip distance; of dppo the bound where the advantage is positive.
        clip_ratio_c: dual clip of vanilla; of dppo the cap of the detached ratio.
        tau_pos: sapo's tau where the advantage is positive.
        tau_neg: sapo's tau where it is not.
        entropy_coeff: weight of the entropy bonus.
        use_kl_loss: add the KL to the reference policy.
        kl_loss_coef: weight of this KL.
        kl_loss_type: kl or k1, abs, mse or k2, low_var_kl or k3; "+" takes the gradient of k2.
        rollout_is: "token" or "sequence" importance weights exp(old - rollout), or None.
        rollout_is_threshold: upper cap of the weights, or "low_high": weights outside become 0
            (IcePop).
        rollout_is_batch_normalize: folds into the advantages; see its error.
        rollout_rs: not expressible; reject samples in the mask, as verl does.
        loss_type: of bypass_mode, "ppo_clip" or "reinforce".
        dro_beta: weight of dro's penalty beta / 2 (logprob - old)^2.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (clip_cov, kl_cov, geo_mean
            with weights, dro with a KL or weights, reinforce with weights of sequences).
    """
    refuse("verl", "loss_mode", loss_mode, _INEXPRESSIBLE)
    one_of("verl", "loss_mode", loss_mode, get_args(LossMode))
    one_of("verl", "loss_agg_mode", loss_agg_mode, _AGGREGATIONS)
    if rollout_is_batch_normalize:
        why = (
            "a weight then depends on the batch: multiply the advantages by "
            "mismatch_weights(old, rollout, mask, level=rollout_is, high=rollout_is_threshold, "
            "log_ratio_clamp=20, normalize=True).weights"
        )
        inexpressible("verl", "rollout_is_batch_normalize", why)
    if rollout_rs is not None:
        why = (
            "reject samples in the mask instead, by mismatch_weights(old, rollout, mask, "
            "log_ratio_clamp=20, reject={rollout_rs: rollout_rs_threshold}).mask"
        )
        inexpressible("verl", f"rollout_rs={rollout_rs!r}", why)
    if loss_mode == "bypass_mode":
        one_of("verl", "loss_type", loss_type, get_args(BypassLoss))
    clipped = loss_mode == "vanilla" or (loss_mode == "bypass_mode" and loss_type == "ppo_clip")

    fields: PolicyLossOptions = {
        "entropy_coef": entropy_coeff,
        "aggregation": _AGGREGATIONS[loss_agg_mode],
    }
    if loss_agg_mode == "token-sum":
        fields["normalizer"] = 1.0
    clips: PolicyLossOptions = {
        "clip_low": clip_ratio if clip_ratio_low is None else clip_ratio_low,
        "clip_high": clip_ratio if clip_ratio_high is None else clip_ratio_high,
    }
    if clipped:
        fields |= clips | {"dual_clip": clip_ratio_c, "log_ratio_clamp": 20.0}
    elif loss_mode == "gspo":
        unbounded = (-math.inf, 10.0)
        fields |= clips | {"ratio_level": "sequence-token", "log_ratio_clamp": unbounded}
    elif loss_mode == "cispo":
        fields |= clips | {"objective": "cispo", "log_ratio_clamp": 20.0}
    elif loss_mode in ("dppo_tv", "dppo_kl"):
        fields |= {
            "objective": "cispo",
            "clip_low": None,
            "clip_high": clip_ratio_c,
            "clip_absolute": True,
            "log_ratio_clamp": 20.0,
            "gate": "tv" if loss_mode == "dppo_tv" else "binary_kl",
            "gate_low": clips["clip_low"],
            "gate_high": clips["clip_high"],
        }
    elif loss_mode == "gpg":
        fields["objective"] = "reinforce"
    elif loss_mode == "dro":
        fields |= _dro(dro_beta, use_kl_loss, rollout_is)
    elif loss_mode == "bypass_mode":
        fields |= _reinforce(rollout_is, rollout_is_threshold)
    else:
        if loss_agg_mode != "seq-mean-token-mean" and (entropy_coeff != 0 or use_kl_loss):
            why = "verl aggregates its objective by sequence means, but the other terms like this"
            inexpressible("verl", f"loss_mode={loss_mode!r} with {loss_agg_mode!r}", why)
        fields |= {"aggregation": "seq-mean-token-mean", "normalizer": None}
        if loss_mode == "geo_mean":
            fields |= _geo_mean(clips, rollout_is)
        else:
            fields |= {
                "objective": "sapo",
                "sapo_tau_pos": tau_pos,
                "sapo_tau_neg": tau_neg,
                "log_ratio_clamp": 20.0,
            }
    if use_kl_loss:
        one_of("verl", "kl_loss_type", kl_loss_type, _KL_ESTIMATORS)
        estimator = _KL_ESTIMATORS[kl_loss_type]
        fields |= {"kl_coef": kl_loss_coef, "kl_estimator": estimator}
        if estimator in ("k3", "k3+"):
            fields |= {"kl_input_clamp": 20.0, "kl_value_clamp": 10.0}
    if rollout_is is not None:
        one_of("verl", "rollout_is", rollout_is, ("token", "sequence"))
    if rollout_is is not None and loss_mode != "bypass_mode":
        fields["correction_level"] = rollout_is
        fields |= _threshold(rollout_is_threshold)
    return cls(**fields | options)


def _geo_mean(clips: PolicyLossOptions, rollout_is: str | None) -> PolicyLossOptions:
    """The fields of geo_mean; `clips` are distances of the log-ratio."""
    if rollout_is is not None:
        why = "verl takes the geometric mean of weights that were capped one by one"
        inexpressible("verl", "rollout_is with loss_mode='geo_mean'", why)
    low, high = clips["clip_low"], clips["clip_high"]
    assert low is not None and high is not None
    for name, distance in (("clip_ratio_low", low), ("clip_ratio_high", high)):
        if not distance >= 0:
            require("verl", name, "a number >= 0 with loss_mode='geo_mean'")
    return {
        "ratio_level": "clipped-sequence",
        "clip_low": math.exp(-low),
        # Log-ratios saturate far below.
        "clip_high": None if high > 80 else math.exp(high),
        "clip_absolute": True,
        "log_ratio_clamp": None,
    }


def _dro(beta: float | None, use_kl_loss: bool, rollout_is: str | None) -> PolicyLossOptions:
    """The fields of dro."""
    if beta is None or beta <= 0:
        require("verl", "dro_beta", "a number > 0 with loss_mode='dro'")
    if use_kl_loss:
        why = "there is one slot for a policy to pull to, and the penalty has it: add a second call"
        inexpressible("verl", "use_kl_loss with loss_mode='dro'", why)
    if rollout_is is not None:
        why = (
            "verl weights the penalty too: pass the weights, without entropy_coeff, as weights= of "
            "the loss, by mismatch_weights(old, rollout, mask, level=rollout_is, "
            "high=rollout_is_threshold, log_ratio_clamp=20).weights"
        )
        inexpressible("verl", "rollout_is with loss_mode='dro'", why)
    return {"objective": "reinforce", "kl_coef": beta, "kl_estimator": "k2"}


def _reinforce(rollout_is: str | None, threshold: float | str) -> PolicyLossOptions:
    """The fields of bypass_mode's reinforce: a detached weight, which is the current ratio."""
    if rollout_is is None:
        return {"objective": "reinforce"}
    if rollout_is == "sequence":
        why = (
            "no objective has the product of a sequence's ratios: multiply the advantages by "
            "mismatch_weights(logprobs.detach(), rollout, mask, level='sequence', "
            "high=rollout_is_threshold, log_ratio_clamp=20).weights and pass rollout_is=None"
        )
        inexpressible("verl", "rollout_is='sequence' with loss_type='reinforce'", why)
    bounds = _threshold(threshold)
    fields: PolicyLossOptions = {
        "objective": "cispo",
        "clip_low": None,
        "clip_high": None,
        "log_ratio_clamp": 20.0,
    }
    if bounds["correction_mode"] == "truncate":
        return fields | {"clip_high": bounds["correction_max"], "clip_absolute": True}
    return fields | {
        "gate": "ratio",
        "gate_low": bounds["correction_min"],
        "gate_high": bounds["correction_max"],
    }


def _threshold(threshold: float | str) -> PolicyLossOptions:
    """The fields for rollout_is_threshold: 2.0 or "2.0" is a cap, "0.5_2.0" masks outside."""
    try:
        low, *high = map(float, str(threshold).split("_"))
        if not high:
            return {"correction_mode": "truncate", "correction_max": low}
        (upper,) = high
        return {"correction_mode": "mask", "correction_min": low, "correction_max": upper}
    except ValueError:
        raise ValueError(
            "PolicyLossConfig.verl: rollout_is_threshold must be a number or 'low_high', got "
            f"{threshold!r}"
        ) from None
