"""Launcher of value_loss for the native backends."""

from types import ModuleType

from ...config.metrics import VALUE_METRICS
from .. import losses
from ..losses import ValueResults, ValueTokens
from . import boundary as b
from ._tokens import begin, flags, raise_status


def launchers(extension: ModuleType) -> losses.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def value_loss(given: ValueTokens, grad: bool) -> ValueResults:
        op, values, cu_seqlens = "value_loss", given.values, given.cu_seqlens
        tokens, loss, metrics, scale, divisor, normalizer = begin(
            op, values, cu_seqlens, given.normalizer, given.divisor, len(VALUE_METRICS), gpu
        )
        gradient = losses.gradient(values, grad)
        results = ValueResults(loss, metrics, gradient, scale)
        if tokens is None:
            return results
        status = extension.value_loss(
            *tokens,
            flags(given.mask),
            values,
            given.old_values,
            given.returns,
            divisor,
            normalizer,
            given.aggregation,
            given.clip_range,
            loss,
            metrics,
            scale,
            gradient,
            make_exec(values, op, lambda: (*tokens[:2], cu_seqlens is not None)),
        )
        raise_status(op, status, cu_seqlens, values)
        return results

    return {"value_loss": value_loss}
