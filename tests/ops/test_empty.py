"""Tensors without elements, chunks of every size, and labels that are no words."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.config.enums import PREFERENCE_LOSSES
from rlhf_kernels.config.preference import REFERENCE_FREE
from rlhf_kernels.core import sentinels
from rlhf_kernels.core.row_options import RowArguments
from rlhf_kernels.core.sequences import sequence_ids
from rlhf_kernels.head import chunks
from rlhf_kernels.ops.support import linear_token_logprobs_support


def run(f, *tensors):
    """f forward and backward; gradients are finite and of their tensor's shape."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = f(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    total = sum(t.sum() for t in found if isinstance(t, torch.Tensor) and t.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    for t in leaves:
        assert t.grad is None or (t.grad.isfinite().all() and t.grad.shape == t.shape)


@pytest.mark.parametrize("b, t", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_padded(backend, b, t):
    x, keep = torch.randn(b, t), torch.ones(b, t, dtype=torch.bool)
    labels, logits = torch.zeros(b, t, dtype=torch.long), torch.randn(b, t, 5)
    ones = torch.ones(b)
    config = rk.PolicyLossConfig.ppo(kl_coef=0.1, correction_level="token", correction_max=2.0)
    run(lambda z: rk.token_logprobs(z, labels, entropy=True)[:2], logits)
    run(rk.kl_divergence, logits, logits)
    run(lambda a, c: rk.kl_penalty(a, c, estimator="k3"), x, x)
    run(lambda r, v: tuple(rk.gae(r, v, mask=keep, bootstrap_values=ones, whiten=True)), x, x)
    run(lambda r: rk.discounted_returns(r, mask=keep, gamma=0.9), x)
    run(lambda r: rk.whiten(r, mask=keep), x)
    run(lambda p, v: tuple(rk.ppo_advantages(ones, p, p, v, mask=keep, kl_coef=0.1)), x, x)
    run(lambda v: rk.value_loss(v, x, x, mask=keep, clip_range=0.1).loss, x)
    run(lambda p: rk.sequence_logprobs(p, mask=keep, average=True), x)

    def loss(p):
        return rk.policy_loss(
            p, x, x, mask=keep, ref_logprobs=x, rollout_logprobs=x, entropy=x, config=config
        ).loss

    run(loss, x)


@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens_packed(backend, sequences):
    cu, x = torch.zeros(sequences + 1, dtype=torch.long), torch.randn(0)
    keep, ones = torch.ones(0, dtype=torch.bool), torch.ones(sequences)
    run(lambda r: tuple(rk.gae(r, x, mask=keep, cu_seqlens=cu, bootstrap_values=ones)), x)
    run(lambda r: rk.discounted_returns(r, cu_seqlens=cu, bootstrap_values=ones, gamma=0.9), x)
    run(lambda p: tuple(rk.ppo_advantages(ones, p, x, x, mask=keep, cu_seqlens=cu, kl_coef=0.1)), x)
    run(lambda v: rk.value_loss(v, x, x, mask=keep, cu_seqlens=cu).loss, x)
    run(lambda p: rk.sequence_logprobs(p, mask=keep, cu_seqlens=cu), x)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        config = rk.PolicyLossConfig.gspo(
            aggregation=aggregation, correction_level="sequence", correction_max=2.0
        )

        def loss(p, config=config):
            return rk.policy_loss(
                p, x, ones, mask=keep, rollout_logprobs=x, cu_seqlens=cu, config=config
            ).loss

        run(loss, x)


def test_no_rewards_and_no_pairs(backend):
    none = torch.randn(0)
    for scale in ("group", "batch", "none"):
        for groups in (4, torch.zeros(0, dtype=torch.long)):
            assert rk.group_advantages(none, groups, scale=scale).shape == (0,)
    counts = torch.zeros(0, dtype=torch.long)
    for name in PREFERENCE_LOSSES:
        options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        reference = 0 if name in REFERENCE_FREE else 2
        run(
            lambda a, r=reference, n=name, o=options: (
                rk.preference_loss(
                    *[a] * (2 + r), loss=n, chosen_lengths=counts, rejected_lengths=counts, **o
                ).loss
            ),
            none,
        )
    run(lambda a: rk.kto_loss(a, a, counts, kl=0.1).loss, none)
    run(lambda a: rk.reward_model_loss(a, a).loss, none)


@pytest.mark.parametrize("n, width", [(0, 4), (3, 0), (0, 0)])
def test_no_tokens_or_no_columns_of_a_head(backend, n, width):
    """A head without columns is refused by name."""
    h, w, bias = torch.randn(n, width), torch.randn(7, width), torch.randn(7)
    labels, x = torch.full((n,), 6), torch.zeros(1, n)
    keep, config = torch.ones(1, n, dtype=torch.bool), rk.PolicyLossConfig.ppo()

    def logprobs(h, w, bias):
        return rk.linear_token_logprobs(h, w, labels, bias=bias, entropy=True)[:2]

    def loss(h, w, bias):
        return rk.linear_policy_loss(
            h[None], w, labels[None], x, x + 1, mask=keep, bias=bias, config=config
        ).loss

    for f in (logprobs, loss, lambda *a: rk.linear_kl_divergence(*a[:2], h, w, bias=a[2])):
        if width:
            run(f, h, w, bias)
        else:
            with pytest.raises(ValueError, match="H >= 1"):
                f(h, w, bias)


@pytest.mark.parametrize("entries", [0, 2])
@pytest.mark.parametrize("n, width", [(0, 4), (3, 0), (3, 4), (0, 0)])
def test_no_words_or_no_columns_under_a_support(backend, n, width, entries):
    """Beneath the check that refuses a head without columns too."""
    h, w, bias = torch.randn(n, width), torch.randn(7, width), torch.randn(7)
    labels, words = torch.full((n,), 6), torch.arange(7 - entries, 7)
    lists = torch.arange(n + 1) * entries, words.repeat(n)
    leaves = [t.clone().requires_grad_() for t in (h, w, bias)]
    arguments = RowArguments(1.0, None, 1.0, False, -100)
    got = linear_token_logprobs_support(*leaves, labels, lists, arguments).logprobs
    got.sum().backward()
    if n and not entries:
        assert got.isnan().all() and not any(t.grad.any() for t in leaves)
    elif n and not width:
        # Without columns the logits are the bias.
        kept = bias[words].double().log_softmax(0)
        torch.testing.assert_close(got.detach().double(), kept[-1].expand(n))
        want = torch.zeros(7, dtype=torch.float64)
        want[words] = n * ((torch.arange(entries) == entries - 1).double() - kept.exp())
        torch.testing.assert_close(leaves[2].grad.double(), want)
    alone = bias.clone().requires_grad_()
    found = linear_token_logprobs_support(h, w, alone, labels, lists, arguments)
    found.logprobs.sum().backward()
    assert torch.equal(alone.grad, leaves[2].grad)
    logits = torch.randn(n, 7)
    run(lambda z: rk.token_logprobs(z, labels, support=lists).logprobs.nan_to_num(), logits)


def test_exact_products_are_no_larger_than_they_gain_by():
    cpu = torch.device("cpu")
    for vocab, asked in [(15, None), (15, 10**9), (1, None), (50_000, 10**9)]:
        size = chunks.exact_size(asked, cpu, vocab, torch.float32)
        assert size <= 8192 and size * vocab * 4 <= 16 * chunks.CPU_CHUNK_BYTES
    # What was right before stays.
    for vocab in (32_768, 151_936):
        for dtype in (torch.float32, torch.bfloat16):
            assert chunks.exact_size(None, cpu, vocab, dtype) == chunks.chunk_size(
                cpu, vocab, dtype
            )
    assert chunks.exact_size(64, cpu, 151_936, torch.float32) == 64


@pytest.mark.parametrize("options", [{"chunk_tokens": 1}, {"chunk_tokens": 10**9}, {}])
@pytest.mark.parametrize("invariant", [False, True])
def test_chunks_of_every_size(backend, options, invariant):
    if backend == "reference":
        pytest.skip("has no chunks")
    options = {**options, "batch_invariant": invariant}
    for n, vocab in [(0, 15), (3, 15), (40, 2), (2, 700)]:
        h, w = torch.randn(n, 4, requires_grad=True), torch.randn(vocab, 4)
        y = torch.randint(0, vocab, (n,))
        got = rk.linear_token_logprobs(h, w, y, **options).logprobs
        (slope,) = torch.autograd.grad(got.sum(), h)
        exact = h.detach().double().requires_grad_()
        want = (exact @ w.double().T).log_softmax(-1).gather(1, y[:, None]).squeeze(1)
        (want_slope,) = torch.autograd.grad(want.sum(), exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slope.double(), want_slope, rtol=1e-5, atol=1e-5)


# ---- Labels -------------------------------------------------------------------------------------


def test_no_label_is_taken_for_another():
    special = [sentinels.ELSEWHERE, sentinels.SHARD_IGNORED, sentinels.NOWHERE]
    assert len(set(special)) == 3 and max(special) < -1
    labels = torch.tensor([0, 3, 9, -1, 10, *special])
    local, ignored = chunks.localized(labels, slice(2, 6), 10, sentinels.SHARD_IGNORED)
    out, nowhere = sentinels.ELSEWHERE, sentinels.NOWHERE
    assert local.tolist() == [out, 1, out, nowhere, nowhere, out, nowhere, nowhere]
    assert ignored == sentinels.SHARD_IGNORED


def test_labels_under_the_mask_are_anything(backend):
    h, w = torch.randn(1, 6, 4), torch.randn(9, 4)
    mask = torch.tensor([[1, 0, 0, 0, 0, 1]])
    odd = torch.tensor([[3, sentinels.ELSEWHERE, sentinels.SHARD_IGNORED, -100, 2**62, 8]])
    plain = torch.where(mask != 0, odd, 0)
    found = [
        rk.linear_policy_loss(
            h, w, y, torch.full((1, 6), -2.0), torch.ones(1, 6), mask=mask,
            config=rk.PolicyLossConfig.ppo(),
        ).loss
        for y in (odd, plain)
    ]  # fmt: skip
    assert torch.equal(*found) and found[0].isfinite()


def test_labels_of_shards_are_no_ignore_index(backend):
    for odd in (sentinels.ELSEWHERE, sentinels.SHARD_IGNORED):
        with pytest.raises(ValueError, match="ignore_index"):
            rk.token_logprobs(torch.randn(1, 3), torch.tensor([odd]), ignore_index=odd)


def test_offsets_that_end_early_index_nothing_outside():
    """Where data may not be looked at, a sequence's number is one of the sequences."""
    for offsets in ([0, 3, 5], [0, 9], [2, 4], [0, -1, 2]):
        ids = sequence_ids(torch.zeros(6), torch.tensor(offsets))
        assert 0 <= int(ids.min()) and int(ids.max()) < len(offsets) - 1
