"""kl_divergence with a mixture, options of each model, and the policy's entropy."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_within_budget,
    generator,
    to_float64,
)

OPTIONS = (
    {},
    {"temperature": 0.8, "ref_temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 4.0, "ref_softcap": None, "temperature": 1.5},
    {"ref_softcap": 6.0, "ref_temperature": 0.7},
)
KINDS = (("reverse", None), ("forward", None), ("jsd", None), ("jsd", 0.1), ("jsd", 0.9))
JSD = {"direction": "jsd"}


def pair(rows, vocab, dtype=torch.float32, *, spread=3.0, distance=1.0, seed=0):
    g = generator(seed)
    logits = torch.randn(rows, vocab, generator=g) * spread
    ref = logits + distance * torch.randn(rows, vocab, generator=g)
    return logits.to(dtype), ref.to(dtype)


def transformed(logits, ref, given):
    """Both models' logits after their options."""
    t, cap = given.get("temperature", 1.0), given.get("softcap")
    of_ref = given.get("ref_temperature", t), given.get("ref_softcap", cap)

    def one(x, t, cap):
        x = x if x.dtype == torch.float64 else x.float()
        return (x if cap is None else cap * torch.tanh(x / cap)) / t

    return one(logits, t, cap), one(ref, *of_ref)


def plain(logits, ref, direction="reverse", beta=None, **given):
    """Divergence and entropy from their formulas in torch, by its autograd."""
    logp, logq = (z.log_softmax(-1) for z in transformed(logits, ref, given))

    def kl(a, b):
        return (a.exp() * torch.where(a > -math.inf, a - b, 0)).sum(-1)

    entropy = -(logp.exp() * torch.where(logp > -math.inf, logp, 0)).sum(-1)
    if direction == "jsd":
        beta = 0.5 if beta is None else beta
        logm = torch.logaddexp(logp + math.log(1 - beta), logq + math.log(beta))
        return beta * kl(logq, logm) + (1 - beta) * kl(logp, logm), entropy
    return (kl(logp, logq) if direction == "reverse" else kl(logq, logp)), entropy


def run(function, logits, ref, upstream, **options):
    leaf = logits.detach().clone().requires_grad_()
    kl, entropy = function(leaf, ref, **options)
    (gradient,) = torch.autograd.grad(kl, leaf, upstream.to(kl.dtype))
    return kl.detach(), entropy.detach(), gradient


def ours(logits, ref, **options):
    found = rk.kl_divergence(logits, ref, entropy=True, **options)
    assert not found.entropy.requires_grad
    return found


def check(logits, ref, **options):
    upstream = torch.randn(logits.shape[:-1])
    actual = run(ours, logits, ref, upstream, **options)
    working = run(plain, logits, ref, upstream, **options)
    exact = run(plain, to_float64(logits), to_float64(ref), upstream, **options)
    z, w = transformed(logits.double(), ref.double(), options)
    logp, logq = z.log_softmax(-1), w.log_softmax(-1)
    top = torch.maximum(z.abs().amax(-1), w.abs().amax(-1))
    # The terms of the sums: differences of logits of this size.
    size = top + math.log(max(2, z.shape[-1]))
    assert_within_budget(actual[0], exact[0], working[0], scale=size)
    assert_within_budget(actual[1], exact[1], working[1], scale=size)
    # A difference of exponents, each with its own rounding, relative times what it multiplies.
    mass = torch.maximum(logp.exp(), logq.exp())
    t = options.get("temperature", 1.0)
    amplitude = 1 + logp.abs() + logq.abs() + size.unsqueeze(-1)
    scale = mass * upstream.double().abs().unsqueeze(-1) / t * amplitude
    scale = scale * (1 + (logp - logq).abs() + exact[0].unsqueeze(-1))
    assert_within_budget(actual[2], exact[2], working[2], scale=scale)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_matches_fp64(backend, direction, beta, dtype):
    # Of several tiles with one set of options.
    for vocab, options in ((1, {}), *((33, o) for o in OPTIONS), (4117, OPTIONS[3])):
        kl, *_ = check(*pair(3, vocab, dtype), direction=direction, beta=beta, **options)
        assert vocab == 1 or kl.min() > 1e-4


