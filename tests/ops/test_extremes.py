"""Values at the ends: temperatures, infinite and missing inputs. fp64 is the judge."""

import itertools
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.core import temperature_rules

INF, NAN = float("inf"), float("nan")
TEMPERATURES = [2.0**-60, 1e-10, 1e-4, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e10, 2.0**60]


def gradient(f, x, upstream=None):
    """(value, gradient in x) of f, both detached."""
    x = x.clone().requires_grad_()
    y = f(x)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    return y.detach(), x.grad


def judged(f, *tensors, **options):
    """What the reference gives in fp64."""
    with rk.use_backend("reference"):
        return gradient(
            lambda x: f(x, *(t.double() for t in tensors[1:]), **options), tensors[0].double()
        )


def close(got, want, scale, rtol=4e-6):
    """Each element within rtol of `scale`, the size of what it is made from."""
    error = (got.double() - want).abs()
    assert bool((error <= rtol * scale).all()), (error / scale).max()


# ---- Temperatures -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
def test_every_temperature_that_is_taken_is_right(backend, tensor):
    x, y = torch.randn(3, 37) * 5, torch.tensor([0, 5, 36])
    for t in TEMPERATURES:
        temperature = torch.full((3,), t) if tensor else t
        want = x.double() / t
        logp = torch.log_softmax(want, -1)
        p, entropy = logp.exp(), -(logp.exp() * torch.where(logp.exp() > 0, logp, 0)).sum(-1)
        own = torch.zeros_like(x, dtype=torch.float64).scatter(1, y[:, None], 1.0)
        for of_entropy in (False, True):
            value, slope = gradient(
                lambda z, h=of_entropy, s=temperature: rk.token_logprobs(
                    z, y, temperature=s, entropy=True
                )[int(h)],
                x,
            )
            if of_entropy:
                want_value, size = entropy, 1 + entropy
                distance = (x.double() - x.double().amax(-1, keepdim=True)) / t
                mean = (p * distance).sum(-1, keepdim=True)
                want_slope = -p * (distance - mean) / t
                unit = p * (distance.abs() + mean.abs() + 1e-30) / t
            else:
                want_value = logp.gather(1, y[:, None]).squeeze(1)
                size = 1 + want_value.abs()
                want_slope = (own - p) / t
                unit = (own + p) / t
            close(value, want_value, size)
            # Weights below exp(-87) are 0 in fp32, or that small, whatever they multiply.
            close(slope, want_slope, unit * 32 + 1e-24 * (1 + 1 / t))


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, 1e-30, 1e30])
def test_a_temperature_that_is_not_taken_is_refused_by_name(backend, bad):
    x, y = torch.randn(2, 7), torch.tensor([1, 2])
    h, w = torch.randn(2, 3), torch.randn(7, 3)
    lists = torch.tensor([0, 1, 2]), torch.tensor([1, 2])
    calls = [
        lambda t: rk.token_logprobs(x, y, temperature=t),
        lambda t: rk.linear_token_logprobs(h, w, y, temperature=t),
        lambda t: rk.token_logprobs(x, y, temperature=t, support=lists),
        lambda t: rk.linear_token_logprobs(h, w, y, temperature=t, support=lists),
        lambda t: rk.linear_policy_loss(
            h[None], w, y[None], torch.zeros(1, 2), torch.ones(1, 2), mask=torch.ones(1, 2).bool(),
            temperature=t, config=rk.PolicyLossConfig.ppo(),
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="temperature"):
            call(bad)
    for call in (rk.kl_divergence, lambda a, b, **o: rk.linear_kl_divergence(h, w, h, w, **o)):
        with pytest.raises(ValueError, match="temperature"):
            call(x, x, temperature=bad)
    for i, call in enumerate(calls):
        temperatures = torch.tensor([1.0, bad])
        temperatures = temperatures[None] if i == 4 else temperatures
        if backend in ("cuda", "triton") and i in (0, 2, 3):
            # A GPU does not look: the row is NaN, and no other.
            found = call(temperatures).logprobs
            assert found[1].isnan() and found[0].isfinite()
        else:
            with pytest.raises(ValueError, match=r"temperature.*flat position 1"):
                call(temperatures)


def test_a_scale_and_a_cap_at_the_ends(backend):
    h, w, y = torch.randn(3, 4), torch.randn(11, 4), torch.tensor([0, 5, 10])
    for scale, t, cap in [(1e-6, 1.0, None), (1e9, 1e9, None), (1e-9, 1e-6, None), (1.0, 1.0, 1e15),
                          (1.0, 1.0, 1e-15), (1e4, 1e3, 1e3), (1e-17, 1e-16, 1e-15)]:  # fmt: skip
        options = dict(temperature=t, logit_scale=scale, softcap=cap)

        def logprobs(x, *rest, options=options):
            return rk.linear_token_logprobs(x, *rest, y, **options).logprobs

        value, slope = gradient(lambda x: logprobs(x, w), h)
        want, want_slope = judged(logprobs, h, w)
        close(value, want, 1 + want.abs(), 2e-5)
        close(slope, want_slope, want_slope.abs().amax() + 1e-28, 2e-5)
    for name, options in {
        "logit_scale": {"logit_scale": 1e30}, "softcap": {"softcap": 1e-30},
        "temperature / logit_scale": {"temperature": 1e10, "logit_scale": 1e-10},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            rk.linear_token_logprobs(h, w, y, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_16_bit_temperature_is_divided_in_fp32(backend, dtype):
    h, w, y = torch.randn(4, 8), torch.randn(50, 8), torch.randint(0, 50, (4,))
    exact = torch.tensor([0.75, 1.5, 0.5, 3.0])
    lists = torch.arange(5) * 2, torch.stack([y, (y + 1) % 50], 1).reshape(-1)
    for scale in (0.37, 1e-5):
        for support in (None, lists):
            found = [
                rk.linear_token_logprobs(
                    h, w, y, temperature=t, logit_scale=scale, support=support
                ).logprobs
                for t in (exact.to(dtype), exact)
            ]
            if dtype == torch.float64:
                torch.testing.assert_close(found[0].float(), found[1], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_logits_without_weight_have_no_gradient_of_the_entropy(backend, dtype, temperature, scale):
    """However far below: their distance times the slope of the entropy may be no number."""
    y = torch.tensor([1, 3, 5])
    if dtype == torch.float16:  # which ends at 65504
        scale = min(scale, 8.0)
    for low in (-INF, torch.finfo(dtype).min, -1e38, -1e20):
        x = torch.randn(3, 41).to(dtype)
        # Within fp16, which rounds the lowest of the others to -inf.
        x[:, ::2] = low
        call = lambda z: scale * rk.token_logprobs(z, y, temperature=temperature, entropy=True)[1]  # noqa: E731
        _, slope = gradient(call, x)
        assert slope.isfinite().all() and (slope[:, ::2] == 0).all(), low
        with rk.use_backend("reference"):
            _, want = gradient(call, x.double())
        size = scale / temperature * (1 + want.abs().amax() * temperature / scale)
        close(slope, want, size, rtol=max(4e-6, 2 * torch.finfo(dtype).eps))


# ---- KL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradient_of_kl_at_every_temperature(backend, direction):
    for size in (1.0, 30.0):
        x, y = torch.randn(2, 2, 41) * size
        for t in TEMPERATURES:
            value, slope = gradient(
                lambda z, t=t, y=y: rk.kl_divergence(z, y, direction=direction, temperature=t), x
            )
            a, b = ((v.double() - v.double().amax(-1, keepdim=True)) / t for v in (x, y))
            p, q = a.softmax(-1), b.softmax(-1)
            if direction == "reverse":
                mean = (p * (a - b)).sum(-1, keepdim=True)
                want = p * (a - b - mean) / t
                unit = p * ((a - b).abs() + mean.abs()) / t
            else:
                want, unit = (p - q) / t, (p + q) / t
            close(slope, want, unit * 64 + 1e-30 * (1 + 1 / t) ** 2)
            weights, d = (p, a - b) if direction == "reverse" else (q, b - a)
            kl = torch.nn.functional.kl_div(
                (b if direction == "reverse" else a).log_softmax(-1),
                (a if direction == "reverse" else b).log_softmax(-1),
                reduction="none", log_target=True,
            ).sum(-1)  # fmt: skip
            close(value, kl, 0.1 + kl.abs() + (weights * d).sum(-1).abs(), 1e-5)


def kl_cases():
    """(logits, ref) with infinite logits: in either, in both, all but one."""
    x, y = torch.randn(2, 6)
    for at_x, at_y in [([2], []), ([], [2]), ([2], [2]), ([1, 2], [2, 3]), ([0, 1, 2, 3, 4], []),
                       ([], [0, 1, 2, 3, 4]), ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
                       ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]), ([0, 1, 2, 3, 4, 5], [])]:  # fmt: skip
        a, b = x.clone(), y.clone()
        a[at_x], b[at_y] = -INF, -INF
        yield a, b


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_of_infinite_logits(backend, direction):
    """forward: p - q wherever both are distributions, also where the divergence is infinite."""
    for a, b in kl_cases():
        value, slope = gradient(lambda x, b=b: rk.kl_divergence(x, b, direction=direction), a)
        p, q = a.double().softmax(-1), b.double().softmax(-1)
        first, second = (p, q) if direction == "reverse" else (q, p)
        terms = torch.where(first > 0, first * (first.log() - second.log()), 0)
        want = terms.sum(-1) if not (p + q).isnan().any() else torch.tensor(NAN).double()
        torch.testing.assert_close(value.double(), want, equal_nan=True, rtol=1e-5, atol=1e-6)
        if direction == "forward":
            want_slope = p - q
        else:
            want_slope = torch.where(p > 0, p * (p.log() - q.log() - want), 0)
            want_slope = torch.where((p > 0) & want.isinf(), NAN, want_slope)
        if (p + q).isnan().any():
            want_slope = torch.full_like(p, NAN)
            assert slope.isnan().any()
        else:
            torch.testing.assert_close(
                slope.double(), want_slope, equal_nan=True, rtol=1e-5, atol=1e-6
            )


def test_no_upstream_gradient_passes_an_infinite_slope(backend):
    x = torch.tensor([-101.0, -1e30, 1e30, -INF, INF, -1.5])
    ref = torch.full((6,), -1.0)
    for estimator in ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"):
        value, slope = gradient(
            lambda z, e=estimator: rk.kl_penalty(z, ref, estimator=e).clamp(-10, 10), x
        )
        own = {"k1": 1.0, "k2": -0.5, "k3": 1 - math.exp(0.5), "abs": -1.0}
        # The gradient of k2 where the value is inside the clamp.
        want = [0.0] * 5 + [own["k2" if estimator.endswith("+") else estimator]]
        torch.testing.assert_close(slope, torch.tensor(want, dtype=torch.float32))
        assert not value.isnan().any()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("row", [[0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF] * 3])
def test_no_upstream_gradient_leaves_a_row_that_is_no_distribution(backend, row, support, entropy):
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], requires_grad=True)
    given = (torch.tensor([0, 2, 4]), torch.tensor([1, 2, 0, 1])) if support else None
    labels = torch.tensor([1, 1])
    found = rk.token_logprobs(logits, labels, entropy=entropy, support=given)
    outputs = [found.logprobs, *([found.entropy] if entropy else [])]
    assert all(o[0].isnan() and o[1].isfinite() for o in outputs)
    upstream = [torch.tensor([0.0, 1.0])] * len(outputs)
    (g,) = torch.autograd.grad(outputs, logits, upstream)
    assert g[0].eq(0).all() and g[1].abs().sum() > 0.1


