"""Preference learning: sequence log-probabilities, DPO and the reward model's loss.

Plain torch on every backend: the tensors are only [B], and the logprobs are the expensive part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DPO_LOSS_TYPES, DPOLossType
from ..core import checks, option_checks


class DPOLoss(NamedTuple):
    """Result of `dpo_loss`."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class RewardModelLoss(NamedTuple):
    """Result of `reward_model_loss`."""

    loss: Tensor
    accuracy: Tensor


def _check_pairs(op: str, pairs: dict[str, Tensor]) -> None:
    (like, first), *_ = pairs.items()
    for name, value in pairs.items():
        checks.floating(op, name, value, double=True)
        if value.dim() != 1:
            raise ValueError(f"{op}: {name} must be [B], got {tuple(value.shape)}")
        checks.same_shape(op, name, value, like, first.shape)
        checks.same_device(op, name, value, like, first.device)


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None, average: bool = False
) -> Tensor:
    """Log-probability of each sequence: the sum of its unmasked tokens' log-probabilities.

    Args:
        logprobs: [B, T], or packed [N] with cu_seqlens; float32, bfloat16 or float16.
        mask: same shape; bool or integer, nonzero = keep, or floating with only 0 and 1. Values of
            masked tokens, even NaN, have no effect.
        cu_seqlens: offsets [S + 1] of packed sequences, int32 or int64.
        average: return the mean over the unmasked tokens instead of the sum (for IPO).

    Returns:
        [B] (packed: [S]), float32, differentiable; 0 for a sequence without unmasked tokens.

    Raises:
        TypeError: wrong dtype or type of an argument; a floating mask with values besides 0 and 1.
        ValueError: shapes or devices that do not match; bad cu_seqlens.
    """
    op = "sequence_logprobs"
    mask = checks.token_inputs(op, {"logprobs": logprobs}, mask, cu_seqlens)
    average = option_checks.flag(op, "average", average)
    cu_seqlens, good = checks.usable_offsets(op, cu_seqlens, logprobs.shape[0])
    found = reference.sequence_logprobs(logprobs, mask, cu_seqlens=cu_seqlens, average=average)
    return found if good is None else torch.where(good, found, torch.nan)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> DPOLoss:
    """Direct preference optimisation, mean over pairs.

    With d = (chosen - ref_chosen) - (rejected - ref_rejected), z = beta d, s = label_smoothing:
    "sigmoid": -(1 - s) log sigmoid(z) - s log sigmoid(-z), Rafailov et al. 2023 (arXiv:2305.18290);
    s > 0 is conservative DPO. "ipo": (d - 1 / (2 beta))^2, Azar et al. 2023 (arXiv:2310.12036);
    pass means (`sequence_logprobs(average=True)`) as TRL does, or sums as in the paper. "hinge":
    max(0, 1 - z), Zhao et al. 2023 (arXiv:2305.10425). "robust":
    (-(1 - s) log sigmoid(z) + s log sigmoid(-z)) / (1 - 2 s), Chowdhury et al. 2024
    (arXiv:2403.00409).

    Args:
        chosen_logprobs: [B], of whole sequences (`sequence_logprobs`).
        rejected_logprobs: [B].
        ref_chosen_logprobs: [B], of the reference policy.
        ref_rejected_logprobs: [B].
        beta: strength of the implicit KL, > 0.
        loss_type: "sigmoid", "ipo", "hinge" or "robust".
        label_smoothing: probability that a pair is labelled wrongly, in [0, 0.5); only for
            "sigmoid" and "robust".

    Returns:
        DPOLoss(loss, chosen_rewards [B], rejected_rewards [B]), float32; the rewards
        beta * (logprob - ref) are detached. Without pairs the loss is 0.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; bad or contradictory options.
    """
    op = "dpo_loss"
    pairs = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    _check_pairs(op, pairs)
    beta = option_checks.positive(op, "beta", beta)
    option_checks.one_of(op, "loss_type", loss_type, DPO_LOSS_TYPES)
    label_smoothing = option_checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing != 0 and loss_type not in ("sigmoid", "robust"):
        raise ValueError(
            f"{op}: label_smoothing must be 0 with loss_type {loss_type!r}, got {label_smoothing}"
        )
    return DPOLoss(
        *reference.dpo_loss(
            *pairs.values(), beta=beta, loss_type=loss_type, label_smoothing=label_smoothing
        )
    )


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> RewardModelLoss:
    """Pairwise reward-model loss: mean of -log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2.

    Bradley-Terry, as in Ouyang et al. 2022 (arXiv:2203.02155); margin as in Llama 2
    (arXiv:2307.09288); centering, which fixes the free offset of the rewards, as in Eisenstein et
    al. 2023 (arXiv:2312.09244).

    Args:
        chosen_rewards: [B], float32, bfloat16 or float16.
        rejected_rewards: [B].
        margin: a number, a constant tensor [B] (floating or integer), or None.
        center_coef: weight >= 0 of the centering term.

    Returns:
        RewardModelLoss(loss, accuracy), 0-d float32; accuracy is the fraction of pairs with
        r_w > r_l. Without pairs both are 0.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; a negative center_coef.
    """
    op = "reward_model_loss"
    pairs = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    _check_pairs(op, pairs)
    if isinstance(margin, Tensor) and margin.dim() > 0:
        margin = checks.real(op, "margin", margin).detach()
        _check_pairs(op, {**pairs, "margin": margin})
        margin = margin if margin.dtype is torch.float64 else margin.float()
    elif margin is not None:
        margin = option_checks.number(op, "margin", margin)
    center_coef = option_checks.non_negative(op, "center_coef", center_coef)
    return RewardModelLoss(
        *reference.reward_model_loss(*pairs.values(), margin=margin, center_coef=center_coef)
    )
