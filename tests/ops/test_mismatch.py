"""mismatch_weights on every backend."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.bits import BAD_BATCHES, check_compiled, check_threads, same
from tests.ops.mismatch_cases import NAN, OPTIONS, by_loops, make_inputs, packed

import rlhf_kernels as rk
from rlhf_kernels.config.enums import MISMATCH_LEVELS
from rlhf_kernels.config.metrics import MISMATCH_METRICS
from rlhf_kernels.config.mismatch import CRITERIA, PRESETS
from rlhf_kernels.ops.mismatch_options import encoded
from rlhf_kernels.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_within_budget,
    to_float64,
)

LEVELS = (None, *MISMATCH_LEVELS)


def of_reference(args, **options):
    with rk.use_backend("reference"):
        return rk.mismatch_weights(*args, **options)


def magnitude(args, level):
    """The relative error that the rounding of sums of log-ratios makes of a weight."""
    old, rollout, mask = to_float64(args)
    x = torch.where(mask, (old - rollout).abs(), 0).sum(-1)
    return 1 + x.max().item() if level in ("sequence", "geometric") else 1.0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_loops_over_tokens(backend, options):
    for seed in (0, 1):
        args = make_inputs(6, 13, seed=seed)
        args[2][2] = False
        weights, kept, metrics = by_loops(*(t.tolist() for t in args), **options)
        found = rk.mismatch_weights(*args, **options)
        assert found.mask.tolist() == kept
        assert found.weights.dtype is torch.float32
        torch.testing.assert_close(found.weights, torch.tensor(weights), rtol=2e-6, atol=0)
        for name, value in found.metrics.as_dict().items():
            assert value == pytest.approx(metrics[name], rel=1e-5, abs=2e-6), name


def test_the_options_of_the_tests_do_something():
    rejecting, criteria, levels = 0, set(), set()
    for options in OPTIONS:
        metrics = of_reference(make_inputs(6, 13), **options).metrics.as_dict()
        bounded = metrics["fraction_low"] + metrics["fraction_high"] > 0
        assert bounded or ("low" not in options and "high" not in options), options
        rejects = 0 < metrics["rejected"] < 1
        assert rejects or not options.get("reject"), options
        rejecting += rejects
        criteria |= set(options.get("reject", ()))
        levels.add(options.get("level"))
    assert rejecting > 8 and criteria == set(CRITERIA) and levels == set(LEVELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_matches_fp64(backend, level, dtype):
    for cols, spread in ((1, 0.1), (16, 0.01), (37, 0.3), (512, 0.02), (2100, 0.001)):
        args = make_inputs(5, cols, dtype, spread=spread)
        args[2][0, 0] = True
        bound = {} if level is None else {"low": 0.999, "high": 1.1}
        for options in ({}, bound, {"normalize": True, "reject": {"seq_mean_k2": spread**2 / 2}}):
            if cols == 1 and "reject" in options:
                continue
            found = rk.mismatch_weights(*args, level=level, **options)
            plain = of_reference(args, level=level, **options)
            oracle = of_reference(to_float64(args), level=level, **options)
            assert torch.equal(found.mask, oracle.mask)
            scale = magnitude(args, level)
            assert_within_budget(
                found.weights, oracle.weights, plain.weights, scale=oracle.weights * scale
            )
            # Sums of numbers of both signs, and of squares about their mean.
            assert_within_budget(
                found.metrics.tensor, oracle.metrics.tensor, plain.metrics.tensor,
                scale=oracle.metrics.tensor.abs() + scale,
            )  # fmt: skip


def test_small_mismatches_keep_their_digits(backend):
    """Deviations of 1e-4, whose squares fp32 sums of ratios near 1 would lose."""
    args = make_inputs(4, 900, spread=1e-4)
    found = rk.mismatch_weights(*args, level="token").metrics
    oracle = of_reference(to_float64(args), level="token").metrics
    for name in ("weight_std", "chi2_token", "k3_kl"):
        assert found[name].item() == pytest.approx(oracle[name].item(), rel=1e-3), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", (NAN, math.inf, -math.inf))
def test_what_lies_under_the_mask_changes_nothing(backend, level, bad):
    args = make_inputs(4, 600)
    mask = args[2]
    options = {"level": level, "normalize": True, "veto": 0.8}
    clean = rk.mismatch_weights(*args, **options)
    for pair in ((bad, bad), (bad, 0.0), (0.0, bad)):
        spoiled = [torch.where(mask, t, x) for t, x in zip(args[:2], pair, strict=True)]
        dirty = rk.mismatch_weights(*spoiled, mask, **options)
        for a, b in zip(dirty[:2], clean[:2], strict=True):
            assert_bitwise_equal(a, b)
        assert_bitwise_equal(dirty.metrics.tensor, clean.metrics.tensor)
    assert clean.weights[~mask].eq(0).all() and not clean.mask[~mask].any()


def test_missing_ratios(backend):
    old, rollout, mask = make_inputs(4, 40)
    mask[:] = True
    mask[3, 5:] = False
    rollout[0, 3] = rollout[2, 7] = rollout[3, 8] = NAN
    old[1, 4] = rollout[1, 4] = -math.inf
    with pytest.raises(ValueError, match="3 of them have no ratio, the first at flat position 3"):
        rk.mismatch_weights(old, rollout, mask, level="token")
    lost = torch.zeros_like(mask)
    lost[0, 3] = lost[2, 7] = lost[1, 4] = True
    compare = same(backend)
    for level in LEVELS:
        one = rk.mismatch_weights(old, rollout, mask, level=level, missing="one")
        filled = torch.where(lost, old, rollout)
        finite = torch.where(lost & old.isinf(), -1.0, old)
        same_one = rk.mismatch_weights(finite, torch.where(lost, finite, filled), mask, level=level)
        compare(one.weights, same_one.weights)
        assert torch.equal(one.mask, mask)
        if level == "token":
            assert one.weights[lost].eq(1).all()
        drop = rk.mismatch_weights(old, rollout, mask, level=level, missing="drop")
        without = rk.mismatch_weights(old, rollout, mask & ~lost, level=level)
        compare(drop.weights, without.weights)
        assert torch.equal(drop.mask, mask & ~lost)
        assert (one.metrics["missing"], drop.metrics["missing"]) == (3, 3)
        ours, theirs = drop.metrics.as_dict(), without.metrics.as_dict()
        assert ours | {"missing": 0.0} == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("missing", ("raise", "one", "drop"))
@pytest.mark.parametrize("level", LEVELS)
def test_nan_of_the_trainer_shows_at_the_same_places_everywhere(backend, level, missing):
    for also_rollout in (False, True):
        old, rollout, mask = make_inputs(3, 20)
        mask[:] = True
        old[1, 2] = NAN
        if also_rollout:
            rollout[1, 2] = NAN
        options = {"level": level, "missing": missing, "veto": 0.01}
        found = rk.mismatch_weights(old, rollout, mask, **options)
        where = torch.zeros_like(mask)
        if level is not None:
            where[1] = True
        if level == "token":
            where[1] = torch.arange(20) == 2
        assert torch.equal(found.weights.isnan(), where) and found.mask.all()
        with rk.use_backend("cpu"):
            rule = rk.mismatch_weights(old, rollout, mask, **options)
        assert torch.equal(found.metrics.tensor.isnan(), rule.metrics.tensor.isnan())
        assert found.metrics["kl"].isnan() and found.metrics["weight_mean"].isnan() == where.any()


def test_ratios_that_leave_the_range_of_floats(backend):
    x = torch.tensor([[0.0, 88.0, 89.0, 100.0, 1e4, -87.0, -90.0, -103.0, -105.0, -1e4]])
    x = torch.cat([x, torch.tensor([[math.inf, -math.inf] * 5])])
    old, rollout = x.clamp(max=0), -x.clamp(min=0)
    mask = torch.ones_like(x, dtype=torch.bool)

    def weights(**options):
        return rk.mismatch_weights(old, rollout, mask, **options).weights

    exact = x.double().exp().float()
    found = weights(level="token")
    assert found.isinf().tolist() == exact.isinf().tolist()
    finite = ~exact.isinf()
    # One unit of the smallest numbers.
    torch.testing.assert_close(found[finite], exact[finite], rtol=1e-6, atol=1.5e-45)
    assert found[0, 5] > 0 and found[0, 6] > 0 and found[0, 8] == found[0, 9] == 0
    assert weights(level="token", high=2.0).eq(torch.where(x > 0, 2.0, exact)).all()
    low = weights(level="token", low=0.5, high=2.0)
    assert low.eq(torch.where(x > 0, 2.0, torch.where(x < 0, 0.5, 1.0))).all()
    masked = weights(level="token", mode="mask", low=0.5, high=2.0)
    assert masked.eq(torch.where(x == 0, 1.0, 0.0)).all()
    clamped = weights(level="token", log_ratio_clamp=20.0)
    torch.testing.assert_close(clamped, x.clamp(-20, 20).exp(), rtol=1e-6, atol=0)
    # Infinities of both signs cancel, as finite numbers would.
    assert weights(level="sequence")[1].eq(1).all()
    assert weights(level="sequence-max").isinf().all()
    assert weights(level="sequence-mean").isinf().all()
    assert weights(level="sequence", log_ratio_clamp=20.0)[1].eq(1).all()


def test_all_masked_and_empty(backend):
    old, rollout, mask = make_inputs(3, 20)
    nothing = {n: float(n == "norm_factor") for n in MISMATCH_METRICS}
    for level in LEVELS:
        found = rk.mismatch_weights(old, rollout, torch.zeros_like(mask), level=level)
        assert found.metrics.as_dict() == nothing
        assert found.weights.eq(0).all() and not found.mask.any()
        for shape in ((0, 4), (4, 0)):
            empty = torch.zeros(shape)
            found = rk.mismatch_weights(
                empty, empty, empty.bool(), level=level, normalize=True, veto=0.5
            )
            assert found.weights.shape == shape and found.metrics.as_dict() == nothing
        for offsets in ([0], [0, 0, 0]):
            empty = torch.zeros(0)
            cu_seqlens = torch.tensor(offsets)
            found = rk.mismatch_weights(
                empty, empty, empty.bool(), level=level, cu_seqlens=cu_seqlens
            )
            assert found.weights.shape == (0,) and found.metrics.as_dict() == nothing


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_equals_padded(backend, options):
    args = make_inputs(6, 700)
    flat, cu_seqlens, inside = packed(args, [700, 0, 1, 33, 512, 700])
    compare = same(backend)
    padded = rk.mismatch_weights(*args[:2], args[2] & inside, **options)
    for offsets in (cu_seqlens, cu_seqlens.int()):
        found = rk.mismatch_weights(*flat, cu_seqlens=offsets, **options)
        assert torch.equal(found.mask, padded.mask[inside])
        if "normalize" not in options:
            compare(found.weights, padded.weights[inside])
        torch.testing.assert_close(found.weights, padded.weights[inside])
        torch.testing.assert_close(
            found.metrics.tensor, padded.metrics.tensor, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("level", LEVELS)
def test_as_many_sequences_as_tokens_are_no_tokens(backend, level):
    """An empty sequence makes up for one of two tokens."""
    old, rollout, mask = make_inputs(1, 3, keep=1.0)
    options = {"level": level, "reject": {"seq_sum_k2": 4e-4}}
    found = rk.mismatch_weights(old[0], rollout[0], mask[0], **options,
                                cu_seqlens=torch.tensor([0, 2, 2, 3]))  # fmt: skip
    inside = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    padded = [t[0].new_zeros(3, 3).masked_scatter(inside, t[0]) for t in (old, rollout)]
    expected = rk.mismatch_weights(*padded, inside, **options)
    same(backend)(found.weights, expected.weights[inside])
    assert torch.equal(found.mask, expected.mask[inside])
    assert found.mask.any() and not found.mask.all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_does_not_depend_on_its_surroundings(backend, level):
    # A row spans several tiles of Triton's and CUDA's kernels, and on the CPU several pieces.
    rows, cols = 3, 17000 if backend == "cpu" else 2100
    args = make_inputs(rows, cols, spread=0.01)
    args[2][-1] = args[2][0].flip(0)
    compare = same(backend)

    def weights(change, **more):
        options = {"level": level, "reject": {"token_k2": 2e-4, "seq_mean_k3": 1e-4}}
        return rk.mismatch_weights(*map(change, args), **options, **more).weights

    whole = weights(lambda t: t)
    assert whole.gt(0).any(-1).all()
    compare(weights(lambda t: t.flip(0)), whole.flip(0))
    compare(weights(lambda t: t[-1:]), whole[-1:])
    compare(weights(lambda t: t[[0, 2, 1]])[1], whole[2])
    compare(weights(lambda t: torch.nn.functional.pad(t, (0, 1031)))[:, :cols], whole)
    compare(weights(lambda t: torch.stack([t, t], -1).reshape(rows, -1)[:, ::2]), whole)
    compare(weights(lambda t: t.t().contiguous().t()), whole)
    compare(weights(lambda t: torch.cat([t[:, :1], t], 1)[:, 1:]), whole)
    lengths = [700, 0, cols]
    flat, cu_seqlens, inside = packed(args, lengths)
    alone = weights(lambda t: t & inside if t.dtype is torch.bool else t)
    found = rk.mismatch_weights(
        *flat, level=level, cu_seqlens=cu_seqlens,
        reject={"token_k2": 2e-4, "seq_mean_k3": 1e-4},
    )  # fmt: skip
    compare(found.weights, alone[inside])


def test_masks_of_all_dtypes_and_gradients(backend):
    old, rollout, mask = make_inputs(7, 65)
    expected = rk.mismatch_weights(old, rollout, mask, level="sequence")
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        found = rk.mismatch_weights(old, rollout, 3 * mask.to(dtype), level="sequence")
        assert_bitwise_equal(found.weights, expected.weights)
        assert torch.equal(found.mask, expected.mask)
    found = rk.mismatch_weights(old, rollout, mask.float(), level="sequence")
    assert_bitwise_equal(found.weights, expected.weights)
    wanted = [t.clone().requires_grad_() for t in (old, rollout)]
    found = rk.mismatch_weights(*wanted, mask, level="sequence")
    assert not any(t.requires_grad for t in (*found[:2], found.metrics.tensor))
    assert_bitwise_equal(found.weights, expected.weights)


@pytest.mark.parametrize("shape", ((3, 40000), (600, 90)))
def test_threads_do_not_change_bits(shape):
    args = make_inputs(*shape)
    options = {"level": "sequence-mean", "normalize": True, "reject": {"seq_mean_k2": 5e-3}}

    def run():
        found = rk.mismatch_weights(*args, **options)
        return *found[:2], found.metrics.tensor

    check_threads(run)


def test_presets_are_their_options(backend):
    args = make_inputs(6, 40)
    for name, options in PRESETS.items():
        found, spelt = (
            rk.mismatch_weights(*args, preset=name),
            rk.mismatch_weights(*args, **options),
        )
        assert_bitwise_equal(found.weights, spelt.weights)
        assert torch.equal(found.mask, spelt.mask)
    tighter = rk.mismatch_weights(*args, preset="tis", high=1.01)
    assert tighter.weights.max() == torch.tensor(1.01)


def test_the_presets_by_their_formulas(backend):
    old, rollout, mask = make_inputs(8, 30, spread=0.6)
    ratio, zero = (old - rollout).exp(), torch.zeros(())
    total = torch.where(mask, old - rollout, 0).sum(-1, keepdim=True)
    mean = (total / mask.sum(-1, keepdim=True)).exp()
    expected = {
        "tis": ratio.clamp(max=2),
        "icepop": torch.where((ratio >= 0.5) & (ratio <= 5), ratio, zero),
        "mis": torch.where(total.exp() <= 2, total.exp(), zero),
        "seq-mask-tis": torch.where((mean >= 0.5) & (mean <= 5), ratio, zero),
    }
    for name, weights in expected.items():
        found = rk.mismatch_weights(old, rollout, mask, preset=name).weights
        torch.testing.assert_close(found, torch.where(mask, weights, zero), rtol=2e-5, atol=0)
    harsh = rk.mismatch_weights(
        old, rollout, mask, preset="seq-mask-tis", reject={"seq_mean_ratio": (0.95, 1.1)}
    )
    assert_bitwise_equal(harsh.mask, mask & (mean >= 0.95) & (mean <= 1.1))
    assert 0 < harsh.mask.sum() < mask.sum()


@pytest.mark.parametrize("kernels", ("cpu", "triton"))
def test_opcheck(kernels):
    old, rollout, mask = make_inputs(3, 20)
    op = torch.ops.rlhf_kernels.mismatch_weights.default
    for level in ("token", "sequence"):
        level, mode, params = encoded("x", level, "truncate", None, 2.0, None, 0.1, None)
        for normalize in (True, False):
            args = (old, rollout, mask, None, level, mode, False, normalize, list(params), kernels)
            torch.library.opcheck(op, args)


def test_compile_without_graph_breaks(backend):
    def step(old, rollout, mask):
        found = rk.mismatch_weights(
            old, rollout, mask, preset="icepop", reject={"seq_mean_k3": 0.005}, missing="one"
        )
        return found.weights, found.mask, found.metrics["kl"]

    check_compiled(step, (make_inputs(4, cols) for cols in (5, 16, 33, 100, 700)))


def test_a_compiled_call_raises_for_a_missing_ratio(backend):
    def step(*args):
        return rk.mismatch_weights(*args, preset="tis").weights

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    old, rollout, mask = make_inputs(4, 20)
    assert_bitwise_equal(compiled(old, rollout, mask), step(old, rollout, mask))
    rollout[mask] = NAN
    with pytest.raises(RuntimeError, match="must not be NaN"):
        compiled(old, rollout, mask)


def test_meta_and_export(backend):
    if backend == "reference":
        args = [t.to("meta") for t in make_inputs(3, 8)]
        found = rk.mismatch_weights(*args, preset="tis")
        assert found.weights.shape == found.mask.shape == (3, 8) and found.weights.is_meta

    class Step(torch.nn.Module):
        def forward(self, old, rollout, mask):
            return rk.mismatch_weights(old, rollout, mask, preset="mis", missing="drop")

    args = make_inputs(3, 8)
    exported = torch.export.export(Step(), args).module()
    for a, b in zip(exported(*args)[:2], Step()(*args)[:2], strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 540),
    seed=st.integers(0, 2**20),
    keep=st.sampled_from((0.0, 0.3, 1.0)),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(LEVELS),
    mode=st.sampled_from(("truncate", "mask")),
    normalize=st.booleans(),
    missing=st.sampled_from(("one", "drop")),
    spread=st.sampled_from((1e-3, 0.1, 3.0)),
    clamp=st.sampled_from((None, 1.0, 20.0)),
)
def test_fuzz(
    kernels, rows, cols, seed, keep, dtype, level, mode, normalize, missing, spread, clamp
):
    old, rollout, mask = make_inputs(rows, cols, dtype, seed=seed, keep=keep, spread=spread)
    rollout[:, seed % cols] = NAN
    options = {"level": level, "normalize": normalize, "missing": missing, "log_ratio_clamp": clamp}
    if level is not None:
        # At a bound, rounding would decide: none is near the weight of a missing token, which is 1.
        options |= {"mode": mode, "high": 1.0 + 31 * spread}
    with rk.use_backend(kernels):
        found = rk.mismatch_weights(old, rollout, mask, **options)
    expected = of_reference((old, rollout, mask), **options)
    assert torch.equal(found.mask, expected.mask)
    tolerance = 1e-6 * (1 + spread * cols)
    torch.testing.assert_close(found.weights, expected.weights, rtol=tolerance, atol=1e-40)


def test_bad_offsets_poison_a_gpu():
    old, rollout, mask = (t.reshape(-1) for t in make_inputs(3, 8))
    for offsets in (offsets for offsets, normalizer in BAD_BATCHES if normalizer == 1.0):
        for level in LEVELS:
            with rk.use_backend("triton"):
                found = rk.mismatch_weights(
                    old, rollout, mask, level=level, cu_seqlens=torch.tensor(offsets), missing="one"
                )
            assert found.metrics.tensor.isnan().all() and found.weights.isnan().all(), offsets


BAD_OPTIONS = (
    ({"level": "tokens"}, ValueError, "level must be one of"),
    ({"level": 1}, TypeError, "level must be one of"),
    ({"mode": "clip"}, ValueError, "mode must be one of"),
    ({"level": "token", "low": -1.0}, ValueError, "low must be >= 0"),
    ({"level": "token", "high": 0.0}, ValueError, "high must be"),
    ({"level": "token", "high": math.inf}, ValueError, "high must be finite"),
    ({"level": "token", "low": 2.0, "high": 1.0}, ValueError, "low must be <= high"),
    ({"high": 2.0}, ValueError, "with level=None there are none"),
    ({"preset": "TIS"}, ValueError, "preset must be one of"),
    ({"missing": "zero"}, ValueError, "missing must be one of"),
    ({"normalize": 1}, TypeError, "normalize must be a bool"),
    ({"veto": 0.0}, ValueError, "veto must be"),
    ({"log_ratio_clamp": -20.0}, ValueError, "log_ratio_clamp must be"),
    ({"reject": {"k3": 1.0}}, ValueError, "reject must name criteria of token_ratio"),
    ({"reject": "token_k1"}, TypeError, "reject must map"),
    ({"reject": {"token_k3": (0.5, 1.0)}}, TypeError, r"reject\['token_k3'\] must be a number"),
    ({"reject": {"token_k2": 0.0}}, ValueError, r"reject\['token_k2'\] must be"),
    ({"reject": {"token_k1": 0.5}}, ValueError, "must be >= 1"),
    ({"reject": {"token_k1": (2.0, 0.5)}}, ValueError, "low <= high"),
    ({"reject": {"token_k1": (0.5, 1.0, 2.0)}}, ValueError, r"a number or \(low, high\)"),
    ({"reject": {"seq_max_ratio": (0.5, 2.0)}}, ValueError, "one number, of the largest"),
)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_bad_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        rk.mismatch_weights(*make_inputs(2, 4), **options)


def test_bad_arguments_raise(backend, monkeypatch):
    old, rollout, mask = make_inputs(3, 8)
    monkeypatch.setattr("rlhf_kernels.core.env.CHECK", True)
    for bad, error, message in (
        ((old, rollout[:, 1:], mask), ValueError, "rollout_logprobs must have the shape"),
        ((old, rollout, mask * 0.5), TypeError, r"mask\.bool\(\)"),
        ((old.int(), rollout, mask), TypeError, "old_logprobs must be one of"),
        ((old, None, mask), TypeError, "rollout_logprobs"),
        ((old[0], rollout[0], mask[0]), ValueError, r"old_logprobs must be \[B, T\]"),
    ):
        with pytest.raises(error, match=message):
            rk.mismatch_weights(*bad, level="token")
    if backend != "reference":
        with pytest.raises(TypeError, match="float64"):
            rk.mismatch_weights(old.double(), rollout.double(), mask)
    flat = [t.reshape(-1) for t in (old, rollout, mask)]
    for offsets in ([0, 8, 20], [1, 24], [0, 16, 8, 24]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            rk.mismatch_weights(*flat, cu_seqlens=torch.tensor(offsets))


def test_every_combination_of_level_and_mode_has_a_bound_that_acts(backend):
    args = make_inputs(6, 40)
    for level, mode in itertools.product(MISMATCH_LEVELS, ("truncate", "mask")):
        raw = rk.mismatch_weights(*args, level=level).weights
        bound = raw[raw > 0].median().item() * 1.0001
        found = rk.mismatch_weights(*args, level=level, mode=mode, high=bound).weights
        beyond = raw > bound
        assert beyond.any() and torch.equal(found[~beyond], raw[~beyond])
        assert found[beyond].eq(torch.tensor(bound if mode == "truncate" else 0.0)).all()
