"""The bounds of products themselves: right results are within, and a wrong digit is not."""

import pytest
import torch

from tests.head.bounds import HeadBounds, assert_all_within, logprobs_bounds, policy_bounds
from tests.head.head_cases import CONFIGS, operands, policy_problem, run_policy

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import assert_within_bound, product_bound, to_float64


def rejects(actual, exact, bounds):
    with pytest.raises(AssertionError, match="beyond theirs"):
        assert_all_within(actual, exact, bounds)


@pytest.mark.parametrize("terms", [1, 3, 64, 1000])
def test_product_bound(terms):
    """Holds in the order of any library, also term by term; a ten-thousandth off is found."""
    a, b = torch.randn(33, terms), torch.randn(terms, 29)
    exact, bound = a.double() @ b.double(), product_bound(a, b)
    one_by_one = torch.zeros(33, 29)
    for i in range(terms):
        one_by_one += a[:, i : i + 1] * b[i]
    for product in (a @ b, one_by_one, (b.T @ a.T).T, sum(x @ y for x, y in zip(
        a.chunk(5, 1), b.chunk(5), strict=True))):  # fmt: skip
        assert_within_bound(product, exact, bound)
    wrong = a @ b * (1 + 1e-4)
    without_last = a[:, :-1] @ b[:-1]
    other_sign = (a @ b).index_fill(0, torch.tensor([7]), 0.0)
    for product in (wrong, without_last, other_sign):
        with pytest.raises(AssertionError, match="beyond theirs"):
            assert_within_bound(product, exact, bound)


def test_product_bound_carries_the_errors_of_operands():
    a, b = torch.randn(5, 8), torch.randn(8, 6)
    exact = a.double() @ b.double()
    e, f = torch.rand(5, 8).double() * 1e-3, torch.rand(8, 6).double() * 1e-3
    off = (a.double() + e * a.sign()) @ b.double()
    assert_within_bound(off, exact, product_bound(a, b, a_error=e))
    assert_within_bound(a.double() @ (b.double() - f), exact, product_bound(a, b, b_error=f))
    with pytest.raises(AssertionError):
        assert_within_bound(off, exact, product_bound(a, b))


def test_infinities_and_shapes_are_exact():
    exact = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    assert_within_bound(exact.float(), exact, 0.0)
    for wrong in ([1.0, 3e38, torch.nan], [1.0, torch.inf, 0.0], [torch.nan, torch.inf, torch.nan]):
        with pytest.raises(AssertionError, match="1 elements beyond"):
            assert_within_bound(torch.tensor(wrong), exact, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_bound(exact.float()[:2], exact, 1.0)


# Which result is scaled by how much: each is found by itself.
OFF = {torch.float32: 1 + 1e-4, torch.bfloat16: 1.06, torch.float16: 1.01}


@pytest.mark.parametrize("dtype", OFF)
def test_head_bounds_find_a_wrong_factor_and_a_lost_token(dtype):
    hidden, weight, bias, labels = operands(dtype)
    upstream = torch.randn(2, *labels.shape)

    def run(function, h, w, b, up):
        results = function(h, w, labels, bias=b, entropy=True)[:2]
        return (*results, *torch.autograd.grad(results, (h, w, b), list(up)))

    exact = run(reference.linear_token_logprobs, *to_float64((hidden, weight, bias)),
                upstream.double())  # fmt: skip
    actual = run(rk.linear_token_logprobs, hidden, weight, bias, upstream)
    bounds = logprobs_bounds(HeadBounds(hidden, weight, bias), labels, upstream)
    assert_all_within(actual, exact, bounds)
    for i, result in enumerate(actual):
        mutant = list(actual)
        mutant[i] = (result.double() * OFF[dtype]).to(result.dtype)
        rejects(mutant, exact, bounds)
    lost = upstream.clone()
    lost[:, -1, -1] = 0
    without = run(rk.linear_token_logprobs, hidden, weight, bias, lost)
    for i in (2, 3, 4):
        rejects([without[i]], [exact[i]], [bounds[i]])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_bounds_find_a_wrong_factor(direction):
    hidden, weight, bias, _ = operands()
    ref_hidden, ref_weight, _, _ = (t.detach() for t in operands(width=12, seed=1))
    upstream = torch.randn(hidden.shape[:-1])

    def run(function, h, w, b, rh, rw, up):
        kl = function(h, w, rh, rw, bias=b, direction=direction)
        return (kl, *torch.autograd.grad(kl, (h, w, b), up))

    arguments = (hidden, weight, bias, ref_hidden, ref_weight)
    exact = run(reference.linear_kl_divergence, *to_float64(arguments), upstream.double())
    actual = run(rk.linear_kl_divergence, *arguments, upstream)
    head, ref = HeadBounds(*arguments[:3]), HeadBounds(*arguments[3:])
    reverse = direction == "reverse"
    gradient = head.kl_gradient(ref, reverse, upstream)
    bounds = (head.kl(ref, reverse), *head.products(gradient))
    assert_all_within(actual, exact, bounds)
    for i, result in enumerate(actual):
        rejects([result * (1 + 1e-4)], [exact[i]], [bounds[i]])


@pytest.mark.parametrize("name", ["ppo, every term", "gspo", "sequence correction"])
def test_policy_bounds_find_a_wrong_factor(name):
    leaves, tokens, constants = policy_problem()
    config = CONFIGS[name]
    actual = run_policy(rk.linear_policy_loss, leaves, tokens, **constants, config=config)
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), config=config,
    )  # fmt: skip
    head = HeadBounds(*leaves, temperature=0.8)
    bounds = policy_bounds(head, tokens, constants, config=config)
    assert_all_within(actual, exact, bounds)
    for i, result in enumerate(actual):
        rejects([result * (1 + 3e-4)], [exact[i]], [bounds[i]])
