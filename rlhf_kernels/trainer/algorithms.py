"""The online algorithms: how each estimates advantages, its policy loss and its KL penalty."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import OnlineConfig, PPOConfig
from .timing import timed


class Outcome(NamedTuple):
    """The input of an advantage estimate: a whole rollout, the same on every process.

    `scores` and `greedy_scores` are `[B]`, the other tensors `[B, T]`. `kl_coef` is 0 unless the
    KL penalty is part of the reward.
    """

    config: OnlineConfig
    kl_coef: float
    scores: Tensor
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    greedy_scores: Tensor | None
    running_mean: float


# Advantages `[B]` or `[B, T]`, and the returns that the critic learns, if there is one.
Estimate = tuple[Tensor, Tensor | None]


def group(baseline: str, scale: str) -> Callable[[Outcome], Estimate]:
    """One advantage per completion, relative to the other completions of its prompt."""

    def advantages(rollout: Outcome) -> Estimate:
        scores, estimator = rollout.scores, rollout.config.kl_estimator
        if rollout.kl_coef:
            kl = timed(rk.kl_penalty, rollout.logprobs, rollout.ref_logprobs, estimator=estimator)
            scores = scores - rollout.kl_coef * rk.sequence_logprobs(kl, mask=rollout.mask)
        options = {"baseline": baseline, "scale": scale, "greedy_rewards": rollout.greedy_scores}
        return timed(rk.group_advantages, scores, rollout.config.num_generations, **options), None

    return advantages


def _gae(rollout: Outcome, scores: Tensor, values: Tensor, **options: Any) -> Estimate:
    """Generalised advantage estimates of the KL-shaped reward."""
    found = timed(
        rk.ppo_advantages,
        scores,
        rollout.logprobs,
        rollout.ref_logprobs,
        values,
        mask=rollout.mask,
        kl_coef=rollout.kl_coef,
        kl_estimator=rollout.config.kl_estimator,
        gamma=rollout.config.gamma,
        **options,
    )
    return found.advantages, found.returns


def generalised(rollout: Outcome) -> Estimate:
    """GAE with the critic's values."""
    config = rollout.config
    assert isinstance(config, PPOConfig) and rollout.values is not None  # The stage with a critic.
    options = {"lam": config.lam, "whiten": config.whiten_advantages}
    return _gae(rollout, rollout.scores, rollout.values, **options)


def returns_to_go(*, whiten: bool, group_baseline: bool = False) -> Callable[[Outcome], Estimate]:
    """Advantages are the returns to go of the KL-shaped reward: GAE with lambda 1, no critic.

    The baseline is the running mean of the scores of earlier rollouts, which does not bias the
    gradient, or the mean of the prompt group. Whitening makes the running mean unnecessary.
    """

    def advantages(rollout: Outcome) -> Estimate:
        scores = rollout.scores if whiten else rollout.scores - rollout.running_mean
        if group_baseline:
            scores = rk.group_advantages(scores, rollout.config.num_generations, scale="none")
        values = torch.zeros_like(rollout.logprobs)
        return _gae(rollout, scores, values, lam=1.0, whiten=whiten)[0], None

    return advantages


def to_teacher(rollout: Outcome) -> Estimate:
    """On-policy distillation: each sampled token's log-ratio of teacher and policy, no reward.

    Its mean over samples is minus KL(policy || teacher), and the policy gradient with it as the
    advantage is the gradient of that KL at the tokens that were sampled (2306.13649, reverse KL;
    a discount of 0, because a token's divergence does not count its successors').
    """
    assert rollout.ref_logprobs is not None  # the teacher's
    ratio = rollout.ref_logprobs - rollout.logprobs
    return torch.where(rollout.mask, rollout.kl_coef * ratio, 0.0), None


@dataclass(frozen=True)
class Algorithm:
    """An online algorithm.

    Attributes:
        advantages: computes advantages and the critic's returns from a rollout.
        loss: preset of PolicyLossConfig; settings that the user gives override it.
        kl: whether the KL penalty is part of the "reward" or of the "loss".
        defaults: settings whose default differs from OnlineConfig's.
        critic: whether the algorithm trains a critic.
        greedy: whether the baseline is the score of a greedy completion of each prompt.
        teacher: whether the reference is a teacher given by path; rewards are only shown.
    """

    advantages: Callable[[Outcome], Estimate]
    loss: Callable[..., rk.PolicyLossConfig]
    kl: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    critic: bool = False
    greedy: bool = False
    teacher: bool = False

    @property
    def grouped(self) -> bool:
        """Whether advantages compare completions of a prompt, which needs at least two of them."""
        return "num_generations" in self.defaults


