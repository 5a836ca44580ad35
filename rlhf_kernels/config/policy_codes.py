"""A PolicyLossConfig as numbers: how operators and kernels take its options."""

import math
from typing import Any, NamedTuple

from .enums import (
    AGGREGATIONS,
    CORRECTION_CODES,
    CORRECTION_MODES,
    GATE_ANCHORS,
    GATE_CODES,
    KL_WEIGHT_CODES,
    OBJECTIVES,
    PLAIN_KL_ESTIMATORS,
    RATIO_LEVELS,
)

#: Every log-ratio is clamped to +-40 before exp(), whatever the options. Products of larger ratios
#: would overflow fp32, and inf times an advantage of 0 is NaN.
LOG_RATIO_BOUND = 40.0

#: Log-ratios of old and rollout are clamped to +-this, so that infinities of both signs may be
#: summed.
LOG_WEIGHT_BOUND = 1e30

#: Stands for an absent upper bound; -UNBOUNDED stands for an absent lower bound.
UNBOUNDED = 3.0e38


class PolicyCodes(NamedTuple):
    """The choices of a PolicyLossConfig as integers: positions in the tuples of config/enums.py.

    The operators take them as an int[] in this order, that of csrc/abi_losses.h: PolicyCodes.
    """

    objective: int
    ratio_level: int
    #: Position in PLAIN_KL_ESTIMATORS, ignoring a "+".
    kl_estimator: int
    #: 1 for an estimator with "+", which has the gradient of k2.
    kl_straight_through: int
    #: Position in KL_WEIGHT_CODES.
    kl_weight: int
    #: Position in CORRECTION_CODES.
    correction_level: int
    correction_mode: int
    aggregation: int
    gate: int
    gate_against: int
    gate_two_sided: int
    kl_weight_capped: int


class PolicyParams(NamedTuple):
    """The numbers of a PolicyLossConfig. An absent upper bound is UNBOUNDED, a lower -UNBOUNDED.

    The operators take them as a float[] in this order, that of csrc/abi_losses.h: PolicyParams.
    """

    clip_low: float
    clip_high: float
    dual_clip: float
    delta: float
    log_ratio_low: float
    log_ratio_high: float
    penalty_coef: float
    sapo_tau_pos: float
    sapo_tau_neg: float
    kl_coef: float
    kl_input_low: float
    kl_input_high: float
    kl_value_clamp: float
    entropy_coef: float
    correction_low: float
    correction_high: float
    #: Of p - q, of the divergence, of the log-ratio, or of the mean of its negative.
    gate_low: float
    gate_high: float
    kl_weight_max: float


def codes_of(config: Any) -> PolicyCodes:
    """The choices of a configuration."""
    return PolicyCodes(
        objective=OBJECTIVES.index(config.objective),
        ratio_level=RATIO_LEVELS.index(config.ratio_level),
        kl_estimator=PLAIN_KL_ESTIMATORS.index(config.kl_estimator.removesuffix("+")),
        kl_straight_through=int(config.kl_estimator.endswith("+")),
        kl_weight=KL_WEIGHT_CODES.index(config.kl_weight),
        correction_level=CORRECTION_CODES.index(config.correction_level),
        correction_mode=CORRECTION_MODES.index(config.correction_mode),
        aggregation=AGGREGATIONS.index(config.aggregation),
        gate=GATE_CODES.index(config.gate),
        gate_against=GATE_ANCHORS.index(config.gate_against),
        gate_two_sided=int(config.gate_two_sided),
        kl_weight_capped=int(config.kl_weight_max is not None),
    )


def params_of(config: Any) -> PolicyParams:
    """The numbers of a configuration, all of them finite."""
    clip_low, clip_high = config.clip_bounds()
    log_ratio_low, log_ratio_high = config.log_ratio_bounds()
    kl_input_low, kl_input_high = config.kl_input_bounds()
    correction_low, correction_high = config.correction_bounds()
    gate_low, gate_high = config.gate_bounds()
    params = PolicyParams(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=math.inf if config.dual_clip is None else config.dual_clip,
        delta=math.inf if config.delta is None else config.delta,
        log_ratio_low=log_ratio_low,
        log_ratio_high=log_ratio_high,
        penalty_coef=config.penalty_coef,
        sapo_tau_pos=config.sapo_tau_pos,
        sapo_tau_neg=config.sapo_tau_neg,
        kl_coef=config.kl_coef,
        kl_input_low=kl_input_low,
        kl_input_high=kl_input_high,
        kl_value_clamp=math.inf if config.kl_value_clamp is None else config.kl_value_clamp,
        entropy_coef=config.entropy_coef,
        correction_low=correction_low,
        correction_high=correction_high,
        gate_low=gate_low,
        gate_high=gate_high,
        kl_weight_max=math.inf if config.kl_weight_max is None else config.kl_weight_max,
    )
    # Finite bounds: a bound times an advantage of 0 must be 0, not NaN.
    return PolicyParams(*(float(min(max(v, -UNBOUNDED), UNBOUNDED)) for v in params))
