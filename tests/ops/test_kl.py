"""kl_divergence and kl_penalty on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.core.pair_options import PairOptions
from rlhf_kernels.testing import (
    DTYPES,
    RAGGED_SIZES,
    assert_bitwise_equal,
    assert_within_budget,
    generator,
    to_float64,
)

DIRECTIONS = ("reverse", "forward")
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")


def pair(rows, vocab, dtype, *, spread=3.0, distance=1.0, seed=0):
    g = generator(seed)
    logits = torch.randn(rows, vocab, generator=g) * spread
    ref = logits + distance * torch.randn(rows, vocab, generator=g)
    return logits.to(dtype).requires_grad_(), ref.to(dtype)


def run(function, logits, ref, upstream, **options):
    kl = function(logits, ref, **options)
    (gradient,) = torch.autograd.grad(kl, logits, upstream.to(kl.dtype))
    return kl, gradient


def check_divergence(logits, ref, **options):
    upstream = torch.randn(logits.shape[:-1])
    actual = run(rk.kl_divergence, logits, ref, upstream, **options)
    plain = run(reference.kl_divergence, logits, ref, upstream, **options)
    oracle = run(reference.kl_divergence, to_float64(logits), to_float64(ref), upstream, **options)
    z, r = logits.detach().double(), ref.double()
    # The sum's terms: weights times differences of log-probabilities, each of the size of log V.
    size = (z - r).abs().amax(-1) / options.get("temperature", 1.0) + 1.0
    assert_within_budget(actual[0], oracle[0], plain[0], scale=size)
    # dz_j = p_j (log p_j - log q_j - KL): a difference of exponents, each with its own rounding.
    t = options.get("temperature", 1.0)
    logp, logq = torch.log_softmax(z / t, -1), torch.log_softmax(r / t, -1)
    mass = torch.maximum(logp.exp(), logq.exp())
    amplitude = 1 + logp.abs() + logq.abs() + oracle[0].detach().unsqueeze(-1)
    scale = mass * upstream.double().abs().unsqueeze(-1) / t * amplitude
    if options.get("direction", "reverse") == "reverse":
        # The exponent's rounding, relative, times what it multiplies.
        scale = scale * (1 + (logp - logq).abs() + oracle[0].detach().unsqueeze(-1))
    assert_within_budget(actual[1], oracle[1], plain[1], scale=scale)
    return actual, oracle


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", RAGGED_SIZES)
def test_divergence_matches_fp64(backend, vocab, dtype, direction):
    logits, ref = pair(4, vocab, dtype)
    _, oracle = check_divergence(logits, ref, direction=direction, temperature=0.8)
    assert vocab == 1 or oracle[0].min() > 1e-4


def test_divergence_against_a_scalar_loop(backend):
    logits, ref = pair(3, 9, torch.float32)
    for direction in DIRECTIONS:
        kl = rk.kl_divergence(logits, ref, direction=direction, temperature=1.5)
        for i in range(3):
            x = [v / 1.5 for v in logits.detach()[i].double().tolist()]
            y = [v / 1.5 for v in ref[i].double().tolist()]
            zx, zy = sum(map(math.exp, x)), sum(map(math.exp, y))
            p, q = [math.exp(v) / zx for v in x], [math.exp(v) / zy for v in y]
            if direction == "forward":
                p, q = q, p
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert kl[i].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_of_equal_rows_is_zero(backend, direction):
    logits, _ = pair(5, 4500, torch.float32)
    ref = logits.detach().clone()
    kl, gradient = run(rk.kl_divergence, logits, ref, torch.ones(5), direction=direction)
    assert (kl == 0).all()
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_small_divergence_is_accurate_and_not_negative(backend, direction):
    logits, ref = pair(64, 3001, torch.float32, distance=1e-2)
    actual, oracle = check_divergence(logits, ref, direction=direction)
    assert (actual[0] >= 0).all()
    torch.testing.assert_close(actual[0].double(), oracle[0], rtol=2e-2, atol=5e-7)


def test_peaks_in_different_blocks(backend):
    logits, ref = pair(6, 9001, torch.float32, spread=0.3)
    with torch.no_grad():
        logits[:, 0], logits[:, 5000], logits[:, 9000] = 9.0, 30.0, 35.0
        ref[:, 2100], ref[:, 7000] = 12.0, 33.0
    for direction in DIRECTIONS:
        check_divergence(logits, ref, direction=direction)


def test_divergence_with_masked_vocabulary(backend):
    logits, ref = pair(4, 9000, torch.float32)
    with torch.no_grad():
        logits[:, :4500] = -math.inf
    both = ref.clone()
    both[:, :4500] = -math.inf
    for direction in DIRECTIONS:
        actual, gradient = run(rk.kl_divergence, logits, both, torch.ones(4), direction=direction)
        short = logits.detach()[:, 4500:].clone().requires_grad_()
        expected = run(
            reference.kl_divergence, short, ref[:, 4500:], torch.ones(4), direction=direction
        )
        torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-6)
        assert (gradient[:, :4500] == 0).all()
        torch.testing.assert_close(gradient[:, 4500:], expected[1], rtol=1e-4, atol=1e-6)
    # Mass where the other has none: infinite one way, finite the other.
    assert rk.kl_divergence(logits, ref, direction="reverse").isfinite().all()
    assert (rk.kl_divergence(logits, ref, direction="forward") == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_vocabulary_masked_with_the_lowest_float(backend, dtype):
    logits, ref = pair(2, 9000, dtype)
    lowest = torch.finfo(dtype).min
    hidden = torch.zeros(2, 9000, dtype=torch.bool)
    hidden[0, :4500], hidden[1, 4300:] = True, True
    for direction in DIRECTIONS:
        results = []
        for fill in (lowest, -math.inf):
            x, y = logits.detach().masked_fill(hidden, fill), ref.masked_fill(hidden, fill)
            options = {"direction": direction, "temperature": 0.5}
            results.append(run(rk.kl_divergence, x.requires_grad_(), y, torch.ones(2), **options))
        for a, e in zip(*results, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


def test_divergence_where_the_weight_underflows(backend):
    # No mass of P, none of Q: nothing, not 0 * inf; whichever tile the maximum is in.
    logits, ref = pair(2, 9000, torch.float32)
    with torch.no_grad():
        logits[0, :4500], logits[1, 4200:] = -1e4, -1e4
    for direction, weighing in (("reverse", 0), ("forward", 1)):
        x, y = logits.detach().clone(), ref.clone()
        p, q = ((x, y), (y, x))[weighing]
        p[logits.detach() == -1e4] = -1e4
        q[logits.detach() == -1e4] = -math.inf
        check_divergence(x.requires_grad_(), y, direction=direction)
        assert rk.kl_divergence(x, y, direction=direction).isfinite().all()


def test_divergence_poisons_bad_rows_only(backend):
    logits, ref = pair(5, 700, torch.float32)
    clean = rk.kl_divergence(logits, ref).detach()
    dirty = logits.detach().clone()
    dirty[1, 3], dirty[3] = math.nan, -math.inf
    bad_ref = ref.clone()
    bad_ref[4, 699] = math.inf
    kl = rk.kl_divergence(dirty, bad_ref)
    assert kl[[1, 3, 4]].isnan().all()
    assert_bitwise_equal(kl[[0, 2]], clean[[0, 2]])


def test_divergence_layouts_and_rows(backend):
    store, other = torch.randn(3, 9, 500), torch.randn(3, 9, 500)
    a, b = store[:, 1:, :441], other[:, :-1, 3:444]
    expected = run(
        rk.kl_divergence, a.contiguous().requires_grad_(), b.contiguous(), torch.ones(3, 8)
    )
    views = run(rk.kl_divergence, a.detach().requires_grad_(), b, torch.ones(3, 1).expand(3, 8))
    for x, y in zip(views, expected, strict=True):
        assert_bitwise_equal(x, y)
    if backend == "reference":
        return
    for i in range(3):
        one = run(
            rk.kl_divergence, a[i, 2:3].clone().requires_grad_(), b[i, 2:3].clone(), torch.ones(1)
        )
        assert_bitwise_equal(one[0], expected[0][i, 2:3])
        assert_bitwise_equal(one[1], expected[1][i, 2:3])


def test_divergence_bad_arguments(backend):
    logits, ref = pair(3, 20, torch.float32)
    with pytest.raises(ValueError, match="direction must be one of"):
        rk.kl_divergence(logits, ref, direction="sideways")
    with pytest.raises(TypeError, match="dtype"):
        rk.kl_divergence(logits, ref.bfloat16())
    with pytest.raises(ValueError, match="shape"):
        rk.kl_divergence(logits, ref[:, :19])
    with pytest.raises(ValueError, match="temperature"):
        rk.kl_divergence(logits, ref, temperature=0)
    empty = rk.kl_divergence(logits[:0], ref[:0])
    assert empty.shape == (0,)
    empty.sum().backward()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(backend, estimator, dtype):
    g = generator(1)
    logprobs = -torch.rand(7, 33, generator=g) * 4
    ref = logprobs + torch.randn(7, 33, generator=g) * 0.3
    logprobs, ref = logprobs.to(dtype).requires_grad_(), ref.to(dtype)
    upstream = torch.randn(7, 33)
    actual = run(rk.kl_penalty, logprobs, ref, upstream, estimator=estimator)
    plain = run(reference.kl_penalty, logprobs, ref, upstream, estimator=estimator)
    x = logprobs.detach().double() - ref.double()
    formula = {
        "k1": (x, torch.ones_like(x)),
        "k2": (x**2 / 2, x),
        "k3": (torch.expm1(-x) + x, -torch.expm1(-x)),
        "abs": (x.abs(), x.sign()),
    }
    value, slope = formula[estimator.removesuffix("+")]
    if estimator.endswith("+"):
        slope = x
    assert_within_budget(actual[0], value, plain[0], scale=x.abs())
    assert_within_budget(
        actual[1], slope * upstream.double(), plain[1], scale=(upstream * (1 + x.abs())).abs()
    )
    assert value.abs().mean() > 1e-3


def test_penalty_is_zero_on_equal_inputs_and_saturates_without_nan(backend):
    x = torch.tensor([-3.0, 0.0, -1e3, -2.0], requires_grad=True)
    ref = torch.tensor([-3.0, 0.0, -1.0, -1e3])
    for estimator in ESTIMATORS:
        kl, gradient = run(rk.kl_penalty, x, ref, torch.ones(4), estimator=estimator)
        assert (kl[:2] == 0).all()
        assert not kl.isnan().any() and not gradient.isnan().any()


def _layouts(values):
    """The same values [B, T]: contiguous, cut out, two elements apart, column by column."""
    cut = torch.cat([torch.cat([values] * 2, 1)] * 2)[: len(values), : values.shape[1]]
    return (values, cut, torch.stack([values] * 2, -1)[..., 0], values.t().contiguous().t())


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float16")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (2, 1024), (7, 300)])
def test_penalty_has_the_same_bits_in_every_layout(backend, shape, dtypes):
    """Evenly spaced tokens have kernels of their own, and so have tiles that are full."""
    logprobs, ref = (torch.randn(shape).to(getattr(torch, name)) for name in dtypes)
    found = [
        run(rk.kl_penalty, x.detach().requires_grad_(), r, g, estimator="k3")
        for x, r, g in zip(*map(_layouts, (logprobs, ref, torch.randn(shape))), strict=True)
    ]
    found += [
        run(rk.kl_penalty, logprobs.detach().requires_grad_(), r, torch.ones(()).expand(shape),
            estimator="k3")
        for r in _layouts(ref)
    ]  # fmt: skip
    for value, _ in found[1:]:
        assert_bitwise_equal(value, found[0][0])
    for _, gradient in found[1:4]:
        assert_bitwise_equal(gradient, found[0][1])
    for _, gradient in found[5:]:
        assert_bitwise_equal(gradient, found[4][1])


def test_penalty_layouts(backend):
    store = torch.randn(5, 2 * 21)
    views = (store[:, ::2], store[:, 1::2])
    for upstream in (torch.randn(5, 21), torch.ones(()).expand(5, 21), torch.randn(21, 5).t()):
        expected = run(
            rk.kl_penalty, views[0].contiguous().requires_grad_(), views[1].contiguous(),
            upstream.contiguous(), estimator="k3",
        )  # fmt: skip
        actual = run(
            rk.kl_penalty, views[0].detach().requires_grad_(), views[1], upstream, estimator="k3"
        )
        assert_bitwise_equal(actual[0], expected[0])
        assert_bitwise_equal(actual[1], expected[1])
    with pytest.raises(ValueError, match="estimator must be one of"):
        rk.kl_penalty(store, store, estimator="k4")


def test_gradcheck_of_the_references():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 6, dtype=torch.float64)
    for direction in DIRECTIONS:
        torch.autograd.gradcheck(
            lambda x, d=direction: reference.kl_divergence(x, ref, direction=d), logits
        )
    for estimator in ("k1", "k2", "k3", "abs"):
        torch.autograd.gradcheck(
            lambda x, e=estimator: reference.kl_penalty(x, ref, estimator=e), logits
        )


def test_opcheck():
    logits, ref = torch.randn(4, 3, 21), torch.randn(4, 3, 21)
    ops = torch.ops.rlhf_kernels
    plain = PairOptions(0.9)
    capped = PairOptions(0.9, True, 0.3, 5.0, 3.0, 1.2, True)
    for options in (plain, plain._replace(reverse=False), capped):
        torch.library.opcheck(ops.kl_divergence.default, (logits, ref, *options, "cpu"))
        stats = ops.kl_divergence(logits, ref, *options, "cpu")[1]
        args = (logits, ref, stats, torch.randn(4, 3), *options, "cpu")
        torch.library.opcheck(ops.kl_divergence_backward.default, args)
    x, y = torch.randn(4, 9), torch.randn(9, 4).t()
    torch.library.opcheck(ops.kl_penalty.default, (x, y, "k3", "cpu"))
    torch.library.opcheck(ops.kl_penalty_backward.default, (x, y, torch.randn(4, 9), "k3+", "cpu"))


def test_compiles_without_graph_break_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, ref):
        kl = rk.kl_divergence(logits * 1, ref, temperature=0.9)
        return (kl + rk.kl_penalty(kl, kl * 0.5, estimator="k3")).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows, vocab in ((5, 11), (9, 33), (17, 65), (40, 700), (3, 4111)):
        logits, ref = pair(rows, vocab, torch.float32)
        (actual,) = torch.autograd.grad(compiled(logits, ref), logits)
        (expected,) = torch.autograd.grad(step(logits, ref), logits)
        assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 2


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    distance=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    direction=st.sampled_from(DIRECTIONS),
    seed=st.integers(0, 2**31),
)
def test_fuzz(rows, vocab, dtype, spread, distance, direction, seed):
    logits, ref = pair(rows, vocab, dtype, spread=spread, distance=distance, seed=seed)
    with rk.use_backend("cpu"):
        check_divergence(logits, ref, direction=direction)
