"""gae, discounted_returns, ppo_advantages, group_advantages and whiten on every backend."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import _config
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal, generator, random_mask

# Around a block of 128 tokens, and several of them.
LENGTHS = (0, 1, 2, 127, 128, 129, 300)
# Triton's interpreter takes milliseconds a token, but its blocks are of 32 and its tiles of 64.
INTERPRETED_LENGTHS = (0, 1, 2, 33, 64, 140)
MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.uint8)


def scalar_scan(rewards, values, mask, dones, bootstrap, gamma, lam, masked):
    """One sequence by the definition, in Python floats (fp64): (advantages, returns) as lists."""
    advantage, value = 0.0, bootstrap
    out = []
    for r, v, keep, done in reversed(list(zip(rewards, values, mask, dones, strict=True))):
        if not keep and masked == "carry":
            out.append((0.0, 0.0))
            continue
        if not keep:
            r = v = 0.0
        delta = r + (0.0 if done else gamma * value) - v
        advantage = delta + (0.0 if done else gamma * lam * advantage)
        value = v
        out.append((advantage, advantage + v) if keep else (0.0, 0.0))
    return [list(column) for column in zip(*reversed(out), strict=True)] or [[], []]


def scalar_whiten(x, mask):
    kept = [a for a, keep in zip(x, mask, strict=True) if keep]
    if len(kept) < 2:
        return [0.0] * len(x)
    mean, var = statistics.fmean(kept), statistics.variance(kept)
    return [
        (a - mean) / math.sqrt(var + 1e-8) if keep else 0.0 for a, keep in zip(x, mask, strict=True)
    ]


def spans(shape, cu_seqlens):
    """(row, start, end) of each sequence."""
    if cu_seqlens is None:
        return [(b, 0, shape[1]) for b in range(shape[0])]
    bounds = cu_seqlens.tolist()
    return [(0, a, b) for a, b in itertools.pairwise(bounds)]


def oracle(
    rewards, values, *, mask=None, cu_seqlens=None, dones=None, bootstrap_values=None, gamma=1.0,
    lam=0.95, masked="carry", whiten=False,
):  # fmt: skip
    """Advantages and returns in fp64, sequence by sequence."""
    shape = rewards.shape

    def grid(x, default):
        x = torch.full(shape, default) if x is None else x
        return (x if cu_seqlens is None else x[None]).tolist()

    r, v = grid(rewards.double(), 0.0), grid(values.double(), 0.0)
    m, d = grid(mask, 1), grid(dones, 0)
    sequences = spans(shape, cu_seqlens)
    boot = [0.0] * len(sequences) if bootstrap_values is None else bootstrap_values.tolist()
    out = torch.zeros(2, len(r), len(r[0]) if r else 0, dtype=torch.float64)
    for (b, i, j), end in zip(sequences, boot, strict=True):
        part = (r[b][i:j], v[b][i:j], m[b][i:j], d[b][i:j])
        out[:, b, i:j] = torch.tensor(scalar_scan(*part, end, gamma, lam, masked))
    advantages, returns = (x.reshape(shape) for x in out)
    if whiten:
        flat_mask = [k for row in m for k in row]
        flat = scalar_whiten(advantages.flatten().tolist(), flat_mask)
        advantages = torch.tensor(flat, dtype=torch.float64).reshape(shape)
    return advantages, returns


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.dtype is torch.float32
    assert actual.shape == expected.shape
    scale = 1.0 + (float(expected.abs().max()) if expected.numel() else 0.0)
    assert_error = (actual.double() - expected).abs()
    assert not assert_error.isnan().any()
    assert (assert_error <= tolerance * scale).all(), float(assert_error.max())


def case(seed, *, packed, dtype=torch.float32, mask_dtype=torch.bool, cols=300, rows=7):
    """Random inputs of every kind, as arguments of gae."""
    g = generator(seed)
    if packed:
        lengths = torch.randint(0, cols + 1, (rows,), generator=g)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shape = (int(cu[-1]),)
    else:
        cu, shape = None, (rows, cols)
    mask = torch.rand(shape, generator=g) < 0.7
    return {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "values": torch.randn(shape, generator=g).to(dtype),
        "mask": mask.to(mask_dtype) if mask_dtype is torch.bool else mask.to(mask_dtype) * 3,
        "cu_seqlens": cu,
        "dones": torch.rand(shape, generator=g) < 0.05,
        "bootstrap_values": torch.randn(rows, generator=g),
    }


def interpreted(backend):
    return backend == "triton" and rk.triton.interpreted()


def size(backend, cols=140):
    """Arguments of `case`: in the interpreter few rows, of several tiles still."""
    return {"rows": 3, "cols": cols} if interpreted(backend) else {}


def lengths(backend):
    return INTERPRETED_LENGTHS if interpreted(backend) else LENGTHS


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
    assert_bitwise_equal(rk.whiten(x.masked_fill(~mask, torch.nan), mask), rk.whiten(x, mask))


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
    result = rk.ppo_advantages(torch.full((3,), torch.nan), x, x, x, none, kl_coef=0.1)
    assert all((r == 0).all() for r in result)
    assert (rk.whiten(x, none) == 0).all()
    for shape in ((0, 5), (5, 0), (0, 0)):
        empty = torch.empty(shape)
        assert all(r.shape == shape for r in rk.gae(empty, empty, whiten=True))
        assert rk.whiten(empty).shape == shape
        assert rk.discounted_returns(empty).shape == shape
        scores = torch.zeros(shape[0])
        assert all(r.shape == shape for r in rk.ppo_advantages(scores, empty, None, empty, None))
    empty = torch.empty(0)
    for cu in ([0], [0, 0, 0]):
        assert rk.gae(empty, empty, cu_seqlens=torch.tensor(cu)).advantages.shape == (0,)
    assert rk.group_advantages(empty, 4).shape == (0,)
    assert rk.group_advantages(empty, empty.long()).shape == (0,)


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


def same(backend):
    """Bitwise for kernels; torch's own loops depend on shape and strides."""
    if backend == "reference":
        return lambda a, e: torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    return assert_bitwise_equal


