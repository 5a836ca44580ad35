"""Rows of logits at every address, with masks at the ends of their range, and labels at every edge
of what the backends cut rows into."""

import pytest
import torch

from tests.ops.logprobs_cases import check_against_oracle, problem

import rlhf_kernels as rk
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, generator

# Two tiles of the smallest and the largest kind, and some columns more.
VOCAB = 2 * 2048 + 9


def logprobs_of(logits, **options):
    """(logprobs, entropy, gradient of both) of rows whose label is the last word."""
    logits = logits.detach().requires_grad_()
    labels = torch.full(logits.shape[:-1], logits.shape[-1] - 1)
    found = rk.token_logprobs(logits, labels, entropy=True, **options)
    (gradient,) = torch.autograd.grad((found.logprobs + 0.5 * found.entropy).sum(), logits)
    return found.logprobs, found.entropy, gradient


def divergence_of(logits, ref, direction):
    """(kl, gradient)."""
    logits = logits.detach().requires_grad_()
    kl = rk.kl_divergence(logits, ref, direction=direction)
    return kl, torch.autograd.grad(kl.sum(), logits)[0]


def moved(row: torch.Tensor, elements: int) -> torch.Tensor:
    """The same row, so many elements behind a multiple of 16 bytes, in a sea of NaN."""
    sea = torch.full((row.numel() + 64,), float("nan"), dtype=row.dtype)
    assert sea.data_ptr() % 16 == 0
    return sea[elements : elements + row.numel()].copy_(row.reshape(-1)).reshape(row.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_address(backend, dtype):
    g = generator(5)
    row, ref = ((torch.randn(1, VOCAB, generator=g) * 4).to(dtype) for _ in range(2))
    places = range(1, 16 // row.element_size())
    for options in ({}, {"softcap": 7.0}):
        want = logprobs_of(row, **options)
        for place in places:
            for x, y in zip(logprobs_of(moved(row, place), **options), want, strict=True):
                assert_bitwise_equal(x, y)
    for direction in ("reverse", "forward"):
        want = divergence_of(row, ref, direction)
        for place in places:
            # Both rows lie alike, and one of them does not.
            for other in (moved(ref, place), ref):
                for x, y in zip(
                    divergence_of(moved(row, place), other, direction), want, strict=True
                ):
                    assert_bitwise_equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_batch_are_rows_alone(backend, dtype):
    # With an odd vocabulary the rows of a batch start at different alignments.
    logits = (torch.randn(9, VOCAB, generator=generator(6)) * 4).to(dtype)
    together = logprobs_of(logits)
    divergences = divergence_of(logits, logits.flip(0), "reverse")
    for i in range(9):
        for x, y in zip(logprobs_of(logits[i : i + 1].clone()), together, strict=True):
            assert_bitwise_equal(x[0], y[i])
        alone = divergence_of(logits[i : i + 1].clone(), logits[8 - i : 9 - i].clone(), "reverse")
        for x, y in zip(alone, divergences, strict=True):
            assert_bitwise_equal(x[0], y[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_at_every_edge(backend, dtype):
    vocab = 2061
    edges = [*range(9), *range(1015, 1033), *range(2040, 2061)]
    logits, _ = problem(len(edges), vocab, dtype, spread=2.0)
    check_against_oracle(logits, torch.tensor(edges))


# The largest logit of a row, and the temperature: where a distance to the maximum overflows, and
# where the lowest number of a dtype is not far from it.
ENDS = [
    (torch.float32, 3.0e38, 1.0),
    (torch.float32, -3.0e38, 1.0),
    (torch.float32, 2.0e37, 1e15),
    (torch.bfloat16, 3.0e38, 1.0),
    (torch.bfloat16, -3.38953139e38, 1.0),
    (torch.bfloat16, 20.0, 1e15),
    (torch.float16, 6.5e4, 1.0),
    (torch.float16, -6.5e4, 1.0),
    (torch.float16, 20.0, 1e4),
]


def masked_rows(dtype, top, *, seed):
    """Rows of which a third is -inf, one tile all of it, and the kept columns."""
    g = generator(seed)
    rows = torch.full((2, VOCAB), float("-inf"), dtype=dtype)
    kept = torch.cat([torch.arange(0, 2048, 3), torch.arange(4000, VOCAB)])
    near = 1 - 2.0**-6 * torch.randint(0, 3, (2, len(kept)), generator=g)
    # Towards zero is up for a negative one.
    rows[:, kept] = (top * (near if top > 0 else 1.0 + 0 * near)).to(dtype)
    return rows, kept


@pytest.mark.parametrize("dtype,top,temperature", ENDS)
def test_masked_rows_at_the_ends_of_the_range(backend, dtype, top, temperature):
    rows, kept = masked_rows(dtype, top, seed=7)
    logprobs, entropy, gradient = logprobs_of(rows, temperature=temperature)
    z = rows[:, kept].double().requires_grad_()
    logp = torch.log_softmax(z / temperature, -1)
    want = -(logp.exp() * logp.clamp_min(-1e300)).sum(-1)
    (slope,) = torch.autograd.grad((logp[:, -1] + 0.5 * want).sum(), z)
    size = logp[:, -1].detach().abs() + 8
    assert ((logprobs.double() - logp[:, -1].detach()).abs() <= 2e-6 * size).all()
    assert ((entropy.double() - want.detach()).abs() <= 4e-6 * (want.detach() + 1)).all()
    error = (gradient[:, kept].double() - slope).abs()
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert (error <= slope.abs() * 2**-7 + 1e-5 * slope.abs().amax() + least).all()
    gone = torch.ones(VOCAB, dtype=torch.bool)
    gone[kept] = False
    # Zeros without a sign.
    assert (gradient[:, gone] == 0).all() and not gradient[:, gone].signbit().any()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype,top,temperature", ENDS)
def test_divergence_of_masked_rows_at_the_ends(backend, dtype, top, temperature, direction):
    (rows, kept), (ref, _) = (masked_rows(dtype, top, seed=s) for s in (8, 9))
    if top > 1000:
        # Where one has no weight, nor has the other.
        ref = rows.flip(0) if temperature > 1 else rows.clone()
    x = rows.clone().requires_grad_()
    kl = rk.kl_divergence(x, ref, temperature=temperature, direction=direction)
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    p, q = (torch.log_softmax(y[:, kept].double() / temperature, -1) for y in (rows, ref))
    p, q = (p, q) if direction == "reverse" else (q, p)
    want = (p.exp() * torch.where(p < -1e4, 0.0, p - q)).sum(-1)
    assert ((kl.double() - want).abs() <= 1e-5 * (1 + want)).all()
    assert gradient.isfinite().all()
    gone = torch.ones(VOCAB, dtype=torch.bool)
    gone[kept] = False
    assert (gradient[:, gone] == 0).all()
