"""Calls of every operation that between them reach every Triton kernel and code variant."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.cases.combinations import one_by_one, pairs, products
from tests.kernels import triton_sweeps
from tests.kernels.triton_case import (
    BF16,
    DTYPES,
    FP32,
    LAYOUTS,
    ROW_LAYOUTS,
    Case,
    case,
    far,
    inputs,
    inputs_of,
    label,
    laid,
)

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.config import enums
from rlhf_kernels.core import pair_options
from rlhf_kernels.core.pair_options import PairOptions
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.kernels import triton
from rlhf_kernels.ops import _calls
from rlhf_kernels.ops._calls import GIVEN

Variants = Iterable[dict[str, Any]]
#: Results that the backward starts from. "no entropy" does not ask for entropies.
WANTS: dict[str, Callable[[Any], Any]] = {
    "both": lambda r: r,
    "logprobs": lambda r: r.logprobs,
    "entropy": lambda r: r.entropy,
    "no entropy": lambda r: r,
}
MASKS = (torch.bool, torch.int64)
INTEGERS = (torch.int64, torch.int32)
NORMALIZERS = (None, 7.0, GIVEN)


def examples() -> Iterator[Case]:
    """What `warmup` runs."""
    for function, dtype in itertools.product(_calls.OPERATIONS, DTYPES):
        named = Counter[str]()
        for call in _calls.examples(function, inputs(4, 64, dtype)):
            name = call.op + "_support" * ("indptr" in call.tensors)
            name = "general_" * ("lam" in call.tensors) + name
            named[name] += 1
            # Further examples of the same kernels.
            name += f"_{named[name]}" * (named[name] > 1)
            yield Case(f"example/{name}/{label({'dtype': dtype})}", call)


def completed(v: dict[str, Any]) -> dict[str, Any]:
    """The options of a variant, with those that they require."""
    v = dict(v)
    if "wants" in v:
        wants = v.pop("wants")
        v |= {"entropy": wants != "no entropy", "outputs": WANTS[wants]}
    if v.get("kl_estimator"):
        v["kl_coef"] = 0.1
    elif "kl_estimator" in v:
        del v["kl_estimator"]
        v["ref_logprobs"] = None
    if "grad" in v:
        v["grads"] = None if v.pop("grad") else ()
    if v.get("baseline") == "greedy":
        v["greedy_rewards"] = GIVEN
    if v.get("aggregation") == "constant":
        v["normalizer"] = v["normalizer"] or 7.0
    return v


def varied(function: Callable[..., Any], variants: Variants, suffix: str = "") -> Iterator[Case]:
    """A call for each variant: a dtype, a layout and options of `function`."""
    for name, v in {label(v): completed(v) for v in variants}.items():
        dtype, layout = v.pop("dtype"), v.pop("layout", "")
        x = inputs_of(layout, dtype)
        yield case(f"{function.__name__}{suffix}/{name}", function, x, layout, **v)


class _SixteenBits(torch.autograd.Function):
    """Log-probabilities and entropies of fp32 logits, whose gradient is written in bfloat16."""

    OPTIONS = RowOptions(0.7, 0.0, True, -100)

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        launcher = triton.launchers()["token_logprobs"]
        logprobs, entropies, stats, *_ = launcher(logits, labels, None, _SixteenBits.OPTIONS)
        ctx.save_for_backward(logits, labels, stats)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        logits, labels, stats = ctx.saved_tensors
        out = torch.empty_like(logits, dtype=BF16)
        arguments = (out, logits, labels, None, stats, g, h, _SixteenBits.OPTIONS)
        triton.launchers()["token_logprobs_backward_into"](*arguments)
        return out.to(logits.dtype), None


class _SixteenBitsOfTwo(torch.autograd.Function):
    """The divergence of fp32 logits, whose gradient is written in bfloat16."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, options: PairOptions) -> Tensor:
        kl, stats, _ = triton.launchers()["kl_divergence"](logits, ref_logits, options)
        ctx.save_for_backward(logits, ref_logits, stats)
        ctx.options = options
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, ref_logits, stats = ctx.saved_tensors
        out = torch.empty_like(logits, dtype=BF16)
        arguments = (out, logits, ref_logits, stats, grad, ctx.options)
        triton.launchers()["kl_divergence_backward_into"](*arguments)
        return out.to(logits.dtype), None, None


