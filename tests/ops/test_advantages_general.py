"""gae and ppo_advantages with rates as tensors, truncated steps and value_lam, on every backend."""

import itertools

import pytest
import torch

from tests.ops.advantages_cases import assert_close, case, interpreted, lengths, size, spans

import rlhf_kernels as rk
from rlhf_kernels.core import env
from rlhf_kernels.testing import assert_bitwise_equal, generator, random_mask


def loop(steps, end, masked):
    """One sequence by the formula, in Python floats: (advantages, returns) as lists.

    `steps` holds (reward, value, keep, terminated, truncated, value after, gamma, lam, value_lam).
    `end` is the value behind the last step; None takes the last step's "value after", if that step
    is not masked.
    """
    out, advantage, other = [], 0.0, 0.0
    following, started = end, False
    for r, v, keep, terminated, truncated, after, gamma, lam, value_lam in reversed(steps):
        if not keep and masked == "carry":
            out.append((0.0, 0.0))
            continue
        r, v, after = (r, v, after) if keep else (0.0, 0.0, 0.0)
        if end is None and not started:
            following = after
        started = True
        if terminated:
            following, advantage, other = 0.0, 0.0, 0.0
        elif truncated:
            following, advantage, other = after, 0.0, 0.0
        delta = r + gamma * following - v
        advantage = delta + gamma * lam * advantage
        other = delta + gamma * value_lam * other
        following = v
        out.append((advantage, other + v) if keep else (0.0, 0.0))
    return [list(column) for column in zip(*reversed(out), strict=True)] or [[], []]


def oracle(
    rewards, values, *, mask=None, cu_seqlens=None, dones=None, terminated=None, truncated=None,
    bootstrap_values=None, gamma=1.0, lam=0.95, value_lam=None, masked="carry",
):  # fmt: skip
    """(advantages, returns) in fp64, sequence by sequence."""
    shape, sequences = rewards.shape, spans(rewards.shape, cu_seqlens)

    def per_token(x, default):
        """`x` as a list per sequence: one number, one per sequence, or one per token."""
        x = default if x is None else x
        x = x.double() if isinstance(x, torch.Tensor) else x
        if isinstance(x, torch.Tensor) and x.dim() == 1 and len(x) == len(sequences):
            return [[e] * (j - i) for e, (_, i, j) in zip(x.tolist(), sequences, strict=True)]
        full = torch.atleast_2d(torch.zeros(shape, dtype=torch.float64) + x)
        return [full[b, i:j].tolist() for b, i, j in sequences]

    terminated = dones if terminated is None else terminated
    value_lam = lam if value_lam is None else value_lam
    columns = [per_token(*x) for x in (
        (rewards, 0), (values, 0), (None if mask is None else mask != 0, 1), (terminated, 0),
        (truncated, 0), (bootstrap_values, 0), (gamma, 0), (lam, 0), (value_lam, 0),
    )]  # fmt: skip
    whole = bootstrap_values is not None and bootstrap_values.shape == shape
    out = torch.zeros(2, *(shape if len(shape) == 2 else (1, *shape)), dtype=torch.float64)
    for s, (b, i, j) in enumerate(sequences):
        end = 0.0 if bootstrap_values is None else None if whole else float(bootstrap_values[s])
        steps = list(zip(*(c[s] for c in columns), strict=True))
        out[:, b, i:j] = torch.tensor(loop(steps, end, masked))
    return out.reshape(2, *shape)


def flags(shape, g, share=0.06):
    return torch.rand(shape, generator=g) < share


#: Option -> how it is made from (shape of tokens, number of sequences, generator).
RATES = {
    "number": lambda shape, n, g: 0.9,
    "sequence": lambda shape, n, g: torch.rand(n, generator=g),
    "step": lambda shape, n, g: torch.rand(shape, generator=g),
}


