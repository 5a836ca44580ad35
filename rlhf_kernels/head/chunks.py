"""The LM head in chunks of tokens: products by torch's GEMM, rows by a backend's kernels.

A chunk's logits live in one buffer, which its gradient overwrites: memory is bounded by the chunk
whatever the batch. Tokens that nothing depends on are dropped before the product. A backward pass
on a CPU takes blocks of the vocabulary instead of tokens. The operators' launchers over this are in
row_launchers.py and policy.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED

Launchers = Mapping[str, Callable[..., object]]
#: torch.empty(shape, dtype=, device=), in the way that suits a backend's large buffers.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
Reduce = Callable[[Tensor], Tensor]

#: Bytes of logits in flight. A GPU wants chunks that fill it; each rereads the fp32 gradient of the
#: weight.
CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
# The GEMM's rows come in multiples of this; its columns, where they are part of a vocabulary.
_CHUNK_MULTIPLE, _WORDS_MULTIPLE = 16, 64
# More tokens make no product faster.
_EXACT_TOKENS = 8192
# Most tokens beside blocks of words: more would leave the budget too few words at a time.
_BLOCK_TOKENS = 32768
# Chunks of fewer tokens spend more on an fp32 sum of a 16-bit weight's gradient, which is read and
# written for each, than a further product would cost.
_SUM_TOKENS = 2048
# From so many tokens on a CPU gains more by operands that are not transposed than it costs to turn
# their product round.
_TURNED_TOKENS = 2048
# Rows of a weight gradient that are summed over chunks at a time: their product stays in the cache.
_SUM_ROWS = 1024
# Rows of an fp16 weight that are widened at a time, and whose scaled gradient is added at a time.
_WIDE_ROWS, _SCALED_ROWS = 1024, 16384
# Below this exponent of two scaled gradients stay: fp16 ends at 2^16.
_FP16_EXPONENT = 15


def chunk_size(device: torch.device, vocab: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: what the byte budget of the device holds, at least 16."""
    budget = CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES)
    # A shard of a vocabulary may be empty.
    tokens = budget // (max(vocab, 1) * _logits_dtype(device, dtype).itemsize)
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


