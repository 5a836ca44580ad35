"""Reference of the policy loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config.policy import PolicyLossConfig
from ..config.policy_codes import LOG_RATIO_BOUND, LOG_WEIGHT_BOUND, UNBOUNDED
from ..config.policy_fields import clips_tokens
from ..core.layout import MaybeTensor
from ..core.sequences import loss_weights, per_token, sequence_sum, token_weights
from ._common import clamped, compute
from .kl import kl_estimate, sloped


def _extreme(x: Tensor, any_token: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.where(any_token, reduce(x), 0) if x.numel() else x.new_zeros(())


def kl_term(x: Tensor, config: PolicyLossConfig) -> Tensor:
    """The KL estimate that `config` selects, from x = logprob - ref."""
    estimator = config.kl_estimator
    # An absent bound is the same finite number as in the kernels.
    low, high = config.kl_input_bounds()
    z = clamped(x, max(low, -UNBOUNDED), min(high, UNBOUNDED))
    value = estimate(z, estimator.removesuffix("+"))
    limit = UNBOUNDED if config.kl_value_clamp is None else config.kl_value_clamp
    value = clamped(value, -limit, limit)
    if estimator.endswith("+"):
        return sloped(x, value.detach(), "k2")
    return value


def gradient_alone(x: Tensor) -> Tensor:
    """0 with the gradient of x. Where x is infinite a clamp has cut its gradient: 0 there."""
    return torch.where(x.isinf(), 0, x - x.detach())


def kl_weight(r: Tensor, lp: Tensor, config: PolicyLossConfig) -> Tensor:
    """The factor of the KL estimate."""
    if config.kl_weight == "one":
        return 1 + gradient_alone(lp)
    most = UNBOUNDED if config.kl_weight_max is None else config.kl_weight_max
    w = clamped(r, -UNBOUNDED, most)
    return w.detach() if config.kl_weight == "detached-ratio" else w


def estimate(x: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(p || q) from x = log p - log q at a sample of p."""
    if estimator == "k3":
        x = clamped(x, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return sloped(x, kl_estimate(x.detach(), estimator), estimator)


def token_log_weight(old: Tensor, rollout: Tensor) -> Tensor:
    """old - rollout, or 0 where it is NaN although old is a number (a rollout may report NaN).

    Infinities become large finite numbers, so that a sequence may hold both signs.
    """
    x = (old - rollout).clamp(-LOG_WEIGHT_BOUND, LOG_WEIGHT_BOUND)
    return torch.where(x.isnan() & ~old.isnan(), 0, x)


def correction_weight(
    log_weight: Tensor, length: Tensor, cu_seqlens: Tensor | None, config: PolicyLossConfig
) -> Tensor:
    """w = exp of `token_log_weight`, of its sequence sum or of its mean; truncated or masked."""
    if config.correction_level in ("sequence", "geometric"):
        log_weight = sequence_sum(log_weight, cu_seqlens)
    if config.correction_level == "geometric":
        log_weight = log_weight / length
    w = log_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    low, high = config.correction_bounds()
    if config.correction_mode == "truncate":
        return w.clamp(low, high)
    return torch.where((w < low) | (w > high), 0, w)


def objective_term(
    r: Tensor, log_r: Tensor, logprobs: Tensor, advantages: Tensor, w: Tensor | float,
    config: PolicyLossConfig,
) -> Tensor:  # fmt: skip
    """One token's objective, times the correction weight."""
    low, high = config.clip_bounds()
    a = advantages
    if clips_tokens(config):
        return w * (-a * r)
    if config.objective == "reinforce":
        return w * (-a * logprobs)
    if config.objective == "cispo":
        return w * (-a * r.detach().clamp(low, high) * logprobs)
    if config.objective == "penalty":
        return w * (-a * r) + config.penalty_coef * (torch.expm1(log_r) - log_r)
    if config.objective == "sapo":
        tau = torch.where(a > 0, config.sapo_tau_pos, config.sapo_tau_neg).to(r.dtype)
        return w * (-a * torch.sigmoid(tau * (r - 1)) * (4 / tau))
    unclipped = -a * (r if config.delta is None else r.clamp(max=config.delta))
    clipped = -a * r.clamp(low, high)
    term = torch.where(clipped > unclipped, clipped, unclipped)
    if config.dual_clip is not None:
        bound = -a * config.dual_clip
        term = torch.where((a < 0) & (term > bound), bound, term)
    return w * term


def dropped_tokens(
    lp: Tensor, anchor: Tensor, a: Tensor, distance: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Bool masks of the tokens that the gate drops at its lower and at its upper bound.

    `distance`: the mean of anchor - lp over each token's sequence.
    """
    low, high = config.gate_bounds()
    nowhere = torch.zeros_like(lp, dtype=torch.bool)
    if config.gate is None:
        return nowhere, nowhere
    if config.gate == "opsm":
        return (a < 0) & (distance > low), nowhere
    if config.gate == "ratio":
        return lp - anchor < low, lp - anchor > high

    def bounded(x: Tensor) -> Tensor:
        return x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    if config.gate == "tv":
        moved = bounded(lp).exp() - bounded(anchor).exp()
        below, above = moved < low, moved > high
    else:
        p, q = bounded(lp.clamp(max=0)), bounded(anchor.clamp(max=0))
        # As everywhere, an infinite log-ratio saturates.
        x = bounded(lp.clamp(max=0) - anchor.clamp(max=0))
        others = (1e-8 - torch.expm1(q)) / (1e-8 - torch.expm1(p))
        kl = -q.exp() * x - torch.expm1(q) * others.log()
        below, above = (x < 0) & (kl > low), (x > 0) & (kl > high)
    if config.gate_two_sided:
        return below, above
    return below & (a < 0), above & (a > 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor]:
    """The loss of `PolicyLossConfig` and its metrics, differentiable in logprobs and entropy.

    Args:
        logprobs: [B, T], or packed [N] with cu_seqlens.
        old_logprobs, ref_logprobs, rollout_logprobs: same shape; constants.
        advantages: same shape, or one per sequence; constant.
        mask: bool or integer, nonzero = keep. Values at masked tokens have no effect.
        entropy: same shape.
        weights: same shape, or one per sequence; constant. NaN results for a bad one.
        cu_seqlens: [S + 1].
        normalizer: overrides config.normalizer.
        config: options.

    Returns:
        (loss, metrics in the order of POLICY_METRICS).
    """
    mask = mask != 0

    def clean(x: MaybeTensor, constant: bool = True) -> MaybeTensor:
        if x is None:
            return None
        return torch.where(mask, compute(x.detach() if constant else x), 0)

    lp, old = clean(logprobs, constant=False), clean(old_logprobs)
    a = clean(per_token(advantages, mask, cu_seqlens))
    ref, rollout = clean(ref_logprobs), clean(rollout_logprobs)
    bonus = clean(entropy, constant=config.entropy_coef == 0)
    length = sequence_sum(mask.to(lp.dtype), cu_seqlens).clamp(min=1)

    token_x = lp - old
    x = token_x
    if config.ratio_level != "token":
        own = torch.where(mask, clipped_log_ratio(token_x, a, config), 0)
        x = sequence_sum(own, cu_seqlens) / length
    log_r = clamped(x, *config.log_ratio_bounds())
    if config.ratio_level == "sequence-token":
        # The value is s; inside the clamp the gradient is that of the token's own logprob.
        inside = (log_r == x).to(lp.dtype)
        log_r = log_r.detach() + inside * gradient_alone(lp)
    r, log_r = log_r.exp().expand_as(lp), log_r.expand_as(lp)

    w: Tensor | float = 1.0
    if rollout is not None:
        w = correction_weight(token_log_weight(old, rollout), length, cu_seqlens, config)
    applied = w if config.correction_level is not None else 1.0
    anchor = old
    if rollout is not None and config.gate_against == "rollout":
        anchor = torch.where(rollout.isnan(), old, rollout)
    distance = lp.new_zeros(())
    if config.gate == "opsm":
        away = token_log_weight(anchor, lp.detach())
        distance = sequence_sum(away, cu_seqlens) / length
    gates = dropped_tokens(lp.detach(), anchor, a, distance, config)
    if config.gate is not None:
        dropped = gates[0] | gates[1]
        applied = torch.where(dropped, 0, torch.as_tensor(applied, dtype=lp.dtype))
        # 0 times the logarithm of 0 would be NaN.
        pg_term = objective_term(r, log_r, torch.where(dropped, 0, lp), a, applied, config)
    else:
        pg_term = objective_term(r, log_r, lp, a, applied, config)
    kl = torch.zeros_like(lp) if ref is None else kl_term(lp - ref, config)
    if config.kl_weight is not None:
        kl = kl * kl_weight(r, lp, config)

    if normalizer is None:
        normalizer = config.normalizer
    weight = token_weights(mask, config.aggregation, normalizer, lp.dtype, cu_seqlens)
    if weights is not None:
        weight = weight * loss_weights(weights.detach(), mask, cu_seqlens)

    def aggregate(term: Tensor) -> Tensor:
        return torch.where(mask, weight * term, 0).sum()

    pg_loss, kl_loss = aggregate(pg_term), aggregate(kl)
    entropy_loss = lp.new_zeros(()) if bonus is None else aggregate(bonus)
    loss = pg_loss
    if config.kl_coef != 0:
        loss = loss + config.kl_coef * kl_loss
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy_loss

    with torch.no_grad():
        tokens = mask.sum().to(lp.dtype)

        def mean(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0).sum() / tokens.clamp(min=1)

        low, high, dual = clipped_tokens(r, token_x, a, config)
        k3_x = token_x.clamp(*config.log_ratio_bounds())
        ref_x = torch.zeros_like(lp) if ref is None else lp - ref
        any_token = tokens > 0
        ratio_min = _extreme(torch.where(mask, r, torch.inf), any_token, torch.amin)
        ratio_max = _extreme(torch.where(mask, r, -torch.inf), any_token, torch.amax)
        square = mean(r * r)
        metrics = torch.stack(
            [
                *(loss, pg_loss, kl_loss, entropy_loss),
                *(mean(flag.to(lp.dtype)) for flag in (low, high, dual, *gates)),
                *(mean(r), ratio_min, ratio_max),
                *(mean(-token_x), mean(torch.expm1(k3_x) - k3_x)),
                *(mean(ref_x), mean(estimate(ref_x, "k3"))),
                mean(torch.zeros_like(lp) if bonus is None else bonus),
                torch.where(square == 0, 0, mean(r) ** 2 / square),
                mean(torch.as_tensor(w, dtype=lp.dtype, device=lp.device)),
                tokens,
            ]
        )
    return loss, metrics


def clipped_log_ratio(x: Tensor, a: Tensor, config: PolicyLossConfig) -> Tensor:
    """The log-ratio of a token in the mean of its sequence."""
    if not clips_tokens(config):
        return x
    params = config._params
    above = clamped(x, -math.inf, params.clip_high)
    return torch.where(a > 0, above, clamped(x, params.clip_low, math.inf))


def clipped_tokens(
    r: Tensor, x: Tensor, a: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Bool masks of tokens clipped by the lower bound, the upper bound, and dual_clip or delta.

    x: the log-ratio of each token, whose ratio r may be that of its sequence.
    """
    low, high = config.clip_bounds()
    nowhere = torch.zeros_like(r, dtype=torch.bool)
    if clips_tokens(config):
        params = config._params
        # An infinite log-ratio is not beyond a bound that is absent.
        x = x.clamp(-UNBOUNDED, UNBOUNDED)
        return (a < 0) & (x < params.clip_low), (a > 0) & (x > params.clip_high), nowhere
    if config.objective == "cispo":
        return r < low, r > high, nowhere
    if config.objective != "clip":
        return nowhere, nowhere, nowhere
    dual = nowhere
    for bound in (config.delta, config.dual_clip):
        if bound is not None:
            dual = dual | ((a < 0) & (r > bound))
    return (a < 0) & (r < low), (a > 0) & (r > high), dual
