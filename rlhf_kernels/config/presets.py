"""Parity presets: each trainer's policy loss, in that trainer's own argument names.

They are the constructors `PolicyLossConfig.trl`, `.verl` and `.openrlhf`. What our options cannot
express raises ValueError; nothing is approximated in silence. Two differences to every trainer are
by design: a log-ratio saturates at +-40, where exp() is on its way to infinity, and with nothing
unmasked the loss is 0, not NaN.

The advantages that go with each, `m` being the mask and `r` rewards [B]:

    verl gae                          gae(..., mask=m, whiten=True)
    verl grpo                         group_advantages(r, ids)
    verl grpo, no std (Dr.GRPO)       group_advantages(r, ids, scale="none")
    verl rloo                         group_advantages(r, ids, baseline="leave-one-out",
                                                       scale="none")
    verl remax                        discounted_returns(rewards, mask=m) less the greedy rewards
    verl reinforce_plus_plus          whiten(discounted_returns(rewards, mask=m, gamma=gamma), m)
    verl reinforce_plus_plus_baseline whiten(group_advantages(r, ids, scale="none") per token, m)
    TRL GRPO                          group_advantages(r, G, eps=1e-4), or scale="none"
    TRL GRPO, scale_rewards="batch"   group_advantages(r, G, scale="none") / (r.std() + 1e-4)
    TRL GRPO, normalize_then_sum      the weighted sum x of group_advantages(r_k, G, eps=1e-4), then
                                      group_advantages(x, G, baseline="none", scale="batch",
                                                       eps=1e-4)
    TRL RLOO                          group_advantages(r, G, baseline="leave-one-out",
                                                       scale="none")
    TRL RLOO, normalize_advantages    the same with scale="batch", eps=1e-4
    OpenRLHF gae                      gae(..., mask=m, masked="zero"), then
                                      whiten(advantages, m, unbiased=False, eps=0)
    OpenRLHF reinforce                discounted_returns(rewards, mask=m, masked="zero",
                                      gamma=gamma), then the same whitening
    OpenRLHF reinforce_baseline       group_advantages(r, G, scale="none") per token, less KL to go,
                                      then the same whitening
    OpenRLHF group_norm               group_advantages(r, G, eps=1e-9)

verl takes a group of one as it is (advantage = reward), here it has advantage 0. TRL leaves rewards
of None out of their group: leave those sequences out, with group ids. OpenRLHF bounds the variance
from below by 1e-8 where eps is added here; with eps=0 both agree above it.

TRL's RLOOTrainer clips the ratio of whole sequences, exp of the sum of x: one "token" for each, as
`policy_loss(sequence_logprobs(logprobs, mask)[:, None], ..., config=PolicyLossConfig.trl("grpo"))`.
"""

import math
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

_VERL_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_VERL_AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "constant",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


