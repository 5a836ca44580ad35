"""The options of mismatch_weights: presets, checks, and the numbers that kernels take."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from ..core import option_checks
from .enums import (
    CORRECTION_MODES,
    MISMATCH_CODES,
    MISMATCH_LEVELS,
    CorrectionMode,
    MismatchLevel,
)
from .policy import LOG_WEIGHT_BOUND, UNBOUNDED

#: Bound of a criterion: a number u, or (low, high) with None for an absent one.
Bound = float | tuple[float | None, float | None]

_SCOPES = ("token", "seq_sum", "seq_mean", "seq_max")
_RATIOS, _DIVERGENCES = ("ratio", "k1"), ("k2", "k3")
#: Names of the criteria of `reject`: a scope and an estimator, as verl writes them.
CRITERIA = tuple(f"{scope}_{of}" for scope in _SCOPES for of in (*_RATIOS, *_DIVERGENCES))
#: Where verl clamps logarithms of ratios.
_VERL_CLAMP = 20.0


class MismatchOptions(TypedDict, total=False):
    """The options that a preset of mismatch_weights sets."""

    level: MismatchLevel | None
    mode: CorrectionMode
    low: float
    high: float
    reject: Mapping[str, Bound]
    log_ratio_clamp: float


_TIS: MismatchOptions = {"level": "token", "mode": "truncate", "high": 2.0}
_ICEPOP: MismatchOptions = {"level": "token", "mode": "mask", "low": 0.5, "high": 5.0}
_SEQUENCE_TIS: MismatchOptions = {"level": "sequence", "mode": "truncate", "high": 2.0}
_OF_VERL: MismatchOptions = {"log_ratio_clamp": _VERL_CLAMP}

#: Preset -> its options. Those of verl are its RolloutCorrectionConfig's, with its clamp.
PRESETS: dict[str, MismatchOptions] = {
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
    """The numbers of a call, those of csrc/abi.h: MismatchParams in its order.

    Every criterion is an interval: of a token's log-ratio, of the smallest and largest of a
    sequence, and of its sums and means. An absent bound is +-UNBOUNDED.
    """

    #: Log-ratios are clamped to +-clamp.
    clamp: float
    low: float
    high: float
    log_low: float
    log_high: float
    #: Beyond these a weight counts for the fractions of the metrics.
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


def _log(bound: float | None, absent: float) -> float:
    return absent if bound is None or bound == 0 else math.log(bound)


def _k3_root(limit: float, x: float) -> float:
    """The x with exp(x) - 1 - x = limit, by Newton's method from outside, where it is convex."""
    for _ in range(200):
        slope = math.expm1(x)
        nearer = x - (slope - x - limit) / slope
        if nearer == x or abs(nearer) >= abs(x):
            break
        x = nearer
    return x


def _log_ratios(op: str, name: str, bound: Any) -> tuple[float, float]:
    """The log-ratios that a bound on a ratio or on k1 = -log ratio lets pass, as verl reads it."""
    of_k1, largest = name.endswith("k1"), name.startswith("seq_max")
    where = f"reject[{name!r}]"
    if isinstance(bound, Sequence) and not isinstance(bound, str):
        if largest or len(bound) != 2:
            expected = "one number, of the largest" if largest else "a number or (low, high)"
            raise ValueError(f"{op}: {where} must be {expected}, got {tuple(bound)}")
        low, high = (None if b is None else option_checks.positive(op, where, b) for b in bound)
        if low is not None and high is not None and low > high:
            raise ValueError(f"{op}: {where} must have low <= high, got {tuple(bound)}")
    else:
        high = option_checks.positive(op, where, bound)
        low = None if largest else 1 / high
        if low is not None and low > high:
            raise ValueError(f"{op}: {where} must be >= 1, or (low, high), got {bound}")
    lowest, highest = _log(low, -UNBOUNDED), _log(high, UNBOUNDED)
    return (-highest, -lowest) if of_k1 else (lowest, highest)


