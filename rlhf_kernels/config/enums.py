"""The names that options choose from: a type for annotations and a tuple for checks of each.

Where native code takes a choice as an integer, that is the position in the tuple, and csrc/abi.h
has an enum of the same names in the same order.
"""

from typing import Literal, get_args

#: Estimators of a KL divergence from x = logprob - ref_logprob.
PlainKlEstimator = Literal["k1", "k2", "k3", "abs"]
PLAIN_KL_ESTIMATORS: tuple[PlainKlEstimator, ...] = get_args(PlainKlEstimator)

#: The same, and with "+" those whose gradient is that of k2.
KlEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)

#: Of kl_divergence: KL(policy || ref) or KL(ref || policy).
Direction = Literal["reverse", "forward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

Objective = Literal["clip", "penalty", "reinforce", "cispo", "sapo"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

RatioLevel = Literal["token", "sequence", "sequence-token"]
RATIO_LEVELS: tuple[RatioLevel, ...] = get_args(RatioLevel)

#: No correction is None.
CorrectionLevel = Literal["token", "sequence"]
CORRECTION_LEVELS: tuple[CorrectionLevel, ...] = get_args(CorrectionLevel)
#: Of these, the position is the integer: no correction is 0.
CORRECTION_CODES: tuple[CorrectionLevel | None, ...] = (None, *CORRECTION_LEVELS)

CorrectionMode = Literal["truncate", "mask"]
CORRECTION_MODES: tuple[CorrectionMode, ...] = get_args(CorrectionMode)

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

#: What a masked step is to gae and its like.
MaskedSteps = Literal["carry", "zero"]
MASKED_STEPS: tuple[MaskedSteps, ...] = get_args(MaskedSteps)

#: What group_advantages subtracts, and what it divides by.
Baseline = Literal["mean", "leave-one-out", "greedy", "none"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
Scale = Literal["group", "batch", "none"]
SCALES: tuple[Scale, ...] = get_args(Scale)

#: Which loss dpo_loss is.
DPOLossType = Literal["sigmoid", "ipo", "hinge", "robust"]
DPO_LOSS_TYPES: tuple[DPOLossType, ...] = get_args(DPOLossType)
