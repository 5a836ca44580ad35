"""TRL: its LM head and its log-probabilities from logits, computed by our kernels.

    from rlhf_kernels.integrations import trl
    trl.patch()

This works before or after a trainer is built. In TRL >= 1.15 GRPO, RLOO, DPO, KTO and SFT use the
replaced head. Trainers with logits (TRL <= 1.14, and experimental ones) use the replaced functions
of logits. TRL's losses are part of its trainers and are not replaced, nor is RewardTrainer, which
has no LM head. TRL's function serves each call that ours cannot serve; report() counts them.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._common import CastHead, logits_entropy, require_kernels, require_logits, require_temperature
from ._patch import Hook, IncompatibleError, Integration, Report, Unsupported

__all__ = ["IncompatibleError", "Report", "patch", "patched", "report", "unpatch"]

_INTEGRATION = Integration("trl", ("1.0", "2.0"))
# Maximum bytes of logits at a time, for the mean of capped ones.
_LOGITS_BYTES = 128 * 2**20

# Signatures of the chunked head in TRL 1.15 and later, in 1.13 and 1.14, and in 1.4 to 1.12.
_HEADS = (
    "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale, outputs",
    "ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale",
    "ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale",
)
_OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _check(logits: Tensor, index: Tensor, temperature: float = 1.0) -> None:
    require_logits(logits, index)
    require_temperature(temperature)


def _no_label(index: Tensor) -> int:
    """A label that no token has. The kernels reserve the lowest integers, so it is not one."""
    return torch.iinfo(index.dtype).min // 2


def _labels(index: Tensor, row_mask: Tensor | None) -> tuple[Tensor, int]:
    """The labels, and the label of rows to skip."""
    # Skipped rows get a label of their own, because an index of -100 must remain an error.
    skipped = _no_label(index)
    return (index if row_mask is None else index.masked_fill(row_mask == 0, skipped)), skipped


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    _check(logits, index, temperature)
    labels, skipped = _labels(index, row_mask)
    return rk.token_logprobs(logits, labels, temperature=temperature, ignore_index=skipped).logprobs


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return logits_entropy(logits)


def _logprobs_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(logits, index, temperature)
    labels, skipped = _labels(index, row_mask)
    found = rk.token_logprobs(
        logits, labels, temperature=temperature, entropy=True, ignore_index=skipped
    )
    entropy = found.entropy if entropy_requires_grad else found.entropy.detach()
    return found.logprobs, entropy


def _chunked_head(original: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """ChunkedLogProbFunction.apply with any of its signatures; the chunk_size, a number of
    vocabulary entries, is ignored."""
    signature = inspect.signature(original.forward)

    def apply(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        call = signature.bind(None, *args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        hidden = a["hidden"] if "hidden" in a else a["last_hidden"]
        outputs = a.get("outputs", ("entropy",))
        results = _head(
            hidden,
            a["weight"],
            a.get("bias"),
            a["targets"],
            a["temperature"],
            a["final_logit_softcapping"],
            a["logit_scale"],
            outputs,
        )
        return results if "outputs" in a else results[:2]

    return apply


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), None if not in `outputs`."""
    unknown = set(outputs) - {"log_probs", *_OPTIONAL_OUTPUTS}
    if unknown:
        raise Unsupported(f"output {min(unknown)!r}")
    head = CastHead(hidden, weight, bias)
    found = head.token_logprobs(
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy="entropy" in outputs,
        collision="log_sum_sq_probs" in outputs,
        argmax="is_top1" in outputs,
        # TRL has no label for rows to skip: it passes 0 for rows without a label.
        ignore_index=_no_label(targets),
    )
    mean = None
    if "mean_logits" in outputs:
        with head.no_autocast(), torch.no_grad():
            mean = _mean_logits(head, softcap, logit_scale) / temperature
    # TRL has these two for its metrics alone.
    log_sum_sq = None if found.collision is None else found.collision.detach().log()
    is_top1 = None if found.argmax is None else found.argmax == targets
    return found.logprobs, found.entropy, log_sum_sq, mean, is_top1


def _mean_logits(head: CastHead, softcap: float | None, logit_scale: float) -> Tensor:
    """The mean [N] of each row's logits.

    That of linear logits is a product with the mean of the weight's rows; capped ones are computed
    a part of the rows at a time.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if softcap is None:
        mean = torch.mv(hidden.float(), weight.mean(0, dtype=torch.float32))
        if bias is not None:
            mean += bias.mean(dtype=torch.float32)
        return mean * logit_scale
    rows = max(_LOGITS_BYTES // (4 * weight.shape[0]), 1)
    means = []
    for part in hidden.split(rows):
        logits = torch.nn.functional.linear(part, weight, bias).float() * logit_scale
        means.append((softcap * torch.tanh(logits / softcap)).mean(-1))
    return torch.cat(means)


def _compact(device: torch.device) -> bool:
    """Always true: our head leaves out rows without a label; TRL's does so only with a kernel."""
    require_kernels(device)
    return True


_UTILS = "trl.trainer.utils"
_HOOKS = (
    Hook(_UTILS, "_ChunkedLogProbFunction", _HEADS, _chunked_head, makes_ours=True),
    # In this module TRL asks whether the head leaves out rows without a label. In other modules the
    # function selects TRL's kernels, so it is not replaced there.
    Hook(_UTILS, "_use_triton", ("device",), _compact, everywhere=False),
    Hook(
        _UTILS,
        "selective_log_softmax",
        ("logits, index, temperature, row_mask", "logits, index"),
        _selective_log_softmax,
        required=True,
    ),
    Hook(
        _UTILS,
        "entropy_from_logits",
        ("logits, chunk_size",),
        _entropy_from_logits,
        required=True,
    ),
    Hook(
        _UTILS,
        "selective_log_softmax_and_entropy",
        ("logits, index, entropy_requires_grad, temperature, row_mask",),
        _logprobs_and_entropy,
    ),
)


def patch() -> Report:
    """Replaces the LM head and the functions of logits, as far as this version of TRL has them.

    Idempotent. Raises IncompatibleError, with nothing replaced, for an unknown version or
    signature.
    """
    return _INTEGRATION.patch(_HOOKS)


def unpatch() -> Report:
    """Restores TRL's own functions."""
    return _INTEGRATION.unpatch()


def patched() -> contextlib.AbstractContextManager[None]:
    """A context in which TRL is patched."""
    return _INTEGRATION.patched(patch, unpatch)


def report() -> Report:
    """What is replaced or could be, and how many calls were served or passed on."""
    return _INTEGRATION.report(_HOOKS)
