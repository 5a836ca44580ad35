"""The definitions, in plain torch: short, differentiable, on any device, in fp32 (or fp64 if given).

These functions are the meaning of the operations; every backend is tested against them.
"""

from .advantages import discounted_returns, gae, group_advantages, ppo_advantages, whiten
from .logprobs import token_logprobs

__all__ = [
    "discounted_returns",
    "gae",
    "group_advantages",
    "ppo_advantages",
    "token_logprobs",
    "whiten",
]
