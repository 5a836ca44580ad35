"""Launcher of value_loss for the native backends."""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from . import boundary as b
from . import policy

# csrc/abi.h: kValueMetrics
_METRICS = 6


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    where = b.place(extension)

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        op = "value_loss"
        loss, metrics, gradient = policy.outputs(values, _METRICS, grad)
        # The gradient is complete.
        scale = loss.new_empty(0)
        divisor = policy.divisor_value(op, normalizer, divisor)
        tokens = policy.sequences(op, values, cu_seqlens)
        if tokens is None:
            return loss.zero_(), metrics.zero_(), gradient, scale
        mask, values = policy.mask_grid(mask), b.as_grid(values)
        old, returns = b.as_grid(old), b.as_grid(returns)
        status = extension.value_loss(
            *tokens, b.pack(mask), b.pack(values), b.pack(old), b.pack(returns), divisor,
            aggregation, clip_range, b.pack(loss), b.pack(metrics),
            b.pack(gradient) if grad else None, where(values),
        )  # fmt: skip
        policy.raise_status(op, status, cu_seqlens, values.numel())
        return loss, metrics, gradient, scale

    return {"value_loss": value_loss}
