"""Checks of arguments that all operations share: types, dtypes, shapes, devices.

Messages name the argument, the expectation and the value. Those of values are in `data_checks`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import option_checks, tracing
from .option_checks import shown

# The native code of `plain`, from `kernels.native`; None where the extension is not built.
_plain: Callable[..., bool] | None = None
# Arguments per token that may be None.
_OPTIONAL = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32)
_FLOATING_OR_DOUBLE = (*FLOATING, torch.float64)
_INTEGER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Requires a plain strided tensor: no DTensor, sparse or nested tensor."""
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {kind.__name__}")
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{op}: {name} must be a plain Tensor, got {kind.__name__}; gather it with "
                f"{name}.full_tensor(), or where the vocabulary is sharded pass "
                f"{name}.to_local() and the process group as group="
            )
    found: Tensor = value
    if found.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {found.layout}")
    if found.is_nested:
        raise TypeError(f"{op}: {name} must be a plain tensor, got a nested one")
    return found


def use_native(function: Callable[..., bool]) -> None:
    """Lets `plain` ask this function."""
    global _plain
    _plain = function


def plain(kinds: str, *tensors: object) -> bool:
    """Whether the arguments need no check one by one, as a quick test in native code tells.

    They are then strided tensors of one shape and device, of dtypes that kernels take. The test
    takes a tenth of the time of those checks. After False the checks have to decide.

    Args:
        kinds: a letter for each: see csrc/bind/arguments.h.
        *tensors: the arguments.
    """
    return _plain is not None and not tracing.compiling() and _plain(kinds, *tensors)


def floating(op: str, name: str, value: object, *, double: bool = False) -> Tensor:
    """Requires a float32, bfloat16 or float16 tensor; also float64 with `double`."""
    value = tensor(op, name, value)
    allowed = _FLOATING_OR_DOUBLE if double else FLOATING
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {value.dtype}")
    return value


def not_double(op: str, **values: Tensor | None) -> None:
    """Refuses float64 among tensors that `floating` has accepted with `double`."""
    for name, value in values.items():
        if value is not None and value.dtype is torch.float64:
            floating(op, name, value)


def labels(op: str, name: str, value: object) -> Tensor:
    """Requires an int64 or int32 tensor."""
    value = tensor(op, name, value)
    if value.dtype not in LABEL_DTYPES:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {value.dtype}")
    return value


def integers(op: str, name: str, value: object) -> Tensor:
    """Requires a bool or integer tensor."""
    value = tensor(op, name, value)
    if value.dtype not in _INTEGER:
        raise TypeError(f"{op}: {name} must be bool or integer, got {value.dtype}")
    return value


def real(op: str, name: str, value: object) -> Tensor:
    """Requires a tensor of real numbers, as rewards are; integers and bools become float32."""
    value = tensor(op, name, value)
    if value.dtype in _INTEGER:
        return value.float()
    return floating(op, name, value, double=True)


def mask(op: str, name: str, value: object) -> Tensor:
    """Requires a bool or integer tensor, nonzero = keep, or a floating one that holds only 0 and 1.

    A floating mask is validated on every device (a host sync on a GPU) and converted to bool. A
    traced call records the validation in the graph, which raises when it runs. A mask on the meta
    device has no values to validate.
    """
    value = tensor(op, name, value)
    if value.dtype in _INTEGER:
        return value
    expected = f"{op}: {name} must be bool or integer (nonzero = keep), or hold only 0 and 1"
    if value.dtype not in _FLOATING_OR_DOUBLE:
        raise TypeError(f"{expected}, got {value.dtype}")
    keep = value != 0
    if value.is_meta:
        return keep
    binary = ((value == 1) | ~keep).all()
    advice = f"soft masks are not supported, pass {name}.bool()"
    if tracing.active(value):
        torch._assert_async(binary, f"{expected}, got other numbers; {advice}")
    elif not binary:
        raise TypeError(f"{expected}, got {value.dtype} with other numbers; {advice}")
    return keep


def row_mask(
    op: str, value: object, like: str, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """Requires None or a mask (see `mask`) of `shape`, the shape of the argument `like`."""
    if value is None:
        return None
    found = mask(op, "mask", value)
    same_shape(op, "mask", found, like, shape)
    same_device(op, "mask", found, like.partition(" ")[0], device)
    return found


def same_shape(op: str, name: str, value: Tensor, like: str, shape: torch.Size) -> None:
    """Requires `value.shape == shape`, the shape of the argument called `like`."""
    if value.shape != shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {like}, {shown(shape)}, got {shown(value.shape)}"
        )


