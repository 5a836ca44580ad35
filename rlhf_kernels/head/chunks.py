"""Chunks of tokens, and tiles of tokens and columns, in which a head's logits are computed.

A chunk's logits live in one buffer, which its gradient overwrites: memory is bounded by the chunk
whatever the batch. Tokens that nothing depends on are dropped before the product. A backward pass
on a CPU takes blocks of the vocabulary instead of tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import MaybeTensor
from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED

#: Bytes of logits in flight. A GPU wants chunks that fill it; each rereads the fp32 gradient of the
#: weight.
CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
# The GEMM's rows come in multiples of this; its columns, where they are part of a vocabulary.
_CHUNK_MULTIPLE, _COLUMNS_MULTIPLE = 16, 64
# More tokens make no product faster.
_EXACT_TOKENS = 8192
# Most tokens beside blocks of columns: more would leave the budget too few columns at a time.
_BLOCK_TOKENS = 32768
# Chunks of fewer tokens spend more on an fp32 sum of a 16-bit weight's gradient, which is read and
# written for each, than a further product would cost.
_SUM_TOKENS = 2048


def chunk_size(device: torch.device, vocab: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: what the byte budget of the device holds, at least 16."""
    budget = CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES)
    # A shard of a vocabulary may be empty.
    tokens = budget // (max(vocab, 1) * logits_dtype(device, dtype).itemsize)
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
    """What the GEMM leaves its fp32 sums in: fp32 where the library can from 16-bit operands.

    And for fp16, whose range a gradient leaves: its products then take operands in fp32, which
    CPUs without fp16 arithmetic multiply many times as fast.
    """
    return torch.float32 if device.type == "cuda" or dtype == torch.float16 else dtype


class Chunk(NamedTuple):
    """Tokens and columns of a product: at most, or, where `exact`, always that many tokens."""

    size: int
    columns: int
    exact: bool

    @classmethod
    def of(cls, chunk: int, weight: Tensor, heads: int = 1) -> "Chunk":
        """Some tokens, all columns.

        Args:
            chunk: an operator's argument: tokens, 0 for the device's budget, negative where exact.
            weight: [V, H].
            heads: buffers that share the budget.
        """
        vocab = weight.shape[0]
        size = abs(chunk) or chunk_size(weight.device, heads * vocab, weight.dtype)
        return cls(size, max(vocab, 1), chunk < 0)

    @classmethod
    def backward(cls, chunk: int, weight: Tensor, count: int, heads: int = 1) -> "Chunk":
        """For gradients of `count` tokens whose statistics are known; arguments as in `of`.

        Where the budget does not hold them all, on a CPU all tokens and some columns, if the
        vocabulary is larger: products of many tokens then give a block of the weight's gradient at
        once, and what is summed in fp32, once a block, is the smaller gradient of hidden.
        """
        whole = cls.of(chunk, weight, heads)
        if chunk != 0 or weight.device.type != "cpu" or whole.size >= min(count, whole.columns):
            return whole
        tokens = min(count, _BLOCK_TOKENS)
        size = logits_dtype(weight.device, weight.dtype).itemsize
        columns = CHUNK_BYTES["cpu"] // (heads * tokens * size)
        return cls(tokens, max(columns // _COLUMNS_MULTIPLE, 1) * _COLUMNS_MULTIPLE, False)

    def rows(self, count: int) -> int:
        """Rows of the buffer for `count` tokens."""
        return self.size if self.exact else min(self.size, max(count, 1))


def prefer_recompute(chunk: int, weight: Tensor, count: int, heads: int = 1) -> bool:
    """Whether a gradient of the weight, summed over chunks, costs more than a product again."""
    size = Chunk.of(chunk, weight, heads).size
    return (
        chunk == 0
        and weight.device.type == "cpu"
        and logits_dtype(weight.device, weight.dtype) != torch.float32
        and size < _SUM_TOKENS
        and count > 2 * size
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
    """The tokens that take part: all of them, or those of `index` (flat positions, ascending)."""

    count: int
    index: Tensor | None

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


def flat(t: MaybeTensor) -> MaybeTensor:
    """Per-token [...] as [N]; strided views of two dimensions or more are copied."""
    return None if t is None else t.reshape(-1)


def localized(labels: Tensor, columns: slice, vocab: int, ignore: int) -> tuple[Tensor, int]:
    """(labels, ignore_index) for a row kernel that is given some columns of the vocabulary.

    No label is to be ignored: those tokens were dropped.
    """
    if columns.stop - columns.start == vocab:
        return labels, ignore
    labels = labels.long()
    known = ((labels >= 0) & (labels < vocab)) | (labels == ELSEWHERE)
    owned = (labels >= columns.start) & (labels < columns.stop)
    local = torch.where(known, ELSEWHERE, NOWHERE)
    return torch.where(owned, labels - columns.start, local), SHARD_IGNORED
