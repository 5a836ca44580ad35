"""Launcher of mismatch_weights for the native backends."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...config.metrics import MISMATCH_METRICS
from ...core.layout import fp32_like
from . import boundary as b
from . import policy


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def mismatch_weights(
        old: Tensor,
        rollout: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        level: int,
        mode: int,
        drop: bool,
        normalize: bool,
        params: Sequence[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = "mismatch_weights"
        weights = fp32_like(old)
        kept = torch.empty_like(weights, dtype=torch.bool)
        metrics = weights.new_empty(len(MISMATCH_METRICS))
        tokens = policy.sequences(op, old, cu_seqlens, gpu)
        if tokens is None:
            metrics.zero_()
            metrics[MISMATCH_METRICS.index("norm_factor")] = 1.0
            return weights, kept, metrics
        status = extension.mismatch_weights(
            *tokens,
            policy.flags(mask),
            old,
            rollout,
            level,
            mode,
            drop,
            normalize,
            params,
            weights,
            kept,
            metrics,
            make_exec(old, op, *tokens[:2], cu_seqlens is not None),
        )
        policy.raise_status(op, status, cu_seqlens, old.numel())
        return weights, kept, metrics

    return {"mismatch_weights": mismatch_weights}
