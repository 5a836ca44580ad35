"""topk_divergence: the divergence from a teacher whose K most likely tokens alone are known."""

import torch
from torch import Tensor

from .. import reference
from ..config.enums import DIRECTIONS, Direction
from ..core import checks, option_checks, pair_options
from ..core.option_checks import shown


def topk_divergence(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    direction: Direction = "forward",
    beta: float | None = None,
) -> Tensor:
    """Per-token divergence from a teacher, of its K most likely tokens and one bucket for the rest.

    On-policy distillation (GKD, 2306.13649) from a teacher of whom no more is known.

    The policy's and the teacher's distributions over K + 1 outcomes: the K tokens, and that it is
    none of them, whose probability is 1 minus theirs. The teacher's logits are never needed, and
    the policy's K log-probabilities come from one call with K labels per token:

        logprobs = linear_token_logprobs(hidden, weight, ids).logprobs  # or token_logprobs
        loss = topk_divergence(logprobs, teacher_logprobs, mask)

    It is a lower bound of the divergence over the whole vocabulary, and equal to it where K is the
    size of the vocabulary less one.

    Args:
        logprobs: policy's log-probabilities [..., K] of the teacher's tokens, K >= 1, which must
            differ from one another; float32, bfloat16 or float16; differentiated.
        ref_logprobs: teacher's log-probabilities [..., K] of the same tokens, normalised over the
            whole vocabulary; any of these dtypes; a constant.
        mask: [...]; as in `kl_divergence`.
        direction: "forward", "reverse" or "jsd", as in `kl_divergence`.
        beta: of "jsd", as in `kl_divergence`.

    Returns:
        [...], float32, never negative. The rest has a probability of at least 2^-23, the resolution
        of a sum of float32 probabilities. Differentiable in logprobs.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes or devices that differ, unknown direction, a beta outside [0, 1] or
            without "jsd".
    """
    op = "topk_divergence"
    checks.floating(op, "logprobs", logprobs, double=True)
    checks.floating(op, "ref_logprobs", ref_logprobs, double=True)
    if logprobs.dim() == 0 or logprobs.shape[-1] == 0:
        raise ValueError(
            f"{op}: logprobs must be [..., K] with K >= 1, got {shown(logprobs.shape)}"
        )
    checks.same_shape(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs.shape)
    checks.same_device(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs.device)
    option_checks.one_of(op, "direction", direction, DIRECTIONS)
    options = pair_options.checked(op, direction, beta)
    mask = checks.row_mask(op, mask, "logprobs without K", logprobs.shape[:-1], logprobs.device)
    keep = torch.ones_like(logprobs[..., 0], dtype=torch.bool) if mask is None else mask != 0
    return reference.topk_divergence(logprobs, ref_logprobs, keep, options.reverse, options.beta)
