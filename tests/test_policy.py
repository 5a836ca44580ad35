"""policy_loss on every backend."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import _config, policy_config, reference
from rlhf_kernels.reference.policy import METRICS, token_weights
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_within_budget,
    generator,
    random_mask,
    to_float64,
)

Config = rk.PolicyLossConfig
# Options beside the grid's, every term on and every bound within reach of the inputs below.
EVERYTHING = {
    "kl_coef": 0.3,
    "entropy_coef": 0.05,
    "log_ratio_clamp": (-0.9, 1.1),
    "kl_input_clamp": 0.6,
    "kl_value_clamp": 0.5,
}
OF_OBJECTIVE = {
    "clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.9, "delta": 1.7},
    "penalty": {"penalty_coef": 0.4},
    "reinforce": {},
    "cispo": {"clip_low": 0.3, "clip_high": 0.4},
    "sapo": {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.5},
}
CORRECTIONS = (
    {},
    {"correction_level": "token", "correction_max": 1.1},
    {"correction_level": "token", "correction_mode": "mask", "correction_min": 0.9},
    {"correction_level": "sequence", "correction_min": 0.5, "correction_max": 1.5},
    {"correction_level": "sequence", "correction_mode": "mask", "correction_max": 2.0},
)
BASES = [
    {"objective": o, "ratio_level": level} | OF_OBJECTIVE[o]
    for o, level in itertools.product(OF_OBJECTIVE, policy_config.RATIO_LEVELS)
    if o != "reinforce" or level == "token"
]


def make_config(base, aggregation, correction, estimator, weighted):
    return Config(
        **EVERYTHING,
        **base,
        **correction,
        aggregation=aggregation,
        kl_estimator=estimator,
        kl_importance_weighted=weighted,
        normalizer=7.5 if aggregation == "constant" else None,
    )


# Those with kernels of their own.
KERNELS = ("cpu", "triton")


def grid(objective):
    """Objective x level x aggregation x correction, estimators cycling; then all estimators."""
    bases = [b for b in BASES if b["objective"] == objective]
    estimators = itertools.cycle(policy_config.KL_ESTIMATORS)
    weighted = itertools.cycle((False, True, True))
    for base, *rest in itertools.product(bases, policy_config.AGGREGATIONS, CORRECTIONS):
        yield make_config(base, *rest, next(estimators), next(weighted))
    for base, estimator in itertools.product(bases, policy_config.KL_ESTIMATORS):
        yield make_config(base, "token-mean", CORRECTIONS[1], estimator, True)


def make_inputs(rows=5, cols=37, dtype=torch.float32, *, seed=0, keep=0.7):
    """Positional arguments and keyword arguments of policy_loss; gradients wanted."""
    g = generator(seed)

    def noise(scale):
        return scale * torch.randn(rows, cols, generator=g)

    old = -3 * torch.rand(rows, cols, generator=g)
    # Whole sequences drift too, so that sequence ratios meet their bounds.
    drift = torch.linspace(-0.9, 0.9, rows).unsqueeze(-1) if rows > 1 else 0.1
    logprobs = (old + drift + noise(0.4)).to(dtype).requires_grad_()
    entropy = torch.rand(rows, cols, generator=g).to(dtype).requires_grad_()
    args = (logprobs, old.to(dtype), noise(1.0).to(dtype), random_mask(rows, cols, keep=keep))
    options = {
        "ref_logprobs": (old + noise(0.4)).to(dtype),
        "rollout_logprobs": (old + noise(0.2)).to(dtype),
        "entropy": entropy,
    }
    return args, options


def run(function, args, options, **more):
    """(loss, metrics, gradient of logprobs, gradient of entropy)."""
    loss, metrics = function(*args, **options, **more)
    wanted = (args[0], options["entropy"])
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    metrics = metrics if isinstance(metrics, torch.Tensor) else metrics.values
    return loss.detach(), metrics, *gradients


def same(backend):
    """Bitwise for kernels; torch's own reductions depend on shape and strides."""
    return torch.testing.assert_close if backend == "reference" else assert_bitwise_equal


