"""Rotates inputs so that a CPU's caches do not hold them: each call gets another copy."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Limits of all copies together. They have twice the size of the last-level cache, because not every
# provider reads every input. Many copies of small inputs are useless: their cost is overhead.
MOST_BYTES, MOST_COPIES = 1 << 30, 1024
# The assumed cache size if the system does not report it.
USUAL_CACHE = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Operands(NamedTuple):
    """The inputs of a provider, and the gradients of its outputs."""

    inputs: tuple[Any, ...]
    upstream: tuple[Tensor, ...]


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The bytes of the largest cache that the system reports."""
    sizes = (re.fullmatch(r"(\d+)([KMG])\n?", f.read_text()) for f in folder.glob("index*/size"))
    return max((int(s[1]) * _UNITS[s[2]] for s in sizes if s), default=USUAL_CACHE)


def copies(size: int, cache: int) -> int:
    """How many copies of `size` bytes exceed a cache; 1 if two copies are too large."""
    size = max(1, size)
    return max(1, min(max(2, 2 * cache // size + 1), MOST_BYTES // size, MOST_COPIES))


def _flat(t: Tensor) -> Tensor:
    """The memory that a tensor spans as a 1-d view; elements may overlap or leave gaps."""
    steps = (n - 1 for n in t.size())
    span = 1 + sum(n * s for n, s in zip(steps, t.stride(), strict=True)) if t.numel() else 0
    return t.detach().as_strided((span,), (1,))


def duplicate(x: Any) -> Any:
    """A copy of a tensor with the same strides; other values are returned unchanged."""
    if not isinstance(x, Tensor):
        return x
    result = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    _flat(result).copy_(_flat(x))
    return result.requires_grad_(x.requires_grad)


def rotated(operands: Operands, cache: int) -> Iterator[Operands]:
    """Iterates endlessly over `operands` and copies of them."""
    size = sum(_flat(t).nbytes for group in operands for t in group if isinstance(t, Tensor))

    def copy() -> Operands:
        return Operands(*(tuple(map(duplicate, group)) for group in operands))

    more = copies(size, cache) - 1
    return itertools.cycle([operands, *(copy() for _ in range(more))])


def chunks(size: int, cache: int) -> tuple[Tensor, Iterator[Tensor]]:
    """A float buffer larger than a cache, and an endless iterator over its parts of `size`."""
    elements = max(1, size // 4)
    whole = torch.ones(elements * copies(4 * elements, cache))
    return whole, itertools.cycle(whole.split(elements))
