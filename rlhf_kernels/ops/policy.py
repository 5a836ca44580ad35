"""policy_loss: the clipped losses of PPO, GRPO and their family, with their gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config.metrics import POLICY_METRICS
from ..config.policy import PolicyLossConfig
from ..config.policy_codes import PolicyCodes, PolicyParams
from ..core import checks, data_checks, tracing
from ..core.layout import constant
from ..core.option_checks import shown
from ..kernels import backends, losses
from ..kernels.rows import LossResults, PolicyTokens
from ._autograd import (
    InputGradients,
    apply,
    graph_is_kept,
    once_differentiable,
    remember,
)
from ._metrics import Metrics, register_metrics
from ._operator import define


def check_spread(
    op: str,
    name: str,
    value: object,
    logprobs: Tensor,
    cu_seqlens: Tensor | None,
    like: str = "logprobs",
) -> Tensor:
    """Requires one number per token or per sequence of the argument `like`; integers become
    float32.
    """
    value = checks.real(op, name, value)
    checks.same_device(op, name, value, like, logprobs.device)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if value.shape != logprobs.shape and value.shape != (sequences,):
        raise ValueError(
            f"{op}: {name} must have the shape of {like}, {shown(logprobs.shape)}, or one "
            f"entry per sequence, ({shown(sequences)},), got {shown(value.shape)}"
        )
    return value


def check_config(
    op: str,
    config: PolicyLossConfig,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
) -> None:
    """Requires a PolicyLossConfig and the inputs that it needs."""
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"{op}: config must be a PolicyLossConfig, got {type(config).__name__}")
    if config.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"{op}: ref_logprobs must be given, since kl_coef is {config.kl_coef}")
    if config.correction_level is not None and rollout_logprobs is None:
        raise ValueError(
            f"{op}: rollout_logprobs must be given, since correction_level is "
            f"{config.correction_level!r}"
        )
    if config.gate_against == "rollout" and rollout_logprobs is None:
        raise ValueError(f"{op}: rollout_logprobs must be given, since gate_against is 'rollout'")
    if config.aggregation == "constant" and config.normalizer is None and normalizer is None:
        raise ValueError(f"{op}: normalizer must be given with the aggregation 'constant'")


def config_numbers(config: PolicyLossConfig) -> tuple[PolicyCodes, PolicyParams]:
    """The codes and parameters of a configuration, as operators take them.

    torch.compile lifts the floats of an object into the graph at their first use. This first use
    must not be inside an autograd.Function, whose graph is separate and hidden from a second call.
    """
    if torch.compiler.is_compiling():
        return config._codes, PolicyParams(*[float(p) for p in config._params])
    return config._codes, config._params


@define("policy_loss")
def _forward(tokens: PolicyTokens, grad: bool, entropy_grad: bool, backend: str) -> LossResults:
    logprobs, deferred = tokens.logprobs, backends.get(backend).gpu
    loss, metrics, scale = losses.results(logprobs, len(POLICY_METRICS), deferred)
    gradient = losses.gradient(logprobs, grad)
    like = logprobs if tokens.entropy is None else tokens.entropy
    return LossResults(loss, metrics, gradient, losses.gradient(like, entropy_grad), scale)


@define("loss_backward")
def _backward(
    first: Tensor,
    second: Tensor | None,
    scale: Tensor,
    upstream: Tensor,
    first_dtype: torch.dtype,
    second_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    pairs = ((first, first_dtype), (second, second_dtype))
    return [torch.empty_like(g, dtype=dtype) for g, dtype in pairs if g is not None]


def times(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in `dtype`; skips the product if upstream is known to be 1 (on CPU).

    The result shares the gradient's memory only where no backward pass needs that again.
    """
    if type(upstream) is Tensor and upstream.device.type == "cpu":
        traced = tracing.active(upstream) or tracing.transform() is not None
        if not traced and upstream.item() == 1.0:
            return gradient.to(dtype, copy=graph_is_kept())
    return (gradient * upstream).to(dtype)


