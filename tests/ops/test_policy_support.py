"""linear_policy_loss over the token ids that the sampler kept."""

import pytest
import torch

from tests.ops.support_cases import VOCAB, head_problem, within

import rlhf_kernels as rk
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal

SIZES = (3, 17, 1, VOCAB, 0, 9, 5, 0)
SHAPE = (2, 4)
PPO = rk.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)


def inputs(dtype=torch.float32):
    """(operands, labels, support, old, advantages, mask, ref) of two sequences."""
    (hidden, weight, bias), labels, support = head_problem(SIZES, dtype)
    torch.manual_seed(1)
    old, ref = torch.randn(2, *SHAPE) * 0.3 - 2
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 1] = False
    operands = (hidden.view(*SHAPE, -1), weight, bias)
    return operands, labels.view(SHAPE), support, old, torch.randn(SHAPE), mask, ref


def leaves(operands, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]


def loss_of(operands, labels, support, old, advantages, mask, **options):
    hidden, weight, bias = own = leaves(operands)
    given = (hidden, weight, labels, old, advantages, mask)
    loss, metrics = rk.linear_policy_loss(*given, bias=bias, support=support, **options)
    return loss, metrics, torch.autograd.grad(loss, own)


@pytest.mark.parametrize("rows", [{}, {"temperature": 0.7, "softcap": 20.0}], ids=str)
def test_within_rounding_of_the_formula(backend, rows):
    operands, labels, support, old, advantages, mask, ref = inputs()
    loss, metrics, slopes = loss_of(
        *(operands, labels, support, old, advantages, mask),
        **rows,
        ref_logprobs=ref,
        empty_support="whole",
        config=PPO,
    )
    hidden, weight, bias = exact = leaves(operands, torch.float64)
    z = hidden @ weight.T + bias
    z = 20 * torch.tanh(z / 20) if rows else z
    inside = within(support, (len(SIZES), VOCAB)).view(z.shape)
    inside |= ~inside.any(-1, keepdim=True)
    logp = torch.where(inside, z / rows.get("temperature", 1.0), -torch.inf).log_softmax(-1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0)).sum(-1)
    own = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = (own - old).exp()
    term = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (ref - own).exp() - (ref - own) - 1
    term = torch.where(mask, term + 0.1 * kl - 0.01 * entropy, 0)
    expected = term.sum() / mask.sum()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), expected, **close)
    of_entropy = torch.where(mask, entropy, 0).sum() / mask.sum()
    torch.testing.assert_close(metrics["entropy"].double(), of_entropy, **close)
    for a, e in zip(slopes, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [PPO, rk.PolicyLossConfig.gspo(), rk.PolicyLossConfig.cispo()])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_loss_of_the_log_probabilities_over_the_support(backend, config, dtype, packed):
    operands, labels, support, old, advantages, mask, ref = inputs(dtype)
    options = {"config": config, "ref_logprobs": ref}
    tokens = (labels, old, advantages, mask)
    if packed:
        operands = (operands[0].flatten(0, 1), *operands[1:])
        *tokens, options["ref_logprobs"] = (t.flatten() for t in (*tokens, ref))
        options["cu_seqlens"] = torch.tensor([0, 4, 8], dtype=torch.int32)
    labels, *rest = tokens
    loss, metrics, slopes = loss_of(
        operands, labels, support, *rest, empty_support="whole", **options
    )
    hidden, weight, bias = own = leaves(operands)
    found = rk.linear_token_logprobs(
        *(hidden, weight, labels, rest[-1]),
        bias=bias, support=support, entropy=True, empty_support="whole",
    )  # fmt: skip
    entropy = found.entropy if config.entropy_coef else found.entropy.detach()
    apart = rk.policy_loss(found.logprobs, *rest, entropy=entropy, **options)
    assert_bitwise_equal(loss, apart.loss)
    for name, value in metrics.items():
        assert_bitwise_equal(value, apart.metrics[name])
    for a, e in zip(slopes, torch.autograd.grad(apart.loss, own), strict=True):
        assert_bitwise_equal(a, e)


def test_the_references_head_has_the_same_support(backend):
    operands, labels, support, old, advantages, mask, _ = inputs()
    head = {"ref_hidden": operands[0].roll(1), "ref_weight": operands[1], "ref_bias": operands[2]}
    given = (operands, labels, support, old, advantages, mask)
    loss, *_ = loss_of(*given, **head, empty_support="whole", config=PPO)
    ref = rk.linear_token_logprobs(
        *(head["ref_hidden"], operands[1], labels, mask),
        bias=operands[2], support=support, empty_support="whole",
    ).logprobs.detach()  # fmt: skip
    same, *_ = loss_of(*given, ref_logprobs=ref, empty_support="whole", config=PPO)
    assert_bitwise_equal(loss, same)


def test_what_goes_not_together_and_labels_that_are_none(backend):
    operands, labels, support, old, advantages, mask, _ = inputs()
    given = (old, advantages, mask)
    with pytest.raises(ValueError, match="linear_policy_loss: empty_support='whole' needs a supp"):
        loss_of(operands, labels, None, *given, empty_support="whole")
    with pytest.raises(ValueError, match="empty_support"):
        loss_of(operands, labels, support, *given, empty_support="all")
    # -100 is a label like any other here: only the mask skips tokens.
    labels[0, 1] = -100
    with pytest.raises(IndexError, match=r"linear_policy_loss.*-100"):
        loss_of(operands, labels, support, *given, empty_support="whole")
    labels[0, 1], labels[1, 1] = 3, -7
    loss, _, slopes = loss_of(operands, labels, support, *given, empty_support="whole")
    assert loss.isfinite() and all(t.isfinite().all() for t in slopes)