def portion(backend, cases, part, parts):
    """All cases. In Triton's interpreter, which is slow, a part: the parts together are all."""
    if backend == "triton" and rk.triton.interpreted():
        return list(cases)[part % parts :: parts]
    return cases


def check(args, options, config):
    actual = run(rk.policy_loss, args, options, config=config)
    plain = run(reference.policy_loss, args, options, config=config)
    wide = to_float64(args), to_float64(options)
    oracle = run(reference.policy_loss, *wide, config=config)
    # The terms that the gradient is a sum of: objective, penalty, KL, and the slope of its weight.
    parts = [
        run(reference.policy_loss, *wide, config=dataclasses.replace(config, **off))[2]
        for off in (
            {"kl_importance_weighted": False},
            {"kl_coef": 0.0},
            {"kl_coef": 0.0, "penalty_coef": 0.0},
        )
    ]
    scale = (oracle[2] - parts[0]).abs() + (oracle[2] - parts[1]).abs()
    scale = scale + (parts[1] - parts[2]).abs() + parts[2].abs()
    if config.ratio_level == "sequence":
        # A sum over the sequence, whose terms may cancel.
        scale = torch.where(args[3], scale.amax(-1, keepdim=True) + scale.amax(), 0)
    weights = token_weights(args[3], config.aggregation, config.normalizer, torch.float64, None)
    mass = float(torch.where(args[3], weights, 0).sum())
    assert_within_budget(actual[0], oracle[0], plain[0], scale=mass)
    # Products of some ten roundings, in any of which torch may be lucky.
    assert_within_budget(actual[1], oracle[1], plain[1], scale=max(1.0, mass), factor=4.0)
    assert_within_budget(actual[2], oracle[2], plain[2], scale=scale, factor=4.0)
    assert_within_budget(actual[3], oracle[3], plain[3])
    return oracle


