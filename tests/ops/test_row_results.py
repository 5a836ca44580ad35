"""What token_logprobs gives beside log-probability and entropy, on every backend."""

import math

import pytest
import torch

from tests.ops.logprobs_cases import OPTIONS, problem
from tests.ops.row_results_cases import EVERY, FIELDS, check, ours, plain, run, weights

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    generator,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 7, 127, 4099, 8200))
def test_every_result_matches_fp64(backend, vocab, dtype):
    check(*problem(5, vocab, dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_match_fp64(backend, options):
    check(*problem(6, 4173, torch.float32), **options)


@pytest.mark.parametrize("name", (*FIELDS, "argmax"))
def test_one_result_alone(backend, name):
    """It has the bits that it has among others, and a gradient of its own."""
    logits, labels = problem(4, 301, torch.float32)
    together = ours(logits, labels)
    alone = rk.token_logprobs(logits, labels, **({name: True} if name != "logprobs" else {}))
    asked = {"logprobs", name}
    for field in together:
        if field in asked:
            assert_bitwise_equal(getattr(alone, field), together[field])
        else:
            assert getattr(alone, field) is None
    if name != "argmax":
        check(logits, labels, {name: torch.randn(4)})


def test_temperatures_at_their_bounds(backend):
    logits, labels = problem(4, 97, torch.float32)
    check(logits, labels, temperature=torch.tensor([2.0**-60, 2.0**-20, 2.0**20, 2.0**60]))


def test_strides_and_rows(backend):
    """The same bits from any layout, alone and among others."""
    store = torch.randn(3, 9, 500)
    labels = torch.randint(0, 413, (3, 8), dtype=torch.int32)
    view = store[:, 1:, 7:420]
    upstream = {k: u.view(3, 8) for k, u in weights(24).items()}
    expected = run(ours, view.contiguous(), labels, upstream)
    moved = view.transpose(0, 1).contiguous().transpose(0, 1)
    for a, e in zip(run(ours, moved, labels, upstream).values(), expected.values(), strict=True):
        assert_bitwise_equal(a.contiguous(), e)
    leaf = view[2:, 3:4].detach()
    one = run(ours, leaf, labels[2:, 3:4], {k: u[2:, 3:4] for k, u in upstream.items()})
    for a, e in zip(one.values(), expected.values(), strict=True):
        assert_bitwise_equal(a, e[2:, 3:4])


def test_ignored_rows_and_rows_without_an_upstream_gradient(backend):
    logits, labels = problem(6, 300, torch.float32)
    labels[[1, 4]] = -100
    upstream = weights(6)
    for u in upstream.values():
        u[2] = 0
    clean = run(ours, logits, labels, upstream)
    dirty = logits.detach().clone()
    dirty[1], dirty[4], dirty[2, 7] = float("nan"), float("inf"), float("nan")
    temperature = torch.tensor([1.0, math.nan, 1.0, 1.0, 0.0, 1.0])
    found = run(ours, dirty, labels, upstream, temperature=temperature)
    for name, a in found.items():
        assert (a[[1, 4]] == (-1 if name == "argmax" else 0)).all()
        if name == "gradient":
            assert (a[2] == 0).all()
        else:
            assert a[2] == 7 if name == "argmax" else a[2].isnan()
        assert_bitwise_equal(a[[0, 3, 5]], clean[name][[0, 3, 5]])


def test_rows_of_infinities(backend):
    logits, labels = torch.randn(5, 4100), torch.tensor([0, 1, 2, 3, 4099])
    logits[0], logits[1, 2050], logits[2, :4000] = -math.inf, math.inf, -math.inf
    logits[3, 4], logits[4, 4099] = math.nan, -math.inf
    found = run(ours, logits, labels, {"lse": torch.ones(5)})
    assert torch.equal(found["argmax"], logits.argmax(-1))
    assert found["argmax"].tolist()[:2] == [0, 2050] and found["argmax"][3] == 4
    assert found["collision"].isnan().tolist() == [True, True, False, True, False]
    squares = logits[[2, 4]].softmax(-1).square().sum(-1)
    torch.testing.assert_close(found["collision"][[2, 4]], squares)
    assert found["lse"].isnan().tolist() == [True, True, False, True, False]
    finite = logits[[2, 4]]
    torch.testing.assert_close(found["lse"][[2, 4]], finite.logsumexp(-1))
    torch.testing.assert_close(found["gradient"][[2, 4]], finite.softmax(-1))
    assert (found["gradient"][2, :4000] == 0).all() and found["gradient"][4, 4099] == 0


def test_gradients_that_cancel_except_at_the_label(backend):
    """logprobs + lse is the label's own logit over the temperature."""
    logits, labels = problem(3, 4200, torch.float32)
    found = run(ours, logits, labels, dict.fromkeys(("logprobs", "lse"), torch.ones(3)),
                temperature=0.5)  # fmt: skip
    expected = torch.zeros(3, 4200).scatter(1, labels[:, None], 2.0)
    rounding = 1e-7 if backend == "reference" else 1e-37
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_first_of_the_most_likely_tokens(backend, dtype, softcap):
    """Of equal logits the lowest id, wherever the kernels cut a row; a cap hides no difference."""
    vocab = 3 * 8192 + 5
    logits = torch.full((7, vocab), -3.0, dtype=dtype)
    for row, columns in enumerate(([0, vocab - 1], [4095, 4096], [8191, 8192, 9000], [vocab - 1],
                                   [2047, 2048], [17, 20000])):  # fmt: skip
        logits[row, columns] = 40.0
    logits[5, 20000], logits[5, 23000] = 41.0, 41.0
    logits[6, 100], logits[6, 3000] = -0.0, 0.0
    labels = torch.zeros(7, dtype=torch.int64)
    found = rk.token_logprobs(logits, labels, argmax=True, softcap=softcap).argmax
    assert found.tolist() == [0, 4095, 8191, vocab - 1, 2047, 20000, 100]
    nan = logits.clone()
    nan[:, [5000, 9000]] = math.nan
    assert (rk.token_logprobs(nan, labels, argmax=True).argmax == 5000).all()
    nan[:, :] = -math.inf
    nan[:, vocab - 2] = math.nan
    assert (rk.token_logprobs(nan, labels, argmax=True).argmax == vocab - 2).all()


def test_the_squares_of_a_row_that_is_nearly_certain(backend):
    """p - sum p^2 is small there, and so is the gradient."""
    logits = torch.zeros(3, 5000)
    logits[0, 17], logits[1, 4999], logits[2, :2] = 20.0, 100.0, 60.0
    labels = torch.tensor([17, 3, 0])
    check(logits, labels, {"collision": torch.ones(3)})
    check(logits, labels)


def test_inplace_backward():
    logits, labels = problem(6, 500, torch.bfloat16)
    upstream = weights(6)
    expected = run(ours, logits, labels, upstream)

    def inplace(leaf, labels):
        return ours(leaf * 1, labels, inplace_backward=True)

    for name, a in run(inplace, logits, labels, upstream).items():
        assert_bitwise_equal(a, expected[name])


def test_a_support_is_refused():
    logits, labels = problem(2, 9, torch.float32)
    support = (torch.tensor([0, 1, 2]), torch.tensor([3, 4]))
    for name in ("lse", "collision", "argmax"):
        for form in (rk.token_logprobs, lambda x, *a, **k: rk.linear_token_logprobs(x, x, *a, **k)):
            with pytest.raises(ValueError, match="support gives log-probabilities and entropies"):
                form(logits, labels, support=support, **{name: True})
    for name in EVERY:
        with pytest.raises(TypeError, match=f"{name} must be a bool"):
            rk.token_logprobs(logits, labels, **{name: 1})


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 6])
    for options in OPTIONS:

        def every(x, o=options):
            found = reference.token_logprobs(x, labels, **EVERY, **o)
            return found[:4]

        torch.autograd.gradcheck(every, logits)
        torch.autograd.gradgradcheck(every, logits)


