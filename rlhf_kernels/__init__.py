"""rlhf_kernels: fused, exact, deterministic operations of RLHF post-training."""

from ._backends import available_backends, use_backend
from ._warmup import warmup
from .controllers import AdaptiveKLController, FixedKLController, RunningMoments
from .ops.advantages import (
    Advantages,
    PPOAdvantages,
    discounted_returns,
    gae,
    group_advantages,
    ppo_advantages,
    whiten,
)
from .ops.kl import kl_divergence, kl_penalty
from .ops.logprobs import TokenLogprobs, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "Advantages",
    "FixedKLController",
    "PPOAdvantages",
    "RunningMoments",
    "TokenLogprobs",
    "available_backends",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "ppo_advantages",
    "token_logprobs",
    "use_backend",
    "warmup",
    "whiten",
]
