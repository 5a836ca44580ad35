"""SkyRL's policy losses.

The advantages that go with them:

    grpo                          group_advantages(r, ids, eps=1e-6), or scale="none"
    maxrl                         group_advantages(r, ids, scale="mean", eps=1e-6)
    rloo                          group_advantages(r, ids, baseline="leave-one-out", scale="none")
    reinforce++                   whiten(discounted_returns(rewards, mask=m, gamma=gamma), m)
    gae                           gae(..., mask=m, whiten=True)

SkyRL then scales them for its loss_reduction. Here the aggregation does that; see `skyrl`.
"""

import math
from typing import TYPE_CHECKING, Literal, get_args

from ..enums import Aggregation
from ..options import PolicyLossOptions
from ._common import Config, inexpressible, one_of, refuse, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossType = Literal[
    "regular",
    "dual_clip",
    "gspo",
    "cispo",
    "sapo",
    "rollout_is",
    "dppo",
    "importance_sampling",
    "cross_entropy",
]
Reduction = Literal[
    "token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"
]
KlEstimatorType = Literal["k1", "k2", "k3", "abs"]
Anchor = Literal["old", "rollout"]
DppoType = Literal["binary_tv", "binary_kl"]
TisRatioType = Literal["token", "sequence"]
SequenceMaskMetric = Literal["product", "geometric"]
_INEXPRESSIBLE = {
    "clip_cov": (
        "it drops tokens drawn at random among those of a large covariance: set their advantages "
        "to 0 and use 'regular' with log_ratio_clamp=None"
    ),
    "kl_cov": (
        "it adds a KL to old_logprobs over the tokens of the largest covariance alone: add a "
        "second call over these to the loss without clips, with advantages of 0, "
        "kl_estimator='abs' and the old_logprobs as ref_logprobs"
    ),
}
_AGGREGATIONS: dict[Reduction, Aggregation] = {
    "token_mean": "token-mean",
    "token_mean_legacy": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "constant",
    "prompt_mean": "constant",
}


