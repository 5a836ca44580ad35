"""group_advantages: baselines and scales in plain torch, components; optimal_token_baseline."""

import math
import statistics

import pytest
import torch

from tests.ops.advantages_cases import assert_close

import rlhf_kernels as rk
from rlhf_kernels.config.enums import PLAIN_BASELINES, PLAIN_SCALES
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, generator

IDS = torch.tensor([7, -3, 7, 2, -3, 7, 9, 2, -3, 7])
TAU, EPS = 0.7, 1e-3


def scalar_groups(rewards, ids, baseline, scale, lengths):
    """The definitions in Python floats and its exact statistics module."""
    out = []
    for i, own in enumerate(ids):
        members = [j for j, other in enumerate(ids) if other == own]
        group, r, n = [rewards[j] for j in members], rewards[i], len(members)
        others = [rewards[j] for j in members if j != i]
        mean = statistics.fmean(group)
        ordered = sorted(members, key=lambda j: (-rewards[j], j))
        second = rewards[ordered[1]] if n > 1 else r
        a = {
            "mean": r - mean,
            "leave-one-out": r - statistics.fmean(others) if others else 0.0,
            "none": r,
            "length-mean": r
            - sum(lengths[j] * rewards[j] for j in members) / sum(lengths[j] for j in members),
            "log-mean-exp": r - TAU * math.log(statistics.fmean(math.exp(x / TAU) for x in group)),
            "pass@k": r - second if i == ordered[0] else 0.0,
            "batch-mean": r - statistics.fmean(rewards),
        }[baseline]
        if scale == "group":
            std = statistics.stdev(group) if n > 1 else 0.0
            a = a / (std + EPS) if std else 0.0
        elif scale == "leave-one-out":
            std = statistics.stdev(others) if n > 2 else 0.0
            a = a / (std + EPS) if std else a
        elif scale == "mean":
            a = a / (mean + EPS) if mean > 0 else 0.0
        out.append(a)
    if scale == "batch":
        mean, std = statistics.fmean(out), statistics.stdev(out)
        out = [(a - mean) / (std + EPS) for a in out]
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("scale", ("group", "batch", "none", *PLAIN_SCALES))
@pytest.mark.parametrize("baseline", ("mean", "leave-one-out", "none", *PLAIN_BASELINES))
def test_equals_the_definition(backend, baseline, scale):
    lengths = torch.tensor([5, 1, 9, 4, 0, 7, 3, 2, 8, 6])
    options = {"baseline": baseline, "scale": scale, "tau": TAU, "eps": EPS}
    if baseline == "length-mean":
        options["lengths"] = lengths
    for dtype in (*DTYPES, torch.float64):
        rewards = torch.randn(10, generator=generator(1)).to(dtype)
        for groups, ids in ((IDS, IDS), (5, torch.arange(10) // 5)):
            plain = rewards.tolist(), ids.tolist(), baseline, scale, lengths.tolist()
            actual = rk.group_advantages(rewards, groups, **options)
            assert_close(actual, scalar_groups(*plain))


def test_rewards_of_any_dtype(backend):
    rewards = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1])
    for options in ({}, {"scale": "mean"}, {"scale": "leave-one-out"}, {"baseline": "pass@k"}):
        expected = rk.group_advantages(rewards.float(), 4, **options)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64):
            found = rk.group_advantages(rewards.to(dtype), 4, **options)
            assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("baseline", ("mean", *PLAIN_BASELINES))
def test_equal_rewards_and_groups_of_one_give_zero(backend, baseline):
    """But the batch's mean is not a group's."""
    options = {"baseline": baseline}
    for scale in ("group", "none", *PLAIN_SCALES):
        for rewards, size in ((torch.full((9,), 0.1), 3), (torch.rand(5), 1)):
            if baseline == "length-mean":
                options["lengths"] = torch.arange(1, len(rewards) + 1)
            if baseline == "batch-mean" and size == 1 and scale != "group":
                continue
            assert (rk.group_advantages(rewards, size, scale=scale, **options) == 0).all()


