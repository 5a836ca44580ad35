"""Gradients of a head's operands: summed over tiles in fp32, rounded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.layout import Memory
from ..kernels.rows import Reduce
from .chunks import Chunk, Tile, Tokens, gradient_dtype, logits_dtype
from .gemm import blocks, hidden_into, in_fp16, matmul_into, weight_into, widens
from .products import TiledHead

# Rows of a weight gradient that are summed over chunks at a time: their product stays in the cache.
_SUM_ROWS = 1024
# Rows and elements of the gradient of hidden that are added to a sum over columns at a time, at
# least: fewer would slow the product down, and each takes memory of its own.
_HIDDEN_ROWS, _HIDDEN_ELEMENTS = 1024, 2**20
# Rows of an fp16 weight whose scaled gradient is added at a time.
_SCALED_ROWS = 16384


class Gradients:
    """Gradients of a head: hidden per token, weight and bias summed over tiles in fp32.

    `reduce` sums the gradient of hidden, then fp32, over the ranks that share the vocabulary. Those
    of fp16 operands are fp32 to the end.
    """

    def __init__(
        self, head: TiledHead, needs: Sequence[bool], reduce: Reduce | None = None
    ) -> None:
        hidden, weight, bias = needs
        self._head, self._reduce = head, reduce
        wide = reduce is not None or head.hidden.dtype == torch.float16
        dtype = torch.float32 if wide else head.hidden.dtype
        # Contiguous like every gradient here, whatever the strides of the operand.
        self.hidden = head.hidden.new_zeros(head.hidden.shape, dtype=dtype) if hidden else None
        # The gradient of a tile's logits, if it needs a buffer of its own.
        self._of_logits: Tensor | None = None
        # The gradient of a tile's hidden states, summed over the columns so far.
        self._of_tokens: Tensor
        self._weight = _Sum(head.weight, head.memory) if weight else None
        self._bias: Tensor | None = None
        if bias and head.bias is not None:
            self._bias = head.bias.new_zeros(head.bias.shape, dtype=torch.float32)

    def of_logits(self, logits: Tensor) -> Tensor:
        """Where the gradient of a tile's logits goes, [n, columns]: in their place if it may.

        Products of 16-bit operands take it in 16 bits, from logits that are fp32.
        """
        dtype = gradient_dtype(self._head.weight.dtype)
        if logits.dtype == dtype:
            return logits
        if self._of_logits is None:
            buffer = self._head.logits
            self._of_logits = self._head.memory.empty(tuple(buffer.shape), dtype, buffer.device)
        return self._of_logits[: logits.numel()].view(logits.shape)

    def _padded(self, g: Tensor) -> Tensor:
        """The gradient of a tile's logits with the rows of an exact product, some of no token."""
        head = self._head
        if head.padded is None:
            return g
        # Rows after the last token are of an earlier chunk.
        rows, columns = head.padded.shape[0], g.shape[1]
        memory = head.logits if g.dtype == head.logits.dtype else self._of_logits
        assert memory is not None
        return memory[: rows * columns].view(rows, columns)

    def sweep(
        self, tokens: Tokens, chunk: Chunk, backward: Callable[[Tensor, Tensor, Tile], None]
    ) -> None:
        """Adds all `tokens`; `backward` is given where the gradient of a tile's logits goes."""
        for tile in tokens.tiles(chunk, self._head.weight.shape[0]):
            if tile.columns.start == 0:
                states = self._head.states(tokens, tile.tokens)
            logits = self._head.project(states, tile.columns)
            out = self.of_logits(logits)
            backward(out, logits, tile)
            self.add(tokens, tile, states, out)

    def add(self, tokens: Tokens, tile: Tile, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds a tile: its hidden states [n, H] and the gradient of its logits [n, columns]."""
        if self.hidden is not None:
            if grad_logits.shape[1] == self._head.weight.shape[0]:
                self._add_hidden(self.hidden, tokens, tile.tokens, grad_logits)
            else:
                self._add_hidden_of_columns(self.hidden, tokens, tile, grad_logits)
        if self._weight is not None:
            self._weight.add_product(grad_logits, hidden, tile)
        if self._bias is not None:
            self._bias[tile.columns] += grad_logits.sum(0, dtype=torch.float32)

    def _add_hidden(self, out: Tensor, tokens: Tokens, part: slice, g: Tensor) -> None:
        head, count, dtype = self._head, g.shape[0], g.dtype
        if head.weight.dtype == torch.float16:
            self._add_hidden_fp16(out, tokens, part, g)
            return
        if self._reduce is not None:
            dtype = logits_dtype(g.device, dtype)
        if tokens.index is None and dtype == out.dtype and head.padded is None:
            hidden_into(out[part], g, head.weight)
            return
        g = self._padded(g)
        rows = g.new_empty((g.shape[0], head.weight.shape[1]), dtype=dtype)
        hidden_into(rows, g, head.weight, exact=head.padded is not None)
        tokens.put(out, part, rows[:count].to(out.dtype))

    def _add_hidden_fp16(self, out: Tensor, tokens: Tokens, part: slice, g: Tensor) -> None:
        head, count = self._head, g.shape[0]
        g = self._padded(g)
        rows = g.new_empty((g.shape[0], head.weight.shape[1]))
        if widens(head.weight):
            hidden_into(rows, g, head.weight)
        else:
            g, unit = in_fp16(g, (1,))
            matmul_into(rows, g, head.weight)
            rows *= unit
        tokens.put(out, part, rows[:count])

    def _add_hidden_of_columns(self, out: Tensor, tokens: Tokens, tile: Tile, g: Tensor) -> None:
        """Sums over the tiles of some tokens in fp32; rounds with the last of the columns."""
        weight = self._head.weight
        in_place = tokens.index is None and out.dtype == torch.float32
        if tile.columns.start == 0:
            self._of_tokens = (
                out[tile.tokens]
                if in_place
                else g.new_zeros((g.shape[0], weight.shape[1]), dtype=torch.float32)
            )
        if g.dtype == torch.float32:
            hidden_into(self._of_tokens, g, weight[tile.columns], add=True)
        else:
            for rows in blocks(g.shape[0], max(_HIDDEN_ROWS, _HIDDEN_ELEMENTS // weight.shape[1])):
                term = g.new_empty((g[rows].shape[0], weight.shape[1]))
                hidden_into(term, g[rows], weight[tile.columns])
                self._of_tokens[rows] += term
        if tile.columns.stop == weight.shape[0] and not in_place:
            tokens.put(out, tile.tokens, self._of_tokens)

    def results(self, shape: torch.Size, late: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) in the dtypes of the operands; empty where not asked for.

        With `late` fp32 for operands in fp16: they are rounded when they have been scaled.
        """
        like, bias = self._head.hidden, self._head.bias
        if self.hidden is not None and self._reduce is not None:
            self.hidden = self._reduce(self.hidden)

        def finished(t: Tensor, operand: Tensor) -> Tensor:
            return t if late and operand.dtype == torch.float16 else t.to(operand.dtype)

        # An operator's results must not share memory, empty ones neither.
        none = (like.new_empty(0) for _ in range(3))
        return (
            next(none) if self.hidden is None else finished(self.hidden.view(shape), like),
            next(none)
            if self._weight is None
            else finished(self._weight.result(), self._head.weight),
            next(none) if self._bias is None or bias is None else finished(self._bias, bias),
        )


class _Sum:
    """The gradient of a weight, summed over tokens: in fp32, rounded at the end."""

    def __init__(self, like: Tensor, memory: Memory) -> None:
        self._like = like
        self._memory = memory
        self._total: Tensor | None = None
        self._rounded: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b, of a tile's a [n, columns] and b [n, H]."""
        if logits_dtype(a.device, a.dtype) != torch.float32:
            self._add_rounded(a, b, tile)
            return
        if a.dtype != torch.float32 and tile.step == 0 and tile.is_last:
            # Nothing to add: the product's own fp32 sums are rounded once.
            if self._rounded is None:
                self._rounded = self._memory.empty(
                    self._like.shape, self._like.dtype, self._like.device
                )
            matmul_into(self._rounded[tile.columns], a.T, b)
            return
        if self._total is None:
            self._total = self._memory.empty(self._like.shape, torch.float32, self._like.device)
        total = self._total[tile.columns]
        if self._like.dtype == torch.float16:
            self._add_fp16(total, a, b, tile)
        elif tile.step == 0:
            matmul_into(total, a.T, b)
        else:
            matmul_into(total, a.T, b, add=True)

    @staticmethod
    def _add_fp16(total: Tensor, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b, of fp32 a and fp16 b."""
        if widens(b):
            b = b.float()
            torch.addmm(total, a.T, b, beta=float(tile.step > 0), out=total)
            return
        a, unit = in_fp16(a, (0, 1))
        for rows in blocks(total.shape[0], _SCALED_ROWS):
            term = torch.empty_like(total[rows])
            matmul_into(term, a[:, rows].T, b)
            term.mul_(unit)
            if tile.step == 0:
                total[rows] = term
            else:
                total[rows] += term

    def _add_rounded(self, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b where the library rounds a product to 16 bits.

        One or two products need no fp32 sum: an addition in 16 bits rounds once.
        """
        like, columns = self._like, tile.columns
        if self._rounded is None:
            self._rounded = self._memory.empty(like.shape, like.dtype, like.device)
        elif self._total is None and tile.step == 1 and not tile.is_last:
            self._total = self._memory.empty(like.shape, torch.float32, like.device)
        if self._total is None:
            weight_into(self._rounded[columns], a, b, self._memory, add=tile.step > 0)
            return
        for start in range(columns.start, columns.stop, _SUM_ROWS):
            rows = slice(start, min(start + _SUM_ROWS, columns.stop))
            rounded, total = self._rounded[rows], self._total[rows]
            part = a[:, rows.start - columns.start : rows.stop - columns.start]
            term = torch.empty_like(rounded)
            weight_into(term, part, b, self._memory)
            if tile.step == 1:
                total.copy_(rounded)
            total += term
            if tile.is_last:
                rounded.copy_(total)

    def result(self) -> Tensor:
        """The sum, in fp32 or rounded; zeros if nothing was added."""
        if self._rounded is not None:
            return self._rounded
        if self._total is None:
            return self._like.new_zeros(self._like.shape, dtype=torch.float32)
        return self._total