def sixteen_bits() -> Iterator[Case]:
    """What the fused head launches on a GPU: gradients in bfloat16 of logits in fp32."""
    for layout in ("even", "odd"):
        x = inputs_of(layout, FP32)
        made = case(f"token_logprobs/bf16 of fp32,layout={layout!r}", rk.token_logprobs, x, layout)
        yield made._replace(
            call=made.call._replace(
                function=lambda logits, labels: _SixteenBits.apply(logits, labels)
            )
        )
        for direction in enums.DIRECTIONS:
            name = f"kl_divergence/bf16 of fp32,layout={layout!r},direction={direction!r}"
            made = case(name, rk.kl_divergence, x, layout)
            of = pair_options.checked("kl_divergence", direction, None, 0.7)
            yield made._replace(
                call=made.call._replace(
                    function=lambda logits, ref_logits, of=of: _SixteenBitsOfTwo.apply(
                        logits, ref_logits, of
                    )
                )
            )


def rows(full: bool) -> Iterator[Case]:
    yield from sixteen_bits()
    combine = pairs if full else one_by_one
    axes = {
        "dtype": DTYPES,
        "layout": ROW_LAYOUTS,
        "softcap": (None, 30.0),
        "temperature": (0.7, GIVEN),
        "labels": INTEGERS,
        "wants": tuple(WANTS),
    }
    variants = list(combine(**axes))
    # Together they need the most registers.
    variants += [dict(variants[0], dtype=d, softcap=30.0, layout=a)
                 for d in DTYPES for a in ("even", "odd")]  # fmt: skip
    yield from varied(rk.token_logprobs, variants)

    def inplace(logits: Tensor, **options: Any) -> Any:
        return rk.token_logprobs(logits * 1, **options)

    even = inputs_of("even", BF16)
    made = case("token_logprobs/inplace", rk.token_logprobs, even, inplace_backward=True)
    yield made._replace(call=made.call._replace(function=inplace))
    x = inputs(2, 2, vocabulary=256)
    yield case("token_logprobs/far", rk.token_logprobs, x, logits=far(BF16), entropy=True)

    # Over the tokens that a sampler kept, of logits and of the fused head.
    axes |= {"layout": ("even",), "support": INTEGERS}
    yield from varied(rk.token_logprobs, combine(**axes), "_support")
    axes |= {"layout": ("even", "odd"), "bias": (GIVEN, None)}
    first = {k: v[:1] for k, v in axes.items() if k not in ("dtype", "layout")}
    some = [*products(**{k: axes[k] for k in ("dtype", "layout")} | first)]
    some += [dict(v, bias=None) for v in some if v["dtype"] is DTYPES[0]]
    head = [*some, *pairs(**axes)] if full else some
    yield from varied(rk.linear_token_logprobs, head, "_support")

    axes = {"dtype": DTYPES, "layout": ROW_LAYOUTS, "direction": enums.DIRECTIONS}
    yield from varied(rk.kl_divergence, combine(**axes))
    axes |= {"entropy": (True, False), "softcap": (None, 30.0), "ref_softcap": (None, 20.0)}
    axes |= {"ref_temperature": ("same", 0.9)}
    yield from varied(rk.kl_divergence, combine(**axes))
    # One tensor at an address that is a multiple of 16, the other not.
    logits = made.call.tensors["logits"]
    shifted = laid(logits, "shifted")
    for name, x, ref in (("ref", logits, shifted), ("logits", shifted, logits)):
        both = {"logits": x, "ref_logits": ref}
        yield case(f"kl_divergence/{name} shifted", rk.kl_divergence, even, **both)
    both = {"logits": far(BF16), "ref_logits": far(BF16)}
    yield case("kl_divergence/far", rk.kl_divergence, even, **both)


