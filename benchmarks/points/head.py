"""The fused LM head, forward + backward, against the matrix products that every head needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Missing, Point, Provider, points, sized
from ..harness.peers import kernel, peer
from . import logprobs as of_logits
from .policy import CLIP, CONFIG, terms

POLICY_TARGETS = {
    "fp32": {"eager": 1.4, "trl": 2, "GEMMs": 1 / 1.10},
    "bf16": {"eager": 1.8, "trl": 2, "GEMMs": 1 / 1.15},
    "gpu-bf16": {"GEMMs": 1 / 1.12},
}
LOGPROBS_TARGETS = {"trl": 2, "GEMMs": 1 / 1.12}
SEQUENCES = 8
# Memory of linear_policy_loss on a CPU beyond its inputs and gradients: its chunk budget.
CHUNK_BYTES = 128 << 20
# dtype, tokens, width, vocabulary.
SHAPES = {
    "fp32": (torch.float32, 4096, 1024, 32768),
    "bf16": (torch.bfloat16, 4096, 1024, 32768),
}
# The shape of a real model, Qwen3-0.6B.
FULL_SHAPES = {"qwen3-0.6b": (torch.bfloat16, 1024, 1024, 151936)}
# Shapes of other families (GPT-2 124M, Llama 3.2 1B, Gemma 3 1B), only for the loss.
FAMILIES = {
    "gpt2": (torch.float32, 512, 768, 50257),
    "llama3.2-1b": (torch.bfloat16, 512, 2048, 128256),
    "gemma3-1b": (torch.bfloat16, 512, 1152, 262144),
}
MODELS = FULL_SHAPES | FAMILIES
GPU_SHAPES = {"gpu-bf16": (torch.bfloat16, 8192, 4096, 151936)}
# TRL's own chunk size, over the vocabulary or the tokens.
_TRL_CHUNK = peer("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")


def _operands(point: Point, name: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype, *full = (SHAPES | MODELS | GPU_SHAPES)[name]
    n, width, vocab = point.size((64, 32, 1000), full)
    hidden = torch.randn(n, width, device=point.device).to(dtype)
    weight = (torch.randn(vocab, width, device=point.device) * 2 / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=point.device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def gemms(hidden: Tensor, weight: Tensor, forward: int) -> Callable[[], None]:
    """The products to logits, `forward` times, and the two of a backward pass, preallocated."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for _ in range(forward):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return run


def _bounds(name: str, hidden: Tensor, weight: Tensor, forward: int) -> dict[str, Any]:
    """The label and the bounds of a point with these operands."""
    label = sized(hidden.dtype, *hidden.shape, len(weight))
    return {
        "label": label + (f" ({name})" if name in MODELS else ""),
        "mode": "forward+backward",
        # The operands and their gradients.
        "moved": 2 * (hidden.nbytes + weight.nbytes),
        "flops": (forward + 2) * 2 * hidden.numel() * len(weight),
        "limit": "GEMMs",
        "baselines": {"GEMMs": gemms(hidden, weight, forward)},
        "least_rounds": 3 if name in MODELS else 7,
        "rounded": hidden.dtype,
    }


def cce_head(device: torch.device) -> Provider | Missing:
    """Cut cross entropy, as (hidden, weight, labels) -> log-probabilities."""
    function = kernel(device, "cut_cross_entropy", "linear_cross_entropy")
    return function and (lambda *inputs: -function(*inputs, reduction="none"))


