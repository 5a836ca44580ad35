"""The fused LM head's backward pass on a CPU by blocks of the vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.head.bounds import HeadBounds, assert_all_within, logprobs_bounds
from tests.head.head_cases import CONFIGS, drawn, policy_bounds_of, policy_problem, run_policy
from tests.head.test_cases import assert_within_bounds

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.core import sentinels
from rlhf_kernels.core.layout import PLAIN_MEMORY
from rlhf_kernels.head import chunks as head_chunks
from rlhf_kernels.head import gemm, gradients
from rlhf_kernels.head.gradients import _Sum
from rlhf_kernels.kernels import backends, native
from rlhf_kernels.testing import DTYPES, assert_within_bound, product_bound, to_float64

TOKENS, VOCAB = 37, 200


@pytest.fixture(params=["cpu", "triton"])
def blocks(request, monkeypatch, columns_multiplied):
    """The words of each product of a backward pass, whose budget holds 64 of VOCAB at a time."""
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 64 * TOKENS * 2)
    with rk.use_backend(request.param):
        yield columns_multiplied


class Made(TorchDispatchMode):
    """Shapes and dtypes of the tensors that operators give."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        several = out if isinstance(out, tuple | list) else (out,)
        self.tensors += [(t.shape, t.dtype) for t in several if isinstance(t, torch.Tensor)]
        return out


