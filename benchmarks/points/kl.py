"""kl_divergence over the whole vocabulary, and the per-token kl_penalty."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Case, Settings, compiled, points
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
def test_kl_divergence(
    run: Callable[[Case], None], settings: Settings, name: str, mode: str
) -> None:
    dtype, n, vocab = (LOGITS | GPU_LOGITS)[name]
    n, vocab = (24, 1000) if settings.quick else (n, vocab)
    device, gradient = settings.device, mode != "forward"
    base = torch.randn(n, vocab, device=device) * 2
    ref_logits = base.to(dtype)
    # A policy near its reference, as in training.
    logits = (base + 0.3 * torch.randn_like(base)).to(dtype).requires_grad_(gradient)
    del base
    upstream = torch.randn(n, device=device)
    rows = torch.randperm(n, device=device)[:SAMPLED_ROWS]

    def oracle() -> tuple[Tensor, ...]:
        z = logits.detach()[rows].double().requires_grad_(gradient)
        r = ref_logits[rows].double()
        mean = (z.softmax(-1) * (z - r)).sum(-1)
        divergence = mean - z.logsumexp(-1) + r.logsumexp(-1)
        if not gradient:
            return (divergence,)
        gradients = torch.autograd.grad(divergence, z, upstream[rows].double())
        return (divergence.detach(), *gradients)

    targets = {"eager": 10, "compile": 1.8} if dtype is torch.float32 and not gradient else {}
    if name in GPU_LOGITS:
        targets = {"copy": 0.6}
    run(
        Case(
            op="kl_divergence",
            label=f"{'fp32' if dtype is torch.float32 else 'bf16'} two {n}×{vocab}",
            mode=mode,
            inputs=(logits, ref_logits),
            providers={
                "eager": eager_divergence,
                "compile": compiled(eager_divergence),
                "ours": rk.kl_divergence,
            },
            oracle=oracle,
            # Backward reads both again and writes the gradient.
            moved=(5 if gradient else 2) * logits.numel() * logits.element_size() + 4 * n,
            limit="copy" if gradient or name in GPU_LOGITS else "read",
            targets=targets,
            select=lambda t: t[rows],
            upstream=(upstream,),
        )
    )


@pytest.mark.parametrize("name", points(TOKENS, GPU_TOKENS))
def test_kl_penalty(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    shape = (4, 50) if settings.quick else (TOKENS | GPU_TOKENS)[name]
    ref_logprobs = -torch.rand(shape, device=settings.device) * 5
    logprobs = (ref_logprobs + 0.1 * torch.randn_like(ref_logprobs)).requires_grad_()
    upstream = torch.randn_like(ref_logprobs)

    def oracle() -> tuple[Tensor, ...]:
        x = logprobs.detach().double() - ref_logprobs.double()
        return torch.exp(-x) - 1 + x, upstream.double() * (1 - torch.exp(-x))

    verl = peer("verl.trainer.ppo.core_algos", "kl_penalty")
    run(
        Case(
            op="kl_penalty k3",
            label=f"fp32 {shape[0]}×{shape[1]}",
            mode="forward+backward",
            inputs=(logprobs, ref_logprobs),
            providers={
                "eager": eager_k3,
                "compile": compiled(eager_k3),
                "verl": verl and (lambda new, ref: verl(new, ref, "k3")),
                "ours": lambda new, ref: rk.kl_penalty(new, ref, estimator="k3"),
            },
            oracle=oracle,
            # Forward: two in, one out. Backward: upstream and both again in, one out.
            moved=7 * logprobs.numel() * 4,
            upstream=(upstream,),
        )
    )
