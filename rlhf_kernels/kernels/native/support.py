"""Launchers of token_logprobs over a support for the native backends."""

from types import ModuleType

import torch
from torch import Tensor

from ...core import data_checks
from ...core.row_options import RowOptions
from .. import support
from . import boundary as b


def _raise_status(op: str, status: tuple[int, int], tokens: support.Tokens, vocab: int) -> None:
    """Raises the error that a kernel reported, if it did."""
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


def _by_token_id(
    dz: Tensor, indptr: Tensor, indices: Tensor, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(first position of each token id in order, entries sorted by token id, token of each)."""
    moves = (dz != 0) & (indices >= 0) & (indices < vocab)
    token_ids, order = torch.where(moves, indices, vocab).long().sort(stable=True)
    starts = torch.searchsorted(token_ids, torch.arange(vocab + 1, device=dz.device))
    at = torch.arange(dz.shape[0], dtype=indptr.dtype, device=dz.device)
    return starts, order, torch.searchsorted(indptr[1:].contiguous(), at, right=True)


class _Launch:
    """The kernels of an extension module."""

    def __init__(self, extension: ModuleType) -> None:
        self._extension, self._make_exec = extension, b.exec_builder(extension)

    def forward(
        self,
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
        status = self._extension.support_logprobs(
            *b.grid(labels.shape),
            vocab,
            rows.shape[-1],
            rows,
            weight,
            b.as_fp32(bias),
            labels,
            b.as_fp32(temperatures),
            indices.shape[0],
            indptr,
            indices,
            options,
            *results,
            self._make_exec(rows, "support_logprobs"),
        )
        _raise_status(op, status, tokens, vocab)

    def _gradient(self, op: str, vocab: int, out: Tensor | None, given: support.Backward) -> Tensor:
        """The gradient of the kept logits; also scatters it into `out` if that is given."""
        kept, tokens, stats, grad_logprobs, grad_entropy, options = given
        labels, temperatures, indptr, indices = tokens
        dz = torch.empty_like(kept)
        status = self._extension.support_backward(
            *b.grid(labels.shape),
            vocab,
            labels,
            b.as_fp32(temperatures),
            indices.shape[0],
            indptr,
            indices,
            options,
            stats,
            kept,
            b.as_upstream(grad_logprobs),
            b.as_upstream(grad_entropy),
            dz,
            out,
            self._make_exec(kept),
        )
        _raise_status(op, status, tokens, vocab)
        return dz

    def scatter(self, vocab: int, out: Tensor, given: support.Backward) -> None:
        self._gradient("token_logprobs", vocab, out, given)

    def head_backward(
        self,
        gradients: support.HeadGradients,
        hidden: Tensor,
        weight: Tensor,
        given: support.Backward,
    ) -> None:
        (vocab, width), (_, *sums) = weight.shape, gradients
        labels, _, indptr, indices = given.tokens
        dz = self._gradient("linear_token_logprobs", vocab, None, given)
        starts = uses = order = owner = None
        if any(t is not None for t in sums):
            if self._extension.gpu:
                starts, order, owner = _by_token_id(dz, indptr, indices, vocab)
            else:
                starts = torch.empty(vocab + 1, dtype=torch.int64, device=dz.device)
                # csrc/abi_rows.h: SupportUse
                uses = starts.new_empty(2 * indices.shape[0])
        self._extension.support_head_backward(
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
            self._make_exec(dz),
        )


def launchers(extension: ModuleType) -> support.Launchers:
    """Launchers bound to an extension module."""
    launch = _Launch(extension)
    kernels = (launch.forward, launch.scatter, launch.head_backward)
    return support.launchers(*kernels, extension.gpu)
