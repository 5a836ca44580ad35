"""Calls of every operation that between them reach every Triton kernel and code variant."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.cases.combinations import one_by_one, pairs, products
from tests.kernels import triton_sweeps
from tests.kernels.triton_case import (
    BF16,
    DTYPES,
    LAYOUTS,
    Case,
    Tokens,
    far,
    label,
    logits,
)

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.config import policy as policy_config
from rlhf_kernels.ops import _examples


def examples() -> Iterator[Case]:
    """What `warmup` runs."""
    calls = [(f.__name__, f, example) for f, example in _examples.EXAMPLES.items()]
    calls += [(f"{f.__name__}_support", f, e) for f, es in _examples.VARIANTS.items() for e in es]
    for name, function, example in calls:
        for dtype in DTYPES:
            x = _examples.Inputs(
                4, 64, dtype, torch.device("cpu"), torch.Generator().manual_seed(0)
            )
            args, options = example(x)
            yield Case(f"example/{name}/{label({'dtype': dtype})}",
                       function, args, options)  # fmt: skip


def token_logprobs(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    axes = {
        "dtype": DTYPES,
        "layout": ("even", "odd", "shifted"),
        "softcap": (None, 30.0),
        "temperature": ("number", "tensor"),
        "labels": (torch.int64, torch.int32),
        "wants": ("both", "logprobs", "entropy", "no entropy"),
    }
    variants = list(combine(**axes))
    # Together they need the most registers.
    variants += [dict(variants[0], dtype=d, softcap=30.0, layout=a)
                 for d in DTYPES for a in ("even", "odd")]  # fmt: skip
    for v in {label(v): v for v in variants}.values():
        x = logits(v["dtype"], v["layout"])
        y = torch.zeros(x.shape[0], dtype=v["labels"])
        t = torch.ones(x.shape[0]) if v["temperature"] == "tensor" else 0.7
        wants = v["wants"]
        options = {"softcap": v["softcap"], "temperature": t, "entropy": wants != "no entropy"}
        chosen = {"logprobs": lambda r: r.logprobs, "entropy": lambda r: r.entropy}
        yield Case(f"token_logprobs/{label(v)}", rk.token_logprobs, (x, y), options,
                   chosen.get(wants, lambda r: r))  # fmt: skip
    x = logits(BF16, "even")
    y = torch.zeros(x.shape[0], dtype=torch.int64)

    def inplace(x: Tensor, *args: Tensor, **options: Any) -> Any:
        return rk.token_logprobs(x * 1, *args, **options)

    yield Case("token_logprobs/inplace", inplace, (x, y), {"inplace_backward": True})
    y = torch.zeros((2, 2), dtype=torch.int64)
    yield Case("token_logprobs/far", rk.token_logprobs, (far(BF16), y), {"entropy": True})


def kl(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    for v in combine(
        dtype=DTYPES, layout=("even", "odd", "shifted"), direction=("reverse", "forward")
    ):
        x, ref = logits(v["dtype"], v["layout"]), logits(v["dtype"], v["layout"])
        options = {"direction": v["direction"]}
        yield Case(f"kl_divergence/{label(v)}", rk.kl_divergence, (x, ref), options)
    # One tensor at an address that is a multiple of 16, the other not.
    x, ref = logits(BF16, "even"), logits(BF16, "shifted")
    yield Case("kl_divergence/ref shifted", rk.kl_divergence, (x, ref), {})
    yield Case("kl_divergence/logits shifted", rk.kl_divergence, (ref, x), {})
    yield Case("kl_divergence/far", rk.kl_divergence, (far(BF16), far(BF16)), {})
    for v in combine(
        estimator=("k3", "k1", "k2", "abs", "k1+", "k3+", "abs+"), dtype=DTYPES, ref=DTYPES
    ):
        x = torch.zeros(5, 7, dtype=v["dtype"], requires_grad=True)
        ref, options = torch.zeros(5, 7, dtype=v["ref"]), {"estimator": v["estimator"]}
        yield Case(f"kl_penalty/{label(v)}", rk.kl_penalty, (x, ref), options)


def support(full: bool) -> Iterator[Case]:
    """Log-probabilities over the words that a sampler kept, of logits and of the fused head."""
    combine = products if full else one_by_one
    axes = {
        "form": ("logits", "head", "head odd"),
        "dtype": DTYPES,
        "softcap": (None, 30.0),
        "temperature": ("number", "tensor"),
        "labels": (torch.int64, torch.int32),
        "support": (torch.int64, torch.int32),
        "wants": ("both", "logprobs", "entropy", "no entropy"),
        "bias": (True, False),
    }
    variants = list(combine(**axes))
    variants += [dict(variants[0], form=f, dtype=d) for f in axes["form"] for d in DTYPES]
    variants += [dict(variants[0], form=f, bias=False) for f in axes["form"][1:]]
    chosen = {"logprobs": lambda r: r.logprobs, "entropy": lambda r: r.entropy}
    for v in {label(v): v for v in variants}.values():
        dtype, wants = v["dtype"], v["wants"]
        y = torch.zeros(3, dtype=v["labels"])
        t = torch.ones(3) if v["temperature"] == "tensor" else 0.7
        kept = (torch.arange(4) * 2).to(v["support"]), torch.tensor([0, 1] * 3).to(v["support"])
        options = {"support": kept, "softcap": v["softcap"], "temperature": t}
        options["entropy"] = wants != "no entropy"
        op = "token_logprobs" if v["form"] == "logits" else "linear_token_logprobs"
        name, last = f"{op}_support/{label(v)}", chosen.get(wants, lambda r: r)
        if v["form"] == "logits":
            yield Case(name, rk.token_logprobs, (logits(dtype, "even"), y), options, last)
            continue
        width = 64 if v["form"] == "head" else 61
        hidden, weight = (torch.zeros(n, width, dtype=dtype, requires_grad=True) for n in (3, 9))
        if v["bias"]:
            options["bias"] = torch.zeros(9, dtype=dtype, requires_grad=True)
        yield Case(name, rk.linear_token_logprobs, (hidden, weight, y), options, last)


def scans(full: bool) -> Iterator[Case]:
    axes = {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "mask": (None, torch.bool, torch.int64),
        "dones": (None, torch.bool),
        "bootstrap": (False, True),
        "masked": ("carry", "zero"),
    }
    whitening = {"whiten": (False, True)}
    penalties = {"kl_estimator": ("k1", "k2", "k3", "abs", "none"), "reward_clip": (None, 5.0)}
    combine = pairs if full else one_by_one
    for op, extra in (("gae", whitening), ("discounted_returns", {}), ("ppo_advantages", None)):
        if extra is None:
            extra = whitening | penalties
            axes = {k: v for k, v in axes.items() if k not in ("dones", "bootstrap")}
        variants = list(combine(**axes, **extra))
        # Much at once: masked, packed, cut and continued.
        variants.append({k: v[-1] for k, v in (axes | extra).items()})
        variants.append(variants[-1] | {"layout": "long", "masked": "carry"})
        for v in {label(v): v for v in variants}.values():
            tokens, dtype = Tokens(v["layout"]), v["dtype"]
            x = [tokens(dtype) for _ in range(3)]
            mask = None if v["mask"] is None else tokens(v["mask"])
            options = tokens.options() | {k: v[k] for k in ("whiten", "masked") if k in v}
            if op == "ppo_advantages":
                ref = None if v["kl_estimator"] == "none" else x[1]
                options["reward_clip"] = v["reward_clip"]
                if ref is not None:
                    options |= {"kl_coef": 0.1, "kl_estimator": v["kl_estimator"]}
                args: tuple = (torch.zeros(3, dtype=dtype), x[0], ref, x[2], mask)
            else:
                args = tuple(x[:2]) if op == "gae" else tuple(x[:1])
                options["mask"] = mask
                options["dones"] = None if v["dones"] is None else tokens(v["dones"])
                options["bootstrap_values"] = (
                    torch.zeros(3, dtype=dtype) if v["bootstrap"] else None
                )
            yield Case(f"{op}/{label(v)}", getattr(rk, op), args, options)


def statistics(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    for v in combine(
        dtype=DTYPES, layout=("padded", "strided"), mask=(torch.bool, None, torch.int64),
        shift_mean=(True, False),
    ):  # fmt: skip
        tokens = Tokens(v["layout"])
        mask = None if v["mask"] is None else torch.zeros(3, 70, dtype=v["mask"])
        options = {"mask": mask, "shift_mean": v["shift_mean"]}
        yield Case(f"whiten/{label(v)}", rk.whiten, (tokens(v["dtype"]),), options)
    for v in combine(
        dtype=(*DTYPES, torch.float64), groups=(4, "ids"),
        baseline=("mean", "leave-one-out", "greedy", "none"), scale=("group", "batch", "none"),
    ):  # fmt: skip
        rewards = torch.zeros(12, dtype=v["dtype"])
        options = {"baseline": v["baseline"], "scale": v["scale"]}
        if v["baseline"] == "greedy":
            options["greedy_rewards"] = rewards.clone()
        groups = torch.arange(12) // 3 if v["groups"] == "ids" else v["groups"]
        yield Case(f"group_advantages/{label(v)}", rk.group_advantages, (rewards, groups), options)


def normalizers(kind: str | None) -> float | Tensor | None:
    return {None: None, "number": 7.0, "tensor": torch.tensor(7.0)}[kind]


def presets() -> Iterator[tuple[str, PolicyLossConfig]]:
    """Every classmethod of PolicyLossConfig, with its own defaults."""
    for name, value in vars(PolicyLossConfig).items():
        if isinstance(value, classmethod):
            yield name, getattr(PolicyLossConfig, name)()


def policy_options(v: dict[str, Any]) -> dict[str, Any]:
    """Options of PolicyLossConfig from the axes of `policy`."""
    options = {k: v[k] for k in ("objective", "aggregation")}
    # The others would be refused together.
    if v["objective"] != "reinforce":
        options["ratio_level"] = v["ratio_level"]
    if v["objective"] == "clip":
        options |= {"dual_clip": 3.0, "delta": 2.0}
    if v["kl"] is not None:
        estimator, _, weighted = v["kl"].partition(" ")
        options |= {"kl_coef": 0.1, "kl_estimator": estimator}
        options["kl_importance_weighted"] = bool(weighted)
    if v["correction"] is not None:
        level, mode = v["correction"]
        options |= {"correction_level": level, "correction_mode": mode, "correction_max": 2.0}
    if v["entropy"] in ("bonus", "constant bonus"):
        options["entropy_coef"] = 0.01
    return options


def policy(full: bool) -> Iterator[Case]:
    levels, modes = policy_config.CORRECTION_LEVELS, policy_config.CORRECTION_MODES
    estimators = policy_config.KL_ESTIMATORS
    axes = {
        "objective": policy_config.OBJECTIVES,
        "ratio_level": policy_config.RATIO_LEVELS,
        "aggregation": policy_config.AGGREGATIONS,
        "kl": (None, *estimators, "k3 weighted", "k3+ weighted"),
        "correction": (None, *itertools.product(levels, modes)),
        "entropy": (None, "metric", "bonus", "constant bonus"),
        "given": ("what is needed", "all"),
        "layout": LAYOUTS,
        "advantages": ("tokens", "sequences"),
        "normalizer": (None, "number", "tensor"),
        "grad": (True, False),
        "mask": (torch.bool, torch.int64),
        "dtype": DTYPES,
    }
    variants = list((pairs if full else one_by_one)(**axes))
    first = {k: v[0] for k, v in axes.items()}
    # Everything that needs registers, at every level.
    most = {"kl": "k3+ weighted", "correction": ("sequence", "mask"), "entropy": "bonus"}
    variants += [first | most | {"ratio_level": level, "objective": objective, "layout": layout}
                 for level in policy_config.RATIO_LEVELS
                 for objective, layout in (("clip", "padded"), ("sapo", "packed"))]  # fmt: skip
    calls = [(label(v), v, PolicyLossConfig(**policy_options(v))) for v in variants]
    calls += [(name, first, config) for name, config in presets()]
    for name, v, config in {name: (name, v, c) for name, v, c in calls}.values():
        tokens, dtype, all_given = Tokens(v["layout"]), v["dtype"], v["given"] == "all"
        advantages = tokens(dtype) if v["advantages"] == "tokens" else torch.zeros(3, dtype=dtype)
        options = tokens.options() | {"config": config}
        kind = v["normalizer"]
        if config.aggregation == "constant" and kind is None:
            kind = "number"
        options["normalizer"] = normalizers(kind)
        if all_given or config.kl_coef:
            options["ref_logprobs"] = tokens(dtype)
        if all_given or config.correction_level:
            options["rollout_logprobs"] = tokens(dtype)
        if all_given or v["entropy"] or config.entropy_coef:
            options["entropy"] = tokens(dtype, grad=v["entropy"] == "bonus")
        args = (tokens(dtype, grad=v["grad"]), tokens(dtype), advantages)
        options["mask"] = tokens(v["mask"])
        yield Case(f"policy_loss/{name}", rk.policy_loss, args, options)


def value(full: bool) -> Iterator[Case]:
    for v in (pairs if full else one_by_one)(
        clip_range=(0.2, None), aggregation=policy_config.AGGREGATIONS, layout=LAYOUTS,
        normalizer=(None, "number", "tensor"), grad=(True, False), mask=(torch.bool, torch.int64),
        dtype=DTYPES,
    ):  # fmt: skip
        tokens, kind = Tokens(v["layout"]), v["normalizer"]
        if v["aggregation"] == "constant" and kind is None:
            kind = "number"
        options = {k: v[k] for k in ("clip_range", "aggregation")} | tokens.options()
        options["normalizer"] = normalizers(kind)
        x = [tokens(v["dtype"], grad=v["grad"] and i == 0) for i in range(3)]
        options["mask"] = tokens(v["mask"])
        yield Case(f"value_loss/{label(v)}", rk.value_loss, tuple(x), options)


def cases(full: bool) -> Iterator[Case]:
    """All calls: options one at a time, or with `full` any two of them together."""
    yield from examples()
    yield from token_logprobs(full)
    yield from kl(full)
    yield from support(full)
    yield from scans(full)
    yield from statistics(full)
    yield from policy(full)
    yield from value(full)
    yield from triton_sweeps.cases()
