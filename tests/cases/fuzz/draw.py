"""Random values of a case; and the case: a call, and how its results are checked."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes around vectors, unrolled steps, blocks and tiles of the kernels.
EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
FAR_EDGES = (511, 513, 1023, 1024, 1025, 2047, 2049, 4096, 4099, 8200)
# The largest size that an interpreted kernel can process in a second.
INTERPRETED_MOST = 140
INVARIANT = "batch_invariant"
# Computes bounds of (results..., gradients...) from exact results and upstream gradients.
Bounds = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclasses.dataclass
class Case:
    """A call: name of the operation, keyword arguments, and the bounds of its results."""

    op: str
    arguments: dict[str, Any]
    draw: "Draw"
    bounds: Bounds | None = None
    # A result that is a sum with this argument; the sum rounds even if its terms cancel.
    beside: tuple[int, str] | None = None

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                grad = " grad" if value.requires_grad else ""
                return f"{kind}{list(value.shape)} strides {list(value.stride())}{grad}"
            if isinstance(value, tuple):
                return f"({', '.join(map(shown, value))})"
            if isinstance(value, rk.PolicyLossConfig):
                fields = dataclasses.fields(value)
                set_here = [f.name for f in fields if getattr(value, f.name) != f.default]
                return f"Config({', '.join(f'{n}={getattr(value, n)!r}' for n in set_here)})"
            return repr(value)

        return f"{self.op}({', '.join(f'{k}={shown(v)}' for k, v in self.arguments.items())})"


class Draw:
    """Random values of a case."""

    def __init__(self, seed: int, interpreted: bool) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self._interpreted = interpreted
        self.expanded_upstream = self.chance(0.3)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int = 1 << 30, least: int = 0) -> int:
        most = min(most, INTERPRETED_MOST) if self._interpreted else most
        sizes = [s for s in EDGES + FAR_EDGES * self.chance(0.3) if least <= s <= most]
        return self.pick(self.pick(*sizes), self.random.randint(least, min(most, 70)))

    def dtype(self) -> torch.dtype:
        return self.pick(torch.float32, *DTYPES)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = (self.normal(*shape) * scale).to(dtype or self.dtype())
        return self.laid_out(values, expand=True)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, max(high, low + 1), shape, generator=self.torch)
        return self.laid_out(values.to(self.pick(torch.int64, torch.int32)))

    def wanted(self, t: Tensor, p: float = 0.8) -> Tensor:
        return t.requires_grad_() if self.chance(p) else t

    def laid_out(self, t: Tensor, expand: bool = False) -> Tensor:
        """The same values with other strides, surrounded by values that kernels must not read.

        With `expand`, one slice may be expanded along a dimension in place of all values.
        """
        if t.dim() == 0 or self.chance(0.4):
            return t
        way = self.pick("offset", "transposed", "wider", "every second", "expanded")
        junk = torch.nan if t.is_floating_point() else 1
        if way == "transposed" and t.dim() > 1:
            a, b = self.random.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if way == "expanded":
            at = self.random.randrange(t.dim())
            if expand and t.shape[at] > 1 and self.chance(0.5):
                return t.narrow(at, 0, 1).expand(t.shape)
            return t
        if way == "wider":
            at = self.random.randrange(t.dim())
            shape = list(t.shape)
            before, after = self.random.randint(0, 3), self.random.randint(0, 3)
            shape[at] += before + after
            out = torch.full(shape, junk, dtype=t.dtype).narrow(at, before, t.shape[at])
        elif way == "every second":
            out = torch.full((*t.shape, 2), junk, dtype=t.dtype)[..., self.random.randint(0, 1)]
        else:
            start = self.random.randint(1, 5)
            flat = torch.full((t.numel() + start,), junk, dtype=t.dtype)
            out = flat[start:].view(t.shape)
        return out.copy_(t)

    def mask(self, shape: Sequence[int], p: float | None = None) -> Tensor:
        """A bool or integer mask; sometimes of nothing, everything or without whole sequences."""
        keep = torch.rand(tuple(shape), generator=self.torch) < (p or self.pick(0.0, 0.5, 0.9, 1.1))
        if len(shape) > 1 and shape[0] > 1 and self.chance(0.3):
            keep[self.random.randrange(shape[0])] = False
        dtype = self.pick(torch.bool, torch.bool, torch.int64, torch.int32, torch.uint8)
        return self.laid_out(keep if dtype is torch.bool else keep.to(dtype) * 3)

    def hidden(self, t: Tensor, mask: Tensor | None) -> Tensor:
        """t with NaN or an infinity where the mask is 0."""
        if mask is None or t.numel() == 0 or self.chance(0.5):
            return t
        # In expanded memory one value belongs to several tokens.
        t = t.clone() if 0 in t.stride() else t
        junk = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(t.dtype)
        t[mask == 0] = junk[self.random.randrange(3)]
        return t

    def tokens(self) -> tuple[tuple[int, ...], Tensor | None, int]:
        """(shape, cu_seqlens, sequences) of values per token: padded or packed."""
        if self.chance(0.5):
            rows = self.size(20)
            return (rows, self.size(20_000 // max(rows, 1))), None, rows
        lengths = [self.size(3000) for _ in range(self.random.randint(1, 12))]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(self.pick(torch.int32, torch.int64))
        return (int(offsets[-1]),), self.laid_out(offsets), len(lengths)
