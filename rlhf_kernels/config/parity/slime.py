"""slime's policy losses.

The advantages that go with them:

    grpo, gspo, cispo             group_advantages(r, ids, eps=1e-6), or scale="none"
    reinforce_plus_plus           discounted_returns(rewards, mask=m, gamma=gamma)
    reinforce_plus_plus_baseline  rewards less their group's mean, per token, less KL
    ppo                           gae(...)
    normalize_advantages          whiten of the above
"""

from typing import TYPE_CHECKING, Literal, cast, get_args

from ..enums import KlEstimator
from ..options import CommonOptions, PolicyLossOptions
from ._common import Config, inexpressible, one_of, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

Estimator = Literal[
    "grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
]
KlLossType = Literal["k1", "k2", "k3", "low_var_kl"]
_KL_ESTIMATORS: dict[KlLossType, KlEstimator] = {
    "k1": "k1",
    "k2": "k2",
    "k3": "k3",
    "low_var_kl": "k3",
}
#: The function of slime's own that custom_tis_function_path may name.
_ICEPOP = "icepop_function"


class Options(CommonOptions, total=False):
    """Fields of PolicyLossConfig that are not also arguments of slime."""

    dual_clip: float | None
    delta: float | None
    kl_estimator: KlEstimator
    sapo_tau_pos: float
    sapo_tau_neg: float


def slime(
    cls: type[Config],
    /,
    advantage_estimator: Estimator = "grpo",
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.0,
    kl_loss_type: KlLossType = "k1",
    use_unbiased_kl: bool = False,
    entropy_coef: float = 0.0,
    calculate_per_token_loss: bool = False,
    use_rollout_logprobs: bool = False,
    use_tis: bool = False,
    get_mismatch_metrics: bool = False,
    tis_clip: float = 2.0,
    tis_clip_low: float = 0.0,
    custom_tis_function_path: str | None = None,
    use_opsm: bool = False,
    opsm_delta: float = 1e-4,
    **options: "Unpack[Options]",
) -> Config:
    """The actor's loss of slime (`policy_loss_function`); names and defaults of its flags. Read in
    August 2026.

    The log-ratio is not clamped. gspo is the ratio of the sequence, differentiated through it. The
    off-policy sequence mask (OPSM) and the rollout correction (TIS) scale the objective alone. The
    KL is not clamped, but that of low_var_kl to +-10.

    The normalizer is the step's number of samples (of tokens with calculate_per_token_loss), of all
    ranks; slime sums gradients. Where a rollout is split into several samples, slime divides each
    by the tokens of the whole rollout: pass `weights=`, [B], the sample's tokens over the
    rollout's, and as normalizer the number of rollouts.

    slime's metric pg_clipfrac is clip_frac_low + clip_frac_high here and ppo_kl is k1_old, both as
    means over tokens; kl_loss and entropy_loss have the same names. opsm_clipfrac counts what
    gate_frac_low does; tis is the weight before its bounds, correction_mean the mean after them.

    Args:
        cls: PolicyLossConfig.
        advantage_estimator: gspo and cispo are losses too; all others have PPO's.
        eps_clip: lower clip distance.
        eps_clip_high: upper clip distance; None is eps_clip.
        eps_clip_c: c > 1 of dual clipping, or None; cispo has none.
        use_kl_loss: add the KL to the reference policy.
        kl_loss_coef: weight of this KL.
        kl_loss_type: k1, k2, k3 or low_var_kl.
        use_unbiased_kl: multiply the estimate by the ratio, differentiated.
        entropy_coef: weight of the entropy bonus.
        calculate_per_token_loss: mean over tokens; else mean over samples of their means.
        use_rollout_logprobs: no change here: pass the rollout's logprobs as old_logprobs.
        use_tis: weight tokens by exp(old - rollout), with the trainer's log_probs as old_logprobs.
        get_mismatch_metrics: as use_tis: slime weights the loss with either.
        tis_clip: upper cap.
        tis_clip_low: lower cap.
        custom_tis_function_path: None, or slime's icepop_function, which sets the weight to 0
            outside the caps.
        use_opsm: drop the objective of sequences with A < 0 whose mean of old - logprob exceeds
            opsm_delta.
        opsm_delta: this bound.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, one that cannot be expressed, or options that slime does not
            combine.
    """
    one_of("slime", "advantage_estimator", advantage_estimator, get_args(Estimator))
    corrected = use_tis or get_mismatch_metrics
    if use_rollout_logprobs and use_tis:
        require("slime", "use_tis", "False with use_rollout_logprobs")
    if use_rollout_logprobs and corrected:
        why = "the weight is then of log_probs, which no argument holds beside old_logprobs"
        inexpressible("slime", "get_mismatch_metrics with use_rollout_logprobs", why)
    gspo, cispo = advantage_estimator == "gspo", advantage_estimator == "cispo"
    fields: PolicyLossOptions = {
        "objective": "cispo" if cispo else "clip",
        "ratio_level": "sequence" if gspo else "token",
        "clip_low": eps_clip,
        "clip_high": eps_clip if eps_clip_high is None else eps_clip_high,
        "dual_clip": None if cispo else eps_clip_c,
        "log_ratio_clamp": None,
        "entropy_coef": entropy_coef,
        "aggregation": "token-mean" if calculate_per_token_loss else "seq-mean-token-mean",
    }
    if use_opsm:
        fields |= {"gate": "opsm", "gate_low": opsm_delta}
    if use_kl_loss:
        one_of("slime", "kl_loss_type", kl_loss_type, _KL_ESTIMATORS)
        fields |= {"kl_coef": kl_loss_coef, "kl_estimator": _KL_ESTIMATORS[kl_loss_type]}
        if kl_loss_type == "low_var_kl":
            fields["kl_value_clamp"] = 10.0
        if use_unbiased_kl:
            _check_unbiased(gspo, kl_loss_type)
            fields["kl_weight"] = "ratio"
    if corrected:
        path = custom_tis_function_path
        if path is not None and path.rpartition(".")[2] != _ICEPOP:
            why = "only slime's own functions are known: multiply the advantages by its weights"
            inexpressible("slime", f"custom_tis_function_path={path!r}", why)
        fields |= {
            "correction_level": "token",
            "correction_mode": "truncate" if path is None else "mask",
            "correction_min": tis_clip_low,
            "correction_max": tis_clip,
        }
    return cls(**fields | cast(PolicyLossOptions, options))


def _check_unbiased(gspo: bool, kl_loss_type: str) -> None:
    if gspo:
        why = "slime weights by a token's ratio, kl_weight is the sequence's"
        inexpressible("slime", "use_unbiased_kl with gspo", why)
    if kl_loss_type == "low_var_kl":
        why = "slime clamps the weighted estimate, kl_value_clamp the estimate: use k3"
        inexpressible("slime", "use_unbiased_kl with low_var_kl", why)