def variants():
    """Kinds of (gamma, lam, value_lam), ends, and bootstrap values: every value of each."""
    yield "number", "sequence", None, "none", "sequence"
    yield "number", "number", "number", "dones", "sequence"
    yield "sequence", "number", "sequence", "terminated", None
    yield "number", "step", None, "none", "step"
    yield "step", "sequence", "number", "both", "step"
    yield "sequence", "number", None, "truncated", "step"
    yield "number", "sequence", "step", "both", "step"
    yield "step", "step", "step", "terminated", "sequence"


def general_case(seed, kinds, *, packed, backend, cols=300):
    gamma, lam, value_lam, ends, bootstrap = kinds
    inputs = case(seed, packed=packed, **{"cols": cols} | size(backend, cols))
    g = generator(seed + 100)
    shape, n = inputs["rewards"].shape, len(inputs["bootstrap_values"])
    dones = inputs.pop("dones")
    if ends == "dones":
        inputs["dones"] = dones
    if ends in ("terminated", "both"):
        inputs["terminated"] = dones
    if ends in ("truncated", "both"):
        inputs["truncated"] = flags(shape, g)
    if bootstrap == "step":
        inputs["bootstrap_values"] = torch.randn(shape, generator=g)
    elif bootstrap is None:
        inputs["bootstrap_values"] = None
    for name, kind in (("gamma", gamma), ("lam", lam), ("value_lam", value_lam)):
        if kind is not None:
            inputs[name] = RATES[kind](shape, n, g)
    return inputs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_equals_the_formula(backend, packed, masked):
    sizes = (140,) if interpreted(backend) else (129, 300)
    for seed, (cols, kinds) in enumerate(itertools.product(sizes, variants())):
        inputs = general_case(seed, kinds, packed=packed, backend=backend, cols=cols)
        expected = oracle(**inputs, masked=masked)
        actual = rk.gae(**inputs, masked=masked)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)
        assert expected[0].abs().max() > 0.1
        whitened = rk.gae(**inputs, masked=masked, whiten=True)
        kept = expected[0][inputs["mask"]]
        exact = (expected[0] - kept.mean()) / (kept.var() + 1e-8).sqrt()
        assert_close(whitened.advantages, exact.where(inputs["mask"], 0), 1e-5)
        assert_bitwise_equal(whitened.returns, actual.returns)


def test_lengths(backend):
    kinds = ("number", "sequence", "number", "both", "step")
    for seed, cols in enumerate(lengths(backend)):
        for packed in (False, True):
            inputs = general_case(seed, kinds, packed=packed, backend=backend, cols=cols)
            inputs.pop("mask")
            for a, e in zip(rk.gae(**inputs), oracle(**inputs), strict=True):
                assert_close(a, e)


def test_terminated_is_dones(backend):
    inputs = case(3, packed=False, **size(backend))
    expected = rk.gae(**inputs)
    inputs["terminated"] = inputs.pop("dones")
    for a, e in zip(rk.gae(**inputs), expected, strict=True):
        assert_bitwise_equal(a, e)


def test_tensors_of_one_rate_equal_the_number(backend):
    """0.75 and 0.5 are fp32 numbers, so that the tensors hold the same rates."""
    inputs = case(4, packed=False, **size(backend))
    n, shape = len(inputs["bootstrap_values"]), inputs["rewards"].shape
    expected = oracle(**inputs, gamma=0.75, lam=0.5)
    plain = rk.gae(**inputs, gamma=0.75, lam=0.5)
    for gamma, lam in (
        (torch.full((n,), 0.75), torch.full((n,), 0.5)),
        (torch.full(shape, 0.75), 0.5),
        (0.75, torch.full(shape, 0.5).bfloat16()),
    ):
        found = rk.gae(**inputs, gamma=gamma, lam=lam)
        for a, e, p in zip(found, expected, plain, strict=True):
            assert_close(a, e)
            if backend == "cpu" and isinstance(gamma, torch.Tensor) and gamma.dim() == 1:
                assert_bitwise_equal(a, p)
    # Integers are numbers too.
    ones = torch.ones(n, dtype=torch.int64)
    for a, e in zip(rk.gae(**inputs, lam=ones), oracle(**inputs, lam=1.0), strict=True):
        assert_close(a, e)


