"""token_logprobs on every backend: layouts, bits, bad data, compilation."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.ops.bits import assert_same_bits, check_upstream, with_threads
from tests.ops.logprobs_cases import OPTIONS, check_against_oracle, problem, run

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.core import env
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    generator,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_are_bitwise_equal(backend, dtype):
    store = torch.randn(3, 9, 2 * 413 + 3).to(dtype)
    labels = torch.randint(0, 413, (3, 8))
    upstream = torch.randn(2, 3, 8)
    views = {
        "shifted": store[:, :-1, :413],
        "offset": store[:, 1:, 1:414],
        "strided vocabulary": store[:, :-1, 0:826:2],
        "transposed": store[:, :-1, :413].transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary outside": store[:, :-1, :413].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "expanded": store[:1, :-1, :413].expand(3, 8, 413),
    }
    for name, view in views.items():
        expected = run(
            rk.token_logprobs, view.detach().contiguous().requires_grad_(), labels, upstream
        )
        actual = run(rk.token_logprobs, view.detach().requires_grad_(), labels, upstream)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape, name
            assert_bitwise_equal(a, e)


def test_negated_view(backend):
    logits = torch.view_as_complex(torch.randn(4, 33, 2)).conj().imag
    assert logits.is_neg()
    labels = torch.randint(0, 33, (4,))
    expected = rk.token_logprobs(logits.clone().contiguous(), labels).logprobs
    assert_bitwise_equal(rk.token_logprobs(logits, labels).logprobs, expected)


def test_many_leading_dimensions(backend):
    store = torch.randn(2, 5, 3, 7, 20)
    view = store[:, 1:4, :2, ::3]
    labels = torch.randint(0, 20, view.shape[:-1])
    expected = rk.token_logprobs(view.contiguous(), labels).logprobs
    assert_bitwise_equal(rk.token_logprobs(view, labels).logprobs, expected)
    single = rk.token_logprobs(store[0, 0, 0, 0], labels[0, 0, 0, 0]).logprobs
    assert single.shape == ()


def test_strided_labels_and_upstream_gradients(backend):
    logits, _ = problem(12, 70, torch.float32)
    labels = torch.randint(0, 70, (12, 3), dtype=torch.int32)[:, 1]
    check_upstream(rk.token_logprobs(logits, labels).logprobs, logits)


def test_row_invariance():
    logits, labels = problem(33, 5003, torch.bfloat16)
    whole = run(rk.token_logprobs, logits, labels, torch.ones(2, 33))
    for again in with_threads(lambda: run(rk.token_logprobs, logits, labels, torch.ones(2, 33))):
        assert_same_bits(again, whole)
    order = torch.randperm(33)
    shuffled = run(
        rk.token_logprobs, logits.detach()[order].requires_grad_(), labels[order], torch.ones(2, 33)
    )
    for a, e in zip(shuffled, whole, strict=True):
        assert_bitwise_equal(a, e[order])
    for i in (0, 16, 32):
        alone = logits.detach()[i : i + 1].clone().requires_grad_()
        single = run(rk.token_logprobs, alone, labels[i : i + 1], torch.ones(2, 1))
        for a, e in zip(single, whole, strict=True):
            assert_bitwise_equal(a, e[i : i + 1])


def test_repeats_are_bitwise_equal(backend):
    logits, labels = problem(9, 777, torch.float32)
    first = run(rk.token_logprobs, logits, labels, torch.ones(2, 9))
    for _ in range(20):
        for a, e in zip(
            run(rk.token_logprobs, logits, labels, torch.ones(2, 9)), first, strict=True
        ):
            assert_bitwise_equal(a, e)


@pytest.mark.parametrize("bad", [40, -1, 2**40, -(2**40)])
def test_label_out_of_range(backend, bad, monkeypatch):
    logits, labels = problem(7, 40, torch.float32)
    clean = run(rk.token_logprobs, logits, labels, torch.ones(2, 7))
    labels[3] = bad
    if backend in ("cuda", "triton"):
        # A GPU kernel cannot raise: it poisons the row, and only that, unless told to look first.
        poisoned = run(rk.token_logprobs, logits, labels, torch.ones(2, 7))
        keep = [0, 1, 2, 4, 5, 6]
        for a, e in zip(poisoned, clean, strict=True):
            assert a[3].isnan().all()
            assert_bitwise_equal(a[keep], e[keep])
        monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises(IndexError, match=rf"position 3 is {bad};"):
        rk.token_logprobs(logits, labels)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(backend, bad, monkeypatch):
    logits, labels = problem(4, 20, torch.float32)
    with pytest.raises(ValueError, match="temperature"):
        rk.token_logprobs(logits, labels, temperature=bad)
    per_token = torch.tensor([1.0, 1.0, bad, 1.0])
    if backend in ("cuda", "triton"):
        logprobs = rk.token_logprobs(logits, labels, temperature=per_token).logprobs
        assert logprobs.isnan().tolist() == [False, False, True, False]
        monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises(ValueError, match="temperature at flat position 2"):
        rk.token_logprobs(logits, labels, temperature=per_token)
    labels[2] = -100
    assert rk.token_logprobs(logits, labels, temperature=per_token).logprobs.isfinite().all()


def test_bad_arguments(backend):
    logits, labels = problem(4, 20, torch.float32)
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.bool"):
        rk.token_logprobs(logits, labels.bool())
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.int16"):
        rk.token_logprobs(logits, labels.short())
    with pytest.raises(TypeError, match="logits must be one of"):
        rk.token_logprobs(labels, labels)
    with pytest.raises(TypeError, match="logits must be a Tensor"):
        rk.token_logprobs([[1.0]], labels)
    with pytest.raises(TypeError, match="temperature must be a number"):
        rk.token_logprobs(logits, labels, temperature="1")
    with pytest.raises(ValueError, match=r"\(4,\), got \(3,\)"):
        rk.token_logprobs(logits, labels[:3])
    with pytest.raises(ValueError, match="V >= 1"):
        rk.token_logprobs(torch.randn(4, 0), labels)
    with pytest.raises(ValueError, match="V >= 1"):
        rk.token_logprobs(torch.tensor(1.0), torch.tensor(1))
    with pytest.raises(ValueError, match="softcap"):
        rk.token_logprobs(logits, labels, softcap=0.0)
    with pytest.raises(ValueError, match="must broadcast"):
        rk.token_logprobs(logits, labels, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="device"):
        rk.token_logprobs(logits, labels.to("meta"))


def test_float64_is_for_the_reference():
    logits, labels = problem(2, 9, torch.float64)
    with rk.use_backend("cpu"), pytest.raises(TypeError, match="float64"):
        rk.token_logprobs(logits, labels)
    with rk.use_backend("reference"):
        assert rk.token_logprobs(logits, labels).logprobs.dtype is torch.float64


def test_caller_tensors_and_grad_modes(backend):
    logits, labels = problem(5, 60, torch.float32)
    before = logits.detach().clone()
    expected = run(rk.token_logprobs, logits, labels, torch.ones(2, 5))
    assert_bitwise_equal(logits, before)
    with torch.no_grad():
        assert_bitwise_equal(rk.token_logprobs(logits, labels).logprobs, expected[0])
    with torch.inference_mode():
        assert_bitwise_equal(rk.token_logprobs(logits, labels).logprobs, expected[0])
    assert not rk.token_logprobs(logits.detach(), labels).logprobs.requires_grad
    # Two uses of one tensor, and a second backward through the same graph.
    a = rk.token_logprobs(logits, labels).logprobs
    b = rk.token_logprobs(logits, labels, entropy=True).entropy
    (both,) = torch.autograd.grad(a.sum() + b.sum(), logits, retain_graph=True)
    (again,) = torch.autograd.grad(a.sum() + b.sum(), logits)
    assert_bitwise_equal(both, again)
    torch.testing.assert_close(both, expected[2])


def test_double_backward_is_refused():
    logits, labels = problem(3, 12, torch.float32)
    logprobs = rk.token_logprobs(logits, labels).logprobs
    (gradient,) = torch.autograd.grad((logprobs**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inplace_backward():
    logits, labels = problem(6, 500, torch.bfloat16)
    expected = run(rk.token_logprobs, logits, labels, torch.ones(2, 6))
    head = logits * 1
    address = head.data_ptr()
    found = rk.token_logprobs(head, labels, entropy=True, inplace_backward=True)
    version = head._version
    seen = []
    head.register_hook(lambda g: seen.append(g))
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert seen[0].data_ptr() == address
    assert head._version > version
    assert_bitwise_equal(logits.grad, expected[2])


def test_inplace_backward_is_refused_where_it_would_corrupt():
    logits, labels = problem(4, 30, torch.float32)
    with pytest.raises(ValueError, match="leaf"):
        rk.token_logprobs(logits, labels, inplace_backward=True)
    with rk.use_backend("reference"), pytest.raises(ValueError, match="no inplace_backward"):
        rk.token_logprobs(logits * 1, labels, inplace_backward=True)
    wide = (logits * 1)[:1].expand(4, 30)
    with pytest.raises(ValueError, match="share memory"):
        rk.token_logprobs(wide, labels, inplace_backward=True)
    scattered = (torch.randn(2, 5, 3, 7, 20, requires_grad=True) * 1)[:, 1:4, :2, ::3]
    with pytest.raises(ValueError, match="rows of one stride"):
        rk.token_logprobs(scattered, labels.new_zeros(2, 3, 2, 3), inplace_backward=True)
    # Another user of the same logits is told by autograd instead of getting a wrong gradient.
    head = logits * 1
    loss = rk.token_logprobs(head, labels, inplace_backward=True).logprobs.sum()
    other = (head**2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_frozen_rows_and_single_outputs(backend):
    logits, labels = problem(4, 30, torch.float32)
    result = rk.token_logprobs(logits, labels, entropy=True)
    (only_entropy,) = torch.autograd.grad(result.entropy.sum(), logits, retain_graph=True)
    (only_logprobs,) = torch.autograd.grad(result.logprobs.sum(), logits, retain_graph=True)
    (both,) = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), logits)
    torch.testing.assert_close(only_entropy + only_logprobs, both)
    assert only_entropy.abs().max() > 0 and only_logprobs.abs().max() > 0


def test_gradient_sums_to_zero(backend):
    logits, labels = problem(8, 4100, torch.float32)
    _, _, gradient = run(rk.token_logprobs, logits, labels, torch.randn(2, 8))
    assert gradient.sum(-1).abs().max() < 1e-5


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 6])
    for options in OPTIONS:
        torch.autograd.gradcheck(
            lambda x, o=options: reference.token_logprobs(x, labels, entropy=True, **o)[:2], logits
        )


@pytest.mark.parametrize("case", ["plain", "no grad", "strided", "empty", "options"])
def test_opcheck(case):
    logits = torch.randn(4, 3, 21)
    labels = torch.randint(0, 21, (4, 3))
    temperatures, softcap, entropy = None, 0.0, True
    if case == "strided":
        logits, labels = torch.randn(4, 5, 40)[:, 1:4, 3:24], labels.t().contiguous().t()
    if case == "empty":
        logits, labels = logits[:0], labels[:0]
    if case == "options":
        temperatures, softcap, entropy = torch.rand(4, 3) + 0.5, 9.0, False
    further = not entropy
    options = (1.0, softcap, entropy, -100, False, further, further)
    args = (logits, labels, temperatures, *options)
    op = torch.ops.rlhf_kernels.token_logprobs.default
    torch.library.opcheck(op, (*args, case != "no grad", "cpu"))
    _, _, stats, collisions, _ = op(*args, True, "cpu")
    grad = torch.randn(labels.shape)
    upstream = (grad, grad if entropy else None)
    back = (
        logits,
        labels,
        temperatures,
        stats,
        *upstream,
        *options,
        grad,
        collisions,
        collisions,
        "cpu",
    )
    torch.library.opcheck(torch.ops.rlhf_kernels.token_logprobs_backward.default, back)


def test_compiles_without_graph_break_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, labels):
        result = rk.token_logprobs(logits * 1, labels, temperature=0.9, entropy=True)
        return result.logprobs.sum() - 0.01 * result.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for length, vocab in ((5, 11), (9, 33), (17, 65), (40, 700), (3, 4111)):
        logits, _ = problem(2 * length, vocab, torch.float32)
        logits = logits.detach().view(2, length, vocab).requires_grad_()
        labels = torch.randint(0, vocab, (2, length))
        (actual,) = torch.autograd.grad(compiled(logits, labels), logits)
        (expected,) = torch.autograd.grad(step(logits, labels), logits)
        assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 2


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 1.0, 12.0]),
    temperature=st.sampled_from([1.0, 0.31, 2.5]),
    softcap=st.sampled_from([None, 8.0]),
    seed=st.integers(0, 2**31),
)
@example(rows=1, vocab=3, dtype=torch.float32, spread=12.0, temperature=0.31, softcap=8.0, seed=170)
def test_fuzz(rows, vocab, dtype, spread, temperature, softcap, seed):
    logits, labels = problem(rows, vocab, dtype, spread=spread, seed=seed)
    options = {"temperature": temperature} | ({} if softcap is None else {"softcap": softcap})
    with rk.use_backend("cpu"):
        check_against_oracle(logits, labels, **options)
        assert (rk.token_logprobs(logits, labels, **options).logprobs <= 0).all()


@pytest.mark.slow
def test_more_than_2_31_elements(backend):
    if backend == "reference":
        pytest.skip("the reference would need 50 GB")
    rows, vocab = 9, 2**31 // 8 + 3
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    logits[-1, -1] = 20.0
    labels = torch.full((rows,), vocab - 1)
    result = rk.token_logprobs(logits, labels).logprobs
    uniform = -math.log(vocab)
    assert abs(result[0].item() - uniform) < 1e-4
    expected = 20.0 - math.log(vocab - 1 + math.exp(20.0))
    assert abs(result[-1].item() - expected) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_share_a_row(dtype):
    """Fewer rows than threads: each row's spans of 16384 logits go to all of them."""
    options = (
        {},
        {"entropy": True, "softcap": 20.0, "temperature": 0.7},
        {"entropy": True, "collision": True, "argmax": True, "lse": True},
    )
    for count, vocabulary in ((1, 16385), (2, 3 * 16384), (3, 40001), (1, 151936)):
        x = (4 * torch.randn(count, vocabulary, generator=generator(vocabulary))).to(dtype)
        # The largest in the last span; a span without weight; NaN that a maximum may hide.
        x[0, -1] = 40
        hard = x.clone()
        hard[-1, :16384] = -torch.inf
        hidden = hard.clone()
        hidden[-1, 100] = torch.nan
        labels = torch.full((count,), vocabulary - 2)
        for logits in (x, hard, hidden):
            for more in options:

                def run(logits=logits, labels=labels, more=more):
                    leaf = logits.clone().requires_grad_()
                    found = [t for t in rk.token_logprobs(leaf, labels, **more) if t is not None]
                    sums = [t for t in found if t.requires_grad]
                    upstream = [torch.full_like(t, 0.7) for t in sums]
                    return [t.detach() for t in found] + [
                        *torch.autograd.grad(sums, leaf, upstream)
                    ]

                with rk.use_backend("cpu"):
                    first, *others = with_threads(run)
                for other in others:
                    assert_same_bits(other, first)
        exact = torch.log_softmax(hard.double(), -1)[:, -2]
        with rk.use_backend("cpu"):
            found = rk.token_logprobs(hard, labels).logprobs
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