# What is computed for each sequence by itself, from the inputs of `case` and "scores".
SCANS = {
    "gae": lambda scores, **x: rk.gae(**x, gamma=0.99),
    "discounted_returns": lambda scores, values, **x: (rk.discounted_returns(**x, gamma=0.99),),
    "ppo_advantages": lambda scores, rewards, values, mask, dones, bootstrap_values, **x: (
        rk.ppo_advantages(
            scores, rewards, values, values, mask, kl_coef=0.2, kl_estimator="k3", whiten=False, **x
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
    compare = same(backend)

    def scan(inputs, **options):
        return SCANS[name](**inputs, **options, masked=masked)

    def check(actual, expected):
        for a, e in zip(actual, expected, strict=True):
            compare(a, e)

    whole = scan(inputs)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4) if backend == "cpu" else (before,):
            torch.set_num_threads(threads)
            check(scan(inputs), whole)
    finally:
        torch.set_num_threads(before)
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


def test_whitening_does_not_depend_on_threads_or_shape(backend):
    x = torch.randn(13, 1777)
    mask = random_mask(13, 1777)
    compare = same(backend)
    expected = rk.whiten(x, mask)
    compare(rk.whiten(x.flatten(), mask.flatten()), expected.flatten())
    before = torch.get_num_threads()
    try:
        for threads in (1, 4) if backend == "cpu" else (before,):
            torch.set_num_threads(threads)
            assert_bitwise_equal(rk.whiten(x, mask), expected)
    finally:
        torch.set_num_threads(before)
    if interpreted(backend):
        x, mask = x[:3, :140], mask[:3, :140]
    fused = rk.gae(x, x, mask=mask, whiten=True).advantages
    assert_bitwise_equal(rk.gae(x, x, mask=mask, whiten=True).advantages, fused)
    parts = rk.whiten(rk.gae(x, x, mask=mask).advantages, mask)
    if backend == "triton":
        # Moments of the scan's tiles, which end with sequences: another order of the same sum.
        assert_close(fused, parts.double(), 3e-7)
    else:
        assert_bitwise_equal(fused, parts)


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
        scores, logprobs, ref, values, mask, kl_coef=0.2, kl_estimator=estimator, reward_clip=4.0,
        whiten=False, **options,
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
        scores, logprobs, ref, values, mask, kl_coef=0.2, kl_estimator=estimator, reward_clip=4.0,
        **options,
    )  # fmt: skip
    if backend == "triton":
        # Moments of the scan's tiles, which end with sequences: another order of the same sum.
        fused = rk.gae(actual.rewards, values, mask=mask, whiten=True, **options)
        assert_bitwise_equal(whitened.advantages, fused.advantages)
        assert_close(whitened.advantages, rk.whiten(actual.advantages, mask).double(), 3e-7)
    else:
        assert_bitwise_equal(whitened.advantages, rk.whiten(actual.advantages, mask))


def test_ppo_advantages_without_penalty_ignore_the_reference(backend):
    inputs = [torch.randn(4, 9) for _ in range(2)]
    scores = torch.randn(4)
    nothing = torch.full((4, 9), torch.nan)
    off = rk.ppo_advantages(scores, inputs[0], nothing, inputs[1], None, kl_coef=0.0)
    none = rk.ppo_advantages(scores, inputs[0], None, inputs[1], None, kl_coef=0.5)
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
        assert_close(rk.whiten(x, mask, **options), expected)
        assert_bitwise_equal(
            rk.whiten(x, None, **options), rk.whiten(x, torch.ones_like(mask), **options)
        )


def test_whiten_without_spread(backend):
    one = torch.tensor([5.0, 7.0])
    only = torch.tensor([True, False])
    assert rk.whiten(one, only).tolist() == [0.0, 0.0]
    assert rk.whiten(one, only, shift_mean=False).tolist() == [5.0, 0.0]
    assert (rk.whiten(torch.full((100,), 0.1), eps=0.0) == 0).all()


def test_results_are_constants(backend):
    x, y = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    scores = torch.randn(2, requires_grad=True)
    results = (
        *rk.gae(x, y, whiten=True),
        rk.discounted_returns(x),
        *rk.ppo_advantages(scores, x, y, y, None, kl_coef=0.1),
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
                flat[: len(cu) - 1], flat, None, flat, None, cu_seqlens=cu
            ),
        ):
            with monkeypatch.context() as patch:
                if backend == "triton":
                    # A kernel cannot raise: everything is NaN, unless told to look first.
                    result = call()
                    for r in (result,) if isinstance(result, torch.Tensor) else result:
                        assert r.isnan().all()
                    patch.setattr(_config, "CHECK", True)
                with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
                    call()