def test_one_that_differs_is_not_divided_by_the_others_std(backend):
    """The others are equal, whatever their sums round to: NeMo-RL does not divide here."""
    for odd in (0.3, 1e6, -7.1):
        rewards = torch.full((9,), 0.1)
        rewards[4] = odd
        found = rk.group_advantages(rewards, 9, baseline="leave-one-out", scale="leave-one-out")
        assert found[4] == rewards[4] - rewards[0]
        others = torch.cat([rewards[:4], rewards[5:]]).double()
        rest = torch.cat([others[1:], rewards[4:5]]).double()
        exact = (others[0] - rest.mean()) / (rest.std() + 1e-6)
        torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_bits_of_a_group_beside_others(backend, baseline, scale, dtype):
    """Alone, beside more or fewer, given by size or by ids; also what a thread takes at a time."""
    options = {"baseline": baseline, "scale": scale}
    large = [(8, 5000), (20_000, 3)] if backend == "cpu" else []
    for size, count in [(1, 9), (2, 8), (7, 13), (8, 17), (33, 10), *large]:
        rewards = torch.randn(count, size, generator=generator(size), dtype=torch.float64)
        rewards[count // 2] = 0.25
        rewards = rewards.to(dtype)
        found = rk.group_advantages(rewards.flatten(), size, **options)
        ids = torch.arange(count).repeat_interleave(size)
        assert_bitwise_equal(rk.group_advantages(rewards.flatten(), ids, **options), found)
        apart = torch.stack([rewards, rewards], -1).flatten(0, 1)[:, 0]
        assert_bitwise_equal(rk.group_advantages(apart, size, **options), found)
        for group in (0, count // 2, count - 1):
            alone = rk.group_advantages(rewards[group], size, **options)
            assert_bitwise_equal(alone, found.view(count, size)[group])
        exact = rewards.double() - rewards.double().mean(1, keepdim=True)
        if baseline == "leave-one-out":
            exact *= size / max(size - 1, 1)
        if scale == "group":
            spread = rewards.double().std(1, keepdim=True) if size > 1 else exact
            exact = torch.where(spread == 0, 0, exact / (spread + 1e-6))
        torch.testing.assert_close(found.view(count, size), exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_reward_that_is_not_finite_poisons_its_group_alone(backend, bad):
    for options in ({}, {"scale": "none"}, {"baseline": "leave-one-out", "scale": "none"},
                    {"baseline": "none"}, {"scale": "mean"}, {"scale": "leave-one-out"},
                    {"baseline": "pass@k"}, {"baseline": "pass@k", "scale": "none"},
                    {"baseline": "log-mean-exp", "scale": "none"},
                    {"baseline": "length-mean", "lengths": torch.ones(9), "scale": "none"},
                    {"baseline": "none", "scale": "mean"}):  # fmt: skip
        rewards = torch.rand(9)
        clean = rk.group_advantages(rewards, 3, **options)
        # Differences are taken to the first of a group.
        for at in (3, 4):
            spoiled = rewards.clone()
            spoiled[at] = bad
            dirty = rk.group_advantages(spoiled, 3, **options)
            assert dirty[3:6].isnan().all(), options
            others = [0, 1, 2, 6, 7, 8]
            assert_bitwise_equal(dirty[others], clean[others])
            whole = rk.group_advantages(spoiled, 3, baseline="batch-mean", scale="none")
            assert whole.isnan().all()


def test_components(backend):
    """GDPO and TRL's normalize_then_sum: each reward is normalised before the sum."""
    rewards, weights = torch.randn(12, 3) * torch.tensor([1.0, 100, 0.01]), torch.rand(3)
    parts = [rk.group_advantages(rewards[:, k].clone(), 4, eps=1e-4) for k in range(3)]
    expected = torch.stack(parts, 1).double()
    assert_close(rk.group_advantages(rewards, 4, eps=1e-4), expected.sum(1))
    summed = rk.group_advantages(rewards, 4, component_weights=weights, eps=1e-4)
    assert_close(summed, (expected * weights.double()).sum(1))
    # As TRL 1.16 writes it, in fp64.
    grouped = rewards.double().view(-1, 4, 3)
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    x = (each.view(-1, 3) * weights.double()).sum(1)
    found = rk.group_advantages(summed, 4, baseline="none", scale="batch", eps=1e-4)
    assert_close(found, (x - x.mean()) / (x.std() + 1e-4))


def test_bad_arguments(backend):
    x = torch.zeros(8)
    for error, match, options in (
        (ValueError, "without lengths", {"baseline": "length-mean"}),
        (ValueError, "with lengths", {"lengths": x}),
        (ValueError, "lengths must be >= 0", {"baseline": "length-mean", "lengths": x - 1}),
        (ValueError, "lengths must have", {"baseline": "length-mean", "lengths": x[1:]}),
        (ValueError, "tau must be", {"baseline": "log-mean-exp", "tau": 0.0}),
        (ValueError, "baseline must be one of", {"baseline": "median"}),
        (ValueError, "component_weights must be", {"component_weights": x}),
    ):
        with pytest.raises(error, match=match):
            rk.group_advantages(x, 4, **options)
    with pytest.raises(ValueError, match=r"rewards must be \[B\] or \[B, K\]"):
        rk.group_advantages(x.view(2, 2, 2), 2)
    with pytest.raises(ValueError, match="component_weights must be"):
        rk.group_advantages(x.view(4, 2), 2, component_weights=x[:3])


def token_loop(rewards, logprobs, collision, weights, ids, mask, zero_tail, eps):
    """The definition of the optimal token baseline in Python floats, for padded sequences."""
    walks = []
    for r, p, c, rho, keep in zip(rewards, logprobs, collision, weights, mask, strict=True):
        at = [t for t, k in enumerate(keep) if k]
        energy, so_far, to_go = [], 0.0, []
        for t in at:
            so_far += (1 - 2 * math.exp(p[t]) + c[t]) * rho[t] ** 2
            energy.append(so_far)
        for k in range(len(at)):
            to_go.append(sum(r[t] for t in at[k:]))
        walks.append((at, energy, to_go))
    out = torch.zeros(2, len(rewards), len(rewards[0]), dtype=torch.float64)
    for i, (at, _, to_go) in enumerate(walks):
        group = [w for w, other in zip(walks, ids, strict=True) if other == ids[i]]
        alone = sum(bool(w[0]) for w in group) < 2
        for k, t in enumerate(at):
            there = [w for w in group if len(w[0]) > k]
            top = sum(w[2][k] * w[1][k] for w in there)
            best = top / (sum(w[1][k] for w in there) + eps)
            if alone or (zero_tail and len(there) == 1):
                best = 0.0
            out[:, i, t] = torch.tensor([to_go[k] - best, to_go[k]])
    return out


@pytest.mark.parametrize("zero_tail", [True, False])
def test_optimal_token_baseline(backend, zero_tail):
    g = generator(2)
    shape = (6, 11)
    rewards = torch.randn(shape, generator=g)
    logprobs = -torch.rand(shape, generator=g)
    collision, weights = (torch.rand(shape, generator=g) for _ in range(2))
    ids = torch.tensor([4, 1, 4, 4, 9, 1])
    mask = torch.rand(shape, generator=g) < 0.7
    mask[2] = False
    options = {"zero_tail": zero_tail, "importance_weights": weights, "eps": 1e-4}
    found = rk.optimal_token_baseline(rewards, logprobs, collision, ids, mask, **options)
    lists = [x.double().tolist() for x in (rewards, logprobs, collision, weights)]
    expected = token_loop(*lists, ids.tolist(), mask.tolist(), zero_tail, 1e-4)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e)
    # What a mask hides changes nothing.
    hidden = [x.masked_fill(~mask, torch.nan) for x in (rewards, logprobs, collision, weights)]
    dirty = rk.optimal_token_baseline(
        *hidden[:3], ids, mask, **options | {"importance_weights": hidden[3]}
    )
    for a, e in zip(dirty, found, strict=True):
        assert_bitwise_equal(a, e)
    # Packed, without the masked tokens.
    lengths = mask.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    flat = [x[mask] for x in (rewards, logprobs, collision, weights)]
    packed = rk.optimal_token_baseline(
        *flat[:3], ids, cu_seqlens=cu, **options | {"importance_weights": flat[3]}
    )
    for a, e in zip(packed, expected, strict=True):
        assert_close(a, e[mask])


def test_optimal_token_baseline_refuses():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="divide the number of sequences"):
        rk.optimal_token_baseline(x, x, x, 3)
    with pytest.raises(ValueError, match="collision must have the shape"):
        rk.optimal_token_baseline(x, x, x.t(), 2)
    with pytest.raises(ValueError, match="groups must have the shape"):
        rk.optimal_token_baseline(x, x, x, torch.zeros(3, dtype=torch.int64))
