"""weights= of policy_loss and linear_policy_loss: a token's whole term times its weight."""

import itertools
import math

import pytest
import torch

from tests.head.bounds import assert_all_within
from tests.head.head_cases import policy_bounds_of, policy_problem, run_policy
from tests.ops import policy_oracle
from tests.ops.bits import same
from tests.ops.policy_cases import BASES, Config, make_inputs, portion, run

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import enums
from rlhf_kernels.config.metrics import POLICY_METRICS
from rlhf_kernels.core import env
from rlhf_kernels.testing import assert_bitwise_equal, generator, to_float64

TERMS = {"kl_coef": 0.3, "entropy_coef": 0.05}


def drawn(shape, dtype=torch.float32):
    weights = 2 * torch.rand(shape, generator=generator(5))
    weights.view(-1)[::4] = 0.0
    return weights.to(dtype)


def configs():
    corrections = itertools.cycle(
        ({}, {"correction_level": "token", "correction_max": 1.1},
         {"correction_level": "sequence", "correction_mode": "mask", "correction_max": 2.0})
    )  # fmt: skip
    estimators, weighted = (
        itertools.cycle(("k3", "k1", "k2", "abs")),
        itertools.cycle((None, "ratio", "ratio")),
    )
    for base, aggregation in itertools.product(BASES, enums.AGGREGATIONS):
        yield Config(
            **base, **TERMS, **next(corrections), aggregation=aggregation,
            kl_estimator=next(estimators), kl_weight=next(weighted),
            normalizer=7.5 if aggregation == "constant" else None,
        )  # fmt: skip