def test_decoupled_returns_are_those_of_the_other_lam(backend):
    inputs = case(5, packed=False, **size(backend))
    policy, critic = rk.gae(**inputs, lam=0.25), rk.gae(**inputs, lam=1.0)
    both = rk.gae(**inputs, lam=0.25, value_lam=1.0)
    compare = assert_bitwise_equal if backend in ("reference", "cpu") else assert_close
    compare(both.advantages, policy.advantages.to(both.advantages.dtype))
    compare(both.returns, critic.returns.to(both.returns.dtype))


def test_time_limit_at_the_end_of_a_row(backend):
    """A last step that is truncated receives its sequence's bootstrap value, like a plain end."""
    rewards, values = torch.randn(3, 20), torch.randn(3, 20)
    end = torch.randn(3)
    truncated = torch.zeros(3, 20, dtype=torch.bool)
    truncated[:, -1] = True
    plain = rk.gae(rewards, values, bootstrap_values=end, gamma=0.9)
    cut = rk.gae(rewards, values, truncated=truncated, bootstrap_values=end, gamma=0.9)
    for a, e in zip(cut, plain, strict=True):
        assert_close(a, e.double())


def test_truncation_as_reward(backend):
    """Stable-Baselines3 adds gamma times the value of the last observation to the reward."""
    g = generator(9)
    shape = (3, 70)
    rewards, values, after = (torch.randn(shape, generator=g) for _ in range(3))
    truncated, terminated = flags(shape, g), flags(shape, g)
    found = rk.gae(
        rewards, values, terminated=terminated, truncated=truncated, bootstrap_values=after,
        gamma=0.9,
    )  # fmt: skip
    shaped = rewards + 0.9 * after * (truncated & ~terminated)
    theirs = rk.gae(
        shaped, values, dones=terminated | truncated, bootstrap_values=after[:, -1], gamma=0.9
    )
    for a, e in zip(found, theirs, strict=True):
        assert_close(a, e.double())


def test_next_values_of_every_step(backend):
    """torchrl has a next value for every step; where nothing ends, only the last one counts."""
    rewards, values = torch.randn(2, 33), torch.randn(2, 33)
    after = torch.cat([values[:, 1:], torch.randn(2, 1)], 1)
    found = rk.gae(rewards, values, bootstrap_values=after, gamma=0.9)
    plain = rk.gae(rewards, values, bootstrap_values=after[:, -1], gamma=0.9)
    for a, e in zip(found, plain, strict=True):
        assert_close(a, e.double())


@pytest.mark.parametrize("packed", [False, True])
def test_ppo_advantages_equal_their_parts(backend, packed):
    for seed, kinds in enumerate(list(variants())[2:6:2]):
        inputs = general_case(seed, kinds, packed=packed, backend=backend)
        inputs.pop("dones", None)
        logprobs = inputs.pop("rewards")
        values, cu = inputs.pop("values"), inputs["cu_seqlens"]
        sequences = spans(logprobs.shape, cu)
        scores = torch.linspace(-9, 9, len(sequences))
        ref = logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator(seed))
        for masked in ("carry", "zero"):
            actual = rk.ppo_advantages(
                scores, logprobs, ref, values, **inputs, kl_coef=0.2, reward_clip=4.0,
                whiten=False, masked=masked,
            )  # fmt: skip
            plain = rk.ppo_advantages(
                scores, logprobs, ref, values, inputs["mask"], cu_seqlens=cu, kl_coef=0.2,
                reward_clip=4.0,
            )  # fmt: skip
            assert_bitwise_equal(actual.rewards, plain.rewards)
            expected = oracle(actual.rewards, values, **inputs, masked=masked)
            for a, e in zip(actual, expected, strict=False):
                assert_close(a, e)
            if kinds[3] == "terminated":
                again = rk.gae(actual.rewards, values, **inputs, masked=masked)
                assert_bitwise_equal(actual.advantages, again.advantages)
                assert_bitwise_equal(actual.returns, again.returns)


