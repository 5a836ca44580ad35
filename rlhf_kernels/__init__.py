"""rlhf_kernels: fused, exact, deterministic operations of RLHF post-training."""

from .config.policy import PolicyLossConfig
from .controllers import AdaptiveKLController, FixedKLController, RunningMoments
from .kernels.backends import available_backends, use_backend
from .ops._availability import Support, supports
from .ops._calls import warmup
from .ops.advantages import (
    Advantages,
    discounted_returns,
    gae,
    whiten,
)
from .ops.advantages_groups import group_advantages, optimal_token_baseline
from .ops.advantages_shaped import PPOAdvantages, ppo_advantages
from .ops.kl import KlDivergence, kl_divergence, kl_penalty
from .ops.kl_topk import topk_divergence
from .ops.linear_kl import linear_kl_divergence
from .ops.linear_logprobs import linear_token_logprobs
from .ops.linear_policy import linear_policy_loss
from .ops.logprobs import token_logprobs
from .ops.logprobs_results import TokenLogprobs, TokenLogprobsEntropy
from .ops.mismatch import MismatchMetrics, MismatchWeights, mismatch_weights
from .ops.model_head import Head
from .ops.policy import PolicyLoss, PolicyMetrics, policy_loss
from .ops.preference import (
    KTOLoss,
    PreferenceLoss,
    RewardModelLoss,
    kto_loss,
    preference_loss,
    reward_model_loss,
    sequence_logprobs,
)
from .ops.value import ValueLoss, ValueMetrics, value_loss

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "Advantages",
    "FixedKLController",
    "Head",
    "KTOLoss",
    "KlDivergence",
    "MismatchMetrics",
    "MismatchWeights",
    "PPOAdvantages",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "PreferenceLoss",
    "RewardModelLoss",
    "RunningMoments",
    "Support",
    "TokenLogprobs",
    "TokenLogprobsEntropy",
    "ValueLoss",
    "ValueMetrics",
    "available_backends",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "kto_loss",
    "linear_kl_divergence",
    "linear_policy_loss",
    "linear_token_logprobs",
    "mismatch_weights",
    "optimal_token_baseline",
    "policy_loss",
    "ppo_advantages",
    "preference_loss",
    "reward_model_loss",
    "sequence_logprobs",
    "supports",
    "token_logprobs",
    "topk_divergence",
    "use_backend",
    "value_loss",
    "warmup",
    "whiten",
]
