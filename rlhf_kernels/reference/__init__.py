"""The definitions, in plain torch: short, differentiable, any device, fp32 (fp64 if given).

These functions are the meaning of the operations; every backend is tested against them.
"""

from .advantages import discounted_returns, gae, group_advantages, ppo_advantages, whiten
from .kl import kl_divergence, kl_penalty
from .logprobs import token_logprobs

__all__ = [
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "ppo_advantages",
    "token_logprobs",
    "whiten",
]
