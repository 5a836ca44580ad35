"""Launchers of token_logprobs over a support for the native backends."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core import checks, env
from ...core.row_options import RowOptions
from . import boundary as b


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def check(
        op: str,
        status: tuple[int, int],
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        vocab: int,
    ) -> None:
        code, position = status
        if code == b.LABEL_OUT_OF_RANGE:
            raise checks.out_of_range(op, position, labels, vocab)
        if code == b.BAD_TEMPERATURE:
            assert temperatures is not None  # the kernel read a bad one
            raise checks.bad_temperature(op, position, temperatures)
        if code == b.BAD_INDPTR:
            raise checks.bad_indptr(op, position, indptr, indices.shape[0])
        if code == b.INDEX_OUT_OF_RANGE:
            raise checks.bad_index(op, position, indices, vocab)
        if code == b.INDEX_REPEATED:
            raise checks.repeated_index(op, position, indices)
        if code == b.OUT_OF_MEMORY:
            raise MemoryError(f"{op}: no memory for a bit per token id of the vocabulary, {vocab}")

    def forward(
        op: str,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = labels.shape
        logprobs = torch.empty(shape, dtype=torch.float32, device=rows.device)
        entropies = torch.empty_like(logprobs) if options.entropy else logprobs.new_empty(0)
        stats = logprobs.new_empty((*shape, 3))
        kept = logprobs.new_empty(indices.shape)
        width = rows.shape[-1]
        vocab = width if weight is None else weight.shape[0]
        if labels.numel() == 0:
            return logprobs, entropies, stats, kept
        # CPU kernels validate the data themselves.
        if gpu and env.CHECK:
            keep = labels != options.ignore_index
            checks.support_data(op, labels, temperatures, indptr, indices, keep, vocab)
        bias, temperatures = b.as_grid(bias, torch.float32), b.as_grid(temperatures, torch.float32)
        status = extension.support_logprobs(
            *b.grid(shape),
            vocab,
            width,
            rows,
            weight,
            bias,
            labels,
            temperatures,
            indices.shape[0],
            indptr,
            indices,
            options,
            logprobs,
            entropies if options.entropy else None,
            stats,
            kept,
            make_exec(rows, "support_logprobs"),
        )
        check(op, status, labels, temperatures, indptr, indices, vocab)
        return logprobs, entropies, stats, kept

    def backward(
        op: str,
        vocab: int,
        out: Tensor | None,
        kept: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
    ) -> Tensor:
        """The gradient of the kept logits; also scatters it into `out` if that is given."""
        dz = torch.empty_like(kept)
        if labels.numel() == 0:
            return dz
        temperatures = b.as_grid(temperatures, torch.float32)
        grad_logprobs = b.as_upstream(grad_logprobs)
        grad_entropy = b.as_upstream(grad_entropy)
        status = extension.support_backward(
            *b.grid(labels.shape),
            vocab,
            labels,
            temperatures,
            indices.shape[0],
            indptr,
            indices,
            options,
            stats,
            kept,
            grad_logprobs,
            grad_entropy,
            dz,
            out,
            make_exec(kept),
        )
        check(op, status, labels, temperatures, indptr, indices, vocab)
        return dz

    def token_logprobs_support(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return forward("token_logprobs", logits, None, None, *args)

    def token_logprobs_support_backward(kept: Tensor, labels: Tensor, *args: Any) -> Tensor:
        *inputs, vocab, dtype = args
        # GPU kernels write only the kept token ids.
        make = torch.zeros if gpu else torch.empty
        out = make((*labels.shape, vocab), dtype=dtype, device=kept.device)
        backward("token_logprobs", vocab, out, kept, labels, *inputs)
        return out

    def linear_token_logprobs_support(*args: Any) -> tuple[Tensor, ...]:
        return forward("linear_token_logprobs", *args)

    def linear_token_logprobs_support_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, (of_hidden, of_weight, of_bias) = args
        vocab, width = weight.shape
        dz = backward(
            "linear_token_logprobs",
            vocab,
            None,
            kept,
            labels,
            temperatures,
            indptr,
            indices,
            *inputs,
        )
        grad_hidden = hidden.new_empty(hidden.shape) if of_hidden else hidden.new_empty(0)
        grad_weight = weight.new_empty(weight.shape) if of_weight else hidden.new_empty(0)
        grad_bias = kept.new_zeros(vocab if of_bias else 0)
        bias_dtype = bias.dtype if of_bias and bias is not None else hidden.dtype
        if labels.numel() == 0:
            return grad_hidden, grad_weight.zero_(), grad_bias.to(bias_dtype)
        sums = of_weight or of_bias
        starts = uses = order = owner = None
        if sums and gpu:
            starts, order, owner = by_token_id(dz, indptr, indices, vocab)
        elif sums:
            starts = torch.empty(vocab + 1, dtype=torch.int64, device=kept.device)
            # csrc/abi.h: SupportUse
            uses = starts.new_empty(2 * indices.shape[0])
        extension.support_head_backward(
            *b.grid(labels.shape),
            vocab,
            width,
            hidden,
            weight,
            indices.shape[0],
            indptr,
            indices,
            dz,
            grad_hidden if of_hidden else None,
            grad_weight if of_weight else None,
            grad_bias if of_bias else None,
            starts,
            uses,
            order,
            owner,
            make_exec(dz),
        )
        return grad_hidden, grad_weight, grad_bias.to(bias_dtype)

    def by_token_id(
        dz: Tensor, indptr: Tensor, indices: Tensor, vocab: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(first position of each token id in order, entries sorted by token id, token of each)."""
        moves = (dz != 0) & (indices >= 0) & (indices < vocab)
        token_ids, order = torch.where(moves, indices, vocab).long().sort(stable=True)
        starts = torch.searchsorted(token_ids, torch.arange(vocab + 1, device=dz.device))
        at = torch.arange(dz.shape[0], dtype=indptr.dtype, device=dz.device)
        return starts, order, torch.searchsorted(indptr[1:].contiguous(), at, right=True)

    return {
        "token_logprobs_support": token_logprobs_support,
        "token_logprobs_support_backward": token_logprobs_support_backward,
        "linear_token_logprobs_support": linear_token_logprobs_support,
        "linear_token_logprobs_support_backward": linear_token_logprobs_support_backward,
    }
