"""kl_divergence over the whole vocabulary, and kl_penalty per token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import SHORT, Point, against, exact, points, sized
from ..harness.peers import peer

SAMPLED_ROWS = 16
TOKENS = {"64x2048": (64, 2048), "2048x2048": (2048, 2048)}
GPU_TOKENS = {"gpu-2048x2048": (2048, 2048)}
LOGITS = {"fp32": (torch.float32, 1024, 32768), "bf16": (torch.bfloat16, 1024, 32768)}
GPU_LOGITS = {"gpu-bf16": (torch.bfloat16, 4096, 131072)}


def eager_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logp = F.log_softmax(logits.float(), dim=-1)
    ref_logp = F.log_softmax(ref_logits.float(), dim=-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def eager_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    x = logprobs - ref_logprobs
    return torch.exp(-x) - 1 + x


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", points(["fp32"], GPU_LOGITS, ["bf16"]))
def test_kl_divergence(point: Point, name: str, mode: str) -> None:
    dtype, *full = (LOGITS | GPU_LOGITS)[name]
    n, vocab = point.size((24, 1000), full)
    device, gradient = point.device, mode != "forward"
    base = torch.randn(n, vocab, device=device) * 2
    ref_logits = base.to(dtype)
    # The policy is near its reference, as in training.
    logits = (base + 0.3 * torch.randn_like(base)).to(dtype).requires_grad_(gradient)
    del base
    upstream = torch.randn(n, device=device)
    rows = torch.randperm(n, device=device)[:SAMPLED_ROWS]

    def divergence(z: Tensor) -> Tensor:
        r = ref_logits[rows].double()
        return (z.softmax(-1) * (z - r)).sum(-1) - z.logsumexp(-1) + r.logsumexp(-1)

    targets = {"eager": 10, "compile": 1.8} if dtype is torch.float32 and not gradient else {}
    point(
        op="kl_divergence",
        label=f"{SHORT[dtype]} two {n}×{vocab}",
        mode=mode,
        inputs=(logits, ref_logits),
        providers=against(eager_divergence, rk.kl_divergence),
        oracle=lambda: exact(divergence, [logits[rows]], [upstream[rows]], gradient),
        # The backward pass reads both again and writes the gradient.
        moved=(5 if gradient else 2) * logits.nbytes + 4 * n,
        limit="copy" if gradient or name in GPU_LOGITS else "read",
        targets={"copy": 0.6} if name in GPU_LOGITS else targets,
        select=lambda t: t[rows],
        upstream=(upstream,),
    )


@pytest.mark.parametrize("name", points(TOKENS, GPU_TOKENS))
def test_kl_penalty(point: Point, name: str) -> None:
    shape = point.size((4, 50), (TOKENS | GPU_TOKENS)[name])
    ref_logprobs = -torch.rand(shape, device=point.device) * 5
    logprobs = (ref_logprobs + 0.1 * torch.randn_like(ref_logprobs)).requires_grad_()
    upstream = torch.randn_like(ref_logprobs)
    verl = peer("verl.trainer.ppo.core_algos", "kl_penalty")
    point(
        op="kl_penalty k3",
        label=sized(logprobs.dtype, *shape),
        mode="forward+backward",
        inputs=(logprobs, ref_logprobs),
        providers=against(
            eager_k3,
            lambda new, ref: rk.kl_penalty(new, ref, estimator="k3"),
            others={"verl": verl and (lambda new, ref: verl(new, ref, "k3"))},
        ),
        oracle=lambda: exact(lambda x: eager_k3(x, ref_logprobs.double()), [logprobs], [upstream]),
        # Forward reads two tensors and writes one; backward reads three and writes one.
        moved=7 * logprobs.nbytes,
        upstream=(upstream,),
    )
