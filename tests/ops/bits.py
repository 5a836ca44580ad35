"""How the tests of several operations compare bits: over threads, compiled, strided, spoiled."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.testing import assert_bitwise_equal

#: (cu_seqlens, normalizer) of 24 packed tokens, one of the two bad.
BAD_BATCHES = (
    *(
        (offsets, 1.0)
        for offsets in (
            *([0, 8, 20], [1, 8, 24], [0, 30, 24], [0, 16, 8, 24]),
            *([-5, 8, 24], [0, 2**40, 24], [24, 0, 24]),
        )
    ),
    *(([0, 24], normalizer) for normalizer in (0.0, -1.0, math.nan, math.inf)),
)

#: A tensor [B, T] behind other strides.
VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    lambda t: t.t().contiguous().t(),
    lambda t: torch.stack([t, t], -1).reshape(t.shape[0], -1)[:, ::2],
)


def same(backend: str, **tolerances: float) -> Callable[..., None]:
    """How to compare what ought to be the same: bitwise for kernels, not for the reference.

    torch's own reductions depend on shape and strides.
    """
    if backend != "reference":
        return assert_bitwise_equal
    return lambda a, e: torch.testing.assert_close(a, e, **tolerances)


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, e)


def with_threads(f: Callable[[], Any], counts: Sequence[int] = (1, 2, 4)) -> Iterator[Any]:
    """The result of `f` with each number of threads."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield f()
    finally:
        torch.set_num_threads(before)


def check_threads(f: Callable[[], Sequence[Tensor]]) -> None:
    first, *others = with_threads(f)
    for other in others:
        assert_same_bits(other, first)


def check_compiled(
    step: Callable[..., Sequence[Tensor]],
    batches: Iterable[tuple[Tensor, ...]],
    sources: Callable[[tuple[Tensor, ...]], Sequence[Tensor]] | None = None,
) -> None:
    """Compiled without a graph break, once for all batches, `step` gives the bits of eager code.

    sources: the tensors of a batch that the first result is differentiated by. With them the
        backward pass is compiled too.
    """
    compiles = 0

    def count(module: Any, _: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return module.forward

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    traced = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in batches:
        expected, actual = step(*batch), compiled(*batch)
        if sources is None:
            assert_same_bits(actual, expected)
            continue
        actual, of = traced(*batch), sources(batch)
        assert_same_bits(actual, expected)
        gradients = (torch.autograd.grad(results[0], of) for results in (actual, expected))
        assert_same_bits(*gradients)
    assert compiles <= 2


def check_upstream(logprobs: Tensor, logits: Tensor) -> None:
    """Any strides of the upstream gradient of logprobs [N] give the bits of a contiguous one."""

    def gradient(result: Tensor, *upstream: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(result, logits, *upstream, retain_graph=True)
        return found

    upstream = torch.randn(logprobs.shape[0], 5)[:, 2]
    assert_bitwise_equal(gradient(logprobs, upstream), gradient(logprobs, upstream.contiguous()))
    # sum() hands over a stride-0 gradient.
    assert_bitwise_equal(gradient(logprobs.sum()), gradient(logprobs, torch.ones_like(logprobs)))
