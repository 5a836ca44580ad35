"""Gates of policy_loss, geometric corrections and weights of its KL, against the formula."""

import dataclasses
import itertools
import math

import pytest
import torch

from tests.head.bounds import assert_all_within
from tests.head.head_cases import policy_bounds_of, policy_problem, run_policy
from tests.ops import policy_oracle
from tests.ops.bits import check_compiled, same
from tests.ops.policy_cases import BASES, Config, make_inputs, portion, run

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import enums
from rlhf_kernels.config.metrics import POLICY_METRICS
from rlhf_kernels.testing import assert_bitwise_equal, to_float64

GATES = (
    {"gate": "tv", "gate_low": 0.012, "gate_high": 0.011},
    {"gate": "tv", "gate_high": 0.013, "gate_against": "rollout"},
    {"gate": "tv", "gate_low": 0.012, "gate_high": 0.014, "gate_two_sided": True},
    {"gate": "binary_kl", "gate_low": 0.002, "gate_high": 0.003},
    {"gate": "binary_kl", "gate_low": 0.002, "gate_against": "rollout"},
    {"gate": "binary_kl", "gate_low": 0.002, "gate_high": 0.003, "gate_two_sided": True},
    {"gate": "ratio", "gate_low": 0.61, "gate_high": 1.57},
    {"gate": "ratio", "gate_high": 1.3, "gate_against": "rollout"},
)
SEQUENCE_GATES = (
    {"gate": "opsm", "gate_low": 0.013},
    {"gate": "opsm", "gate_low": 0.11, "gate_against": "rollout"},
)
KL_WEIGHTS = (
    {"kl_weight": "detached-ratio"},
    {"kl_weight": "detached-ratio", "kl_weight_max": 1.1},
    {"kl_weight": "ratio", "kl_weight_max": 1.1},
    {"kl_weight": "one"},
    {"kl_weight": None},
    {"kl_weight": "ratio"},
)
CORRECTIONS = (
    {},
    {"correction_level": "geometric", "correction_min": 0.95, "correction_max": 1.02},
    {"correction_level": "token", "correction_max": 1.1},
    {"correction_level": "geometric", "correction_mode": "mask", "correction_max": 1.02},
    {"correction_level": "sequence", "correction_max": 1.5},
)


def configs():
    """Every base with several gates, weights of the KL and corrections."""
    kinds = [itertools.cycle(x) for x in (KL_WEIGHTS, CORRECTIONS, ("k3", "k1", "k2", "abs"))]
    aggregations = itertools.cycle(enums.AGGREGATIONS)
    for gate, base in itertools.product(({}, *GATES, *SEQUENCE_GATES), BASES):
        weight, correction, estimator = map(next, kinds)
        aggregation = next(aggregations)
        yield Config(
            **base, **gate, **weight, **correction, kl_coef=0.3, entropy_coef=0.05,
            kl_estimator=estimator, aggregation=aggregation,
            normalizer=7.5 if aggregation == "constant" else None,
        )  # fmt: skip


def drawn(rows, cols, seed=0):
    """Inputs whose log-probabilities are below 0, and weights."""
    args, options = make_inputs(rows, cols, seed=seed)
    lower = [(t.detach() - 2.3).requires_grad_(t.requires_grad) for t in args[:2]]
    assert max(float(t.max()) for t in lower) < 0
    options |= {k: options[k] - 2.3 for k in ("ref_logprobs", "rollout_logprobs")}
    options["weights"] = torch.rand(rows, cols) + 0.1
    return (*lower, *args[2:]), options


def matches(config, args, options, exact, leaves):
    expected = torch.autograd.grad(exact["loss"], leaves)
    _, metrics, *gradients = run(rk.policy_loss, args, options, config=config)
    named = dict(zip(POLICY_METRICS, metrics, strict=True))
    scale = max(float(v.detach().abs()) for v in exact.values())
    for name, value in exact.items():
        torch.testing.assert_close(named[name].double(), value, rtol=1e-5, atol=1e-6 * scale)
    for g, e in zip(gradients, expected, strict=True):
        size = float(e.abs().max())
        torch.testing.assert_close(g.double(), e, rtol=4e-5, atol=4e-6 * size)
    return named


