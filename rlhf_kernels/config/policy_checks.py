"""What a PolicyLossConfig may be: each option's values, and which options go together."""

import math

from .enums import (
    AGGREGATIONS,
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    GATE_ANCHORS,
    GATES,
    KL_ESTIMATORS,
    KL_WEIGHTS,
    OBJECTIVES,
    RATIO_LEVELS,
)
from .policy_codes import UNBOUNDED
from .policy_fields import PolicyFields, clips_tokens


def _bounded(value: float) -> float:
    """The value; one that exceeds int64 becomes a float within +-UNBOUNDED (infinities stay)."""
    if abs(value) >= 2**63:
        return float(min(max(value, -UNBOUNDED), UNBOUNDED)) if abs(value) < math.inf else value
    return value


def values(config: PolicyFields) -> None:
    """Raises ValueError for the first bad value. Numbers beyond int64 become floats."""
    for name, allowed in (
        ("objective", OBJECTIVES),
        ("ratio_level", RATIO_LEVELS),
        ("kl_estimator", KL_ESTIMATORS),
        ("correction_mode", CORRECTION_MODES),
        ("gate_against", GATE_ANCHORS),
        ("aggregation", AGGREGATIONS),
    ):
        if getattr(config, name) not in allowed:
            _fail(config, name, f"one of {', '.join(allowed)}")
    if config.correction_level is not None and config.correction_level not in CORRECTION_LEVELS:
        _fail(config, "correction_level", f"None or one of {', '.join(CORRECTION_LEVELS)}")
    if config.gate is not None and config.gate not in GATES:
        _fail(config, "gate", f"None or one of {', '.join(GATES)}")
    if config.kl_weight is not None and config.kl_weight not in KL_WEIGHTS:
        _fail(config, "kl_weight", f"None or one of {', '.join(KL_WEIGHTS)}")
    for name in ("clip_absolute", "gate_two_sided"):
        if not isinstance(getattr(config, name), bool):
            _fail(config, name, "a bool")
    for name in ("clip_low", "clip_high", "correction_min", "gate_low", "gate_high"):
        _number(config, name, optional=True)
    for name in ("penalty_coef", "kl_coef", "entropy_coef"):
        _number(config, name)
    for name in ("dual_clip", "delta"):
        _number(config, name, above=1.0, optional=True)
    for name in ("kl_value_clamp", "kl_weight_max", "correction_max", "normalizer"):
        _number(config, name, above=0.0, optional=True)
    for name in ("sapo_tau_pos", "sapo_tau_neg"):
        _number(config, name, above=0.0)
    for name in ("kl_input_clamp", "log_ratio_clamp"):
        _clamp(config, name)


def combinations(config: PolicyFields) -> None:
    """Raises ValueError for the first option that another one forbids."""
    low, high = config.clip_bounds()
    if config.clip_low is not None and low < 0:
        _fail(config, "clip_low", "at most 1, since 1 - clip_low is a ratio")
    if low > high:
        _fail(config, "clip_low", f"a bound not above that of clip_high, {high}")
    if config.objective != "clip":
        for name in ("dual_clip", "delta"):
            if getattr(config, name) is not None:
                _fail(config, name, f"None: the objective {config.objective!r} has no such bound")
    if config.delta is not None and config.delta <= high:
        _fail(config, "delta", f"above the upper clip bound, {high}")
    if config.objective != "penalty" and config.penalty_coef != 0:
        _fail(config, "penalty_coef", f"0 with the objective {config.objective!r}")
    if config.objective == "reinforce" and config.ratio_level != "token":
        _fail(config, "ratio_level", "token: the objective 'reinforce' has no ratio")
    if clips_tokens(config):
        if config.objective != "clip":
            _fail(config, "objective", "'clip' with the ratio_level 'clipped-sequence'")
        for name in ("dual_clip", "delta"):
            if getattr(config, name) is not None:
                _fail(config, name, "None with the ratio_level 'clipped-sequence'")
        if low > 1:
            _fail(config, "clip_low", "at most 1, a ratio, with the ratio_level 'clipped-sequence'")
        if high < 1:
            _fail(config, "clip_high", "at least 1, a ratio, with that ratio_level")
    low_cap, high_cap = config.correction_min, config.correction_max
    capped = low_cap is not None or high_cap is not None
    if config.correction_level is None and capped:
        _fail(config, "correction_level", "a level where a correction cap is given")
    if config.correction_level is not None and not capped:
        _fail(config, "correction_max", "a number, or correction_min, with a correction_level")
    if low_cap is not None and high_cap is not None and low_cap > high_cap:
        _fail(config, "correction_min", f"at most correction_max, {config.correction_max}")
    if config.kl_weight_max is not None and config.kl_weight not in ("ratio", "detached-ratio"):
        _fail(config, "kl_weight_max", "None where kl_weight is no ratio")
    _gate(config)


def _gate(config: PolicyFields) -> None:
    low, high = config.gate_low, config.gate_high
    bounded = low is not None or high is not None
    if config.gate is None:
        if bounded:
            _fail(config, "gate", f"one of {', '.join(GATES)} where a gate bound is given")
        if config.gate_against != "old":
            _fail(config, "gate_against", "'old' without a gate")
    elif config.gate == "opsm":
        if low is None:
            _fail(config, "gate_low", "a number with the gate 'opsm'")
        if high is not None:
            _fail(config, "gate_high", "None with the gate 'opsm'")
    elif not bounded:
        _fail(config, "gate_high", "a number, or gate_low, with a gate")
    if config.gate_two_sided and config.gate not in ("tv", "binary_kl"):
        _fail(config, "gate_two_sided", "False, but with the gate 'tv' or 'binary_kl'")
    if config.gate == "ratio" and low is not None and high is not None and low > high:
        _fail(config, "gate_low", f"at most gate_high, {high}")


def _fail(config: PolicyFields, name: str, expected: str) -> None:
    value = getattr(config, name)
    # Python refuses to print very long integers.
    long = isinstance(value, int) and value.bit_length() > 128
    got = f"an integer of {value.bit_length()} bits" if long else repr(value)
    raise ValueError(f"PolicyLossConfig: {name} must be {expected}, got {got}")


def _number(
    config: PolicyFields, name: str, *, above: float | None = None, optional: bool = False
) -> None:
    value = getattr(config, name)
    if value is None and optional:
        return
    limit = "a finite number " + (">= 0" if above is None else f"> {above:g}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # math.isfinite would overflow on an integer too long for a double.
    finite = number and abs(value) < math.inf
    if finite and isinstance(value, int):
        finite = value.bit_length() <= 1023
    if not finite:
        _fail(config, name, limit + (" or None" if optional else ""))
    if (value < 0) if above is None else (value <= above):
        _fail(config, name, limit + (" or None" if optional else ""))
    if name != "normalizer":
        object.__setattr__(config, name, _bounded(value))


def _clamp(config: PolicyFields, name: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    pair = value if isinstance(value, tuple) else (0, value)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in pair)
    if not (numbers and len(pair) == 2 and pair[0] <= 0 < pair[1]):
        _fail(config, name, "None, a number > 0 or a tuple (low <= 0, high > 0)")
    bounded = tuple(_bounded(v) for v in pair)
    object.__setattr__(config, name, bounded if value is pair else bounded[1])
