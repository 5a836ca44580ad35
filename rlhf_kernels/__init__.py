"""rlhf_kernels: fused, exact, deterministic operations of RLHF post-training."""

from ._backends import available_backends, use_backend
from .ops.logprobs import TokenLogprobs, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "TokenLogprobs",
    "available_backends",
    "token_logprobs",
    "use_backend",
]