@pytest.mark.parametrize("part", range(3))
def test_matches_the_formula(backend, part):
    args, options = drawn(5, 61, part)
    wide, wide_options = to_float64(args), to_float64(options)
    leaves = (wide[0], wide_options["entropy"])
    for config in portion(backend, list(configs())[part::3], part, 6):
        exact = policy_oracle.policy_loss(*wide, **wide_options, config=config)
        named = matches(config, args, options, exact, leaves)
        for side in ("low", "high"):
            bound = getattr(config, f"gate_{side}")
            assert (named[f"gate_frac_{side}"] > 0) == (bound is not None), (config, side)


@pytest.mark.parametrize("gate", [g for g in enums.GATES if g != "opsm"])
def test_a_gate_drops_the_objective_and_nothing_else(backend, gate):
    lp = torch.tensor([[-0.1, -2.0, -0.5, -0.5, -1.0, -3.0]], requires_grad=True)
    old = torch.tensor([[-2.0, -0.1, -0.6, -0.4, -0.1, -1.0]])
    a = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    mask, ref = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6)
    bounds = {"gate_low": 0.5, "gate_high": 2.0} if gate == "ratio" else {
        "gate_low": 0.2, "gate_high": 0.2}  # fmt: skip
    base = {"objective": "reinforce", "kl_coef": 0.5, "kl_estimator": "k1"}
    base |= {"aggregation": "constant", "normalizer": 1.0}
    loss, metrics = rk.policy_loss(
        lp, old, a, mask, ref_logprobs=ref, config=Config(**base, gate=gate, **bounds)
    )
    (g,) = torch.autograd.grad(loss, lp)
    # The fifth moves against its advantage: only "ratio" drops it too.
    kept = torch.tensor([[0, 0, 1, 1, int(gate != "ratio"), 0]])
    assert_bitwise_equal(g, -a * kept + 0.5)
    assert metrics["gate_frac_high"].item() == pytest.approx(1 / 6)
    low = 3 if gate == "ratio" else 2
    assert metrics["gate_frac_low"].item() == pytest.approx(low / 6)
    assert metrics["kl_loss"].item() == pytest.approx(float(lp.sum()))


@pytest.mark.parametrize("gate", GATES[::3], ids=lambda g: g["gate"])
def test_extremes_of_gates(backend, gate):
    """Infinite and absent log-probabilities: dropped where their probability left the bounds."""
    inf, nan = math.inf, math.nan
    # The last two that are kept: an old probability of 1, near and far.
    lp = torch.tensor(
        [[-inf, -0.1, 0.0, 0.0, 1e-7, -50.0, -1e-4, -1.5, -inf, nan]], requires_grad=True
    )
    old = torch.tensor([[-0.1, -inf, 0.0, -3.0, 0.0, -50.0, 0.0, 0.0, -inf, -1.0]])
    a = torch.tensor([[-1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    config = Config(objective="reinforce", aggregation="constant", normalizer=1.0, **gate)
    loss, metrics = rk.policy_loss(lp, old, a, mask, config=config)
    (g,) = torch.autograd.grad(loss, lp)
    kept = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0, 0, 0]])
    assert torch.equal(g, -a * kept) and loss.isfinite()
    assert metrics["gate_frac_low"] == 2 / 8 and metrics["gate_frac_high"] == 2 / 8
    # Against a rollout that is missing, as against old.
    there = dataclasses.replace(config, gate_against="rollout")
    missing = torch.full_like(old, nan)
    found, _ = rk.policy_loss(lp, old, a, mask, rollout_logprobs=missing, config=there)
    assert_bitwise_equal(torch.autograd.grad(found, lp)[0], g)
    # NaN in an unmasked token shows.
    assert rk.policy_loss(lp, old, a, mask * 0 + 1, config=config).loss.isnan()


def test_extremes_of_a_gate_by_sequences(backend):
    """An infinite log-probability decides only over its own sequence and its own anchor."""
    inf, nan = math.inf, math.nan
    # By rows: old is -inf where the rollout is a number, where it is missing, where both are -inf
    # and the policy too; a policy that gave up a token; a masked NaN.
    lp = torch.tensor([[-1.5, -1.2], [-1.5, -1.2], [-inf, -1.5], [-inf, -1.0], [nan, -1.5]])
    old = torch.tensor([[-inf, -1.3], [-inf, -1.3], [-inf, -1.0], [-1.0, -1.0], [nan, -1.6]])
    rollout = torch.tensor([[-1.1, -1.0], [nan, -0.1], [-inf, -1.0], [-1.0, -1.0], [nan, -1.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1]])
    lp.requires_grad_()
    a = torch.full_like(old, -1.0)
    options = {"objective": "reinforce", "aggregation": "constant", "normalizer": 1.0}
    for anchor, kept in (("old", [1, 1, 0, 0, 1]), ("rollout", [0, 1, 0, 0, 0])):
        config = Config(**options, gate="opsm", gate_low=0.11, gate_against=anchor)
        loss, metrics = rk.policy_loss(lp, old, a, mask, rollout_logprobs=rollout, config=config)
        (g,) = torch.autograd.grad(loss, lp)
        expected = torch.tensor(kept)[:, None] * mask
        assert torch.equal(g, expected.float()), (anchor, g)
        assert metrics["gate_frac_low"].item() == pytest.approx(
            float((mask - expected).sum()) / float(mask.sum())
        )
        there = torch.where(expected.bool(), lp.detach(), 0).sum()
        torch.testing.assert_close(loss.detach(), there)


