"""prime-rl's policy losses.

The advantages that go with them are `group_advantages(r, ids, scale="none")`, and
`group_advantages(r, ids, scale="mean")` for MaxRL.
"""

from typing import TYPE_CHECKING, Literal, get_args

from ..options import PolicyLossOptions
from ._common import Config, inexpressible, one_of, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossType = Literal["default", "ipo", "ref_kl", "ce"]
#: What ref_kl does not take from the options.
_REF_KL_MASK, _REF_KL_TAU = 0.2, 1e-3


def prime_rl(
    cls: type[Config],
    /,
    loss_type: LossType = "default",
    *,
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    ipo_threshold: float = 0.1,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    **options: "Unpack[PolicyLossOptions]",
) -> Config:
    """A component of prime-rl's loss; names and defaults of its `trainer.loss`, whose `type` is
    loss_type here. Read in August 2026.

    The inference log-probabilities are the old_logprobs, and the ref_logprobs too: kl_tau x^2 with
    x = logprob - old pulls to them. The log-ratio is not clamped.

        default   -A r of the tokens that DPPO's total variation keeps, plus kl_tau x^2
        ipo       the same, dropping tokens whose probability moved by more than ipo_threshold,
                  whatever A
        ref_kl    advantages = (ref - logprobs).detach(), with ref the teacher's; ref_logprobs are
                  the old_logprobs as above. Drops tokens whose probability fell by more than 0.2
        ce        advantages of 1: the negative log-likelihood

    The normalizer is the component's number of tokens over all ranks; prime-rl sums gradients. For
    default and ipo these are the tokens of the mask with a weight other than 0. For ce and ref_kl
    they are those with a weight other than 0, and the mask is `weights != 0`, whatever prime-rl's
    own loss mask: observations have a weight for ce. rl_weights, ce_weights and ref_kl_weights go
    in as `weights=`. Components add up: one call for each.

    prime-rl's metrics is_masked_low and is_masked_high are gate_frac_low and gate_frac_high here;
    its is_masked also counts tokens with an advantage of 0 at the lower bound. Its mismatch_kl is
    k3_old, of masked and unmasked tokens together.

    Args:
        cls: PolicyLossConfig.
        loss_type: default, ipo, ref_kl or ce.
        dppo_mask_low: how far a probability may fall where A < 0.
        dppo_mask_high: how far it may rise where A > 0.
        ipo_threshold: how far it may move with ipo.
        adv_tau: factor of the advantages, to be applied to these.
        kl_tau: weight of x^2.
        **options: fields of PolicyLossConfig; they override the above.

    Returns:
        PolicyLossConfig.

    Raises:
        ValueError: an unknown loss_type, a custom one, or an adv_tau other than 1.
    """
    why = "an imported function has its own formula"
    refuse("prime_rl", "loss_type", loss_type, {"custom": why})
    one_of("prime_rl", "loss_type", loss_type, get_args(LossType))
    if loss_type == "ce":
        return cls(**PolicyLossOptions(objective="reinforce") | options)
    fields: PolicyLossOptions = {
        "clip_low": None,
        "clip_high": None,
        "log_ratio_clamp": None,
        "kl_estimator": "k2",
        "gate": "tv",
    }
    if loss_type == "ref_kl":
        fields |= {"gate_low": _REF_KL_MASK, "gate_two_sided": True, "kl_coef": 2 * _REF_KL_TAU}
        return cls(**fields | options)
    if adv_tau != 1:
        inexpressible("prime_rl", f"adv_tau={adv_tau}", "multiply the advantages by it")
    fields["kl_coef"] = 2 * kl_tau
    if loss_type == "ipo":
        fields |= {"gate_low": ipo_threshold, "gate_high": ipo_threshold, "gate_two_sided": True}
    else:
        fields |= {"gate_low": dppo_mask_low, "gate_high": dppo_mask_high}
    return cls(**fields | options)
