"""Runs one operation on a shape larger than all caches, for profilers with start and stop.

ncu --profile-from-start off ... python -m benchmarks.gpu.profiled --call gae --backend cuda
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .. import make_parser

Work = Callable[[], Any]


def _logits(rows: int, vocab: int, device: torch.device) -> Tensor:
    return (torch.randn(rows, vocab, device=device) * 2).to(torch.bfloat16)


def token_logprobs(device: torch.device, small: bool) -> Work:
    """Forward and backward with entropy, bf16: 622 MB of logits."""
    rows, vocab = (8, 1000) if small else (2048, 151936)
    logits = _logits(rows, vocab, device).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=device)
    upstream = [torch.randn(rows, device=device) for _ in range(2)]

    def work() -> None:
        result = rk.token_logprobs(logits, labels, entropy=True)[:2]
        torch.autograd.grad(result, logits, upstream)

    return work


def kl_divergence(device: torch.device, small: bool) -> Work:
    """Forward and backward, bf16: two tensors of 268 MB."""
    rows, vocab = (8, 1000) if small else (1024, 131072)
    logits = _logits(rows, vocab, device).requires_grad_()
    ref = _logits(rows, vocab, device)
    upstream = torch.randn(rows, device=device)
    return lambda: torch.autograd.grad(rk.kl_divergence(logits, ref), logits, upstream)


def gae(device: torch.device, small: bool) -> Work:
    """GAE with a mask, on rows of 131,072 tokens."""
    shape = (2, 300) if small else (16, 131072)
    rewards, values = (torch.randn(shape, device=device) for _ in range(2))
    mask = torch.rand(shape, device=device) < 0.9
    return lambda: rk.gae(rewards, values, mask=mask, gamma=0.99, lam=0.95)


def policy_loss(device: torch.device, small: bool) -> Work:
    """PPO's clipped loss and its gradient of 4M tokens."""
    shape = (2, 300) if small else (2048, 2048)
    old = -torch.rand(shape, device=device)
    logprobs = (old + 0.1 * torch.randn_like(old)).requires_grad_()
    advantages, mask = torch.randn_like(old), torch.rand(shape, device=device) < 0.9
    return lambda: torch.autograd.grad(
        rk.policy_loss(logprobs, old, advantages, mask=mask)[0], logprobs
    )


#: The most important calls come first.
CALLS = {f.__name__: f for f in (token_logprobs, gae, kl_divergence, policy_loss)}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--call", choices=CALLS, required=True)
    parser.add_argument("--small", action="store_true", help="does this script work?")
    options = parser.parse_args()
    device = torch.device(options.device)
    work = CALLS[options.call](device, options.small)
    with rk.use_backend(options.backend):
        # The first call compiles, loads and allocates.
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
