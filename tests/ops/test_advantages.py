"""gae, discounted_returns, ppo_advantages, group_advantages, whiten on every backend: values."""

import statistics

import pytest
import torch

from tests.ops.advantages_cases import (
    MASK_DTYPES,
    assert_close,
    case,
    interpreted,
    lengths,
    oracle,
    size,
    spans,
)

import rlhf_kernels as rk
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, generator, random_mask


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool])
def test_known_vector(backend, mask_dtype):
    values = torch.tensor([[1.0, 1, 5, 5, 1]])
    rewards = torch.tensor([[0.0, 0, 0, 0, 2]])
    mask = torch.tensor([[1, 1, 0, 0, 1]]).to(mask_dtype)
    carry = rk.gae(rewards, values, mask=mask, gamma=1.0, lam=0.95)
    expected = torch.tensor([[0.9025, 0.95, 0, 0, 1]])
    torch.testing.assert_close(carry.advantages, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(carry.returns, expected + values * mask, rtol=1e-6, atol=0)
    zero = rk.gae(rewards, values, mask=mask, gamma=1.0, lam=0.95, masked="zero")
    expected = torch.tensor([[0.72188125, 0.759875, 0, 0, 1]])
    torch.testing.assert_close(zero.advantages, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(zero.returns, expected + values * mask, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.0, 0.5), (0.9, 0.0), (0.99, 1.0)])
def test_gae_equals_scalar_loop(backend, packed, masked, gamma, lam):
    for seed, cols in enumerate(lengths(backend)):
        inputs = case(seed, packed=packed, **size(backend) | {"cols": cols})
        options = {"gamma": gamma, "lam": lam, "masked": masked}
        expected = oracle(**inputs, **options)
        actual = rk.gae(**inputs, **options)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)
        assert cols < 2 or expected[0].abs().max() > 0.1
        whitened = rk.gae(**inputs, **options, whiten=True)
        assert_close(whitened.advantages, oracle(**inputs, **options, whiten=True)[0], 1e-5)
        assert_bitwise_equal(whitened.returns, actual.returns)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_discounted_returns_equal_scalar_loop(backend, packed, masked):
    for seed, cols in enumerate(lengths(backend)):
        inputs = case(seed, packed=packed, **size(backend) | {"cols": cols})
        del inputs["values"]
        # Without values, lam = 1 and a reward of gamma G behind the end: the return itself.
        actual = rk.discounted_returns(**inputs, gamma=0.9, masked=masked)
        zeros = torch.zeros_like(inputs["rewards"])
        end = inputs.pop("bootstrap_values")
        expected = oracle(values=zeros, **inputs, gamma=0.9, lam=1.0, masked=masked)[1]
        for s, (b, i, j) in enumerate(spans(zeros.shape, inputs["cu_seqlens"])):
            at = slice(i, j) if packed else (b, slice(i, j))
            g = float(end[s])
            for t in reversed(range(j - i)):
                keep = bool(inputs["mask"][at][t])
                if masked == "carry" and not keep:
                    continue
                g = 0.0 if inputs["dones"][at][t] else 0.9 * g
                expected[at][t] += g if keep else 0.0
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_dtypes(backend, dtype, mask_dtype):
    for packed in (False, True):
        inputs = case(3, packed=packed, dtype=dtype, mask_dtype=mask_dtype, **size(backend))
        inputs["dones"] = inputs["dones"].to(mask_dtype)
        if packed:
            inputs["cu_seqlens"] = inputs["cu_seqlens"].int()
        for a, e in zip(rk.gae(**inputs), oracle(**inputs), strict=True):
            assert_close(a, e)


def test_long_chain_is_accurate(backend):
    # lam = gamma = 1 adds 2^17 terms; an fp32 chain would be off by far more.
    g = generator(0)
    rewards, values = (torch.randn(2, 1 << 17, generator=g) for _ in range(2))
    if backend == "reference":
        rewards, values = rewards[:, :4096], values[:, :4096]
    if interpreted(backend):
        # More tiles than are composed at a time.
        rewards, values = rewards[:1, :1100], values[:1, :1100]
    exact = rewards.double().flip(1).cumsum(1).flip(1)
    returns = rk.gae(rewards, values, lam=1.0).returns
    error = (returns.double() - exact).abs().max()
    # Triton sums blocks in fp32; what is behind a block, in fp64.
    tolerance = {"reference": 1e-3, "triton": 4e-7 * float(exact.abs().max())}
    assert error <= tolerance.get(backend, 1e-7 * float(exact.abs().max()))


