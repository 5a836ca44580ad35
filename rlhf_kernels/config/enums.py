"""The values of string options: for each option a type for annotations and a tuple for checks.

Native code takes a choice as its position in the tuple; csrc/abi_*.h have an enum of the same names
in the same order.
"""

from typing import Literal, get_args

#: Estimators of a KL divergence from x = logprob - ref_logprob.
PlainKlEstimator = Literal["k1", "k2", "k3", "abs"]
PLAIN_KL_ESTIMATORS: tuple[PlainKlEstimator, ...] = get_args(PlainKlEstimator)

#: The same, and with the suffix "+" the variants that have the gradient of k2.
KlEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)

#: Directions of kl_divergence: reverse KL(policy || ref), forward KL(ref || policy), and the
#: generalised Jensen-Shannon divergence between them.
Direction = Literal["reverse", "forward", "jsd"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

Objective = Literal["clip", "penalty", "reinforce", "cispo", "sapo"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

RatioLevel = Literal["token", "sequence", "sequence-token", "clipped-sequence"]
RATIO_LEVELS: tuple[RatioLevel, ...] = get_args(RatioLevel)

#: Levels of the importance correction; None means no correction.
CorrectionLevel = Literal["token", "sequence", "geometric"]
CORRECTION_LEVELS: tuple[CorrectionLevel, ...] = get_args(CorrectionLevel)
#: The integer is the position in this tuple: 0 for no correction.
CORRECTION_CODES: tuple[CorrectionLevel | None, ...] = (None, *CORRECTION_LEVELS)

CorrectionMode = Literal["truncate", "mask"]
CORRECTION_MODES: tuple[CorrectionMode, ...] = get_args(CorrectionMode)

#: The weight of a token's KL term; None is 1, a constant.
KlWeight = Literal["ratio", "detached-ratio", "one"]
KL_WEIGHTS: tuple[KlWeight, ...] = get_args(KlWeight)
#: The integer is the position in this tuple: 0 for no weight.
KL_WEIGHT_CODES: tuple[KlWeight | None, ...] = (None, *KL_WEIGHTS)

#: What drops a token from the objective; None drops nothing.
Gate = Literal["tv", "binary_kl", "ratio", "opsm"]
GATES: tuple[Gate, ...] = get_args(Gate)
#: The integer is the position in this tuple: 0 for no gate.
GATE_CODES: tuple[Gate | None, ...] = (None, *GATES)

#: The policy with whose log-probabilities a gate compares the current ones.
GateAnchor = Literal["old", "rollout"]
GATE_ANCHORS: tuple[GateAnchor, ...] = get_args(GateAnchor)

#: What has one importance weight in mismatch_weights: a token, or a sequence, whose weight is the
#: product, geometric mean, mean or largest of its ratios. None: all weights are 1.
MismatchLevel = Literal["token", "sequence", "geometric", "sequence-mean", "sequence-max"]
MISMATCH_LEVELS: tuple[MismatchLevel, ...] = get_args(MismatchLevel)
#: The integer is the position in this tuple: 0 for no weights.
MISMATCH_CODES: tuple[MismatchLevel | None, ...] = (None, *MISMATCH_LEVELS)

#: What `reject` of mismatch_weights judges: the token, or a sequence by the sum, the mean or the
#: largest of its tokens; and the estimator of their divergence, as verl writes them.
MismatchCriterion = Literal[
    "token_ratio",
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_ratio",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_ratio",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_ratio",
    "seq_max_k1",
    "seq_max_k2",
    "seq_max_k3",
]

#: What a token with an empty support has: NaN, or the whole vocabulary as its distribution.
EmptySupport = Literal["nan", "whole"]
EMPTY_SUPPORT: tuple[EmptySupport, ...] = get_args(EmptySupport)

#: Options of mismatch_weights by name: config/mismatch.py has what each sets.
MismatchPreset = Literal[
    "tis",
    "icepop",
    "mis",
    "seq-mask-tis",
    "verl-token-is",
    "verl-token-icepop",
    "verl-seq-is",
    "verl-seq-is-rs",
    "verl-geo-rs",
    "verl-k3-rs",
]

#: What mismatch_weights does about a token without a ratio.
Missing = Literal["raise", "one", "drop"]
MISSING: tuple[Missing, ...] = get_args(Missing)

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

#: How gae and the other recurrences treat a masked step.
MaskedSteps = Literal["carry", "zero"]
MASKED_STEPS: tuple[MaskedSteps, ...] = get_args(MaskedSteps)

#: The value that group_advantages subtracts, and the one that it divides by.
Baseline = Literal["mean", "leave-one-out", "greedy", "none"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
Scale = Literal["group", "batch", "none"]
SCALES: tuple[Scale, ...] = get_args(Scale)
#: Further baselines and scales, which plain torch computes on every backend.
PlainBaseline = Literal["length-mean", "log-mean-exp", "pass@k", "batch-mean"]
PLAIN_BASELINES: tuple[PlainBaseline, ...] = get_args(PlainBaseline)
PlainScale = Literal["leave-one-out", "mean"]
PLAIN_SCALES: tuple[PlainScale, ...] = get_args(PlainScale)

#: Losses of preference_loss.
PreferenceLossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
]
PREFERENCE_LOSSES: tuple[PreferenceLossName, ...] = get_args(PreferenceLossName)

#: Whose f' preference_loss takes of the ratio of policy and reference.
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES: tuple[FDivergence, ...] = get_args(FDivergence)
