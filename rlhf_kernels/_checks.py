"""Checks shared by all operations. Each names the argument, what was expected, what came."""

import math

import torch
from torch import Tensor

from . import _config

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32)
_FLOATING_OR_DOUBLE = (*FLOATING, torch.float64)
_NUMBER = (int, float, torch.SymInt, torch.SymFloat)
_INTEGER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tensor(op: str, name: str, value: object) -> None:
    """Requires a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {value.layout}")


def floating(op: str, name: str, value: object, *, double: bool = False) -> None:
    """Requires a float32, bfloat16 or float16 tensor; also float64 with `double`."""
    tensor(op, name, value)
    allowed = _FLOATING_OR_DOUBLE if double else FLOATING
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {value.dtype}")


def labels(op: str, name: str, value: object) -> None:
    """Requires an int64 or int32 tensor."""
    tensor(op, name, value)
    if value.dtype not in LABEL_DTYPES:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {value.dtype}")


def mask(op: str, name: str, value: object) -> None:
    """Requires a bool or integer tensor: nonzero keeps a token."""
    tensor(op, name, value)
    if value.dtype not in _INTEGER:
        raise TypeError(
            f"{op}: {name} must be bool or integer (nonzero = keep), got {value.dtype}; "
            f"soft masks are not supported, pass {name}.bool()"
        )


def same_shape(op: str, name: str, value: Tensor, like: str, shape: torch.Size) -> None:
    """Requires `value.shape == shape`, the shape of the argument called `like`."""
    if value.shape != shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {like}, {tuple(shape)}, got {tuple(value.shape)}"
        )


def same_device(op: str, name: str, value: Tensor, like: str, device: torch.device) -> None:
    """Requires `value` on `device`, the device of the argument called `like`."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {like}'s device {device}, got {value.device}")


def same_dtype(op: str, name: str, value: Tensor, like: str, dtype: torch.dtype) -> None:
    """Requires `value.dtype == dtype`, the dtype of the argument called `like`."""
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must have {like}'s dtype {dtype}, got {value.dtype}")


def positive(op: str, name: str, value: object) -> None:
    """Requires a finite number above zero."""
    number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be a finite number > 0, got {value}")


def number(op: str, name: str, value: object) -> None:
    """Requires a finite Python number."""
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Not math.isfinite: torch.compile traces comparisons of symbolic floats, not that.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def one_of(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Requires one of the strings in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def offsets(op: str, cu_seqlens: object, total: int) -> None:
    """Requires packed-sequence offsets `[S+1]` of int32 or int64; their values are data."""
    tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in LABEL_DTYPES:
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must be 1-D with at least one entry, got {tuple(cu_seqlens.shape)}"
        )


def bad_offsets(op: str, position: int, cu_seqlens: Tensor, total: int) -> ValueError:
    """The error for the entry of cu_seqlens at `position`."""
    return ValueError(
        f"{op}: cu_seqlens must start at 0, never decrease and end at the number of tokens, "
        f"{total}; entry {position} is {cu_seqlens[position].item()}"
    )


