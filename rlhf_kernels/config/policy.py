"""PolicyLossConfig: the choice of policy loss, with every constant on which trainers differ."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Concatenate, ParamSpec

from . import policy_checks
from .options import PolicyLossOptions
from .parity.areal import areal
from .parity.nemo_rl import nemo_rl
from .parity.openrlhf import openrlhf
from .parity.prime_rl import prime_rl
from .parity.skyrl import skyrl
from .parity.slime import slime
from .parity.tinker import tinker
from .parity.trl import trl
from .parity.verl import verl
from .policy_codes import PolicyCodes, PolicyParams
from .policy_fields import PolicyFields, codes_of, params_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")


def _preset(
    make: "Callable[Concatenate[type[PolicyLossConfig], P], PolicyLossConfig]",
) -> "classmethod[PolicyLossConfig, P, PolicyLossConfig]":
    """A classmethod with the signature of `make`."""
    return classmethod(make)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(PolicyFields):
    """Options of `policy_loss`. Immutable; checked on construction.

    With x_t = logprobs_t - old_logprobs_t, A the advantage and r = exp(x) the ratio, a token's term
    is `w * objective + kl_coef * KL_ref - entropy_coef * entropy`, times its weight if the call has
    any, aggregated over the mask.

    Attributes:
        objective: "clip": max(-A min(r, delta), -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0
            at most -A dual_clip. "penalty": -A r + penalty_coef * (r - 1 - x), whose second term
            is an unbiased estimate (k3) of KL(old || new) on samples of old. "reinforce":
            -A logprob. "cispo": -A sg(clip(r)) logprob. "sapo": -A sigmoid(tau (r - 1)) 4 / tau.
            A tie takes the unclipped branch and its gradient.
        ratio_level: "token": r_t = exp(x_t). "sequence": every token of a sequence has the ratio
            s = exp(mean of x over its unmasked tokens), differentiated through s (GSPO, as in TRL).
            "sequence-token": value s, gradient sg(s) d logprob_t (GSPO-token, as in verl).
            "clipped-sequence": s of log-ratios that are clipped token by token, x at most
            log(1 + clip_high) where A > 0, else at least log(1 - clip_low); the objective is
            -A s, and clipped tokens have no gradient through s (GMPO, as in TRL and verl).
        clip_low: lower clip distance; None for no lower bound.
        clip_high: upper clip distance; None for no upper bound.
        clip_absolute: clip_low and clip_high are the bounds themselves, not distances from 1
            (TRL's CISPO has an absolute upper bound).
        dual_clip: c > 1 of dual clipping, or None.
        delta: cap of r in the unclipped branch (two-sided clipping), above 1 + clip_high, or None.
        penalty_coef: beta of the penalty objective.
        sapo_tau_pos: tau where A > 0.
        sapo_tau_neg: tau where A <= 0.
        kl_coef: weight of the KL to the reference policy; 0 for none.
        kl_estimator: k1, k2, k3 or abs of logprob - ref. With "+": the value of that estimator and
            the gradient of k2 (straight-through).
        kl_input_clamp: c or (low, high): clamp of logprob - ref before the estimator; gradient 0
            outside.
        kl_value_clamp: c: clamp of the estimate to [-c, c]; gradient 0 outside. A "+" estimator
            keeps the gradient of the unclamped k2 through both clamps.
        kl_weight: what multiplies the estimate, or None. "ratio": r, differentiated too, so that
            the gradient is unbiased (TRL, DeepSeek-V3.2). "detached-ratio": r as a constant. "one":
            1, with the gradient of a ratio of 1 (on-policy, unbiased without old).
        kl_weight_max: cap of r in that weight, which has gradient 0 above it, or None.
        entropy_coef: weight of the entropy bonus; 0 for none.
        correction_level: importance correction w for the mismatch between rollout engine and
            trainer, or None. "token": w = exp(old - rollout). "sequence": w = exp of the sum of
            old - rollout over the sequence's unmasked tokens; "geometric": of their mean. w is
            detached and scales only the
            policy-gradient term; for "penalty", not its KL part.
        correction_mode: "truncate": clamp w to [correction_min, correction_max]. "mask": set w to 0
            outside these bounds. The difference old - rollout counts as 0 where the rollout
            log-probability is NaN (some engines report NaN for a nearly certain token), and where
            both are -inf. An infinite difference saturates; two of opposite sign in a sequence
            cancel, and its finite differences may be lost beside them.
        correction_min: lower cap, or None.
        correction_max: upper cap, or None.
        gate: what drops a token from the objective, or None. A dropped token's policy-gradient term
            is multiplied by a constant 0, as with a correction weight of 0; its KL and entropy
            stay. p and q are the token's probabilities under the current policy and under that of
            gate_against. "tv": drops where p - q > gate_high and A > 0, and where p - q < -gate_low
            and A < 0 (DPPO's total variation). "binary_kl": likewise where p > q, and p < q, and
            the divergence KL(q || p) of this token against all others exceeds gate_high, and
            gate_low; the probability of the others counts as at least 1e-8. "ratio": drops where
            p / q is outside [gate_low, gate_high], whatever A (IcePop on the current policy).
            "opsm": drops where A < 0 and the mean of log(q / p) over the unmasked tokens of the
            sequence exceeds gate_low (TRL's and slime's off-policy sequence masks).
        gate_low: the lower bound, or None.
        gate_high: the upper bound, or None.
        gate_against: "old" or "rollout". At a NaN the rollout counts as equal to old.
        gate_two_sided: "tv" and "binary_kl" drop at both bounds, whatever A.
        log_ratio_clamp: c or (low, high): clamp of log r; gradient 0 outside, so a token (or
            sequence) outside stops learning. None leaves only the saturation at +-40, which applies
            to every exponential here.
        aggregation: "token-mean": sum of the unmasked terms / normalizer. "seq-mean-token-mean":
            sum over sequences of their means / normalizer. "seq-mean-token-sum": sum over
            sequences of their sums / normalizer. "constant": sum / normalizer.
        normalizer: the divisor. None: the number of unmasked tokens (token-mean) or of sequences
            with an unmasked token (seq-mean-*), at least 1. "constant" needs a number, here or at
            the call. With the count of the whole step, the losses of micro-batches and ranks add up
            to the loss of the step exactly.
    """

    if TYPE_CHECKING:  # no fields; see __post_init__
        _codes: ClassVar[PolicyCodes]
        _params: ClassVar[PolicyParams]

    def __post_init__(self) -> None:
        policy_checks.values(self)
        policy_checks.combinations(self)
        # Encoded once here; each call only passes the two tuples.
        object.__setattr__(self, "_codes", codes_of(self))
        object.__setattr__(self, "_params", params_of(self))

    @classmethod
    def ppo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """PPO-clip, Schulman et al. 2017 (arXiv:1707.06347): clip 0.2, mean over tokens."""
        return cls(**options)

    @classmethod
    def ppo_penalty(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """PPO with a KL(old || new) penalty, Schulman et al. 2017 (arXiv:1707.06347, §4).

        Update `penalty_coef` between rollouts: halve it where the KL is below target / 1.5, double
        it above 1.5 target.
        """
        return cls(**PolicyLossOptions(objective="penalty", penalty_coef=1.0) | options)

    @classmethod
    def grpo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """GRPO, Shao et al. 2024 (arXiv:2402.03300): k3 KL 0.04, mean of sequence means."""
        defaults = PolicyLossOptions(kl_coef=0.04, aggregation="seq-mean-token-mean")
        return cls(**defaults | options)

    @classmethod
    def dapo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """DAPO, Yu et al. 2025 (arXiv:2503.14476): clip-higher 0.2/0.28, token mean, no KL."""
        return cls(**PolicyLossOptions(clip_high=0.28) | options)

    @classmethod
    def dr_grpo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783): token sum over a constant.

        The normalizer, sequences * maximum completion length, is given here or at the call.
        """
        return cls(**PolicyLossOptions(aggregation="constant") | options)

    @classmethod
    def gspo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """GSPO, Zheng et al. 2025 (arXiv:2507.18071): sequence ratio, clip 3e-4/4e-4."""
        defaults = PolicyLossOptions(
            ratio_level="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            aggregation="seq-mean-token-mean",
        )
        return cls(**defaults | options)

    @classmethod
    def gmpo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """GMPO, Zhao et al. 2025 (arXiv:2507.20673): geometric mean of ratios within e^+-0.4."""
        defaults = PolicyLossOptions(
            ratio_level="clipped-sequence",
            clip_low=-math.expm1(-0.4),
            clip_high=math.expm1(0.4),
            aggregation="seq-mean-token-mean",
        )
        return cls(**defaults | options)

    @classmethod
    def cispo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """CISPO, MiniMax-M1 2025 (arXiv:2506.13585): detached clipped weight, no lower bound.

        The paper does not give the upper clip distance. The default of 4, a weight of at most 5,
        follows reproductions.
        """
        defaults = PolicyLossOptions(objective="cispo", clip_low=None, clip_high=4.0)
        return cls(**defaults | options)

    @classmethod
    def sapo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """SAPO, Gao et al. 2025 (arXiv:2511.20347): soft gate, temperatures 1.0/1.05."""
        defaults = PolicyLossOptions(objective="sapo", aggregation="seq-mean-token-mean")
        return cls(**defaults | options)

    @classmethod
    def reinforce(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """REINFORCE, Williams 1992: -A logprob, mean over tokens."""
        return cls(**PolicyLossOptions(objective="reinforce") | options)

    @classmethod
    def reinforce_plus_plus(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """REINFORCE++, Hu 2025 (arXiv:2501.03262): PPO-clip over batch-whitened advantages."""
        return cls(**options)

    @classmethod
    def rloo(cls, **options: "Unpack[PolicyLossOptions]") -> "PolicyLossConfig":
        """RLOO, Ahmadian et al. 2024 (arXiv:2402.14740): -A log p(sequence), mean of sequences."""
        defaults = PolicyLossOptions(objective="reinforce", aggregation="seq-mean-token-sum")
        return cls(**defaults | options)

    trl = _preset(trl)
    verl = _preset(verl)
    openrlhf = _preset(openrlhf)
    nemo_rl = _preset(nemo_rl)
    skyrl = _preset(skyrl)
    prime_rl = _preset(prime_rl)
    areal = _preset(areal)
    slime = _preset(slime)
    tinker = _preset(tinker)
