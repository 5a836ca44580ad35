"""Every online algorithm: its advantage, its policy loss and where its KL penalty lies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import CriticConfig, OnlineConfig
from .recorder import kernel


class Outcome(NamedTuple):
    """What advantages are made of: a whole rollout, the same on every process."""

    scores: Tensor
    mask: Tensor
    logprobs: Tensor | None
    ref_logprobs: Tensor | None
    values: Tensor | None
    greedy_scores: Tensor | None
    running_mean: float


class Estimate(NamedTuple):
    """Advantages `[B]` or `[B, T]`, and the critic's returns."""

    advantages: Tensor
    returns: Tensor | None = None


Advantage = Callable[[Outcome, OnlineConfig, CriticConfig, float], Estimate]


def group(baseline: str, scale: str) -> Advantage:
    """One advantage per completion, relative to the others of its prompt."""

    def advantages(
        outcome: Outcome, config: OnlineConfig, _: CriticConfig, kl_coef: float
    ) -> Estimate:
        scores = outcome.scores
        if kl_coef:
            kl = kernel(
                rk.kl_penalty, outcome.logprobs, outcome.ref_logprobs, estimator=config.kl_estimator
            )
            scores = scores - kl_coef * rk.sequence_logprobs(kl, outcome.mask)
        return Estimate(
            kernel(
                rk.group_advantages,
                scores,
                config.num_generations,
                baseline=baseline,
                scale=scale,
                greedy_rewards=outcome.greedy_scores if baseline == "greedy" else None,
            )
        )

    return advantages


def returns_to_go(*, whiten: bool, group_baseline: bool = False) -> Advantage:
    """Return to go of the KL-shaped reward: GAE with lambda 1 and no critic.

    Scores count from their running mean (of earlier rollouts, so that it does not bias the
    gradient), or from the mean of their group; whitening makes the first needless.
    """

    def advantages(
        outcome: Outcome, config: OnlineConfig, critic: CriticConfig, kl_coef: float
    ) -> Estimate:
        scores = outcome.scores if whiten else outcome.scores - outcome.running_mean
        if group_baseline:
            scores = rk.group_advantages(scores, config.num_generations, scale="none")
        nothing = torch.zeros(outcome.mask.shape, device=scores.device)
        found = kernel(
            rk.ppo_advantages,
            scores,
            nothing if outcome.logprobs is None else outcome.logprobs,
            outcome.ref_logprobs,
            nothing,
            outcome.mask,
            kl_coef=kl_coef,
            kl_estimator=config.kl_estimator,
            gamma=critic.gamma,
            lam=1.0,
            whiten=whiten,
        )
        return Estimate(found.advantages)

    return advantages


def generalised(
    outcome: Outcome, config: OnlineConfig, critic: CriticConfig, kl_coef: float
) -> Estimate:
    """GAE of the KL-shaped reward over the critic's values (Ziegler et al., 1909.08593)."""
    found = kernel(
        rk.ppo_advantages,
        outcome.scores,
        outcome.logprobs,
        outcome.ref_logprobs,
        outcome.values,
        outcome.mask,
        kl_coef=kl_coef,
        kl_estimator=config.kl_estimator,
        gamma=critic.gamma,
        lam=critic.lam,
        whiten=critic.whiten_advantages,
    )
    return Estimate(found.advantages, found.returns)


@dataclass(frozen=True)
class Algorithm:
    """An online algorithm.

    Attributes:
        advantages: from the outcome of a rollout to an Estimate.
        loss: preset of PolicyLossConfig; settings that are given override it.
        kl: whether the KL penalty is part of the "reward" or of the "loss".
        defaults: settings whose default is not OnlineConfig's.
        critic: whether it trains a critic.
        greedy: whether it decodes each prompt greedily for its baseline.
    """

    advantages: Advantage
    loss: Callable[..., rk.PolicyLossConfig]
    kl: str = "loss"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    critic: bool = False
    greedy: bool = False


_GROUPS: dict[str, Any] = {"num_generations": 8, "kl_estimator": "k3"}
_Loss = rk.PolicyLossConfig

ALGORITHMS = {
    "ppo": Algorithm(
        generalised, _Loss.ppo, kl="reward", defaults={"kl_coef": 0.02, "epochs": 2}, critic=True
    ),
    "grpo": Algorithm(group("mean", "group"), _Loss.grpo, defaults=_GROUPS | {"kl_coef": 0.04}),
    "dr_grpo": Algorithm(group("mean", "none"), _Loss.dr_grpo, defaults=_GROUPS),
    "dapo": Algorithm(
        group("mean", "group"), _Loss.dapo, defaults=_GROUPS | {"dynamic_sampling": 4}
    ),
    "gspo": Algorithm(group("mean", "group"), _Loss.gspo, defaults=_GROUPS),
    "cispo": Algorithm(group("mean", "group"), _Loss.cispo, defaults=_GROUPS),
    "rloo": Algorithm(
        group("leave-one-out", "none"),
        _Loss.rloo,
        kl="reward",
        defaults={"num_generations": 4, "kl_coef": 0.05},
    ),
    "reinforce": Algorithm(returns_to_go(whiten=False), _Loss.reinforce, kl="reward"),
    "reinforce++": Algorithm(
        returns_to_go(whiten=True),
        _Loss.reinforce_plus_plus,
        kl="reward",
        defaults={"kl_coef": 0.01},
    ),
    "reinforce++_baseline": Algorithm(
        returns_to_go(whiten=True, group_baseline=True),
        _Loss.reinforce_plus_plus,
        kl="reward",
        defaults={"num_generations": 8, "kl_coef": 0.01},
    ),
    "remax": Algorithm(group("greedy", "none"), _Loss.rloo, kl="reward", greedy=True),
}


def loss_config(algorithm: Algorithm, config: OnlineConfig) -> rk.PolicyLossConfig:
    """The algorithm's policy loss under the settings that are given."""
    names = ("objective", "clip_low", "clip_high", "dual_clip", "aggregation")
    options = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    options["entropy_coef"] = config.entropy_coef
    options["kl_coef"] = config.kl_coef if algorithm.kl == "loss" else 0.0
    if algorithm.kl == "loss":
        options["kl_estimator"] = config.kl_estimator
    if options.get("objective") == "penalty":
        options["penalty_coef"] = config.penalty_coef
    if config.correction != "none":
        options |= {
            "correction_level": config.correction,
            "correction_mode": config.correction_mode,
            "correction_max": config.correction_max,
        }
    return algorithm.loss(**options)