def test_ppo_advantages_with_only_bootstrap_values(backend):
    logprobs, values = torch.randn(3, 20), torch.randn(3, 20)
    scores, end = torch.randn(3), torch.randn(3)
    found = rk.ppo_advantages(
        scores, logprobs, None, values, bootstrap_values=end, gamma=0.9, whiten=False
    )
    expected = oracle(found.rewards, values, bootstrap_values=end, gamma=0.9)
    for a, e in zip(found, expected, strict=False):
        assert_close(a, e)


def test_what_a_mask_hides_changes_nothing(backend):
    """In "carry" that holds for every tensor; in "zero" masked steps keep their rates and flags."""
    kinds = ("step", "step", "step", "both", "step")
    for packed, masked in itertools.product((False, True), ("carry", "zero")):
        inputs = general_case(6, kinds, packed=packed, backend=backend, cols=70)
        clean = rk.gae(**inputs, masked=masked, whiten=True)
        hidden = ~inputs["mask"]
        names = ["rewards", "values", "bootstrap_values"]
        names += ["gamma", "lam", "value_lam"] * (masked == "carry")
        dirty = inputs | {name: inputs[name].masked_fill(hidden, torch.nan) for name in names}
        if masked == "carry":
            dirty |= {name: inputs[name] | hidden for name in ("terminated", "truncated")}
        for a, e in zip(rk.gae(**dirty, masked=masked, whiten=True), clean, strict=True):
            assert_bitwise_equal(a, e)
            assert (a[hidden] == 0).all()


def test_ends_cut_what_is_behind_them(backend):
    rewards, values, after = torch.randn(2, 90), torch.randn(2, 90), torch.randn(2, 90)
    truncated = torch.zeros(2, 90, dtype=torch.int64)
    truncated[:, 49] = 7
    options = {"truncated": truncated, "bootstrap_values": after, "gamma": 0.9, "value_lam": 0.5}
    whole = rk.gae(rewards, values, **options)
    rewards[:, 60] = torch.nan
    poisoned = rk.gae(rewards, values, **options)
    for a, e in zip(poisoned, whole, strict=True):
        assert a[:, 50:61].isnan().all()
        assert_bitwise_equal(a[:, :50], e[:, :50])


