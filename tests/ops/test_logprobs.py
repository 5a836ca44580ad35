"""token_logprobs on every backend: values, gradients, rows that nobody asks for."""

import math

import pytest
import torch

from tests.ops.logprobs_cases import OPTIONS, check_against_oracle, problem, run

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import (
    DTYPES,
    RAGGED_SIZES,
    assert_bitwise_equal,
    generator,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", RAGGED_SIZES)
def test_matches_fp64(backend, vocab, dtype):
    logits, labels = problem(5, vocab, dtype)
    check_against_oracle(logits, labels)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_match_fp64(backend, dtype, options):
    logits, labels = problem(6, 4173, dtype)
    check_against_oracle(logits, labels, **options)


def test_temperature_per_token(backend):
    logits, labels = problem(6, 501, torch.float32)
    temperature = torch.tensor([0.3, 0.5, 1.0, 1.7, 2.0, 8.0])
    check_against_oracle(logits, labels, temperature=temperature)
    one = rk.token_logprobs(logits, labels, temperature=temperature).logprobs
    for i, t in enumerate(temperature.tolist()):
        scalar = rk.token_logprobs(logits, labels, temperature=t).logprobs
        torch.testing.assert_close(one[i], scalar[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
def test_shift_invariance_and_peaks(backend, offset):
    # All-negative logits (the identity of max is -inf, not 0), large offsets, labels at the peak.
    g = generator(3)
    base = torch.randint(-64, 0, (8, 5000), generator=g).float() / 4
    base[:, -1] = 12.0
    labels = torch.full((8,), 4999)
    exact = rk.token_logprobs(base, labels, entropy=True)
    moved = rk.token_logprobs(base + offset, labels, entropy=True)
    # Multiples of 1/4 survive the offset exactly, so nothing may change at all.
    assert_bitwise_equal(moved.logprobs, exact.logprobs)
    assert_bitwise_equal(moved.entropy, exact.entropy)
    check_against_oracle((base + offset).requires_grad_(), labels)
    assert (exact.logprobs <= 0).all()


@pytest.mark.parametrize("vocab", [1, 7, 127, 4097, 50257])
def test_no_phantom_columns(backend, vocab):
    logits = torch.zeros(3, vocab)
    result = rk.token_logprobs(logits, torch.tensor([0, vocab // 2, vocab - 1]), entropy=True)
    expected = torch.full((3,), -math.log(vocab))
    torch.testing.assert_close(result.logprobs, expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(result.entropy, -expected, rtol=5e-7, atol=1e-7)


def test_maxima_in_different_blocks(backend):
    logits, labels = problem(4, 3 * 4096 + 5, torch.float32, spread=0.5)
    with torch.no_grad():
        for block in range(4):
            logits[:, min(block * 4096, logits.shape[1] - 1)] = 40.0 * block
    check_against_oracle(logits, labels)


def test_ignored_tokens_are_not_read(backend):
    logits, labels = problem(6, 300, torch.float32)
    labels[[1, 4]] = -100
    clean = run(rk.token_logprobs, logits, labels, torch.ones(2, 6))
    poisoned = logits.detach().clone()
    poisoned[1], poisoned[4] = float("nan"), float("inf")
    dirty = run(rk.token_logprobs, poisoned.requires_grad_(), labels, torch.ones(2, 6))
    for a, e in zip(dirty, clean, strict=True):
        assert_bitwise_equal(a, e)
    assert (clean[0][[1, 4]] == 0).all() and (clean[2][[1, 4]] == 0).all()
    assert (clean[0][[0, 2, 3, 5]] != 0).all()


def test_all_ignored_gives_connected_zeros(backend):
    logits, labels = problem(3, 50, torch.float32)
    result = rk.token_logprobs(logits, torch.full_like(labels, 7), ignore_index=7, entropy=True)
    assert (result.logprobs == 0).all() and (result.entropy == 0).all()
    (gradient,) = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), logits)
    assert (gradient == 0).all()


def test_empty_batch(backend):
    logits = torch.randn(0, 4, 11, requires_grad=True)
    result = rk.token_logprobs(logits, torch.zeros(0, 4, dtype=torch.long), entropy=True)
    assert result.logprobs.shape == result.entropy.shape == (0, 4)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_nan_logit_spoils_its_row_only(backend):
    logits, labels = problem(5, 9000, torch.float32)
    clean = run(rk.token_logprobs, logits, labels, torch.ones(2, 5))
    for column in (0, 5000, 8999):
        dirty = logits.detach().clone()
        dirty[2, column] = float("nan")
        result = run(rk.token_logprobs, dirty.requires_grad_(), labels, torch.ones(2, 5))
        keep = [0, 1, 3, 4]
        for a, e in zip(result, clean, strict=True):
            assert a[2].isnan().any()
            assert_bitwise_equal(a[keep], e[keep])
        assert result[0][2].isnan() and result[1][2].isnan()


def test_masked_vocabulary(backend):
    logits, labels = problem(4, 9000, torch.float32)
    masked = logits.detach().clone()
    masked[:, :4500] = -math.inf
    labels = labels % 4500 + 4500
    masked.requires_grad_()
    actual = run(rk.token_logprobs, masked, labels, torch.ones(2, 4))
    short = logits.detach()[:, 4500:].clone().requires_grad_()
    expected = run(reference.token_logprobs, short, labels - 4500, torch.ones(2, 4))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)
    assert (actual[2][:, :4500] == 0).all()
    torch.testing.assert_close(actual[2][:, 4500:], expected[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_masked_with_the_lowest_float(backend, dtype):
    # Whole tiles at the end of the range, on either side of the rest; T < 1 takes them beyond it.
    logits, labels = problem(2, 17000, dtype)
    lowest = torch.finfo(dtype).min
    masked = logits.detach().clone()
    masked[0, :8500], masked[1, 8300:] = lowest, lowest
    labels = torch.tensor([16000, 300])
    options = {"temperature": 0.5}
    actual = run(rk.token_logprobs, masked.requires_grad_(), labels, torch.ones(2, 2), **options)
    infinite = masked.detach().masked_fill(masked == lowest, -math.inf).requires_grad_()
    expected = run(rk.token_logprobs, infinite, labels, torch.ones(2, 2), **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert_bitwise_equal(a, e)


def test_infinite_logits(backend):
    logits = torch.randn(3, 40)
    logits[0] = -math.inf
    logits[1, 3] = math.inf
    logits[2, 5] = -math.inf
    labels = torch.tensor([0, 0, 5])
    result = rk.token_logprobs(logits, labels, entropy=True)
    assert result.logprobs[0].isnan() and result.logprobs[1].isnan()
    assert result.logprobs[2] == -math.inf and result.entropy[2].isfinite()
