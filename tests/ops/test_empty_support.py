"""Tokens whose support is empty: over the whole vocabulary, where that is asked for."""

import pytest
import torch

from tests.ops.support_cases import VOCAB, head_problem, problem, run, run_head, within

import rlhf_kernels as rk
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal


def whole_or_kept(z, labels, support, keep):
    """(logprobs, entropy) from the formulas, in fp64."""
    inside = within(support, z.shape)
    inside |= ~inside.any(-1, keepdim=True)
    logp = torch.where(inside, z, -torch.inf).log_softmax(-1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0)).sum(-1)
    found = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, found, 0), torch.where(keep, entropy, 0)


SOME_EMPTY = (0, 5, 0, VOCAB, 0, 31, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 30.0}], ids=str)
def test_an_empty_support_may_stand_for_the_whole_vocabulary(backend, dtype, options):
    logits, labels, support = problem(SOME_EMPTY, dtype)
    labels[4:6] = -100
    upstream = torch.randn(2, len(labels))
    found = run(logits, labels, support, upstream, empty_support="whole", **options)
    leaf = logits.detach().double().requires_grad_()
    z = leaf if "softcap" not in options else 30 * torch.tanh(leaf / 30)
    exact = whole_or_kept(z / options.get("temperature", 1.0), labels, support, labels >= 0)
    slope = torch.autograd.grad(exact, leaf, list(upstream.double()))
    rounding = torch.finfo(dtype).eps
    for a, e in zip(found, [*exact, *slope], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5 + rounding, atol=1e-5)
    # Each token has what it has in a call of its own kind; a sum of gradients loses a zero's sign.
    plain = run(logits, labels, support, upstream, **options)
    whole = run(logits, labels, None, upstream, **options)
    empty = torch.tensor(SOME_EMPTY) == 0
    for a, of_kept, of_whole in zip(found, plain, whole, strict=True):
        assert_bitwise_equal(a[empty] + 0, of_whole[empty] + 0)
        assert_bitwise_equal(a[~empty] + 0, of_kept[~empty] + 0)


def test_a_head_over_supports_of_which_some_are_empty(backend):
    operands, labels, support = head_problem(SOME_EMPTY, torch.float32)
    labels[4:6] = -100
    upstream = torch.randn(2, len(labels))
    found = run_head(operands, labels, support, upstream, empty_support="whole", kept_tokens=5)
    leaves = [t.detach().double().requires_grad_() for t in operands]
    hidden, weight, bias = leaves
    exact = whole_or_kept(hidden @ weight.T + bias, labels, support, labels >= 0)
    slopes = torch.autograd.grad(exact, leaves, list(upstream.double()))
    for a, e in zip(found, [*exact, *slopes], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-5)


def test_what_an_empty_support_stands_for_is_checked():
    logits, labels, support = problem((0, 3), torch.float32)
    for form in (rk.token_logprobs, lambda x, *a, **k: rk.linear_token_logprobs(x, x, *a, **k)):
        with pytest.raises(ValueError, match="empty_support must be one of nan, whole, got 'all'"):
            form(logits, labels, support=support, empty_support="all")
        with pytest.raises(ValueError, match="empty_support='whole' needs a support"):
            form(logits, labels, empty_support="whole")
        with pytest.raises(ValueError, match="support gives log-probabilities and entropies alone"):
            form(logits, labels, support=support, empty_support="whole", lse=True)
    assert rk.token_logprobs(logits, labels, support=support).logprobs[0].isnan()
