"""Reference of log-probabilities, losses and KL from hidden states through the LM head."""

from typing import Any

import torch
from torch import Tensor

from ..config.policy import PolicyLossConfig
from ..core.layout import any_of_token
from ..core.pair_options import SAME
from ..core.row_options import RowResults
from . import shard
from ._common import compute
from .kl import kl_divergence
from .logprobs import token_logprobs
from .policy import policy_loss


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """(hidden @ weight.T + bias) * logit_scale in fp32, or in fp64 for fp64 inputs."""
    logits = compute(hidden) @ compute(weight).T
    if bias is not None:
        logits = logits + compute(bias)
    return logits * logit_scale


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: str = "",
    **options: Any,
) -> RowResults:
    """`token_logprobs` of the head's logits, with its options; see `linear_token_logprobs`."""
    # NaN in an ignored token's hidden state must not reach the gradient of the weight.
    keep = any_of_token(labels != ignore_index, hidden.dim() - 1).unsqueeze(-1)
    hidden = torch.where(keep, hidden, 0)
    if group:
        hidden = shard.copied(compute(hidden), group)
    return token_logprobs(
        head_logits(hidden, weight, bias, logit_scale),
        labels,
        ignore_index=ignore_index,
        group=group,
        **options,
    )


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | str = SAME,
    entropy: bool = False,
    **options: Any,
) -> Any:
    """`kl_divergence` between two heads; see `rlhf_kernels.linear_kl_divergence`."""
    keep = hidden.new_ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
    hidden = torch.where(keep.unsqueeze(-1), hidden, 0)
    ref_hidden = torch.where(keep.unsqueeze(-1), ref_hidden, 0)
    ref_scale = logit_scale if isinstance(ref_logit_scale, str) else ref_logit_scale
    found = kl_divergence(
        head_logits(hidden, weight, bias, logit_scale),
        head_logits(ref_hidden, ref_weight, ref_bias, ref_scale).detach(),
        entropy=entropy,
        **options,
    )
    if entropy:
        kl, of_policy = found
        return torch.where(keep, kl, 0), torch.where(keep, of_policy, 0)
    return torch.where(keep, found, 0)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig,
    group: str = "",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`policy_loss` of the head's log-probabilities; see `rlhf_kernels.linear_policy_loss`.

    Masked tokens are ignored, whatever their labels. `options` are temperature, logit_scale and
    softcap of `linear_token_logprobs`.
    """
    labels = labels.masked_fill(mask == 0, -100)
    found = linear_token_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        entropy=True,
        group=group,
        **options,
    )
    return policy_loss(
        found.logprobs,
        found.logprobs.detach() if old_logprobs is None else old_logprobs,
        advantages,
        mask,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        entropy=found.entropy,
        weights=weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        config=config,
    )
