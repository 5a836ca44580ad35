"""Checks shared by all operations. Messages name the argument, the expectation and the value."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import env, option_checks, sequences, temperature_rules, tracing
from .layout import any_of_token
from .option_checks import shown

# The native code of `plain`; None where the extension is not built.
_plain: Callable[..., bool] | None
try:
    _plain = importlib.import_module("rlhf_kernels._cpu").plain
except ImportError:
    _plain = None
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


def plain(kinds: str, *tensors: object) -> bool:
    """Whether native code finds at one look that no check would refuse or convert an argument.

    The arguments are then strided tensors of one shape and device, and of the dtypes that kernels
    take. The look takes a tenth of the time of the checks one by one. False says nothing about the
    arguments: the checks then have to decide.

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


def bad_offsets(op: str, position: int, cu_seqlens: Tensor, total: int) -> ValueError:
    """The error for the entry of cu_seqlens at `position`."""
    return ValueError(
        f"{op}: cu_seqlens must start at 0, never decrease and end at the number of tokens, "
        f"{total}; entry {position} is {cu_seqlens[position].item()}"
    )


def offsets_valid(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """Raises ValueError for the first bad entry of cu_seqlens (reads the tensor, on any device)."""
    if cu_seqlens is None or cu_seqlens.is_meta or tracing.active(cu_seqlens):
        return
    entries = cu_seqlens.tolist()
    for i, entry in enumerate(entries):
        low = entries[i - 1] if i else 0
        high = total if i else 0
        if not low <= entry <= high or (i == len(entries) - 1 and entry != total):
            raise bad_offsets(op, i, cu_seqlens, total)


def usable_offsets(
    op: str, cu_seqlens: Tensor | None, total: int
) -> tuple[Tensor | None, Tensor | None]:
    """(offsets that are safe to index with, whether the argument was valid), for plain torch.

    If the host may read the offsets, bad ones raise ValueError and the second result is None.
    Otherwise the second result is a 0-d bool, and a single sequence replaces bad offsets, because
    an index out of range aborts a process on a GPU. The caller poisons its result with NaN where
    the bool is false.
    """
    if cu_seqlens is None:
        return None, None
    if can_read_on_host(cu_seqlens):
        offsets_valid(op, cu_seqlens, total)
        return cu_seqlens, None
    if cu_seqlens.shape[0] == 1:
        # Zero sequences: no offset can be replaced, and no token is indexed.
        if total > 0:
            raise ValueError(
                f"{op}: cu_seqlens must end at the number of tokens, {total}, got one entry alone"
            )
        return cu_seqlens, cu_seqlens[0] == 0
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
    one_sequence = torch.full_like(cu_seqlens, total)
    one_sequence[0] = 0
    return torch.where(good, cu_seqlens, one_sequence), good


def out_of_range(op: str, position: int, labels: Tensor, vocab: int) -> IndexError:
    """The error for the label at flat `position`."""
    value = labels.reshape(-1)[position].item()
    return IndexError(
        f"{op}: label at flat position {position} is {value}; expected 0 <= label < {vocab} "
        "or ignore_index"
    )


def can_read_on_host(t: Tensor) -> bool:
    """Whether reading `t` on the host is free, or RLHF_KERNELS_CHECK=1 accepts its cost."""
    free = t.device.type == "cpu" or (env.CHECK and not t.is_meta)
    return free and not tracing.active(t)


def labels_in_range(op: str, labels: Tensor, keep: Tensor, vocab: int) -> None:
    """Raises IndexError for the first bad label under `keep` [...], if the host may read labels."""
    if not can_read_on_host(labels):
        return
    bad = ((labels < 0) | (labels >= vocab)) & keep
    if bad.any():
        raise out_of_range(op, int(bad.reshape(-1).nonzero()[0]), labels, vocab)


def temperatures_positive(op: str, temperature: float | Tensor | None, keep: Tensor) -> None:
    """Raises ValueError for the first bad temperature under `keep` [...].

    Does nothing for a number, or where the host may not read the tensor.
    """
    if not isinstance(temperature, Tensor) or not can_read_on_host(temperature):
        return
    bad = temperature_rules.bad(temperature) & keep
    if bad.any():
        raise bad_temperature(op, int(bad.reshape(-1).nonzero()[0]), temperature)


def token_data(
    op: str, labels: Tensor, temperature: float | Tensor | None, keep: Tensor, vocab: int
) -> None:
    """`labels_in_range` and `temperatures_positive`; labels may be [..., K], `keep` like them."""
    labels_in_range(op, labels, keep, vocab)
    if isinstance(temperature, Tensor):
        temperatures_positive(op, temperature, any_of_token(keep, temperature.dim()))


def kept_tokens(op: str, keep: Tensor, given: int) -> None:
    """Raises ValueError if `keep` is true more often than `given`, unless this is negative."""
    if given < 0 or not can_read_on_host(keep):
        return
    count = int(keep.sum())
    if count > given:
        raise ValueError(
            f"{op}: kept_tokens must be at least the number of tokens that are kept, {count}, got "
            f"{given}"
        )


def loss_weights(op: str, weights: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for the first bad weight under `mask`, if the host may read weights.

    Args:
        op: operation, for the message.
        weights: as `mask`, or one per sequence.
        mask: nonzero = keep, [B, T], or packed [N] with cu_seqlens.
        cu_seqlens: offsets of packed sequences.
    """
    if weights is None or not can_read_on_host(weights):
        return
    own, keep = weights, mask != 0
    if weights.shape != keep.shape:
        offsets_valid(op, cu_seqlens, keep.shape[0])
        own = sequences.spread(weights, keep, cu_seqlens)
    bad = ~((own >= 0) & (own < math.inf)) & keep
    if bad.any():
        position = int(bad.reshape(-1).nonzero()[0])
        raise ValueError(
            f"{op}: weights must be finite numbers >= 0, got {own.reshape(-1)[position].item()} "
            f"for the token at flat position {position}"
        )


def bad_temperature(op: str, position: int, temperatures: Tensor) -> ValueError:
    """The error for the temperature at flat `position`."""
    value = temperatures.reshape(-1)[position].item()
    return temperature_rules.error(op, position, value)


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


def bad_divisor(op: str, value: Tensor) -> ValueError:
    """The error for a normalizer tensor whose value is not a finite number > 0."""
    return ValueError(f"{op}: normalizer must be a finite number > 0, got {value.item()}")


def divisor_positive(op: str, value: Tensor | None) -> None:
    """Raises ValueError for a bad normalizer tensor, if the host may read it."""
    if value is None or not can_read_on_host(value):
        return
    if not 0 < value.item() < math.inf:
        raise bad_divisor(op, value)


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


def bad_indptr(op: str, position: int, indptr: Tensor, entries: int) -> ValueError:
    """The error for the entry of a support's indptr at `position`."""
    return ValueError(
        f"{op}: support indptr must start at 0, never decrease and end at the number of indices, "
        f"{entries}; entry {position} is {indptr[position].item()}"
    )


def bad_index(op: str, position: int, indices: Tensor, vocab: int) -> IndexError:
    """The error for the entry of a support's indices at `position`."""
    return IndexError(
        f"{op}: support index at position {position} is {indices[position].item()}; expected "
        f"0 <= index < {vocab}"
    )


def repeated_index(op: str, position: int, indices: Tensor) -> ValueError:
    """The error for a token id that occurs twice in one token's support, second at `position`."""
    return ValueError(
        f"{op}: support index at position {position} is {indices[position].item()} again; expected "
        "each token id once in a token's support"
    )


def support_data(
    op: str,
    labels: Tensor,
    temperature: float | Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    keep: Tensor,
    vocab: int,
) -> None:
    """`token_data`, then the same for the entries of a support.

    Raises:
        ValueError: a bad entry of indptr, or a token id that one token under `keep` [...] repeats.
        IndexError: a token id outside [0, vocab) of a token under `keep`.
    """
    token_data(op, labels, temperature, keep, vocab)
    if not can_read_on_host(indptr):
        return
    entries = indices.shape[0]
    bad = (indptr < 0) | (indptr > entries)
    bad[0] |= indptr[0] != 0
    bad[-1] |= indptr[-1] != entries
    bad[1:] |= indptr[1:] < indptr[:-1]
    if bad.any():
        raise bad_indptr(op, int(bad.nonzero()[0]), indptr, entries)
    counts = indptr.diff()
    used = keep.reshape(-1).repeat_interleave(counts)
    bad = ((indices < 0) | (indices >= vocab)) & used
    if bad.any():
        raise bad_index(op, int(bad.nonzero()[0]), indices, vocab)
    token = torch.arange(counts.shape[0], device=indptr.device).repeat_interleave(counts)
    at = used.nonzero().squeeze(-1)
    # The stable sort puts equal (token, token id) pairs next to each other in their given order.
    pair, order = (token[at] * vocab + indices[at]).sort(stable=True)
    repeats = at[order[1:][pair[1:] == pair[:-1]]]
    if repeats.numel():
        raise repeated_index(op, int(repeats.min()), indices)
