"""The LM head in chunks of tokens: products by torch's GEMM, rows by a backend's kernels.

A chunk's logits live in one buffer, which its gradient overwrites: memory is bounded by the chunk
whatever the batch. Tokens that nothing depends on are dropped before the product.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .policy_config import AGGREGATIONS
from .reference import policy

Launchers = Mapping[str, Callable[..., object]]
#: torch.empty(shape, dtype=, device=), in the way that suits a backend's large buffers.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
Reduce = Callable[[Tensor], Tensor]

#: Bytes of logits in flight. A GPU wants chunks that fill it; each rereads the fp32 gradient of the
#: weight.
CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
# Where PolicyLossConfig encodes these (policy_config.py: _codes, _params).
_RATIO_LEVEL, _CORRECTION_LEVEL, _AGGREGATION = 1, 5, 7
_PENALTY_COEF, _KL_COEF, _ENTROPY_COEF = 6, 9, 13
# Masked tokens are dropped already, whatever their label.
_NO_LABEL_IGNORED = -(2**63)
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
    """A head's operands and the buffer for the logits of a chunk."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    empty: Empty

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, empty: Empty
    ) -> "Head":
        hidden = hidden.reshape(-1, hidden.shape[-1])
        rows = min(chunk, hidden.shape[0])
        dtype = _logits_dtype(hidden.device, hidden.dtype)
        logits = empty((rows, weight.shape[0]), dtype, hidden.device)
        return cls(hidden, weight, bias, logits, empty)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of a chunk's hidden states, in the buffer."""
        out = self.logits[: hidden.shape[0]]
        matmul_into(out, hidden, self.weight.T)
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
            if tokens.index is None and dtype == self.hidden.dtype:
                matmul_into(self.hidden[part], grad_logits, self._head.weight)
            else:
                rows = hidden.new_empty(hidden.shape, dtype=dtype)
                matmul_into(rows, grad_logits, self._head.weight)
                tokens.put(self.hidden, part, rows.to(self.hidden.dtype))
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


def _check(op: str, labels: Tensor, temperatures: Tensor | None, keep: Tensor, vocab: int) -> None:
    """Finds bad data where the position in the batch is still known, and data may be looked at."""
    kept = torch.where(keep, labels.long(), _NO_LABEL_IGNORED)
    _checks.labels_in_range(op, kept, vocab, _NO_LABEL_IGNORED)
    _checks.temperatures_positive(op, temperatures, keep)


