"""The advantages on every backend: layouts, invariance, bad data, compilation."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.advantages_cases import MASK_DTYPES, assert_close, case, interpreted, oracle, size
from tests.ops.bits import same, with_threads

import rlhf_kernels as rk
from rlhf_kernels.core import env
from rlhf_kernels.kernels import native
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, random_mask


def thread_counts(backend):
    """Where only the CPU's kernels run in torch's threads."""
    return (1, 2, 4) if backend == "cpu" else (torch.get_num_threads(),)


def layouts(x):
    """The values of x behind other strides."""
    yield x.t().contiguous().t()
    wide = x.new_full((x.shape[0], 2 * x.shape[1] + 3), 7)
    wide[:, 1 : 1 + 2 * x.shape[1] : 2] = x
    yield wide[:, 1 : 1 + 2 * x.shape[1] : 2]
    tall = x.new_full((2 * x.shape[0], x.shape[1] + 5), 7)
    tall[::2, 2:-3] = x
    yield tall[::2, 2:-3]


def test_views_equal_contiguous_bitwise(backend):
    inputs = case(11, packed=False, **{"cols": 260} | size(backend))
    inputs.pop("cu_seqlens")
    expected = rk.gae(**inputs, whiten=True)
    names = ("rewards", "values", "mask", "dones")
    for views in zip(*(layouts(inputs[name]) for name in names), strict=True):
        moved = {**inputs, **dict(zip(names, views, strict=True))}
        for a, e in zip(rk.gae(**moved, whiten=True), expected, strict=True):
            assert_bitwise_equal(a, e)
    for x in layouts(inputs["values"]):
        assert_bitwise_equal(rk.whiten(x), rk.whiten(inputs["values"]))
    row = torch.randn(inputs["values"].shape[1])
    stretched = row.expand(inputs["values"].shape)
    assert stretched.stride(0) == 0
    for a, e in zip(
        rk.gae(stretched, stretched), rk.gae(stretched.clone(), stretched.clone()), strict=True
    ):
        assert_bitwise_equal(a, e)
    negated = torch._neg_view(inputs["values"])
    assert negated.is_neg()
    for a, e in zip(
        rk.gae(negated, negated), rk.gae(-inputs["values"], -inputs["values"]), strict=True
    ):
        assert_bitwise_equal(a, e)
    packed = torch.randn(50)
    cu = torch.tensor([0, 20, 50])
    sparse = torch.stack([packed, packed], 1)[:, 0]
    assert_bitwise_equal(
        rk.gae(sparse, sparse, cu_seqlens=cu.repeat_interleave(2)[::2]).advantages,
        rk.gae(packed, packed, cu_seqlens=cu).advantages,
    )


# What is computed for each sequence by itself, from the inputs of `case` and "scores".
SCANS = {
    "gae": lambda scores, **x: rk.gae(**x, gamma=0.99),
    "discounted_returns": lambda scores, values, **x: (rk.discounted_returns(**x, gamma=0.99),),
    "ppo_advantages": lambda scores, rewards, values, mask, dones, bootstrap_values, **x: (
        rk.ppo_advantages(
            scores,
            rewards,
            values,
            values,
            mask=mask,
            kl_coef=0.2,
            kl_estimator="k3",
            whiten=False,
            **x,
        )
    ),
}


@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("name", SCANS)
def test_a_row_does_not_depend_on_its_surroundings(backend, name, masked):
    # In the interpreter few rows, still of three tiles.
    rows, cols = (3, 140) if interpreted(backend) else (37, 400)
    inputs = case(2, packed=False, rows=rows, cols=cols)
    inputs.pop("cu_seqlens")
    inputs["scores"] = torch.randn(rows)
    compare = same(backend, rtol=1e-5, atol=1e-5)

    def scan(inputs, **options):
        return SCANS[name](**inputs, **options, masked=masked)

    def check(actual, expected):
        for a, e in zip(actual, expected, strict=True):
            compare(a, e)

    whole = scan(inputs)
    for again in with_threads(lambda: scan(inputs), thread_counts(backend)):
        check(again, whole)
    order = torch.arange(rows).flip(0)
    check(scan({k: v[order] for k, v in inputs.items()}), [w[order] for w in whole])
    for i in (rows - 1,) if interpreted(backend) else (0, 5, rows - 1):
        alone = scan({k: v[i : i + 1] for k, v in inputs.items()})
        check(alone, [w[i : i + 1] for w in whole])
    # With strangers around it.
    around = {k: torch.cat([v[:1], v[-1:], v[1:2]]) for k, v in inputs.items()}
    check([a[1:2] for a in scan(around)], [w[-1:] for w in whole])
    # Packed it is what it is padded.
    cu = torch.arange(rows + 1) * cols
    packed = scan({k: v.reshape(-1) for k, v in inputs.items()}, cu_seqlens=cu)
    check([a.reshape(rows, cols) for a in packed], whole)
    # Padding behind the end; in "zero" a bootstrap value would pass through it.
    inputs["bootstrap_values"] = inputs["bootstrap_values"] * (masked == "carry")
    whole = scan(inputs)
    for extra in (77,) if interpreted(backend) else (1, 77, 128):
        wide = {
            k: torch.nn.functional.pad(v, (0, extra)) if v.dim() == 2 else v
            for k, v in inputs.items()
        }
        check([a[:, :cols] for a in scan(wide)], whole)
    # Packed without its padding, at odd places.
    lengths = torch.arange(rows) * 43 % cols
    inside = torch.arange(cols) < lengths[:, None]
    padded = scan(inputs | {"mask": inputs["mask"] & inside})
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed = scan({k: v[inside] if v.dim() == 2 else v for k, v in inputs.items()}, cu_seqlens=cu)
    check(packed, [p[inside] for p in padded])


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9, 1.0])
def test_cpu_bits_do_not_depend_on_gaps_or_on_what_ends_a_sequence(density):
    lengths = torch.tensor([1, 7, 300, 0, 8, 129, 1000, 2, 513])
    ends = lengths.cumsum(0)
    cu = torch.cat([lengths.new_zeros(1), ends])
    rewards, values = torch.randn(2, int(cu[-1]))
    keep = torch.rand(rewards.shape) < density
    kept = rewards[keep], values[keep]
    cu_kept = torch.cat([cu.new_zeros(1), keep.cumsum(0)])[cu]
    done = torch.zeros(len(kept[0]), dtype=torch.bool)
    done[cu_kept[1:][cu_kept.diff() > 0] - 1] = True
    # "carry" does not look at the flags of masked tokens.
    dones = torch.ones_like(keep)
    dones[keep] = done
    kernels = native.module("cpu")
    before = kernels.isa()
    try:
        for isa in kernels.isa_names():
            kernels.select_isa(isa)
            with rk.use_backend("cpu"):
                expected = rk.gae(*kept, cu_seqlens=cu_kept, gamma=0.99)
                gaps = rk.gae(rewards, values, mask=keep, cu_seqlens=cu, gamma=0.99)
                episodes = rk.gae(*kept, cu_seqlens=cu_kept[[0, -1]], dones=done, gamma=0.99)
                both = rk.gae(
                    rewards, values, mask=keep, cu_seqlens=cu[[0, -1]], dones=dones, gamma=0.99
                )
            for actual in ([x[keep] for x in gaps], episodes, [x[keep] for x in both]):
                for a, e in zip(actual, expected, strict=True):
                    assert_bitwise_equal(a, e)
    finally:
        kernels.select_isa(before)


def test_whitening_does_not_depend_on_threads_or_shape(backend):
    x = torch.randn(13, 1777)
    mask = random_mask(13, 1777)
    compare = same(backend, rtol=1e-5, atol=1e-5)
    expected = rk.whiten(x, mask=mask)
    compare(rk.whiten(x.flatten(), mask=mask.flatten()), expected.flatten())
    for again in with_threads(lambda: rk.whiten(x, mask=mask), thread_counts(backend)):
        assert_bitwise_equal(again, expected)
    if interpreted(backend):
        x, mask = x[:3, :140], mask[:3, :140]
    fused = rk.gae(x, x, mask=mask, whiten=True).advantages
    assert_bitwise_equal(rk.gae(x, x, mask=mask, whiten=True).advantages, fused)
    parts = rk.whiten(rk.gae(x, x, mask=mask).advantages, mask=mask)
    if backend == "triton":
        # Moments of the scan's tiles, which end with sequences: another order of the same sum.
        assert_close(fused, parts.double(), 3e-7)
    else:
        assert_bitwise_equal(fused, parts)


def test_results_are_constants(backend):
    x, y = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    scores = torch.randn(2, requires_grad=True)
    results = (
        *rk.gae(x, y, whiten=True),
        rk.discounted_returns(x),
        *rk.ppo_advantages(scores, x, y, y, mask=None, kl_coef=0.1),
        rk.group_advantages(scores, 2),
        rk.whiten(x),
    )
    assert not any(r.requires_grad for r in results)


def test_bad_offsets(backend, monkeypatch):
    flat = torch.zeros(8)
    for offsets in ([0, 9], [1, 8], [0, 5, 3, 8], [0, 4], [0, -1, 8], [8], [0, 2**40, 8]):
        cu = torch.tensor(offsets)
        for call in (
            lambda cu=cu: rk.gae(flat, flat, cu_seqlens=cu),
            lambda cu=cu: rk.discounted_returns(flat, cu_seqlens=cu),
            lambda cu=cu: rk.ppo_advantages(
                flat[: len(cu) - 1], flat, None, flat, mask=None, cu_seqlens=cu
            ),
        ):
            with monkeypatch.context() as patch:
                if backend in ("cuda", "triton"):
                    # A kernel cannot raise: everything is NaN, unless told to look first.
                    result = call()
                    for r in (result,) if isinstance(result, torch.Tensor) else result:
                        assert r.isnan().all()
                    patch.setattr(env, "CHECK", True)
                with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
                    call()


def test_bad_arguments(backend):
    x, scores = torch.zeros(2, 4), torch.zeros(2)
    flat = torch.zeros(8)
    for error, match, call in (
        (TypeError, "rewards must be one of", lambda: rk.gae(x.cfloat(), x)),
        (TypeError, "mask must be bool or integer", lambda: rk.gae(x, x, mask=x + 0.5)),
        (TypeError, "dones must be bool", lambda: rk.gae(x, x, dones=x + 2)),
        (TypeError, "cu_seqlens must be int32", lambda: rk.gae(flat, flat, cu_seqlens=flat)),
        (TypeError, "gamma must be a number", lambda: rk.gae(x, x, gamma="1")),
        (ValueError, "values must have the shape", lambda: rk.gae(x, x.t())),
        (ValueError, r"rewards must be \[B, T\]", lambda: rk.gae(flat, flat)),
        (
            ValueError,
            r"rewards must be \[N\]",
            lambda: rk.gae(x, x, cu_seqlens=torch.zeros(1).int()),
        ),
        (ValueError, "bootstrap_values must have one", lambda: rk.gae(x, x, bootstrap_values=flat)),
        (ValueError, r"gamma must be in \[0, 1\]", lambda: rk.gae(x, x, gamma=1.5)),
        (ValueError, "lam must be finite", lambda: rk.gae(x, x, lam=math.nan)),
        (ValueError, "masked must be one of", lambda: rk.gae(x, x, masked="skip")),
        (ValueError, "scores must have one", lambda: rk.ppo_advantages(flat, x, x, x, mask=None)),
        (
            ValueError,
            "kl_estimator must be one of",
            lambda: rk.ppo_advantages(scores, x, x, x, mask=None, kl_estimator="k4"),
        ),
        (
            ValueError,
            "reward_clip must be",
            lambda: rk.ppo_advantages(scores, x, x, x, mask=None, reward_clip=0.0),
        ),
        (ValueError, "divide the number of rewards", lambda: rk.group_advantages(flat, 3)),
        (TypeError, "groups must be an int", lambda: rk.group_advantages(flat, 2.0)),
        (ValueError, "without greedy", lambda: rk.group_advantages(flat, 2, baseline="greedy")),
        (ValueError, "with greedy", lambda: rk.group_advantages(flat, 2, greedy_rewards=flat)),
        (ValueError, "scale must be one of", lambda: rk.group_advantages(flat, 2, scale="std")),
        (ValueError, r"rewards must be \[B\]", lambda: rk.group_advantages(x[None], 2)),
        (ValueError, "eps must be >= 0", lambda: rk.whiten(x, eps=-1.0)),
        (ValueError, "mask must have the shape", lambda: rk.whiten(x, mask=flat.bool())),
    ):
        with pytest.raises(error, match=match):
            call()


def test_float64_is_for_the_reference():
    x = torch.randn(2, 5, dtype=torch.float64)
    with rk.use_backend("reference"):
        assert rk.gae(x, x).advantages.dtype is torch.float64
    with rk.use_backend("cpu"), pytest.raises(TypeError, match="rewards must be one of"):
        rk.gae(x, x)


def test_the_cpu_backend_is_really_used(monkeypatch):
    from rlhf_kernels import reference

    def forbidden(*args, **kwargs):
        raise AssertionError("the reference was called")

    names = ("gae", "discounted_returns", "ppo_advantages", "group_advantages", "whiten")
    for name in names:
        monkeypatch.setattr(reference, name, forbidden)
    x, scores = torch.randn(2, 5), torch.randn(2)
    calls = (
        lambda: rk.gae(x, x),
        lambda: rk.discounted_returns(x),
        lambda: rk.ppo_advantages(scores, x, x, x, mask=None),
        lambda: rk.group_advantages(scores, 2),
        lambda: rk.whiten(x),
    )
    with rk.use_backend("cpu"):
        for call in calls:
            call()
    with rk.use_backend("reference"):
        for call in calls:
            with pytest.raises(AssertionError, match="reference was called"):
                call()


def test_opcheck():
    ops = torch.ops.rlhf_kernels
    x, y = torch.randn(4, 9), torch.randn(9, 4).t()
    mask, dones = random_mask(4, 9), torch.zeros(4, 9).long()
    end = torch.randn(4)
    cu = torch.tensor([0, 9, 20, 20, 36])
    flat = x.flatten()
    for args in (
        (ops.gae, x, y, mask, None, dones, end, 0.9, 0.8, "carry", True),
        (ops.gae, flat, flat, None, cu, None, end, 0.9, 0.8, "zero", False),
        (ops.discounted_returns, y, mask, None, None, end, 0.9, "carry"),
        (ops.ppo_advantages, end, x, y, x, mask, None, 0.1, "k3", 1.0, 0.9, "carry", True, 2.0),
        (
            ops.ppo_advantages,
            end,
            flat,
            None,
            flat,
            None,
            cu,
            0.0,
            "k1",
            1.0,
            0.9,
            "zero",
            True,
            None,
        ),
        (ops.group_advantages, end, torch.tensor([1, 2, 1, 1]), 0, "mean", "batch", None, 1e-6),
        (ops.group_advantages, end, None, 2, "greedy", "none", end, 1e-6),
        (ops.whiten, y, mask, False, True, 1e-8),
    ):
        torch.library.opcheck(args[0].default, (*args[1:], "cpu"))


def test_compiles_without_graph_break_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(scores, logprobs, ref, values, mask, flat, cu, bonus, scale):
        shaped = rk.ppo_advantages(scores, logprobs * 1, ref, values, mask=mask, kl_coef=0.1)
        a = rk.gae(shaped.rewards, values, mask=mask, gamma=0.99, lam=0.9, whiten=True)
        packed = rk.gae(flat, flat, cu_seqlens=cu)
        g = rk.group_advantages(scores, 2) + rk.group_advantages(bonus, scale, baseline="none")
        whitened = rk.whiten(a.returns, mask=mask) * 2
        return whitened, packed.advantages, g, rk.discounted_returns(values, gamma=0.9)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    with rk.use_backend("cpu"):
        for rows, cols in ((4, 11), (6, 33), (8, 65), (10, 700), (12, 129)):
            scores, ids = torch.randn(rows), torch.randint(0, 3, (rows,))
            tokens = [torch.randn(rows, cols) for _ in range(3)]
            tokens[0].requires_grad_()
            flat, cu = torch.randn(rows * cols), torch.arange(rows + 1) * cols
            args = (scores, *tokens, random_mask(rows, cols), flat, cu, scores * 2, ids)
            for a, e in zip(compiled(*args), step(*args), strict=True):
                assert_bitwise_equal(a, e)
    assert counter.frame_count <= 2


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    packed=st.booleans(),
    rows=st.integers(1, 12),
    cols=st.integers(0, 400),
    dtype=st.sampled_from(DTYPES),
    mask_dtype=st.sampled_from(MASK_DTYPES),
    masked=st.sampled_from(["carry", "zero"]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    without=st.sets(st.sampled_from(["mask", "dones", "bootstrap_values"])),
)
def test_fuzz(seed, packed, rows, cols, dtype, mask_dtype, masked, gamma, lam, without):
    inputs = case(seed, packed=packed, dtype=dtype, mask_dtype=mask_dtype, cols=cols, rows=rows)
    inputs.update(dict.fromkeys(without))
    options = {"gamma": gamma, "lam": lam, "masked": masked}
    expected = oracle(**inputs, **options)
    for backend in ("reference", "cpu"):
        with rk.use_backend(backend):
            for a, e in zip(rk.gae(**inputs, **options), expected, strict=True):
                assert_close(a, e, 1e-5 if backend == "reference" else 2e-7)