def scans(full: bool) -> Iterator[Case]:
    steps = {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "mask": (None, *MASKS),
        "masked": ("carry", "zero"),
    }
    ends = {"dones": (None, torch.bool), "bootstrap_values": (None, GIVEN)}
    whitening = {"whiten": (False, True)}
    penalties = {"kl_estimator": ("k1", "k2", "k3", "abs", None), "reward_clip": (None, 5.0)}
    for function, axes in (
        (rk.gae, steps | ends | whitening),
        (rk.discounted_returns, steps | ends),
        (rk.ppo_advantages, steps | whitening | penalties),
    ):
        variants = list((pairs if full else one_by_one)(**axes))
        # Much at once: masked, packed, cut and continued.
        variants.append({k: v[-1] for k, v in axes.items()})
        variants.append(variants[-1] | {"layout": "long", "masked": "carry"})
        yield from varied(function, variants)


def general(full: bool) -> Iterator[Case]:
    """gae with rates per sequence and per step, truncated steps and a lam of the returns."""
    for layout, masked in (("padded", "carry"), ("packed", "zero")):
        x = inputs_of(layout, BF16)
        steps = x.tokens().sigmoid()
        rates = {"gamma": steps, "lam": GIVEN, "value_lam": steps}
        ends = {"terminated": GIVEN, "truncated": GIVEN, "bootstrap_values": x.tokens()}
        for flags in ({}, {"mask": GIVEN, **ends}):
            name = f"general_gae/{layout},ends={bool(flags)}"
            yield case(name, rk.gae, x, layout, masked=masked, **rates, **flags)


def statistics(full: bool) -> Iterator[Case]:
    combine = pairs if full else one_by_one
    yield from varied(rk.whiten, combine(
        dtype=DTYPES, layout=("padded", "strided"), mask=(torch.bool, None, torch.int64),
        shift_mean=(True, False),
    ))  # fmt: skip
    yield from varied(rk.group_advantages, combine(
        dtype=(*DTYPES, torch.float64), groups=(4, GIVEN),
        baseline=("mean", "leave-one-out", "greedy", "none"), scale=("group", "batch", "none"),
    ))  # fmt: skip
    yield from varied(rk.kl_penalty, combine(
        estimator=("k3", "k1", "k2", "abs", "k1+", "k3+", "abs+"), dtype=DTYPES,
        ref_logprobs=DTYPES,
    ))  # fmt: skip


def presets() -> Iterator[tuple[str, PolicyLossConfig]]:
    """Every classmethod of PolicyLossConfig, with its own defaults."""
    for name, value in vars(PolicyLossConfig).items():
        if isinstance(value, classmethod):
            yield name, getattr(PolicyLossConfig, name)()


def policy_options(v: dict[str, Any]) -> dict[str, Any]:
    """Options of PolicyLossConfig from the axes of `policy`."""
    options = {k: v[k] for k in ("objective", "aggregation")}
    # The others would be refused together.
    if v["ratio_level"] == "clipped-sequence":
        options |= {"ratio_level": v["ratio_level"], "objective": "clip"}
    elif v["objective"] != "reinforce":
        options["ratio_level"] = v["ratio_level"]
    if options["objective"] == "clip" and v["ratio_level"] != "clipped-sequence":
        options |= {"dual_clip": 3.0, "delta": 2.0}
    if v["kl"] is not None:
        estimator, _, weighted = v["kl"].partition(" ")
        options |= {"kl_coef": 0.1, "kl_estimator": estimator}
        options["kl_weight"] = weighted.removesuffix(" capped") or None
        if weighted.endswith("capped"):
            options["kl_weight_max"] = 10.0
    if v["correction"] is not None:
        level, mode = v["correction"]
        options |= {"correction_level": level, "correction_mode": mode, "correction_max": 2.0}
    if v["gate"] is not None:
        gate, _, more = v["gate"].partition(" ")
        options |= {"gate": gate, "gate_low": 0.1, "gate_high": None if gate == "opsm" else 0.2}
        options["gate_against"] = "rollout" if more == "rollout" else "old"
        options["gate_two_sided"] = more == "two-sided"
    if v["entropy"] in ("bonus", "constant bonus"):
        options["entropy_coef"] = 0.01
    return options