def _criterion(op: str, name: str, bound: Any) -> tuple[str, float, float]:
    """(field of MismatchParams without "_low" and "_high", smallest, largest that passes)."""
    if name not in CRITERIA:
        raise ValueError(f"{op}: reject must name criteria of {', '.join(CRITERIA)}, got {name!r}")
    scope, _, estimator = name.rpartition("_")
    field = {"token": "token", "seq_max": "extreme"}.get(scope, scope.removeprefix("seq_"))
    if estimator in _RATIOS:
        return field, *_log_ratios(op, name, bound)
    limit = option_checks.positive(op, f"reject[{name!r}]", bound)
    if field in ("sum", "mean"):
        return f"{field}_{estimator}", 0.0, limit
    if estimator == "k2":
        return field, -math.sqrt(2 * limit), math.sqrt(2 * limit)
    above = min(math.sqrt(2 * limit), 2 * math.log1p(limit) + 2)
    return field, _k3_root(limit, -1 - limit), _k3_root(limit, above)


def encoded(
    op: str,
    level: MismatchLevel | None,
    mode: CorrectionMode,
    low: float | None,
    high: float | None,
    reject: Mapping[str, Bound] | None,
    veto: float | None,
    log_ratio_clamp: float | None,
) -> tuple[int, int, MismatchParams]:
    """(position of level in MISMATCH_CODES, of mode in CORRECTION_MODES, numbers).

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an unknown name or a bad number.
    """
    if level is not None:
        option_checks.one_of(op, "level", level, MISMATCH_LEVELS)
    option_checks.one_of(op, "mode", mode, CORRECTION_MODES)
    low = None if low is None else option_checks.non_negative(op, "low", low)
    high = None if high is None else option_checks.positive(op, "high", high)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{op}: low must be <= high, got {low} and {high}")
    if level is None and (low is not None or high is not None):
        raise ValueError(f"{op}: low and high bound weights; with level=None there are none")
    clamp = LOG_WEIGHT_BOUND
    if log_ratio_clamp is not None:
        clamp = min(clamp, option_checks.positive(op, "log_ratio_clamp", log_ratio_clamp))
    # verl's thresholds: where there is one bound, the other is its reciprocal.
    count_low = low if low is not None else None if high is None else 1 / high
    count_high = high if high is not None else 1 / low if low else None
    bounds = {
        "clamp": clamp,
        "low": -UNBOUNDED if low is None else low,
        "high": UNBOUNDED if high is None else high,
        "log_low": _log(low, -UNBOUNDED),
        "log_high": _log(high, UNBOUNDED),
        "count_low": -UNBOUNDED if count_low is None else count_low,
        "count_high": UNBOUNDED if count_high is None else count_high,
        "count_log_low": _log(count_low, -UNBOUNDED),
        "count_log_high": _log(count_high, UNBOUNDED),
    }
    passing = {
        name: UNBOUNDED if name.endswith(("high", "k2", "k3")) else -UNBOUNDED
        for name in MismatchParams._fields[len(bounds) :]
    }
    if veto is not None:
        passing["extreme_low"] = math.log(option_checks.positive(op, "veto", veto))
    if reject is not None and not isinstance(reject, Mapping):
        raise TypeError(f"{op}: reject must map criteria to bounds, got {type(reject).__name__}")
    for name, bound in (reject or {}).items():
        field, lowest, highest = _criterion(op, name, bound)
        if field in passing:
            passing[field] = min(passing[field], highest)
            continue
        passing[f"{field}_low"] = max(passing[f"{field}_low"], lowest)
        passing[f"{field}_high"] = min(passing[f"{field}_high"], highest)
    numbers = {name: float(value) for name, value in (bounds | passing).items()}
    return MISMATCH_CODES.index(level), CORRECTION_MODES.index(mode), MismatchParams(**numbers)
