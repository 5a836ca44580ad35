"""Inputs of mismatch_weights, and its formulas as loops over Python's floats."""

import itertools
import math
import statistics

import torch

from rlhf_kernels.config.metrics import MISMATCH_METRICS
from rlhf_kernels.testing import generator, random_mask

NAN = math.nan

#: Options that use every level, mode, bound, scope and estimator.
OPTIONS = (
    {},
    {"level": "token"},
    {"level": "token", "high": 1.1},
    {"level": "token", "mode": "mask", "low": 0.9, "high": 1.05, "normalize": True},
    {"level": "token", "low": 0.95, "reject": {"token_ratio": (0.8, None)}, "normalize": True},
    {"level": "token", "high": 1.2, "reject": {"token_k1": 1.15, "seq_mean_k3": 0.006}},
    {"level": "token", "reject": {"token_k2": 0.01, "seq_max_k2": 0.06}, "veto": 0.75},
    {"level": "token", "reject": {"token_k3": 0.01, "seq_max_k3": 0.05}},
    {"level": "token", "log_ratio_clamp": 0.1, "reject": {"seq_sum_k1": 1.2}},
    {"level": "sequence", "high": 1.5},
    {"level": "sequence", "mode": "mask", "low": 0.9, "high": 1.25, "normalize": True},
    {"level": "sequence", "log_ratio_clamp": 0.4, "reject": {"seq_mean_k2": 0.0055}},
    {"level": "geometric", "low": 0.99, "high": 1.01, "reject": {"seq_sum_k2": 0.06}},
    {"level": "geometric", "mode": "mask", "high": 1.02, "reject": {"seq_max_ratio": 1.27}},
    {"level": "sequence-mean", "mode": "mask", "low": 1.0, "reject": {"seq_sum_k3": 0.06}},
    {"level": "sequence-mean", "high": 1.02, "reject": {"seq_mean_ratio": (None, 1.02)}},
    {"level": "sequence-max", "high": 1.25, "reject": {"seq_max_k1": 1.17}},
    {"reject": {"seq_mean_k1": (0.98, 1.02), "seq_sum_ratio": (0.4, 2.0)}},
)


def make_inputs(rows=5, cols=37, dtype=torch.float32, *, seed=0, keep=0.8, spread=0.1):
    """(old, rollout, mask) of an engine whose log-probabilities differ by `spread`."""
    g = generator(seed)
    old = -torch.rand(rows, cols, generator=g) * 3 - 0.05
    rollout = old + spread * torch.randn(rows, cols, generator=g)
    return old.to(dtype), rollout.to(dtype), random_mask(rows, cols, keep=keep)


def _exp(x):
    return math.inf if x > 709 else math.exp(x)


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _estimate(estimator, x):
    return {
        "k1": -x,
        "ratio": x,
        "k2": x * x / 2,
        "k3": math.expm1(x) - x if abs(x) < 700 else math.inf,
    }[estimator]


def _passes(name, bound, values):
    """Whether a token's or a sequence's log-ratios pass a criterion, and how close that was."""
    scope, _, estimator = name.rpartition("_")
    values = [_estimate(estimator, x) for x in values]
    of = {"token": sum, "seq_sum": sum, "seq_mean": _mean, "seq_max": max}[scope](values)
    low, high = bound if isinstance(bound, tuple) else (None, bound)
    if estimator in ("k1", "ratio"):
        if not isinstance(bound, tuple) and scope != "seq_max":
            low = 1 / high
        low, high = (None if b is None else math.log(b) for b in (low, high))
    assert all(b is None or abs(of - b) > 1e-6 * (1 + abs(b)) for b in (low, high)), (name, of)
    return (low is None or of >= low) and (high is None or of <= high)


def _bounded(w, mode, low, high):
    for b in (low, high):
        assert b is None or abs(w - b) > 1e-6, "a bound so near that rounding decides"
    if low is not None and w < low:
        return low if mode == "truncate" else 0.0
    if high is not None and w > high:
        return high if mode == "truncate" else 0.0
    return w


def _deviation(values, unbiased):
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if unbiased else statistics.pstdev(values)


