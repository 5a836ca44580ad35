"""Runs one operation on a shape larger than all caches, for profilers with start and stop.

ncu --profile-from-start off ... python -m benchmarks.gpu.profiled --call gae --backend cuda
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.core.sentinels import SHARD_IGNORED
from rlhf_kernels.kernels import backends
from rlhf_kernels.kernels.rows import TokenConstants

from .. import make_parser

Work = Callable[[], Any]
#: What `main` says where the backend has no such kernel for this device.
ABSENT = "there is no such kernel here"


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


def policy_rows(device: torch.device, small: bool) -> Work | None:
    """A head's one kernel from fp32 logits, 622 MB, to their bf16 gradient, 311 MB.

    None where the backend takes three kernels. Whether DRAM is read once is what this shows.
    """
    rows, vocab = (2, 16_000) if small else (1024, 151936)
    options, config = RowOptions(1.0, 0.0, True, SHARD_IGNORED), rk.PolicyLossConfig.ppo()
    kernels = backends.get(backends.current_backend()).kernels.rows
    kernel = kernels.policy_rows_for(device, vocab, options)
    if kernel is None:
        return None
    logits = 2 * torch.randn(rows, vocab, device=device)
    labels = torch.randint(0, vocab, (rows,), device=device)
    old, advantages = torch.randn(2, rows, device=device)
    constants = TokenConstants(old - 14, advantages, None, None, torch.ones_like(old))
    out = torch.empty_like(logits, dtype=torch.bfloat16)
    return lambda: kernel(
        out, logits, labels, None, options, constants, config._codes, config._params
    )


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
CALLS: dict[str, Callable[[torch.device, bool], Work | None]] = {
    f.__name__: f for f in (token_logprobs, policy_rows, gae, kl_divergence, policy_loss)
}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--call", choices=CALLS, required=True)
    parser.add_argument("--small", action="store_true", help="does this script work?")
    options = parser.parse_args()
    device = torch.device(options.device)
    with rk.use_backend(options.backend):
        work = CALLS[options.call](device, options.small)
        if work is None:
            print(ABSENT)
            return 0
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
