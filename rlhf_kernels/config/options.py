"""PolicyLossOptions: the fields of PolicyLossConfig as a dictionary, with their types."""

from typing import TypedDict

from .enums import (
    Aggregation,
    CorrectionLevel,
    CorrectionMode,
    Gate,
    GateAnchor,
    KlEstimator,
    KlWeight,
    Objective,
    RatioLevel,
)

#: Bounds of a clamp: c or (low, high); None for no clamp.
Clamp = float | tuple[float, float] | None


class CommonOptions(TypedDict, total=False):
    """The fields that share no name with an argument of any trainer preset."""

    objective: Objective
    ratio_level: RatioLevel
    clip_low: float | None
    clip_high: float | None
    clip_absolute: bool
    penalty_coef: float
    kl_coef: float
    kl_input_clamp: Clamp
    kl_value_clamp: float | None
    kl_weight: KlWeight | None
    kl_weight_max: float | None
    correction_level: CorrectionLevel | None
    correction_mode: CorrectionMode
    correction_min: float | None
    correction_max: float | None
    gate: Gate | None
    gate_low: float | None
    gate_high: float | None
    gate_against: GateAnchor
    gate_two_sided: bool
    log_ratio_clamp: Clamp
    aggregation: Aggregation
    normalizer: float | None


class PolicyLossOptions(CommonOptions, total=False):
    """All fields, as keyword arguments of the presets of PolicyLossConfig."""

    dual_clip: float | None
    delta: float | None
    sapo_tau_pos: float
    sapo_tau_neg: float
    kl_estimator: KlEstimator
    entropy_coef: float