@pytest.mark.parametrize(
    "options", [{"ratio_level": "sequence-token"}, {"kl_weight": "one"}], ids=str
)
def test_a_token_that_the_policy_gave_up_has_a_finite_loss(backend, options):
    lp = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    old, a = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = rk.policy_loss(lp, old, a, mask, config=Config(**options))
    (g,) = torch.autograd.grad(loss, lp)
    assert metrics["kl_loss"] == 0
    # The second token's ratio is 0, clipped to 0.8; with it that of the sequence.
    value, first = (0.4, 0.0) if "ratio_level" in options else (-0.1, -0.5)
    torch.testing.assert_close(loss.detach(), torch.tensor(value))
    assert torch.equal(g, torch.tensor([[first, 0.0]]))


def test_an_infinite_ratio_is_within_a_bound_that_is_absent(backend):
    inf = math.inf
    lp = torch.tensor([[-inf, -0.5, -1.0, -1.0, -1.0]])
    old = torch.tensor([[-1.0, -inf, -1.0, -3.0, -0.1]])
    args = (lp, old, torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool))
    for bounds, low, high in (
        ({"gate_high": 1.5}, 0, 2),
        ({"gate_low": 0.5}, 2, 0),
        ({"gate_low": 0.0, "gate_high": 1.5}, 0, 2),
        ({"gate_low": 1e-30, "gate_high": 1e30}, 1, 1),
    ):
        metrics = rk.policy_loss(*args, config=Config(gate="ratio", **bounds)).metrics
        found = [round(5 * float(metrics[f"gate_frac_{side}"])) for side in ("low", "high")]
        assert found == [low, high], bounds


def test_bits_of_rows_packing_masks_and_compilation(backend):
    lengths = [130, 0, 1, 33, 130]
    args, options = drawn(5, 130)
    inside = torch.arange(130) < torch.tensor(lengths).unsqueeze(-1)
    args = (*args[:3], args[3] & inside)

    def pack(t):
        return t.detach()[inside].requires_grad_(t.requires_grad)

    def spoil(t):
        return torch.where(args[3], t, math.nan).detach().requires_grad_(t.requires_grad)

    flat, more = tuple(map(pack, args)), {k: pack(v) for k, v in options.items()}
    more["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    spoiled = (*map(spoil, args[:3]), args[3])
    spoiled_options = {k: spoil(v) for k, v in options.items()}
    for config in portion(backend, list(configs())[20::23], 0, 3):
        whole = run(rk.policy_loss, args, options, config=config)
        for a, e in zip(
            run(rk.policy_loss, spoiled, spoiled_options, config=config), whole, strict=True
        ):
            assert_bitwise_equal(a, e)
        packed = run(rk.policy_loss, flat, more, config=config)
        torch.testing.assert_close(packed[:2], whole[:2], rtol=1e-5, atol=1e-6)
        for g, e in zip(packed[2:], whole[2:], strict=True):
            same(backend)(g, e[inside])
        empty = (*args[:3], torch.zeros_like(args[3]))
        for result in run(rk.policy_loss, empty, options, config=config):
            assert result.eq(0).all()
    config = Config(**GATES[3], kl_coef=0.1, kl_weight="one")

    def step(logprobs, old, advantages, mask, ref):
        loss, metrics = rk.policy_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, weights=ref.exp(), config=config
        )
        return 1.5 * loss, metrics.tensor

    batches = (
        (*more[0], more[1]["ref_logprobs"]) for more in (make_inputs(3, 9), make_inputs(3, 20))
    )
    check_compiled(step, batches, lambda batch: (batch[0],))