def test_masked_rewards_and_non_finite_values_change_nothing(backend):
    for packed in (False, True):
        for masked in ("carry", "zero"):
            inputs = case(5, packed=packed, **size(backend, cols=70))
            clean = rk.gae(**inputs, masked=masked, whiten=True)
            hidden = inputs["mask"] == 0
            for poison in (torch.nan, torch.inf, 1e30):
                dirty = dict(inputs)
                for name in ("rewards", "values"):
                    dirty[name] = inputs[name].masked_fill(hidden, poison)
                for a, e in zip(rk.gae(**dirty, masked=masked, whiten=True), clean, strict=True):
                    assert_bitwise_equal(a, e)
                    assert (a[hidden] == 0).all()
    x = torch.randn(3, 7)
    mask = random_mask(3, 7)
    assert_bitwise_equal(
        rk.whiten(x.masked_fill(~mask, torch.nan), mask=mask), rk.whiten(x, mask=mask)
    )


def test_done_cuts_what_is_behind_it(backend):
    rewards, values = torch.randn(2, 200), torch.randn(2, 200)
    dones = torch.zeros(2, 200, dtype=torch.bool)
    dones[:, 99] = True
    whole = rk.gae(rewards, values, dones=dones, gamma=0.9)
    alone = rk.gae(rewards[:, :100], values[:, :100], gamma=0.9)
    torch.testing.assert_close(whole.advantages[:, :100], alone.advantages, rtol=1e-6, atol=1e-6)
    # Also what is not a number.
    rewards[:, 150] = torch.nan
    poisoned = rk.gae(rewards, values, dones=dones, gamma=0.9)
    assert poisoned.advantages[:, 100:151].isnan().all()
    assert_bitwise_equal(poisoned.advantages[:, :100], whole.advantages[:, :100])


def test_bootstrap_is_the_value_behind_the_end(backend):
    # Ten more steps after the cut, with lam = 0: only the value right behind it counts.
    rewards, values = torch.randn(3, 30), torch.randn(3, 30)
    whole = rk.gae(rewards, values, gamma=0.9, lam=0.0)
    cut = rk.gae(
        rewards[:, :20], values[:, :20], bootstrap_values=values[:, 20], gamma=0.9, lam=0.0
    )
    torch.testing.assert_close(cut.advantages, whole.advantages[:, :20], rtol=1e-6, atol=1e-6)


