"""Log-probabilities over a support: layouts, bits, bad data, memory, registration."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.ops.bits import check_threads, check_upstream
from tests.ops.support_cases import (
    HIDDEN,
    VOCAB,
    both_forms,
    head_problem,
    problem,
    run,
    run_head,
    supports,
)

import rlhf_kernels as rk
from rlhf_kernels.core import env
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.kernels import native, triton
from rlhf_kernels.kernels.support import Tokens
from rlhf_kernels.kernels.triton import support_products
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, generator


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_are_bitwise_equal(backend, dtype):
    # Rows of 16 elements can be read 16 bytes at a time, unless they begin at an odd one.
    store = torch.randn(3, 5, 2 * 16 + 16).to(dtype)
    labels = torch.randint(0, 16, (3, 4))
    sizes = [3, 16, 0, 9] * 3
    support = supports(sizes, 16, labels.reshape(-1))
    upstream = torch.randn(2, 3, 4)
    views = {
        "shifted": store[:, :-1, :16],
        "offset": store[:, 1:, 1:17],
        "strided vocabulary": store[:, :-1, 0:32:2],
        "transposed": store[:, :-1, :16].transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": store[:1, :-1, :16].expand(3, 4, 16),
    }
    weight = torch.randn(16, 16).to(dtype)
    strided = torch.randn(16, 21).to(dtype)[:, 3:19].copy_(weight)
    for name, view in views.items():
        straight = view.detach().contiguous().requires_grad_()
        view = view.detach().requires_grad_()
        for a, e in zip(
            run(view, labels, support, upstream),
            run(straight, labels, support, upstream),
            strict=True,
        ):
            assert a.shape == e.shape, name
            assert_bitwise_equal(a, e)
        expected = run_head((straight, weight.requires_grad_(), None), labels, support, upstream)
        found = run_head((view, strided.detach().requires_grad_(), None), labels, support, upstream)
        for a, e in zip(found, expected, strict=True):
            assert a.shape == e.shape, name
            assert_bitwise_equal(a, e)


def test_integer_types_and_strides(backend):
    logits, labels, support = problem((6, 40, 5), torch.float32)
    expected = run(logits, labels, support, torch.ones(2, 3))
    strided = tuple(torch.stack([t, t], -1)[:, 1] for t in support)
    narrow = tuple(t.int() for t in support)
    for pair in (strided, narrow, (support[0], narrow[1]), (narrow[0], support[1])):
        found = run(logits, labels.int(), pair, torch.ones(2, 3))
        for a, e in zip(found, expected, strict=True):
            assert_bitwise_equal(a, e)


def test_strided_and_expanded_upstream_gradients(backend):
    logits, labels, support = problem((6, 40, 5), torch.float32)
    logprobs = rk.token_logprobs(logits, labels, support=support).logprobs
    check_upstream(logprobs, logits)


def test_one_token_and_no_tokens(backend):
    logits, labels, support = problem((9,), torch.float32)
    one = rk.token_logprobs(logits[0], labels[0], support=support)
    assert_bitwise_equal(one.logprobs, rk.token_logprobs(logits, labels, support=support)[0][0])
    none = torch.zeros(0, 3, dtype=torch.long)
    support = (torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    (_, weight, bias), _, _ = head_problem((1,), torch.float32)
    hidden = torch.randn(0, 3, HIDDEN, requires_grad=True)
    found = run_head((hidden, weight, bias), none, support, torch.ones(2, 0, 3))
    assert found[0].shape == found[1].shape == (0, 3) and found[2].shape == hidden.shape
    assert (found[3] == 0).all() and (found[4] == 0).all()
    empty = torch.randn(0, 3, 7, requires_grad=True)
    assert run(empty, none, support, torch.ones(2, 0, 3))[2].shape == empty.shape


def invariance_problem(rows):
    g = generator(5)
    sizes = torch.randint(0, 200, (rows,), generator=g).clamp(min=1).tolist()
    return head_problem(sizes, torch.bfloat16, vocab=200, hidden=96), sizes


def test_bits_do_not_depend_on_threads():
    (operands, labels, support), _ = invariance_problem(40)
    upstream = torch.randn(2, 40)
    logits = (operands[0] @ operands[1].T).detach().requires_grad_()

    def both():
        head = run_head(operands, labels, support, upstream)
        return *head, *run(logits, labels, support, upstream)

    with rk.use_backend("cpu"):
        check_threads(both)


def test_a_token_does_not_depend_on_its_batch(backend):
    if backend == "reference":
        pytest.skip("torch's GEMM chooses its order of sums by the batch")
    rows = 9
    (operands, labels, support), sizes = invariance_problem(rows)
    upstream = torch.randn(2, rows)
    whole = run_head(operands, labels, support, upstream)
    order = torch.randperm(rows)
    lists = support[1].split(sizes)
    shuffled = (
        torch.tensor([0, *(sizes[i] for i in order)]).cumsum(0),
        torch.cat([lists[i] for i in order]),
    )
    hidden, weight, bias = operands
    moved = (hidden.detach()[order].requires_grad_(), weight, bias)
    again = run_head(moved, labels[order], shuffled, upstream[:, order])
    for i in range(3):
        assert_bitwise_equal(again[i], whole[i][order])
    for n in (0, rows - 1):
        alone = (hidden.detach()[n : n + 1].requires_grad_(), weight, bias)
        found = run_head(
            alone,
            labels[n : n + 1],
            (torch.tensor([0, sizes[n]]), lists[n]),
            upstream[:, n : n + 1],
        )
        for i in range(3):
            assert_bitwise_equal(found[i][0], whole[i][n])


@pytest.mark.parametrize("bad", [VOCAB, -1, 2**40, -(2**40)])
def test_word_out_of_range(backend, bad, monkeypatch):
    _, labels, (indptr, indices) = problem((6, 40, 5), torch.float32)
    indices[20] = bad
    for form in both_forms(labels, (indptr, indices)):
        if backend in ("cuda", "triton"):
            found = form()
            for t in found[:3]:
                assert t[1].isnan().any() and t[[0, 2]].isfinite().all()
            with monkeypatch.context() as patch:
                patch.setattr(env, "CHECK", True)
                with pytest.raises(IndexError, match=rf"index at position 20 is {bad};"):
                    form()
            continue
        with pytest.raises(IndexError, match=rf"index at position 20 is {bad};"):
            form()


@pytest.mark.parametrize(
    ("indptr", "position"),
    [
        ([1, 6, 46, 51], 0),
        ([-5, 6, 46, 51], 0),
        ([0, 46, 6, 51], 2),
        ([0, 6, 2**40, 51], 2),
        ([0, 6, -(2**40), 51], 2),
        ([0, 6, 46, 50], 3),
        ([0, 6, 46, 52], 3),
    ],
)
def test_bad_indptr(backend, indptr, position, monkeypatch):
    _, labels, (_, indices) = problem((6, 40, 5), torch.float32)
    message = rf"end at the number of indices, 51; entry {position} is {indptr[position]}$"
    for form in both_forms(labels, (torch.tensor(indptr), indices)):
        if backend in ("cuda", "triton"):
            # Whose words are whose is not known: every token is poisoned.
            found = form()
            assert found[0].isnan().all() and found[1].isnan().all()
            with monkeypatch.context() as patch:
                patch.setattr(env, "CHECK", True)
                with pytest.raises(ValueError, match=message):
                    form()
            continue
        with pytest.raises(ValueError, match=message):
            form()


def test_bad_label_and_temperature(backend, monkeypatch):
    _, labels, support = problem((6, 40, 5), torch.float32)
    wrong = labels.clone()
    wrong[1] = VOCAB
    temperature = torch.tensor([1.0, -1.0, 1.0])
    logits = torch.randn(3, VOCAB)
    if backend in ("cuda", "triton"):
        for found in (
            rk.token_logprobs(logits, wrong, support=support),
            rk.token_logprobs(logits, labels, support=support, temperature=temperature),
        ):
            assert found.logprobs.isnan().tolist() == [False, True, False]
        monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises(IndexError, match=rf"flat position 1 is {VOCAB};"):
        rk.token_logprobs(logits, wrong, support=support)
    with pytest.raises(ValueError, match="temperature at flat position 1"):
        rk.token_logprobs(logits, labels, support=support, temperature=temperature)


def test_bad_arguments(backend):
    logits, labels, (indptr, indices) = problem((6, 40, 5), torch.float32)
    for wrong, error, message in (
        (indptr, TypeError, r"pair \(indptr, indices\), got Tensor"),
        ((indptr,), TypeError, "pair"),
        ((indptr, indices.float()), TypeError, "support indices must be int64 or int32"),
        ((indptr.tolist(), indices), TypeError, "support indptr must be a Tensor"),
        ((indptr[:-1], indices), ValueError, "and one more, 4, got 3"),
        ((indptr, indices.view(1, -1)), ValueError, "support indices must be 1-D"),
        ((indptr, indices.to("meta")), ValueError, "device"),
    ):
        with pytest.raises(error, match=message):
            rk.token_logprobs(logits, labels, support=wrong)
    with pytest.raises(ValueError, match="inplace_backward"):
        rk.token_logprobs(logits * 1, labels, support=(indptr, indices), inplace_backward=True)


def test_repeated_words(backend, monkeypatch):
    _, labels, _ = problem((1,) * 3, torch.float32)
    labels[1] = -100
    # Twice in the second token, which is ignored, and across tokens is no repetition.
    support = (torch.tensor([0, 3, 6, 10]), torch.tensor([3, 5, 4, 5, 5, 7, 96, 3, 7, 96]))
    for form in both_forms(labels, support):
        if backend in ("cuda", "triton"):
            # What they give is undefined; that it stays inside memory is not.
            found = form()
            assert found[0][0].isfinite() or found[0][0] == -math.inf
            monkeypatch.setattr(env, "CHECK", True)
        with pytest.raises(
            ValueError, match=r"position 9 is 96 again; expected each token id once"
        ):
            form()
        monkeypatch.setattr(env, "CHECK", False)
    once = (support[0], support[1].index_fill(0, torch.tensor([9]), 11))
    for form in both_forms(labels, once):
        assert form()[1].isfinite().all()


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return result


def test_memory_of_the_linear_form(backend, monkeypatch):
    if backend == "reference":
        pytest.skip("the definition makes all logits")
    launch = triton.support.launch

    def unseen(*args, **options):
        # The interpreter copies its arguments.
        with _disable_current_modes():
            launch(*args, **options)

    for module in (triton.support, support_products):
        monkeypatch.setattr(module, "launch", unseen)
    # Room for the longest list and no more: neither logits nor rows of the weight per entry, and
    # for a frozen weight nothing of its size.
    rows, kept = 6, 7
    operands, labels, support = head_problem((kept,) * rows, torch.float32, vocab=200, hidden=64)
    hidden, weight, bias = (t.detach() for t in operands)
    launchers = triton.launchers() if backend == "triton" else native.launchers(backend)
    tokens, options = Tokens(labels, None, *support), RowOptions(1.0, 0.0, True, -100)
    for needs, limit in (([True, False, False], rows * 64), ([True, True, True], 200 * 64)):
        with Sizes() as sizes:
            _, _, stats, logits = launchers["linear_token_logprobs_support"](
                hidden, weight, bias, tokens, options
            )
        assert 0 < sizes.largest <= rows * 64
        upstream = torch.ones(rows)
        with Sizes() as sizes:
            found = launchers["linear_token_logprobs_support_backward"](
                hidden, weight, bias, logits, tokens, stats, upstream, upstream, options, needs,
            )  # fmt: skip
        assert 0 < sizes.largest <= limit
        assert [t.numel() > 0 for t in found] == needs


def test_logits_are_not_kept_alive():
    logits, labels, support = problem((6, 40, 5), torch.float32)
    with rk.use_backend("cpu"):
        found = rk.token_logprobs(logits * 1, labels, support=support).logprobs
    saved = [t for t in found.grad_fn.saved_tensors if t is not None]
    assert max(t.numel() for t in saved) < logits.numel()


@pytest.mark.parametrize("case", ["plain", "empty", "options"])
def test_opcheck(case):
    (hidden, weight, bias), labels, support = head_problem((6, 40, 5), torch.float32)
    temperatures, softcap, entropy, needs = None, 0.0, True, [True, True, True]
    if case == "empty":
        hidden, labels = hidden[:0], labels[:0]
        support = (support[0][:1], support[1][:0])
    if case == "options":
        temperatures, softcap, entropy = torch.rand(3) + 0.5, 9.0, False
        bias, needs = None, [True, False, False]
    ops = torch.ops.rlhf_kernels
    logits = torch.randn(labels.numel(), VOCAB)
    options = (1.0, softcap, entropy, -100, False, False, False)
    tokens = (labels, temperatures, *support)
    upstream = (torch.randn(labels.shape), torch.randn(labels.shape) if entropy else None)
    args = (logits, *tokens, *options, "cpu")
    torch.library.opcheck(ops.token_logprobs_support.default, args)
    _, _, stats, kept = ops.token_logprobs_support(*args)
    back = (kept, *tokens, stats, *upstream, *options)
    torch.library.opcheck(
        ops.token_logprobs_support_backward.default, (*back, VOCAB, torch.float32, "cpu")
    )
    head = tuple(None if t is None else t.detach() for t in (hidden, weight, bias))
    args = (*head, *tokens, *options, "cpu")
    torch.library.opcheck(ops.linear_token_logprobs_support.default, args)
    _, _, stats, kept = ops.linear_token_logprobs_support(*args)
    torch.library.opcheck(
        ops.linear_token_logprobs_support_backward.default,
        (*head, kept, *tokens, stats, *upstream, *options, needs, "cpu"),
    )


def test_compiles_without_graph_break_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, hidden, weight, labels, indptr, indices):
        one = rk.token_logprobs(logits * 1, labels, support=(indptr, indices), entropy=True)
        two = rk.linear_token_logprobs(
            hidden * 1, weight * 1, labels, support=(indptr, indices), temperature=0.9
        )
        return one.logprobs.sum() + one.entropy.sum() + two.logprobs.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seed, (count, vocab) in enumerate(((5, 11), (9, 33), (17, 65))):
        sizes = [3 + i % 7 for i in range(count)]
        (hidden, weight, _), labels, support = head_problem(
            sizes, torch.float32, vocab=vocab, seed=seed
        )
        logits = torch.randn(count, vocab, requires_grad=True)
        inputs = (logits, hidden, weight)
        actual = torch.autograd.grad(compiled(*inputs, labels, *support), inputs)
        expected = torch.autograd.grad(step(*inputs, labels, *support), inputs)
        for a, e in zip(actual, expected, strict=True):
            assert_bitwise_equal(a, e)
    assert counter.frame_count <= 2