def test_values_and_slopes_at_great_distances(backend):
    x = torch.tensor([1e19, -1e19, 3e38, -3e38, INF, -INF, 90.0, -90.0, -85.0, 0.0])
    ref = torch.zeros(10)
    d = x.double()
    want = {
        "k1": (d, torch.ones_like(d)), "k2": (d * d / 2, d), "abs": (d.abs(), d.sign()),
        "k3": (torch.where(d == -INF, INF, torch.expm1(-d) + d), -torch.expm1(-d)),
    }  # fmt: skip
    for name, (values, slopes) in want.items():
        for estimator in (name, name + "+"):
            value, slope = gradient(lambda z, e=estimator: rk.kl_penalty(z, ref, estimator=e), x)
            expected = d if estimator.endswith("+") else slopes
            torch.testing.assert_close(value, values.float(), rtol=2e-6, atol=0)
            torch.testing.assert_close(slope, expected.float(), rtol=2e-6, atol=0)


def test_entropy_of_infinite_logits(backend):
    x = torch.randn(4, 9)
    x[0, 3] = x[1, 1:] = x[2, ::2] = -INF
    y = torch.tensor([0, 0, 1, 8])
    for which in (0, 1):
        value, slope = gradient(lambda z, i=which: rk.token_logprobs(z, y, entropy=True)[i], x)
        logp = x.double().log_softmax(-1)
        p = logp.exp()
        finite = torch.where(p > 0, logp, 0)
        h = -(p * finite).sum(-1, keepdim=True)
        own = torch.zeros_like(p).scatter(1, y[:, None], 1.0)
        want = -p * (finite + h) if which else own - p
        torch.testing.assert_close(slope.double(), want, rtol=1e-5, atol=1e-6)
        expected = h.squeeze(1) if which else logp.gather(1, y[:, None]).squeeze(1)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_preference_losses_at_great_margins():
    far = torch.tensor([INF, 1e30, 3e38])
    zero = torch.zeros(3)
    for loss_type in ("sigmoid", "hinge", "robust"):
        value, slope = gradient(
            lambda x, t=loss_type: rk.preference_loss(x, zero, zero, zero, loss=t).loss, far
        )
        assert value == 0 and bool((slope == 0).all()), loss_type
        value, slope = gradient(
            lambda x, t=loss_type: rk.preference_loss(zero, x, zero, zero, beta=0.5, loss=t).loss,
            far,
        )
        assert value == INF
        torch.testing.assert_close(slope, torch.full((3,), 0.5 / 3))
    value, slope = gradient(lambda x: rk.reward_model_loss(x, -x).loss, torch.tensor([1e30, INF]))
    assert value == 0 and bool((slope == 0).all())