def test_all_masked_and_empty(backend):
    x = torch.full((3, 5), torch.nan)
    none = torch.zeros(3, 5, dtype=torch.bool)
    for masked in ("carry", "zero"):
        for whiten in (False, True):
            result = rk.gae(x, x, mask=none, masked=masked, whiten=whiten)
            assert all((r == 0).all() for r in result)
    result = rk.ppo_advantages(torch.full((3,), torch.nan), x, x, x, mask=none, kl_coef=0.1)
    assert all((r == 0).all() for r in result)
    assert (rk.whiten(x, mask=none) == 0).all()
    for shape in ((0, 5), (5, 0), (0, 0)):
        empty = torch.empty(shape)
        assert all(r.shape == shape for r in rk.gae(empty, empty, whiten=True))
        assert rk.whiten(empty).shape == shape
        assert rk.discounted_returns(empty).shape == shape
        scores = torch.zeros(shape[0])
        assert all(
            r.shape == shape for r in rk.ppo_advantages(scores, empty, None, empty, mask=None)
        )
    empty = torch.empty(0)
    for cu in ([0], [0, 0, 0]):
        assert rk.gae(empty, empty, cu_seqlens=torch.tensor(cu)).advantages.shape == (0,)
    assert rk.group_advantages(empty, 4).shape == (0,)
    assert rk.group_advantages(empty, empty.long()).shape == (0,)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_ppo_advantages_equal_their_parts(backend, packed, estimator):
    inputs = case(8, packed=packed, **size(backend))
    cu, mask, values = inputs["cu_seqlens"], inputs["mask"], inputs["values"]
    logprobs = inputs["rewards"] - 2
    ref = logprobs + 0.3 * torch.randn(logprobs.shape)
    # One sequence with nothing kept: its score has nowhere to go.
    sequences = spans(logprobs.shape, cu)
    b, i, j = sequences[2]
    mask[slice(i, j) if packed else b] = False
    scores = torch.linspace(-9, 9, len(sequences))
    scores[2] = torch.nan
    options = {"gamma": 0.99, "lam": 0.9, "cu_seqlens": cu}
    actual = rk.ppo_advantages(
        scores, logprobs, ref, values, mask=mask, kl_coef=0.2, kl_estimator=estimator,
        reward_clip=4.0, whiten=False, **options,
    )  # fmt: skip
    x = logprobs.double() - ref.double()
    kl = {"k1": x, "k2": x * x / 2, "k3": (-x).expm1() + x, "abs": x.abs()}[estimator]
    rewards = torch.where(mask, -0.2 * kl, 0)
    for (b, i, j), score in zip(sequences, scores.tolist(), strict=True):
        row = slice(i, j) if packed else b
        kept = mask[row].nonzero()
        if len(kept):
            rewards[row][kept[-1]] += min(max(score, -4.0), 4.0)
    assert_close(actual.rewards, rewards)
    for a, e in zip(actual, oracle(rewards, values, mask=mask, **options), strict=False):
        assert_close(a, e)
    again = rk.gae(actual.rewards, values, mask=mask, **options)
    assert_bitwise_equal(actual.advantages, again.advantages)
    assert_bitwise_equal(actual.returns, again.returns)
    whitened = rk.ppo_advantages(
        scores, logprobs, ref, values, mask=mask, kl_coef=0.2, kl_estimator=estimator,
        reward_clip=4.0, **options,
    )  # fmt: skip
    if backend == "triton":
        # Moments of the scan's tiles, which end with sequences: another order of the same sum.
        fused = rk.gae(actual.rewards, values, mask=mask, whiten=True, **options)
        assert_bitwise_equal(whitened.advantages, fused.advantages)
        assert_close(whitened.advantages, rk.whiten(actual.advantages, mask=mask).double(), 3e-7)
    else:
        assert_bitwise_equal(whitened.advantages, rk.whiten(actual.advantages, mask=mask))


def test_ppo_advantages_without_penalty_ignore_the_reference(backend):
    inputs = [torch.randn(4, 9) for _ in range(2)]
    scores = torch.randn(4)
    nothing = torch.full((4, 9), torch.nan)
    off = rk.ppo_advantages(scores, inputs[0], nothing, inputs[1], mask=None, kl_coef=0.0)
    none = rk.ppo_advantages(scores, inputs[0], None, inputs[1], mask=None, kl_coef=0.5)
    for a, e in zip(off, none, strict=True):
        assert_bitwise_equal(a, e)
    assert_bitwise_equal(off.rewards[:, -1], scores)
    assert (off.rewards[:, :-1] == 0).all()