def test_against_a_scalar_loop(backend):
    logits, ref = pair(3, 9)
    for beta in (0.2, 0.5):
        found = ours(logits, ref, direction="jsd", beta=beta, softcap=3.0, ref_softcap=None,
                     temperature=1.5, ref_temperature=0.9)  # fmt: skip
        for i in range(3):
            x = [3.0 * math.tanh(v / 3.0) / 1.5 for v in logits[i].double().tolist()]
            y = [v / 0.9 for v in ref[i].double().tolist()]
            zx, zy = sum(map(math.exp, x)), sum(map(math.exp, y))
            p, q = [math.exp(v) / zx for v in x], [math.exp(v) / zy for v in y]
            m = [(1 - beta) * a + beta * b for a, b in zip(p, q, strict=True)]
            of_q = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
            of_p = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
            assert found.kl[i].item() == pytest.approx(beta * of_q + (1 - beta) * of_p, rel=3e-6)
            entropy = -sum(a * math.log(a) for a in p)
            assert found.entropy[i].item() == pytest.approx(entropy, rel=3e-6)


def test_the_policys_share_keeps_its_digits(backend):
    """The gradient has the factor 1 - beta, of which a difference in fp32 has few digits."""
    logits, ref = pair(3, 300)
    options = {"direction": "jsd", "beta": 1 - 1e-6}
    *_, found = run(ours, logits, ref, torch.ones(3), **options)
    *_, exact = run(plain, logits.double(), ref.double(), torch.ones(3), **options)
    assert (found - exact).abs().max() < 2e-6 * exact.abs().max()


def test_ends_of_beta_are_the_other_directions(backend):
    logits, ref = pair(4, 700)
    for beta, direction in ((0, "forward"), (1, "reverse")):
        upstream = torch.ones(4)
        a = run(ours, logits, ref, upstream, direction="jsd", beta=beta)
        b = run(ours, logits, ref, upstream, direction=direction)
        for x, y in zip(a, b, strict=True):
            assert_bitwise_equal(x, y)


def test_options_that_change_nothing_keep_the_bits(backend):
    logits, ref = pair(2, 5001)
    for direction in ("reverse", "forward"):
        expected = rk.kl_divergence(logits, ref, direction=direction, temperature=0.8)
        same = {"ref_temperature": 0.8, "ref_softcap": None, "softcap": None}
        kl = rk.kl_divergence(logits, ref, direction=direction, temperature=0.8, **same)
        assert_bitwise_equal(kl, expected)


def test_equal_rows(backend):
    logits, _ = pair(3, 4500)
    for options in (JSD, {"direction": "jsd", "beta": 0.9, "softcap": 4.0}):
        kl, _, gradient = run(ours, logits, logits.clone(), torch.ones(3), **options)
        assert (kl == 0).all()
        assert gradient.abs().max() < 1e-7


def test_small_divergence_is_accurate_and_not_negative(backend):
    logits, ref = pair(8, 3001, distance=1e-2)
    kl, *_ = check(logits, ref, **JSD)
    exact, _ = plain(logits.double(), ref.double(), **JSD)
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), exact, rtol=2e-2, atol=2e-7)


def test_far_models_stay_finite(backend):
    """Probabilities that underflow, tokens without mass in one model or both."""
    logits, ref = pair(4, 9000, spread=60.0, distance=90.0)
    check(logits, ref, **JSD)
    hidden, hidden_ref = logits.clone(), ref.clone()
    hidden[0, :4500], hidden_ref[1, 4200:] = -math.inf, -math.inf
    # Disjoint models: the entropy of the choice between them.
    hidden[2, :4500], hidden_ref[2, 4500:] = -math.inf, -math.inf
    for beta in (0.1, 0.25):
        kl, entropy, gradient = check(hidden, hidden_ref, direction="jsd", beta=beta)
        assert kl.isfinite().all() and entropy.isfinite().all() and gradient.isfinite().all()
        assert (gradient[0, :4500] == 0).all()
    choice = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert kl[2].item() == pytest.approx(choice, rel=1e-5)


