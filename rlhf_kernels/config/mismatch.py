"""The options of mismatch_weights: criteria, presets, and the numbers that kernels take."""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict, get_args

from .enums import CorrectionMode, MismatchCriterion, MismatchLevel, MismatchPreset

#: Bound of a criterion: a number u, or (low, high) with None for an absent one.
Bound = float | tuple[float | None, float | None]

#: Names of the criteria of `reject`.
CRITERIA: tuple[MismatchCriterion, ...] = get_args(MismatchCriterion)
#: The estimators whose criteria bound a ratio from both sides.
RATIOS = ("ratio", "k1")
#: Where verl clamps logarithms of ratios.
_VERL_CLAMP = 20.0


class MismatchOptions(TypedDict, total=False):
    """The options that a preset of mismatch_weights sets."""

    level: MismatchLevel | None
    mode: CorrectionMode
    low: float
    high: float
    reject: Mapping[MismatchCriterion, Bound]
    log_ratio_clamp: float


_TIS: MismatchOptions = {"level": "token", "mode": "truncate", "high": 2.0}
_ICEPOP: MismatchOptions = {"level": "token", "mode": "mask", "low": 0.5, "high": 5.0}
_SEQUENCE_TIS: MismatchOptions = {"level": "sequence", "mode": "truncate", "high": 2.0}
_OF_VERL: MismatchOptions = {"log_ratio_clamp": _VERL_CLAMP}

#: Preset -> its options. Those of verl are its RolloutCorrectionConfig's, with its clamp.
PRESETS: dict[MismatchPreset, MismatchOptions] = {
    "tis": _TIS,
    "icepop": _ICEPOP,
    "mis": {"level": "sequence", "mode": "mask", "high": 2.0},
    "seq-mask-tis": {"level": "token", "reject": {"seq_mean_ratio": (0.5, 5.0)}},
    "verl-token-is": {**_TIS, **_OF_VERL},
    "verl-token-icepop": {**_ICEPOP, **_OF_VERL},
    "verl-seq-is": {**_SEQUENCE_TIS, **_OF_VERL},
    "verl-seq-is-rs": {**_SEQUENCE_TIS, "reject": {"seq_sum_k1": (0.5, 2.0)}, **_OF_VERL},
    "verl-geo-rs": {"level": None, "reject": {"seq_mean_k1": (0.999, 1.001)}, **_OF_VERL},
    "verl-k3-rs": {"level": None, "reject": {"seq_mean_k3": 0.01}, **_OF_VERL},
}


class MismatchParams(NamedTuple):
    """The numbers of a call, those of csrc/abi_losses.h: MismatchParams in its order.

    Every criterion is an interval: of a token's log-ratio, of the smallest and largest of a
    sequence, and of its sums and means. An absent bound is +-UNBOUNDED.
    """

    #: Log-ratios are clamped to +-clamp.
    clamp: float
    low: float
    high: float
    log_low: float
    log_high: float
    #: The metrics' fractions count weights beyond these.
    count_low: float
    count_high: float
    count_log_low: float
    count_log_high: float
    token_low: float
    token_high: float
    extreme_low: float
    extreme_high: float
    sum_low: float
    sum_high: float
    mean_low: float
    mean_high: float
    sum_k2: float
    mean_k2: float
    sum_k3: float
    mean_k3: float