def policy(full: bool) -> Iterator[Case]:
    levels, modes = enums.CORRECTION_LEVELS, enums.CORRECTION_MODES
    estimators = enums.KL_ESTIMATORS
    axes = {
        "objective": enums.OBJECTIVES,
        "ratio_level": enums.RATIO_LEVELS,
        "aggregation": enums.AGGREGATIONS,
        "kl": (
            None,
            *estimators,
            "k3 ratio",
            "k3+ ratio",
            "k3 ratio capped",
            "k2 detached-ratio",
            "k2 detached-ratio capped",
            "k3 one",
        ),
        "correction": (None, *itertools.product(levels, modes)),
        "gate": (
            None,
            *enums.GATES,
            "tv rollout",
            "tv two-sided",
            "binary_kl rollout",
            "opsm rollout",
        ),
        "weights": (None, "tokens", "sequences"),
        "entropy": (None, "metric", "bonus", "constant bonus"),
        "given": ("what is needed", "all"),
        "layout": LAYOUTS,
        "advantages": ("tokens", "sequences"),
        "normalizer": NORMALIZERS,
        "grad": (True, False),
        "mask": MASKS,
        "dtype": DTYPES,
    }
    variants = list((pairs if full else one_by_one)(**axes))
    first = {k: v[0] for k, v in axes.items()}
    # Everything that needs registers, at every level.
    most = {"kl": "k3+ ratio", "correction": ("sequence", "mask"), "entropy": "bonus"}
    # And what few losses have.
    full = most | {"kl": "k3 ratio capped", "gate": "binary_kl rollout", "weights": "tokens"}
    variants += [first | most | {"ratio_level": level, "objective": objective, "layout": layout}
                 for level in enums.RATIO_LEVELS
                 for objective, layout in (("clip", "padded"), ("sapo", "packed"))]  # fmt: skip
    variants += [first | full | {"ratio_level": level} for level in enums.RATIO_LEVELS]
    calls = {label(v): (v, PolicyLossConfig(**policy_options(v))) for v in variants}
    calls |= {name: (first, config) for name, config in presets()}
    for name, (v, config) in calls.items():
        x = inputs_of(v["layout"], v["dtype"])
        needs = {
            "ref_logprobs": config.kl_coef,
            "rollout_logprobs": config.correction_level or config.gate_against == "rollout",
            "entropy": v["entropy"] or config.entropy_coef,
        }
        options = {k: GIVEN for k, need in needs.items() if need or v["given"] == "all"}
        constant = config.aggregation == "constant"
        options["normalizer"] = v["normalizer"] or (7.0 if constant else None)
        if v["weights"] is not None:
            options["weights"] = (x.tokens() if v["weights"] == "tokens" else x.sequences()).abs()
        if v["advantages"] == "sequences":
            options["advantages"] = x.sequences()
        grads = ("logprobs",) * v["grad"] + ("entropy",) * (v["entropy"] == "bonus")
        yield case(f"policy_loss/{name}", rk.policy_loss, x, v["layout"],
                   mask=v["mask"], config=config, grads=grads, **options)  # fmt: skip


def value(full: bool) -> Iterator[Case]:
    yield from varied(rk.value_loss, (pairs if full else one_by_one)(
        clip_range=(0.2, None), aggregation=enums.AGGREGATIONS, layout=LAYOUTS,
        normalizer=NORMALIZERS, grad=(True, False), mask=MASKS, dtype=DTYPES,
    ))  # fmt: skip


def mismatch(full: bool) -> Iterator[Case]:
    yield from varied(rk.mismatch_weights, (pairs if full else one_by_one)(
        level=enums.MISMATCH_CODES, mode=enums.CORRECTION_MODES, missing=("one", "drop"),
        normalize=(False, True), layout=LAYOUTS, mask=MASKS, dtype=DTYPES,
    ))  # fmt: skip


def cases(full: bool) -> Iterator[Case]:
    """All calls: options one at a time, or with `full` every two of their values together."""
    yield from examples()
    for of in (rows, scans, general, statistics, policy, value, mismatch):
        yield from of(full)
    yield from triton_sweeps.cases()
