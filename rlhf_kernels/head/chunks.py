"""Chunks of tokens, and tiles of tokens and columns, in which a head's logits are computed.

A chunk's logits live in one buffer, which its gradient overwrites: memory is bounded by the chunk
whatever the batch. Tokens that nothing depends on are dropped before the product. On a CPU blocks
of the vocabulary take the place of chunks of tokens, but where the gradient comes with the logits.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import MaybeTensor
from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED
from . import devices
from .arguments import Batching

#: Bytes of logits in flight on a CPU. A backward pass counts what its products need beside them,
#: but leaves a quarter to the logits. Blocks of columns take a quarter where that is enough: a
#: cache holds them, and the pages of a new buffer cost as much as its row kernels (two threads,
#: bfloat16, backward of 1024 tokens of Qwen3's head 603 ms, with a quarter 532).
CPU_CHUNK_BYTES = 128 * 2**20
#: On a GPU bytes of logits and of their gradient where it has memory of its own, and the most
#: tokens. Chunks must fill the GPU, and each rereads the fp32 gradient of the weight: with 4096
#: tokens that is a twentieth of the time of its products.
GPU_CHUNK_BYTES, GPU_CHUNK_TOKENS = 4 * 2**30, 4096
# The GEMM's rows come in multiples of this; its columns, where they are part of a vocabulary.
_CHUNK_MULTIPLE, _COLUMNS_MULTIPLE = 16, 64
# What a backward pass in 16 bits takes on a CPU whatever the tokens: oneDNN's memory for a product
# (torch 2.13) and the terms of sums.
_WORKSPACE_BYTES = 14 * 2**20
# More tokens make no product faster.
_EXACT_TOKENS = 8192
# The largest number of tokens of a chunk that takes blocks of columns: more would leave the budget
# too few columns at a time.
_BLOCK_TOKENS = 32768
# With fewer columns at a time the products of a backward pass slow down.
_BACKWARD_COLUMNS = 4096
# Labels of a token, all of which every block looks at, for which blocks are small: 2048 fp32 tokens
# of a vocabulary of 151936 take 0.47 s in blocks and 0.52 s in whole rows with 16 labels each, 0.86
# and 0.54 with 128, 11.6 and 1.0 with 2048.
_BLOCK_LABELS = 32
# Columns of a row that are reduced at a time on a CPU: always so many, so that its bits depend on
# its products and the vocabulary alone. Two threads, ms of the forward pass with 4096, 8192, 16384
# and 32768: SmolLM2's head, 2048 bfloat16 tokens 69, 60, 66, 75; Gemma 3's, 512 197, 190, 191, 188;
# 4096 fp32 tokens, 1024 x 32768 803, 846, 932, 1093.
_REDUCED_COLUMNS = 8192


def chunk_size(device: torch.device, vocab: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: what the byte budget of the device holds, at least 16."""
    # A shard of a vocabulary may be empty.
    columns, logits = max(vocab, 1), logits_dtype(device, dtype)
    if devices.is_cpu(device):
        tokens = CPU_CHUNK_BYTES // (columns * logits.itemsize)
    else:
        own = gradient_dtype(dtype)
        size = logits.itemsize + (0 if own == logits else own.itemsize)
        tokens = min(GPU_CHUNK_BYTES // (columns * size), GPU_CHUNK_TOKENS)
    return max(tokens // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)


def exact_size(
    chunk_tokens: int | None, device: torch.device, vocab: int, dtype: torch.dtype
) -> int:
    """Tokens of every product of `batch_invariant`: however few there are, all are multiplied.

    As many as asked for, or as the budget holds, but no more than speed a product up, nor 16 times
    the budget.
    """
    budget = chunk_size(device, vocab, dtype)
    return min(chunk_tokens or budget, _EXACT_TOKENS, 16 * budget)


def logits_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logits that a product of operands of `dtype` gives.

    It is fp32 where the library can give that from 16-bit operands. For fp16 it always is, because
    gradients leave the range of fp16. The operands are then widened to fp32, which CPUs without
    fp16 arithmetic multiply many times as fast.
    """
    return torch.float32 if devices.mixes(device) or dtype == torch.float16 else dtype


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to which the gradient of logits is rounded: that of the operands of its products.

    Those of fp16 operands stay fp32 until they are scaled.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _bytes_beside(dtype: torch.dtype, selected: bool) -> int:
    """Bytes per hidden state's element that a block of a backward pass needs beside its logits.

    `selected`: not all tokens take part, so that their states and the sum of their gradients are
    copies. Gradients in 16 bits are summed in fp32, and multiply turned states; the states of an
    fp16 head are widened.
    """
    states = dtype.itemsize if selected else 0
    if dtype == torch.bfloat16:
        return states + 4 + 2
    return states + (4 if selected else 0) + (4 if dtype == torch.float16 else 0)


def _whole_columns(columns: int) -> int:
    """So many columns or fewer, as a product takes them."""
    return max(columns // _COLUMNS_MULTIPLE, 1) * _COLUMNS_MULTIPLE


class Chunk(NamedTuple):
    """Tokens and columns of a product: at most, or, where `exact`, always that many tokens.

    reduced: columns of a row that a row kernel of log-probabilities takes at a time; their results
        are merged. None for all.
    """

    size: int
    columns: int
    exact: bool
    reduced: int | None = None

    @classmethod
    def of(cls, batching: Batching, weight: Tensor, heads: int = 1) -> "Chunk":
        """Some tokens, all columns.

        Args:
            batching: how many, or the device's budget.
            weight: [V, H].
            heads: buffers that share the budget.
        """
        vocab = weight.shape[0]
        size = batching.tokens or chunk_size(weight.device, heads * vocab, weight.dtype)
        by_blocks = batching.tokens is None and devices.is_cpu(weight.device)
        reduced = _REDUCED_COLUMNS if by_blocks else None
        return cls(size, max(vocab, 1), batching.exact, reduced)

    @classmethod
    def forward(
        cls, batching: Batching, weight: Tensor, count: int, heads: int = 1, labels: int = 1
    ) -> "Chunk":
        """For results of `count` tokens without gradients; arguments as in `of`.

        labels: of each token. Every block looks at all of them; with many, rows are reduced whole.

        On a CPU, if the logits of all are more than a quarter of the budget, a chunk is many tokens
        by a block of columns: the more tokens, the less often is the weight read.
        """
        whole = cls.of(batching, weight, heads)
        if labels > _BLOCK_LABELS:
            return whole._replace(reduced=None)
        size = heads * logits_dtype(weight.device, weight.dtype).itemsize
        memory = CPU_CHUNK_BYTES // 4
        if whole.reduced is None or count * whole.columns * size <= memory:
            return whole
        rows = memory // (size * min(whole.columns, whole.reduced))
        rows = min(count, max(rows, _CHUNK_MULTIPLE))
        columns = max(memory // (size * rows * whole.reduced), 1) * whole.reduced
        return whole._replace(size=rows, columns=min(columns, whole.columns))

    @classmethod
    def backward(
        cls,
        batching: Batching,
        weight: Tensor,
        tokens: "Tokens",
        heads: int = 1,
        labels: int = 1,
    ) -> "Chunk":
        """For gradients of `tokens` whose statistics are known; arguments as in `forward`.

        On a CPU, if the logits of all are more than a quarter of the budget and the vocabulary is
        larger than the number of tokens that it holds, a chunk is many tokens by a block of
        columns. One product then gives a block of the weight's gradient, and only the smaller
        gradient of hidden is summed over blocks, in fp32.
        """
        whole = cls.of(batching, weight, heads)
        rows = min(tokens.count, _BLOCK_TOKENS)
        size = heads * logits_dtype(weight.device, weight.dtype).itemsize
        least = CPU_CHUNK_BYTES // 4
        if (
            whole.reduced is None
            or whole.size >= whole.columns
            or tokens.count * whole.columns * size <= least
        ):
            return whole
        beside = rows * weight.shape[1] * _bytes_beside(weight.dtype, tokens.index is not None)
        if weight.dtype == torch.bfloat16:
            beside += _WORKSPACE_BYTES
        memory = CPU_CHUNK_BYTES - beside
        if labels <= _BLOCK_LABELS:
            memory = min(memory, rows * size * _BACKWARD_COLUMNS)
        return cls(rows, _whole_columns(max(memory, least) // (rows * size)), False)

    def rows(self, count: int) -> int:
        """Rows of the buffer for `count` tokens."""
        return self.size if self.exact else min(self.size, max(count, 1))


def prefer_recompute(batching: Batching, weight: Tensor, count: int, heads: int = 1) -> bool:
    """Whether a gradient of the weight, summed over chunks, costs more than a product again.

    A sum of more than two 16-bit products is kept in fp32, as large as the weight twice.
    """
    return (
        batching.tokens is None
        and devices.is_cpu(weight.device)
        and logits_dtype(weight.device, weight.dtype) != torch.float32
        and count > 2 * Chunk.of(batching, weight, heads).size
    )


class Tile(NamedTuple):
    """Tokens and columns whose logits are in the buffer together.

    step counts the tiles along the tokens; `is_last`: no tokens follow.
    """

    tokens: slice
    columns: slice
    step: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens that take part: all of them, or those of `index` (flat positions).

    dropped: bool [count], which of them only fill a number that the caller gave: they have no
    result and no gradient. None where there are none.
    """

    count: int
    index: Tensor | None
    dropped: Tensor | None = None

    @property
    def whole(self) -> slice:
        return slice(0, self.count)

    def fill(self, chunk: Chunk) -> bool:
        """Whether one chunk has all tokens of the operation: its results are the operation's."""
        return self.index is None and 0 < self.count <= chunk.size

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def tiles(self, chunk: Chunk, vocab: int) -> Iterator[Tile]:
        for step, part in enumerate(self.chunks(chunk.size)):
            # Once where a shard has no columns: its rank still takes part.
            for start in range(0, max(vocab, 1), chunk.columns):
                columns = slice(start, min(start + chunk.columns, vocab))
                yield Tile(part, columns, step, part.stop == self.count)

    def take(self, t: MaybeTensor, part: slice) -> MaybeTensor:
        """Rows `part` of the tokens' t [N, ...]."""
        if t is None or self.index is None:
            return None if t is None else t[part]
        return t.index_select(0, self.index[part])

    def put(self, out: Tensor, part: slice, rows: Tensor) -> None:
        """The inverse of `take`; rounds to the dtype of `out`."""
        if self.index is None:
            out[part] = rows
        else:
            out.index_copy_(0, self.index[part], rows.to(out.dtype))

    def kept(self, part: slice, device: torch.device) -> Tensor:
        """Which tokens of `part` are not dropped, bool."""
        if self.dropped is None:
            return torch.ones(part.stop - part.start, dtype=torch.bool, device=device)
        return ~self.dropped[part]

    def dropped_of(self, part: slice) -> Tensor | None:
        """Which tokens of `part` are dropped, bool; None where none is."""
        return None if self.dropped is None else self.dropped[part]

    def of_kept(self, rows: Tensor, part: slice) -> Tensor:
        """Rows `part` [n, ...], zero where the token is dropped."""
        if self.dropped is None:
            return rows
        dropped = self.dropped[part]
        return rows.masked_fill(dropped.view(-1, *[1] * (rows.dim() - 1)), 0)


def select(keep: Tensor, at_most: int | None = None) -> Tokens:
    """The tokens where `keep` [N].

    Args:
        keep: bool.
        at_most: the number of them or more; so many tokens are then taken, whatever `keep` says.
            For 0 it is one, so that a wrong bound has a token whose gradient shows it.
            None: they are counted, which on a GPU is a host synchronisation.
    """
    size = keep.shape[0]
    if at_most is None:
        index = keep.nonzero().squeeze(-1)
        count = index.shape[0]
        return Tokens(count, None if count == size else index)
    at_most = max(at_most, 1)
    if at_most >= size:
        return Tokens(size, None, ~keep)
    # Those to keep come first, in order.
    index = torch.argsort((~keep).to(torch.uint8), stable=True)[:at_most]
    return Tokens(at_most, index, ~keep.index_select(0, index))


def split(keep: Tensor, idle: Tensor, number: Tensor | None) -> tuple[Tokens, Tokens, int]:
    """Busy tokens (`keep` [N] without `idle` [N]), idle ones (both), and `number` as an int.

    One host synchronisation reads all three. `number` is int64 [], or None, which gives 0.
    """
    busy, rest = keep & ~idle, keep & idle
    if devices.is_cpu(keep.device):
        return select(busy), select(rest), 0 if number is None else int(number)
    # Three groups, each in order.
    order = torch.argsort(2 - busy.to(torch.uint8) - keep.to(torch.uint8), stable=True)
    counts = [busy.sum(), keep.sum()] + ([] if number is None else [number])
    first, both, *given = torch.stack(counts).tolist()
    size = keep.shape[0]
    busy_index = None if first == size else order[:first]
    return Tokens(first, busy_index), Tokens(both - first, order[first:both]), sum(given)


def covered(keep: Tensor, at_most: int | None) -> Tensor | None:
    """Whether `select` takes all that `keep` says, 0-d bool; None where it surely does."""
    return None if at_most is None or at_most >= keep.shape[0] else keep.sum() <= at_most


def zeros_or_nan(keep: Tensor, at_most: int | None) -> Tensor:
    """fp32 [N] for the results of the tokens that `select` takes; NaN for those it should have."""
    zeros = torch.zeros(keep.shape, dtype=torch.float32, device=keep.device)
    sure = at_most is None or at_most >= keep.shape[0]
    return zeros if sure else zeros.masked_fill_(keep, torch.nan)


def flat(t: MaybeTensor) -> MaybeTensor:
    """Per-token [...] as [N]; strided views of two dimensions or more are copied."""
    return None if t is None else t.reshape(-1)


def flat_labels(t: MaybeTensor, dims: int) -> MaybeTensor:
    """As `flat`, of tokens of so many dimensions; what has one more, [..., K], as [N, K]."""
    several = t is not None and t.dim() > dims
    return t.reshape(-1, t.shape[-1]) if t is not None and several else flat(t)


def localized(
    labels: Tensor, columns: slice, vocab: int, ignore: int, dropped: Tensor | None = None
) -> tuple[Tensor, int]:
    """(labels, ignore_index) for a row kernel that is given some columns of the vocabulary.

    Tokens to ignore were left out, but for those that are `dropped` [n]; and of several labels of a
    token, [n, K], some may be ignored.
    """
    if columns.stop - columns.start == vocab:
        return labels, ignore
    labels, given = labels.long(), labels
    known = ((labels >= 0) & (labels < vocab)) | (labels == ELSEWHERE)
    owned = (labels >= columns.start) & (labels < columns.stop)
    local = torch.where(known, ELSEWHERE, NOWHERE)
    local = torch.where(owned, labels - columns.start, local)
    if given.dim() > 1:
        local = torch.where(given == ignore, SHARD_IGNORED, local)
    elif dropped is not None:
        local = torch.where(dropped, SHARD_IGNORED, local)
    return local, SHARD_IGNORED
