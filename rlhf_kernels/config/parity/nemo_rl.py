"""NeMo-RL's policy losses.

The advantages that go with them:

    grpo                          group_advantages(r, ids, baseline="leave-one-out",
                                  scale="leave-one-out", eps=1e-6), or baseline="mean",
                                  scale="group"
    reinforce_plus_plus           whiten(group_advantages(r, ids, scale="none") per token, m)
    gae                           gae(..., mask=m, lam=..., value_lam=...)
"""

from typing import TYPE_CHECKING, Literal, get_args

from ..options import PolicyLossOptions
from ._common import Config, inexpressible, one_of, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

KlType = Literal["k1", "k2", "k3"]
TruncationType = Literal["tis", "icepop"]


def nemo_rl(
    cls: type[Config],
    /,
    *,
    disable_ppo_ratio: bool = False,
    token_level_loss: bool = True,
    sequence_level_importance_ratios: bool = False,
    ratio_clip_min: float = 0.2,
    ratio_clip_max: float = 0.2,
    ratio_clip_c: float | None = None,
    reference_policy_kl_penalty: float = 0.01,
    reference_policy_kl_type: KlType = "k3",
    kl_input_clamp_value: float | None = 20.0,
    kl_output_clamp_value: float | None = 10.0,
    use_kl_in_reward: bool = False,
    use_importance_sampling_correction: bool = False,
    truncated_importance_sampling_type: TruncationType | None = None,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    use_on_policy_kl_approximation: bool = False,
    force_on_policy_ratio: bool = False,
    use_cispo: bool = False,
    positive_example_nll_weight: float = 0.0,
    **options: "Unpack[PolicyLossOptions]",
) -> Config:
    """The loss of NeMo-RL's ClippedPGLossFn; names and defaults of its ClippedPGLossConfig. Read in
    August 2026.

    The log-ratio is not clamped. prev_logprobs are the old_logprobs here, generation_logprobs the
    rollout_logprobs. The KL has the on-policy weight of value 1 (kl_weight="one"). Beyond the two
    KL clamps NeMo-RL stops the gradient of this weight too, which stays here, with the same value.
    For the same gradient replace ref_logprobs by logprobs.detach(), with k1 plus 1, at these
    tokens.

    A NaN in generation_logprobs has the weight 0 in NeMo-RL, here 1: take such tokens out of the
    advantages. NeMo-RL adds 1e-8 to what it divides by.

    The normalizer is global_valid_toks with token_level_loss, else global_valid_seqs: NeMo-RL sums
    the gradients of ranks; divide it by their number where gradients are averaged.

    NeMo-RL's metrics probs_ratio, probs_ratio_min and probs_ratio_max are ratio_mean, ratio_min and
    ratio_max here; kl_penalty is kl_loss, and sampling_importance_ratio (before truncation)
    correction_mean (after it).

    Args:
        cls: PolicyLossConfig.
        disable_ppo_ratio: -A logprob (REINFORCE). ratio_clip_c then has no effect.
        token_level_loss: mean over tokens; else mean over sequences of their means.
        sequence_level_importance_ratios: GSPO, with token_level_loss=False. The correction is then
            of sequences too.
        ratio_clip_min: lower clip distance.
        ratio_clip_max: upper clip distance.
        ratio_clip_c: c > 1 of dual clipping, or None.
        reference_policy_kl_penalty: weight of the KL to the reference policy.
        reference_policy_kl_type: k1, k2 or k3.
        kl_input_clamp_value: clamp of logprob - ref, or None.
        kl_output_clamp_value: clamp of the estimate, or None.
        use_kl_in_reward: no KL in the loss.
        use_importance_sampling_correction: weight tokens by exp(old - rollout).
        truncated_importance_sampling_type: "tis" truncates the weight, "icepop" sets it to 0
            outside the bounds. "seq-mask-tis" folds into the advantages; see its error.
        truncated_importance_sampling_ratio: upper bound.
        truncated_importance_sampling_ratio_min: lower bound; None with tis is 0.
        use_on_policy_kl_approximation: not expressible in one call; see its error.
        force_on_policy_ratio: a ratio of 1. Pass no old_logprobs.
        use_cispo: sg(clip(ratio)) logprob instead of the clipped ratio.
        positive_example_nll_weight: not expressible in one call; see its error.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, one that cannot be expressed, or options that NeMo-RL does
            not combine.
    """
    one_of("nemo_rl", "reference_policy_kl_type", reference_policy_kl_type, get_args(KlType))
    by_sequence = sequence_level_importance_ratios
    if by_sequence and token_level_loss:
        require("nemo_rl", "token_level_loss", "False with sequence_level_importance_ratios")
    if use_cispo:
        other = disable_ppo_ratio or force_on_policy_ratio or by_sequence
        if other or ratio_clip_c is not None or not token_level_loss:
            require("nemo_rl", "use_cispo", "alone, with token_level_loss and no ratio_clip_c")
    with_kl = reference_policy_kl_penalty != 0 and not use_kl_in_reward
    if with_kl and use_on_policy_kl_approximation:
        why = (
            "its weight is the ratio to the rollout, kl_weight is the one to old_logprobs: take "
            "the KL from a second call with advantages of 0, kl_weight='ratio' and the rollout's "
            "logprobs as old_logprobs"
        )
        inexpressible("nemo_rl", "use_on_policy_kl_approximation", why)
    if positive_example_nll_weight:
        why = (
            "it is a mean over the tokens of correct samples: add the loss of a second call with "
            "objective='reinforce', advantages of 1 and their mask"
        )
        inexpressible("nemo_rl", "positive_example_nll_weight", why)

    fields: PolicyLossOptions = {
        "log_ratio_clamp": None,
        "aggregation": "token-mean" if token_level_loss else "seq-mean-token-mean",
    }
    if force_on_policy_ratio:
        fields |= {"clip_low": None, "clip_high": None}
    elif disable_ppo_ratio:
        fields["objective"] = "reinforce"
    else:
        fields |= {
            "objective": "cispo" if use_cispo else "clip",
            "ratio_level": "sequence" if by_sequence else "token",
            "clip_low": ratio_clip_min,
            "clip_high": ratio_clip_max,
            "dual_clip": ratio_clip_c,
        }
    if with_kl:
        fields |= {
            "kl_coef": reference_policy_kl_penalty,
            "kl_estimator": reference_policy_kl_type,
            "kl_input_clamp": kl_input_clamp_value,
            "kl_value_clamp": kl_output_clamp_value,
            "kl_weight": "one",
        }
    truncation = truncated_importance_sampling_type
    bounds = (truncated_importance_sampling_ratio_min, truncated_importance_sampling_ratio)
    if truncation is not None or bounds[1] is not None:
        fields |= _truncation(truncation, *bounds)
        if not use_importance_sampling_correction:
            name = "truncated_importance_sampling_type"
            require("nemo_rl", name, "None without use_importance_sampling_correction")
    elif use_importance_sampling_correction:
        fields["correction_min"] = 0.0
    if use_importance_sampling_correction:
        fields["correction_level"] = "sequence" if by_sequence else "token"
    return cls(**fields | options)


def _truncation(kind: str | None, low: float | None, high: float | None) -> PolicyLossOptions:
    """The fields for truncated_importance_sampling_*."""
    if kind == "seq-mask-tis":
        why = (
            "it drops sequences by the geometric mean but weights tokens by their own ratios: "
            "multiply the advantages by mismatch_weights(old, rollout, mask, level='token', "
            "reject={'seq_mean_ratio': (min, max)}).weights"
        )
        inexpressible("nemo_rl", f"truncated_importance_sampling_type={kind!r}", why)
    name = "truncated_importance_sampling_type"
    one_of("nemo_rl", name, str(kind), get_args(TruncationType))
    if high is None:
        require("nemo_rl", "truncated_importance_sampling_ratio", f"a number with {kind!r}")
    if kind == "icepop" and low is None:
        require("nemo_rl", "truncated_importance_sampling_ratio_min", "a number with 'icepop'")
    return {
        "correction_mode": "truncate" if kind == "tis" else "mask",
        "correction_min": 0.0 if low is None else low,
        "correction_max": high,
    }