def trl(
    cls: type[Config],
    loss_type: str = "dapo",
    *,
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    entropy_coef: float = 0.0,
    use_adaptive_entropy: bool = False,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    use_vllm: bool = False,
    vllm_importance_sampling_correction: bool = True,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
    **options: Any,
) -> Config:
    """The loss of TRL's GRPOTrainer; names and defaults of its GRPOConfig. Checked against 1.16.0.

    No clamp of the log-ratio; k3 without clamps, times the differentiated ratio where
    use_bias_correction_kl; CISPO's epsilon_high is the bound itself, not a distance from 1 (5.0 is
    usual; TRL's default of 0.2 is kept). Clip fractions are over tokens, where TRL counts sequences
    with importance_sampling_level="sequence"; for "cispo" they count every sign of the advantage.

    The normalizer, with `accum` micro-batches per step and B sequences in this one (TRL counts
    wholly masked sequences too; without a normalizer only the others count here):

        dapo, cispo          num_items_in_batch / processes * accum / steps_per_generation
        grpo, sapo, luspo    B * accum
        bnpo                 unmasked tokens * accum; without accumulation, none
        dr_grpo              B * max_completion_length * accum

    The entropy bonus is TRL's mean over the micro-batch's tokens whatever the loss_type. Here it
    shares the normalizer of the loss, so it is accepted where that is a number of tokens (bnpo;
    dapo and cispo, the same where micro-batches have equal numbers of tokens) and refused
    elsewhere: subtract `entropy_coef * entropy[mask].mean() / accum` from the loss instead.

    Args:
        cls: PolicyLossConfig.
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo or luspo.
        importance_sampling_level: "token", or "sequence" (GSPO).
        epsilon: lower clip distance.
        epsilon_high: upper clip distance, for cispo the upper bound; None is epsilon.
        delta: cap of the unclipped ratio, above 1 + epsilon_high.
        beta: weight of the KL to the reference policy.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        entropy_coef: weight of the entropy bonus.
        use_adaptive_entropy: not expressible; use dataclasses.replace(config, entropy_coef=...).
        top_entropy_quantile: not expressible below 1.
        off_policy_mask_threshold: not expressible.
        sapo_temperature_pos: tau where the advantage is positive.
        sapo_temperature_neg: tau elsewhere.
        use_vllm: samples came from vLLM: pass rollout_logprobs.
        vllm_importance_sampling_correction: weight tokens by exp(old - rollout); only if use_vllm.
        vllm_importance_sampling_mode: {token,sequence}_{truncate,mask}.
        vllm_importance_sampling_clip_max: upper cap.
        vllm_importance_sampling_clip_min: lower cap.
        **options: any field of PolicyLossConfig, over all this.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (loss_type="vespo").
    """
    losses = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
    if loss_type == "vespo":
        _inexpressible("trl", "loss_type='vespo'", "its gamma weights are no option here")
    _one_of("trl", "loss_type", loss_type, losses)
    _one_of("trl", "importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    if use_adaptive_entropy:
        why = "update with dataclasses.replace(config, entropy_coef=...) between steps"
        _inexpressible("trl", "use_adaptive_entropy", why)
    if top_entropy_quantile < 1:
        why = "its mask applies to the objective, not to the KL term"
        _inexpressible("trl", f"top_entropy_quantile={top_entropy_quantile}", why)
    if off_policy_mask_threshold is not None:
        why = "its mask applies to the objective, not to the KL term"
        _inexpressible("trl", f"off_policy_mask_threshold={off_policy_mask_threshold}", why)
    if entropy_coef != 0 and loss_type not in ("bnpo", "dapo", "cispo"):
        why = "TRL takes its mean over tokens; subtract entropy_coef * entropy[mask].mean() instead"
        _inexpressible("trl", f"entropy_coef with loss_type={loss_type!r}", why)

    fields: dict[str, Any] = {
        "ratio_level": importance_sampling_level,
        "log_ratio_clamp": None,
        "kl_coef": beta,
        "kl_importance_weighted": use_bias_correction_kl,
        "entropy_coef": entropy_coef,
    }
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        fields |= {"objective": "cispo", "clip_low": None, "clip_high": high, "clip_absolute": True}
    elif loss_type == "sapo":
        fields |= {
            "objective": "sapo",
            "sapo_tau_pos": sapo_temperature_pos,
            "sapo_tau_neg": sapo_temperature_neg,
        }
    else:
        fields |= {"clip_low": epsilon, "clip_high": high, "delta": delta}
    if loss_type in ("grpo", "sapo"):
        fields["aggregation"] = "seq-mean-token-mean"
    elif loss_type == "luspo":
        fields["aggregation"] = "seq-mean-token-sum"
    elif loss_type == "dr_grpo":
        fields["aggregation"] = "constant"
    if use_vllm and vllm_importance_sampling_correction:
        modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        _one_of("trl", "vllm_importance_sampling_mode", vllm_importance_sampling_mode, modes)
        level, mode = vllm_importance_sampling_mode.split("_")
        # A weight is never below 0, the cap that stands for none at all.
        low = vllm_importance_sampling_clip_min
        fields |= {
            "correction_level": level,
            "correction_mode": mode,
            "correction_min": 0.0 if low is None else low,
            "correction_max": vllm_importance_sampling_clip_max,
        }
    return cls(**fields | options)


def verl(
    cls: type[Config],
    loss_mode: str = "vanilla",
    *,
    loss_agg_mode: str = "token-mean",
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = 0.2,
    clip_ratio_high: float | None = 0.2,
    clip_ratio_c: float = 3.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    entropy_coeff: float = 0.0,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.001,
    kl_loss_type: str = "low_var_kl",
    rollout_is: str | None = None,
    rollout_is_threshold: float | str = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    **options: Any,
) -> Config:
    """The actor's loss of verl (`ppo_loss`); names and defaults of its ActorConfig. Against 0.9.1.

    Log-ratio clamped to +-20 (gspo: at most 10), dual clip 3 by default, k3 with its input clamped
    to +-20 and its value to +-10; gspo is the token form (the sequence's ratio, the gradient of the
    token's own logprob). verl's pg_clipfrac is clip_frac_low + clip_frac_high here, its
    pg_clipfrac_lower dual_clip_frac, and its ppo_kl k1_old (there after the clamp).

    The normalizer, dp_size being the number of ranks over which gradients are averaged:

        token-mean                                   batch_num_tokens / dp_size
        token-sum                                    1 / dp_size (1 if none is given)
        seq-mean-token-sum, seq-mean-token-mean      global_batch_size / dp_size
        seq-mean-token-sum-norm                      global_batch_size * loss_scale_factor / dp_size

    Args:
        cls: PolicyLossConfig.
        loss_mode: vanilla, gspo, sapo, cispo or gpg.
        loss_agg_mode: as in the table. sapo's objective is always seq-mean-token-mean.
        clip_ratio: counts only where clip_ratio_low or clip_ratio_high is None, as in verl.
        clip_ratio_low: lower clip distance.
        clip_ratio_high: upper clip distance.
        clip_ratio_c: dual clip of vanilla.
        tau_pos: sapo's tau where the advantage is positive.
        tau_neg: sapo's tau elsewhere.
        entropy_coeff: weight of the entropy bonus.
        use_kl_loss: add the KL to the reference policy.
        kl_loss_coef: its weight.
        kl_loss_type: kl or k1, abs, mse or k2, low_var_kl or k3; with "+" the gradient of k2.
        rollout_is: "token" or "sequence" importance weights exp(old - rollout), or None.
        rollout_is_threshold: upper cap, or "low_high": weights outside become 0 (IcePop).
        rollout_is_batch_normalize: not expressible.
        rollout_rs: not expressible here: reject in the mask, as verl does.
        **options: any field of PolicyLossConfig, over all this.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (clip_cov, kl_cov, geo_mean,
            dppo_tv, dppo_kl, dro, bypass_mode).
    """
    if loss_mode in ("clip_cov", "kl_cov", "geo_mean", "dppo_tv", "dppo_kl", "dro"):
        _inexpressible("verl", f"loss_mode={loss_mode!r}", "its objective is none of those here")
    if loss_mode == "bypass_mode":
        why = "use loss_mode='vanilla' and pass the rollout's logprobs as old_logprobs"
        _inexpressible("verl", "loss_mode='bypass_mode'", why)
    _one_of("verl", "loss_mode", loss_mode, ("vanilla", "gspo", "sapo", "cispo", "gpg"))
    _one_of("verl", "loss_agg_mode", loss_agg_mode, tuple(_VERL_AGGREGATIONS))
    if rollout_is_batch_normalize:
        _inexpressible("verl", "rollout_is_batch_normalize", "weights are not normalised here")
    if rollout_rs is not None:
        _inexpressible("verl", f"rollout_rs={rollout_rs!r}", "reject samples in the mask instead")

    fields: dict[str, Any] = {
        "entropy_coef": entropy_coeff,
        "aggregation": _VERL_AGGREGATIONS[loss_agg_mode],
    }
    if loss_agg_mode == "token-sum":
        fields["normalizer"] = 1.0
    clips = {
        "clip_low": clip_ratio if clip_ratio_low is None else clip_ratio_low,
        "clip_high": clip_ratio if clip_ratio_high is None else clip_ratio_high,
    }
    if loss_mode == "vanilla":
        fields |= clips | {"dual_clip": clip_ratio_c, "log_ratio_clamp": 20.0}
    elif loss_mode == "gspo":
        unbounded = (-math.inf, 10.0)
        fields |= clips | {"ratio_level": "sequence-token", "log_ratio_clamp": unbounded}
    elif loss_mode == "cispo":
        fields |= clips | {"objective": "cispo", "log_ratio_clamp": 20.0}
    elif loss_mode == "gpg":
        fields["objective"] = "reinforce"
    else:
        if loss_agg_mode != "seq-mean-token-mean" and (entropy_coeff != 0 or use_kl_loss):
            why = "verl aggregates its objective by sequence means and the other terms so"
            _inexpressible("verl", f"loss_mode='sapo' with {loss_agg_mode!r}", why)
        fields |= {
            "objective": "sapo",
            "sapo_tau_pos": tau_pos,
            "sapo_tau_neg": tau_neg,
            "log_ratio_clamp": 20.0,
            "aggregation": "seq-mean-token-mean",
            "normalizer": None,
        }
    if use_kl_loss:
        name = kl_loss_type.removesuffix("+")
        _one_of("verl", "kl_loss_type", name, (*_VERL_KL, "k1", "k2", "k3", "abs"))
        estimator = _VERL_KL.get(name, name)
        fields |= {"kl_coef": kl_loss_coef, "kl_estimator": estimator + kl_loss_type[len(name) :]}
        if estimator == "k3":
            fields |= {"kl_input_clamp": 20.0, "kl_value_clamp": 10.0}
    if rollout_is is not None:
        _one_of("verl", "rollout_is", rollout_is, ("token", "sequence"))
        fields |= {"correction_level": rollout_is} | _verl_threshold(rollout_is_threshold)
    return cls(**fields | options)


def _verl_threshold(threshold: float | str) -> dict[str, Any]:
    """2.0 or "2.0": a cap. "0.5_2.0": bounds outside of which the weight is 0."""
    *low, high = str(threshold).split("_")
    try:
        if not low:
            return {"correction_mode": "truncate", "correction_max": float(high)}
        (low,) = low
        bounds = {"correction_min": float(low), "correction_max": float(high)}
        return {"correction_mode": "mask"} | bounds
    except ValueError:
        raise ValueError(
            "PolicyLossConfig.verl: rollout_is_threshold must be a number or 'low_high', got "
            f"{threshold!r}"
        ) from None


def openrlhf(
    cls: type[Config],
    policy_loss_type: str = "ppo",
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    is_correction_level: str = "off",
    is_correction_mode: str = "mask",
    is_correction_gating: str = "ratio",
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    kl_use_loss: bool = False,
    kl_init_coef: float = 0.01,
    kl_estimator: str = "k1",
    kl_unbiased_gradient: bool = False,
    entropy_coef: float | None = None,
    **options: Any,
) -> Config:
    """The actor's loss of OpenRLHF; names and defaults of its PolicyLoss and of its flags
    --algo.kl.* (kl_*) and --actor.entropy_coef. Checked against 0.11.2.

    Log-ratio clamped to +-20 (gspo: not at all); the KL estimate clamped to +-10, k3 with its input
    at least -10. gspo always averages by sequence. OpenRLHF's clip_ratio is clip_frac_low +
    clip_frac_high here, its ppo_kl k1_old.

    The normalizer, dp_size being the number of ranks over which gradients are averaged:
    batch_num_tokens / dp_size with token_level_loss, else global_batch_size / dp_size.

    Args:
        cls: PolicyLossConfig.
        policy_loss_type: "ppo" or "gspo".
        clip_eps_low: lower clip distance.
        clip_eps_high: upper clip distance.
        dual_clip: c > 1, or None.
        token_level_loss: mean over tokens; else mean over sequences of their means.
        is_correction_level: "off" or "token". With gspo, whose ratio OpenRLHF then takes to the
            rollout, "off": pass the rollout's logprobs as old_logprobs.
        is_correction_mode: "mask" (weights outside the threshold become 0) or "clip".
        is_correction_gating: "ratio".
        is_correction_threshold: (low, high).
        kl_use_loss: add the KL to the reference policy to the loss.
        kl_init_coef: its weight; follow a controller with dataclasses.replace(config, kl_coef=...).
        kl_estimator: k1, k2 or k3.
        kl_unbiased_gradient: not expressible: its weight is the capped, detached ratio. Where
            old_logprobs equal logprobs, dataclasses.replace(config, kl_estimator="k3+") is it.
        entropy_coef: weight of the entropy bonus; None is 0.
        **options: any field of PolicyLossConfig, over all this.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (sequence-level correction,
            divergence gating, unbiased KL gradient, KL or entropy beside means by sequence).
    """
    _one_of("openrlhf", "policy_loss_type", policy_loss_type, ("ppo", "gspo"))
    _one_of("openrlhf", "is_correction_level", is_correction_level, ("off", "token", "seq"))
    _one_of("openrlhf", "is_correction_mode", is_correction_mode, ("mask", "clip"))
    _one_of("openrlhf", "kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    gspo = policy_loss_type == "gspo"
    by_sequence = gspo or not token_level_loss
    if by_sequence and (kl_use_loss or entropy_coef):
        why = "OpenRLHF takes the mean of KL and entropy over tokens and of the objective not"
        _inexpressible("openrlhf", "kl_use_loss or entropy_coef beside means by sequence", why)
    if kl_use_loss and kl_unbiased_gradient:
        why = "its weight is the capped, detached ratio"
        _inexpressible("openrlhf", "kl_unbiased_gradient", why)
    if is_correction_level != "off":
        if gspo:
            why = "pass the rollout's logprobs as old_logprobs, which is what it does"
            _inexpressible("openrlhf", "is_correction_level with gspo", why)
        if is_correction_level == "seq":
            why = "it gates by the geometric mean and keeps the weights of the tokens"
            _inexpressible("openrlhf", "is_correction_level='seq'", why)
        if is_correction_gating != "ratio":
            why = "only the ratio gates here"
            _inexpressible("openrlhf", f"is_correction_gating={is_correction_gating!r}", why)

    fields: dict[str, Any] = {
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
    if is_correction_level != "off":
        low, high = is_correction_threshold
        fields |= {
            "correction_level": "token",
            "correction_mode": "truncate" if is_correction_mode == "clip" else "mask",
            "correction_min": low,
            "correction_max": high,
        }
    return cls(**fields | options)


def _one_of(preset: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"PolicyLossConfig.{preset}: {name} must be one of {', '.join(allowed)}, got {value!r}"
        )


def _inexpressible(preset: str, what: str, why: str) -> NoReturn:
    raise ValueError(f"PolicyLossConfig.{preset}: {what} cannot be expressed: {why}")