@pytest.mark.parametrize("of", ("tokens", "sequences"))
def test_matches_the_formula(backend, of):
    args, options = make_inputs(5, 61)
    options["weights"] = drawn((5, 61) if of == "tokens" else (5,))
    plain = options | {"weights": None}
    wide, wide_options = to_float64(args), to_float64(options)
    for config in portion(backend, configs(), 0 if of == "tokens" else 3, 7):
        exact = policy_oracle.policy_loss(*wide, **wide_options, config=config)
        leaves = (wide[0], wide_options["entropy"])
        expected = torch.autograd.grad(exact["loss"], leaves)
        _, metrics, *gradients = run(rk.policy_loss, args, options, config=config)
        scale = max(float(v.abs()) for v in exact.values())
        named = dict(zip(POLICY_METRICS, metrics, strict=True))
        for name, value in exact.items():
            torch.testing.assert_close(named[name].double(), value, rtol=1e-5, atol=1e-6 * scale)
        for g, e in zip(gradients, expected, strict=True):
            size = float(e.abs().max())
            assert size > 1e-5
            torch.testing.assert_close(g.double(), e, rtol=2e-5, atol=2e-6 * size)
        # What is no term of the loss stays as it is, to the bit.
        _, without, *_ = run(rk.policy_loss, args, plain, config=config)
        same(backend)(metrics[4:], without[4:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_one_changes_no_bit_and_zero_leaves_nothing(backend, dtype):
    args, options = make_inputs(4, 300, dtype)
    for base in portion(backend, BASES, 1, 5):
        config = Config(**base, **TERMS, aggregation="seq-mean-token-mean")
        plain = run(rk.policy_loss, args, options, config=config)
        one = options | {"weights": torch.ones(4, 300, dtype=dtype)}
        torch.testing.assert_close(
            run(rk.policy_loss, args, one, config=config), plain, rtol=1e-6, atol=1e-9
        )
        none = options | {"weights": torch.zeros(4, dtype=torch.int32)}
        loss, metrics, g, h = run(rk.policy_loss, args, none, config=config)
        assert loss == 0 and metrics[:4].eq(0).all() and g.eq(0).all() and h.eq(0).all()


def test_per_sequence_packed_strided_and_masked(backend):
    lengths = [130, 0, 1, 33, 130]
    args, options = make_inputs(5, 130)
    inside = torch.arange(130) < torch.tensor(lengths).unsqueeze(-1)
    args = (*args[:3], args[3] & inside)
    config = Config(**TERMS, ratio_level="sequence", aggregation="seq-mean-token-mean")
    each = drawn((5,)) + 0.1
    expected = run(rk.policy_loss, args, options | {"weights": each}, config=config)
    whole = each.unsqueeze(-1).expand(5, 130)
    # Other strides, and NaN and negative numbers where nobody looks.
    hidden = torch.where(args[3], whole, torch.tensor([math.nan, -1.0]).repeat(65))
    for weights in (whole, whole.t().contiguous().t(), hidden):
        found = run(rk.policy_loss, args, options | {"weights": weights}, config=config)
        for a, e in zip(found, expected, strict=True):
            assert_bitwise_equal(a, e)

    def pack(t):
        return t.detach()[inside].requires_grad_(t.requires_grad)

    flat, more = tuple(map(pack, args)), {k: pack(v) for k, v in options.items()}
    more["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    for weights in (each, pack(whole)):
        found = run(rk.policy_loss, flat, more | {"weights": weights}, config=config)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)
        for g, e in zip(found[2:], expected[2:], strict=True):
            same(backend)(g, e[inside])


@pytest.mark.parametrize("bad", (-1.0, math.nan, math.inf))
def test_bad_weights(backend, bad, monkeypatch):
    args, options = make_inputs(3, 40)
    config = Config(**TERMS)
    weights = torch.ones(3, 40)
    weights[1, args[3][1].nonzero()[2]] = bad
    row = torch.tensor([1.0, bad, 1.0])
    if backend in ("cuda", "triton"):
        # As on a GPU, where nobody looks.
        for w in (weights, row):
            loss, metrics, g, h = run(rk.policy_loss, args, options | {"weights": w}, config=config)
            each = w if w.dim() == 2 else w.unsqueeze(-1).expand(3, 40)
            wrong = ~((each >= 0) & (each < math.inf))
            wrong = wrong & args[3]
            assert loss.isnan() and metrics[:4].isnan().all() and metrics[4:].isfinite().all()
            assert torch.equal(g.isnan(), wrong) and torch.equal(h.isnan(), wrong)
        monkeypatch.setattr(env, "CHECK", True)
    for w in (weights, row):
        with pytest.raises(ValueError, match="policy_loss: weights must be finite numbers >= 0"):
            run(rk.policy_loss, args, options | {"weights": w}, config=config)
    flat = [t.detach().reshape(-1) for t in args]
    with pytest.raises(ValueError, match=r"flat position 4\d"):
        rk.policy_loss(*flat, weights=row, cu_seqlens=torch.tensor([0, 40, 80, 120]))
    with pytest.raises(ValueError, match="weights must have the shape of logprobs"):
        rk.policy_loss(*args, weights=torch.ones(4))
    with pytest.raises(TypeError, match="weights must be one of"):
        rk.policy_loss(*args, weights=torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize("of", ("tokens", "sequences"))
@pytest.mark.parametrize("level", enums.RATIO_LEVELS)
def test_of_the_head_match_fp64(backend, level, of):
    leaves, tokens, constants = policy_problem()
    shape = tokens[0].shape
    constants = constants | {"weights": drawn(shape if of == "tokens" else shape[:1]) + 0.01}
    config = Config(**TERMS, ratio_level=level, aggregation="seq-mean-token-mean")
    actual = run_policy(
        rk.linear_policy_loss, leaves, tokens, **constants, config=config, chunk_tokens=16
    )
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), config=config,
    )  # fmt: skip
    assert_all_within(actual, exact, policy_bounds_of(leaves, tokens, constants, config=config))


def test_bad_weights_of_the_head(backend):
    leaves, tokens, constants = policy_problem()
    for weights in (torch.full(tokens[0].shape, -1.0), torch.full(tokens[0].shape[:1], math.nan)):
        with pytest.raises(ValueError, match="linear_policy_loss: weights must be finite"):
            run_policy(rk.linear_policy_loss, leaves, tokens, **constants, weights=weights)


def test_weights_are_constants(backend):
    args, options = make_inputs(3, 40)
    weights = drawn((3, 40)).requires_grad_()
    loss, _ = rk.policy_loss(*args, **options, weights=weights, config=Config(**TERMS))
    found = torch.autograd.grad(loss, (args[0], weights), allow_unused=True)
    assert found[0].abs().max() > 0 and found[1] is None