def offsets_valid(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """Raises ValueError for the first bad entry of cu_seqlens (reads the tensor)."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return
    entries = cu_seqlens.tolist()
    for i, entry in enumerate(entries):
        low = entries[i - 1] if i else 0
        high = total if i else 0
        if not low <= entry <= high or (i == len(entries) - 1 and entry != total):
            raise bad_offsets(op, i, cu_seqlens, total)


def out_of_range(op: str, position: int, labels: Tensor, vocab: int) -> IndexError:
    """The error for the label at flat `position`."""
    value = labels.reshape(-1)[position].item()
    return IndexError(
        f"{op}: label at flat position {position} is {value}; expected 0 <= label < {vocab} "
        "or ignore_index"
    )


def may_look(t: Tensor) -> bool:
    """Whether reading `t` on the host is free, or asked for by RLHF_KERNELS_CHECK=1."""
    return (t.device.type == "cpu" or _config.CHECK) and not torch.compiler.is_compiling()


def labels_in_range(op: str, labels: Tensor, keep: Tensor, vocab: int) -> None:
    """Raises IndexError for the first bad label of `keep` [...], where data may be looked at."""
    if not may_look(labels):
        return
    bad = ((labels < 0) | (labels >= vocab)) & keep
    if bad.any():
        raise out_of_range(op, int(bad.reshape(-1).nonzero()[0]), labels, vocab)


def temperatures_positive(op: str, temperature: float | Tensor | None, keep: Tensor) -> None:
    """Raises ValueError for the first bad temperature of the tokens of `keep` [...], where there
    is one per token and data may be looked at.
    """
    if not isinstance(temperature, Tensor) or not may_look(temperature):
        return
    bad = ~((temperature > 0) & temperature.isfinite()) & keep
    if bad.any():
        raise bad_temperature(op, int(bad.reshape(-1).nonzero()[0]), temperature)


def token_data(
    op: str, labels: Tensor, temperature: float | Tensor | None, keep: Tensor, vocab: int
) -> None:
    """`labels_in_range` and `temperatures_positive`."""
    labels_in_range(op, labels, keep, vocab)
    temperatures_positive(op, temperature, keep)


def bad_temperature(op: str, position: int, temperatures: Tensor) -> ValueError:
    """The error for the temperature at flat `position`."""
    value = temperatures.reshape(-1)[position].item()
    return ValueError(
        f"{op}: temperature at flat position {position} must be a finite number > 0, got {value}"
    )


def row_options(
    op: str,
    labels_: object,
    name: str,
    rows: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float = 1.0,
) -> float | Tensor:
    """Requires one label for each row of the argument `name` [..., K], and good options.

    Returns:
        The temperature: a number, or one per token in the shape of the labels, not differentiated.
    """
    labels(op, "labels", labels_)
    column = "V" if name == "logits" else "H"
    same_shape(op, "labels", labels_, f"{name} without {column}", rows.shape[:-1])
    same_device(op, "labels", labels_, name, rows.device)
    if softcap is not None:
        positive(op, "softcap", softcap)
    positive(op, "logit_scale", logit_scale)
    if not isinstance(temperature, Tensor):
        positive(op, "temperature", temperature)
        return temperature
    floating(op, "temperature", temperature, double=True)
    same_device(op, "temperature", temperature, "labels", labels_.device)
    try:
        return temperature.detach().expand(labels_.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature must broadcast to the shape of labels, {tuple(labels_.shape)}, "
            f"got {tuple(temperature.shape)}"
        ) from None


def token_inputs(
    op: str, tokens: dict[str, Tensor | None], mask_: object, cu_seqlens: Tensor | None
) -> None:
    """Requires floating tensors and a mask of one shape: [B, T], or packed [N] with cu_seqlens.

    Args:
        op: operation, for the messages.
        tokens: by name; None is skipped. The first sets shape and device.
        mask_: the argument `mask`.
        cu_seqlens: offsets of packed sequences.
    """
    (like, first), *_ = tokens.items()
    floating(op, like, first, double=True)
    shape, device = first.shape, first.device
    if len(shape) != (2 if cu_seqlens is None else 1):
        expected = "[B, T]" if cu_seqlens is None else "[N], packed as cu_seqlens says,"
        raise ValueError(f"{op}: {like} must be {expected}, got {tuple(shape)}")
    for name, value in tokens.items():
        if value is None or value is first:
            continue
        floating(op, name, value, double=True)
        same_shape(op, name, value, like, shape)
        same_device(op, name, value, like, device)
    mask(op, "mask", mask_)
    same_shape(op, "mask", mask_, like, shape)
    same_device(op, "mask", mask_, like, device)
    if cu_seqlens is not None:
        offsets(op, cu_seqlens, shape[0])
        same_device(op, "cu_seqlens", cu_seqlens, like, device)


def divisor(op: str, value: object) -> tuple[Tensor | None, float]:
    """A normalizer as (0-d tensor or None, number), the number 0 where there is none."""
    if value is None:
        return None, 0.0
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype is torch.bool:
            raise ValueError(
                f"{op}: normalizer must be a number or a 0-d tensor of real numbers, got "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
        return value.detach(), 0.0
    positive(op, "normalizer", value)
    return None, value


def bad_divisor(op: str, value: Tensor) -> ValueError:
    """The error for a normalizer tensor whose value is not a finite number > 0."""
    return ValueError(f"{op}: normalizer must be a finite number > 0, got {value.item()}")


def divisor_positive(op: str, value: Tensor | None) -> None:
    """Raises ValueError for a bad normalizer, where data may be looked at."""
    if value is None or not may_look(value):
        return
    if not 0 < value.item() < math.inf:
        raise bad_divisor(op, value)


def support(op: str, value: object, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Requires (indptr [tokens + 1], indices [nnz]), each int32 or int64; their values are data."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(
            f"{op}: support must be a pair (indptr, indices), got {type(value).__name__}"
        )
    for name, part in zip(("support indptr", "support indices"), value, strict=True):
        labels(op, name, part)
        same_device(op, name, part, "labels", device)
        if part.dim() != 1:
            raise ValueError(f"{op}: {name} must be 1-D, got {tuple(part.shape)}")
    indptr, indices = value
    if indptr.shape[0] != tokens + 1:
        raise ValueError(
            f"{op}: support indptr must have an entry per token and one more, {tokens + 1}, got "
            f"{indptr.shape[0]}"
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
    """The error for the entry of a support's indices at `position`, which its token has already."""
    return ValueError(
        f"{op}: support index at position {position} is {indices[position].item()} again; expected "
        "each word once in a token's support"
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
    """`token_data`, and raises for the first bad entry of a support.

    Raises:
        ValueError: of indptr; a word repeated in a token of `keep` [...].
        IndexError: of the indices of a token of `keep`.
    """
    token_data(op, labels, temperature, keep, vocab)
    if not may_look(indptr):
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
    # Equal pairs of token and word come to lie side by side, the first of them first.
    pair, order = (token[at] * vocab + indices[at]).sort(stable=True)
    repeats = at[order[1:][pair[1:] == pair[:-1]]]
    if repeats.numel():
        raise repeated_index(op, int(repeats.min()), indices)
