"""Options of mismatch_weights, checked, as the numbers that kernels take."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.enums import (
    CORRECTION_MODES,
    MISMATCH_CODES,
    MISMATCH_LEVELS,
    CorrectionMode,
    MismatchCriterion,
    MismatchLevel,
)
from ..config.mismatch import CRITERIA, RATIOS, Bound, MismatchParams
from ..config.policy_codes import LOG_WEIGHT_BOUND, UNBOUNDED
from ..core import option_checks


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
    if estimator in RATIOS:
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
    reject: Mapping[MismatchCriterion, Bound] | None,
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
        raise TypeError(
            f"{op}: reject must map criteria to bounds, got {option_checks.shown(reject)}"
        )
    for name, bound in (reject or {}).items():
        field, lowest, highest = _criterion(op, name, bound)
        if field in passing:
            passing[field] = min(passing[field], highest)
            continue
        passing[f"{field}_low"] = max(passing[f"{field}_low"], lowest)
        passing[f"{field}_high"] = min(passing[f"{field}_high"], highest)
    numbers = {name: float(value) for name, value in (bounds | passing).items()}
    return MISMATCH_CODES.index(level), CORRECTION_MODES.index(mode), MismatchParams(**numbers)