# Columns of each block of logits: 64 words, and in the last block the rest.
IN_BLOCKS = [64, 64, 64, 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_bounds(blocks, dtype):
    hidden, weight, labels = drawn(TOKENS, 16, VOCAB, dtype)
    # At the ends of blocks.
    labels[:5] = torch.tensor([0, 63, 64, 128, VOCAB - 1])
    upstream = (torch.randn(TOKENS), torch.randn(TOKENS))
    assert_within_bounds((hidden, weight), labels, upstream, {"words": 64})
    forward = -(-TOKENS // 16)
    assert blocks == 2 * [VOCAB] * forward + IN_BLOCKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 9.0, "logit_scale": 0.5}, {"temperature": torch.linspace(0.5, 2.0, TOKENS)}],
    ids=lambda o: next(iter(o)),
)
def test_options_and_skipped_tokens(blocks, dtype, options):
    """Also tokens in an order of their own, and a gradient of hidden rounded once in the end."""
    hidden, weight, labels = drawn(TOKENS, 16, VOCAB, dtype)
    bias = torch.randn(VOCAB).to(dtype).requires_grad_()
    labels[[3, 4, 30]] = -100
    upstream = torch.randn(TOKENS)
    upstream[7:9] = 0

    def run(function, h, w, b, up):
        logprobs, entropy, *_ = function(h, w, labels, bias=b, entropy=True, **options)
        return torch.autograd.grad((logprobs * up).sum() + (entropy * up).sum(), (h, w, b))

    leaves = (hidden, weight, bias)
    found = run(rk.linear_token_logprobs, *leaves, upstream)
    assert blocks[-4:] == IN_BLOCKS
    exact = run(reference.linear_token_logprobs, *to_float64(leaves), upstream.double())
    head = HeadBounds(*leaves, **options)
    bounds = logprobs_bounds(head, labels, (upstream, upstream), words=64)
    assert_all_within(found, exact, bounds[2:])
    assert (found[0][[3, 4, 30, 7, 8]] == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_divergence(blocks, direction, dtype):
    hidden, weight, _ = drawn(TOKENS, 16, VOCAB, dtype)
    ref_hidden, ref_weight, _ = drawn(TOKENS, 8, VOCAB, dtype)
    mask = torch.rand(TOKENS) < 0.9
    upstream = torch.randn(TOKENS)

    def run(function, h, w, rh, rw, up):
        kl = function(h, w, rh, rw, mask=mask, direction=direction)
        return torch.autograd.grad((kl * up).sum(), (h, w))

    arguments = (hidden, weight, ref_hidden, ref_weight)
    found = run(rk.linear_kl_divergence, *arguments, upstream)
    assert blocks[-1] < VOCAB
    exact = run(reference.linear_kl_divergence, *to_float64(arguments), upstream.double())
    head, ref = HeadBounds(*arguments[:2]), HeadBounds(*arguments[2:])
    gradient = head.kl_gradient(ref, direction == "reverse", upstream * mask)
    bounds = head.products(gradient, words=blocks[-2])
    assert_all_within(found, exact, bounds[:2])


def test_more_tokens_than_a_block_takes(blocks, monkeypatch):
    """Tokens in several steps beside blocks of words: sums start, go on and end."""
    for most in (19, 13, 5):
        monkeypatch.setattr(head_chunks, "_BLOCK_TOKENS", most)
        for dtype in DTYPES:
            hidden, weight, labels = drawn(TOKENS, 16, VOCAB, dtype)
            upstream = (torch.randn(TOKENS), torch.randn(TOKENS))
            assert_within_bounds((hidden, weight), labels, upstream, {"tokens": most, "words": 64})
    assert min(blocks) < VOCAB


@pytest.mark.parametrize("name", ["ppo, every term", "grpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_loss(blocks, monkeypatch, name, dtype):
    """Two sweeps where a sum over chunks would be dear: 16-bit weights, more than two chunks."""
    monkeypatch.setattr(head_chunks, "_CHUNK_MULTIPLE", 8)
    monkeypatch.setattr(head_chunks, "CPU_CHUNK_BYTES", 8 * 131 * dtype.itemsize)
    leaves, tokens, constants = policy_problem(dtype)
    given = dict(constants, config=CONFIGS[name])
    found = run_policy(rk.linear_policy_loss, leaves, tokens, **given)
    by_words = blocks[-1] < leaves[1].shape[0]
    assert by_words == (dtype != torch.float32 or name == "gspo")
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), config=CONFIGS[name],
    )  # fmt: skip
    parts = {"tokens_of_chunk": 8, "words_of_block": blocks[-2] if by_words else None}
    bounds = policy_bounds_of(leaves, tokens, constants, config=CONFIGS[name], **parts)
    assert_all_within(found, exact, bounds)


@pytest.mark.parametrize("ignored", ["mask", "labels"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bound_of_the_kept_tokens_that_is_too_large(blocks, dtype, ignored):
    """Tokens without a label are then multiplied by each block, and have no gradient."""
    hidden, weight, labels = drawn(TOKENS, 16, VOCAB, dtype)
    keep = torch.rand(TOKENS) < 0.7
    options = {"mask": keep} if ignored == "mask" else {}
    labels = labels if options else labels.masked_fill(~keep, -100)
    upstream = torch.randn(TOKENS)
    found = []
    for bound in (None, int(keep.sum()) + 1, TOKENS):
        logprobs = rk.linear_token_logprobs(hidden, weight, labels, kept_tokens=bound, **options)
        slopes = torch.autograd.grad((logprobs.logprobs * upstream).sum(), (hidden, weight))
        assert blocks[-len(IN_BLOCKS) :] == IN_BLOCKS or bound is None
        assert (slopes[0][~keep] == 0).all()
        found.append((logprobs.logprobs, *slopes))
    for other in found[1:]:
        for a, e in zip(other, found[0], strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a, e, rtol=8 * eps, atol=8 * eps * e.abs().max().item())


@pytest.mark.parametrize("name", ["ppo, every term", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_loss_with_a_bound_of_its_tokens(blocks, dtype, name):
    leaves, tokens, constants = policy_problem(dtype)
    given = dict(constants, config=CONFIGS[name])
    exact = run_policy(rk.linear_policy_loss, leaves, tokens, **given)
    count = tokens[0].numel()
    found = run_policy(rk.linear_policy_loss, leaves, tokens, kept_tokens=count, **given)
    for a, e in zip(found, exact, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, e, rtol=8 * eps, atol=8 * eps * e.abs().max().item())


def test_a_named_chunk_or_batch_invariance_keeps_chunks_of_tokens(blocks):
    hidden, weight, labels = drawn(TOKENS, 16, VOCAB, torch.bfloat16)
    for options in ({"chunk_tokens": 16}, {"batch_invariant": True}):
        rk.linear_token_logprobs(hidden, weight, labels, **options).logprobs.sum().backward()
    assert set(blocks) == {VOCAB}


def test_memory_holds_no_second_gradient_of_the_weight(blocks):
    """In 16 bits the backward pass makes no fp32 tensor of the weight's size."""
    hidden, weight, labels = drawn(TOKENS, 16, 64 * VOCAB, torch.bfloat16)
    logprobs = rk.linear_token_logprobs(hidden, weight, labels).logprobs
    with Made() as made:
        logprobs.sum().backward()
    assert weight.shape in [shape for shape, _ in made.tensors]
    large = [shape for shape, dtype in made.tensors if dtype == torch.float32]
    assert max(shape.numel() for shape in large) < weight.numel()


@pytest.mark.parametrize("states", ["rows", "columns"])
@pytest.mark.parametrize("transposes", ["not", "torch", "native"])
@pytest.mark.parametrize("width", [24, 50, 150])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_sum_of_a_weight_gradient(monkeypatch, transposes, states, width, chunks, dtype):
    memory = backends.get("cpu").memory if transposes == "native" else PLAIN_MEMORY
    monkeypatch.setattr(gemm, "_has_amx", lambda: transposes != "not")
    monkeypatch.setattr(gemm, "_TRANSPOSED_BYTES", 1)
    monkeypatch.setattr(gemm, "_TRANSPOSED_ROWS", 40)
    monkeypatch.setattr(gradients, "_SUM_ROWS", 64)
    vocab, size = 150, 40
    # The gradient of fp16 logits is fp32.
    a = torch.randn(chunks * size, vocab).to(torch.float32 if dtype == torch.float16 else dtype)
    b = torch.randn(chunks * size, width).to(dtype)
    b = b.T.contiguous().T if states == "columns" else b
    products = a.double().view(chunks, size, -1).mT @ b.double().view(chunks, size, -1)
    # A rounding of each product; that of the sum is the result's own.
    bound = torch.finfo(dtype).eps / 2 * products.abs().sum(0) + product_bound(a.T, b)
    for chunk in (
        head_chunks.Chunk(size, vocab, False),
        head_chunks.Chunk(chunks * size, 64, False),
    ):
        total = _Sum(torch.empty(vocab, width, dtype=dtype), memory)
        for tile in head_chunks.Tokens(len(a), None).tiles(chunk, vocab):
            total.add_product(a[tile.tokens, tile.columns], b[tile.tokens], tile)
        assert_within_bound(total.result(), products.sum(0), bound)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 100])
@pytest.mark.parametrize("columns", [1, 8, 127, 128, 300])
def test_transposed_by_native_code(rows, columns, threads):
    x = torch.randn(rows, columns + 5).to(torch.bfloat16)[:, 2 : columns + 2]
    memory = torch.full((columns, rows + 3), 7.0, dtype=torch.bfloat16)
    native.module("cpu").transpose(x, memory[:, :rows], threads)
    assert torch.equal(memory[:, :rows], x.T) and (memory[:, rows:] == 7).all()


def test_only_plain_rows_are_transposed_by_native_code():
    x, out = torch.zeros(6, 5, dtype=torch.bfloat16), torch.zeros(5, 6, dtype=torch.bfloat16)
    for bad in ((x, torch.zeros(6, 5, dtype=torch.bfloat16).T), (out.T, out)):
        with pytest.raises(ValueError, match="unit strides"):
            native.module("cpu").transpose(*bad, 1)


def test_hidden_states_of_any_strides(blocks):
    """With more tokens than a state has elements, and with fewer."""
    for width in (16, 50):
        hidden, weight, labels = drawn(TOKENS, width, VOCAB, torch.bfloat16)
        upstream = torch.randn(TOKENS)
        found = []
        for states in (hidden, hidden.detach().T.contiguous().T.requires_grad_()):
            logprobs = rk.linear_token_logprobs(states, weight, labels).logprobs
            found.append(torch.autograd.grad((logprobs * upstream).sum(), (states, weight)))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item())


def test_labels_of_a_block():
    nowhere, vocab = sentinels.NOWHERE, 10
    labels = torch.tensor([0, 3, 4, 9, sentinels.ELSEWHERE, nowhere, vocab], dtype=torch.int64)
    local, ignored = head_chunks.localized(labels, slice(3, 6), vocab, -100)
    out = sentinels.ELSEWHERE
    assert local.tolist() == [out, 0, 1, out, out, nowhere, nowhere]
    assert ignored == sentinels.SHARD_IGNORED
    assert head_chunks.localized(labels, slice(0, vocab), vocab, -100) == (labels, -100)
