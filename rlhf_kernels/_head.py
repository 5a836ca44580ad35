"""The LM head in chunks of tokens: products by torch's GEMM, rows by a backend's kernels.

A chunk's logits live in one buffer, which its gradient overwrites: memory is bounded by the chunk
whatever the batch. Tokens that nothing depends on are dropped before the product. The operators'
launchers over this are in _head_launchers.py and _head_policy.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Launchers = Mapping[str, Callable[..., object]]
#: torch.empty(shape, dtype=, device=), in the way that suits a backend's large buffers.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
Reduce = Callable[[Tensor], Tensor]

#: Bytes of logits in flight. A GPU wants chunks that fill it; each rereads the fp32 gradient of the
#: weight.
CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
# The GEMM's rows come in multiples of this.
_CHUNK_MULTIPLE = 16
# Rows of a weight gradient that are summed over chunks at a time: their product stays in the cache.
_SUM_ROWS = 1024


def chunk_size(device: torch.device, vocab: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: what the byte budget of the device holds, at least 16."""
    budget = CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES)
    # A shard of a vocabulary may be empty.
    tokens = budget // (max(vocab, 1) * _logits_dtype(device, dtype).itemsize)
    return max(tokens // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)


def _logits_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the GEMM leaves its fp32 sums in: fp32 where the library can from 16-bit operands."""
    return torch.float32 if device.type == "cuda" else dtype


class Chunk(NamedTuple):
    """How many tokens a product takes at most, or, where `exact`, always: see batch_invariant."""

    size: int
    exact: bool

    @classmethod
    def of(cls, chunk: int, device: torch.device, vocab: int, dtype: torch.dtype) -> "Chunk":
        """From an operator's argument: tokens, 0 for the device's budget, negative where exact."""
        return cls(abs(chunk) or chunk_size(device, vocab, dtype), chunk < 0)

    def rows(self, count: int) -> int:
        """Rows of the buffer for `count` tokens."""
        return self.size if self.exact else min(self.size, max(count, 1))


class Tokens(NamedTuple):
    """The tokens that take part: all of them, or those of `index` (flat positions, ascending)."""

    count: int
    index: Tensor | None

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def take(self, t: Tensor | None, part: slice) -> Tensor | None:
        """Rows `part` of the tokens' t [N, ...]."""
        if t is None or self.index is None:
            return None if t is None else t[part]
        return t.index_select(0, self.index[part])

    def put(self, out: Tensor, part: slice, rows: Tensor) -> None:
        """The inverse of `take`."""
        if self.index is None:
            out[part] = rows
        else:
            out.index_copy_(0, self.index[part], rows)


def select(keep: Tensor) -> Tokens:
    """The tokens where `keep` [N]. On a GPU the count is a host synchronisation."""
    index = keep.nonzero().squeeze(-1)
    count = index.shape[0]
    return Tokens(count, None if count == keep.shape[0] else index)


def flat(t: Tensor | None) -> Tensor | None:
    """Per-token [...] as [N]; strided views of two dimensions or more are copied."""
    return None if t is None else t.reshape(-1)


class Head(NamedTuple):
    """A head's operands and the buffers of a chunk: logits, and hidden states where it is exact."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    padded: Tensor | None
    empty: Empty

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk: Chunk,
        count: int,
        empty: Empty,
    ) -> "Head":
        """For `count` of the tokens of hidden [..., H]."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        rows = chunk.rows(count)
        dtype = _logits_dtype(hidden.device, hidden.dtype)
        logits = empty((rows, weight.shape[0]), dtype, hidden.device)
        padded = hidden.new_zeros((rows, hidden.shape[1])) if chunk.exact else None
        return cls(hidden, weight, bias, logits, padded, empty)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of a chunk's hidden states, in the buffer."""
        out = self.logits[: hidden.shape[0]]
        if self.padded is None:
            matmul_into(out, hidden, self.weight.T)
        else:
            self.padded[: hidden.shape[0]] = hidden
            matmul_into(self.logits, self.padded, self.weight.T)
        return out if self.bias is None else out.add_(self.bias)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in fp32 sums; also into fp32 from 16-bit operands, on a GPU."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Gradients:
    """Gradients of a head: hidden per token, weight and bias summed over chunks in fp32.

    `reduce` sums the gradient of hidden, then fp32, over the ranks that share the vocabulary.
    """

    def __init__(
        self, head: Head, hidden: bool, weight: bool, bias: bool, reduce: Reduce | None = None
    ) -> None:
        self._head, self._reduce = head, reduce
        dtype = head.hidden.dtype if reduce is None else torch.float32
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if hidden else None
        self._weight = _Sum(head.weight, head.empty) if weight else None
        self._bias = _Sum(head.bias, head.empty) if bias else None

    def add(self, tokens: Tokens, part: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds a chunk: its hidden states [n, H] and the gradient of its logits [n, V]."""
        grad_logits = grad_logits.to(hidden.dtype)
        if self.hidden is not None:
            dtype = hidden.dtype
            if self._reduce is not None:
                dtype = _logits_dtype(hidden.device, dtype)
            if tokens.index is None and dtype == self.hidden.dtype and self._head.padded is None:
                matmul_into(self.hidden[part], grad_logits, self._head.weight)
            else:
                # Where the chunk is exact, rows after the last token are of an earlier chunk.
                exact = self._head.padded is not None
                g = self._head.logits.to(hidden.dtype) if exact else grad_logits
                rows = hidden.new_empty((g.shape[0], hidden.shape[1]), dtype=dtype)
                matmul_into(rows, g, self._head.weight)
                tokens.put(self.hidden, part, rows[: hidden.shape[0]].to(self.hidden.dtype))
        if self._weight is not None:
            self._weight.add_product(grad_logits, hidden, part.stop == tokens.count)
        if self._bias is not None:
            self._bias.add(grad_logits.sum(0, dtype=torch.float32))

    def results(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) in the dtypes of the operands; empty where not asked for."""
        none = self._head.hidden.new_empty(0)
        if self.hidden is not None and self._reduce is not None:
            self.hidden = self._reduce(self.hidden).to(none.dtype)
        return (
            none if self.hidden is None else self.hidden.view(shape),
            none if self._weight is None else self._weight.result(),
            none if self._bias is None else self._bias.result(),
        )


class _Sum:
    """A sum over chunks in the shape of `like`: in fp32, rounded to its dtype at the end."""

    def __init__(self, like: Tensor, empty: Empty) -> None:
        self._like = like
        self._empty = empty
        self._total: Tensor | None = None
        self._rounded: Tensor | None = None

    def add(self, term: Tensor) -> None:
        self._total = term if self._total is None else self._total.add_(term)

    def add_product(self, a: Tensor, b: Tensor, last: bool) -> None:
        """Adds a.T @ b, of a [n, V] and b [n, H]; `last`: nothing follows."""
        if _logits_dtype(a.device, a.dtype) != torch.float32:
            self._add_rounded(a, b, last)
        elif self._total is None:
            self._total = self._empty(self._like.shape, torch.float32, self._like.device)
            matmul_into(self._total, a.T, b)
        elif a.dtype == torch.float32:
            self._total.addmm_(a.T, b)
        else:
            torch.addmm(self._total, a.T, b, out_dtype=torch.float32, out=self._total)

    def _add_rounded(self, a: Tensor, b: Tensor, last: bool) -> None:
        """Adds a.T @ b where the library rounds a product to 16 bits.

        One or two products need no fp32 sum: an addition in 16 bits rounds once. (b.T @ a).T: the
        CPU's matrix units take half the time where neither operand is transposed, and the blocks
        that are turned round instead stay in the cache.
        """
        like, b_t = self._like, b.T.contiguous()
        fresh, first = self._rounded is None, self._total is None
        if fresh:
            self._rounded = self._empty(like.shape, like.dtype, like.device)
        elif first and not last:
            self._total = self._empty(like.shape, torch.float32, like.device)
        for start in range(0, like.shape[0], _SUM_ROWS):
            rows = slice(start, start + _SUM_ROWS)
            rounded = self._rounded[rows]
            term = (b_t @ a[:, rows]).T
            if fresh:
                rounded.copy_(term)
                continue
            term = term.contiguous()
            if self._total is None:
                rounded += term
                continue
            total = self._total[rows]
            if first:
                total.copy_(rounded)
            total += term
            if last:
                rounded.copy_(total)

    def result(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        if self._rounded is not None:
            return self._rounded
        if self._total is None:
            return torch.zeros_like(self._like)
        return self._total.to(self._like.dtype)


def plain_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
