"""What the parity tests share: the comparison of four results.

A trainer's function is run in fp32 and, where it can, in fp64. Its fp64 must be our definition's
fp64 to many digits, which says that the formulas are the same; our fp32 must then be that value to
fp32 precision, so that two results which are wrong together are seen too.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.policy_batches import Batch

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import assert_within_budget, generator, to_float64

# Tolerance for fp32 results, relative to the value and to the largest element of the tensor.
FP32 = 2e-6


def with_gradients(loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient in the logprobs, its gradient in the entropy)."""
    wanted = (batch.logprobs, batch.entropy)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return loss.detach(), *gradients


def close(actual: Any, expected: Any, tolerance: float, scale: float = 0.0) -> None:
    """Within tolerance of the largest expected element, or of scale where that is larger."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    if expected.numel():
        scale = max(scale, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


def all_close(actual: tuple, expected: tuple, tolerance: float) -> None:
    """`close` for (loss, *gradients); the loss is a sum of terms about as large as its slopes."""
    loss, *gradients = zip(actual, expected, strict=True)
    close(*loss, tolerance, scale=float(expected[1].abs().sum()))
    for pair in gradients:
        close(*pair, tolerance)


def written_out(formula: Callable[..., Tensor], **options: Any) -> Callable[[Batch], tuple]:
    """A trainer's loss from its formula, as `compare_policy_loss` takes it: without metrics."""
    return lambda batch: (formula(batch, **options), {})


def row_sum(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: the sum of x over the unmasked tokens of each row."""
    return torch.where(mask, x, 0).sum(-1, keepdim=True)


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: the mean of x over the unmasked tokens of each row; 0 for a row without any."""
    return row_sum(x, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


def refused(preset: Callable[..., Any], cases: Iterable[tuple[dict[str, Any], str]]) -> None:
    """Every case is options of the preset and a pattern of the message of its ValueError."""
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            preset(**options)


def probable(batch: Batch) -> Batch:
    """The batch with logarithms of probabilities, of which no part is above 1."""
    names = ("logprobs", "old", "ref", "rollout")
    lower = {name: getattr(batch, name).detach() - 2.3 for name in names}
    lower["logprobs"].requires_grad_()
    return batch._replace(**lower)


def compare_policy_loss(
    theirs: Callable[[Batch], tuple[Tensor, dict[str, float]]],
    batch: Batch,
    config: rk.PolicyLossConfig,
    *,
    normalizer: float | None = None,
    exact: float = 1e-10,
    fp32: float = FP32,
) -> tuple[rk.PolicyMetrics, dict[str, float]]:
    """Value and gradients of a trainer's loss against ours; returns both sides' metrics.

    Args:
        theirs: (loss, metrics) of a batch, differentiable.
        batch: fp32.
        config: ours.
        normalizer: ours.
        exact: tolerance between the trainer in fp64 and our definition in fp64.
        fp32: tolerance of fp32 results against that.
    """

    def options(batch: Batch) -> dict[str, Any]:
        return {
            "ref_logprobs": batch.ref,
            "rollout_logprobs": batch.rollout,
            "entropy": batch.entropy,
            "normalizer": normalizer,
            "config": config,
        }

    wide = Batch(*to_float64(tuple(batch)))
    oracle = with_gradients(reference.policy_loss(*wide[:4], **options(wide))[0], wide)
    all_close(with_gradients(theirs(wide)[0], wide), oracle, exact)
    result = rk.policy_loss(*batch[:3], mask=batch[3], **options(batch))
    loss, metrics = theirs(batch)
    ours = with_gradients(result.loss, batch)
    all_close(ours, oracle, fp32)
    all_close(with_gradients(loss, batch), ours, 2 * fp32)
    # A loss or gradient of almost only zeros would make the comparison trivial.
    assert abs(oracle[0]) > 1e-3
    assert (oracle[1][batch.mask] != 0).float().mean() > 0.2
    assert (oracle[1][~batch.mask] == 0).all()
    if config.entropy_coef != 0:
        assert (oracle[2][batch.mask] != 0).all()
    return result.metrics, metrics


def compare_token_logprobs(
    theirs: Callable[..., tuple[Tensor, Tensor]], vocabulary: int, *, temperature: float = 1.0
) -> None:
    """Log-probability, entropy and their gradient; `theirs(logits, labels, temperature=...)`."""
    g = generator(vocabulary)
    logits = 4 * torch.randn(3, 7, vocabulary, generator=g)
    labels = torch.randint(vocabulary, (3, 7), generator=g)
    weights = torch.randn(2, 3, 7, generator=g)

    def ours(x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return rk.token_logprobs(x, labels, temperature=temperature, entropy=True)[:2]

    def run(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        logprobs, entropy = function(x, labels, temperature=temperature)
        loss = (logprobs * weights[0]).sum() + (entropy * weights[1]).sum()
        return logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, x)[0]

    oracle, plain, actual = run(theirs, logits.double()), run(theirs, logits), run(ours, logits)
    assert oracle[0].max() < 0 and oracle[1].min() > 0 and (oracle[2] != 0).all()
    closed = (logits.double() / temperature).log_softmax(-1)
    close(oracle[0], closed.gather(-1, labels.unsqueeze(-1)).squeeze(-1), 1e-12)
    close(oracle[1], -(closed.exp() * closed).sum(-1), 1e-12)
    # Differences of logits up to some 30; slopes that are sums of terms of some 4.
    for a, o, p, scale in zip(actual, oracle, plain, (32.0, 32.0, 4.0), strict=True):
        assert_within_budget(a, o, p, scale=scale)
        close(p, o, 1e-5)

    # bfloat16: the oracle reads the same rounded logits. The trainers round log-probabilities of
    # up to 30 to 8 bits, and their entropy is made of such (off by up to 0.12); ours keeps fp32.
    # The gradient is bfloat16, to whose last bit Triton's interpreter truncates.
    half = logits.bfloat16()
    oracle, plain, actual = run(theirs, half.double()), run(theirs, half), run(ours, half)
    for a, o, p, digits in zip(actual, oracle, plain, (FP32, FP32, 2**-7), strict=True):
        close(a, o, digits)
        close(p, o, 2**-4)
