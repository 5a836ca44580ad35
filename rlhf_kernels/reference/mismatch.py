"""Reference of mismatch_weights."""

import torch
from torch import Tensor

from ..config.enums import CORRECTION_MODES, MISMATCH_CODES
from ..config.mismatch import MismatchParams
from ..config.policy import LOG_WEIGHT_BOUND, UNBOUNDED
from ..core.sequences import per_token, sequence_ids, sequence_sums
from ._common import compute

# A mean weight that is not above this normalises nothing, as in verl.
LEAST_MEAN = 1e-8


def sequence_extremes(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(smallest, largest) x under the mask of each sequence; inf and -inf where there is none.

    NaN is skipped: a comparison with it would not reject anything either.
    """
    mask = mask & ~x.isnan()
    low, high = torch.where(mask, x, torch.inf), torch.where(mask, x, -torch.inf)
    if cu_seqlens is None:
        if x.shape[-1] == 0:
            return low.new_full(x.shape[:1], torch.inf), low.new_full(x.shape[:1], -torch.inf)
        return low.amin(-1), high.amax(-1)
    count = cu_seqlens.shape[0] - 1
    if count == 0:
        return low.new_empty(0), low.new_empty(0)
    ids = sequence_ids(x, cu_seqlens)
    least, most = low.new_full((count,), torch.inf), low.new_full((count,), -torch.inf)
    return least.scatter_reduce(0, ids, low, "amin"), most.scatter_reduce(0, ids, high, "amax")


def _outside(x: Tensor, low: float, high: float) -> Tensor:
    """NaN is not outside, and inf is not outside an absent bound."""
    x = x.clamp(-UNBOUNDED, UNBOUNDED)
    return (x < low) | (x > high)


def bounded(w: Tensor, y: Tensor, mode: str, p: MismatchParams) -> Tensor:
    """A weight w of logarithm y, truncated to the bounds or masked outside them.

    The logarithm decides, so that no rounding of exp does.
    """
    if mode == "mask":
        return torch.where(_outside(y, p.log_low, p.log_high), 0, w)
    return torch.where(y < p.log_low, p.low, torch.where(y > p.log_high, p.high, w))


def mismatch_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None,
    level: int,
    mode: int,
    drop: bool,
    normalize: bool,
    params: MismatchParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """Importance weights old / rollout, tokens that no criterion rejects, and metrics.

    Args:
        old_logprobs: [B, T], or packed [N] with cu_seqlens.
        rollout_logprobs: same shape.
        mask: bool or integer, nonzero = keep. Values at masked tokens have no effect.
        cu_seqlens: [S + 1].
        level: position in MISMATCH_CODES.
        mode: position in CORRECTION_MODES.
        drop: a token without a ratio leaves the mask; else its ratio is 1.
        normalize: divide the weights by their mean.
        params: bounds.

    Returns:
        (weights, 0 outside the second; bool mask; metrics in the order of MISMATCH_METRICS).
    """
    p, of = params, MISMATCH_CODES[level]
    mask, old, rollout = mask != 0, compute(old_logprobs.detach()), compute(rollout_logprobs)
    x = (old - rollout.detach()).clamp(-LOG_WEIGHT_BOUND, LOG_WEIGHT_BOUND)
    missing = mask & x.isnan() & ~old.isnan()
    if drop:
        mask = mask & ~missing
    x = torch.where(mask & ~missing, x, 0)
    old = torch.where(mask, old, 0)
    rollout = torch.where(mask, torch.where(missing, old, rollout.detach()), 0)

    def sums(t: Tensor) -> Tensor:
        return sequence_sums(torch.where(mask, t, 0), cu_seqlens)

    # Of a token: clamped log-ratio, ratio - 1, k2 and k3.
    near = x.clamp(-p.clamp, p.clamp)
    excess = torch.expm1(near)
    k2, k3 = 0.5 * near * near, excess - near
    count = sums(torch.ones_like(x))
    length = count.clamp(min=1)
    total, near_total = sums(x), sums(near)
    least, most = sequence_extremes(near, mask, cu_seqlens)
    some = count > 0

    rejected_sequence = _outside((near_total).to(x.dtype), p.sum_low, p.sum_high)
    rejected_sequence |= _outside((near_total / length).to(x.dtype), p.mean_low, p.mean_high)
    rejected_sequence |= (least < p.extreme_low) | (most > p.extreme_high)
    for estimate, of_sum, of_mean in ((k2, p.sum_k2, p.mean_k2), (k3, p.sum_k3, p.mean_k3)):
        found = sums(estimate)
        rejected_sequence |= _outside(found.to(x.dtype), -UNBOUNDED, of_sum)
        rejected_sequence |= _outside((found / length).to(x.dtype), -UNBOUNDED, of_mean)
    rejected = _outside(near, p.token_low, p.token_high)
    rejected = mask & (rejected | per_token(rejected_sequence, x, cu_seqlens))
    kept = mask & ~rejected

    # The weight of a unit, a token or a sequence, without bounds, and its logarithm.
    raw_mean = sums(near.exp()) / length
    if of == "token":
        raw, y, unit = near.exp(), near, mask
    else:
        unit = some
        if of == "sequence-mean":
            raw = raw_mean.to(x.dtype)
            y = raw.log().clamp(-p.clamp, p.clamp)
        else:
            if of == "sequence-max":
                # NaN where a token's is: the total is finite without one.
                y = torch.where(some, most, 0) + (total - total)
            elif of is None:
                y = torch.zeros_like(count)
            else:
                y = total if of == "sequence" else total / length
            y = y.to(x.dtype).clamp(-p.clamp, p.clamp)
            raw = y.exp()
        raw_mean = raw
    unit_weight = bounded(raw, y, CORRECTION_MODES[mode], p)
    w = torch.where(mask, per_token(unit_weight, x, cu_seqlens), 0)

    def over(where: Tensor, t: Tensor) -> Tensor:
        return torch.where(where, t, 0).sum(dtype=x.dtype) / where.sum().clamp(min=1)

    def spread(where: Tensor, t: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of t, whose values lie about 1."""
        n, off = where.sum(), over(where, t - 1)
        variance = over(where, (t - 1) ** 2) - off * off
        variance = torch.where(n > 1, variance * n / (n - int(unbiased)).clamp(min=1), 0)
        return over(where, t), variance.clamp(min=0).sqrt()

    def ends(where: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of t; NaN if one is, 0 without any."""
        if t.numel() == 0:
            return t.new_zeros(()), t.new_zeros(())
        low, high = (
            torch.where(where, t, torch.inf).amin(),
            torch.where(where, t, -torch.inf).amax(),
        )
        return torch.where(where.any(), low, 0), torch.where(where.any(), high, 0)

    def fraction(where: Tensor, of_them: Tensor) -> Tensor:
        return over(where, of_them.to(x.dtype))

    weight_mean, weight_std = spread(mask, w)
    square = over(mask, w * w)
    seq_mean = (sums(w) / length).to(x.dtype)
    seq_ends, seq_spread = ends(some, seq_mean), spread(some, seq_mean, unbiased=True)
    norm_factor = torch.ones_like(weight_mean)
    if normalize:
        mean = weight_mean if of == "token" else spread(unit, unit_weight)[0]
        norm_factor = torch.where(mean <= LEAST_MEAN, norm_factor, mean)

    off = over(mask, excess)
    log_old, log_rollout = (-(sums(t) / length) for t in (old, rollout))
    difference = -(total / length)
    far = torch.expm1(2 * total.clamp(-p.clamp, p.clamp))
    touched = sums(rejected.to(x.dtype)) > 0
    metrics = [
        *(weight_mean, weight_std, *ends(mask, w)),
        torch.where(square == 0, 0, weight_mean**2 / square),
        fraction(unit, y < p.count_log_low),
        fraction(unit, y > p.count_log_high),
        *ends(unit, raw),
        *(*seq_spread, *seq_ends, torch.maximum(*ends(some, (seq_mean - 1).abs()))),
        fraction(some, _outside(raw_mean.to(x.dtype), p.count_low, UNBOUNDED)),
        fraction(some, _outside(raw_mean.to(x.dtype), -UNBOUNDED, p.count_high)),
        norm_factor,
        *(over(mask, -x), over(mask, k3)),
        *(over(mask, excess * excess) + 2 * off, over(some, far)),
        *(over(some, log_old.exp()), over(some, log_old)),
        *(over(some, log_rollout.exp()), over(some, log_rollout)),
        *(over(some, difference), over(some, difference.abs())),
        *(*ends(some, difference), over(some, difference.exp())),
        *(fraction(mask, rejected), fraction(some, touched)),
        *(missing.sum(), some.sum(), mask.sum()),
    ]
    weights = torch.where(kept, w / norm_factor, 0)
    return weights, kept, torch.stack([m.to(x.dtype) for m in metrics])
