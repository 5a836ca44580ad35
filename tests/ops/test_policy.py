"""policy_loss on every backend: values, gradients and metrics."""

import itertools
import math

import pytest
import torch

from tests.ops.policy_cases import (
    BASES,
    CORRECTIONS,
    EVERYTHING,
    OF_OBJECTIVE,
    Config,
    check,
    grid,
    make_config,
    make_inputs,
    portion,
    run,
)

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import enums
from rlhf_kernels.config.metrics import POLICY_METRICS
from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, to_float64


@pytest.mark.parametrize("objective", OF_OBJECTIVE)
def test_matches_fp64(backend, objective):
    args, options = make_inputs()
    # 7 visits all of every option; all combinations are in the slow test below.
    for config in portion(backend, grid(objective), 0, 7):
        loss, metrics, g, g_entropy = check(args, options, config)
        assert abs(loss) > 1e-4 and g.abs().max() > 1e-5 and g_entropy.abs().max() > 1e-5
        named = dict(zip(POLICY_METRICS, metrics.tolist(), strict=True))
        assert named["ratio_min"] < 0.9 and named["ratio_max"] > 1.1
        assert named["kl_loss"] != 0 and named["ess"] < 0.999
        if objective in ("clip", "cispo"):
            assert named["clip_frac_low"] > 0.01 and named["clip_frac_high"] > 0.01
        if objective == "clip" and config.ratio_level == "token":
            assert named["dual_clip_frac"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=lambda b: f"{b['objective']}-{b['ratio_level']}")
