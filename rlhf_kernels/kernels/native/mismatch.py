"""Launcher of mismatch_weights for the native backends."""

from types import ModuleType

from torch import Tensor

from .. import losses, mismatch
from . import boundary as b
from ._tokens import flags, raise_status


def launchers(extension: ModuleType) -> mismatch.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def judge(
        old: Tensor,
        rollout: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        rules: mismatch.MismatchRules,
        *results: Tensor,
    ) -> None:
        op, batch = "mismatch_weights", losses.sequences(old.shape, cu_seqlens)
        status = extension.mismatch_weights(
            *batch,
            cu_seqlens,
            flags(mask),
            old,
            rollout,
            *rules,
            *results,
            make_exec(old, op, lambda: (*batch, cu_seqlens is not None)),
        )
        raise_status(op, status, cu_seqlens, old)

    return mismatch.launchers(judge, gpu)
