"""mismatch_weights: importance weights between the trainer's and the rollout engine's policies."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config.enums import (
    MISSING,
    CorrectionMode,
    MismatchCriterion,
    MismatchLevel,
    MismatchPreset,
    Missing,
)
from ..config.metrics import MISMATCH_METRICS
from ..config.mismatch import PRESETS, Bound, MismatchOptions
from ..core import checks, data_checks, option_checks, tracing
from ..core.layout import constant, fp32_like
from ..kernels import backends
from ..kernels.mismatch import MismatchRules
from ._metrics import Metrics, register_metrics
from ._operator import define
from .mismatch_options import encoded


@define("mismatch_weights")
def _weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    rules: MismatchRules,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = old_logprobs.new_empty(old_logprobs.shape, dtype=torch.bool)
    metrics = old_logprobs.new_empty(len(MISMATCH_METRICS), dtype=torch.float32)
    return fp32_like(old_logprobs), kept, metrics


class MismatchMetrics(Metrics):
    """Metrics of one `mismatch_weights` call, on its device: reading one needs no host sync.

    A mapping of names to 0-d tensors; `as_dict()` copies all of them to the host at once. Weights
    are those within the bounds, before a criterion rejects any and before `normalize`. A sequence
    counts if it has an unmasked token. A unit of the level is a token or a sequence.

    weight_mean, weight_std, weight_min, weight_max: over the unmasked tokens.
    ess: effective sample size per token, mean(w)^2 / mean(w^2).
    fraction_low, fraction_high: of the units, how many are below `low` and above `high` before they
        are bounded; where only one bound is given, the other is its reciprocal.
    raw_min, raw_max: extremes of the units' weights without bounds.
    seq_weight_mean, seq_weight_std, seq_weight_min, seq_weight_max: of the sequences' mean weights;
        the standard deviation is unbiased.
    seq_max_deviation: largest distance of these from 1.
    seq_fraction_low, seq_fraction_high: fraction of sequences whose mean weight without bounds is
        outside them.
    norm_factor: what the weights are divided by; 1 without `normalize`.
    kl, k3_kl: estimates of KL(rollout || old), k1 and k3.
    chi2_token, chi2_seq: mean squared ratio minus 1, of tokens and of whole sequences.
    training_ppl, training_log_ppl, rollout_ppl, rollout_log_ppl: means over sequences of the
        perplexity, and of its logarithm, under the trainer's and the engine's policy.
    log_ppl_diff, log_ppl_abs_diff, log_ppl_diff_min, log_ppl_diff_max: of the sequences'
        differences of log-perplexities, trainer minus engine.
    ppl_ratio: mean of the exponentials of these.
    rejected, rejected_sequences: fraction of the tokens that a criterion rejects, and of the
        sequences with such a token.
    missing: tokens of the mask without a ratio.
    sequences, tokens: how many count.
    """

    _names = MISMATCH_METRICS


register_metrics(MismatchMetrics)


class MismatchWeights(NamedTuple):
    """Result of `mismatch_weights`."""

    weights: Tensor
    mask: Tensor
    metrics: MismatchMetrics


def _check_preset(op: str, preset: MismatchPreset | None) -> MismatchOptions:
    if preset is None:
        return {}
    option_checks.one_of(op, "preset", preset, tuple(PRESETS))
    return PRESETS[preset]


def _check_present(op: str, count: Tensor, old: Tensor, rollout: Tensor, mask: Tensor) -> None:
    """Raises ValueError for the first token of the mask without a ratio; `count` says how many."""
    expected = f"{op}: rollout_logprobs must not be NaN at an unmasked token with missing='raise'"
    if count.is_meta:
        return
    if tracing.active(count):
        torch._assert_async(count == 0, expected)
    elif count != 0:
        bad = (old - rollout).isnan() & ~old.isnan() & (mask != 0)
        raise ValueError(
            f"{expected}; {int(count)} of them have no ratio, the first at flat position "
            f"{int(bad.reshape(-1).nonzero()[0])}"
        )


def mismatch_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    preset: MismatchPreset | None = None,
    level: MismatchLevel | None = None,
    mode: CorrectionMode | None = None,
    low: float | None = None,
    high: float | None = None,
    reject: Mapping[MismatchCriterion, Bound] | None = None,
    veto: float | None = None,
    normalize: bool = False,
    missing: Missing = "raise",
    log_ratio_clamp: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> MismatchWeights:
    """Corrects for the mismatch of trainer and rollout engine: w = exp(old - rollout), bounded.

    Results are detached: a weight changes the measure, not the objective. Multiply the advantages
    by the weights, or pass them on as weights of the loss, with the returned mask.

    Args:
        old_logprobs: the trainer's log-probabilities of the sampled tokens, [B, T], or packed [N]
            with cu_seqlens; float32, bfloat16 or float16. Any strides.
        rollout_logprobs: the engine's, same shape.
        mask: same shape; bool or integer, nonzero = keep, or floating with only 0 and 1. Values of
            masked tokens, even NaN, have no effect.
        preset: options by name, for which None in `level`, `mode`, `low`, `high`, `reject` and
            `log_ratio_clamp` stands. "tis": token, truncated at 2. "icepop": token, masked outside
            [0.5, 5]. "mis": sequence, masked above 2. "seq-mask-tis": token, of the sequences whose
            geometric mean is in [0.5, 5]. verl's, whose log-ratios are clamped to +-20:
            "verl-token-is", "verl-token-icepop", "verl-seq-is", "verl-seq-is-rs", "verl-geo-rs",
            "verl-k3-rs".
        level: what has a weight of its own. "token": a token's ratio. Or one weight for a sequence:
            "sequence" the product of its ratios, "geometric" their geometric mean, "sequence-mean"
            their mean, "sequence-max" the largest. None: all weights are 1.
        mode: "truncate" (default): clamp weights to [low, high]. "mask": 0 outside.
        low: lower bound >= 0 of a weight, or None.
        high: upper bound > 0 of a weight, or None.
        reject: criterion -> bound. Tokens or sequences outside have weight 0 and leave the mask.
            A criterion is a scope, "token", "seq_sum", "seq_mean" or "seq_max", and an estimator
            with x = old - rollout: "_k1" (-x), "_k2" (x^2 / 2), "_k3" (exp(x) - 1 - x) or "_ratio"
            (x). k2 and k3 take the largest value that passes. k1 and ratio are logarithms: their
            bounds are ratios, (low, high) with None for an absent one, or u for (1 / u, u); of
            seq_max, u for the largest alone. All criteria must pass.
        veto: reject a whole sequence if the ratio of one of its tokens is below this.
        normalize: divide the weights by their mean over the batch before rejection (over sequences
            where a weight is one's), unless that is at most 1e-8. The only option with which a
            weight depends on other sequences.
        missing: what a token means whose rollout log-probability is NaN, or -inf as the old one
            is. "raise": ValueError, on a GPU by a host sync. "one": ratio 1. "drop": not in the
            mask. NaN in old_logprobs stays NaN.
        log_ratio_clamp: clamp the logarithm of a token's ratio, and of a sequence's weight, to
            +-this; None for no clamp. A sequence's own sum is of unclamped tokens, as in verl.
            Without it a ratio overflows to inf, which `high` truncates or masks.
        cu_seqlens: offsets [S + 1] of packed sequences, int32 or int64.

    Returns:
        MismatchWeights(weights, mask, metrics): float32 and bool in the shape of old_logprobs, and
        MismatchMetrics. Weights are exactly 0 where the returned mask is false. The mask keeps
        tokens whose weight mode="mask" sets to 0. Without unmasked tokens all metrics are 0, but
        norm_factor is 1.

    Raises:
        TypeError: wrong dtype or type of an argument; a floating mask with values besides 0 and 1.
        ValueError: shapes or devices that do not match; bad options or cu_seqlens; missing ratios.
    """
    op = "mismatch_weights"
    plain = checks.plain("ffm", old_logprobs, rollout_logprobs, mask)
    if not plain or cu_seqlens is not None or old_logprobs.dim() != 2:
        # A loss may be without them; weights are not.
        checks.floating(op, "rollout_logprobs", rollout_logprobs, double=True)
        tokens = {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs}
        mask = checks.token_inputs(op, tokens, mask, cu_seqlens)
    of = _check_preset(op, preset)
    level_code, mode_code, params = encoded(
        op,
        of.get("level") if level is None else level,
        of.get("mode", "truncate") if mode is None else mode,
        of.get("low") if low is None else low,
        of.get("high") if high is None else high,
        of.get("reject") if reject is None else reject,
        veto,
        of.get("log_ratio_clamp") if log_ratio_clamp is None else log_ratio_clamp,
    )
    option_checks.one_of(op, "missing", missing, MISSING)
    normalize = option_checks.flag(op, "normalize", normalize)
    rules = MismatchRules(level_code, mode_code, missing == "drop", normalize, params)
    old, rollout = constant(old_logprobs), constant(rollout_logprobs)

    backend = backends.select(op, old.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, old.shape[0])
        with torch.no_grad():
            weights, kept, metrics = reference.mismatch_weights(
                old, rollout, mask, cu_seqlens=cu_seqlens, **rules._asdict()
            )
    else:
        if not plain:
            checks.not_double(op, old_logprobs=old, rollout_logprobs=rollout)
        weights, kept, metrics = _weights(old, rollout, mask, cu_seqlens, rules, backend)
    found = MismatchMetrics(metrics)
    if missing == "raise":
        _check_present(op, found["missing"], old, rollout, mask)
    return MismatchWeights(weights, kept, found)