@pytest.mark.parametrize("objective", OF_OBJECTIVE)
def test_matches_fp64(backend, objective):
    args, options = make_inputs()
    # 7 visits all of every option; all combinations are in the slow test below.
    for config in portion(backend, grid(objective), 0, 7):
        loss, metrics, g, g_entropy = check(args, options, config)
        assert abs(loss) > 1e-4 and g.abs().max() > 1e-5 and g_entropy.abs().max() > 1e-5
        named = dict(zip(METRICS, metrics.tolist(), strict=True))
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
    rest = (policy_config.AGGREGATIONS, CORRECTIONS, policy_config.KL_ESTIMATORS, (False, True))
    for choice in itertools.product(*rest):
        check(args, options, make_config(base, *choice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", (1, 16, 511, 512, 513, 1040))
def test_lengths_and_dtypes(backend, cols, dtype):
    args, options = make_inputs(3, cols, dtype)
    for base in ({}, {"ratio_level": "sequence"}):
        check(args, options, Config(**base, **EVERYTHING, aggregation="seq-mean-token-mean"))


def test_sequences_of_several_pieces(backend):
    interpreted = backend == "triton" and rk.triton.interpreted()
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
            if config.objective == "clip":
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
            term += config.kl_coef * kl * (r if config.kl_importance_weighted else 1)
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
        Config.gspo(clip_low=0.1, clip_high=0.1, kl_coef=0.1, kl_importance_weighted=True),
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
    assert a[1][METRICS.index("clip_frac_high")] > 0.01


def test_on_policy_is_exact(backend):
    logprobs, _, advantages, mask = make_inputs()[0]
    for base in BASES:
        metrics = rk.policy_loss(
            logprobs,
            logprobs.detach(),
            advantages,
            mask,
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
    (r,) = torch.autograd.grad(rk.policy_loss(x, still, still - 1, mask, config=free).loss, x)
    exact = x.detach().double().exp()
    assert ((r - exact).abs() / exact).max() < 2.0**-23
    penalty = Config(objective="penalty", penalty_coef=1.0, **options)
    (slope,) = torch.autograd.grad(rk.policy_loss(x, still, still, mask, config=penalty).loss, x)
    exact = torch.expm1(x.detach().double())
    # torch forms the derivative of expm1 as expm1 + 1, the reference subtracts 1 again.
    size = exact.abs() + 1 if backend == "reference" else exact.abs()
    assert ((slope - exact).abs() <= size * 2.0**-22).all()
    for value in small[(small > 1e-4) & (small < 0.3)].reshape(-1, 1, 1):
        zero, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        k3 = rk.policy_loss(value, zero, zero, one).metrics["k3_old"].double()
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
            logprobs, old, advantages, mask, ref_logprobs=old, normalizer=1.0, config=config
        )
        (g,) = torch.autograd.grad(loss, logprobs)
        assert g.isfinite().all() and metrics.values.isfinite().all()
    clip = Config(log_ratio_clamp=clamp)
    loss, _ = rk.policy_loss(logprobs, old, advantages, mask, config=clip)
    (g,) = torch.autograd.grad(loss, logprobs)
    # Advantage 0, clipped from above, and saturated: exactly zero.
    assert g[0, [0, 1, 2, 3, 5]].eq(0).all() and g[0, 4].item() == pytest.approx(-1 / 6)
    zero, _ = rk.policy_loss(logprobs, old, torch.zeros(1, 6), mask, config=clip)
    assert zero.item() == 0.0


@pytest.mark.parametrize("part, bad", [(0, math.nan), (1, math.inf), (2, -math.inf)])
def test_what_lies_under_the_mask_changes_nothing(backend, part, bad):
    args, options = make_inputs(4, 600)
    mask = args[3]

    def spoil(t):
        return torch.where(mask, t, bad).detach().requires_grad_(t.requires_grad)

    spoiled = (*map(spoil, args[:3]), mask), {k: spoil(v) for k, v in options.items()}
    for base in portion(backend, BASES, part, 3):
        config = make_config(base, "seq-mean-token-mean", CORRECTIONS[3], "k3", True)
        clean = run(rk.policy_loss, args, options, config=config)
        dirty = run(rk.policy_loss, *spoiled, config=config)
        for a, b in zip(clean, dirty, strict=True):
            assert_bitwise_equal(b, a)
        assert dirty[2][~mask].eq(0).all() and dirty[3][~mask].eq(0).all()


def test_nan_outside_the_mask_shows(backend):
    args, _ = make_inputs(3, 40)
    broken = args[0].detach().clone()
    broken[0, args[3][0].nonzero()[0]] = math.nan
    loss, metrics = rk.policy_loss(broken, *args[1:])
    assert loss.isnan()
    for name in ("ratio_mean", "ratio_min", "ratio_max", "k3_old"):
        assert metrics[name].isnan()


def test_all_masked(backend):
    args, options = make_inputs(3, 9)
    for base in BASES:
        config = make_config(base, "token-mean", CORRECTIONS[4], "k3", False)
        empty = (*args[:3], torch.zeros_like(args[3]))
        loss, metrics, g, g_entropy = run(rk.policy_loss, empty, options, config=config)
        assert loss == 0 and metrics.eq(0).all() and g.eq(0).all() and g_entropy.eq(0).all()


@pytest.mark.parametrize("shape", ((0, 5), (4, 0)))
def test_empty_batch(backend, shape):
    logprobs = torch.zeros(shape, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool)
    loss, metrics = rk.policy_loss(logprobs, logprobs.detach(), torch.zeros(shape[:1]), mask)
    loss.backward()
    assert loss == 0 and metrics["tokens"] == 0 and logprobs.grad.shape == shape


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16))
def test_integer_masks(backend, dtype):
    args, options = make_inputs(4, 70)
    expected = run(rk.policy_loss, args, options)
    actual = run(rk.policy_loss, (*args[:3], args[3].to(dtype) * 2), options)
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, b)