def _logits_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the GEMM leaves its fp32 sums in: fp32 where the library can from 16-bit operands.

    And for fp16, whose range a gradient leaves: its products then take operands in fp32, which
    CPUs without fp16 arithmetic multiply many times as fast.
    """
    return torch.float32 if device.type == "cuda" or dtype == torch.float16 else dtype


class Chunk(NamedTuple):
    """Tokens and words of a product: at most, or, where `exact`, always that many tokens."""

    size: int
    words: int
    exact: bool

    @classmethod
    def of(cls, chunk: int, weight: Tensor, heads: int = 1) -> "Chunk":
        """Some tokens, all words.

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

        Where the budget does not hold them all, on a CPU all tokens and some words, if the
        vocabulary is larger: products of many tokens then give a block of the weight's gradient at
        once, and what is summed in fp32, once a block, is the smaller gradient of hidden.
        """
        whole = cls.of(chunk, weight, heads)
        if chunk != 0 or weight.device.type != "cpu" or whole.size >= min(count, whole.words):
            return whole
        tokens = min(count, _BLOCK_TOKENS)
        size = _logits_dtype(weight.device, weight.dtype).itemsize
        words = CHUNK_BYTES["cpu"] // (heads * tokens * size)
        return cls(tokens, max(words // _WORDS_MULTIPLE, 1) * _WORDS_MULTIPLE, False)

    def rows(self, count: int) -> int:
        """Rows of the buffer for `count` tokens."""
        return self.size if self.exact else min(self.size, max(count, 1))


def sum_is_dear(chunk: int, weight: Tensor, count: int, heads: int = 1) -> bool:
    """Whether a gradient of the weight, summed over chunks, costs more than a product again."""
    size = Chunk.of(chunk, weight, heads).size
    return (
        chunk == 0
        and weight.device.type == "cpu"
        and _logits_dtype(weight.device, weight.dtype) != torch.float32
        and size < _SUM_TOKENS
        and count > 2 * size
    )


class Tile(NamedTuple):
    """Tokens and words whose logits are in the buffer together.

    step counts the tiles along the tokens; `is_last`: no tokens follow.
    """

    tokens: slice
    words: slice
    step: int
    is_last: bool


class Tokens(NamedTuple):
    """The tokens that take part: all of them, or those of `index` (flat positions, ascending)."""

    count: int
    index: Tensor | None

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def tiles(self, chunk: Chunk, vocab: int) -> Iterator[Tile]:
        for step, part in enumerate(self.chunks(chunk.size)):
            # Once where a shard has no words: its rank still takes part.
            for start in range(0, max(vocab, 1), chunk.words):
                words = slice(start, min(start + chunk.words, vocab))
                yield Tile(part, words, step, part.stop == self.count)

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
    """A head's operands and the buffers of a tile: logits, and hidden states where it is exact."""

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
        hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        rows = chunk.rows(count)
        dtype = _logits_dtype(weight.device, weight.dtype)
        logits = empty((rows * min(chunk.words, weight.shape[0]),), dtype, hidden.device)
        padded = weight.new_zeros((rows, hidden.shape[1])) if chunk.exact else None
        return cls(hidden, weight, bias, logits, padded, empty)

    def states(self, tokens: Tokens, part: slice) -> Tensor:
        """A chunk's hidden states as the product takes them: upcast to an fp32 weight's dtype."""
        return tokens.take(self.hidden, part).to(self.weight.dtype)

    def project(self, hidden: Tensor, words: slice = slice(None)) -> Tensor:
        """Logits [n, words] of a tile's hidden states, in the buffer."""
        count, weight = hidden.shape[0], self.weight[words]
        if self.padded is not None:
            self.padded[:count] = hidden
            hidden = self.padded
        out = self.grid(hidden.shape[0], weight.shape[0])
        if _widens(weight):
            wide = hidden.float()
            for rows in _blocks(weight.shape[0], _WIDE_ROWS):
                torch.mm(wide, weight[rows].float().T, out=out[:, rows])
        else:
            matmul_into(out, hidden, weight.T)
        out = out[:count]
        return out if self.bias is None else out.add_(self.bias[words])

    def grid(self, rows: int, words: int) -> Tensor:
        """The buffer as [rows, words]."""
        return self.logits[: rows * words].view(rows, words)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in fp32 sums; also into fp32 from 16-bit operands, on a GPU."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _widens(t: Tensor) -> bool:
    """Whether products take this operand in fp32."""
    return t.dtype == torch.float16 and t.device.type != "cuda"


def _blocks(size: int, most: int) -> Iterator[slice]:
    for start in range(0, size, most):
        yield slice(start, min(start + most, size))


def _add_product(out: Tensor, g: Tensor, weight: Tensor) -> None:
    """out += g @ weight in fp32, out and g being that."""
    if not _widens(weight):
        out.addmm_(g, weight)
        return
    for rows in _blocks(weight.shape[0], _WIDE_ROWS):
        out.addmm_(g[:, rows], weight[rows].float())


