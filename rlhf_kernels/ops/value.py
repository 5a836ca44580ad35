"""value_loss: the clipped squared error of a critic, with its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config.enums import AGGREGATIONS, Aggregation
from ..config.metrics import VALUE_METRICS
from ..core import checks, data_checks, option_checks, tracing
from ..core.layout import constant
from ..kernels import backends, losses
from ..kernels.losses import ValueResults, ValueTokens
from ._autograd import InputGradients, apply, once_differentiable, remember
from ._metrics import Metrics, register_metrics
from ._operator import define
from .policy import scaled


@define("value_loss")
def _forward(tokens: ValueTokens, grad: bool, backend: str) -> ValueResults:
    values, deferred = tokens.values, backends.get(backend).gpu
    loss, metrics, scale = losses.results(values, len(VALUE_METRICS), deferred)
    return ValueResults(loss, metrics, losses.gradient(values, grad), scale)


class _ValueLoss(torch.autograd.Function):
    """The forward pass computes the gradient too; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """`args`: the fields of ValueTokens; grad, backend, whether all its tensors are plain."""
        *fields, grad, ctx.backend, plain = args
        tokens = ValueTokens(*fields)
        found = _forward(tokens, grad, ctx.backend, plain=plain)
        ctx.dtype, ctx.nothing = tokens.values.dtype, (None,) * (len(args) - 1)
        remember(ctx, tokens.values)
        ctx.save_for_backward(found.of_values, found.scale)
        ctx.mark_non_differentiable(found.metrics)
        ctx.set_materialize_grads(False)
        return found.loss, found.metrics

    @staticmethod
    @once_differentiable("value_loss")
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> InputGradients:
        if upstream is None:
            return (None, *ctx.nothing)
        grad, scale = ctx.saved_tensors
        return (*scaled([grad], [ctx.dtype], scale, upstream, ctx.backend), *ctx.nothing)


class ValueMetrics(Metrics):
    """Metrics of one `value_loss` call, on its device: reading one by name needs no host sync.

    A mapping of names to 0-d tensors; `as_dict()` copies all of them to the host at once.

    loss: the loss.
    clip_frac: fraction of unmasked tokens whose clipped error is the larger one.
    value_mean, return_mean: means over the unmasked tokens.
    explained_variance: 1 - Var(returns - values) / Var(returns), 0 where the returns do not vary.
    tokens: unmasked tokens.
    """

    _names = VALUE_METRICS


register_metrics(ValueMetrics)


class ValueLoss(NamedTuple):
    """Result of `value_loss`."""

    loss: Tensor
    metrics: ValueMetrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = None,
    aggregation: Aggregation = "token-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """Value loss of PPO: 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), aggregated.

    Differentiable in values only. A tie takes the unclipped branch; where the clipped branch is
    larger, the gradient is 0. See Schulman et al. 2017 (arXiv:1707.06347) and Engstrom et al. 2020
    (arXiv:2005.12729).

    Args:
        values: V, [B, T], or packed [N] with cu_seqlens; float32, bfloat16 or float16. Any strides.
        old_values: V_old, same shape.
        returns: R, same shape.
        mask: same shape; bool or integer, nonzero = keep, or floating with only 0 and 1. Values of
            masked tokens, even NaN, have no effect.
        clip_range: c > 0, or None for the plain squared error.
        aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "constant", as in
            PolicyLossConfig.
        cu_seqlens: offsets [S + 1] of packed sequences, int32 or int64.
        normalizer: divisor of the aggregation, a number or 0-d tensor > 0, as in PolicyLossConfig.

    Returns:
        ValueLoss(loss, metrics): 0-d and ValueMetrics, float32. Without unmasked tokens the loss is
        0, still connected to the graph, with a zero gradient.

    Raises:
        TypeError: wrong dtype or type of an argument; a floating mask with values besides 0 and 1.
        ValueError: shapes or devices that do not match; bad options, cu_seqlens or normalizer.
    """
    op = "value_loss"
    plain = checks.plain("fffm", values, old_values, returns, mask) and values.dim() == 2
    if not plain or cu_seqlens is not None:
        given = {"values": values, "old_values": old_values, "returns": returns}
        mask = checks.token_inputs(op, given, mask, cu_seqlens)
    option_checks.one_of(op, "aggregation", aggregation, AGGREGATIONS)
    if aggregation == "constant" and normalizer is None:
        raise ValueError(f"{op}: normalizer must be given with the aggregation 'constant'")
    if clip_range is not None:
        clip_range = option_checks.positive(op, "clip_range", clip_range)
    count, divisor = checks.divisor(op, normalizer, "values", values.device)

    backend = backends.select(op, values.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, values.shape[0])
        data_checks.divisor_positive(op, count)
        loss, metrics = reference.value_loss(
            values,
            old_values,
            returns,
            mask,
            clip_range=clip_range,
            aggregation=aggregation,
            cu_seqlens=cu_seqlens,
            normalizer=divisor or count,
        )
        return ValueLoss(loss, ValueMetrics(metrics))
    if not plain:
        checks.not_double(op, values=values, old_values=old_values, returns=returns)
    grad = torch.is_grad_enabled() and values.requires_grad
    recorded = grad or tracing.forward_mode()
    tokens = ValueTokens(
        values=values if recorded else constant(values),
        old_values=constant(old_values),
        returns=constant(returns),
        mask=mask,
        cu_seqlens=cu_seqlens,
        normalizer=count,
        divisor=divisor,
        clip_range=0.0 if clip_range is None else clip_range,
        aggregation=AGGREGATIONS.index(aggregation),
    )
    all_plain = plain and cu_seqlens is None and count is None
    if recorded:
        loss, metrics = apply(op, _ValueLoss, *tokens, grad, backend, all_plain, plain=plain)
    else:
        loss, metrics, *_ = _forward(tokens, grad, backend, plain=all_plain)
    return ValueLoss(loss, ValueMetrics(metrics))
