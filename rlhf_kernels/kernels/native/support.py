"""Launchers of token_logprobs over a support for the native backends."""

from types import ModuleType

import torch
from torch import Tensor

from ...core import data_checks
from ...core.row_options import RowOptions
from .. import support
from . import boundary as b


def launchers(extension: ModuleType) -> support.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def check(op: str, status: tuple[int, int], tokens: support.Tokens, vocab: int) -> None:
        code, position = status
        labels, temperatures, indptr, indices = tokens
        if code == b.LABEL_OUT_OF_RANGE:
            raise data_checks.out_of_range(op, position, labels, vocab)
        if code == b.BAD_TEMPERATURE:
            assert temperatures is not None  # the kernel read a bad one
            raise data_checks.bad_temperature(op, position, temperatures)
        if code == b.BAD_INDPTR:
            raise data_checks.bad_indptr(op, position, indptr, indices.shape[0])
        if code == b.INDEX_OUT_OF_RANGE:
            raise data_checks.bad_index(op, position, indices, vocab)
        if code == b.INDEX_REPEATED:
            raise data_checks.repeated_index(op, position, indices)
        if code == b.OUT_OF_MEMORY:
            raise MemoryError(f"{op}: no memory for a bit per token id of the vocabulary, {vocab}")

    def forward(
        op: str,
        vocab: int,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: support.Tokens,
        options: RowOptions,
        *results: Tensor | None,
    ) -> None:
        labels, temperatures, indptr, indices = tokens
        bias, temperatures = b.as_fp32(bias), b.as_fp32(temperatures)
        status = extension.support_logprobs(
            *b.grid(labels.shape),
            vocab,
            rows.shape[-1],
            rows,
            weight,
            bias,
            labels,
            temperatures,
            indices.shape[0],
            indptr,
            indices,
            options,
            *results,
            make_exec(rows, "support_logprobs"),
        )
        check(op, status, tokens, vocab)

    def gradient(
        op: str,
        vocab: int,
        out: Tensor | None,
        given: support.Backward,
    ) -> Tensor:
        """The gradient of the kept logits; also scatters it into `out` if that is given."""
        kept, tokens, stats, grad_logprobs, grad_entropy, options = given
        labels, temperatures, indptr, indices = tokens
        dz, temperatures = torch.empty_like(kept), b.as_fp32(temperatures)
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
        check(op, status, tokens, vocab)
        return dz

    def scatter(vocab: int, out: Tensor, given: support.Backward) -> None:
        gradient("token_logprobs", vocab, out, given)

    def head_backward(
        gradients: support.HeadGradients,
        hidden: Tensor,
        weight: Tensor,
        given: support.Backward,
    ) -> None:
        (vocab, width), (_, *sums) = weight.shape, gradients
        labels, _, indptr, indices = given.tokens
        dz = gradient("linear_token_logprobs", vocab, None, given)
        starts = uses = order = owner = None
        if any(t is not None for t in sums):
            if gpu:
                starts, order, owner = by_token_id(dz, indptr, indices, vocab)
            else:
                starts = torch.empty(vocab + 1, dtype=torch.int64, device=dz.device)
                # csrc/abi_rows.h: SupportUse
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
            *gradients,
            starts,
            uses,
            order,
            owner,
            make_exec(dz),
        )

    def by_token_id(
        dz: Tensor, indptr: Tensor, indices: Tensor, vocab: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(first position of each token id in order, entries sorted by token id, token of each)."""
        moves = (dz != 0) & (indices >= 0) & (indices < vocab)
        token_ids, order = torch.where(moves, indices, vocab).long().sort(stable=True)
        starts = torch.searchsorted(token_ids, torch.arange(vocab + 1, device=dz.device))
        at = torch.arange(dz.shape[0], dtype=indptr.dtype, device=dz.device)
        return starts, order, torch.searchsorted(indptr[1:].contiguous(), at, right=True)

    return support.launchers(forward, scatter, head_backward, gpu)
