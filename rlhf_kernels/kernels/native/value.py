"""Launcher of value_loss for the native backends."""

from types import ModuleType

from torch import Tensor

from ...config.metrics import VALUE_METRICS
from .. import losses
from . import boundary as b
from ._tokens import begin, flags, raise_status


def launchers(extension: ModuleType) -> losses.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def value_loss(
        values: Tensor,
        old: Tensor,
        returns: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        divisor: float,
        clip_range: float,
        aggregation: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        op = "value_loss"
        tokens, loss, metrics, scale, divisor, normalizer = begin(
            op, values, cu_seqlens, normalizer, divisor, len(VALUE_METRICS), gpu
        )
        gradient = losses.gradient(values, grad)
        if tokens is None:
            return loss, metrics, gradient, scale
        status = extension.value_loss(
            *tokens,
            flags(mask),
            values,
            old,
            returns,
            divisor,
            normalizer,
            aggregation,
            clip_range,
            loss,
            metrics,
            scale,
            gradient,
            make_exec(values, op, lambda: (*tokens[:2], cu_seqlens is not None)),
        )
        raise_status(op, status, cu_seqlens, values)
        return loss, metrics, gradient, scale

    return {"value_loss": value_loss}