def scalar_groups(rewards, ids, baseline, scale, greedy, eps):
    """The definition of group_advantages in Python's exact statistics module."""
    out = []
    for r, g, own in zip(rewards, greedy, ids, strict=True):
        group = [x for x, i in zip(rewards, ids, strict=True) if i == own]
        mean, n = statistics.fmean(group), len(group)
        a = {
            "mean": r - mean,
            "leave-one-out": r - (sum(group) - r) / (n - 1) if n > 1 else 0.0,
            "greedy": r - g,
            "none": r,
        }[baseline]
        if scale == "group":
            std = statistics.stdev(group) if n > 1 else 0.0
            a = a / (std + eps) if std else 0.0
        out.append(a)
    if scale == "batch":
        mean, std = statistics.fmean(out), statistics.stdev(out)
        out = [(a - mean) / (std + eps) for a in out]
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "greedy", "none"])
def test_group_advantages_equal_the_definition(backend, baseline, scale):
    ids = torch.tensor([7, -3, 7, 2, -3, 7, 9, 2, -3, 7])
    for dtype in (*DTYPES, torch.float64):
        rewards, greedy = torch.randn(10).to(dtype), torch.randn(10).to(dtype)
        options = {"baseline": baseline, "scale": scale, "eps": 1e-3}
        extra = {"greedy_rewards": greedy} if baseline == "greedy" else {}
        actual = rk.group_advantages(rewards, ids, **options, **extra)
        plain = rewards.tolist(), ids.tolist(), baseline, scale, greedy.tolist(), 1e-3
        assert_close(actual, scalar_groups(*plain))
        consecutive = rk.group_advantages(rewards, 5, **options, **extra)
        same = rk.group_advantages(rewards, torch.arange(10) // 5, **options, **extra)
        assert_bitwise_equal(consecutive, same)
        plain = rewards.tolist(), [0] * 5 + [1] * 5, baseline, scale, greedy.tolist(), 1e-3
        assert_close(consecutive, scalar_groups(*plain))


def test_group_statistics_survive_large_offsets_and_no_spread(backend):
    rewards = torch.tensor([1e8, 1e8 + 1, 1e8, 1e8 + 1], dtype=torch.float64)
    expected = torch.tensor([-1.0, 1, -1, 1]) * 0.5 / (1 / 3) ** 0.5
    torch.testing.assert_close(rk.group_advantages(rewards, 4), expected, rtol=1e-5, atol=0)
    tenth = torch.full((9,), 0.1)
    for baseline in ("mean", "leave-one-out"):
        for scale in ("group", "batch", "none"):
            options = {"baseline": baseline, "scale": scale}
            assert (rk.group_advantages(tenth, 3, **options) == 0).all()
            # Groups of one.
            assert (rk.group_advantages(torch.randn(5), 1, **options) == 0).all()
    assert (rk.group_advantages(tenth, 3, baseline="none", scale="batch") == 0).all()


def test_nan_reward_poisons_its_group_alone(backend):
    rewards = torch.randn(9)
    clean = rk.group_advantages(rewards, 3)
    rewards[4] = torch.nan
    dirty = rk.group_advantages(rewards, 3)
    assert dirty[3:6].isnan().all()
    assert_bitwise_equal(dirty[[0, 1, 2, 6, 7, 8]], clean[[0, 1, 2, 6, 7, 8]])


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whiten(backend, shift_mean, unbiased):
    for shape in ((5,), (3, 700), (2, 3, 411)):
        # A mean that E[x^2] - mean^2 in fp32 would drown the variance in.
        x = torch.randn(shape) + 3000
        mask = torch.rand(shape) < 0.8
        kept = x.double()[mask]
        options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": 1e-4}
        std = (kept.var(correction=int(unbiased)) + 1e-4).sqrt()
        expected = torch.where(mask, (x.double() - kept.mean()) / std, 0)
        if not shift_mean:
            expected = torch.where(mask, expected + kept.mean(), 0)
        assert_close(rk.whiten(x, mask=mask, **options), expected)
        assert_bitwise_equal(
            rk.whiten(x, mask=None, **options), rk.whiten(x, mask=torch.ones_like(mask), **options)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, 1024), (9, 455)])
def test_whiten_has_the_same_bits_in_every_layout(backend, shape, dtype):
    """Evenly spaced tokens have kernels of their own, and so have tiles that are full."""
    x, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.8
    for kind in (torch.bool, torch.int32, torch.int64):
        flags, found = mask.to(kind), rk.whiten(x, mask.to(kind))
        for given in (
            (torch.stack([x, x], -1)[..., 0], torch.stack([flags, flags], -1)[..., 0]),
            (torch.cat([x, x], 1)[:, : shape[1]], flags),
            (x, torch.cat([flags, flags], 1)[:, : shape[1]]),
            (x.t().contiguous().t(), flags.t().contiguous().t()),
        ):
            assert_bitwise_equal(rk.whiten(*given), found)
    kept = x.double()[mask]
    if len(kept) > 1:
        expected = torch.where(mask, (x.double() - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0)
        assert_close(found, expected)


def test_whiten_without_spread(backend):
    one = torch.tensor([5.0, 7.0])
    only = torch.tensor([True, False])
    assert rk.whiten(one, mask=only).tolist() == [0.0, 0.0]
    assert rk.whiten(one, mask=only, shift_mean=False).tolist() == [5.0, 0.0]
    assert (rk.whiten(torch.full((100,), 0.1), eps=0.0) == 0).all()
