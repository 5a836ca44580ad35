"""Which backend serves an operation, asked without a call."""

from typing import Literal, NamedTuple, get_args

import torch

from ..core.checks import FLOATING
from ..kernels import backends
from ._operator import ROW_KERNELS

#: Names of operations.
OperationName = Literal[
    "discounted_returns", "gae", "group_advantages", "kl_divergence", "kl_penalty", "kto_loss",
    "linear_kl_divergence", "linear_policy_loss", "linear_token_logprobs", "mismatch_weights",
    "optimal_token_baseline", "policy_loss", "ppo_advantages", "preference_loss",
    "reward_model_loss", "sequence_logprobs", "token_logprobs", "topk_divergence", "value_loss",
    "whiten",
]  # fmt: skip
OPERATION_NAMES: tuple[OperationName, ...] = get_args(OperationName)

#: What serves operations without kernels of their own.
TORCH = "torch"
# Operations that convert float64 for their kernels.
_WITH_DOUBLE = ("group_advantages",)


class Support(NamedTuple):
    """Result of `supports`.

    Attributes:
        backend: "cpu", "cuda", "triton" or "reference"; "torch" for an operation that is a few
            lines of torch on every device; None if a call would raise.
        reason: why a call would raise, or why no kernels serve it; None if kernels do.
    """

    backend: str | None
    reason: str | None


def _serving(op: str, device: torch.device) -> Support:
    """The result of `supports` for a dtype that the backend takes."""
    if not hasattr(torch.ops.rlhf_kernels, op):
        return Support(TORCH, "it is a few lines of torch")
    kernel = ROW_KERNELS.get(op, op)
    try:
        backend = backends.chosen(op, device, kernel)
    except RuntimeError as error:
        return Support(None, str(error))
    if backend == backends.REFERENCE:
        return Support(backend, backends.why_reference(op, device, kernel))
    return Support(backend, None)


def supports(
    op: OperationName,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Support:
    """The backend that a call of an operation would use now, and why not another.

    Args:
        op: name of an operation, as in "token_logprobs".
        device: of its tensors.
        dtype: of its floating tensors.

    Raises:
        TypeError: `dtype` is no torch.dtype.
        ValueError: there is no such operation; the dtype is not floating.
        RuntimeError: torch does not know the device.
    """
    if op not in OPERATION_NAMES:
        raise ValueError(f"supports: op must be one of {', '.join(OPERATION_NAMES)}, got {op!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"supports: dtype must be a torch.dtype, got {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"supports: dtype must be floating, got {dtype}")
    device = torch.device(device)
    backend, reason = _serving(op, device)
    if backend is None:
        return Support(None, reason)
    double = backend in (TORCH, backends.REFERENCE) or op in _WITH_DOUBLE
    known = (*FLOATING, torch.float64) if double else FLOATING
    if dtype not in known:
        expected = ", ".join(str(d).removeprefix("torch.") for d in known)
        return Support(None, f"{backend} takes {expected}, not {str(dtype).removeprefix('torch.')}")
    return Support(backend, reason)