# ---- From hidden states -------------------------------------------------------------------------


def head(seed=0, dtype=torch.float32):
    """(hidden, weight, bias), labels: products of few bits are exact in any order and dtype."""
    g = generator(seed)
    hidden, weight, bias = (torch.randint(-4, 5, shape, generator=g).to(dtype) / 4
                            for shape in ((21, 8), (259, 8), (259,)))  # fmt: skip
    labels = torch.randint(0, 259, (21,), generator=g)
    labels[[3, 4, 20]] = -100
    return (hidden, weight, bias), labels


def of_head(operands, labels, upstream, **options):
    """The fields and the gradients of the operands."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    found = rk.linear_token_logprobs(*leaves[:2], labels, bias=leaves[2], **EVERY, **options)
    fields = {name: getattr(found, name) for name in (*FIELDS, "argmax")}
    total = sum((fields[k] * u).sum() for k, u in upstream.items())
    return fields, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"chunk_tokens": 4, "temperature": 0.7}, {"kept_tokens": 18, "softcap": 3.0}],
    ids=str,
)  # fmt: skip
def test_a_head_matches_fp64(backend, options, dtype):
    operands, labels = head(dtype=dtype)
    upstream = weights(21)
    # A token whose upstream gradients are all zero, and one with that of the log-sum-exp alone.
    for name, u in upstream.items():
        u[7] = 0
        u[8] *= name == "lse"
    fields, gradients = of_head(operands, labels, upstream, **options)
    hidden, weight, bias = leaves = [t.double().requires_grad_() for t in operands]
    kept = labels >= 0
    exact = plain(
        (hidden @ weight.T + bias)[kept], labels[kept],
        **{k: v for k, v in options.items() if k in ("temperature", "softcap")},
    )  # fmt: skip
    for name in FIELDS:
        assert (fields[name][~kept] == 0).all()
        torch.testing.assert_close(fields[name][kept].double(), exact[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(fields["argmax"][kept], exact["argmax"])
    assert (fields["argmax"][~kept] == -1).all()
    total = sum((exact[k] * upstream[k][kept].double()).sum() for k in upstream)
    tolerance = 2e-5 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    for a, e in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        unit = float(e.abs().max())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * unit)


def test_a_bound_of_kept_tokens_that_is_too_small(monkeypatch):
    """NaN on a GPU, whatever lies in the memory of the statistics."""
    from rlhf_kernels.core import data_checks

    operands, labels = head()
    monkeypatch.setattr(data_checks, "can_read_on_host", lambda _: False)
    with rk.use_backend("cpu"):
        fields, _ = of_head(operands, labels, weights(21), kept_tokens=9)
    assert all(fields[name][labels >= 0].isnan().any() for name in FIELDS)
    for name in FIELDS:
        assert_bitwise_equal(fields[name].isnan(), fields["logprobs"].isnan())
        assert (fields[name][labels < 0] == 0).all()
