"""value_loss on every backend."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.bits import BAD_BATCHES, VIEWS, check_compiled, check_threads, same

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config.enums import AGGREGATIONS
from rlhf_kernels.config.metrics import VALUE_METRICS
from rlhf_kernels.core import env
from rlhf_kernels.core.sequences import token_weights
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_within_budget,
    generator,
    random_mask,
    to_float64,
)


def make_inputs(rows=5, cols=37, dtype=torch.float32, *, seed=0, keep=0.7, offset=0.0):
    g = generator(seed)
    values, old, returns = (torch.randn(3, rows, cols, generator=g) + offset).to(dtype)
    return values.requires_grad_(), old, returns, random_mask(rows, cols, keep=keep)


def run(function, args, **options):
    loss, metrics = function(*args[:3], mask=args[3], **options)
    (gradient,) = torch.autograd.grad(loss, args[0])
    return loss.detach(), metrics if isinstance(metrics, torch.Tensor) else metrics.tensor, gradient


def check(args, **options):
    actual = run(rk.value_loss, args, **options)
    plain = run(reference.value_loss, args, **options)
    oracle = run(reference.value_loss, to_float64(args), **options)
    assert_within_budget(actual[0], oracle[0], plain[0])
    # The mean values are sums of numbers of both signs.
    assert_within_budget(actual[1], oracle[1], plain[1], scale=1.0)
    assert_within_budget(actual[2], oracle[2], plain[2])
    return oracle


def divisor(aggregation):
    return 11.0 if aggregation == "constant" else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip_range", (None, 0.3))
def test_matches_fp64(backend, aggregation, clip_range, dtype):
    for cols in (1, 16, 37, 512, 1040):
        args = make_inputs(5, cols, dtype)
        options = {"aggregation": aggregation, "normalizer": divisor(aggregation)}
        loss, metrics, gradient = check(args, clip_range=clip_range, **options)
        assert loss > 0.1 and gradient.abs().max() > 1e-5
        if clip_range and cols > 1:
            assert metrics[VALUE_METRICS.index("clip_frac")] > 0.1
            assert gradient[args[3]].eq(0).any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip_range", (None, 0.3))
def test_against_a_scalar_loop(backend, aggregation, clip_range):
    args = make_inputs(4, 9)
    v, old, ret, mask = (t.tolist() for t in args)
    lengths = [sum(row) for row in mask]
    divisors = {
        "token-mean": sum(lengths),
        "constant": 11.0,
        "seq-mean-token-sum": sum(n > 0 for n in lengths),
        "seq-mean-token-mean": sum(n > 0 for n in lengths),
    }
    expected, clipped, kept = 0.0, 0, []
    slopes = torch.zeros(4, 9)
    for i, t in itertools.product(range(4), range(9)):
        if not mask[i][t]:
            continue
        weight = 1.0 / divisors[aggregation]
        if aggregation == "seq-mean-token-mean":
            weight /= lengths[i]
        error = v[i][t] - ret[i][t]
        term, slope = error * error, error
        if clip_range:
            inside = min(max(v[i][t], old[i][t] - clip_range), old[i][t] + clip_range)
            other = (inside - ret[i][t]) ** 2
            if other > term:
                term, slope = other, 0.0
                clipped += 1
        expected += 0.5 * weight * term
        slopes[i, t] = weight * slope
        kept.append((v[i][t], ret[i][t]))
    loss, metrics, gradient = run(
        rk.value_loss, args, clip_range=clip_range, aggregation=aggregation,
        normalizer=divisor(aggregation),
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slopes)
    named = dict(zip(VALUE_METRICS, metrics.tolist(), strict=True))
    n = len(kept)
    mean_v, mean_r = sum(a for a, _ in kept) / n, sum(b for _, b in kept) / n
    spread = sum((b - mean_r) ** 2 for _, b in kept)
    rest = sum((b - a - mean_r + mean_v) ** 2 for a, b in kept)
    assert named["loss"] == loss and named["tokens"] == n
    assert named["clip_frac"] == pytest.approx(clipped / n)
    assert named["value_mean"] == pytest.approx(mean_v, rel=1e-5)
    assert named["return_mean"] == pytest.approx(mean_r, rel=1e-5)
    assert named["explained_variance"] == pytest.approx(1 - rest / spread, rel=1e-5)


def test_gradcheck_of_the_reference():
    values, *rest = to_float64(make_inputs(3, 6))
    for clip_range, aggregation in itertools.product((None, 0.3), AGGREGATIONS[:3]):

        def loss(v, clip_range=clip_range, aggregation=aggregation):
            options = {"clip_range": clip_range, "aggregation": aggregation}
            return reference.value_loss(v, *rest, **options)[0]

        assert torch.autograd.gradcheck(loss, values)


def test_explained_variance_far_from_zero(backend):
    # Where E[x^2] - mean^2 would have no digits left.
    values, old, returns, mask = make_inputs(6, 700)
    far = [(t.detach() * 0.01 + 1000.0) for t in (values, old, returns)]
    far[0] = far[2] + 0.3 * (far[0] - far[2])
    metrics = rk.value_loss(*far, mask=mask).metrics
    wide = reference.value_loss(*(t.double() for t in far), mask)[1]
    assert metrics["explained_variance"].item() == pytest.approx(wide[4].item(), abs=1e-3)
    assert 0.5 < wide[4] < 0.95


@pytest.mark.parametrize("tokens", (1, 3, 197, 5000))
@pytest.mark.parametrize("same", (3.0, 0.1, 1000.1, -7.3e-3))
def test_equal_returns_are_not_explained(backend, tokens, same):
    # One reward at the end, undiscounted. Their mean rounds: they must not vary by that.
    values = torch.randn(2, 2, tokens, generator=generator(tokens))
    mask = random_mask(2, tokens, keep=0.9)
    mask[0] = True
    loss = rk.value_loss(*values, torch.full((2, tokens), same), mask)
    assert loss.metrics["explained_variance"] == 0


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_what_lies_under_the_mask_changes_nothing(backend, bad):
    args = make_inputs(4, 600)
    mask = args[3]
    clean = run(rk.value_loss, args, clip_range=0.3)
    spoiled = [torch.where(mask, t, bad).detach().requires_grad_(t.requires_grad) for t in args[:3]]
    dirty = run(rk.value_loss, (*spoiled, mask), clip_range=0.3)
    for a, b in zip(clean, dirty, strict=True):
        assert_bitwise_equal(b, a)
    assert dirty[2][~mask].eq(0).all()


def test_all_masked_empty_and_nan(backend):
    values, old, returns, mask = make_inputs(3, 20)
    loss, metrics, g = run(
        rk.value_loss, (values, old, returns, torch.zeros_like(mask)), clip_range=0.3
    )
    assert loss == 0 and metrics.eq(0).all() and g.eq(0).all()
    for shape in ((0, 4), (4, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        constant = empty.detach()
        loss, metrics = rk.value_loss(empty, constant, constant, mask=constant.bool())
        loss.backward()
        assert loss == 0 and metrics["tokens"] == 0 and empty.grad.shape == shape
    broken = values.detach().clone()
    broken[0, mask[0].nonzero()[0]] = math.nan
    loss, metrics = rk.value_loss(broken, old, returns, mask=mask, clip_range=0.3)
    assert loss.isnan() and metrics["explained_variance"].isnan()


def test_packed_equals_padded(backend):
    lengths = [700, 0, 1, 33, 512, 700]
    values, old, returns, mask = make_inputs(6, 700)
    inside = torch.arange(700) < torch.tensor(lengths).unsqueeze(-1)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    flat = [
        t.detach()[inside].requires_grad_(t.requires_grad) for t in (values, old, returns, mask)
    ]
    compare = same(backend)
    for aggregation in AGGREGATIONS:
        options = {"aggregation": aggregation, "normalizer": divisor(aggregation)}
        one = run(rk.value_loss, (values, old, returns, mask & inside), clip_range=0.3, **options)
        two = run(rk.value_loss, flat, clip_range=0.3, cu_seqlens=cu_seqlens, **options)
        torch.testing.assert_close(two[:2], one[:2], rtol=1e-5, atol=1e-6)
        compare(two[2], one[2][inside])


@pytest.mark.parametrize("aggregation", ("token-mean", "seq-mean-token-mean"))
def test_a_sequence_does_not_depend_on_its_surroundings(backend, aggregation):
    # A row spans several tiles of Triton's kernels and several pieces of the CPU's.
    rows, cols = 3, 2100
    args = make_inputs(rows, cols)
    args[3][-1] = args[3][0].flip(0)
    compare = same(backend)

    def all_results(change, **more):
        changed = [change(t.detach()).requires_grad_(t.requires_grad) for t in args]
        options = {"clip_range": 0.3, "aggregation": aggregation, "normalizer": 7.0}
        return run(rk.value_loss, changed, **options, **more)

    def gradient(change, **more):
        return all_results(change, **more)[2]

    whole = gradient(lambda t: t)
    assert whole.abs().amax(-1).gt(0).all()
    for a, e in zip(all_results(lambda t: t), all_results(lambda t: t), strict=True):
        assert_bitwise_equal(a, e)
    compare(gradient(lambda t: t.flip(0)), whole.flip(0))
    compare(gradient(lambda t: t[-1:]), whole[-1:])
    compare(gradient(lambda t: t[[0, 2, 1]])[1], whole[2])
    # Padding behind the end, masked.
    compare(gradient(lambda t: torch.nn.functional.pad(t, (0, 1031)))[:, :cols], whole)
    # Packed, without what lies behind its end and at odd places.
    lengths = torch.tensor([700, 0, cols])
    inside = torch.arange(cols) < lengths[:, None]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths.tolist())])
    packed = gradient(lambda t: t[inside], cu_seqlens=cu_seqlens)
    padded = gradient(lambda t: t & inside if t.dtype is torch.bool else t)
    compare(packed, padded[inside])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(backend, aggregation):
    args = make_inputs(9, 150)
    normalizer = {"token-mean": int(args[3].sum()), "constant": 1350}.get(
        aggregation, int(args[3].any(-1).sum())
    )
    options = {"clip_range": 0.3, "aggregation": aggregation}
    whole = run(rk.value_loss, args, normalizer=normalizer, **options)
    total = 0.0
    compare = same(backend)
    for rows, by in (
        (slice(0, 2), normalizer),
        (slice(2, 3), float(normalizer)),
        (slice(3, 9), torch.tensor(normalizer)),
    ):
        part = [t[rows].detach().requires_grad_(t.requires_grad) for t in args]
        loss, _, g = run(rk.value_loss, part, normalizer=by, **options)
        total += loss.item()
        compare(g, whole[2][rows])
    assert total == pytest.approx(whole[0].item(), rel=1e-5)


def test_views_integer_masks_and_upstream(backend):
    args = make_inputs(7, 65)
    expected = run(rk.value_loss, args, clip_range=0.3)
    compare = same(backend)
    for view in VIEWS:
        moved = [view(t.detach()).requires_grad_(t.requires_grad) for t in args]
        for a, b in zip(run(rk.value_loss, moved, clip_range=0.3), expected, strict=True):
            compare(a.contiguous(), b)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        actual = run(rk.value_loss, (*args[:3], 3 * args[3].to(dtype)), clip_range=0.3)
        assert_bitwise_equal(actual[2], expected[2])
    loss = rk.value_loss(*args[:3], mask=args[3], clip_range=0.3).loss
    for _ in range(2):
        upstream = torch.tensor([2.0]).expand(3)[1]
        (g,) = torch.autograd.grad(loss, args[0], upstream, retain_graph=True)
        assert_bitwise_equal(g, 2 * expected[2])
    fixed = rk.value_loss(args[0].detach(), *args[1:3], mask=args[3], clip_range=0.3)
    assert not fixed.loss.requires_grad
    assert_bitwise_equal(fixed.loss, expected[0])
    assert fixed.metrics.as_dict() == {n: t.item() for n, t in fixed.metrics.items()}


@pytest.mark.parametrize("shape", ((3, 20000), (70, 600)))
def test_threads_do_not_change_bits(shape):
    args = make_inputs(*shape)
    check_threads(lambda: run(rk.value_loss, args, clip_range=0.3))


@pytest.mark.parametrize("kernels", ("cpu", "triton"))
def test_opcheck(kernels):
    args = [t.detach() for t in make_inputs(3, 20)]
    op = torch.ops.rlhf_kernels.value_loss.default
    for grad in (True, False):
        torch.library.opcheck(op, (*args, None, None, 0.0, 0.3, 1, grad, kernels))


def test_bad_data_poisons_the_triton_backend(monkeypatch):
    values, *rest = [t.detach().reshape(-1) for t in make_inputs(3, 8)]
    for offsets, divided in BAD_BATCHES:
        args = (values.clone().requires_grad_(), *rest)
        options = {"cu_seqlens": torch.tensor(offsets), "normalizer": torch.tensor(divided)}
        with rk.use_backend("triton"):
            loss, metrics, g = run(rk.value_loss, args, clip_range=0.3, **options)
            assert loss.isnan() and metrics.isnan().all() and g.isnan().all(), (offsets, divided)
            with monkeypatch.context() as patch:
                patch.setattr(env, "CHECK", True)
                with pytest.raises(ValueError, match=r"cu_seqlens must|normalizer must"):
                    rk.value_loss(*args[:3], mask=args[3], clip_range=0.3, **options)


def test_compile_without_graph_breaks(backend):
    def step(values, old, returns, mask):
        loss, metrics = rk.value_loss(values, old, returns, mask=mask, clip_range=0.3)
        return 1.5 * loss, metrics["clip_frac"], metrics.tensor

    batches = (make_inputs(4, cols) for cols in (5, 16, 33, 100, 700))
    check_compiled(step, batches, lambda batch: batch[:1])


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 540),
    seed=st.integers(0, 2**20),
    keep=st.sampled_from((0.0, 0.3, 1.0)),
    dtype=st.sampled_from(DTYPES),
    aggregation=st.sampled_from(AGGREGATIONS),
    clip_range=st.sampled_from((None, 0.1, 2.0)),
    offset=st.sampled_from((0.0, 5.0)),
)
def test_fuzz(kernels, rows, cols, seed, keep, dtype, aggregation, clip_range, offset):
    args = make_inputs(rows, cols, dtype, seed=seed, keep=keep, offset=offset)
    options = {
        "clip_range": clip_range,
        "aggregation": aggregation,
        "normalizer": divisor(aggregation),
    }
    with rk.use_backend(kernels):
        actual = run(rk.value_loss, args, **options)
    expected = run(reference.value_loss, args, **options)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=2e-5, atol=2e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[2], expected[2], rtol=tolerance, atol=1e-9)


def test_weights_of_the_aggregations():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()

    def weights(aggregation, normalizer=None):
        w = token_weights(mask, aggregation, normalizer, torch.float64, None)
        return torch.where(mask, w, 0)[:, 0].tolist()

    assert weights("token-mean") == pytest.approx([1 / 3, 1 / 3, 0])
    assert weights("seq-mean-token-mean") == pytest.approx([1 / 4, 1 / 2, 0])
    assert weights("seq-mean-token-sum") == pytest.approx([1 / 2, 1 / 2, 0])
    assert weights("seq-mean-token-mean", 5.0) == pytest.approx([1 / 10, 1 / 5, 0])
    assert weights("constant", 4.0) == pytest.approx([1 / 4, 1 / 4, 0])


def test_bad_arguments_raise(backend, monkeypatch):
    # Where data would not be looked at: test_bad_data_poisons_the_triton_backend.
    monkeypatch.setattr(env, "CHECK", True)
    values, old, returns, mask = make_inputs(3, 8)
    for bad, error, message in (
        ((values, old[:, 1:], returns, mask), ValueError, "old_values must have the shape"),
        ((values, old, returns, mask * 0.5), TypeError, r"mask\.bool\(\)"),
        ((values.int(), old, returns, mask), TypeError, "values must be one of"),
        ((values[0], old[0], returns[0], mask[0]), ValueError, r"values must be \[B, T\]"),
    ):
        with pytest.raises(error, match=message):
            rk.value_loss(*bad[:3], mask=bad[3])
    for options, message in (
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_range": -1.0}, "clip_range"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"aggregation": "constant"}, "normalizer must be given"),
        ({"normalizer": 0}, "normalizer"),
        ({"normalizer": torch.tensor(-1.0)}, "normalizer"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.value_loss(values, old, returns, mask=mask, **options)
    flat = [t.detach().reshape(-1) for t in (values, old, returns, mask)]
    for offsets in ([0, 8, 20], [1, 24], [0, 16, 8, 24]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            rk.value_loss(*flat[:3], mask=flat[3], cu_seqlens=torch.tensor(offsets))
