"""Launcher of mismatch_weights for the native backends."""

from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor

from .. import losses
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
        weights, kept, metrics = results = losses.mismatch_results(old)
        tokens = policy.sequences(op, old, cu_seqlens, gpu)
        # On the host the kernel validates the offsets, and so must run.
        if (gpu or tokens is None) and losses.mismatch_of_none(results, cu_seqlens):
            return results
        assert tokens is not None  # there is a token
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
            make_exec(old, op, lambda: (*tokens[:2], cu_seqlens is not None)),
        )
        policy.raise_status(op, status, cu_seqlens, old)
        return results

    return {"mismatch_weights": mismatch_weights}