@pytest.mark.parametrize(
    "options", (*GATES[::3], *SEQUENCE_GATES, *KL_WEIGHTS[1:4], CORRECTIONS[1]), ids=str
)
def test_of_the_head_match_fp64(backend, options):
    leaves, tokens, constants = policy_problem()
    constants = constants | {"weights": torch.rand(tokens[0].shape) + 0.1}
    if options.get("gate") == "tv":
        options = {**options, "gate_low": 0.002, "gate_high": 0.001}
    if options.get("gate") == "binary_kl":
        options = {**options, "gate_low": 1e-4, "gate_high": 1e-4}
    if options.get("gate") == "ratio":
        options = {**options, "gate_low": 0.87, "gate_high": 1.13}
    if options.get("gate") == "opsm":
        # A sequence or two have moved away from old.
        options, tokens = {**options, "gate_low": 0.0}, (tokens[0], tokens[1] + 0.1, *tokens[2:])
    config = Config(kl_coef=0.3, entropy_coef=0.05, **options)
    actual = run_policy(
        rk.linear_policy_loss, leaves, tokens, **constants, config=config, chunk_tokens=16
    )
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), config=config,
    )  # fmt: skip
    assert_all_within(actual, exact, policy_bounds_of(leaves, tokens, constants, config=config))
    if config.gate is not None:
        named = dict(zip(POLICY_METRICS, actual[1].tolist(), strict=True))
        assert named["gate_frac_low"] > 0
        assert (named["gate_frac_high"] > 0) == (config.gate_high is not None)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_tokens_that_were_certain(backend, gate):
    """Log-probabilities of 0, and above it by a rounding, as they come from 16 bits."""
    old = torch.tensor([0.0, -0.0, 1e-3, -1e-9, -1e-4, -0.5]).repeat(9)
    gaps = (0.0, 1e-3, -1e-3, -0.1, -0.7, -5.0, -60.0, 0.2, 2e-3)
    logprobs = old + torch.tensor(gaps).repeat_interleave(6)
    anchors = {"rollout_logprobs": old[:, None]} if gate.get("gate_against") == "rollout" else {}
    mask, config = torch.ones(54, 1, dtype=torch.bool), Config(objective="reinforce", **gate)
    for advantage in (1.5, -1.5):
        args = (logprobs[:, None], old[:, None], torch.full((54, 1), advantage), mask)
        found = rk.policy_loss(*args, **anchors, config=config).metrics
        exact = reference.policy_loss(*to_float64(args), **to_float64(anchors), config=config)[1]
        exact = dict(zip(POLICY_METRICS, exact.tolist(), strict=True))
        for name in ("gate_frac_low", "gate_frac_high"):
            assert round(54 * float(found[name])) == round(54 * exact[name]), (advantage, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "kl", "gate_high": 0.1}, "gate must be None or one of"),
        ({"gate": "opsm"}, "gate_low must be a number"),
        ({"gate": "opsm", "gate_low": 0.1, "gate_high": 0.2}, "gate_high must be None"),
        ({"gate": "tv"}, "gate_high must be a number, or gate_low"),
        ({"gate_low": 0.1}, "gate must be one of"),
        ({"gate": "tv", "gate_low": -0.1}, "gate_low must be a finite number >= 0"),
        ({"gate_against": "rollout"}, "gate_against must be 'old'"),
        ({"gate": "tv", "gate_low": 0.1, "gate_against": "ref"}, "gate_against must be one of"),
        ({"gate": "ratio", "gate_low": 0.5, "gate_two_sided": True}, "gate_two_sided must be"),
        ({"gate": "ratio", "gate_low": 2.0, "gate_high": 1.0}, "gate_low must be at most"),
        ({"gate_two_sided": 1}, "gate_two_sided must be a bool"),
        ({"kl_weight": "k1"}, "kl_weight must be None or one of"),
        ({"kl_weight_max": 2.0}, "kl_weight_max must be None"),
        ({"kl_weight": "one", "kl_weight_max": 2.0}, "kl_weight_max must be None"),
        ({"kl_weight": "ratio", "kl_weight_max": 0.0}, "kl_weight_max must be a finite number > 0"),
        ({"correction_level": "geometric"}, "correction_max must be"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=f"PolicyLossConfig: {message}"):
        Config(**options)


def test_a_gate_against_the_rollout_needs_it(backend):
    args, _ = make_inputs(2, 5)
    config = Config(gate="tv", gate_high=0.1, gate_against="rollout")
    with pytest.raises(ValueError, match="rollout_logprobs must be given, since gate_against"):
        rk.policy_loss(*args, config=config)
