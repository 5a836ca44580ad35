"""Launcher of policy_rows: in one kernel from a head's logits to their gradient; CUDA only."""

from types import ModuleType

import torch
from torch import Tensor

from ...config.policy_codes import PolicyCodes, PolicyParams
from ...core.layout import fp32_like
from ...core.row_options import RowOptions
from .. import losses
from ..rows import PolicyRows, TokenConstants
from . import architectures
from . import boundary as b


def launchers(extension: ModuleType) -> losses.Launchers:
    """`policy_rows_for` of an extension module for a GPU; not an operator."""
    if not extension.gpu:
        return {}
    make_exec = b.exec_builder(extension)

    def policy_rows(
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        constants: TokenConstants,
        codes: PolicyCodes,
        params: PolicyParams,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = fp32_like(labels), fp32_like(labels)
        count, vocab = logits.shape
        if count > 0:
            extension.policy_rows(
                logits,
                labels,
                b.as_fp32(temperatures),
                options,
                *constants,
                codes,
                params,
                logprobs,
                entropies,
                out,
                make_exec(logits, "policy_rows", lambda: (count, vocab)),
            )
        return logprobs, entropies

    def policy_rows_for(device: torch.device, vocab: int, options: RowOptions) -> PolicyRows | None:
        clusters = extension.emulated or architectures.suit(
            architectures.of(extension), device, architectures.CLUSTERS
        )
        return policy_rows if clusters and extension.policy_rows_suits(vocab, options) else None

    return {"policy_rows_for": policy_rows_for}