_Loss = rk.PolicyLossConfig
_GRPO = group("mean", "group")
_GROUPS: dict[str, Any] = {"num_generations": 8, "kl_estimator": "k3"}

ALGORITHMS = {
    "ppo": Algorithm(
        generalised, _Loss.ppo, "reward", {"kl_coef": 0.02, "epochs": 2}, critic=True
    ),
    "grpo": Algorithm(_GRPO, _Loss.grpo, "loss", _GROUPS | {"kl_coef": 0.04}),
    "dr_grpo": Algorithm(group("mean", "none"), _Loss.dr_grpo, "loss", _GROUPS),
    "dapo": Algorithm(_GRPO, _Loss.dapo, "loss", _GROUPS | {"dynamic_sampling": 4}),
    "gspo": Algorithm(_GRPO, _Loss.gspo, "loss", _GROUPS),
    "gmpo": Algorithm(_GRPO, _Loss.gmpo, "loss", _GROUPS),
    "cispo": Algorithm(_GRPO, _Loss.cispo, "loss", _GROUPS),
    "rloo": Algorithm(
        group("leave-one-out", "none"), _Loss.rloo, "reward",
        {"num_generations": 4, "kl_coef": 0.05},
    ),
    "reinforce": Algorithm(returns_to_go(whiten=False), _Loss.reinforce, "reward"),
    "reinforce++": Algorithm(
        returns_to_go(whiten=True), _Loss.reinforce_plus_plus, "reward", {"kl_coef": 0.01}
    ),
    "reinforce++_baseline": Algorithm(
        returns_to_go(whiten=True, group_baseline=True), _Loss.reinforce_plus_plus, "reward",
        {"num_generations": 8, "kl_coef": 0.01},
    ),
    "remax": Algorithm(group("greedy", "none"), _Loss.rloo, "reward", greedy=True),
    "distill": Algorithm(to_teacher, _Loss.ppo, "reward", {"kl_coef": 1.0}, teacher=True),
}  # fmt: skip


#: Settings of the policy loss that are None unless the user gives them.
LOSS_SETTINGS = ("objective", "clip_low", "clip_high", "dual_clip", "aggregation")


def loss_config(algorithm: Algorithm, config: OnlineConfig) -> rk.PolicyLossConfig:
    """The policy loss of the algorithm, overridden by the settings that the user gave."""
    options = {n: getattr(config, n) for n in LOSS_SETTINGS if getattr(config, n) is not None}
    options |= {"entropy_coef": config.entropy_coef, "kl_coef": 0.0}
    if algorithm.kl == "loss":
        options |= {"kl_coef": config.kl_coef, "kl_estimator": config.kl_estimator}
    if options.get("objective") == "penalty":
        options["penalty_coef"] = config.penalty_coef
    if config.correction != "none":
        options |= {
            "correction_level": config.correction,
            "correction_mode": config.correction_mode,
            "correction_max": config.correction_max,
        }
    return algorithm.loss(**options)


def adapted(loss: rk.PolicyLossConfig, kl: float, target: float) -> rk.PolicyLossConfig:
    """The loss with the penalty coefficient of the next rollout (1707.06347, section 4).

    `kl` is KL(old || new) per token in the last epoch; `target` is its target.
    """
    factor = 1.0
    if kl < target / 1.5:
        factor = 0.5
    elif kl > target * 1.5:
        factor = 2.0
    return dataclasses.replace(loss, penalty_coef=factor * loss.penalty_coef)


def normalizer_of(loss: rk.PolicyLossConfig, mask: Tensor, longest: int) -> float:
    """The divisor of the loss for a whole mini-batch, whichever processes have its rows.

    `mask` is the completion mask `[B, T]`; `longest` is the maximum length of a completion.
    """
    if loss.aggregation == "token-mean":
        return max(1.0, float(mask.sum()))
    if loss.aggregation == "constant":
        return float(len(mask) * longest)
    return max(1.0, float(mask.any(1).sum()))
