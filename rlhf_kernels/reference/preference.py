"""Reference of sequence log-probabilities and the losses of preference pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.sequences import sequence_sums
from ._common import compute


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None, average: bool = False
) -> Tensor:
    """Sum (with `average`: mean) of each sequence's unmasked token log-probabilities, [B]."""
    mask = mask != 0
    x = torch.where(mask, compute(logprobs), 0)
    total = sequence_sums(x, cu_seqlens)
    if average:
        total = total / sequence_sums(mask, cu_seqlens).clamp(min=1)
    return total.to(x.dtype)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over pairs, and the implicit rewards beta (logprob - ref) of both sides.

    With d = (chosen - ref_chosen) - (rejected - ref_rejected), z = beta d, s = label_smoothing:
    sigmoid -(1 - s) log sigmoid(z) - s log sigmoid(-z); ipo (d - 1 / (2 beta))^2; hinge
    max(0, 1 - z); robust (-(1 - s) log sigmoid(z) + s log sigmoid(-z)) / (1 - 2 s).
    """
    chosen = compute(chosen_logprobs) - compute(ref_chosen_logprobs)
    rejected = compute(rejected_logprobs) - compute(ref_rejected_logprobs)
    d = chosen - rejected
    z, s = beta * d, label_smoothing
    if loss_type == "ipo":
        term = (d - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        term = torch.relu(1 - z)
    else:
        term = -(1 - s) * F.logsigmoid(z)
        # Skipped without smoothing: 0 times an infinite term is NaN.
        if s != 0:
            flipped = s * F.logsigmoid(-z)
            term = (term + flipped) / (1 - 2 * s) if loss_type == "robust" else term - flipped
    loss = term.sum() / max(term.numel(), 1)
    return loss, beta * chosen.detach(), beta * rejected.detach()


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean over pairs of -log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2; accuracy."""
    chosen, rejected = compute(chosen_rewards), compute(rejected_rewards)
    d = chosen - rejected
    z = d if margin is None else d - margin
    term = -F.logsigmoid(z)
    if center_coef != 0:
        term = term + center_coef * (chosen + rejected) ** 2
    pairs = max(d.numel(), 1)
    return term.sum() / pairs, (d.detach() > 0).to(d.dtype).sum() / pairs