def test_advantages_per_sequence(backend):
    args, options = make_inputs(6, 70)
    each = args[2][:, 0]
    full = run(rk.policy_loss, (*args[:2], each.unsqueeze(-1).expand(6, 70), args[3]), options)
    short = run(rk.policy_loss, (*args[:2], each, args[3]), options)
    for a, b in zip(short, full, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("aggregation", policy_config.AGGREGATIONS)
def test_packed_equals_padded(backend, aggregation):
    lengths = [700, 0, 1, 33, 512, 700]
    args, options = make_inputs(6, 700)
    inside = torch.arange(700) < torch.tensor(lengths).unsqueeze(-1)

    def pack(t):
        return t.detach()[inside].requires_grad_(t.requires_grad)

    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    flat = tuple(map(pack, args))
    flat_options = {k: pack(v) for k, v in options.items()} | {"cu_seqlens": cu_seqlens}
    padded = (*args[:3], args[3] & inside)
    compare = same(backend)
    part = policy_config.AGGREGATIONS.index(aggregation)
    for base in portion(backend, BASES, part, 4):
        config = make_config(base, aggregation, CORRECTIONS[3], "k3", True)
        one = run(rk.policy_loss, padded, options, config=config)
        two = run(rk.policy_loss, flat, flat_options, config=config)
        torch.testing.assert_close(two[:2], one[:2], rtol=1e-5, atol=1e-6)
        compare(two[2], one[2][inside])
        compare(two[3], one[3][inside])
    each = args[2][:, ::700].squeeze(-1)
    one = run(rk.policy_loss, (*padded[:2], each, padded[3]), options)
    two = run(rk.policy_loss, (*flat[:2], each, flat[3]), flat_options)
    compare(two[2], one[2][inside])


@pytest.mark.parametrize(
    "config",
    [
        Config(**EVERYTHING, **CORRECTIONS[1]),
        Config(ratio_level="sequence-token", aggregation="seq-mean-token-mean", **EVERYTHING),
        Config.gspo(clip_low=0.2, clip_high=0.3, **EVERYTHING, **CORRECTIONS[3]),
    ],
    ids=lambda c: c.ratio_level,
)
def test_a_sequence_does_not_depend_on_its_surroundings(backend, config):
    # Of Triton's tiles and of pieces of the CPU's kernels several.
    rows, cols = 3, 2100
    args, options = make_inputs(rows, cols)
    args[3][-1] = args[3][0].flip(0)
    compare = same(backend)

    def gradients(change, **more):
        changed = [change(t.detach()).requires_grad_(t.requires_grad) for t in args]
        rest = {k: change(t.detach()).requires_grad_(t.requires_grad) for k, t in options.items()}
        return run(rk.policy_loss, changed, rest, config=config, normalizer=7.0, **more)

    def check(actual, expected):
        for a, e in zip(actual[2:], expected[2:], strict=True):
            compare(a, e)

    whole = gradients(lambda t: t)
    assert whole[2].abs().amax(-1).gt(0).all() and whole[3].abs().amax(-1).gt(0).all()
    for a, e in zip(gradients(lambda t: t), whole, strict=True):
        assert_bitwise_equal(a, e)
    check(gradients(lambda t: t.flip(0)), [w.flip(0) if w.dim() == 2 else w for w in whole])
    last = [w[-1:] if w.dim() == 2 else w for w in whole]
    check(gradients(lambda t: t[-1:]), last)
    check([g[..., 1:2, :] if g.dim() == 2 else g for g in gradients(lambda t: t[[0, 2, 1]])], last)
    # Padding behind the end, masked.
    wide = gradients(lambda t: torch.nn.functional.pad(t, (0, 1031)))
    check([g[:, :cols] if g.dim() == 2 else g for g in wide], whole)
    # Packed, without what lies behind its end and at odd places.
    lengths = torch.tensor([700, 0, cols])
    inside = torch.arange(cols) < lengths[:, None]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths.tolist())])
    packed = gradients(lambda t: t[inside], cu_seqlens=cu_seqlens)
    padded = gradients(lambda t: t & inside if t.dtype is torch.bool else t)
    check(packed, [p[inside] if p.dim() == 2 else p for p in padded])


