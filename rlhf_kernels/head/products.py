"""The products of a head by torch's GEMM: logits from hidden states, in fp32 sums."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import Empty
from . import devices
from .arguments import Operands
from .chunks import Chunk, Tokens, logits_dtype

# Rows of an fp16 weight that are widened at a time.
_WIDE_ROWS = 1024
# Whether torch.mm and torch.addmm take out_dtype: from torch 2.8 on.
_MIXED_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
# Below this exponent of two scaled gradients stay: fp16 ends at 2^16.
_FP16_EXPONENT = 15


class Head(NamedTuple):
    """A head's operands and the buffers of a tile: logits, and hidden states where it is exact."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    padded: Tensor | None
    empty: Empty

    @classmethod
    def of(cls, operands: Operands, chunk: Chunk, count: int, empty: Empty) -> "Head":
        """For `count` of the tokens of hidden [..., H]."""
        hidden, weight, bias = operands
        hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        rows = chunk.rows(count)
        dtype = logits_dtype(weight.device, weight.dtype)
        logits = empty((rows * min(chunk.columns, weight.shape[0]),), dtype, hidden.device)
        padded = weight.new_zeros((rows, hidden.shape[1])) if chunk.exact else None
        return cls(hidden, weight, bias, logits, padded, empty)

    @property
    def operands(self) -> Operands:
        """The operands, hidden as [N, H]."""
        return Operands(self.hidden, self.weight, self.bias)

    def states(self, tokens: Tokens, part: slice) -> Tensor:
        """A chunk's hidden states as the product takes them: upcast to an fp32 weight's dtype.

        Those of dropped tokens are zero.
        """
        return tokens.of_kept(tokens.take(self.hidden, part).to(self.weight.dtype), part)

    def project(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """Logits [n, columns] of a tile's hidden states, in the buffer."""
        count, weight = hidden.shape[0], self.weight[columns]
        if self.padded is not None:
            self.padded[:count] = hidden
            hidden = self.padded
        out = self.grid(hidden.shape[0], weight.shape[0])
        if widens(weight):
            wide = hidden.float()
            for rows in blocks(weight.shape[0], _WIDE_ROWS):
                torch.mm(wide, weight[rows].float().T, out=out[:, rows])
        else:
            matmul_into(out, hidden, weight.T)
        out = out[:count]
        return out if self.bias is None else out.add_(self.bias[columns])

    def grid(self, rows: int, columns: int) -> Tensor:
        """The buffer as [rows, columns]."""
        return self.logits[: rows * columns].view(rows, columns)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in fp32 sums; also into fp32 from 16-bit operands, on a GPU.

    Before torch 2.8 such a product needs operands in fp32: those of b are made in blocks.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not _MIXED_PRODUCTS:
        wide = a.float()
        for columns in blocks(b.shape[1], _WIDE_ROWS):
            part = out[:, columns]
            torch.addmm(part, wide, b[:, columns].float(), beta=float(add), out=part)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def widens(t: Tensor) -> bool:
    """Whether products take this operand in fp32."""
    return t.dtype == torch.float16 and not devices.mixes(t.device)


def blocks(size: int, most: int) -> Iterator[slice]:
    for start in range(0, size, most):
        yield slice(start, min(start + most, size))


def add_product(out: Tensor, g: Tensor, weight: Tensor) -> None:
    """out += g @ weight in fp32, out and g being that."""
    if not widens(weight):
        out.addmm_(g, weight)
        return
    for rows in blocks(weight.shape[0], _WIDE_ROWS):
        out.addmm_(g[:, rows], weight[rows].float())


def in_fp16(g: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(fp16, unit) with g [n, columns] = fp16 * unit: powers of two that use fp16's range.

    A loss is scaled so that gradients stay in that range; they are taken before this scale is
    known. One unit for all, dims (0, 1), or one per token, dims (1,), whose bits then depend on no
    other token.
    """
    if g.numel() == 0:
        return g.half(), g.new_ones((1, 1))
    top = torch.maximum(g.amax(dims, keepdim=True), -g.amin(dims, keepdim=True))
    exponent = (_FP16_EXPONENT - torch.frexp(top).exponent).clamp(-100, 100)
    one = torch.ones_like(top)
    scaled = torch.empty_like(g, dtype=torch.float16)
    torch.mul(g, torch.ldexp(one, exponent), out=scaled)
    return scaled, torch.ldexp(one, -exponent)
