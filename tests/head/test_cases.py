"""Where fused heads have failed: odd vocabularies, peaked rows, many tokens, many chunks."""

import pytest
import torch

from tests.head.bounds import HeadBounds, assert_all_within, logprobs_bounds
from tests.head.head_cases import drawn

import rlhf_kernels as rk
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, gradients, to_float64


def through_logits(hidden, weight, labels, *rest):
    """Autograd through the logits: (log-probabilities, entropy), fp32 softmax."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if rest:
        logits = logits + rest[0].to(logits.dtype)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * torch.where(logp.isfinite(), logp, 0)).sum(-1)
    return logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy


def ours(hidden, weight, labels, bias=None, **options):
    found = rk.linear_token_logprobs(hidden, weight, labels, bias=bias, entropy=True, **options)
    return found.logprobs, found.entropy


def assert_within_bounds(leaves, labels, upstream, parts=None, **options):
    """Every result and gradient is within the bounds of its operands; `parts` of HeadBounds."""
    inputs = (*leaves[:2], labels, *leaves[2:])

    def run(function, arguments, ups):
        return (*function(*arguments), *gradients(function, arguments, ups))

    exact = run(through_logits, to_float64(inputs), [u.double() for u in upstream])
    actual = run(lambda *a: ours(*a, **options), inputs, upstream)
    bounds = logprobs_bounds(HeadBounds(*leaves), labels, upstream, **(parts or {}))
    assert_all_within(actual, exact, bounds[: len(actual)])
    return actual


@pytest.mark.parametrize("vocab", [50_257, 129_920])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_that_no_block_divides(vocab, dtype):
    hidden, weight, labels = drawn(5, 16, vocab, dtype)
    labels[-1] = vocab - 1
    with rk.use_backend("cpu"):
        assert_within_bounds((hidden, weight), labels, (torch.randn(5), torch.randn(5)))


def test_a_vocabulary_that_no_block_divides_interpreted():
    hidden, weight, labels = drawn(2, 8, 50_257)
    with rk.use_backend("triton"):
        assert_within_bounds((hidden, weight), labels, (torch.randn(2), torch.randn(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_rows(backend, dtype):
    """The largest logit stands far above the rest: p is 1 to all digits, and p - 1 cancels."""
    hidden, weight, labels = drawn(12, 32, 517, dtype, peak=30.0)
    labels[::2] = (hidden @ weight.T).argmax(-1)[::2]
    actual = assert_within_bounds((hidden, weight), labels, (torch.randn(12), torch.randn(12)))
    assert (actual[0] <= 0).all()
    assert (actual[0][::2] > -1).all() and (actual[0][1::2] < -20).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_vocabulary(backend, dtype):
    """Rows that pad the vocabulary: a bias of -inf takes them out, with a gradient of zero."""
    hidden, weight, labels = drawn(7, 16, 160, dtype)
    bias = torch.zeros(160, dtype=dtype)
    bias[150:] = -torch.inf
    bias.requires_grad_()
    labels %= 150
    upstream = (torch.randn(7), torch.randn(7))
    padded = assert_within_bounds((hidden, weight, bias), labels, upstream)
    assert (padded[3][150:] == 0).all() and (padded[4][150:] == 0).all()
    cut = [t.detach()[:150].requires_grad_() for t in (weight, bias)]
    short = assert_within_bounds((hidden, *cut), labels, upstream)
    assert [t.shape for t in short[3:]] == [(150, 16), (150,)]


def test_more_tokens_than_a_grid_dimension():
    hidden, weight, labels = drawn(70_001, 4, 11)
    with rk.use_backend("cpu"):
        assert_within_bounds((hidden, weight), labels, (torch.randn(70_001),) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_over_many_chunks(dtype):
    """Sums of 200 chunks do not lose small terms: fp32 between chunks, whatever the dtype."""
    hidden, weight, labels = drawn(200, 16, 67, dtype)
    upstream = (torch.rand(200) + 0.5, torch.zeros(200))
    with rk.use_backend("cpu"):
        assert_within_bounds(
            (hidden, weight), labels, upstream, {"tokens": 1}, chunk_tokens=1
        )  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_chunks(backend, dtype, chunks):
    """Sums start, continue and end differently; vocabulary above one block of the sum."""
    hidden, weight, labels = drawn(20, 8, 1500 if backend == "cpu" else 67, dtype)
    upstream = (torch.randn(20), torch.randn(20))
    size = -(-20 // chunks)
    assert_within_bounds(
        (hidden, weight), labels, upstream, {"tokens": size}, chunk_tokens=size
    )  # fmt: skip


@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_gradient_of_one_input_alone(backend, which):
    names = ("hidden", "weight", "bias")
    hidden, weight, labels = drawn(9, 8, 33)
    leaves = [hidden, weight, torch.randn(33).requires_grad_()]
    everything = torch.autograd.grad(ours(*leaves[:2], labels, leaves[2])[0].sum(), leaves)
    alone = [t.detach().requires_grad_(n == which) for n, t in zip(names, leaves, strict=True)]
    i = names.index(which)
    ours(*alone[:2], labels, alone[2])[0].sum().backward()
    assert_bitwise_equal(alone[i].grad, everything[i])
    assert [t.grad is not None for t in alone] == [n == which for n in names]


def test_a_second_backward_gives_the_same(backend):
    hidden, weight, labels = drawn(9, 8, 33)
    old, advantages = torch.randn(1, 9) - 3, torch.randn(1, 9)
    mask = torch.ones(1, 9, dtype=torch.bool)
    loss = ours(hidden, weight, labels)[0].sum()
    policy = rk.linear_policy_loss(
        hidden.unsqueeze(0), weight, labels.unsqueeze(0), old, advantages, mask=mask,
        config=rk.PolicyLossConfig.ppo(),
    ).loss  # fmt: skip
    kl = rk.linear_kl_divergence(hidden, weight, hidden.detach() + 0.1, weight.detach()).sum()
    for output in (loss, policy, kl):
        first = torch.autograd.grad(output, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(output, (hidden, weight))
        for a, b in zip(first, second, strict=True):
            assert_bitwise_equal(a, b)
            assert a.abs().max() > 0


def test_upstream_scales_the_policy_gradient(backend):
    hidden, weight, labels = drawn(9, 8, 33)

    def loss():
        return rk.linear_policy_loss(
            hidden.unsqueeze(0), weight, labels.unsqueeze(0), torch.full((1, 9), -3.0),
            torch.ones(1, 9), mask=torch.ones(1, 9, dtype=torch.bool),
            config=rk.PolicyLossConfig.ppo(),
        ).loss  # fmt: skip

    once = torch.autograd.grad(loss(), (hidden, weight))
    # By a power of two: no rounding at any step.
    scaled = torch.autograd.grad(loss() * 4, (hidden, weight))
    for a, b in zip(once, scaled, strict=True):
        assert_bitwise_equal(4 * a, b)


def test_weight_gradients_repeat_bitwise(backend):
    hidden, weight, labels = drawn(40, 16, 131, torch.bfloat16)
    found = [
        torch.autograd.grad(ours(hidden, weight, labels, chunk_tokens=16)[0].sum(), weight)[0]
        for _ in range(3)
    ]
    for other in found[1:]:
        assert_bitwise_equal(other, found[0])


def test_transposed_and_sliced_operands(backend):
    """hidden[:, :-1] and a weight that is another matrix's transpose."""
    wide = torch.randn(3, 8, 12).requires_grad_()
    weight = torch.randn(12, 40).T.requires_grad_()
    labels = torch.randint(0, 40, (3, 7))
    upstream = (torch.randn(3, 7), torch.randn(3, 7))

    def run(function, wide, weight, ups):
        results = function(wide[:, :-1], weight, labels)
        return (*results, *torch.autograd.grad(results, (wide, weight), ups))

    found = run(ours, wide, weight, upstream)
    exact = run(through_logits, *to_float64((wide, weight)), [u.double() for u in upstream])
    bounds = logprobs_bounds(HeadBounds(wide[:, :-1], weight), labels, upstream)
    of_wide = torch.zeros_like(wide, dtype=torch.float64)
    of_wide[:, :-1] = bounds[2].view(3, 7, 12)
    assert_all_within(found, exact, (*bounds[:2], of_wide, bounds[3]))
    assert (found[2][:, -1] == 0).all()
