"""Checks of the values in tensors, which only the host can make, and the errors for bad ones.

A check does nothing where the host may not read a tensor (`can_read_on_host`): kernels then answer
with NaN. `checks` has those of types, shapes, dtypes and devices.
"""

import math

import torch
from torch import Tensor

from . import env, sequences, temperature_rules, tracing
from .layout import any_of_token


def can_read_on_host(t: Tensor) -> bool:
    """Whether reading `t` on the host is free, or RLHF_KERNELS_CHECK=1 accepts its cost."""
    free = t.device.type == "cpu" or (env.CHECK and not t.is_meta)
    return free and not tracing.active(t)


def out_of_range(op: str, position: int, labels: Tensor, vocab: int) -> IndexError:
    """The error for the label at flat `position`."""
    value = labels.reshape(-1)[position].item()
    return IndexError(
        f"{op}: label at flat position {position} is {value}; expected 0 <= label < {vocab} "
        "or ignore_index"
    )


def labels_in_range(op: str, labels: Tensor, keep: Tensor, vocab: int) -> None:
    """Raises IndexError for the first bad label under `keep` [...], if the host may read labels."""
    if not can_read_on_host(labels):
        return
    bad = ((labels < 0) | (labels >= vocab)) & keep
    if bad.any():
        raise out_of_range(op, int(bad.reshape(-1).nonzero()[0]), labels, vocab)


def bad_temperature(op: str, position: int, temperatures: Tensor) -> ValueError:
    """The error for the temperature at flat `position`."""
    value = temperatures.reshape(-1)[position].item()
    return temperature_rules.error(op, position, value)


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


def kept_tokens(op: str, keep: Tensor, given: int | None) -> None:
    """Raises ValueError if `keep` is true more often than `given`, unless this is None."""
    if given is None or not can_read_on_host(keep):
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


def bad_divisor(op: str, value: Tensor) -> ValueError:
    """The error for a normalizer tensor whose value is not a finite number > 0."""
    return ValueError(f"{op}: normalizer must be a finite number > 0, got {value.item()}")


def divisor_positive(op: str, value: Tensor | None) -> None:
    """Raises ValueError for a bad normalizer tensor, if the host may read it."""
    if value is None or not can_read_on_host(value):
        return
    if not 0 < value.item() < math.inf:
        raise bad_divisor(op, value)


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