@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_a_row_does_not_depend_on_its_surroundings(backend, masked):
    rows, cols = (3, 70) if interpreted(backend) else (37, 400)
    compare = assert_bitwise_equal
    if backend == "reference":

        def compare(a, e):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    for kinds in (
        ("number", "sequence", "number", "both", "step"),
        ("step", "number", "step", "terminated", "sequence"),
        ("sequence", "number", None, "truncated", "step"),
    ):  # fmt: skip
        whole_inputs = general_case(2, kinds, packed=False, backend="cpu", cols=cols)
        inputs = {k: v for k, v in whole_inputs.items() if k != "cu_seqlens"}
        extra = case(2, packed=False, rows=rows, cols=cols)
        g = generator(3)
        for name, old in inputs.items():
            if not isinstance(old, torch.Tensor):
                continue
            shape = (rows, cols) if old.dim() == 2 else (rows,)
            if name in extra and extra[name] is not None and extra[name].shape == shape:
                inputs[name] = extra[name]
            elif old.dtype is torch.bool:
                inputs[name] = flags(shape, g)
            else:
                inputs[name] = torch.rand(shape, generator=g)

        def scan(inputs, f=lambda v: v, **options):
            found = {k: f(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            return rk.gae(**found, masked=masked, **options)

        whole = scan(inputs)
        for a, w in zip(scan(inputs, lambda v: v.flip(0)), whole, strict=True):
            compare(a, w.flip(0))
        for a, w in zip(scan(inputs, lambda v: v[-1:]), whole, strict=True):
            compare(a, w[-1:])
        cu = torch.arange(rows + 1) * cols
        packed = scan(inputs, lambda v: v.reshape(-1), cu_seqlens=cu)
        for a, w in zip(packed, whole, strict=True):
            compare(a.reshape(rows, cols), w)
        if masked == "zero":
            continue  # What follows a sequence would pass through the padding.
        padded = scan(
            inputs,
            lambda v: torch.nn.functional.pad(v, (0, 77)) if v.dim() == 2 else v,
        )
        for a, w in zip(padded, whole, strict=True):
            compare(a[:, :cols], w)


def test_strides(backend):
    kinds = ("step", "step", "step", "both", "step")
    inputs = general_case(8, kinds, packed=False, backend=backend, cols=70)
    inputs.pop("cu_seqlens")
    expected = rk.gae(**inputs)

    def moved(v):
        wide = v.new_zeros(v.shape[0], 2 * v.shape[1] + 3)
        wide[:, 1 : 1 + 2 * v.shape[1] : 2] = v
        return wide[:, 1 : 1 + 2 * v.shape[1] : 2]

    for change in (lambda v: v.t().contiguous().t(), moved):
        views = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        for a, e in zip(rk.gae(**views), expected, strict=True):
            assert_bitwise_equal(a, e)


def test_empty_and_all_masked(backend):
    x = torch.full((3, 5), torch.nan)
    none = torch.zeros(3, 5, dtype=torch.bool)
    for masked in ("carry", "zero"):
        result = rk.gae(
            x, x, none, truncated=~none, bootstrap_values=x, lam=torch.ones(3), value_lam=0.5,
            masked=masked,
        )  # fmt: skip
        assert all((r == 0).all() for r in result)
    for shape in ((0, 5), (5, 0)):
        x = torch.empty(shape)
        result = rk.gae(
            x, x, lam=x, gamma=torch.ones(shape[0]), truncated=x > 0, bootstrap_values=x
        )
        assert all(r.shape == shape for r in result)
    x = torch.empty(0)
    for cu in ([0], [0, 0, 0]):
        options = {"cu_seqlens": torch.tensor(cu), "lam": x, "truncated": x > 0}
        assert rk.gae(x, x, **options, bootstrap_values=x).advantages.shape == (0,)


def test_bad_offsets(backend, monkeypatch):
    flat = torch.zeros(8)
    for offsets in ([0, 9], [1, 8], [0, 5, 3, 8], [0, -1, 8]):
        cu = torch.tensor(offsets)
        options = {"cu_seqlens": cu, "value_lam": 0.5}
        with monkeypatch.context() as patch:
            if backend in ("cuda", "triton"):
                # What a device would do: a CPU tensor can always be read.
                patch.setattr(rk.core.data_checks, "can_read_on_host", lambda t: False)
                found = rk.gae(flat, flat, **options, truncated=flat > 0, bootstrap_values=flat)
                assert all(t.isnan().all() for t in found)
                patch.undo()
                patch.setattr(env, "CHECK", True)
            with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
                rk.gae(flat, flat, **options)


def test_bad_rates(backend, monkeypatch):
    x = torch.randn(2, 6)
    bad = torch.full((2, 6), 0.5)
    bad[1, 2] = 1.5
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1.5 at .* position 8"):
        rk.gae(x, x, lam=bad)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got nan"):
        rk.gae(x, x, gamma=torch.tensor([0.5, torch.nan]))
    # Where the host may not look, the steps that use the rate are NaN, and no others.
    monkeypatch.setattr(rk.core.data_checks, "can_read_on_host", lambda t: False)
    found = rk.gae(x, x, lam=bad).advantages
    assert found[1, :3].isnan().all() and not found[0].isnan().any()
    assert not found[1, 3:].isnan().any()
    found = rk.gae(x, x, gamma=torch.tensor([0.5, -0.1]), value_lam=0.5)
    assert all(t[1].isnan().all() and not t[0].isnan().any() for t in found)


def test_bad_arguments(backend):
    x, flat = torch.zeros(2, 4), torch.zeros(8)
    ends = torch.zeros(2, 4, dtype=torch.bool)
    inside = ends.clone()
    inside[0, 1] = True
    for error, match, call in (
        (ValueError, "dones are the terminated", lambda: rk.gae(x, x, dones=ends, truncated=ends)),
        (ValueError, "dones are the terminated", lambda: rk.gae(x, x, dones=ends, terminated=ends)),
        (ValueError, "truncated steps need boot", lambda: rk.gae(x, x, truncated=ends)),
        (
            ValueError,
            "before the end of its sequence is truncated, flat position 1",
            lambda: rk.gae(x, x, truncated=inside, bootstrap_values=flat[:2]),
        ),
        (TypeError, "truncated must be bool", lambda: rk.gae(x, x, truncated=x + 2)),
        (TypeError, "terminated must be bool", lambda: rk.gae(x, x, terminated=x + 2)),
        (ValueError, "truncated must have the shape", lambda: rk.gae(x, x, truncated=flat > 0)),
        (ValueError, "lam must have one entry per seq", lambda: rk.gae(x, x, lam=flat)),
        (ValueError, "lam must have one entry per seq", lambda: rk.gae(x, x, lam=x.t())),
        (TypeError, "gamma must be one of", lambda: rk.gae(x, x, gamma=x.cfloat())),
        (TypeError, "value_lam must be a number", lambda: rk.gae(x, x, value_lam="1")),
        (ValueError, r"value_lam must be in \[0, 1\]", lambda: rk.gae(x, x, value_lam=1.5)),
        (
            ValueError,
            "bootstrap_values must have one",
            lambda: rk.gae(x, x, value_lam=1.0, bootstrap_values=flat),
        ),
    ):
        with pytest.raises(error, match=match):
            call()


def test_float_flags_hold_whole_values(backend):
    g = generator(1)
    shape = (2, 40)
    x, after = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    mask = random_mask(*shape)
    ends = {"terminated": flags(shape, g, 0.1), "truncated": flags(shape, g, 0.1)}
    expected = rk.gae(x, x, mask, **ends, bootstrap_values=after, gamma=0.9)
    floats = {k: v.float() for k, v in ends.items()}
    found = rk.gae(x, x, mask.double(), **floats, bootstrap_values=after, gamma=0.9)
    for a, e in zip(found, expected, strict=True):
        assert_bitwise_equal(a, e)


def test_opcheck():
    x, end = torch.randn(4, 9), torch.randn(4)
    mask, cut = random_mask(4, 9), torch.rand(4, 9) < 0.1
    op = torch.ops.rlhf_kernels.general_gae.default
    rates = (None, 0.9, end.sigmoid(), 0.0, x.sigmoid(), 0.0, True)
    for scores in (None, end):
        args = (x, x, mask, None, cut, ~cut, x, end, scores, None, 0.0, "k1", None)
        torch.library.opcheck(op, (*args, *rates, "carry", True, "cpu"))


def test_compiles_without_graph_break():
    def step(x, cut, lam, scores):
        found = rk.gae(x, x, truncated=cut, bootstrap_values=x, lam=lam, value_lam=1.0)
        return *found, *rk.ppo_advantages(scores, x, None, x, lam=lam, bootstrap_values=scores)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with rk.use_backend("cpu"):
        for rows, cols in ((4, 11), (6, 33)):
            x = torch.randn(rows, cols)
            args = x, torch.rand(rows, cols) < 0.1, torch.rand(rows), torch.randn(rows)
            for a, e in zip(compiled(*args), step(*args), strict=True):
                assert_bitwise_equal(a, e)