@pytest.mark.parametrize("aggregation", policy_config.AGGREGATIONS)
def test_micro_batches_add_up(backend, aggregation):
    args, options = make_inputs(9, 150)
    counts = {"token-mean": int(args[3].sum()), "constant": 9 * 150}
    normalizer = counts.get(aggregation, int(args[3].any(-1).sum()))
    compare = same(backend)
    part = policy_config.AGGREGATIONS.index(aggregation)
    for base in portion(backend, BASES, part, 4):
        config = make_config(base, aggregation, CORRECTIONS[1], "k3+", False)
        whole = run(rk.policy_loss, args, options, config=config, normalizer=normalizer)
        if aggregation != "constant":
            default = run(rk.policy_loss, args, options, config=config)
            torch.testing.assert_close(default[0], whole[0])
        total = 0.0
        for rows, divisor in (
            (slice(0, 2), normalizer),
            (slice(2, 3), float(normalizer)),
            (slice(3, 9), torch.tensor(normalizer)),
        ):
            part = tuple(t[rows].detach().requires_grad_(t.requires_grad) for t in args)
            rest = {k: v[rows].detach().requires_grad_(v.requires_grad) for k, v in options.items()}
            one = run(rk.policy_loss, part, rest, config=config, normalizer=divisor)
            total += one[0].item()
            compare(one[2], whole[2][rows])
            compare(one[3], whole[3][rows])
        # The terms are of size 1 and may cancel.
        size = 150 if aggregation == "seq-mean-token-sum" else 1
        assert total == pytest.approx(whole[0].item(), rel=1e-5, abs=1e-6 * size)


def test_views_equal_contiguous(backend):
    args, options = make_inputs(7, 65)
    compare = same(backend)
    views = (
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1).reshape(7, -1)[:, ::2],
    )
    for base, view in itertools.product(({}, {"ratio_level": "sequence"}), views):
        config = Config(**base, **EVERYTHING)
        expected = run(rk.policy_loss, args, options, config=config)
        moved = [view(t.detach()).requires_grad_(t.requires_grad) for t in args]
        assert not moved[0].is_contiguous()
        others = {k: view(v.detach()).requires_grad_(v.requires_grad) for k, v in options.items()}
        for a, b in zip(run(rk.policy_loss, moved, others, config=config), expected, strict=True):
            compare(a.contiguous(), b)
    # One row for all: stride 0.
    expanded = args[1][:1].expand(7, 65)
    expected = run(rk.policy_loss, (args[0], expanded.contiguous(), *args[2:]), options)
    actual = run(rk.policy_loss, (args[0], expanded, *args[2:]), options)
    assert_bitwise_equal(actual[2], expected[2])
    # A lazily negated view.
    negated = torch.complex(torch.zeros(7, 65), -args[1]).conj().imag
    assert negated.is_neg()
    actual = run(rk.policy_loss, (args[0], negated, *args[2:]), options)
    assert_bitwise_equal(actual[2], run(rk.policy_loss, args, options)[2])


def test_upstream_gradients_and_repeated_backward(backend):
    args, options = make_inputs(4, 50)
    config = Config(entropy_coef=0.1)
    whole = run(rk.policy_loss, args, options, config=config)
    loss = rk.policy_loss(*args, **options, config=config).loss
    upstream = torch.tensor([2.0]).expand(3)[1]
    for _ in range(2):
        (g,) = torch.autograd.grad(loss, args[0], upstream, retain_graph=True)
        assert_bitwise_equal(g, 2 * whole[2])
    # The saved gradient survives a leaf that accumulates.
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(args[0].grad, times * whole[2])