def _in_fp16(g: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(fp16, unit) with g [n, words] = fp16 * unit: powers of two that use fp16's range.

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


def localized(labels: Tensor, words: slice, vocab: int, ignore: int) -> tuple[Tensor, int]:
    """(labels, ignore_index) for a row kernel that is given some words of the vocabulary.

    No label is to be ignored: those tokens were dropped.
    """
    if words.stop - words.start == vocab:
        return labels, ignore
    labels = labels.long()
    known = ((labels >= 0) & (labels < vocab)) | (labels == ELSEWHERE)
    owned = (labels >= words.start) & (labels < words.stop)
    local = torch.where(known, ELSEWHERE, NOWHERE)
    return torch.where(owned, labels - words.start, local), SHARD_IGNORED


class Gradients:
    """Gradients of a head: hidden per token, weight and bias summed over tiles in fp32.

    `reduce` sums the gradient of hidden, then fp32, over the ranks that share the vocabulary. Those
    of fp16 operands are fp32 to the end.
    """

    def __init__(
        self, head: Head, hidden: bool, weight: bool, bias: bool, reduce: Reduce | None = None
    ) -> None:
        self._head, self._reduce = head, reduce
        wide = reduce is not None or head.hidden.dtype == torch.float16
        dtype = torch.float32 if wide else head.hidden.dtype
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if hidden else None
        # Of a tile's tokens, over the words so far.
        self._of_tokens: Tensor | None = None
        self._weight = _Sum(head.weight, head.empty) if weight else None
        self._bias = head.bias.new_zeros(head.bias.shape, dtype=torch.float32) if bias else None

    def sweep(self, tokens: Tokens, chunk: Chunk, backward: Callable[[Tensor, Tile], None]) -> None:
        """Adds all `tokens`; `backward` overwrites the logits of a tile by their gradient."""
        for tile in tokens.tiles(chunk, self._head.weight.shape[0]):
            if tile.words.start == 0:
                states = self._head.states(tokens, tile.tokens)
            logits = self._head.project(states, tile.words)
            backward(logits, tile)
            self.add(tokens, tile, states, logits)

    def add(self, tokens: Tokens, tile: Tile, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds a tile: its hidden states [n, H] and the gradient of its logits [n, words]."""
        if hidden.dtype != torch.float16:
            grad_logits = grad_logits.to(hidden.dtype)
        if self.hidden is not None:
            if grad_logits.shape[1] == self._head.weight.shape[0]:
                self._add_hidden(tokens, tile.tokens, grad_logits)
            else:
                self._add_hidden_of_words(tokens, tile, grad_logits)
        if self._weight is not None:
            self._weight.add_product(grad_logits, hidden, tile)
        if self._bias is not None:
            self._bias[tile.words] += grad_logits.sum(0, dtype=torch.float32)

    def _add_hidden(self, tokens: Tokens, part: slice, g: Tensor) -> None:
        head, count, dtype = self._head, g.shape[0], g.dtype
        if head.weight.dtype == torch.float16:
            self._add_hidden_fp16(tokens, part, g)
            return
        if self._reduce is not None:
            dtype = _logits_dtype(g.device, dtype)
        if tokens.index is None and dtype == self.hidden.dtype and head.padded is None:
            matmul_into(self.hidden[part], g, head.weight)
            return
        if head.padded is not None:
            # Rows after the last token are of an earlier chunk.
            g = head.grid(head.padded.shape[0], g.shape[1]).to(g.dtype)
        rows = g.new_empty((g.shape[0], head.weight.shape[1]), dtype=dtype)
        matmul_into(rows, g, head.weight)
        tokens.put(self.hidden, part, rows[:count].to(self.hidden.dtype))

    def _add_hidden_fp16(self, tokens: Tokens, part: slice, g: Tensor) -> None:
        head, count = self._head, g.shape[0]
        if head.padded is not None:
            g = head.grid(head.padded.shape[0], g.shape[1])
        rows = g.new_zeros((g.shape[0], head.weight.shape[1]))
        if _widens(head.weight):
            _add_product(rows, g, head.weight)
        else:
            g, unit = _in_fp16(g, (1,))
            matmul_into(rows, g, head.weight)
            rows *= unit
        tokens.put(self.hidden, part, rows[:count])

    def _add_hidden_of_words(self, tokens: Tokens, tile: Tile, g: Tensor) -> None:
        """Sums over the tiles of some tokens in fp32; rounds with the last of the words."""
        weight = self._head.weight
        in_place = tokens.index is None and self.hidden.dtype == torch.float32
        if tile.words.start == 0:
            self._of_tokens = (
                self.hidden[tile.tokens]
                if in_place
                else g.new_zeros((g.shape[0], weight.shape[1]), dtype=torch.float32)
            )
        if g.dtype == torch.float32:
            _add_product(self._of_tokens, g, weight[tile.words])
        else:
            self._of_tokens += g @ weight[tile.words]
        if tile.words.stop == weight.shape[0] and not in_place:
            tokens.put(self.hidden, tile.tokens, self._of_tokens.to(self.hidden.dtype))

    def results(self, shape: torch.Size, late: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) in the dtypes of the operands; empty where not asked for.

        With `late` fp32 for operands in fp16: they are rounded when they have been scaled.
        """
        like = self._head.hidden
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
            next(none) if self._bias is None else finished(self._bias, self._head.bias),
        )


class _Sum:
    """The gradient of a weight, summed over tokens: in fp32, rounded at the end."""

    def __init__(self, like: Tensor, empty: Empty) -> None:
        self._like = like
        self._empty = empty
        self._total: Tensor | None = None
        self._rounded: Tensor | None = None
        self._b_t: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b, of a tile's a [n, words] and b [n, H]."""
        if _logits_dtype(a.device, a.dtype) != torch.float32:
            self._add_rounded(a, b, tile)
            return
        if self._total is None:
            self._total = self._empty(self._like.shape, torch.float32, self._like.device)
        total = self._total[tile.words]
        if self._like.dtype == torch.float16:
            self._add_fp16(total, a, b, tile)
        elif tile.step == 0:
            matmul_into(total, a.T, b)
        elif a.dtype == torch.float32:
            total.addmm_(a.T, b)
        else:
            torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)

    @staticmethod
    def _add_fp16(total: Tensor, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b, of fp32 a and fp16 b."""
        if _widens(b):
            b = b.float()
            torch.addmm(total, a.T, b, beta=float(tile.step > 0), out=total)
            return
        a, unit = _in_fp16(a, (0, 1))
        for rows in _blocks(total.shape[0], _SCALED_ROWS):
            term = torch.mm(a[:, rows].T, b, out_dtype=torch.float32).mul_(unit)
            if tile.step == 0:
                total[rows] = term
            else:
                total[rows] += term

    def _add_rounded(self, a: Tensor, b: Tensor, tile: Tile) -> None:
        """Adds a.T @ b where the library rounds a product to 16 bits.

        One or two products need no fp32 sum: an addition in 16 bits rounds once. (b.T @ a).T for
        many tokens: the CPU's matrix units take half the time where neither operand is transposed,
        and the blocks that are turned round instead stay in the cache.
        """
        like, words, turned = self._like, tile.words, a.shape[0] >= _TURNED_TOKENS
        if words.start == 0:
            self._b_t = b.T.contiguous() if turned else None
        if self._rounded is None:
            self._rounded = self._empty(like.shape, like.dtype, like.device)
        elif self._total is None and tile.step == 1 and not tile.is_last:
            self._total = self._empty(like.shape, torch.float32, like.device)
        for start in range(words.start, words.stop, _SUM_ROWS):
            rows = slice(start, min(start + _SUM_ROWS, words.stop))
            rounded = self._rounded[rows]
            part = a[:, rows.start - words.start : rows.stop - words.start]
            if not turned and self._total is None:
                if tile.step == 0:
                    torch.mm(part.T, b, out=rounded)
                else:
                    rounded.addmm_(part.T, b)
                continue
            term = (self._b_t @ part).T if turned else part.T @ b
            if tile.step == 0:
                rounded.copy_(term)
                continue
            term = term.contiguous()
            if self._total is None:
                rounded += term
                continue
            total = self._total[rows]
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
            return torch.zeros_like(self._like, dtype=torch.float32)
        return self._total


def plain_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
