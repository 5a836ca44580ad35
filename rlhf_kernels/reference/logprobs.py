"""Token log-probabilities and entropy, defined."""

import torch
from torch import Tensor

from . import shard
from ._common import compute


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    group: str = "",
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z)_y and H = -sum_j p_j log p_j of z = softcap(logits) / temperature.

    Args:
        logits: [..., V].
        labels: [...], integers in [0, V) or `ignore_index`.
        temperature: a number, or a tensor that broadcasts to the shape of labels.
        softcap: c in c * tanh(logits / c), or None.
        entropy: also return H.
        ignore_index: tokens with this label give 0 and take no gradient, whatever their logits.
        group: name of the process group over which V is sharded; "" for none.

    Returns:
        (logprobs [...], entropy [...] or None).
    """
    if group:
        return shard.token_logprobs(
            logits,
            labels,
            temperature=temperature,
            softcap=softcap,
            entropy=entropy,
            ignore_index=ignore_index,
            group=group,
        )
    keep = labels != ignore_index
    z = torch.where(keep.unsqueeze(-1), compute(logits), 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        # A temperature belongs to its token: one under an ignored label must not matter.
        temperature = torch.where(keep, compute(temperature), 1).unsqueeze(-1)
    logp = torch.log_softmax(z / temperature, dim=-1)
    index = torch.where(keep, labels, 0).long().unsqueeze(-1)
    logprobs = torch.where(keep, logp.gather(-1, index).squeeze(-1), 0)
    if not entropy:
        return logprobs, None
    p = logp.exp()
    # p log p is 0 at p = 0, where log p is -inf.
    plogp = p * torch.where(p > 0, logp, 0)
    return logprobs, torch.where(keep, -plogp.sum(-1), 0)
