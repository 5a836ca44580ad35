"""token_logprobs over the tokens that top-k sampling kept, forward and forward + backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Point, against, exact, points, sized

SAMPLED_ROWS = 16
# dtype, tokens, vocabulary, number of tokens that the sampler kept.
SHAPES = {"fp32": (torch.float32, 1024, 32768, 64)}
FULL_SHAPES = {"bf16": (torch.bfloat16, 256, 151936, 64)}
GPU_SHAPES = {"gpu-bf16": (torch.bfloat16, 8192, 151936, 64)}


def eager(logits: Tensor, labels: Tensor, kept: Tensor, *_: Tensor) -> Tensor:
    """The usual code of a trainer: -inf for all tokens that the sampler dropped; kept [N, K]."""
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
    logp = F.log_softmax(logits.float().masked_fill(dropped, -torch.inf), dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def ours(logits: Tensor, labels: Tensor, _: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    return rk.token_logprobs(logits, labels, support=(indptr, indices)).logprobs


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_token_logprobs_support(point: Point, name: str, mode: str) -> None:
    dtype, *full = (SHAPES | FULL_SHAPES | GPU_SHAPES)[name]
    n, vocab, k = point.size((24, 1000, 8), full)
    device, gradient = point.device, mode != "forward"
    logits = (torch.randn(n, vocab, device=device) * 2).to(dtype)
    kept = logits.topk(k, sorted=False).indices
    labels = kept[torch.arange(n, device=device), torch.randint(0, k, (n,), device=device)]
    indptr = torch.arange(0, n * k + 1, k, device=device)
    upstream = torch.randn(n, device=device)
    rows = torch.randperm(n, device=device)[:SAMPLED_ROWS]
    logits.requires_grad_(gradient)

    def logprobs(z: Tensor) -> Tensor:
        own = z.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        return own - z.gather(-1, kept[rows]).logsumexp(-1)

    entry = 8 + logits.element_size()
    point(
        op="token_logprobs, support",
        label=f"{sized(dtype, n, vocab)}, {k} kept",
        mode=mode,
        inputs=(logits, labels, kept, indptr, kept.flatten()),
        providers=against(eager, ours),
        oracle=lambda: exact(logprobs, [logits[rows]], [upstream[rows]], gradient),
        # Kept logits and their indices; backward writes the whole gradient, which is mostly 0.
        moved=n * k * entry + gradient * logits.nbytes,
        select=lambda t: t[rows],
        upstream=(upstream,),
    )
