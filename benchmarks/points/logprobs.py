"""token_logprobs, with and without entropy, forward and backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Case, Missing, Overwriting, Provider, Settings, compiled
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
# Entropy may cost 15 %: the ratio of the time without it to the time with it.
_FREE = 1 / 1.15
SHAPES = {
    "fp32": Shape(
        *(torch.float32, 8, 256, 32768),
        {
            ("forward", False): {"eager": 6, "compile": 1.6, "read": 0.6},
            ("forward", True): {"eager": 15, "compile": 2, "no entropy": _FREE},
        },
    ),
    "bf16": Shape(
        *(torch.bfloat16, 2, 128, 151936),
        {
            ("forward", False): {"eager": 12, "compile": 2},
            ("forward", True): {"eager": 25, "compile": 3, "no entropy": _FREE},
        },
    ),
}
# The other dtype on each of these.
TARGETED_SHAPES = {
    "bf16-2048x32768": Shape(torch.bfloat16, 8, 256, 32768, SHAPES["bf16"].targets),
    "fp32-256x151936": Shape(torch.float32, 2, 128, 151936, SHAPES["fp32"].targets),
}
# The vocabularies of model families (Qwen's is above), 64 to 128 MiB of logits.
FAMILIES = {
    "gpt2": Shape(torch.float32, 2, 256, 50257, {}),
    "llama3": Shape(torch.bfloat16, 2, 128, 128256, {}),
    "deepseek-v3": Shape(torch.bfloat16, 2, 128, 129280, {}),
    "gemma3": Shape(torch.bfloat16, 2, 64, 262208, {}),
}

_GPU_TARGETS = {
    ("forward", True): {"eager": 12, "trl": 12, "copy": 0.9},
    ("backward", True): {"copy": 0.85},
    ("forward", False): {"copy": 0.9},
    ("backward", False): {"copy": 0.85},
    ("forward+backward", False): {},
}
# Ahead of every kernel that does the same.
_GPU_TARGETS = {
    (mode, entropy): v
    | dict.fromkeys(("trl kernel",) if entropy else ("trl kernel", "liger", "flash-attn"), 1.0)
    for (mode, entropy), v in _GPU_TARGETS.items()
}
# Nothing to compare: Liger has its gradient from the forward.
del _GPU_TARGETS["backward", False]["liger"]
GPU_SHAPES = {
    "gpu-bf16": Shape(torch.bfloat16, 8, 1024, 151936, _GPU_TARGETS),
    "gpu-fp32": Shape(torch.float32, 1, 1024, 32000, {}),
    "gpu-few-rows": Shape(torch.bfloat16, 1, 64, 151936, {}),
}


def _points(shape: str, modes: tuple[str, ...], entropies: tuple[bool, ...], *marks: Any) -> list:
    """(shape, entropy, mode) of every point of a shape."""
    return [
        pytest.param(
            *(shape, entropy, mode),
            id=f"{shape}-{'entropy' if entropy else 'logprobs'}-{mode}",
            marks=marks,
        )
        for entropy in entropies
        for mode in modes
    ]


_ALL = SHAPES | TARGETED_SHAPES | FAMILIES | GPU_SHAPES
BOTH, GPU, FULL = (False, True), pytest.mark.gpu, pytest.mark.full
ONLY_FULL = {"backward": (FULL,)}
POINTS = [
    # The backward alone in the full run: forward+backward has it too.
    *(p for n in SHAPES for m in MODES for p in _points(n, (m,), BOTH, *ONLY_FULL.get(m, ()))),
    *(p for n in TARGETED_SHAPES for p in _points(n, MODES, BOTH, FULL)),
    *(p for n in FAMILIES for p in _points(n, MODES[2:], BOTH, FULL)),
    # On a GPU what the targets are about.
    *_points("gpu-bf16", MODES[:2], (True,), GPU),
    *_points("gpu-bf16", MODES, (False,), GPU),
    *(p for n in list(GPU_SHAPES)[1:] for p in _points(n, MODES[:2], (True,), GPU)),
]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """What a trainer writes: fp32 results, as ours."""
    logp = F.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def _ours(entropy: bool) -> Provider:
    def ours(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        result = rk.token_logprobs(logits, labels, entropy=entropy)
        return tuple(result) if entropy else (result.logprobs,)

    return ours


def _trl(batch: int, entropy: bool) -> Provider:
    # TRL passes [B, T, V] and loops over B, or, with bf16, over B again in bf16.
    function = peer(
        "trl.trainer.utils",
        "selective_log_softmax_and_entropy" if entropy else "selective_log_softmax",
    )

    def trl(logits: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        shaped = labels.view(batch, -1)
        result = function(logits.view(*shaped.shape, -1), shaped)
        return tuple(r.flatten() for r in result) if entropy else result.flatten()

    return function and trl


def _verl(entropy: bool) -> Provider:
    # verl's packed path: [total tokens, V], a loop over tokens.
    logprobs = peer("verl.utils.torch_functional", "logprobs_from_logits")
    entropies = peer("verl.utils.torch_functional", "entropy_from_logits")

    def verl(logits: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = logprobs(logits, labels, inplace_backward=False)
        return (found, entropies(logits)) if entropy else found

    return logprobs and verl


def _trl_kernel(entropy: bool, device: torch.device) -> Provider | Missing:
    """It has no form without the entropy."""
    function = Missing("needs a GPU") if device.type == "cpu" else trl_kernel()
    return function and (lambda logits, labels: function(logits, labels)[: 2 if entropy else 1])


def _liger(mode: str, device: torch.device) -> Provider | Missing:
    if mode == "backward":
        return Missing("its forward computes the gradient: see forward+backward")
    function = kernel(device, "liger_kernel.transformers.functional", "liger_cross_entropy")
    # It writes the gradient over the logits. Its loss has their dtype.
    return function and Overwriting(
        lambda logits, labels: -function(logits, labels, reduction="none")
    )


def _flash_attn(device: torch.device) -> Provider | Missing:
    function = kernel(device, "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return function and (lambda logits, labels: -function(logits, labels)[0])


def _quack(device: torch.device) -> Provider | Missing:
    function = kernel(device, "quack.cross_entropy", "cross_entropy")
    return function and (lambda logits, labels: -function(logits, labels, reduction="none"))


def _oracle(
    logits: Tensor, labels: Tensor, rows: Tensor, upstream: tuple[Tensor, ...], gradient: bool
) -> Callable[[], tuple[Tensor, ...]]:
    def oracle() -> tuple[Tensor, ...]:
        z = logits.detach()[rows].double().requires_grad_(gradient)
        logp = (z - z.logsumexp(-1, keepdim=True))[
            torch.arange(len(rows), device=rows.device), labels[rows]
        ]
        p = z.softmax(-1)
        entropy = z.logsumexp(-1) - (p * z).sum(-1)
        outputs = (logp, entropy)[: len(upstream)]
        if not gradient:
            return outputs
        gradients = torch.autograd.grad(outputs, z, [u[rows].double() for u in upstream])
        return tuple(o.detach() for o in outputs) + gradients

    return oracle


@pytest.mark.parametrize(("name", "entropy", "mode"), POINTS)
def test_token_logprobs(
    run: Callable[[Case], None], settings: Settings, name: str, entropy: bool, mode: str
) -> None:
    on_gpu = name in GPU_SHAPES
    dtype, batch, length, vocab, targets = _ALL[name]
    if settings.quick:
        batch, length, vocab = 2, 12, 1000
    n, device = batch * length, settings.device
    logits = (torch.randn(n, vocab, device=device) * 2).to(dtype)
    logits.requires_grad_(mode != "forward")
    labels = torch.randint(0, vocab, (n,), device=device)
    upstream = tuple(torch.randn(n, device=device) for _ in range(2 if entropy else 1))
    rows = torch.randperm(n, device=device)[:SAMPLED_ROWS]
    plain = eager_entropy if entropy else eager
    providers = {
        "eager": plain,
        "compile": compiled(plain),
        "trl": _trl(batch, entropy),
        "verl": _verl(entropy),
        "trl kernel": _trl_kernel(entropy, device),
        "ours": _ours(entropy),
    }
    if not entropy:
        # A cross entropy of its own for each token: the log-probability, negated.
        providers |= {"liger": _liger(mode, device), "flash-attn": _flash_attn(device)}
        providers["quack"] = _quack(device)
    wanted = targets.get((mode, entropy), {})
    if not on_gpu and name not in FAMILIES:
        wanted = targets.get((mode, entropy), _BACKWARD if mode == "backward" else _BOTH)
    tensor_bytes = logits.numel() * logits.element_size()
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
    run(
        Case(
            op="token_logprobs + entropy" if entropy else "token_logprobs",
            label=f"{'fp32' if dtype is torch.float32 else 'bf16'} {n}×{vocab}"
            + (f" ({name})" if name in FAMILIES else ""),
            mode=mode,
            inputs=(logits, labels),
            providers=providers,
            oracle=_oracle(logits, labels, rows, upstream, mode != "forward"),
            moved=passes * tensor_bytes + 16 * n,
            limit="read" if mode == "forward" and not on_gpu else "copy",
            targets=wanted,
            select=lambda t: t[rows],
            upstream=upstream,
            extra={"no entropy": _ours(False)}
            if entropy and mode == "forward" and not on_gpu
            else {},
        )
    )
