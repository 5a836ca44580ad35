"""Reference implementations in plain torch: short, differentiable, on any device.

They compute in fp32, or in fp64 for fp64 inputs. They define the operations, and every backend is
tested against them.
"""

from .advantages import discounted_returns, gae, ppo_advantages, whiten
from .advantages_groups import group_advantages, optimal_token_baseline
from .head import linear_kl_divergence, linear_policy_loss, linear_token_logprobs
from .kl import kl_divergence, kl_penalty
from .kl_topk import topk_divergence
from .logprobs import token_logprobs
from .mismatch import mismatch_weights
from .policy import policy_loss
from .preference import kto_loss, preference_loss, reward_model_loss, sequence_logprobs
from .support import linear_token_logprobs_support, token_logprobs_support
from .value import value_loss

__all__ = [
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "kto_loss",
    "linear_kl_divergence",
    "linear_policy_loss",
    "linear_token_logprobs",
    "linear_token_logprobs_support",
    "mismatch_weights",
    "optimal_token_baseline",
    "policy_loss",
    "ppo_advantages",
    "preference_loss",
    "reward_model_loss",
    "sequence_logprobs",
    "token_logprobs",
    "token_logprobs_support",
    "topk_divergence",
    "value_loss",
    "whiten",
]
