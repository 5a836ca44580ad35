"""The numbers that operators and kernels take for a PolicyLossConfig."""

from typing import NamedTuple

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

    #: Bounds of the ratio; with the ratio of "clipped-sequence" of the log-ratio.
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
    #: Bounds of what the gate compares: p - q ("tv"), the divergence ("binary_kl"), log(p / q)
    #: ("ratio") or a sequence's mean of log(q / p) ("opsm").
    gate_low: float
    gate_high: float
    kl_weight_max: float
