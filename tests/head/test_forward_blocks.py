"""Results of a fused head on a CPU in blocks of the vocabulary, against those of whole rows."""

import pytest
import torch

from tests.head.head_cases import CONFIGS, drawn, policy_problem, run_policy

import rlhf_kernels as rk
from rlhf_kernels.head import chunks
from rlhf_kernels.testing import DTYPES

TOKENS, WIDTH, VOCAB, BLOCK = 40, 16, 200, 64


@pytest.fixture(params=["cpu", "triton"])
def blocks(request, monkeypatch, columns_multiplied):
    """Columns of each product; a forward pass holds BLOCK fp32 columns of 16 tokens."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * 4 * 16 * BLOCK)
    monkeypatch.setattr(chunks, "_REDUCED_COLUMNS", BLOCK)
    with rk.use_backend(request.param):
        yield columns_multiplied


def in_both_ways(blocks, *args, **options):
    """Results in blocks and of whole rows."""
    blocks.clear()
    found = rk.linear_token_logprobs(*args, **options)
    assert min(blocks) == VOCAB % BLOCK and max(blocks) % BLOCK == 0
    blocks.clear()
    whole = rk.linear_token_logprobs(*args, chunk_tokens=TOKENS, **options)
    assert set(blocks) == {VOCAB}
    return found, whole


def assert_same(found, whole):
    """Equal ids; numbers to the roundings of fp32, whatever the dtype of the logits."""
    for name, a, e in zip(found._fields, found, whole, strict=True):
        if e is None:
            assert a is None, name
        elif name == "argmax":
            assert torch.equal(a, e)
        else:
            torch.testing.assert_close(a, e, rtol=3e-6, atol=3e-6, equal_nan=True, msg=name)


EVERYTHING = {"entropy": True, "collision": True, "lse": True, "argmax": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERYTHING,
        {**EVERYTHING, "temperature": 0.7, "softcap": 5.0},
        {**EVERYTHING, "temperature": torch.linspace(0.3, 3.0, TOKENS), "logit_scale": 2.0},
    ],
    ids=["logprobs", "everything", "softcap", "temperatures"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_result(blocks, dtype, options):
    hidden, weight, labels = drawn(TOKENS, WIDTH, VOCAB, dtype)
    labels[:6] = torch.tensor([0, 63, 64, 128, VOCAB - 1, -100])
    bias = torch.randn(VOCAB).to(dtype)
    assert_same(*in_both_ways(blocks, hidden, weight, labels, bias=bias, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_several_labels(blocks, dtype):
    """Of a token they lie in different blocks; some, or all, are ignored."""
    hidden, weight, _ = drawn(TOKENS, WIDTH, VOCAB, dtype)
    labels = torch.randint(VOCAB, (TOKENS, 5))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[3] = -100
    assert_same(*in_both_ways(blocks, hidden, weight, labels, **EVERYTHING))


@torch.no_grad()
def test_a_bound_of_the_kept_tokens(blocks):
    hidden, weight, labels = drawn(TOKENS, WIDTH, VOCAB)
    labels[::3] = -100
    kept = int((labels >= 0).sum())
    for bound in (kept, kept + 2, TOKENS):
        found = in_both_ways(blocks, hidden, weight, labels, kept_tokens=bound, **EVERYTHING)
        assert_same(*found)


@torch.no_grad()
def test_blocks_that_nothing_can_be_drawn_from(blocks):
    """Also a label there, a NaN, infinite logits, and a row without a finite logit."""
    hidden, weight, labels = drawn(TOKENS, WIDTH, VOCAB)
    bias = torch.randn(VOCAB)
    bias[:BLOCK] = -torch.inf
    bias[3 * BLOCK :] = -torch.inf
    labels[:4] = torch.tensor([5, BLOCK, 3 * BLOCK - 1, VOCAB - 1])
    hidden[10] = torch.nan
    found, whole = in_both_ways(blocks, hidden, weight, labels, bias=bias, **EVERYTHING)
    assert_same(found, whole)
    assert found.logprobs[0] == found.logprobs[3] == -torch.inf and found.logprobs[10].isnan()
    for value in (-torch.inf, torch.inf):
        bias = torch.full((VOCAB,), value)
        assert_same(*in_both_ways(blocks, hidden, weight, labels, bias=bias, entropy=True))
    bias = torch.zeros(VOCAB)
    bias[100] = torch.inf
    assert_same(*in_both_ways(blocks, hidden, weight, labels, bias=bias, entropy=True))


@torch.no_grad()
def test_the_first_of_equal_logits_is_the_most_likely(blocks):
    hidden, weight, labels = torch.ones(TOKENS, 1), torch.zeros(VOCAB, 1), torch.zeros(TOKENS)
    found, whole = in_both_ways(blocks, hidden, weight, labels.long(), argmax=True)
    assert (found.argmax == 0).all()
    weight[[70, 190]] = 1
    found, whole = in_both_ways(blocks, hidden, weight, labels.long(), argmax=True)
    assert (found.argmax == 70).all()
    assert_same(found, whole)


@torch.no_grad()
def test_no_label_of_a_block_is_out_of_range(blocks):
    hidden, weight, labels = drawn(TOKENS, WIDTH, VOCAB)
    labels[7] = VOCAB
    with pytest.raises(IndexError, match=str(VOCAB)):
        rk.linear_token_logprobs(hidden, weight, labels)


@torch.no_grad()
def test_few_tokens_take_more_columns(blocks):
    hidden, weight, labels = drawn(2, WIDTH, 4 * VOCAB)
    rk.linear_token_logprobs(hidden, weight, labels)
    assert blocks == [8 * BLOCK, 4 * VOCAB - 8 * BLOCK]


@pytest.mark.parametrize("name", ["ppo, every term", "gspo"])
def test_a_policy_loss_and_its_reference(blocks, name):
    """Without gradients, and in the first of two sweeps; both heads share the budget."""
    leaves, tokens, constants = policy_problem(torch.float32)
    head = leaves[:2]
    constants = {k: v for k, v in constants.items() if k != "ref_logprobs"}
    reference = {"ref_hidden": torch.randn_like(head[0]), "ref_weight": torch.randn_like(head[1])}
    given = dict(constants, config=CONFIGS[name], **reference)
    with torch.no_grad():
        blocks.clear()
        loss, metrics = rk.linear_policy_loss(*head, *tokens, **given)[:2]
        assert max(blocks) < leaves[1].shape[0]
        exact = rk.linear_policy_loss(*head, *tokens, chunk_tokens=64, **given)
    torch.testing.assert_close(loss, exact[0], rtol=3e-6, atol=3e-6)
    for key, value in metrics.items():
        torch.testing.assert_close(value, exact[1][key], rtol=1e-5, atol=1e-5)
    found = run_policy(rk.linear_policy_loss, leaves, tokens, **given)
    whole = run_policy(rk.linear_policy_loss, leaves, tokens, chunk_tokens=64, **given)
    for a, e in zip(found, whole, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def exact_products(tokens):
    """A head whose logits are sums of few whole numbers: the same bits from any product."""
    hidden = torch.randint(-2, 3, (tokens, WIDTH)).float()
    weight = torch.randint(-2, 3, (VOCAB, WIDTH)).float() / 4
    return hidden, weight, torch.randint(VOCAB, (tokens,))


@torch.no_grad()
def test_bits_of_a_row_in_any_batch(blocks):
    """Whatever blocks the batch is multiplied in."""
    hidden, weight, labels = exact_products(TOKENS)
    options = {"entropy": True, "collision": True, "lse": True}
    whole = rk.linear_token_logprobs(hidden, weight, labels, **options)
    assert max(blocks) == BLOCK
    for rows in (slice(7, 8), slice(5, 20), slice(0, 39)):
        blocks.clear()
        part = rk.linear_token_logprobs(hidden[rows], weight, labels[rows], **options)
        for name, a, e in zip(part._fields, part, whole, strict=True):
            assert e is None or torch.equal(a, e[rows]), name
    assert max(blocks) == BLOCK


@pytest.mark.parametrize("name", ["token correction", "gspo"])
def test_the_first_ratio_is_exactly_one(blocks, name):
    """Old log-probabilities come from a pass in blocks, new ones from one that keeps its logits."""
    tokens = 8
    hidden, weight, labels = exact_products(tokens)
    old = rk.linear_token_logprobs(hidden, weight, labels).logprobs
    hidden.requires_grad_()
    shape, advantages = (2, tokens // 2), torch.randn(2, tokens // 2)
    _, metrics = rk.linear_policy_loss(
        hidden.view(*shape, WIDTH), weight, labels.view(shape), old.view(shape), advantages,
        mask=torch.ones(shape, dtype=torch.bool), rollout_logprobs=old.view(shape),
        config=CONFIGS[name],
    )  # fmt: skip
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["k3_old"] == 0


@pytest.mark.parametrize("name", ["ppo, every term", "gspo"])
@pytest.mark.parametrize("vocab", [VOCAB, BLOCK])
def test_int32_labels(blocks, name, vocab):
    """Of the value that a sentinel has in int32, too."""
    hidden = torch.randn(2, 20, WIDTH, requires_grad=True)
    weight = torch.randn(vocab, WIDTH, requires_grad=True)
    labels = torch.randint(4, (2, 20))
    old, mask = torch.randn(2, 20) - 3, torch.ones(2, 20, dtype=torch.bool)
    reference = {"ref_hidden": hidden.detach() + 1, "ref_weight": weight.detach()}
    reference = reference if CONFIGS[name].kl_coef else {}
    found = []
    for kind in (torch.int64, torch.int32):
        loss, metrics = rk.linear_policy_loss(
            hidden, weight, labels.to(kind), old, torch.randn(2, generator=torch.manual_seed(0)),
            mask=mask, config=CONFIGS[name], **reference,
        )  # fmt: skip
        found.append((loss, metrics.tensor, *torch.autograd.grad(loss, (hidden, weight))))
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("kernels", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_ignored_label_that_int32_would_truncate(kernels, masked):
    """2**32 + 1 is 1 there."""
    hidden, weight, labels = drawn(12, WIDTH, VOCAB)
    labels[:4] = 1
    options = {"ignore_index": 2**32 + 1, "mask": torch.arange(12) > 2 if masked else None}
    with rk.use_backend(kernels):
        for function, args in (
            (rk.linear_token_logprobs, (hidden, weight)),
            (rk.token_logprobs, (hidden @ weight.T,)),
        ):
            found = [
                function(*args, labels.to(t), **options)[0] for t in (torch.int32, torch.int64)
            ]
            assert torch.equal(*found)
            assert (found[0][3:] != 0).all() and bool((found[0][:3] == 0).all()) == masked


@torch.no_grad()
def test_many_labels_of_a_token_take_whole_rows(blocks):
    hidden, weight, _ = drawn(TOKENS, WIDTH, VOCAB)
    labels = torch.randint(VOCAB, (TOKENS, chunks._BLOCK_LABELS + 1))
    found = rk.linear_token_logprobs(hidden, weight, labels, lse=True)
    assert set(blocks) == {VOCAB}
    assert_same(found, rk.linear_token_logprobs(hidden, weight, labels, chunk_tokens=8, lse=True))