def scaled(
    gradients: list[Tensor], dtypes: list[torch.dtype], scale: Tensor | None, upstream: Tensor,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    """One or two gradients times scale and upstream, each in its dtype; see kernels/losses.py."""
    if losses.is_deferred(scale):
        if tracing.transform() is not None or tracing.stand_for_several(upstream):
            # An operator that returns a list cannot be taken apart.
            return [(g * (scale * upstream)).to(d) for g, d in zip(gradients, dtypes, strict=True)]
        first, second = (*gradients, None)[:2]
        return _backward(first, second, scale, upstream, dtypes[0], dtypes[-1], backend)
    return [times(g, upstream, dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


# The fields of PolicyTokens that may have a gradient.
_DIFFERENTIABLE = tuple(map(PolicyTokens._fields.index, ("logprobs", "entropy")))


class _PolicyLoss(torch.autograd.Function):
    """The forward pass computes the gradient too; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> InputGradients:
        """`args`: the fields of PolicyTokens; grad, entropy_grad, backend, whether all its tensors
        are plain.
        """
        *fields, grad, entropy_grad, ctx.backend, plain = args
        tokens, ctx.wanted = PolicyTokens(*fields), (grad, entropy_grad)
        found = _forward(tokens, grad, entropy_grad, ctx.backend, plain=plain)
        gradients = (found.of_logprobs, found.of_entropy)
        inputs = zip(gradients, (tokens.logprobs, tokens.entropy), ctx.wanted, strict=True)
        kept = [(g, t.dtype) for g, t, wanted in inputs if wanted and t is not None]
        ctx.dtypes, ctx.count = [dtype for _, dtype in kept], len(args)
        remember(ctx, tokens.logprobs, tokens.entropy)
        ctx.save_for_backward(found.scale, *(g for g, _ in kept))
        ctx.mark_non_differentiable(found.metrics)
        ctx.set_materialize_grads(False)
        return found.loss, found.metrics

    @staticmethod
    @once_differentiable("policy_loss")
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> InputGradients:
        of_inputs: list[Tensor | None] = [None] * ctx.count
        if upstream is None:
            return tuple(of_inputs)
        scale, *gradients = ctx.saved_tensors
        results = iter(scaled(gradients, ctx.dtypes, scale, upstream, ctx.backend))
        for at, wanted in zip(_DIFFERENTIABLE, ctx.wanted, strict=True):
            of_inputs[at] = next(results) if wanted else None
        return tuple(of_inputs)


class PolicyMetrics(Metrics):
    """Metrics of one `policy_loss` call, on its device: reading one by name needs no host sync.

    A mapping of names to 0-d tensors; `as_dict()` copies all of them to the host at once.
    Fractions and means are over the unmasked tokens, whatever the aggregation; 0 without any.

    loss: pg_loss + kl_coef * kl_loss - entropy_coef * entropy_loss.
    pg_loss, kl_loss, entropy_loss: the three terms, aggregated as configured.
    clip_frac_low: tokens clipped at the lower bound (for "clip" only where A < 0: gradient 0).
    clip_frac_high: tokens clipped at the upper bound (for "clip" only where A > 0).
    dual_clip_frac: tokens with A < 0 and a ratio above dual_clip or delta.
    gate_frac_low, gate_frac_high: tokens that the gate drops at its lower and its upper bound.
    ratio_mean, ratio_min, ratio_max: statistics of the ratio that the objective uses.
    k1_old, k3_old: estimates of KL(old || new) from each token's log-ratio, k3 after its clamp.
    k1_ref, k3_ref: estimates of KL(new || ref), without the clamps of the loss term.
    entropy: mean of the entropy argument.
    ess: effective sample size (sum r)^2 / (n sum r^2) of the ratios.
    correction_mean: mean of w; without correction_level that of token weights; 1 without rollout.
    tokens: unmasked tokens.
    """

    _names = POLICY_METRICS


register_metrics(PolicyMetrics)


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`."""

    loss: Tensor
    metrics: PolicyMetrics


PPO = PolicyLossConfig.ppo()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = PPO,
) -> PolicyLoss:
    """Policy-gradient loss of PPO, GRPO, DAPO, GSPO, GMPO, CISPO, SAPO, REINFORCE and others.

    `PolicyLossConfig` documents the formula, with the paper of each method. Differentiable in
    logprobs, and in entropy where config.entropy_coef is not 0; everything else is a constant. The
    kernel backends compute loss, metrics and gradient in one pass over the tokens; backward only
    scales the gradient.

    Where new and old log-probabilities are equal, the ratio is exactly 1, and the clip fractions
    and the KL to old are exactly 0. Log-ratios saturate (config.log_ratio_clamp, and always at
    +-40), so finite inputs never give NaN and an advantage of 0 gives exactly 0.

    Args:
        logprobs: [B, T], or packed [N] with cu_seqlens; float32, bfloat16 or float16. Any strides.
        old_logprobs: same shape, of the sampling policy (as sampled or recomputed). None: the
            logprobs themselves as a constant, for the first update after a rollout; every ratio is
            then 1.
        advantages: same shape, or one per sequence: [B], or [S] with cu_seqlens. A packed tensor
            with as many tokens as sequences counts as one per token.
        mask: same shape; bool or integer, nonzero = keep, or floating with only 0 and 1. Values of
            masked tokens, even NaN, have no effect.
        ref_logprobs: same shape, of the reference policy. Required if kl_coef is not 0; otherwise
            they only add the metrics k1_ref and k3_ref.
        rollout_logprobs: same shape, as reported by the rollout engine. Required for importance
            correction and for a gate against them; otherwise they only add the metric
            correction_mean. At a NaN the rollout counts as equal to old.
        entropy: same shape. Required if entropy_coef is not 0; otherwise only a metric.
        weights: same shape, or one per sequence, as advantages. Finite numbers >= 0, by which the
            whole terms of the tokens are multiplied: objective, KL and entropy. The divisor stays,
            and of the metrics only the loss and its three terms change. None: all 1.
        cu_seqlens: offsets [S + 1] of packed sequences, int32 or int64.
        normalizer: number or 0-d tensor > 0; overrides config.normalizer. A tensor is not read on
            the host, except on CPU.
        config: options; those of `PolicyLossConfig.ppo()` by default.

    Returns:
        PolicyLoss(loss, metrics): 0-d and PolicyMetrics, float32. Without unmasked tokens the loss
        is 0, still connected to the graph, with zero gradients.

    Raises:
        TypeError: wrong dtype or type of an argument; a floating mask with values besides 0 and 1.
        ValueError: shapes or devices that do not match, a missing input that config requires, bad
            cu_seqlens, normalizer or weights. On a GPU bad values of these tensors make the results
            NaN instead, unless RLHF_KERNELS_CHECK=1.
    """
    op = "policy_loss"
    if old_logprobs is None:
        checks.floating(op, "logprobs", logprobs, double=True)
        old_logprobs = logprobs.detach()
    given = (logprobs, old_logprobs, ref_logprobs, rollout_logprobs, entropy, mask)
    padded = cu_seqlens is None and isinstance(logprobs, Tensor) and logprobs.dim() == 2
    plain = padded and checks.plain("ffFFFmf", *given, advantages)
    if not plain and not (padded and checks.plain("ffFFFm", *given)):
        mask = checks.token_inputs(
            op,
            {
                "logprobs": logprobs,
                "old_logprobs": old_logprobs,
                "ref_logprobs": ref_logprobs,
                "rollout_logprobs": rollout_logprobs,
                "entropy": entropy,
            },
            mask,
            cu_seqlens,
        )
    if not plain:
        advantages = check_spread(op, "advantages", advantages, logprobs, cu_seqlens)
    if weights is not None and not checks.plain("ff", logprobs, weights):
        plain, weights = False, check_spread(op, "weights", weights, logprobs, cu_seqlens)
    check_config(op, config, ref_logprobs, rollout_logprobs, normalizer)
    if config.entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"{op}: entropy must be given, since entropy_coef is {config.entropy_coef}"
        )
    effective_normalizer = config.normalizer if normalizer is None else normalizer
    count, divisor = checks.divisor(op, effective_normalizer, "logprobs", logprobs.device)

    backend = backends.select(op, logprobs.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, logprobs.shape[0])
        data_checks.divisor_positive(op, count)
        data_checks.loss_weights(op, weights, mask, cu_seqlens)
        loss, metrics = reference.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            entropy=entropy,
            weights=weights,
            cu_seqlens=cu_seqlens,
            normalizer=divisor or count,
            config=config,
        )
        return PolicyLoss(loss, PolicyMetrics(metrics))
    if not plain:
        checks.not_double(
            op,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            entropy=entropy,
            weights=weights,
        )
    enabled = torch.is_grad_enabled()
    grad = enabled and logprobs.requires_grad
    entropy_grad = (
        enabled and config.entropy_coef != 0 and entropy is not None and entropy.requires_grad
    )
    recorded = grad or entropy_grad or tracing.forward_mode()
    codes, params = config_numbers(config)
    tokens = PolicyTokens(
        logprobs=logprobs if recorded else constant(logprobs),
        old_logprobs=constant(old_logprobs),
        advantages=constant(advantages),
        mask=constant(mask),
        ref_logprobs=constant(ref_logprobs),
        rollout_logprobs=constant(rollout_logprobs),
        entropy=entropy if entropy_grad else constant(entropy),
        weights=constant(weights),
        cu_seqlens=cu_seqlens,
        normalizer=count,
        divisor=divisor,
        codes=codes,
        params=params,
    )
    all_plain = plain and count is None
    wanted = (grad, entropy_grad, backend)
    if recorded:
        loss, metrics = apply(op, _PolicyLoss, *tokens, *wanted, all_plain, plain=plain)
    else:
        loss, metrics, *_ = _forward(tokens, *wanted, plain=all_plain)
    return PolicyLoss(loss, PolicyMetrics(metrics))