def test_bad_arguments(backend):
    x, scores = torch.zeros(2, 4), torch.zeros(2)
    flat = torch.zeros(8)
    for error, match, call in (
        (TypeError, "rewards must be one of", lambda: rk.gae(x.long(), x)),
        (TypeError, "mask must be bool or integer", lambda: rk.gae(x, x, mask=x)),
        (TypeError, "dones must be bool", lambda: rk.gae(x, x, dones=x)),
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
        (ValueError, "scores must have one", lambda: rk.ppo_advantages(flat, x, x, x, None)),
        (
            ValueError,
            "kl_estimator must be one of",
            lambda: rk.ppo_advantages(scores, x, x, x, None, kl_estimator="k4"),
        ),
        (
            ValueError,
            "reward_clip must be",
            lambda: rk.ppo_advantages(scores, x, x, x, None, reward_clip=0.0),
        ),
        (ValueError, "divide the number of rewards", lambda: rk.group_advantages(flat, 3)),
        (TypeError, "groups must be an int", lambda: rk.group_advantages(flat, 2.0)),
        (ValueError, "without greedy", lambda: rk.group_advantages(flat, 2, baseline="greedy")),
        (ValueError, "with greedy", lambda: rk.group_advantages(flat, 2, greedy_rewards=flat)),
        (ValueError, "scale must be one of", lambda: rk.group_advantages(flat, 2, scale="std")),
        (ValueError, r"rewards must be \[B\]", lambda: rk.group_advantages(x, 2)),
        (ValueError, "eps must be >= 0", lambda: rk.whiten(x, eps=-1.0)),
        (ValueError, "mask must have the shape", lambda: rk.whiten(x, flat.bool())),
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
        lambda: rk.ppo_advantages(scores, x, x, x, None),
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
        shaped = rk.ppo_advantages(scores, logprobs * 1, ref, values, mask, kl_coef=0.1)
        a = rk.gae(shaped.rewards, values, mask=mask, gamma=0.99, lam=0.9, whiten=True)
        packed = rk.gae(flat, flat, cu_seqlens=cu)
        g = rk.group_advantages(scores, 2) + rk.group_advantages(bonus, scale, baseline="none")
        whitened = rk.whiten(a.returns, mask) * 2
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