def skyrl(
    cls: type[Config],
    /,
    policy_loss_type: LossType = "regular",
    *,
    loss_reduction: Reduction = "token_mean",
    eps_clip_low: float = 0.2,
    eps_clip_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    use_kl_loss: bool = True,
    kl_loss_coef: float = 0.001,
    kl_estimator_type: KlEstimatorType = "k3",
    use_entropy_loss: bool = False,
    entropy_loss_coef: float = 0.01,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    cispo_eps_clip_low: float = 1.0,
    cispo_eps_clip_high: float = 4.0,
    cispo_anchor: Anchor = "old",
    dppo_type: DppoType = "binary_tv",
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    tis_ratio_type: TisRatioType | None = None,
    token_tis_ratio_clip_high: float = 2.0,
    sequence_tis_ratio_clip_high: float = 5.0,
    sequence_mask_metric: SequenceMaskMetric | None = None,
    outlier_token_is_threshold_low: float | None = None,
    outlier_token_is_threshold_high: float | None = None,
    token_mask_is_threshold_low: float | None = None,
    token_mask_is_threshold_high: float | None = None,
    **options: "Unpack[PolicyLossOptions]",
) -> Config:
    """The policy's loss of SkyRL; names and defaults of its AlgorithmConfig and of the SAPO, CISPO,
    DPPO and off-policy parts of it. Read in August 2026.

    Log-ratios are clamped to +-20 (gspo: to at most 10, importance_sampling: not clamped); k3 has
    its input clamped to +-20 and its value to +-10. gspo is the token form. rollout_is, dppo and
    cispo with cispo_anchor="rollout" take the ratio to the rollout: pass its logprobs as
    old_logprobs. cross_entropy takes advantages of 1 and no loss_reduction: its normalizer is N in
    supervised training, and 1 (a sum) in RL.

    SkyRL averages its KL over the rows' means whatever the loss_reduction. With use_kl_loss the
    aggregation is therefore that, and the advantages take the difference. For a mini-batch of all
    ranks with B rows, N unmasked tokens, P prompts, and M micro-batches; n: the tokens of a row,
    N_p of its prompt, N_m of its micro-batch; L is max_seq_len:

        loss_reduction             without KL: normalizer          with KL: normalizer B, and
                                                                   advantages [B] times
        token_mean                 N                               B n / N
        token_mean_legacy          M N_m                           B n / (M N_m)
        sequence_mean              B                               1
        seq_mean_token_sum_norm    B L                             n / L
        prompt_mean                1; advantages / (P N_p)         B n / (P N_p)

    SkyRL sums the gradients of ranks; divide the normalizer by their number where gradients are
    averaged. B counts rows without an unmasked token; normalizer=None excludes them.

    SkyRL averages the entropy over tokens of a micro-batch. The bonus is therefore accepted only
    with the two token means and without KL; with token_mean it equals SkyRL if micro-batches have
    equal numbers of tokens.

    SkyRL's metric clip_ratio is clip_frac_low + clip_frac_high here (cispo: of any sign of the
    advantage; dppo and rollout_is: gate_frac_low + gate_frac_high); policy_kl is kl_loss, and
    policy_entropy is entropy.

    Args:
        cls: PolicyLossConfig.
        policy_loss_type: the loss. clip_cov and kl_cov are not expressible.
        loss_reduction: as in the table.
        eps_clip_low: lower clip distance; with rollout_is of the kept ratios.
        eps_clip_high: upper clip distance.
        clip_ratio_c: bound of dual_clip.
        use_kl_loss: add the KL to the reference policy.
        kl_loss_coef: weight of this KL.
        kl_estimator_type: k1, k2, k3 or abs.
        use_entropy_loss: add the entropy bonus.
        entropy_loss_coef: its weight.
        tau_pos: sapo's tau where the advantage is positive.
        tau_neg: sapo's tau where it is not.
        cispo_eps_clip_low: lower clip distance of cispo.
        cispo_eps_clip_high: upper clip distance of cispo.
        cispo_anchor: "old" or "rollout".
        dppo_type: binary_tv or binary_kl.
        delta_low: bound of the divergence where the advantage is negative.
        delta_high: bound where it is positive.
        tis_ratio_type: "token" or "sequence" weights exp(old - rollout), or None.
        token_tis_ratio_clip_high: upper cap of token weights.
        sequence_tis_ratio_clip_high: upper cap of sequence weights.
        sequence_mask_metric: folds into the advantages; see its error.
        outlier_token_is_threshold_low: likewise.
        outlier_token_is_threshold_high: likewise.
        token_mask_is_threshold_low: likewise; needs both bounds.
        token_mask_is_threshold_high: likewise.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown option, one that cannot be expressed, or options that SkyRL does not
            combine.
    """
    refuse("skyrl", "policy_loss_type", policy_loss_type, _INEXPRESSIBLE)
    one_of("skyrl", "policy_loss_type", policy_loss_type, get_args(LossType))
    one_of("skyrl", "loss_reduction", loss_reduction, _AGGREGATIONS)
    one_of("skyrl", "cispo_anchor", cispo_anchor, get_args(Anchor))
    _check_masks(
        sequence_mask_metric,
        (outlier_token_is_threshold_low, outlier_token_is_threshold_high),
        (token_mask_is_threshold_low, token_mask_is_threshold_high),
    )
    name = policy_loss_type
    to_rollout = name in ("rollout_is", "dppo") or (name == "cispo" and cispo_anchor == "rollout")
    if to_rollout and tis_ratio_type is not None:
        require("skyrl", "tis_ratio_type", "None with a ratio to the rollout: it would count twice")

    fields: PolicyLossOptions = {"log_ratio_clamp": 20.0}
    if name in ("regular", "dual_clip", "gspo"):
        fields |= {"clip_low": eps_clip_low, "clip_high": eps_clip_high}
        if name == "dual_clip":
            fields["dual_clip"] = clip_ratio_c
        elif name == "gspo":
            fields |= {"ratio_level": "sequence-token", "log_ratio_clamp": (-math.inf, 10.0)}
    elif name == "cispo":
        fields |= {
            "objective": "cispo",
            "clip_low": cispo_eps_clip_low,
            "clip_high": cispo_eps_clip_high,
        }
    elif name == "sapo":
        fields |= {"objective": "sapo", "sapo_tau_pos": tau_pos, "sapo_tau_neg": tau_neg}
    elif name == "rollout_is":
        fields |= {
            "objective": "cispo",
            "clip_low": None,
            "clip_high": None,
            "gate": "ratio",
            "gate_low": max(0.0, 1 - eps_clip_low),
            "gate_high": 1 + eps_clip_high,
        }
    elif name == "dppo":
        one_of("skyrl", "dppo_type", dppo_type, get_args(DppoType))
        fields |= {
            "clip_low": None,
            "clip_high": None,
            "gate": "tv" if dppo_type == "binary_tv" else "binary_kl",
            "gate_low": delta_low,
            "gate_high": delta_high,
        }
    elif name == "importance_sampling":
        fields |= {"clip_low": None, "clip_high": None, "log_ratio_clamp": None}
    else:
        fields["objective"] = "reinforce"
    if tis_ratio_type is not None and name not in ("importance_sampling", "cross_entropy"):
        one_of("skyrl", "tis_ratio_type", tis_ratio_type, get_args(TisRatioType))
        by_token = tis_ratio_type == "token"
        fields |= {
            "correction_level": tis_ratio_type,
            "correction_max": (
                token_tis_ratio_clip_high if by_token else sequence_tis_ratio_clip_high
            ),
        }
    # Neither KL nor entropy beside cross_entropy.
    with_kl = use_kl_loss and name != "cross_entropy"
    # SkyRL's reduction scales advantages, which cross_entropy does not look at.
    reduction = "token_mean" if name == "cross_entropy" else loss_reduction
    fields["aggregation"] = _AGGREGATIONS["sequence_mean" if with_kl else reduction]
    if reduction == "prompt_mean" and not with_kl:
        fields["normalizer"] = 1.0
    if with_kl:
        fields |= _kl(kl_estimator_type, kl_loss_coef)
    if use_entropy_loss and name != "cross_entropy":
        if with_kl or _AGGREGATIONS[loss_reduction] != "token-mean":
            why = (
                "SkyRL averages it over tokens, but the rest over sequences: subtract "
                "entropy_loss_coef * entropy[mask].mean() from the loss"
            )
            inexpressible("skyrl", "use_entropy_loss with use_kl_loss or means by sequence", why)
        fields["entropy_coef"] = entropy_loss_coef
    return cls(**fields | options)


