"""Log-probabilities over the sampler's support on every backend: values and gradients."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.head.bounds import HeadBounds, logprobs_bounds
from tests.ops.support_cases import (
    OPTIONS,
    SIZES,
    VOCAB,
    check,
    dense,
    gradient_scale,
    head_problem,
    problem,
    run,
    run_head,
    within,
)

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_within_bound,
    generator,
    to_float64,
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(backend, dtype, options):
    logits, labels, support = problem(SIZES, dtype)
    upstream = torch.randn(2, len(SIZES))
    actual = run(logits, labels, support, upstream, **options)
    definition = reference.token_logprobs_support
    plain = dense(definition, [logits], labels, support, upstream, **options)
    wide = to_float64(logits)
    oracle = dense(definition, [wide], labels, support, upstream, **options)
    scale = oracle[0].abs() + math.log(VOCAB) + options.get("softcap", 0.0)
    in_gradient = gradient_scale(oracle, upstream, options)
    check(actual, plain, oracle, (scale, scale, in_gradient))
    mask = torch.zeros(len(SIZES), VOCAB, dtype=torch.bool)
    for n in range(len(SIZES)):
        mask[n, support[1][support[0][n] : support[0][n + 1]]] = True
    assert (actual[2][~mask] == 0).all()
    assert (actual[2][2:] != 0).any(-1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_fp64(backend, dtype, options):
    operands, labels, support = head_problem(SIZES, dtype)
    upstream = torch.randn(2, len(SIZES))
    options = {"logit_scale": 1.5, **options}
    actual = run_head(operands, labels, support, upstream, **options)
    definition = reference.linear_token_logprobs_support
    hidden, weight, bias = operands
    plain = dense(definition, [hidden, weight], labels, support, upstream, bias=bias, **options)
    wide = to_float64(operands)
    oracle = dense(definition, wide[:2], labels, support, upstream, bias=wide[2], **options)
    # A product rounds with the sum of the sizes of its terms.
    sizes = 1.5 * (wide[0].abs() @ wide[1].abs().T + wide[2].abs()).detach()
    t = options.get("temperature", 1.0)
    scale = sizes.amax(-1) / t * 4
    dz = gradient_scale(oracle, upstream, options) * 1.5 * (1 + sizes / t)
    mask = reference.support.support_mask(*support, labels >= 0, VOCAB)
    dz = torch.where(mask, dz, 0) * 0.2
    scales = (scale, scale, dz @ wide[1].detach().abs(), dz.T @ wide[0].detach().abs(), dz.sum(0))
    check(actual, plain, oracle, scales)
    for a in actual[2:]:
        assert a.dtype == dtype and (a != 0).any()
    untouched = ~mask.any(0)
    assert (actual[3][untouched] == 0).all() and (actual[4][untouched] == 0).all()


def test_long_rows_cross_blocks(backend):
    sizes = (1500, 512, 513, 4097, 7)
    logits, labels, support = problem(sizes, torch.float32, vocab=5000)
    upstream = torch.randn(2, len(sizes))
    with torch.no_grad():
        # The maximum is in the last block of one and before it in another.
        logits[0, support[1][1499]] = 40.0
        logits[3, support[1][support[0][3]]] = 30.0
    actual = run(logits, labels, support, upstream)
    definition = reference.token_logprobs_support
    plain = dense(definition, [logits], labels, support, upstream)
    oracle = dense(definition, [to_float64(logits)], labels, support, upstream)
    scale = oracle[0].abs() + math.log(5000) + 40
    check(actual, plain, oracle, (scale, scale, gradient_scale(oracle, upstream, {})))


def assert_head_within_bounds(actual, operands, labels, support, upstream, **options):
    """Results and gradients from hidden states, where every token has words."""
    definition = reference.linear_token_logprobs_support
    *leaves, bias = to_float64(operands)
    exact = dense(definition, leaves, labels, support, upstream, bias=bias, **options)
    kept = within(support, (labels.numel(), operands[1].shape[0]))
    head = HeadBounds(*operands, kept=kept, **options)
    bounds = logprobs_bounds(head, labels, upstream)
    for a, e, bound in zip(actual, exact, bounds, strict=True):
        assert_within_bound(a, e, bound.view(e.shape))


def test_long_hidden_states(backend):
    sizes = (3, 40, 0, 9)
    operands, labels, support = head_problem(sizes, torch.float32, hidden=1040)
    labels[2] = -100
    upstream = torch.randn(2, 4)
    actual = run_head(operands, labels, support, upstream)
    assert_head_within_bounds(actual, operands, labels, support, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_support_is_no_support(backend, dtype):
    logits, labels, _ = problem((0,) * 4, dtype, vocab=1100)
    labels[1] = -100
    every = torch.arange(1100).repeat(4)
    support = (torch.arange(5) * 1100, every)
    upstream = torch.randn(2, 4)
    actual = run(logits, labels, support, upstream, temperature=0.8)
    found = rk.token_logprobs(logits, labels, entropy=True, temperature=0.8)[:2]
    expected = *found, *torch.autograd.grad(found, logits, list(upstream))
    for a, e in zip(actual, expected, strict=True):
        if backend in ("cuda", "triton"):
            tolerance = 1e-6 if a.dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(a, e, rtol=4 * tolerance, atol=tolerance)
        else:
            assert_bitwise_equal(a, e)


def test_temperature_per_token(backend):
    sizes = (5, 50, 97, 12)
    operands, labels, support = head_problem(sizes, torch.float32)
    temperature = torch.tensor([0.3, 1.0, 1.7, 8.0])
    upstream = torch.randn(2, 4)
    options = {"logit_scale": 0.5, "softcap": 20.0}
    together = run_head(operands, labels, support, upstream, temperature=temperature, **options)
    for n, t in enumerate(temperature.tolist()):
        begin, end = support[0][n : n + 2].tolist()
        alone = (torch.tensor([0, end - begin]), support[1][begin:end])
        mine = (operands[0][n : n + 1], *operands[1:])
        one = run_head(mine, labels[n : n + 1], alone, upstream[:, n : n + 1],
                       temperature=t, **options)  # fmt: skip
        for i in range(3):
            torch.testing.assert_close(one[i][0], together[i][n], rtol=1e-5, atol=1e-5)


def test_bias_and_upstream_may_be_missing(backend):
    operands, labels, support = head_problem((5, 50, 97), torch.float32)
    hidden, weight, bias = operands
    without = rk.linear_token_logprobs(hidden, weight, labels, support=support)
    assert without.entropy is None
    zero = torch.zeros_like(bias)
    with_zero = rk.linear_token_logprobs(hidden, weight, labels, bias=zero, support=support)
    assert_bitwise_equal(without.logprobs, with_zero.logprobs)
    both = rk.linear_token_logprobs(
        hidden, weight, labels, bias=bias, support=support, entropy=True
    )
    (one,) = torch.autograd.grad(both.logprobs.sum(), hidden, retain_graph=True)
    (two,) = torch.autograd.grad(both.entropy.sum(), hidden, retain_graph=True)
    (sum_,) = torch.autograd.grad(both.logprobs.sum() + both.entropy.sum(), hidden)
    torch.testing.assert_close(one + two, sum_, rtol=1e-5, atol=1e-5)
    assert one.abs().max() > 0 and two.abs().max() > 0


def test_frozen_operands(backend):
    operands, labels, support = head_problem((5, 50, 97), torch.float32)
    upstream = torch.randn(2, 3)
    every = run_head(operands, labels, support, upstream)[2:]
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands)]
        found = run_head(some, labels, support, upstream)[2:]
        for i, gradient in zip(wanted, found, strict=True):
            assert_bitwise_equal(gradient, every[i])


def test_label_outside_the_support(backend):
    operands, labels, support = head_problem((6, 40, 5), torch.float32, outside=(1,))
    hidden, weight, bias = operands
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    upstream = torch.tensor([[1.0, 0.5, 2.0], [0.3, 0.7, -1.0]])
    for found in (
        run(logits, labels, support, upstream),
        run_head(operands, labels, support, upstream),
    ):
        assert found[0][1] == -math.inf and found[0][[0, 2]].isfinite().all()
        assert found[1].isfinite().all()
        assert all(g.isfinite().all() for g in found[2:])
    expected = dense(reference.token_logprobs_support, [logits], labels, support, upstream)
    torch.testing.assert_close(run(logits, labels, support, upstream)[2], expected[2])


def test_token_without_words(backend):
    logits, labels, support = problem((6, 0, 5), torch.float32)
    clean = run(logits[[0, 2]].detach().requires_grad_(), labels[[0, 2]],
                (support[0][[0, 1, 3]], support[1]), torch.ones(2, 2))  # fmt: skip
    found = run(logits, labels, support, torch.ones(2, 3))
    for a, e in zip(found, clean, strict=True):
        assert_bitwise_equal(a[[0, 2]], e)
    assert found[0][1].isnan() and found[1][1].isnan() and (found[2][1] == 0).all()
    operands, labels, support = head_problem((0, 0), torch.float32)
    found = run_head(operands, labels, support, torch.ones(2, 2))
    assert found[0].isnan().all() and all((g == 0).all() for g in found[2:])


def test_outside_of_the_support_is_not_read(backend):
    sizes = (6, 40, 5, 11)
    logits, labels, support = problem(sizes, torch.float32)
    labels[2] = -100
    upstream = torch.randn(2, 4)
    for options in ({}, {"softcap": 6.0}):
        clean = run(logits, labels, support, upstream, **options)
        mask = reference.support.support_mask(*support, labels >= 0, VOCAB)
        for junk in (math.nan, math.inf, -math.inf, 1e30):
            dirty = torch.where(mask, logits.detach(), junk).requires_grad_()
            found = run(dirty, labels, support, upstream, **options)
            for a, e in zip(found, clean, strict=True):
                assert_bitwise_equal(a, e)
    assert clean[0][2] == 0 and clean[1][2] == 0 and (clean[2][2] == 0).all()


def test_ignored_tokens_and_rows_without_use_are_not_read(backend):
    sizes = (6, 40, 5, 11)
    operands, labels, support = head_problem(sizes, torch.float32)
    labels[2] = -100
    upstream = torch.randn(2, 4)
    clean = run_head(operands, labels, support, upstream)
    hidden, weight, bias = (t.detach().clone() for t in operands)
    hidden[2] = math.nan
    indices = support[1].clone()
    begin, end = support[0][2:4].tolist()
    # Nothing may be read through the words of an ignored token either.
    indices[begin:end] = 2**40
    if backend != "reference":
        used = reference.support.support_mask(support[0], indices, labels >= 0, VOCAB).any(0)
        weight[~used], bias[~used] = math.nan, math.inf
    dirty = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    for a, e in zip(run_head(dirty, labels, (support[0], indices), upstream), clean, strict=True):
        assert_bitwise_equal(a, e)
    assert clean[0][2] == 0 and (clean[2][2] == 0).all()


def test_tokens_without_upstream_gradient_add_nothing(backend):
    operands, labels, support = head_problem((6, 40, 5, 11), torch.float32)
    upstream = torch.randn(2, 4)
    upstream[:, 1] = 0
    clean = run_head(operands, labels, support, upstream)
    if backend == "reference":
        assert (clean[2][1] == 0).all()
        return
    hidden = operands[0].detach().clone()
    hidden[1] = math.inf
    dirty = run_head((hidden.requires_grad_(), *operands[1:]), labels, support, upstream)
    assert dirty[0][1].isnan()
    for a, e in zip(dirty[2:], clean[2:], strict=True):
        assert_bitwise_equal(a, e)
    assert (clean[2][1] == 0).all()


def test_nan_spoils_its_token_only(backend):
    logits, labels, support = problem((6, 40, 5), torch.float32)
    clean = run(logits, labels, support, torch.ones(2, 3))
    dirty = logits.detach().clone()
    dirty[1, support[1][20]] = math.nan
    found = run(dirty.requires_grad_(), labels, support, torch.ones(2, 3))
    for a, e in zip(found, clean, strict=True):
        assert a[1].isnan().any()
        assert_bitwise_equal(a[[0, 2]], e[[0, 2]])
    for value in (math.inf, -math.inf):
        infinite = logits.detach().clone()
        infinite[1, support[1][6:46]] = value
        found = rk.token_logprobs(infinite, labels, support=support).logprobs
        assert found[1].isnan() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_word_that_many_tokens_kept(backend, dtype, monkeypatch):
    # Terms of one sign, so that rounding adds up, in many groups: small ones where the interpreter
    # makes each token expensive.
    monkeypatch.setattr(triton.support_products, "SUM_TERMS", 8)
    rows, vocab = 40 if backend == "triton" else 6000, 5
    sizes = [2 + n % 3 for n in range(rows)]
    operands, labels, support = head_problem(sizes, dtype, vocab=vocab, hidden=16)
    hidden = (operands[0].detach().abs() + 1).requires_grad_()
    operands = (hidden, *operands[1:])
    upstream = torch.stack([torch.rand(rows), torch.zeros(rows)])
    found = run_head(operands, labels, support, upstream)
    definition = reference.linear_token_logprobs_support
    _, weight, bias = operands
    plain = dense(definition, [hidden, weight], labels, support, upstream, bias=bias)
    wide = to_float64(operands)
    oracle = dense(definition, wide[:2], labels, support, upstream, bias=wide[2])
    # dz is a difference: each term errs by a rounding of p g, whose sum of sizes this bounds.
    size = upstream[0].double()
    scales = (8, 8, size.unsqueeze(-1) * 40, size @ wide[0].detach(), size.sum())
    check(found[2:], plain[2:], oracle[2:], scales[2:])
    for a, e in zip(run_head(operands, labels, support, upstream), found, strict=True):
        assert_bitwise_equal(a, e)


def test_indices_of_a_top_k(backend):
    logits = torch.randn(2, 3, VOCAB, requires_grad=True)
    top = logits.detach().topk(5).indices
    labels = top[..., 2]
    support = (torch.arange(2 * 3 + 1) * 5, top.reshape(-1))
    found = rk.token_logprobs(logits, labels, support=support, entropy=True)
    logp = logits.detach().gather(-1, top).log_softmax(-1)
    torch.testing.assert_close(found.logprobs, logp[..., 2])
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1))


def test_gradcheck_of_the_reference():
    sizes = (1, 3, 7, 4)
    operands, labels, support = head_problem(sizes, torch.float64, vocab=7, hidden=3)
    labels[3] = -100
    for options in OPTIONS:
        torch.autograd.gradcheck(
            lambda h, w, b, o=options: reference.linear_token_logprobs_support(
                h, w, labels, *support, bias=b, entropy=True, **o
            )[:2],
            operands,
        )


def test_the_reference_is_the_dense_mask():
    logits, labels, support = problem((6, 40, 5), torch.float64)
    found = reference.token_logprobs_support(logits, labels, *support, entropy=True)
    for n in range(3):
        words = support[1][support[0][n] : support[0][n + 1]]
        logp = torch.log_softmax(logits[n, words], 0)
        own = logp[(words == labels[n]).nonzero()].squeeze()
        torch.testing.assert_close(found[0][n], own)
        torch.testing.assert_close(found[1][n], -(logp.exp() * logp).sum())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.31, 2.5]),
    softcap=st.sampled_from([None, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(rows, vocab, dtype, temperature, softcap, seed):
    g = generator(seed)
    sizes = torch.randint(1, vocab + 1, (rows,), generator=g).tolist()
    operands, labels, support = head_problem(sizes, dtype, vocab=vocab, seed=seed)
    hidden, weight, bias = operands
    upstream = torch.randn(2, rows, generator=g)
    options = {"temperature": temperature, "softcap": softcap}
    with rk.use_backend("cpu"):
        actual = run_head(operands, labels, support, upstream, **options)
    assert_head_within_bounds(actual, operands, labels, support, upstream, **options)
    assert (actual[0] <= 0).all()
    assert hidden.shape == actual[2].shape and weight.shape == actual[3].shape
    assert bias.shape == actual[4].shape