def test_who_requires_grad(backend):
    args, options = make_inputs(4, 50)
    config = Config(entropy_coef=0.1)
    whole = run(rk.policy_loss, args, options, config=config)
    fixed, fixed_entropy = args[0].detach(), options["entropy"].detach()
    loss = rk.policy_loss(fixed, *args[1:], **options, config=config).loss
    assert_bitwise_equal(loss.detach(), whole[0])
    (g,) = torch.autograd.grad(loss, options["entropy"])
    assert_bitwise_equal(g, whole[3])
    rest = options | {"entropy": fixed_entropy}
    loss = rk.policy_loss(*args, **rest, config=config).loss
    assert_bitwise_equal(torch.autograd.grad(loss, args[0])[0], whole[2])
    assert not rk.policy_loss(fixed, *args[1:], **rest, config=config).loss.requires_grad
    with torch.no_grad():
        quiet = rk.policy_loss(*args, **options, config=config).loss
    assert_bitwise_equal(quiet, whole[0])
    with torch.inference_mode():
        assert_bitwise_equal(rk.policy_loss(*args, **options, config=config).loss, whole[0])
    # Constants stay constant even if they require grad.
    old = args[1].clone().requires_grad_()
    loss = rk.policy_loss(args[0], old, *args[2:]).loss
    assert torch.autograd.grad(loss, old, allow_unused=True)[0] is None


def test_metrics(backend):
    args, options = make_inputs(4, 50)
    metrics = rk.policy_loss(*args, **options).metrics
    assert metrics.fields == METRICS and metrics.values.shape == (len(METRICS),)
    assert metrics.values.dtype is torch.float32 and not metrics.values.requires_grad
    assert metrics.as_dict() == {name: metrics[name].item() for name in METRICS}
    assert metrics["tokens"] == args[3].sum()
    bare = rk.policy_loss(*args).metrics
    assert bare["correction_mean"] == 1 and bare["entropy"] == 0 and bare["k3_ref"] == 0
    assert metrics["correction_mean"] != 1 and metrics["entropy"] > 0 and metrics["k3_ref"] > 0
    with pytest.raises(ValueError):
        metrics["no_such_metric"]


@pytest.mark.parametrize("shape", ((3, 20000), (70, 600)))
def test_threads_do_not_change_bits(shape):
    args, options = make_inputs(*shape)
    config = Config(**EVERYTHING, ratio_level="sequence", aggregation="seq-mean-token-mean")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(rk.policy_loss, args, options, config=config))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("kernels", KERNELS)
def test_opcheck(kernels):
    args, options = make_inputs(3, 20)
    config = Config(**EVERYTHING)
    inputs = [t.detach() for t in (*args, *options.values())]
    lists = list(config._codes), list(config._params)
    op = torch.ops.rlhf_kernels.policy_loss.default
    for grads in ((True, True), (False, False)):
        torch.library.opcheck(op, (*inputs, None, None, 0.0, *lists, *grads, kernels))
    strided = [t.t().contiguous().t() for t in inputs]
    torch.library.opcheck(op, (*strided, None, torch.tensor(5.0), 0.0, *lists, True, True, kernels))


def test_opcheck_of_the_backward():
    first, second = torch.randn(3, 20), torch.randn(3, 20)
    scalars = torch.tensor(0.1), torch.tensor(2.0)
    op = torch.ops.rlhf_kernels.loss_backward.default
    for other, dtypes in ((second, (torch.float32, torch.bfloat16)), (None, (torch.float16,) * 2)):
        torch.library.opcheck(op, (first, other, *scalars, *dtypes, "triton"))


@pytest.mark.parametrize(
    "config, forward",
    [
        (Config(), ["policy", "combine"]),
        (Config.rloo(**EVERYTHING), ["policy", "combine"]),
        (Config.grpo(), ["statistics", "policy", "combine"]),
        (Config(**EVERYTHING, **CORRECTIONS[3]), ["statistics", "policy", "combine"]),
        (Config(ratio_level="sequence-token"), ["statistics", "policy", "combine"]),
        (Config.gspo(**EVERYTHING), ["statistics", "policy", "pooled", "combine"]),
    ],
)
def test_launches_of_the_triton_backend(monkeypatch, config, forward):
    from rlhf_kernels.triton import policy

    launched, launch = [], policy.launch

    def listen(kernel, *args, **options):
        launched.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *args, **options)

    monkeypatch.setattr(policy, "launch", listen)
    args, options = make_inputs(3, 1100)
    with rk.use_backend("triton"):
        loss = rk.policy_loss(*args, **options, config=config).loss
        assert launched == forward
        torch.autograd.grad(loss, (args[0], options["entropy"]), allow_unused=True)
        assert launched == [*forward, "backward"]