def same_device(op: str, name: str, value: Tensor, like: str, device: torch.device) -> None:
    """Requires `value` on `device`, the device of the argument called `like`."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {like}'s device {device}, got {value.device}")


def same_dtype(op: str, name: str, value: Tensor, like: str, dtype: torch.dtype) -> None:
    """Requires `value.dtype == dtype`, the dtype of the argument called `like`."""
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must have {like}'s dtype {dtype}, got {value.dtype}")


def offsets(op: str, cu_seqlens: object) -> Tensor:
    """Requires packed-sequence offsets `[S+1]` of int32 or int64. Does not read their values."""
    cu_seqlens = tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in LABEL_DTYPES:
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must be 1-D with at least one entry, got {shown(cu_seqlens.shape)}"
        )
    return cu_seqlens


def token_inputs(
    op: str,
    tokens: Mapping[str, Tensor | None],
    mask_: object,
    cu_seqlens: Tensor | None,
    like: tuple[str, Tensor] | None = None,
) -> Tensor:
    """Requires floating tensors and a mask of one shape: [B, T], or packed [N] with cu_seqlens.

    Args:
        op: operation, for the messages.
        tokens: values by argument name; the arguments in _OPTIONAL may be None.
        mask_: the argument `mask`.
        cu_seqlens: offsets of packed sequences.
        like: name and tensor that set shape and device; None for the first of `tokens`.

    Returns:
        The mask, as `mask` returns it.
    """
    if like is None:
        name, first_value = next(iter(tokens.items()))
        like = name, floating(op, name, first_value, double=True)
    name, first = like
    shape, device = first.shape, first.device
    if len(shape) != (2 if cu_seqlens is None else 1):
        expected = "[B, T]" if cu_seqlens is None else "[N], packed as cu_seqlens says,"
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(shape)}")
    for other, value in tokens.items():
        if value is first or (value is None and other in _OPTIONAL):
            continue
        value = floating(op, other, value, double=True)
        same_shape(op, other, value, name, shape)
        same_device(op, other, value, name, device)
    found = mask(op, "mask", mask_)
    same_shape(op, "mask", found, name, shape)
    same_device(op, "mask", found, name, device)
    if cu_seqlens is not None:
        offsets(op, cu_seqlens)
        same_device(op, "cu_seqlens", cu_seqlens, name, device)
    return found


def divisor(op: str, value: object, like: str, device: torch.device) -> tuple[Tensor | None, float]:
    """A normalizer as (0-d tensor or None, number); the number is 0 unless a number was passed.

    A tensor may be on any device, but on the meta device only if the argument `like` is too.
    """
    if value is None:
        return None, 0.0
    if isinstance(value, Tensor):
        tensor(op, "normalizer", value)
        if value.dim() != 0 or value.is_complex() or value.dtype is torch.bool:
            raise ValueError(
                f"{op}: normalizer must be a number or a 0-d tensor of real numbers, got "
                f"{value.dtype} of shape {shown(value.shape)}"
            )
        if value.is_meta and device.type != "meta":
            same_device(op, "normalizer", value, like, device)
        return value.detach(), 0.0
    return None, option_checks.positive(op, "normalizer", value)


def support(op: str, value: object, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Requires (indptr [tokens + 1], indices [nnz]), each int32 or int64. Reads no values."""
    # A tuple of types: torch.compile of torch 2.6 cannot trace a union in isinstance.
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{op}: support must be a pair (indptr, indices), got {type(value).__name__}"
        )
    for name, part in zip(("support indptr", "support indices"), value, strict=True):
        labels(op, name, part)
        same_device(op, name, part, "labels", device)
        if part.dim() != 1:
            raise ValueError(f"{op}: {name} must be 1-D, got {shown(part.shape)}")
    indptr, indices = value
    if indptr.shape[0] != tokens + 1:
        raise ValueError(
            f"{op}: support indptr must have an entry per token and one more, {tokens + 1}, got "
            f"{shown(indptr.shape[0])}"
        )
    return indptr, indices
