"""token_logprobs, with and without entropy, forward and backward."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Missing, Overwriting, Point, Provider, against, exact, sized
from ..harness.peers import kernel, peer, trl_kernel

MODES = ("forward", "backward", "forward+backward")
SAMPLED_ROWS = 16


class Shape(NamedTuple):
    dtype: torch.dtype
    batch: int
    length: int
    vocab: int
    targets: dict[tuple[str, bool], dict[str, float]]


_BACKWARD = {"eager": 5, "compile": 1.5, "copy": 0.6}
_BOTH = {"eager": 5, "compile": 1.5}
# The entropy may add 15 %: this is the minimum ratio of the time without it to the time with it.
_FREE = 1 / 1.15
_FP32 = {
    ("forward", False): {"eager": 6, "compile": 1.6, "read": 0.6},
    ("forward", True): {"eager": 15, "compile": 2, "no entropy": _FREE},
}
_BF16 = {
    ("forward", False): {"eager": 12, "compile": 2},
    ("forward", True): {"eager": 25, "compile": 3, "no entropy": _FREE},
}
SHAPES = {
    "fp32": Shape(torch.float32, 8, 256, 32768, _FP32),
    "bf16": Shape(torch.bfloat16, 2, 128, 151936, _BF16),
}
# Each shape with the other dtype.
TARGETED_SHAPES = {
    "bf16-2048x32768": Shape(torch.bfloat16, 8, 256, 32768, _BF16),
    "fp32-256x151936": Shape(torch.float32, 2, 128, 151936, _FP32),
}
# With so few logits, the host time of a call dominates.
HOST_SHAPES = {"4x16x64": Shape(torch.float32, 4, 16, 64, {})}
# The vocabularies of model families (Qwen's is above), 64 to 128 MiB of logits.
FAMILIES = {
    "gpt2": Shape(torch.float32, 2, 256, 50257, {}),
    "llama3": Shape(torch.bfloat16, 2, 128, 128256, {}),
    "deepseek-v3": Shape(torch.bfloat16, 2, 128, 129280, {}),
    "gemma3": Shape(torch.bfloat16, 2, 64, 262208, {}),
}

# Targets to be faster than all similar kernels. Liger computes its gradient in the forward pass.
_AHEAD = {"trl kernel": 1.0, "liger": 1.0, "flash-attn": 1.0}
_GPU_TARGETS = {
    ("forward", True): {"eager": 12, "trl": 12, "copy": 0.9, "trl kernel": 1.0},
    ("backward", True): {"copy": 0.85, "trl kernel": 1.0},
    ("forward", False): {"copy": 0.9} | _AHEAD,
    ("backward", False): {"copy": 0.85, "trl kernel": 1.0, "flash-attn": 1.0},
    ("forward+backward", False): _AHEAD,
}
GPU_SHAPES = {
    "gpu-bf16": Shape(torch.bfloat16, 8, 1024, 151936, _GPU_TARGETS),
    "gpu-fp32": Shape(torch.float32, 1, 1024, 32000, {}),
    "gpu-few-rows": Shape(torch.bfloat16, 1, 64, 151936, {}),
}


def _points(shape: str, modes: tuple[str, ...], entropies: tuple[bool, ...], *marks: Any) -> list:
    """The points (shape, entropy, mode) of a shape."""
    kinds = [(e, "entropy" if e else "logprobs", mode) for e in entropies for mode in modes]
    return [
        pytest.param(shape, e, m, id=f"{shape}-{kind}-{m}", marks=marks) for e, kind, m in kinds
    ]


_UNTARGETED = HOST_SHAPES | FAMILIES
_ALL = SHAPES | TARGETED_SHAPES | _UNTARGETED | GPU_SHAPES
BOTH, GPU, FULL = (False, True), pytest.mark.gpu, pytest.mark.full
ONLY_FULL = {"backward": (FULL,)}
POINTS = [
    # Only a full run measures the backward pass alone; forward+backward includes it.
    *(p for n in SHAPES for m in MODES for p in _points(n, (m,), BOTH, *ONLY_FULL.get(m, ()))),
    *(p for n in HOST_SHAPES for p in _points(n, MODES[::2], (False,))),
    *(p for n in TARGETED_SHAPES for p in _points(n, MODES, BOTH, FULL)),
    *(p for n in FAMILIES for p in _points(n, MODES[2:], BOTH, FULL)),
    # On a GPU, only modes that have targets.
    *_points("gpu-bf16", MODES[:2], (True,), GPU),
    *_points("gpu-bf16", MODES, (False,), GPU),
    *(p for n in list(GPU_SHAPES)[1:] for p in _points(n, MODES[:2], (True,), GPU)),
]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual code of a trainer, with fp32 results as ours."""
    logp = F.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def _ours(entropy: bool) -> Provider:
    def ours(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        result = rk.token_logprobs(logits, labels, entropy=entropy)
        return result[: 1 + entropy]

    return ours


def _trl(batch: int, entropy: bool) -> Provider:
    # TRL passes [B, T, V] and loops over B; for bf16 it loops over B again in bf16.
    function = peer("trl.trainer.utils", "selective_log_softmax" + "_and_entropy" * entropy)

    def trl(logits: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        shaped = labels.view(batch, -1)
        result = function(logits.view(*shaped.shape, -1), shaped)
        return tuple(r.flatten() for r in result) if entropy else result.flatten()

    return function and trl


def _verl(entropy: bool) -> Provider:
    # verl's packed path takes [total tokens, V] and loops over tokens.
    logprobs = peer("verl.utils.torch_functional", "logprobs_from_logits")
    entropies = peer("verl.utils.torch_functional", "entropy_from_logits")

    def verl(logits: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = logprobs(logits, labels, inplace_backward=False)
        return (found, entropies(logits)) if entropy else found

    return logprobs and verl


def _cross_entropies(mode: str, device: torch.device) -> dict[str, Provider | Missing]:
    """Cross entropies per token; negated they are log-probabilities."""
    liger = kernel(device, "liger_kernel.transformers.functional", "liger_cross_entropy")
    flash_attn = kernel(device, "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    quack = kernel(device, "quack.cross_entropy", "cross_entropy")
    # Liger writes the gradient over the logits, and its loss has their dtype.
    own = liger and Overwriting(lambda z, labels: -liger(z, labels, reduction="none"))
    if mode == "backward":
        own = Missing("its forward computes the gradient: see forward+backward")
    return {
        "liger": own,
        "flash-attn": flash_attn and (lambda z, labels: -flash_attn(z, labels)[0]),
        "quack": quack and (lambda z, labels: -quack(z, labels, reduction="none")),
    }


@pytest.mark.parametrize(("name", "entropy", "mode"), POINTS)
def test_token_logprobs(point: Point, name: str, entropy: bool, mode: str) -> None:
    on_gpu, gradient = name in GPU_SHAPES, mode != "forward"
    dtype, *full, targets = _ALL[name]
    batch, length, vocab = point.size((2, 12, 1000), full)
    n, device = batch * length, point.device
    logits = (torch.randn(n, vocab, device=device) * 2).to(dtype).requires_grad_(gradient)
    labels = torch.randint(0, vocab, (n,), device=device)
    upstream = tuple(torch.randn(n, device=device) for _ in range(1 + entropy))
    rows = torch.randperm(n, device=device)[:SAMPLED_ROWS]

    def outputs(z: Tensor) -> tuple[Tensor, ...]:
        own = z.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        logsumexp = z.logsumexp(-1)
        return (own - logsumexp, logsumexp - (z.softmax(-1) * z).sum(-1))[: len(upstream)]

    of_trl = trl_kernel() if device.type != "cpu" else Missing("needs a GPU")
    others: dict[str, Provider | Missing] = {
        "trl": _trl(batch, entropy),
        "verl": _verl(entropy),
        # The kernel always computes the entropy.
        "trl kernel": of_trl and (lambda z, labels: of_trl(z, labels)[: len(upstream)]),
    }
    others |= {} if entropy else _cross_entropies(mode, device)
    wanted = targets.get((mode, entropy), {})
    if not on_gpu and name not in _UNTARGETED:
        wanted = targets.get((mode, entropy), _BACKWARD if mode == "backward" else _BOTH)
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
    point(
        op="token_logprobs + entropy" if entropy else "token_logprobs",
        label=sized(dtype, n, vocab) + (f" ({name})" if name in FAMILIES else ""),
        mode=mode,
        inputs=(logits, labels),
        providers=against(eager_entropy if entropy else eager, _ours(entropy), others=others),
        oracle=lambda: exact(outputs, [logits[rows]], [u[rows] for u in upstream], gradient),
        moved=passes * logits.nbytes + 16 * n,
        limit="copy" if gradient or on_gpu else "read",
        targets=wanted,
        select=lambda t: t[rows],
        upstream=upstream,
        extra={"no entropy": _ours(False)} if entropy and not (gradient or on_gpu) else {},
    )