def test_bad_data_poisons_the_triton_backend(monkeypatch):
    args, options = make_inputs(3, 8)
    flat = [t.detach().reshape(-1) for t in args]
    config = Config(entropy_coef=0.1)
    bad = [([0, 8, 20], 1.0), ([1, 8, 24], 1.0), ([0, 30, 24], 1.0), ([0, 16, 8, 24], 1.0)]
    bad += [([-5, 8, 24], 1.0), ([0, 2**40, 24], 1.0), ([24, 0, 24], 1.0)]
    bad += [([0, 24], v) for v in (0.0, -1.0, math.nan, math.inf)]
    for offsets, divisor in bad:
        inputs = [t.clone() for t in flat]
        entropy = options["entropy"].detach().reshape(-1).requires_grad_()
        inputs[0].requires_grad_()
        extra = {
            "entropy": entropy,
            "cu_seqlens": torch.tensor(offsets),
            "normalizer": torch.tensor(divisor),
            "config": config,
        }
        with rk.use_backend("triton"):
            loss, metrics = rk.policy_loss(*inputs, **extra)
            gradients = torch.autograd.grad(loss, (inputs[0], entropy))
            assert loss.isnan() and metrics.values.isnan().all(), (offsets, divisor)
            assert all(g.isnan().all() for g in gradients)
            with monkeypatch.context() as patch:
                patch.setattr(_config, "CHECK", True)
                with pytest.raises(ValueError, match=r"cu_seqlens must|normalizer must"):
                    rk.policy_loss(*inputs, **extra)


