"""Reference of token log-probabilities, entropy and log-sum-exp."""

from typing import Any

import torch
from torch import Tensor

from ..core import tracing
from ..core.layout import any_of_token
from ..core.row_options import RowResults
from . import shard
from ._common import compute, distances, per_row, with_options


class _LogProb(torch.autograd.Function):
    """log softmax(d)_y of d [..., V] and y [..., K]; no upstream gradient gives a zero row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, y: Tensor) -> Tensor:
        return torch.log_softmax(d, -1).gather(-1, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d, y = ctx.saved_tensors
        slope = -grad.sum(-1, keepdim=True) * torch.log_softmax(d, -1).exp()
        slope = slope.scatter_add(-1, y, grad)
        # where, not a product: 0 * NaN is NaN.
        return torch.where((grad == 0).all(-1, keepdim=True), 0, slope), None


class _Entropy(torch.autograd.Function):
    """H = log s - mean of d under p = e^d / s, of d [..., V] with maximum 0; dH/dd = -p (d - mean).

    This form has no cancellation at large or small temperatures; -p (log p + H) would.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor) -> Tensor:
        _, mean = _weights(d)
        return torch.logsumexp(d, -1) - mean.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        p, mean = _weights(d)
        slope = torch.where(p > 0, p * (mean - d), 0)
        return torch.where(grad.unsqueeze(-1) == 0, 0, grad.unsqueeze(-1) * slope)


class _LogSumExp(torch.autograd.Function):
    """log sum_j e^d_j of d [..., V]; a zero upstream gradient gives a zero row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor) -> Tensor:
        return torch.logsumexp(d, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return torch.where(grad == 0, 0, grad * torch.softmax(d, -1))


class _Collision(torch.autograd.Function):
    """C = sum_j p_j^2 of p = softmax(d), d [..., V]; dC/dd = 2 p (p - C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor) -> Tensor:
        return torch.softmax(d, -1).square().sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        p, grad = torch.softmax(d, -1), grad.unsqueeze(-1)
        slope = 2 * p * (p - p.square().sum(-1, keepdim=True))
        return torch.where(grad == 0, 0, grad * slope)


def first_of_largest(logits: Tensor) -> Tensor:
    """The id [...] of the first of the largest logits [..., V]; of the first NaN if any."""
    # torch.argmax gives any of several on a GPU.
    logits = logits.detach()
    nan = logits.isnan()
    hit = torch.where(nan.any(-1, keepdim=True), nan, logits == logits.amax(-1, keepdim=True))
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(hit, ids, logits.shape[-1]).amin(-1)


def _weights(d: Tensor) -> tuple[Tensor, Tensor]:
    """p = softmax(d) and the mean of d under p, [..., 1]; a term with p = 0 is 0, even at -inf."""
    p = torch.softmax(d, -1)
    return p, (p * torch.where(p > 0, d, 0)).sum(-1, keepdim=True)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    lse: bool = False,
    collision: bool = False,
    argmax: bool = False,
    group: str = "",
    **options: Any,
) -> RowResults:
    """log p_y, H = -sum_j p_j log p_j, sum_j p_j^2, log sum_j exp(z_j) and argmax_j of logits.

    p = softmax(z), z = with_options(logits) / temperature.

    Args:
        logits: [..., V].
        labels: [...] or [..., K], integers in [0, V) or `ignore_index`.
        temperature: a number, or a tensor that broadcasts to the shape of the tokens.
        entropy: also return H.
        ignore_index: tokens with this label have result 0 and gradient 0, whatever their logits.
        lse: also return log sum_j exp(z_j).
        collision: also return sum_j p_j^2.
        argmax: also return the id of the largest logit; -1 for an ignored token.
        group: name of the process group over which V is sharded; "" for none.
        options: those of `with_options`.
    """
    if group:
        return shard.token_logprobs(
            logits,
            labels,
            temperature=temperature,
            entropy=entropy,
            ignore_index=ignore_index,
            lse=lse,
            collision=collision,
            argmax=argmax,
            group=group,
            **options,
        )
    tracing.refuse_tangents("token_logprobs", logits)
    wanted, several = labels != ignore_index, labels.dim() == logits.dim()
    keep = any_of_token(wanted, logits.dim() - 1)
    z = with_options(torch.where(keep.unsqueeze(-1), compute(logits), 0), **options)
    rates = per_row(temperature, keep)
    d = distances(z, rates)
    y = torch.where(wanted, labels, 0).long()
    found = _LogProb.apply(d, y if several else y.unsqueeze(-1))
    logprobs = torch.where(wanted, found if several else found.squeeze(-1), 0)
    of_entropy = torch.where(keep, _Entropy.apply(d), 0) if entropy else None
    squares = torch.where(keep, _Collision.apply(d), 0) if collision else None
    ids = torch.where(keep, first_of_largest(logits), -1) if argmax else None
    if not lse:
        return RowResults(logprobs, of_entropy, squares, None, ids)
    top = (z.detach().amax(-1, keepdim=True) / rates).squeeze(-1)
    of_lse = torch.where(keep, _LogSumExp.apply(d) + top, 0)
    return RowResults(logprobs, of_entropy, squares, of_lse, ids)
