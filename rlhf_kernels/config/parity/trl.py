"""TRL's policy losses.

The advantages that go with them:

    GRPO                          group_advantages(r, G, eps=1e-4), or scale="none"
    GRPO, scale_rewards="batch"   group_advantages(r, G, scale="none") / (r.std() + 1e-4)
    GRPO, normalize_then_sum      x = group_advantages(r [B, K], G, component_weights=w, eps=1e-4),
                                  group_advantages(x, G, baseline="none", scale="batch", eps=1e-4)
    RLOO                          group_advantages(r, G, baseline="leave-one-out", scale="none")
    RLOO, normalize_advantages    the same with scale="batch", eps=1e-4

TRL excludes rewards of None from their group. Here, drop those sequences and pass group ids.

TRL's RLOOTrainer clips the ratio of a whole sequence, exp(sum of x). Here, pass each sequence as
one token:
`policy_loss(sequence_logprobs(logprobs, mask)[:, None], ..., config=PolicyLossConfig.trl("grpo"))`.
"""

from typing import TYPE_CHECKING, Literal, cast, get_args

from ..enums import CorrectionLevel, CorrectionMode, KlEstimator
from ..options import CommonOptions, PolicyLossOptions
from ._common import Config, inexpressible, one_of, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]
SamplingLevel = Literal["token", "sequence"]
SamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_CORRECTIONS: dict[SamplingMode, tuple[CorrectionLevel, CorrectionMode]] = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}
_VESPO = (
    "its weight of a sequence is a function of the current ratio: use loss_type='dapo' with "
    "objective='reinforce' and multiply the advantages by the detached weight"
)


class Options(CommonOptions, total=False):
    """Fields of PolicyLossConfig that are not also arguments of TRL."""

    dual_clip: float | None
    kl_estimator: KlEstimator
    sapo_tau_pos: float
    sapo_tau_neg: float


def trl(
    cls: type[Config],
    /,
    loss_type: LossType = "dapo",
    *,
    importance_sampling_level: SamplingLevel = "token",
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
    vllm_importance_sampling_mode: SamplingMode = "sequence_mask",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
    **options: "Unpack[Options]",
) -> Config:
    """The loss of TRL's GRPOTrainer; names and defaults of its GRPOConfig. Checked against 1.16.0.

    The log-ratio is not clamped. The KL is k3 without clamps, times the differentiated ratio with
    use_bias_correction_kl. CISPO's epsilon_high is the upper bound itself, not a distance from 1
    (5.0 is usual; the default of 0.2 is TRL's). Clip fractions are over tokens; TRL counts
    sequences with importance_sampling_level="sequence". For "cispo" they count tokens with any sign
    of the advantage.

    The normalizer, with `accum` micro-batches per step and B sequences in this micro-batch. TRL's B
    includes sequences without an unmasked token; normalizer=None here excludes them:

        dapo, cispo          num_items_in_batch / processes * accum / steps_per_generation
        grpo, sapo, luspo    B * accum
        bnpo                 unmasked tokens * accum; without accumulation, none
        dr_grpo              B * max_completion_length * accum

    TRL averages the entropy bonus over the micro-batch's tokens, whatever the loss_type. Here the
    bonus shares the normalizer of the loss. entropy_coef is therefore accepted only where the
    normalizer is a number of tokens: bnpo, and dapo and cispo, which equal TRL if micro-batches
    have equal numbers of tokens. For the others, subtract
    `entropy_coef * entropy[mask].mean() / accum` from the loss.

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
        top_entropy_quantile: below 1 folds into the advantages; see its error.
        off_policy_mask_threshold: drops the objective of sequences with A < 0 whose mean log-ratio
            of the sampling policy to the current one exceeds this. With use_vllm the sampling
            policy's are the rollout_logprobs, else the old_logprobs. A NaN among these counts as a
            log-ratio of 0 in TRL, here as old_logprobs.
        sapo_temperature_pos: tau where the advantage is positive.
        sapo_temperature_neg: tau where it is not.
        use_vllm: the samples came from vLLM; pass rollout_logprobs.
        vllm_importance_sampling_correction: weight tokens by exp(old - rollout); only if use_vllm.
        vllm_importance_sampling_mode: {token,sequence}_{truncate,mask}.
        vllm_importance_sampling_clip_max: upper cap.
        vllm_importance_sampling_clip_min: lower cap.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, or one that cannot be expressed (loss_type="vespo").
    """
    refuse("trl", "loss_type", loss_type, {"vespo": _VESPO})
    one_of("trl", "loss_type", loss_type, get_args(LossType))
    levels = get_args(SamplingLevel)
    one_of("trl", "importance_sampling_level", importance_sampling_level, levels)
    if use_adaptive_entropy:
        why = "update with dataclasses.replace(config, entropy_coef=...) between steps"
        inexpressible("trl", "use_adaptive_entropy", why)
    if top_entropy_quantile < 1:
        why = "set the advantages of the other tokens to 0: its mask is of the objective alone"
        inexpressible("trl", f"top_entropy_quantile={top_entropy_quantile}", why)
    if entropy_coef != 0 and loss_type not in ("bnpo", "dapo", "cispo"):
        why = "TRL takes its mean over tokens; subtract entropy_coef * entropy[mask].mean() instead"
        inexpressible("trl", f"entropy_coef with loss_type={loss_type!r}", why)

    fields: PolicyLossOptions = {
        "ratio_level": importance_sampling_level,
        "log_ratio_clamp": None,
        "kl_coef": beta,
        "kl_weight": "ratio" if use_bias_correction_kl else None,
        "entropy_coef": entropy_coef,
    }
    if off_policy_mask_threshold is not None:
        fields |= {"gate": "opsm", "gate_low": off_policy_mask_threshold}
        fields["gate_against"] = "rollout" if use_vllm else "old"
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
        sampling = vllm_importance_sampling_mode
        one_of("trl", "vllm_importance_sampling_mode", sampling, _CORRECTIONS)
        level, mode = _CORRECTIONS[sampling]
        # Weights are positive, so a lower cap of 0 means no cap.
        low = vllm_importance_sampling_clip_min
        fields |= {
            "correction_level": level,
            "correction_mode": mode,
            "correction_min": 0.0 if low is None else low,
            "correction_max": vllm_importance_sampling_clip_max,
        }
    return cls(**fields | cast(PolicyLossOptions, options))