def trl_head() -> Provider | Missing:
    """TRL's chunked head as (hidden, weight, labels, names of outputs) -> outputs."""
    function = peer("trl.trainer.utils", "_ChunkedLogProbFunction")

    def trl(hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> Any:
        options = (1.0, _TRL_CHUNK, None, 1.0, outputs)
        return function.apply(hidden, weight, None, labels, *options)

    return function and trl


def verl_head() -> Provider | Missing:
    """verl's fused head as (hidden, weight, labels) -> log-probabilities, entropies."""
    function = peer("verl.utils.experimental.torch_functional", "FusedLinearForPPO")
    return function and (lambda *inputs: function()(*inputs))


def eager_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Autograd through the logits, as in trainers without a fused head."""
    return of_logits.eager(hidden @ weight.T, labels)


def eager_both(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return of_logits.eager_entropy(hidden @ weight.T, labels)


def _oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, objective: Callable[..., tuple[Tensor, ...]]
) -> Callable[[], tuple[Tensor, ...]]:
    """fp64 outputs and gradients, computed a few rows at a time.

    objective(logprobs, entropy, rows) -> (outputs of these rows, a scalar to differentiate).
    """

    def oracle() -> tuple[Tensor, ...]:
        w = weight.detach().double().requires_grad_()
        found, grads, grad_w = [], [], torch.zeros_like(w)
        for start in range(0, hidden.shape[0], 512):
            rows = slice(start, start + 512)
            h = hidden.detach()[rows].double().requires_grad_()
            logp = F.log_softmax(h @ w.T, dim=-1)
            entropy = -(logp.exp() * logp).sum(-1)
            own = logp.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
            *outputs, total = objective(own, entropy, rows)
            g, gw = torch.autograd.grad(total, (h, w))
            found.append([o.detach() for o in outputs])
            grads.append(g)
            grad_w += gw
        return *map(torch.cat, zip(*found, strict=True)), torch.cat(grads), grad_w

    return oracle


# A point takes minutes, so a short run on a CPU has only one: the loss in bf16.
POINTS = points(["bf16"], GPU_SHAPES, ["fp32", *MODELS])
_LOGPROBS = points((), GPU_SHAPES, [*SHAPES, *FULL_SHAPES])
_ENTROPY = points((), GPU_SHAPES, SHAPES)
LOGPROBS_POINTS = [
    pytest.param(*p.values, entropy, id=f"{p.values[0]}-{kind}", marks=p.marks)
    for kind, entropy, names in (("logprobs", False, _LOGPROBS), ("entropy", True, _ENTROPY))
    for p in names
]


@pytest.mark.parametrize(("name", "entropy"), LOGPROBS_POINTS)
def test_linear_token_logprobs(point: Point, name: str, entropy: bool) -> None:
    hidden, weight, labels = _operands(point, name)
    upstream = tuple(torch.randn(labels.shape, device=point.device) for _ in range(1 + entropy))

    def objective(logprobs: Tensor, entropies: Tensor, rows: slice) -> tuple[Tensor, ...]:
        outputs = (logprobs, entropies)[: len(upstream)]
        pairs = zip(outputs, upstream, strict=True)
        return *outputs, sum((o * u[rows].double()).sum() for o, u in pairs)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        result = rk.linear_token_logprobs(hidden, weight, labels, entropy=entropy)
        return result[: 1 + entropy]

    of_trl, of_verl = trl_head(), verl_head()
    options = peer("torch.nn", "LinearCrossEntropyOptions")
    wanted = ("entropy",) if entropy else ()

    def trl(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in of_trl(*inputs, wanted) if t is not None)

    def torch_fused(*inputs: Tensor) -> Tensor:
        return -F.linear_cross_entropy(*inputs, reduction="none", options=options())

    providers = {
        "eager": eager_both if entropy else eager_logprobs,
        "trl": of_trl and trl,
        # verl always computes the entropy; without an upstream its gradient is zero.
        "verl": of_verl and (lambda *inputs: of_verl(*inputs)[: len(upstream)]),
        "ours": ours,
    }
    if not entropy:
        providers |= {"torch fused": options and torch_fused, "cce": cce_head(point.device)}
    point(
        op="linear_token_logprobs" + (" + entropy" if entropy else ""),
        inputs=(hidden, weight, labels),
        providers=providers,
        oracle=_oracle(hidden, weight, labels, objective),
        targets=LOGPROBS_TARGETS if name in SHAPES and not entropy else {},
        upstream=upstream,
        **_bounds(name, hidden, weight, 2),
    )


@pytest.mark.parametrize("name", POINTS)
def test_linear_policy_loss(point: Point, name: str) -> None:
    hidden, weight, labels = _operands(point, name)
    shape, device = (SEQUENCES, hidden.shape[0] // SEQUENCES), point.device
    with torch.no_grad():
        start = eager_logprobs(hidden, weight, labels).view(shape)
    # Ratios far from the clip bounds, so that a 16-bit product cannot move a token across a bound.
    choices = torch.tensor([-0.4, -0.1, 0.0, 0.1, 0.4], device=device)
    old = start - choices[torch.randint(0, 5, shape, device=device)]
    advantages = torch.randn(SEQUENCES, 1, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    weights = (mask.double() / mask.sum()).float()

    def objective(logprobs: Tensor, _: Tensor, rows: slice) -> tuple[Tensor, ...]:
        o, a, w = (t.flatten()[rows].double() for t in (old, advantages.expand(shape), weights))
        loss = (terms(logprobs, o, a)[1] * w).sum()
        return loss.view(1), loss

    def oracle() -> tuple[Tensor, ...]:
        losses, *gradients = _oracle(hidden, weight, labels, objective)()
        return losses.sum(), *gradients

    def after(function: Provider | Missing) -> Provider | Missing:
        def run(*given: Tensor) -> Tensor:
            *inputs, old, advantages, _, weights = given
            return (terms(function(*inputs).view(shape), old, advantages)[1] * weights).sum()

        return function and run

    def in_shape(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, weight, labels, old, advantages, mask, _ = given
        return hidden.view(*shape, -1), weight, labels.view(shape), old, advantages[:, 0], mask

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        *tensors, mask = in_shape(given)
        result = rk.linear_policy_loss(*tensors, mask=mask, config=CONFIG)
        return result.loss, result.metrics.tensor

    liger_loss = peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def liger(*given: Tensor) -> Tensor:
        hidden, weight, labels, old, advantages, mask = in_shape(given)
        function = liger_loss(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP)
        return function(hidden, weight, labels, mask, advantages, old_per_token_logps=old)[0]

    of_trl, of_verl = trl_head(), verl_head()
    point(
        op="linear_policy_loss",
        inputs=(hidden, weight, labels, old, advantages, mask, weights),
        providers={
            "eager": after(eager_logprobs),
            "trl": after(of_trl and (lambda *inputs: of_trl(*inputs, ())[0])),
            "verl": after(of_verl and (lambda *inputs: of_verl(*inputs)[0])),
            "liger": liger_loss and liger,
            "cce": after(cce_head(device)),
            "ours": ours,
        },
        oracle=oracle,
        targets=POLICY_TARGETS.get(name, {}),
        at_most={"extra_bytes": CHUNK_BYTES} if name in SHAPES else {},
        outputs=1,
        **_bounds(name, hidden, weight, 1),
    )
