"""Reference of mismatch_weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config.enums import CORRECTION_MODES, MISMATCH_CODES, MismatchLevel
from ..config.mismatch import MismatchParams
from ..config.policy_codes import LOG_WEIGHT_BOUND, UNBOUNDED
from ..core.sequences import sequence_ids, sequence_sums, spread
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


class _Tokens(NamedTuple):
    """The tokens of a call; what is not in the mask is 0.

    x: log-ratios. near: clamped ones. missing: tokens of the given mask without a ratio.
    """

    mask: Tensor
    missing: Tensor
    old: Tensor
    rollout: Tensor
    x: Tensor
    near: Tensor
    cu_seqlens: Tensor | None

    def sums(self, t: Tensor) -> Tensor:
        """The sum of t over the unmasked tokens of each sequence, fp64."""
        return sequence_sums(torch.where(self.mask, t, 0), self.cu_seqlens)

    def counts(self) -> Tensor:
        """The number of unmasked tokens of each sequence, fp64."""
        return self.sums(torch.ones_like(self.x))

    def k3(self) -> Tensor:
        return torch.expm1(self.near) - self.near


def _tokens(
    old: Tensor,
    rollout: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    drop: bool,
    p: MismatchParams,
) -> _Tokens:
    mask, old, rollout = mask != 0, compute(old.detach()), compute(rollout.detach())
    x = (old - rollout).clamp(-LOG_WEIGHT_BOUND, LOG_WEIGHT_BOUND)
    missing = mask & x.isnan() & ~old.isnan()
    if drop:
        mask = mask & ~missing
    x = torch.where(mask & ~missing, x, 0)
    old = torch.where(mask, old, 0)
    rollout = torch.where(mask, torch.where(missing, old, rollout), 0)
    return _Tokens(mask, missing, old, rollout, x, x.clamp(-p.clamp, p.clamp), cu_seqlens)


def _rejected(tokens: _Tokens, p: MismatchParams) -> Tensor:
    """The unmasked tokens that a criterion rejects, by themselves or with their sequence."""
    x, near = tokens.x, tokens.near
    length = tokens.counts().clamp(min=1)
    least, most = sequence_extremes(near, tokens.mask, tokens.cu_seqlens)
    whole = (least < p.extreme_low) | (most > p.extreme_high)
    for estimate, of_sum, of_mean in (
        (near, (p.sum_low, p.sum_high), (p.mean_low, p.mean_high)),
        (0.5 * near * near, (-UNBOUNDED, p.sum_k2), (-UNBOUNDED, p.mean_k2)),
        (tokens.k3(), (-UNBOUNDED, p.sum_k3), (-UNBOUNDED, p.mean_k3)),
    ):
        total = tokens.sums(estimate)
        whole |= _outside(total.to(x.dtype), *of_sum)
        whole |= _outside((total / length).to(x.dtype), *of_mean)
    alone = _outside(near, p.token_low, p.token_high)
    return tokens.mask & (alone | spread(whole, x, tokens.cu_seqlens))


class _Units(NamedTuple):
    """What has a weight of its own: each token, or each sequence.

    some: the units that count. raw: their weights without bounds. y: the logarithms of these.
    """

    some: Tensor
    raw: Tensor
    y: Tensor


def _units(tokens: _Tokens, of: MismatchLevel | None, p: MismatchParams) -> _Units:
    near, dtype = tokens.near, tokens.x.dtype
    if of == "token":
        return _Units(tokens.mask, near.exp(), near)
    count, total = tokens.counts(), tokens.sums(tokens.x)
    some, length = count > 0, count.clamp(min=1)
    if of == "sequence-mean":
        raw = (tokens.sums(near.exp()) / length).to(dtype)
        return _Units(some, raw, raw.log().clamp(-p.clamp, p.clamp))
    if of == "sequence-max":
        _, most = sequence_extremes(near, tokens.mask, tokens.cu_seqlens)
        # NaN where a token's is: the total is finite without one.
        y = torch.where(some, most, 0) + (total - total)
    elif of is None:
        y = torch.zeros_like(count)
    else:
        y = total if of == "sequence" else total / length
    y = y.to(dtype).clamp(-p.clamp, p.clamp)
    return _Units(some, y.exp(), y)


class _Statistics:
    """Statistics of values t where `where` is true, in `dtype`; 0 where there are none."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def mean(self, where: Tensor, t: Tensor) -> Tensor:
        return torch.where(where, t, 0).sum(dtype=self._dtype) / where.sum().clamp(min=1)

    def fraction(self, where: Tensor, of_them: Tensor) -> Tensor:
        return self.mean(where, of_them.to(self._dtype))

    def deviation(self, where: Tensor, t: Tensor, unbiased: bool = False) -> Tensor:
        """The standard deviation of t, whose values lie about 1."""
        n, off = where.sum(), self.mean(where, t - 1)
        variance = self.mean(where, (t - 1) ** 2) - off * off
        variance = torch.where(n > 1, variance * n / (n - int(unbiased)).clamp(min=1), 0)
        return variance.clamp(min=0).sqrt()

    def ends(self, where: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of t; NaN if one is."""
        if t.numel() == 0:
            return t.new_zeros(()), t.new_zeros(())
        low = torch.where(where, t, torch.inf).amin()
        high = torch.where(where, t, -torch.inf).amax()
        return torch.where(where.any(), low, 0), torch.where(where.any(), high, 0)


def _weight_metrics(
    tokens: _Tokens, units: _Units, w: Tensor, of: MismatchLevel | None, p: MismatchParams
) -> list[Tensor]:
    """The metrics up to seq_fraction_high; w are the bounded weights of the tokens."""
    dtype, mask, count = w.dtype, tokens.mask, tokens.counts()
    s, some, length = _Statistics(dtype), count > 0, count.clamp(min=1)
    mean, square = s.mean(mask, w), s.mean(mask, w * w)
    own = (tokens.sums(w) / length).to(dtype)
    # The mean weight of each sequence without bounds.
    raw = (tokens.sums(units.raw) / length).to(dtype) if of == "token" else units.raw
    return [
        *(mean, s.deviation(mask, w), *s.ends(mask, w)),
        torch.where(square == 0, 0, mean**2 / square),
        s.fraction(units.some, units.y < p.count_log_low),
        s.fraction(units.some, units.y > p.count_log_high),
        *s.ends(units.some, units.raw),
        *(s.mean(some, own), s.deviation(some, own, unbiased=True), *s.ends(some, own)),
        torch.maximum(*s.ends(some, (own - 1).abs())),
        s.fraction(some, _outside(raw, p.count_low, UNBOUNDED)),
        s.fraction(some, _outside(raw, -UNBOUNDED, p.count_high)),
    ]


def _policy_metrics(tokens: _Tokens, p: MismatchParams) -> list[Tensor]:
    """The metrics from kl to ppl_ratio, which compare the two policies."""
    x, mask, count = tokens.x, tokens.mask, tokens.counts()
    s, some, length = _Statistics(x.dtype), count > 0, count.clamp(min=1)
    total, excess = tokens.sums(x), torch.expm1(tokens.near)
    old, rollout = (-(tokens.sums(t) / length) for t in (tokens.old, tokens.rollout))
    difference = -(total / length)
    far = torch.expm1(2 * total.clamp(-p.clamp, p.clamp))
    return [
        *(s.mean(mask, -x), s.mean(mask, tokens.k3())),
        *(s.mean(mask, excess * excess) + 2 * s.mean(mask, excess), s.mean(some, far)),
        *(s.mean(some, old.exp()), s.mean(some, old)),
        *(s.mean(some, rollout.exp()), s.mean(some, rollout)),
        *(s.mean(some, difference), s.mean(some, difference.abs())),
        *(*s.ends(some, difference), s.mean(some, difference.exp())),
    ]


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
    tokens = _tokens(old_logprobs, rollout_logprobs, mask, cu_seqlens, drop, p)
    x, unmasked = tokens.x, tokens.mask
    rejected, units = _rejected(tokens, p), _units(tokens, of, p)
    unit_weights = bounded(units.raw, units.y, CORRECTION_MODES[mode], p)
    of_tokens = unit_weights if of == "token" else spread(unit_weights, x, cu_seqlens)
    w = torch.where(unmasked, of_tokens, 0)

    s, some = _Statistics(x.dtype), tokens.counts() > 0
    factor = x.new_ones(())
    if normalize:
        mean = s.mean(units.some, unit_weights)
        factor = torch.where(mean <= LEAST_MEAN, factor, mean)
    touched = tokens.sums(rejected.to(x.dtype)) > 0
    metrics = [
        *(*_weight_metrics(tokens, units, w, of, p), factor, *_policy_metrics(tokens, p)),
        *(s.fraction(unmasked, rejected), s.fraction(some, touched)),
        *(tokens.missing.sum(), some.sum(), unmasked.sum()),
    ]
    kept = unmasked & ~rejected
    weights = torch.where(kept, w / factor, 0)
    return weights, kept, torch.stack([m.to(x.dtype) for m in metrics])
