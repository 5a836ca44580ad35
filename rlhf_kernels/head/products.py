"""A head's operands, and the logits of a tile of tokens."""

from typing import NamedTuple

from torch import Tensor

from ..core.layout import Memory
from . import gemm
from .arguments import Operands
from .chunks import Chunk, Tokens, logits_dtype


class TiledHead(NamedTuple):
    """A head's operands and the buffers of a tile: logits, and hidden states where it is exact."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    padded: Tensor | None
    memory: Memory

    @classmethod
    def of(cls, operands: Operands, chunk: Chunk, count: int, memory: Memory) -> "TiledHead":
        """For `count` of the tokens of hidden [..., H]."""
        hidden, weight, bias = operands
        hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        rows = chunk.rows(count)
        dtype = logits_dtype(weight.device, weight.dtype)
        logits = memory.empty((rows * min(chunk.columns, weight.shape[0]),), dtype, hidden.device)
        padded = weight.new_zeros((rows, hidden.shape[1])) if chunk.exact else None
        return cls(hidden, weight, bias, logits, padded, memory)

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
        gemm.logits_into(out, hidden, weight)
        out = out[:count]
        return out if self.bias is None else out.add_(self.bias[columns])

    def grid(self, rows: int, columns: int) -> Tensor:
        """The buffer as [rows, columns]."""
        return self.logits[: rows * columns].view(rows, columns)
