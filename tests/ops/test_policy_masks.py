"""policy_loss on every backend: masks, packed sequences, invariance, views, who wants gradients."""

import itertools
import math

import pytest
import torch

from tests.ops.bits import VIEWS, same
from tests.ops.policy_cases import (
    BASES,
    CORRECTIONS,
    EVERYTHING,
    Config,
    make_config,
    make_inputs,
    portion,
    run,
)

import rlhf_kernels as rk
from rlhf_kernels.config import enums
from rlhf_kernels.config.metrics import POLICY_METRICS
from rlhf_kernels.testing import assert_bitwise_equal


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
    loss, metrics = rk.policy_loss(broken, *args[1:3], mask=args[3])
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
    loss, metrics = rk.policy_loss(logprobs, logprobs.detach(), torch.zeros(shape[:1]), mask=mask)
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


@pytest.mark.parametrize("aggregation", enums.AGGREGATIONS)
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
    part = enums.AGGREGATIONS.index(aggregation)
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
    # A row spans several tiles of Triton's kernels and several pieces of the CPU's.
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


@pytest.mark.parametrize("aggregation", enums.AGGREGATIONS)
def test_micro_batches_add_up(backend, aggregation):
    args, options = make_inputs(9, 150)
    counts = {"token-mean": int(args[3].sum()), "constant": 9 * 150}
    normalizer = counts.get(aggregation, int(args[3].any(-1).sum()))
    compare = same(backend)
    part = enums.AGGREGATIONS.index(aggregation)
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
    for base, view in itertools.product(({}, {"ratio_level": "sequence"}), VIEWS):
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
    loss = rk.policy_loss(*args[:3], mask=args[3], **options, config=config).loss
    upstream = torch.tensor([2.0]).expand(3)[1]
    for _ in range(2):
        (g,) = torch.autograd.grad(loss, args[0], upstream, retain_graph=True)
        assert_bitwise_equal(g, 2 * whole[2])
    # Nor does it share memory with a gradient that was handed out.
    for _ in range(2):
        (g,) = torch.autograd.grad(loss, args[0], retain_graph=True)
        assert_bitwise_equal(g, whole[2])
        g.mul_(7)
    # The saved gradient survives a leaf that accumulates.
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(args[0].grad, times * whole[2])


def test_who_requires_grad(backend):
    args, options = make_inputs(4, 50)
    config = Config(entropy_coef=0.1)
    whole = run(rk.policy_loss, args, options, config=config)
    fixed, fixed_entropy = args[0].detach(), options["entropy"].detach()
    loss = rk.policy_loss(fixed, *args[1:3], mask=args[3], **options, config=config).loss
    assert_bitwise_equal(loss.detach(), whole[0])
    (g,) = torch.autograd.grad(loss, options["entropy"])
    assert_bitwise_equal(g, whole[3])
    rest = options | {"entropy": fixed_entropy}
    loss = rk.policy_loss(*args[:3], mask=args[3], **rest, config=config).loss
    assert_bitwise_equal(torch.autograd.grad(loss, args[0])[0], whole[2])
    assert not rk.policy_loss(
        fixed, *args[1:3], mask=args[3], **rest, config=config
    ).loss.requires_grad
    with torch.no_grad():
        quiet = rk.policy_loss(*args[:3], mask=args[3], **options, config=config).loss
    assert_bitwise_equal(quiet, whole[0])
    with torch.inference_mode():
        assert_bitwise_equal(
            rk.policy_loss(*args[:3], mask=args[3], **options, config=config).loss, whole[0]
        )
    # Constants stay constant even if they require grad.
    old = args[1].clone().requires_grad_()
    loss = rk.policy_loss(args[0], old, args[2], mask=args[3]).loss
    assert torch.autograd.grad(loss, old, allow_unused=True)[0] is None


def test_metrics(backend):
    args, options = make_inputs(4, 50)
    metrics = rk.policy_loss(*args[:3], mask=args[3], **options).metrics
    assert tuple(metrics) == POLICY_METRICS and metrics.tensor.shape == (len(POLICY_METRICS),)
    assert metrics.tensor.dtype is torch.float32 and not metrics.tensor.requires_grad
    assert metrics.as_dict() == {name: metrics[name].item() for name in POLICY_METRICS}
    assert metrics["tokens"] == args[3].sum()
    bare = rk.policy_loss(*args[:3], mask=args[3]).metrics
    assert bare["correction_mean"] == 1 and bare["entropy"] == 0 and bare["k3_ref"] == 0
    assert metrics["correction_mean"] != 1 and metrics["entropy"] > 0 and metrics["k3_ref"] > 0