# ---- Rollout log-probabilities ------------------------------------------------------------------


def corrected(rollout, old, level, mode, packed=None, **options):
    if level is not None:
        options |= dict(
            correction_level=level, correction_mode=mode, correction_max=2.0, correction_min=0.3
        )
    config = rk.PolicyLossConfig(**options)
    mask = torch.ones(old.shape, dtype=torch.bool)
    advantages = torch.linspace(-1, 1, old.numel()).reshape(old.shape)
    lp = (old.nan_to_num(neginf=-50.0) + 0.05).requires_grad_()
    result = rk.policy_loss(
        lp, old, advantages, mask=mask, rollout_logprobs=rollout, cu_seqlens=packed, config=config
    )
    result.loss.backward()
    return result.loss.detach(), lp.grad, result.metrics


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_rollout_that_is_nan_says_nothing(backend, level, mode, packed):
    old = torch.tensor([[-1.0, -2.0, -0.5, -1.5], [-1.0, -0.2, -3.0, -0.7]])
    rollout = old + torch.tensor([[0.3, NAN, -0.2, 0.1], [NAN, NAN, NAN, NAN]])
    agreed = torch.where(rollout.isnan(), old, rollout)
    cu = torch.tensor([0, 4, 8]) if packed else None
    shape = (8,) if packed else (2, 4)
    args = [t.reshape(shape) for t in (rollout, agreed, old)]
    loss, grad, metrics = corrected(args[0], args[2], level, mode, cu)
    want_loss, want_grad, want_metrics = corrected(args[1], args[2], level, mode, cu)
    assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)
    assert torch.equal(metrics.tensor, want_metrics.tensor)
    assert not metrics.tensor.isnan().any()
    # The second sequence's w is 1.
    none = corrected(args[2], args[2], None, mode, cu)
    assert torch.equal(grad.reshape(2, 4)[1], none[1].reshape(2, 4)[1])


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_infinite_rollouts_saturate(backend, mode):
    """-inf: w at its upper cap, or dropped; -inf in both: 1; both signs in a sequence: 1."""
    old = torch.tensor([[-1.0, -1.0, -INF, -1.0]])
    rollout = torch.tensor([[-INF, INF, -INF, -1.0]])
    _, grad, metrics = corrected(rollout, old, "token", mode, objective="reinforce")
    advantages = torch.linspace(-1, 1, 4)
    weights = torch.tensor([2.0, 0.3, 1.0, 1.0] if mode == "truncate" else [0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(grad[0], -advantages * weights / 4)
    assert float(metrics["correction_mean"]) == pytest.approx(float(weights.mean()))
    _, grad, _ = corrected(rollout, old, "sequence", mode, objective="reinforce")
    torch.testing.assert_close(grad[0], -advantages / 4)
    # A NaN of the trainer's own is not hidden.
    loss, *_ = corrected(rollout, torch.full((1, 4), NAN), "token", mode)
    assert loss.isnan()


def test_a_reference_without_weight_is_a_metric_alone(backend):
    """kl_coef 0: what the reference policy says, also NaN, changes neither loss nor gradient."""
    x, mask = torch.tensor([[-1.0, -2.0, -3.0]]), torch.ones(1, 3, dtype=torch.bool)
    operands = torch.randn(1, 3, 4), torch.randn(5, 4)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    for config in (rk.PolicyLossConfig.ppo(), rk.PolicyLossConfig(kl_weight="ratio")):
        found = []
        for ref in (None, torch.tensor([[NAN, -1.0, INF]])):
            lp, hidden = x.clone().requires_grad_(), operands[0].clone().requires_grad_()
            rest = (x - 0.125, torch.ones(1, 3))
            loss = rk.policy_loss(lp, *rest, mask=mask, ref_logprobs=ref, config=config).loss
            head = rk.linear_policy_loss(
                hidden, operands[1], labels, *rest, mask=mask, ref_logprobs=ref, config=config
            ).loss
            (loss + head).backward()
            found.append((loss.detach(), head.detach(), lp.grad, hidden.grad))
        for got, want in zip(*found, strict=True):
            assert want.isfinite().all() and torch.equal(got, want)


def test_infinite_references_in_the_kl_term(backend):
    old, mask = torch.full((1, 1), -1.0), torch.ones(1, 1, dtype=torch.bool)
    for estimator in ("k1", "k2", "k3", "abs", "k3+"):
        for clamp, distance in itertools.product((None, 5.0), (-INF, INF, -1e25, -1.2)):
            ref = torch.full((1, 1), distance)
            config = rk.PolicyLossConfig(
                kl_coef=0.1, kl_estimator=estimator, kl_value_clamp=clamp, log_ratio_clamp=None
            )

            def loss(x, config=config, ref=ref):
                old_, ones, ref = (t.to(x.dtype) for t in (old, torch.ones(1, 1), ref))
                return rk.policy_loss(
                    x, old_, ones, mask=mask, ref_logprobs=ref, config=config
                ).loss

            value, slope = gradient(loss, old)
            want, want_slope = judged(loss, old)
            torch.testing.assert_close(value, want.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(slope, want_slope.float(), rtol=1e-5, atol=1e-6)


def test_the_bounds_of_a_temperature_are_one_everywhere():
    assert (temperature_rules.LOWEST, temperature_rules.HIGHEST) == (2.0**-60, 2.0**60)
    triton_math = pytest.importorskip("rlhf_kernels.kernels.triton._math")
    source = triton_math.good_temperature.fn.__code__.co_consts
    assert {temperature_rules.LOWEST, temperature_rules.HIGHEST} <= set(source)