def _kl(estimator: KlEstimatorType, coef: float) -> PolicyLossOptions:
    one_of("skyrl", "kl_estimator_type", estimator, get_args(KlEstimatorType))
    fields: PolicyLossOptions = {"kl_coef": coef, "kl_estimator": estimator}
    if estimator == "k3":
        fields |= {"kl_input_clamp": 20.0, "kl_value_clamp": 10.0}
    return fields


def _bounds(criterion: str) -> str:
    return f"reject={{{criterion!r}: (low, high)}}"


def _check_masks(
    sequence: str | None,
    outlier: tuple[float | None, float | None],
    token: tuple[float | None, float | None],
) -> None:
    """Refuses the masks of tokens and sequences, with the criterion that does the same."""
    for given, name, rule in (
        (sequence == "geometric", "sequence_mask_metric='geometric'", _bounds("seq_mean_ratio")),
        (sequence == "product", "sequence_mask_metric='product'", _bounds("seq_sum_ratio")),
        (
            outlier != (None, None),
            "outlier_token_is_threshold_low or _high",
            "veto=low, reject={'seq_max_ratio': high}",
        ),
        # SkyRL wants both.
        (None not in token, "token_mask_is_threshold_low and _high", _bounds("token_ratio")),
    ):
        if given:
            why = (
                "it drops by the ratio to the rollout whatever the weights: multiply the "
                f"advantages by mismatch_weights(old, rollout, mask, log_ratio_clamp=20, {rule})"
                ".weights, with level= and high= for TIS"
            )
            inexpressible("skyrl", name, why)
    if sequence is not None:
        one_of("skyrl", "sequence_mask_metric", sequence, get_args(SequenceMaskMetric))