def by_loops(
    old, rollout, mask, *, level=None, mode="truncate", low=None, high=None, reject=None,
    veto=None, normalize=False, log_ratio_clamp=None,
):  # fmt: skip
    """(weights, kept, metrics by name) of sequences, each a list of tokens' numbers."""
    limit = math.inf if log_ratio_clamp is None else log_ratio_clamp

    def clamped(x):
        return max(-limit, min(limit, x))

    xs = [
        [o - r for o, r, m in zip(*row, strict=True) if m]
        for row in zip(old, rollout, mask, strict=True)
    ]
    near = [[clamped(x) for x in row] for row in xs]
    weight_of = {
        None: lambda row: 1.0,
        "sequence": lambda row: _exp(clamped(sum(row))),
        "geometric": lambda row: _exp(clamped(_mean(row))),
        "sequence-mean": lambda row: _mean(_exp(clamped(x)) for x in row),
        "sequence-max": lambda row: _exp(clamped(max(row))),
    }
    tokens, weights, kept, touched = [], [], [], []
    units, raw_means, means = [], [], []
    for row, row_near in zip(xs, near, strict=True):
        if level == "token":
            raw = [_exp(x) for x in row_near]
            units += raw
        else:
            raw = [weight_of[level](row)] * len(row) if row else []
            units += raw[:1]
        own = [_bounded(w, mode, low, high) for w in raw]
        stays = [True] * len(row)
        for name, bound in (reject or {}).items() if row else ():
            if name.startswith("token"):
                stays = [s and _passes(name, bound, [x])
                         for s, x in zip(stays, row_near, strict=True)]  # fmt: skip
            else:
                stays = [s and _passes(name, bound, row_near) for s in stays]
        if veto is not None and row and min(row_near) < math.log(veto):
            stays = [False] * len(row)
        tokens += own
        weights.append(own)
        kept.append(stays)
        if row:
            touched.append(not all(stays))
            raw_means.append(_mean(raw))
            means.append(_mean(own))
    flat, flat_near = [x for row in xs for x in row], [x for row in near for x in row]
    full = [row for row in xs if row]
    factor = 1.0
    if normalize:
        mean = _mean(tokens) if level == "token" else _mean(w[0] for w in weights if w)
        factor = mean if mean > 1e-8 else 1.0

    def spread(rows):
        return [iter(row) for row in rows]

    laid_w, laid_k = spread(weights), spread(kept)
    result, keeps = [], []
    for i, row in enumerate(mask):
        result.append([])
        keeps.append([])
        for m in row:
            w, k = (next(laid_w[i]), next(laid_k[i])) if m else (0.0, False)
            result[-1].append(w / factor if k else 0.0)
            keeps[-1].append(k)
    count_low = low if low is not None else None if high is None else 1 / high
    count_high = high if high is not None else 1 / low if low else None

    def below(values):
        return _mean(count_low is not None and w < count_low for w in values)

    def above(values):
        return _mean(count_high is not None and w > count_high for w in values)

    def of_rows(t):
        return [-_mean(v for v, m in zip(row, keep, strict=True) if m)
                for row, keep in zip(t, mask, strict=True) if any(keep)]  # fmt: skip

    log_old, log_rollout = of_rows(old), of_rows(rollout)
    differences = [-_mean(row) for row in full]
    metrics = {
        "weight_mean": _mean(tokens),
        "weight_std": _deviation(tokens, False),
        "weight_min": min(tokens),
        "weight_max": max(tokens),
        "ess": 0.0 if not any(tokens) else _mean(tokens) ** 2 / _mean(w * w for w in tokens),
        "fraction_low": below(units),
        "fraction_high": above(units),
        "raw_min": min(units),
        "raw_max": max(units),
        "seq_weight_mean": _mean(means),
        "seq_weight_std": _deviation(means, True),
        "seq_weight_min": min(means),
        "seq_weight_max": max(means),
        "seq_max_deviation": max(abs(m - 1) for m in means),
        "seq_fraction_low": below(raw_means),
        "seq_fraction_high": above(raw_means),
        "norm_factor": factor,
        "kl": _mean(-x for x in flat),
        "k3_kl": _mean(_estimate("k3", x) for x in flat_near),
        "chi2_token": _mean(_exp(x) ** 2 - 1 for x in flat_near),
        "chi2_seq": _mean(_exp(clamped(sum(row))) ** 2 - 1 for row in full),
        "training_ppl": _mean(_exp(x) for x in log_old),
        "training_log_ppl": _mean(log_old),
        "rollout_ppl": _mean(_exp(x) for x in log_rollout),
        "rollout_log_ppl": _mean(log_rollout),
        "log_ppl_diff": _mean(differences),
        "log_ppl_abs_diff": _mean(map(abs, differences)),
        "log_ppl_diff_min": min(differences),
        "log_ppl_diff_max": max(differences),
        "ppl_ratio": _mean(_exp(x) for x in differences),
        "rejected": 1 - _mean(k for row in kept for k in row),
        "rejected_sequences": _mean(touched),
        "missing": 0,
        "sequences": len(full),
        "tokens": len(flat),
    }
    assert tuple(metrics) == MISMATCH_METRICS
    return result, keeps, metrics


def packed(args, lengths):
    """Padded (old, rollout, mask) as packed ones of the first `lengths` tokens, and cu_seqlens."""
    inside = torch.arange(args[0].shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    return [t[inside] for t in args], torch.tensor([0, *itertools.accumulate(lengths)]), inside
