"""The options of a PolicyLossConfig, and how operators and kernels take them: as numbers."""

import dataclasses
import math

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
from .options import Clamp
from .policy_codes import LOG_RATIO_BOUND, UNBOUNDED, PolicyCodes, PolicyParams


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _bounds(clamp: Clamp) -> tuple[float, float]:
    """(low, high) of a clamp: None means no clamp, c means (-c, c)."""
    if clamp is None:
        return -math.inf, math.inf
    return clamp if isinstance(clamp, tuple) else (-clamp, clamp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFields:
    """The options of a PolicyLossConfig, which explains and checks them."""

    objective: Objective = "clip"
    ratio_level: RatioLevel = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    clip_absolute: bool = False
    dual_clip: float | None = None
    delta: float | None = None
    penalty_coef: float = 0.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_input_clamp: Clamp = None
    kl_value_clamp: float | None = None
    kl_weight: KlWeight | None = None
    kl_weight_max: float | None = None
    entropy_coef: float = 0.0
    correction_level: CorrectionLevel | None = None
    correction_mode: CorrectionMode = "truncate"
    correction_min: float | None = None
    correction_max: float | None = None
    gate: Gate | None = None
    gate_low: float | None = None
    gate_high: float | None = None
    gate_against: GateAnchor = "old"
    gate_two_sided: bool = False
    log_ratio_clamp: Clamp = 20.0
    aggregation: Aggregation = "token-mean"
    normalizer: float | None = None

    def clip_bounds(self) -> tuple[float, float]:
        """(low, high) of the clipped ratio; -inf and inf where there is no bound."""
        low = -math.inf if self.clip_low is None else self.clip_low
        high = math.inf if self.clip_high is None else self.clip_high
        if self.clip_absolute:
            return low, high
        return (1 - low if self.clip_low is not None else low, 1 + high)

    def log_ratio_bounds(self) -> tuple[float, float]:
        """(low, high) of the log-ratio, within the saturation at +-LOG_RATIO_BOUND."""
        low, high = _bounds(self.log_ratio_clamp)
        return max(low, -LOG_RATIO_BOUND), min(high, LOG_RATIO_BOUND)

    def kl_input_bounds(self) -> tuple[float, float]:
        """(low, high) of logprob - ref."""
        return _bounds(self.kl_input_clamp)

    def correction_bounds(self) -> tuple[float, float]:
        """(low, high) of the correction weight."""
        low = 0.0 if self.correction_min is None else self.correction_min
        return low, math.inf if self.correction_max is None else self.correction_max

    def gate_bounds(self) -> tuple[float, float]:
        """(low, high) of what the gate compares; see `PolicyParams`."""
        low, high = self.gate_low, self.gate_high
        if self.gate == "ratio":
            return -math.inf if low is None else _log(low), math.inf if high is None else _log(high)
        upper = math.inf if high is None else high
        if self.gate == "opsm":
            return -math.inf if low is None else low, math.inf
        if self.gate == "binary_kl":
            return math.inf if low is None else low, upper
        return -math.inf if low is None else -low, upper


def clips_tokens(config: PolicyFields) -> bool:
    """Whether the clip is of each token's log-ratio, before the mean over its sequence."""
    return config.ratio_level == "clipped-sequence"


def codes_of(config: PolicyFields) -> PolicyCodes:
    """The choices of a configuration."""
    # Behind the clip of tokens the objective is -A s: the penalty's, with coefficient 0.
    objective: Objective = "penalty" if clips_tokens(config) else config.objective
    return PolicyCodes(
        objective=OBJECTIVES.index(objective),
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


def params_of(config: PolicyFields) -> PolicyParams:
    """The numbers of a configuration, all of them finite."""
    clip_low, clip_high = config.clip_bounds()
    if clips_tokens(config):
        clip_low, clip_high = _log(clip_low), _log(clip_high)
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