def _complete(found: tuple[Tensor, ...], weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A policy loss's gradients in log-probabilities and entropy, times `weight` and its scale."""
    *_, g, h, scale = found
    for factor in (weight, scale if scale.dim() == 0 else None):
        if factor is not None:
            g, h = g * factor, h if h.numel() == 0 else h * factor
    return g, h


class _PolicySweep:
    """The chunks of one `linear_policy_loss`, and the log-probabilities found on the way."""

    def __init__(
        self,
        rows: Launchers,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        mask: Tensor,
        ref_head: list[Tensor],
        temperature: float,
        softcap: float,
        chunk: int,
        empty: Empty,
    ) -> None:
        self._rows, self._mask = rows, mask
        self._labels, self._temperatures = flat(labels), flat(temperatures)
        self._options = (temperature, softcap)
        keep = flat(mask) != 0
        _check("linear_policy_loss", self._labels, self._temperatures, keep, weight.shape[0])
        self.tokens = select(keep)
        heads = 2 if ref_head else 1
        self._chunk = chunk or chunk_size(hidden.device, heads * weight.shape[0], hidden.dtype)
        size = min(self._chunk, max(self.tokens.count, 1))
        self.head = Head.of(hidden, weight, bias, size, empty)
        self._ref = None
        if ref_head:
            ref_bias = ref_head[2] if len(ref_head) > 2 else None
            self._ref = Head.of(*ref_head[:2], ref_bias, size, empty)
        shape = self._labels.shape
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        self.entropy = torch.zeros_like(self.logprobs)
        self.ref_logprobs = torch.zeros_like(self.logprobs) if ref_head else None
        self._stats = self.logprobs.new_empty((*shape, 3))

    def _forward(self, tokens: Tokens, part: slice) -> tuple[Tensor, ...]:
        """A chunk's (hidden, logits, log-probabilities, entropy, stats, reference's), recorded."""
        own = tokens.take(self._labels, part), tokens.take(self._temperatures, part)
        ref = None
        if self._ref is not None:
            logits = self._ref.project(tokens.take(self._ref.hidden, part))
            ref, _, _ = self._rows["token_logprobs"](
                logits, *own, *self._options, False, _NO_LABEL_IGNORED
            )
            tokens.put(self.ref_logprobs, part, ref)
        hidden = tokens.take(self.head.hidden, part)
        logits = self.head.project(hidden)
        logprobs, entropy, stats = self._rows["token_logprobs"](
            logits, *own, *self._options, True, _NO_LABEL_IGNORED
        )
        tokens.put(self.logprobs, part, logprobs)
        tokens.put(self.entropy, part, entropy)
        tokens.put(self._stats, part, stats)
        return hidden, logits, logprobs, entropy, stats, ref

    def logprobs_of(self, tokens: Tokens) -> None:
        """Log-probabilities of `tokens`; no gradient."""
        for part in tokens.chunks(self._chunk):
            self._forward(tokens, part)

    def fused(
        self,
        tokens: Tokens,
        old: Tensor,
        advantages: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        weights: Tensor,
        codes: list[int],
        params: list[float],
        bonus: bool,
        gradients: Gradients,
    ) -> None:
        """Log-probabilities and gradients of `tokens`, one product forward and two backward."""
        codes = [*codes[:_AGGREGATION], AGGREGATIONS.index("constant")]
        for part in tokens.chunks(self._chunk):
            hidden, logits, logprobs, entropy, stats, own_ref = self._forward(tokens, part)
            if own_ref is None:
                own_ref = tokens.take(ref, part)

            def row(t: Tensor | None) -> Tensor | None:
                return None if t is None else t.unsqueeze(0)

            ones = torch.ones_like(logprobs, dtype=torch.bool)
            found = self._rows["policy_loss"](
                row(logprobs), row(tokens.take(old, part)), row(tokens.take(advantages, part)),
                row(ones), row(own_ref), row(tokens.take(rollout, part)),
                row(entropy) if bonus else None, None, None, 1.0, codes, params, True, bonus,
            )  # fmt: skip
            g, h = _complete(found, tokens.take(weights, part))
            self._gradient(tokens, part, logits, stats, g[0], h[0] if bonus else None)
            gradients.add(tokens, part, hidden, logits)

    def backward(self, g: Tensor, h: Tensor | None, gradients: Gradients) -> None:
        """The second sweep: gradients from those of the log-probabilities and entropies."""
        used = g != 0 if h is None else (g != 0) | (h != 0)
        tokens = select(used)
        for part in tokens.chunks(self._chunk):
            hidden = tokens.take(self.head.hidden, part)
            logits = self.head.project(hidden)
            upstream = tokens.take(g, part), tokens.take(h, part)
            self._gradient(tokens, part, logits, tokens.take(self._stats, part), *upstream)
            gradients.add(tokens, part, hidden, logits)

    def _gradient(
        self,
        tokens: Tokens,
        part: slice,
        logits: Tensor,
        stats: Tensor,
        g: Tensor,
        h: Tensor | None,
    ) -> None:
        self._rows["token_logprobs_backward_inplace"](
            logits, tokens.take(self._labels, part), tokens.take(self._temperatures, part), stats,
            g, h, *self._options, _NO_LABEL_IGNORED,
        )  # fmt: skip

    def policy_loss(
        self,
        old: Tensor,
        advantages: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        whole: tuple[object, ...],
        grad: bool,
        bonus: bool,
    ) -> tuple[Tensor, ...]:
        """(loss, metrics, gradients) of all tokens from the recorded log-probabilities."""
        shape = self._mask.shape
        if self.ref_logprobs is not None:
            ref = self.ref_logprobs.view(shape)
        return self._rows["policy_loss"](
            self.logprobs.view(shape), old, advantages, self._mask, ref, rollout,
            self.entropy.view(shape), *whole, grad, bonus,
        )  # fmt: skip


def plain_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def launchers(
    rows: Launchers, empty: Empty = plain_empty, reduce: Reduce | None = None
) -> dict[str, Callable[..., object]]:
    """Launchers of the head's operators over a backend's row kernels.

    Args:
        rows: the row kernels.
        empty: makes large buffers.
        reduce: see `Gradients`.
    """
    if "token_logprobs" not in rows:
        return {}

    def linear_token_logprobs(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = labels.shape
        labels, temperatures = flat(labels), flat(temperatures)
        keep = labels != ignore_index
        _check("linear_token_logprobs", labels, temperatures, keep, weight.shape[0])
        logprobs = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs) if entropy else logprobs.new_empty(0)
        stats = logprobs.new_empty((*labels.shape, 3))
        tokens = select(keep)
        chunk = chunk or chunk_size(hidden.device, weight.shape[0], hidden.dtype)
        head = Head.of(hidden, weight, bias, min(chunk, max(tokens.count, 1)), empty)
        for part in tokens.chunks(chunk):
            logits = head.project(tokens.take(head.hidden, part))
            own = tokens.take(labels, part), tokens.take(temperatures, part)
            lp, h, s = rows["token_logprobs"](
                logits, *own, temperature, softcap, entropy, ignore_index
            )
            tokens.put(logprobs, part, lp)
            tokens.put(stats, part, s)
            if entropy:
                tokens.put(entropies, part, h)
        return (
            logprobs.view(shape),
            entropies.view(shape) if entropy else entropies,
            stats.view(*shape, 3),
        )

    def linear_token_logprobs_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        temperature: float,
        softcap: float,
        ignore_index: int,
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, temperatures = flat(labels), flat(temperatures)
        g, h, stats = flat(grad_logprobs), flat(grad_entropy), stats.view(-1, 3)
        # A token without an upstream gradient adds nothing: clipped, no advantage, prompt, tool.
        used = torch.zeros_like(labels, dtype=torch.bool)
        for upstream in (g, h):
            if upstream is not None:
                used |= upstream != 0
        tokens = select(used & (labels != ignore_index))
        chunk = chunk or chunk_size(hidden.device, weight.shape[0], hidden.dtype)
        head = Head.of(hidden, weight, bias, min(chunk, max(tokens.count, 1)), empty)
        gradients = Gradients(head, *needs, reduce)
        for part in tokens.chunks(chunk):
            of_chunk = tokens.take(head.hidden, part)
            logits = head.project(of_chunk)
            rows["token_logprobs_backward_inplace"](
                logits, *(tokens.take(t, part) for t in (labels, temperatures, stats, g, h)),
                temperature, softcap, ignore_index,
            )  # fmt: skip
            gradients.add(tokens, part, of_chunk, logits)
        return gradients.results(hidden.shape)

    def linear_kl_divergence(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        reverse: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        shape = hidden.shape[:-1]
        kl = torch.zeros(shape, dtype=torch.float32, device=hidden.device).view(-1)
        stats = kl.new_empty((*kl.shape, 5))
        tokens = select(torch.ones_like(kl, dtype=torch.bool) if mask is None else flat(mask) != 0)
        chunk = chunk or chunk_size(hidden.device, 2 * weight.shape[0], hidden.dtype)
        size = min(chunk, max(tokens.count, 1))
        head = Head.of(hidden, weight, bias, size, empty)
        ref = Head.of(ref_hidden, ref_weight, ref_bias, size, empty)
        for part in tokens.chunks(chunk):
            logits = head.project(tokens.take(head.hidden, part))
            ref_logits = ref.project(tokens.take(ref.hidden, part))
            divergence, s = rows["kl_divergence"](logits, ref_logits, temperature, reverse)
            tokens.put(kl, part, divergence)
            tokens.put(stats, part, s)
        return kl.view(shape), stats.view(*shape, 5)

    def linear_kl_divergence_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        stats: Tensor,
        grad: Tensor,
        temperature: float,
        reverse: bool,
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, stats = flat(grad), stats.view(-1, 5)
        used = grad != 0
        if mask is not None:
            used &= flat(mask) != 0
        tokens = select(used)
        chunk = chunk or chunk_size(hidden.device, 2 * weight.shape[0], hidden.dtype)
        size = min(chunk, max(tokens.count, 1))
        head = Head.of(hidden, weight, bias, size, empty)
        ref = Head.of(ref_hidden, ref_weight, ref_bias, size, empty)
        gradients = Gradients(head, *needs)
        for part in tokens.chunks(chunk):
            of_chunk = tokens.take(head.hidden, part)
            logits = head.project(of_chunk)
            rows["kl_divergence_backward_inplace"](
                logits, ref.project(tokens.take(ref.hidden, part)), tokens.take(stats, part),
                tokens.take(grad, part), temperature, reverse,
            )  # fmt: skip
            gradients.add(tokens, part, of_chunk, logits)
        return gradients.results(hidden.shape)

    def linear_policy_loss(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        ref_head: list[Tensor],
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        temperature: float,
        softcap: float,
        divisor: float,
        codes: list[int],
        params: list[float],
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sweep = _PolicySweep(
            rows, hidden, weight, bias, labels, temperatures, mask, ref_head, temperature, softcap,
            chunk, empty,
        )  # fmt: skip
        per_token = policy.per_token(advantages, mask, cu_seqlens)
        whole = (cu_seqlens, normalizer, divisor, codes, params)
        bonus = params[_ENTROPY_COEF] != 0
        gradients = Gradients(sweep.head, *needs, reduce)
        if not any(needs):
            sweep.logprobs_of(sweep.tokens)
        elif codes[_RATIO_LEVEL] == 0 and codes[_CORRECTION_LEVEL] != 2:
            # Tokens stand alone: their gradient is known as soon as their log-probability is.
            count = normalizer if normalizer is not None else divisor or None
            weights = policy.token_weights(
                mask != 0, AGGREGATIONS[codes[_AGGREGATION]], count, torch.float32, cu_seqlens
            ).expand(mask.shape)
            idle = torch.zeros((), dtype=torch.bool, device=hidden.device)
            if params[_KL_COEF] == 0 and not bonus and params[_PENALTY_COEF] == 0:
                # No advantage, no gradient.
                idle = flat(per_token) == 0
            kept = flat(mask) != 0
            sweep.logprobs_of(select(kept & idle))
            sweep.fused(
                select(kept & ~idle), flat(old), flat(per_token), flat(ref), flat(rollout),
                flat(weights), codes, params, bonus, gradients,
            )  # fmt: skip
        else:
            # The gradient of a token needs its whole sequence: a first sweep for that.
            sweep.logprobs_of(sweep.tokens)
            found = sweep.policy_loss(old, advantages, ref, rollout, whole, True, bonus)
            g, h = _complete(found)
            sweep.backward(flat(g), flat(h) if bonus else None, gradients)
        loss, metrics, *_ = sweep.policy_loss(old, advantages, ref, rollout, whole, False, False)
        return loss, metrics, *gradients.results(hidden.shape)

    return {
        "linear_policy_loss": linear_policy_loss,
        "linear_token_logprobs": linear_token_logprobs,
        "linear_token_logprobs_backward": linear_token_logprobs_backward,
        "linear_kl_divergence": linear_kl_divergence,
        "linear_kl_divergence_backward": linear_kl_divergence_backward,
    }