def test_matches_fp64_full_product(backend, base):
    args, options = make_inputs()
    rest = (enums.AGGREGATIONS, CORRECTIONS, enums.KL_ESTIMATORS, (False, True))
    for choice in itertools.product(*rest):
        check(args, options, make_config(base, *choice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", (1, 16, 511, 512, 513, 1040))
def test_lengths_and_dtypes(backend, cols, dtype):
    args, options = make_inputs(3, cols, dtype)
    for base in ({}, {"ratio_level": "sequence"}):
        check(args, options, Config(**base, **EVERYTHING, aggregation="seq-mean-token-mean"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("level", enums.RATIO_LEVELS)
def test_16_bit_gradients_are_rounded_once(backend, level, dtype):
    # A token's own slope and its share of the sequence's may cancel: only their sum is rounded.
    if backend == "triton" and triton.interpreted() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off what bfloat16 does not hold")
    args, options = make_inputs(4, 60, dtype)
    logprobs, entropy = args[0].detach(), options.pop("entropy").detach()
    found = []
    for of in (dtype, torch.float32):
        leaves = [t.to(of).requires_grad_() for t in (logprobs, entropy)]
        loss = rk.policy_loss(
            leaves[0], *args[1:], entropy=leaves[1], **options,
            config=Config(ratio_level=level, kl_weight="ratio", **EVERYTHING),
        ).loss  # fmt: skip
        found.append([g.to(dtype) for g in torch.autograd.grad(0.7 * loss, leaves)])
    for half, single in zip(*found, strict=True):
        assert_bitwise_equal(half, single)


def test_sequences_of_several_pieces(backend):
    interpreted = backend == "triton" and triton.interpreted()
    args, options = make_inputs(2, 6000 if interpreted else 33000)
    config = Config(ratio_level="sequence", **EVERYTHING, **CORRECTIONS[3])
    check(args, options, config)


def scalar_loss(config, lp, frozen, old, adv, mask, ref, rollout, entropy):
    """The loss by plain loops over lists; what is detached is computed from `frozen`."""

    def clamp(x, low, high):
        return min(max(x, low), high)

    def clamped(x, c):
        low, high = c if isinstance(c, tuple) else (-c, c)
        return clamp(x, low, high)

    def estimator(x, name):
        return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x, "abs": abs(x)}[name]

    def cut(x, a):
        high, low = math.log(1 + config.clip_high), math.log(1 - config.clip_low)
        return min(x, high) if a > 0 else max(x, low)

    terms, lengths = [], []
    for i in range(len(lp)):
        kept = [t for t in range(len(lp[i])) if mask[i][t]]
        if not kept:
            continue
        n = len(kept)
        mean_x = sum(lp[i][t] - old[i][t] for t in kept) / n
        mean_frozen = sum(frozen[i][t] - old[i][t] for t in kept) / n
        sum_w = sum(old[i][t] - rollout[i][t] for t in kept)
        row = []
        for t in kept:
            a = adv[i][t]
            x = {"token": lp[i][t] - old[i][t], "sequence": mean_x, "sequence-token": mean_frozen}
            if config.ratio_level == "clipped-sequence":
                each = [cut(lp[i][u] - old[i][u], adv[i][u]) for u in kept]
                x[config.ratio_level] = sum(each) / n
            x = x[config.ratio_level]
            log_r = clamped(x, config.log_ratio_clamp)
            if config.ratio_level == "sequence-token" and log_r == x:
                log_r += lp[i][t] - frozen[i][t]
            r = math.exp(log_r)
            x = frozen[i][t] - old[i][t] if config.ratio_level == "token" else mean_frozen
            r_frozen = math.exp(clamped(x, config.log_ratio_clamp))
            w = 1.0
            if config.correction_level:
                d = sum_w if config.correction_level == "sequence" else old[i][t] - rollout[i][t]
                low, high = config.correction_min or 0.0, config.correction_max or math.inf
                w = math.exp(d)
                if config.correction_mode == "truncate":
                    w = clamp(w, low, high)
                elif not low <= w <= high:
                    w = 0.0
            if config.ratio_level == "clipped-sequence":
                term = -w * a * r
            elif config.objective == "clip":
                clipped = clamp(r, 1 - config.clip_low, 1 + config.clip_high)
                term = max(-a * min(r, config.delta), -a * clipped)
                term = w * (min(term, -a * config.dual_clip) if a < 0 else term)
            elif config.objective == "penalty":
                term = -w * r * a + config.penalty_coef * (r - 1 - log_r)
            elif config.objective == "reinforce":
                term = -w * a * lp[i][t]
            elif config.objective == "cispo":
                weight = clamp(r_frozen, 1 - config.clip_low, 1 + config.clip_high)
                term = -w * a * weight * lp[i][t]
            else:
                tau = config.sapo_tau_pos if a > 0 else config.sapo_tau_neg
                term = -w * a / (1 + math.exp(-tau * (r - 1))) * 4 / tau
            x, fx = lp[i][t] - ref[i][t], frozen[i][t] - ref[i][t]
            straight = config.kl_estimator.endswith("+")
            name = config.kl_estimator.removesuffix("+")
            kl = estimator(clamped(fx if straight else x, config.kl_input_clamp), name)
            kl = clamp(kl, -config.kl_value_clamp, config.kl_value_clamp)
            if straight:
                kl += x * x / 2 - fx * fx / 2
            term += config.kl_coef * kl * (r if config.kl_weight else 1)
            row.append(term - config.entropy_coef * entropy[i][t])
        terms.append(row)
        lengths.append(n)
    if config.aggregation == "token-mean":
        return sum(map(sum, terms)) / sum(lengths)
    if config.aggregation == "seq-mean-token-mean":
        return sum(sum(r) / n for r, n in zip(terms, lengths, strict=True)) / len(terms)
    divisor = len(terms) if config.normalizer is None else config.normalizer
    return sum(map(sum, terms)) / divisor


@pytest.mark.parametrize("objective", OF_OBJECTIVE)
def test_against_a_scalar_loop(backend, objective):
    args, options = make_inputs(4, 6, keep=0.8)
    lists = [t.double().tolist() for t in (*args, *options.values())]
    lp, *constants = lists
    for config in itertools.islice(grid(objective), 0, None, 7):
        loss, _, g, _ = run(rk.policy_loss, args, options, config=config)
        expected = scalar_loss(config, lp, lp, *constants)
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for i, t in ((0, 0), (1, 3), (2, 5), (3, 2)):
            sides = []
            for h in (1e-6, -1e-6):
                moved = [list(row) for row in lp]
                moved[i][t] += h
                sides.append(scalar_loss(config, moved, lp, *constants))
            slope = (sides[0] - sides[1]) / 2e-6
            assert g[i, t].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        Config.ppo(dual_clip=1.9, kl_coef=0.1, entropy_coef=0.1),
        Config.gspo(clip_low=0.1, clip_high=0.1, kl_coef=0.1, kl_weight="ratio"),
        Config.sapo(kl_coef=0.1, kl_estimator="k2", ratio_level="sequence"),
        Config.ppo_penalty(correction_level="sequence", correction_max=2.0, kl_estimator="k1"),
        Config.rloo(kl_coef=0.1, kl_input_clamp=0.5, kl_value_clamp=0.1),
    ],
    ids=lambda c: c.objective,
)
def test_gradcheck_of_the_reference(config):
    args, options = to_float64(make_inputs(4, 5))

    def loss(logprobs, entropy):
        inputs = options | {"entropy": entropy}
        return reference.policy_loss(logprobs, *args[1:], **inputs, config=config)[0]

    assert torch.autograd.gradcheck(loss, (args[0], options["entropy"]))


def test_constructors_say_what_the_papers_say():
    assert Config.ppo() == Config()
    assert (Config.dapo().clip_low, Config.dapo().clip_high) == (0.2, 0.28)
    assert Config.grpo().aggregation == "seq-mean-token-mean" and Config.grpo().kl_coef == 0.04
    assert Config.dr_grpo().aggregation == "constant"
    assert Config.gspo().clip_bounds() == (1 - 3e-4, 1 + 4e-4)
    assert Config.cispo(clip_high=5.0, clip_absolute=True).clip_bounds() == (-math.inf, 5.0)
    assert Config.cispo(clip_high=4.0).clip_bounds()[1] == 5.0
    assert Config.sapo().objective == "sapo" and Config.rloo().objective == "reinforce"
    assert Config.ppo_penalty(penalty_coef=0.3).penalty_coef == 0.3
    assert Config.reinforce_plus_plus().objective == "clip"


def test_absolute_clip_bounds(backend):
    args, options = make_inputs()
    absolute = Config.cispo(clip_high=1.3, clip_absolute=True)
    a = run(rk.policy_loss, args, options, config=absolute)
    r = run(rk.policy_loss, args, options, config=Config.cispo(clip_high=0.3))
    torch.testing.assert_close(a, r)
    assert a[1][POLICY_METRICS.index("clip_frac_high")] > 0.01


def test_on_policy_is_exact(backend):
    logprobs, _, advantages, mask = make_inputs()[0]
    for base in BASES:
        metrics = rk.policy_loss(
            logprobs,
            logprobs.detach(),
            advantages,
            mask=mask,
            ref_logprobs=logprobs.detach(),
            config=Config(**base, kl_coef=0.1),
        ).metrics
        for name in ("ratio_mean", "ratio_min", "ratio_max", "ess"):
            assert metrics[name].item() == 1.0
        for name in ("clip_frac_low", "clip_frac_high", "dual_clip_frac", "kl_loss"):
            assert metrics[name].item() == 0.0
        for name in ("k1_old", "k3_old", "k1_ref", "k3_ref"):
            assert metrics[name].item() == 0.0


def test_exponentials_are_accurate(backend):
    # With advantage -1 and no clipping the gradient is the ratio; with none but the penalty it is
    # expm1, and the metric of one token is k3.
    small = torch.logspace(-20, 0, 300)
    x = torch.cat([torch.linspace(-39.9, 39.9, 20011), small, -small]).unsqueeze(0)
    x = x.requires_grad_()
    still, mask = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
    options = {"log_ratio_clamp": None, "aggregation": "constant", "normalizer": 1.0}
    free = Config(clip_low=None, clip_high=None, **options)
    (r,) = torch.autograd.grad(rk.policy_loss(x, still, still - 1, mask=mask, config=free).loss, x)
    exact = x.detach().double().exp()
    assert ((r - exact).abs() / exact).max() < 2.0**-23
    penalty = Config(objective="penalty", penalty_coef=1.0, **options)
    (slope,) = torch.autograd.grad(
        rk.policy_loss(x, still, still, mask=mask, config=penalty).loss, x
    )
    exact = torch.expm1(x.detach().double())
    # torch forms the derivative of expm1 as expm1 + 1, the reference subtracts 1 again.
    size = exact.abs() + 1 if backend == "reference" else exact.abs()
    assert ((slope - exact).abs() <= size * 2.0**-22).all()
    for value in small[(small > 1e-4) & (small < 0.3)].reshape(-1, 1, 1):
        zero, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        k3 = rk.policy_loss(value, zero, zero, mask=one).metrics["k3_old"].double()
        exact = torch.expm1(value.double()) - value.double()
        # The reference subtracts two numbers of the size of x.
        bound = 2.0**-22 / value.item() if backend == "reference" else 2.0**-20
        assert abs(k3 - exact) / exact < bound


@pytest.mark.parametrize("clamp", (20.0, None))
def test_far_log_ratios(backend, clamp):
    logprobs = torch.tensor([[-1000.0, 0.0, -1000.0, 0.0, -5.0, 0.0]]).requires_grad_()
    old = torch.tensor([[0.0, -1000.0, 0.0, -1000.0, -5.0, -30.0]])
    advantages = torch.tensor([[0.0, 0.0, 1.0, 2.0, 1.0, 0.0]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    for base in BASES:
        config = Config(**base, log_ratio_clamp=clamp, kl_coef=0.1, aggregation="constant")
        loss, metrics = rk.policy_loss(
            logprobs, old, advantages, mask=mask, ref_logprobs=old, normalizer=1.0, config=config
        )
        (g,) = torch.autograd.grad(loss, logprobs)
        assert g.isfinite().all() and metrics.tensor.isfinite().all()
    clip = Config(log_ratio_clamp=clamp)
    loss, _ = rk.policy_loss(logprobs, old, advantages, mask=mask, config=clip)
    (g,) = torch.autograd.grad(loss, logprobs)
    # Advantage 0, clipped from above, and saturated: exactly zero.
    assert g[0, [0, 1, 2, 3, 5]].eq(0).all() and g[0, 4].item() == pytest.approx(-1 / 6)
    zero, _ = rk.policy_loss(logprobs, old, torch.zeros(1, 6), mask=mask, config=clip)
    assert zero.item() == 0.0
