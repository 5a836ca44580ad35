"""Shared by the native and Triton launchers of mismatch_weights: options, results, their checks."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..config.metrics import MISMATCH_METRICS
from ..config.mismatch import MismatchParams
from ..core import data_checks
from ..core.layout import fp32_like
from . import losses
from .rows import Maybe

#: Weights and kept tokens in the shape of the tokens, and metrics.
Results = tuple[Tensor, Tensor, Tensor]


class MismatchRules(NamedTuple):
    """The options of a call as kernels take them.

    level, mode: positions in MISMATCH_CODES and CORRECTION_MODES.
    drop: a token without a ratio leaves the mask; else its ratio is 1.
    normalize: divide the weights by their mean.
    """

    level: int
    mode: int
    drop: bool
    normalize: bool
    params: MismatchParams


class Launchers(TypedDict, total=False):
    """By operator name."""

    mismatch_weights: Callable[[Tensor, Tensor, Tensor, Maybe, MismatchRules], Results]


_Judge = Callable[[Tensor, Tensor, Tensor, Maybe, MismatchRules, Tensor, Tensor, Tensor], None]


def _of_none(results: Results, cu_seqlens: Tensor | None) -> bool:
    """Fills the results where there is no sequence to judge; whether that is so.

    Tokens in no sequence have NaN for weights: the host knows that the offsets are bad.
    """
    weights, kept, metrics = results
    if weights.numel() > 0 and (cu_seqlens is None or cu_seqlens.shape[0] > 1):
        return False
    weights.fill_(float("nan"))
    kept.fill_(True)
    metrics.fill_(0.0 if weights.numel() == 0 else float("nan"))
    if weights.numel() == 0:
        metrics[MISMATCH_METRICS.index("norm_factor")] = 1.0
    return True


def launchers(judge: _Judge, on_device: bool) -> Launchers:
    """The launcher from the function of a backend that launches its kernel.

    `judge` takes the launcher's arguments and writes its last ones: weights, kept tokens, metrics.
    A kernel on the host validates the offsets itself, so it must run wherever there are tokens.
    """

    def mismatch_weights(
        old: Tensor,
        rollout: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        rules: MismatchRules,
    ) -> Results:
        weights = fp32_like(old)
        kept = torch.empty_like(weights, dtype=torch.bool)
        results = (weights, kept, weights.new_empty(len(MISMATCH_METRICS)))
        if on_device:
            losses.check_offsets("mismatch_weights", cu_seqlens, old.shape[0])
        elif old.numel() == 0:
            data_checks.offsets_valid("mismatch_weights", cu_seqlens, 0)
        if (on_device or old.numel() == 0) and _of_none(results, cu_seqlens):
            return results
        judge(old, rollout, mask, cu_seqlens, rules, *results)
        return results

    return {"mismatch_weights": mismatch_weights}