def test_compile_without_graph_breaks(backend):
    config = Config(**EVERYTHING)
    compiles = 0

    def count(module, _):
        nonlocal compiles
        compiles += 1
        return module.forward

    def step(logprobs, old, advantages, mask, ref, entropy):
        loss, metrics = rk.policy_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, entropy=entropy, config=config
        )
        return 1.5 * loss, metrics["k3_ref"], metrics.values

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    traced = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for cols in (5, 16, 33, 100, 700):
        args, options = make_inputs(4, cols)
        inputs = (*args, options["ref_logprobs"], options["entropy"])
        expected = step(*inputs)
        g = torch.autograd.grad(expected[0], (args[0], options["entropy"]))
        compiled(*inputs)
        actual = traced(*inputs)
        h = torch.autograd.grad(actual[0], (args[0], options["entropy"]))
        for a, b in zip((*actual, *h), (*expected, *g), strict=True):
            assert_bitwise_equal(a, b)
    assert compiles <= 2


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 540),
    seed=st.integers(0, 2**20),
    keep=st.sampled_from((0.0, 0.3, 0.9, 1.0)),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(BASES),
    aggregation=st.sampled_from(policy_config.AGGREGATIONS),
    correction=st.sampled_from(CORRECTIONS),
    estimator=st.sampled_from(policy_config.KL_ESTIMATORS),
    weighted=st.booleans(),
)
def test_fuzz(
    kernels, rows, cols, seed, keep, dtype, base, aggregation, correction, estimator, weighted
):
    args, options = make_inputs(rows, cols, dtype, seed=seed, keep=keep)
    config = make_config(base, aggregation, correction, estimator, weighted)
    with rk.use_backend(kernels):
        actual = run(rk.policy_loss, args, options, config=config)
    expected = run(reference.policy_loss, args, options, config=config)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=2e-5, atol=2e-5)
    # Terms of the size of the weights may cancel: |x| and x of abs+ do so exactly, to a rounding.
    weight = token_weights(args[3], aggregation, config.normalizer, torch.float32, None).max()
    for a, b in zip(actual[2:], expected[2:], strict=True):
        tolerance = 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-5
        atol = tolerance * float(b.float().abs().max()) + 1e-6 * float(weight)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective"),
        ({"ratio_level": "batch"}, "ratio_level"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"correction_level": "row", "correction_max": 2.0}, "correction_level"),
        ({"correction_mode": "drop"}, "correction_mode"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_low": 2.0, "clip_high": 1.0, "clip_absolute": True}, "clip_low"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"clip_high": "0.2"}, "clip_high"),
        ({"clip_absolute": 1}, "clip_absolute"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip"),
        ({"delta": 1.1}, "delta"),
        ({"delta": 2.0, "clip_high": None}, "delta"),
        ({"penalty_coef": 1.0}, "penalty_coef"),
        ({"objective": "reinforce", "ratio_level": "sequence"}, "ratio_level"),
        ({"sapo_tau_pos": 0.0}, "sapo_tau_pos"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_input_clamp": 0.0}, "kl_input_clamp"),
        ({"log_ratio_clamp": (1.0, 2.0)}, "log_ratio_clamp"),
        ({"kl_value_clamp": -1.0}, "kl_value_clamp"),
        ({"entropy_coef": True}, "entropy_coef"),
        ({"correction_max": 2.0}, "correction_level"),
        ({"correction_level": "token"}, "correction_max"),
        (
            {"correction_level": "token", "correction_min": 2.0, "correction_max": 1.0},
            "correction_min",
        ),
        ({"normalizer": 0.0}, "normalizer"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=f"PolicyLossConfig: {message} must be"):
        Config(**options)


def test_bad_arguments_raise(backend, monkeypatch):
    # Where data would not be looked at: test_bad_data_poisons_the_triton_backend.
    monkeypatch.setattr(_config, "CHECK", True)
    args, _ = make_inputs(3, 8)
    logprobs, old, advantages, mask = args
    for bad, error, message in (
        ((logprobs, old[:, 1:], advantages, mask), ValueError, "old_logprobs must have the shape"),
        ((logprobs, old, advantages[0], mask), ValueError, "advantages must have the shape"),
        ((logprobs, old, advantages, mask.float()), TypeError, r"mask\.bool\(\)"),
        ((logprobs, old, advantages, mask[:2]), ValueError, "mask must have the shape"),
        ((logprobs.long(), old, advantages, mask), TypeError, "logprobs must be one of"),
        ((logprobs[0], old[0], advantages[0], mask[0]), ValueError, r"logprobs must be \[B, T\]"),
        ((logprobs, old.tolist(), advantages, mask), TypeError, "old_logprobs must be a Tensor"),
        ((logprobs, old.to("meta"), advantages, mask), ValueError, "device"),
    ):
        with pytest.raises(error, match=message):
            rk.policy_loss(*bad)
    for config, message in (
        (Config(kl_coef=0.1), "ref_logprobs must be given"),
        (Config(entropy_coef=0.1), "entropy must be given"),
        (Config(correction_level="token", correction_max=2.0), "rollout_logprobs must be given"),
        (Config.dr_grpo(), "normalizer must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.policy_loss(*args, config=config)
    with pytest.raises(TypeError, match="config must be a PolicyLossConfig"):
        rk.policy_loss(*args, config={"objective": "clip"})
    for bad in (0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0]), torch.tensor(math.inf)):
        with pytest.raises(ValueError, match="normalizer must be"):
            rk.policy_loss(*args, normalizer=bad)
    flat = [t.detach().reshape(-1) for t in args]
    for offsets, error in (
        ([0, 8, 20], ValueError),
        ([1, 8, 24], ValueError),
        ([0, 30, 24], ValueError),
        ([0, 16, 8, 24], ValueError),
        ([[0, 24]], ValueError),
        ([0.0, 24.0], TypeError),
    ):
        with pytest.raises(error, match="cu_seqlens"):
            rk.policy_loss(*flat, cu_seqlens=torch.tensor(offsets))


def test_fp64_only_on_the_reference():
    wide = to_float64(make_inputs(3, 8)[0])
    with rk.use_backend("reference"):
        assert rk.policy_loss(*wide).loss.dtype is torch.float64
    with rk.use_backend("cpu"), pytest.raises(TypeError, match="logprobs must be one of float32"):
        rk.policy_loss(*wide)