def test_vocabulary_without_mass_in_both_models(backend):
    logits, ref = pair(2, 9000)
    short = run(ours, logits[:, 4500:], ref[:, 4500:], torch.ones(2), **JSD)
    logits[:, :4500], ref[:, :4500] = -math.inf, -math.inf
    kl, entropy, gradient = run(ours, logits, ref, torch.ones(2), **JSD)
    torch.testing.assert_close(kl, short[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, short[1], rtol=1e-5, atol=1e-6)
    assert (gradient[:, :4500] == 0).all()
    torch.testing.assert_close(gradient[:, 4500:], short[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("direction", "beta"), KINDS[:3])
def test_bad_rows_alone_are_poisoned(backend, direction, beta):
    logits, ref = pair(6, 700)
    options = {"direction": direction, "beta": beta, "ref_temperature": 1.2}
    clean = run(ours, logits, ref, torch.ones(6), **options)
    dirty, bad_ref = logits.clone(), ref.clone()
    dirty[1, 3], dirty[3], bad_ref[4, 699] = math.nan, -math.inf, math.inf
    upstream = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    kl, entropy, gradient = run(ours, dirty, bad_ref, upstream, **options)
    assert kl[[1, 3, 4]].isnan().all() and entropy[[1, 3]].isnan().all()
    # Without an upstream gradient there is none.
    assert (gradient[1] == 0).all() and gradient[4].isnan().any()
    for x, y in zip((kl, entropy, gradient), clean, strict=True):
        assert_bitwise_equal(x[[0, 2, 5]], y[[0, 2, 5]])
    capped = {**options, "softcap": 5.0}
    kl, entropy, gradient = run(ours, dirty, ref, upstream, **capped)
    assert kl[1].isnan() and entropy[1].isnan() and (gradient[1] == 0).all()
    # A cap makes -inf a number.
    assert kl[3].isfinite() and entropy[3].item() == pytest.approx(math.log(700), rel=1e-5)


def test_masked_tokens_give_zeros_whatever_they_hold(backend):
    logits, ref = pair(6, 90)
    mask = torch.tensor([True, False, True, False, True, True])
    dirty = torch.where(mask.unsqueeze(-1), logits, math.nan).requires_grad_()
    found = rk.kl_divergence(dirty, ref, mask, direction="jsd", softcap=5.0, entropy=True)
    clean = rk.kl_divergence(logits, ref, direction="jsd", softcap=5.0, entropy=True)
    (gradient,) = torch.autograd.grad(found.kl.sum(), dirty)
    for x, y in zip(found, clean, strict=True):
        assert (x[~mask] == 0).all()
        assert_bitwise_equal(x[mask].detach(), y[mask])
    assert (gradient[~mask] == 0).all() and gradient[mask].abs().amax(-1).min() > 0


def test_layouts_and_rows(backend):
    store, other = torch.randn(3, 9, 500), torch.randn(3, 9, 500)
    a, b = store[:, 1:, :441], other[:, :-1, 3:444]
    options = {"direction": "jsd", "softcap": 3.0, "ref_temperature": 0.8}
    expected = run(ours, a.contiguous(), b.contiguous(), torch.ones(3, 8), **options)
    leaf = a.detach().requires_grad_()
    found = rk.kl_divergence(leaf, b, entropy=True, **options)
    (gradient,) = torch.autograd.grad(found.kl, leaf, torch.ones(3, 1).expand(3, 8))
    for x, y in zip((*found, gradient), expected, strict=True):
        assert_bitwise_equal(x.detach(), y)
    if backend == "reference":
        return
    for i in range(3):
        one = run(ours, a[i, 2:3].clone(), b[i, 2:3].clone(), torch.ones(1), **options)
        for x, y in zip(one, expected, strict=True):
            assert_bitwise_equal(x, y[i, 2:3])


def test_bad_options(backend):
    logits, ref = pair(3, 20)
    for options, message in (
        ({"beta": 0.5}, 'beta is an option of direction="jsd"'),
        ({"direction": "jsd", "beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"direction": "jsd", "beta": math.nan}, "beta must be finite"),
        ({"softcap": 0}, "softcap must be a finite number > 0"),
        ({"ref_softcap": -1.0}, "ref_softcap must be a finite number > 0"),
        ({"ref_temperature": 2.0**61}, "ref_temperature must lie between"),
        ({"ref_temperature": "own"}, "ref_temperature must be one of"),
        ({"temperature": 2.0**-40, "ref_temperature": 2.0**40}, "within a factor of 2\\^60"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.kl_divergence(logits, ref, **options)
    with pytest.raises(TypeError, match="entropy"):
        rk.kl_divergence(logits, ref, entropy=1.5)
    empty = rk.kl_divergence(logits[:0], ref[:0], entropy=True, **JSD)
    assert empty.kl.shape == empty.entropy.shape == (0,)


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 6, dtype=torch.float64)
    options = {"softcap": 3.0, "ref_temperature": 0.8}
    with rk.use_backend("reference"):
        for direction, beta in KINDS:
            torch.autograd.gradcheck(
                lambda x, d=direction, b=beta: rk.kl_divergence(
                    x, ref, direction=d, beta=b, **options
                ),
                logits,
            )


def test_compiles_without_graph_break_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, ref):
        found = rk.kl_divergence(logits * 1, ref, direction="jsd", softcap=9.0, entropy=True)
        return (found.kl + found.entropy).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows, vocab in ((5, 11), (9, 33), (17, 65), (3, 4111)):
        logits, ref = pair(rows, vocab)
        logits.requires_grad_()
        (actual,) = torch.autograd.grad(compiled(logits, ref), logits)
        (expected,) = torch.autograd.grad(step(logits, ref), logits)
        assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 2
